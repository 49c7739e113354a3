from typing import Any

from hfgen_plugins.adapters.increlora import IncreLoraConfig as IncreLoraConfig
from hfgen_plugins.adapters.intrinsic import IntrinsicConfig as IntrinsicConfig
from hfgen_plugins.adapters.intrinsic import IntrinsicDimension as IntrinsicDimension
from hfgen_plugins.adapters.intrinsic import estimate_d90 as estimate_d90
from hfgen_plugins.adapters.loldu import LoLDUConfig as LoLDUConfig
from hfgen_plugins.adapters.sara import SaraAdamW as SaraAdamW
from hfgen_plugins.adapters.sara import SaraConfig as SaraConfig
from hfgen_plugins.adapters.sara import sara_learning_rate as sara_learning_rate
from hfgen_plugins.adapters.soma import SomaConfig as SomaConfig
from hfgen_plugins.adapters.svfit import SVFitConfig as SVFitConfig

def __getattr__(name: str) -> Any: ...  # a third party's
