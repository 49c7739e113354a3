"""Grokking: generalisation long after the training data is fitted (Power et al. 2022)."""

import lazy_loader

from hfgen.card import MethodCard, Paper

CARD = MethodCard(
    name="grokking",
    kind="callbacks",
    summary="Tells memorised from generalising runs at the user's evaluations, and a delayed generalisation by its delay.",
    target="hfgen_plugins.callbacks.grokking.grokking:GrokkingCallback",
    exports=("GrokkingCallback",),
    paper=Paper(
        title="Grokking: Generalization Beyond Overfitting on Small Algorithmic Datasets",
        id="arXiv:2201.02177",
        year=2022,
    ),
    needs=(
        "evaluations during training whose metrics hold an accuracy (compute_metrics, or SFTTrainer's "
        "mean_token_accuracy)",
        "an evaluation set of training rows (train=), or a training set with a length whose batches have class labels",
    ),
    conflicts=(
        "streamed training sets without train=: the same rows cannot be read again",
        "FSDP 1 without train=: refused, the callback forwards training rows; FSDP 2 works",
    ),
    defaults=(
        "fitted at 0.99, memorised below chance + 0.5, grokking from 0.05 above the lowest since, generalised at chance + "
        "0.9 (1 - chance): our method sheet, but for chance + 0.5, calibrated on half of the corpus "
        "of labelled runs (EVIDENCE.md)"
    ),
    deviations=(
        "the paper names the phenomenon and plots it; the states, their thresholds and the area between the curves over "
        "log steps are ours",
        "kernel alignment and drift (lazy to rich training) are not measured",
    ),
    sources="none",
    example="hfgen_plugins.callbacks.grokking.grokking:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"grokking": ["GrokkingCallback"]})
