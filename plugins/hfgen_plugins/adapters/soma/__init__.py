"""SoMA: train the smallest singular components of each weight, keep the rest of it and the early blocks."""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="soma",
    kind="adapters",
    summary="Trains the r smallest singular components of each weight as a product, with an annealed weight decay.",
    target="hfgen_plugins.adapters.soma.soma:SomaConfig",
    exports=("SomaConfig",),
    paper=Paper(
        "SoMA: Singular Value Decomposed Minor Components Adaptation for Domain Generalizable Representation Learning",
        "arXiv:2412.04077",
        2024,
    ),
    needs=(
        "Linear or Conv1D targets (quantised ones through peft's backends)",
        "one full SVD per target at start, none at load",
        "torch's global optimizer hook, while a model with the adapter lives: before a step it sets `weight_decay` of the "
        "groups that hold the adapter's factors (a head in the same group is annealed with them); step and length are the "
        "Trainer's, found among the callers, or counted in the group up to total_steps",
    ),
    conflicts=(
        "PeftMixedModel (closed to third parties)",
        "nn.MultiheadAttention targets",
        "DeepSpeed and FSDP1: the optimizer holds flat shards, so weight_decay must be None (refused otherwise)",
        "layer-wise optimizers of Trainer (GaLore and such): weight decay is not annealed, with a warning",
    ),
    defaults=(
        "weight decay 0.05 -> 1e-5 and alpha = r as in the authors' settings; r=8 and start_block=0 are ours, for parity "
        "with LoRA's cost (the authors: r=16, blocks 8 to 23 of 24, all linears in them, AdamW, lr 1e-4, 0.5 of it in "
        "the backbone)"
    ),
    deviations=(
        "delta form: the base weight is not overwritten by its residual, so the start is exact and disable() is bit-exact; "
        "the frozen start of the factors is saved beside them (2 r (m + n) numbers per target)",
        "singular values at rounding level start as LoRA's (B = 0): the authors' two tiny factors hardly move",
        "biases of adapted layers are trained with bias='soma_only' only, the authors' default; the mask token is not",
        "weight decay is annealed in the optimizer groups that hold the adapter, the authors anneal all; no rank ramp",
        "never by a sketch: the authors' default setting returns the largest components",
    ),
    sources="ysj9909/SoMA (MIT): read for the method sheet, no code used",
    claims=(
        Claim(
            "domain-generalisation",
            "Generalises better to unseen domains than other parameter-efficient fine-tuning in semantic segmentation.",
            paper_value="68.27 mIoU on average, GTAV to Cityscapes, BDD100K and Mapillary (README of the code)",
        ),
        Claim(
            "against-cousins",
            (
                "At as many trained numbers it learns about as much of a new task as PiSSA and MiCA and keeps at "
                "least as much of the old."
            ),
            experiment="hfgen_plugins.adapters.soma.evidence:EXPERIMENT",
        ),
    ),
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"soma": ["SomaConfig"]})
