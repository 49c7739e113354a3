"""The learning curve: where a run will end, how sure that is, and whether the rest of it is worth the time."""

import lazy_loader

from hfgen.card import MethodCard

CARD = MethodCard(
    name="learning_curve",
    kind="callbacks",
    summary="Predicts the end of a run with an interval from its evaluations, and says when the rest is not worth it.",
    target="hfgen_plugins.callbacks.learning_curve.learning_curve:LearningCurveCallback",
    exports=("LearningCurveCallback",),
    needs=("evaluations during training with one metric to follow, 5 or more after the warm-up",),
    conflicts=(
        "a decaying learning rate (linear, cosine, ...): the curve falls once more at its end, so that a prediction from "
        "before is too pessimistic; it warns, makes no finding, and refuses stop=True",
    ),
    defaults=(
        "ours: a rest worth less than 1 % of what was gained so far, in 3 fits one after the other, 95 % sure; 5 points at "
        "least, 200 bootstrap draws; exponents from 1e-3 to 5: our method sheet"
    ),
    deviations=(
        "a building block without one paper: the power law c + a x^-b, fitted by exact least squares in (a, c) at each b",
        "points of the warm-up are left out; no other point is, and all weigh the same",
        "the 95 % are a bootstrap prediction interval, made wider by what it has missed in this run: early in a run, and "
        "where the data change in its middle, it still holds less than it says (EVIDENCE.md)",
    ),
    sources="none",
    example="hfgen_plugins.callbacks.learning_curve.learning_curve:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"learning_curve": ["LearningCurveCallback"]})
