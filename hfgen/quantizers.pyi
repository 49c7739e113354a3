from typing import Any

from hfgen_plugins.quantizers.easyquant import EasyQuantConfig as EasyQuantConfig

def __getattr__(name: str) -> Any: ...  # a third party's
