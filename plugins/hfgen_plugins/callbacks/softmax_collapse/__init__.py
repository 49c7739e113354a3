"""Softmax collapse: training tokens whose softmax is rounded to exactly one and stops teaching (Prieto et al. 2025)."""

import lazy_loader

from hfgen.card import MethodCard, Paper

CARD = MethodCard(
    name="softmax_collapse",
    kind="callbacks",
    summary="Says when the softmax of training tokens is rounded to exactly 1, so that they no longer teach.",
    target="hfgen_plugins.callbacks.softmax_collapse.softmax_collapse:SoftmaxCollapseCallback",
    exports=("SoftmaxCollapseCallback",),
    paper=Paper(title="Grokking at the Edge of Numerical Stability", id="arXiv:2501.04697", year=2025),
    needs=(
        "a training set with a length whose batches have class labels (of tokens or of rows)",
        "a model whose output has logits",
    ),
    conflicts=(
        "streamed training sets: the same rows cannot be read again",
        "FSDP 1: refused, a look forwards the model that the host hands to callbacks, whose weights are flat; FSDP 2 works",
        "a loss other than softmax cross-entropy or StableMax: its collapse is another number",
    ),
    defaults=(
        "ours: every 100 steps, rows worth two thirds of a step and 256 tokens at most, for a cost under 1 %; a "
        "fifth of the tokens as threshold: calibrated on half of the corpus of labelled runs (EVIDENCE.md)"
    ),
    deviations=(
        "measured on fixed training rows in evaluation mode between steps, not on the training batch itself: the same "
        "numbers under accumulation, several ranks, gradient checkpointing and trl's fused head",
        "the authors' StableMax and orthogonal gradients are named as advice, not shipped here; the alignment of gradient "
        "and weights is not measured",
    ),
    sources="LucasPrietoAl/grokking-at-the-edge-of-numerical-stability (MIT), read for the method sheet",
    example="hfgen_plugins.callbacks.softmax_collapse.softmax_collapse:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"softmax_collapse": ["SoftmaxCollapseCallback"]}
)
