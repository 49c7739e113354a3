"""Forgetting: loss and accuracy on skills the model had before training, with an interval for what is lost."""

import lazy_loader

from hfgen.card import MethodCard

CARD = MethodCard(
    name="forgetting",
    kind="callbacks",
    summary="Measures loss and accuracy on held skills before, during and after training, and what of them is lost.",
    target="hfgen_plugins.callbacks.forgetting.forgetting:ForgettingCallback",
    exports=("ForgettingCallback",),
    needs=(
        "for each skill, tokenised (or otherwise numeric) rows with labels that are not trained on",
        "the user's own evaluations (eval_strategy other than 'no'), or every=",
        "a classifier or a language model: a forward that gives logits",
    ),
    conflicts=(
        "regression and several labels per row: refused",
        "FSDP 1: refused, the callback forwards rows itself",
        "DeepSpeed ZeRO-3: not tried",
    ),
    defaults=(
        "128 rows per skill, alpha 0.01, share 0.1: ours; min_drop 0.05: ours, kept by the calibration on half of the "
        "corpus of labelled runs (EVIDENCE.md). "
        "Forgetting is the accuracy at the start minus that now, the standard definition (Chaudhry et al. 2018, "
        "Riemannian Walk, arXiv:1801.10112; from memory) with the start of the run in place of the best so far"
    ),
    deviations=(
        "one run has one start: forgetting is relative to it, not to the maximum over earlier tasks",
        "accuracy of a language model is that of its next tokens given the true ones before them",
        "every look is tested at the same alpha (divided by the number of skills); looking again and again is not "
        "corrected for",
    ),
    sources="none",
    claims=(),
    example="hfgen_plugins.callbacks.forgetting.forgetting:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"forgetting": ["ForgettingCallback"]})
