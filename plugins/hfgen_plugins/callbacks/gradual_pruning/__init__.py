"""Gradual pruning (arXiv:1710.01878): magnitude pruning along a cubic schedule while the model trains."""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="gradual_pruning",
    kind="callbacks",
    summary="Zeroes the smallest weights little by little while a model trains (any sparsity, or n:m such as 2:4).",
    target="hfgen_plugins.callbacks.gradual_pruning.gradual_pruning:GradualPruningCallback",
    exports=("GradualPruningCallback",),
    paper=Paper(
        title="To prune, or not to prune: exploring the efficacy of pruning for model compression",
        id="arXiv:1710.01878",
        year=2017,
    ),
    needs=(
        "trained Linear or Conv1D layers, whole on every device (one device or DDP)",
        "a mask as large as the pruned weights; one bit per pruned weight more in every checkpoint",
    ),
    conflicts=(
        "FSDP and DeepSpeed: refused, they keep the weights in pieces",
        "PEFT adapters in training: refused, the base is frozen and not in their checkpoints; prune first, then adapt",
        "load_best_model_at_end: refused unless all is pruned before the first step; an earlier checkpoint is denser",
        "averages of checkpoints (soup, EMA): a weight is zero in the average only where it is in all of them",
        "merging an adapter into the pruned checkpoint: a dense delta fills the zeros again",
    ),
    defaults=(
        "cubic, from 0, as in the paper; begin after a sixth of the run (or the warm-up), end after three fifths of the "
        "rest, some 20 updates between: what our method sheet (C1) measured with, scaled to the run's length. Embeddings "
        "and the output head stay dense, as is usual"
    ),
    deviations=(
        "a pruned weight stays pruned: its stored value is zero. The paper's code keeps the value under the mask, so that "
        "the weight can come back where others shrink below it",
        "where frequency does not divide end_step - begin_step the last interval is shorter; the paper wants n whole ones",
        "n:m patterns and one threshold for all layers (scope='global') are ours",
        "the checkpoint is a plain dense one with zeros: it is NOT smaller on disk, and faster only where the runtime has "
        "kernels for its pattern (2:4). At high sparsity a small dense model is the better one: see the claim",
    ),
    sources="none",
    claims=(
        Claim(
            "large-sparse",
            "At equal non-zero weights a large model pruned gradually to 90 % is more accurate than a small dense one and "
            "than one pruned at once.",
            experiment="hfgen_plugins.callbacks.gradual_pruning.evidence:EXPERIMENT",
        ),
    ),
    example="hfgen_plugins.callbacks.gradual_pruning.gradual_pruning:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"gradual_pruning": ["GradualPruningCallback"]}
)
