"""Overfitting: the gap between training and validation loss, and a test that says since when the latter rises."""

import lazy_loader

from hfgen.card import MethodCard

CARD = MethodCard(
    name="overfit_gap",
    kind="callbacks",
    summary="Follows the gap between training and validation loss and tests whether, and since when, the latter rises.",
    target="hfgen_plugins.callbacks.overfit_gap.overfit_gap:OverfitGapCallback",
    exports=("OverfitGapCallback",),
    needs=(
        "the user's own evaluations with labels (eval_strategy other than 'no')",
        "a logged training loss (logging_strategy other than 'no')",
    ),
    conflicts=(),
    defaults=(
        "alpha 0.01, min_rise 0.05 and min_nats 0.03: calibrated on half of the corpus of labelled runs (EVIDENCE.md); 5 "
        "evaluations before the first test: ours; "
        "the definition of early stopping's best step is that of Prechelt (1998), Early Stopping - But When?"
    ),
    deviations=(
        "the test takes the noise of two evaluations as independent: validation loss along one run wanders, so min_rise "
        "asks for a rise that matters besides one that is significant",
        "every evaluation is tested at the same alpha; testing again and again is not corrected for",
        "training loss is what the host logs: a mean over past steps, in training mode (with dropout and label smoothing); "
        "validation loss is the host's eval_loss, a mean of batch means that depends a little on how rows are cut",
    ),
    sources="none",
    claims=(),
    example="hfgen_plugins.callbacks.overfit_gap.overfit_gap:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"overfit_gap": ["OverfitGapCallback"]})
