"""Judge `numeric`: the final numbers of answer and gold are equal, as for GSM8K."""

import lazy_loader

from hfgen.card import MethodCard

CARD = MethodCard(
    name="numeric",
    kind="judges",
    summary="True when the final numbers of answer and gold are equal (####, \\boxed{}, 1,000, $5, 1/2, 1e3).",
    target="hfgen_plugins.judges.numeric.judge:NumericJudge",
    exports=("NumericJudge", "final_number"),
    defaults="our choice: exact comparison of fractions, numbers of at most 64 characters and exponents of at most 400",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"judge": ["NumericJudge", "final_number"]})
