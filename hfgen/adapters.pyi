from typing import Any

from hfgen_plugins.adapters.loldu import LoLDUConfig as LoLDUConfig
from hfgen_plugins.adapters.svfit import SVFitConfig as SVFitConfig

def __getattr__(name: str) -> Any: ...  # a third party's
