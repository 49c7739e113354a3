from typing import Any

from hfgen_plugins.judges.exact import ExactJudge as ExactJudge
from hfgen_plugins.judges.numeric import NumericJudge as NumericJudge
from hfgen_plugins.judges.numeric import final_number as final_number

def __getattr__(name: str) -> Any: ...  # a third party's
