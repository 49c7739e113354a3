"""Calibration: whether the model is right as often as it says, its reliability table, and the temperature that mends it."""

import lazy_loader

from hfgen.card import MethodCard

CARD = MethodCard(
    name="calibration",
    kind="callbacks",
    summary="Measures whether a classifier or language model is right as often as it says, and what temperature mends it.",
    target="hfgen_plugins.callbacks.calibration.calibration:CalibrationCallback",
    exports=("CalibrationCallback",),
    needs=(
        "the user's own evaluations (eval_strategy other than 'no') of a dataset with a length",
        "a classifier, token classifier or language model: a forward that gives logits, integer labels",
    ),
    conflicts=(
        "evaluation sets that are streams, regression, several labels per row: refused",
        "FSDP 1: refused, the callback forwards rows itself",
    ),
    defaults=(
        "15 bins: Guo et al. 2017 (On Calibration of Modern Neural Networks, arXiv:1706.04599; the number from memory); "
        "256 rows and alpha 0.01: ours; max_ece 0.15: calibrated on half of the corpus of labelled runs (EVIDENCE.md). "
        "Expected calibration error: Naeini et al. 2015 (equal width), Nixon et al. 2019 (equal mass); Brier 1950; test: "
        "consistency resampling, Broecker and Smith 2007"
    ),
    deviations=(
        "only the most likely class (or token) is judged, as in top-label calibration error",
        "of a language model each labelled next token counts as one prediction; tokens of one row depend on each other, "
        "so the p-value is too small for them: max_ece asks for an error that matters besides",
        "the resampling draws sums of a bin from a normal distribution instead of each answer",
        "of language models the temperature is fitted on at most 2048 evenly spread labels, fewer for vocabularies above "
        "8192 (temperature_labels says how many)",
    ),
    sources="none",
    claims=(),
    example="hfgen_plugins.callbacks.calibration.calibration:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"calibration": ["CalibrationCallback"]})
