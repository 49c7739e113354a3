from typing import Any

from hfgen_plugins.adapters.loldu import LoLDUConfig as LoLDUConfig
from hfgen_plugins.adapters.sara import SaraAdamW as SaraAdamW
from hfgen_plugins.adapters.sara import SaraConfig as SaraConfig
from hfgen_plugins.adapters.sara import sara_learning_rate as sara_learning_rate
from hfgen_plugins.adapters.soma import SomaConfig as SomaConfig
from hfgen_plugins.adapters.svfit import SVFitConfig as SVFitConfig

def __getattr__(name: str) -> Any: ...  # a third party's
