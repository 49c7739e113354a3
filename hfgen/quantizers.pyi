from typing import Any

from hfgen_plugins.quantizers.adaquant import AdaQuantConfig as AdaQuantConfig
from hfgen_plugins.quantizers.easyquant import EasyQuantConfig as EasyQuantConfig
from hfgen_plugins.quantizers.nupes import NupesConfig as NupesConfig

def __getattr__(name: str) -> Any: ...  # a third party's
