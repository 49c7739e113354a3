from typing import Any

from hfgen_plugins.judges.code import CodeJudge as CodeJudge
from hfgen_plugins.judges.code import extract_code as extract_code
from hfgen_plugins.judges.exact import ExactJudge as ExactJudge
from hfgen_plugins.judges.f1 import F1Judge as F1Judge
from hfgen_plugins.judges.f1 import token_f1 as token_f1
from hfgen_plugins.judges.llm import LLMJudge as LLMJudge
from hfgen_plugins.judges.numeric import NumericJudge as NumericJudge
from hfgen_plugins.judges.numeric import final_number as final_number

def __getattr__(name: str) -> Any: ...  # a third party's
