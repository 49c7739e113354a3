"""Judge `exact`: the answer is the gold answer, apart from white space and (by default) case."""

import lazy_loader

from hfgen.card import MethodCard

CARD = MethodCard(
    name="exact",
    kind="judges",
    summary="True when the answer equals the gold answer after white space and case are normalised.",
    target="hfgen_plugins.judges.exact.judge:ExactJudge",
    exports=("ExactJudge",),
    defaults="our choice: case and surrounding or repeated white space are ignored, punctuation is not",
    conflicts=("free-form answers: what the model phrases differently counts as wrong, and S3FT degenerates to SFT",),
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"judge": ["ExactJudge"]})
