from typing import Any

from hfgen_plugins.callbacks.hyperfit import HyperfitCallback as HyperfitCallback
from hfgen_plugins.callbacks.hyperfit import hyperfit_args as hyperfit_args

def __getattr__(name: str) -> Any: ...  # a third party's
