"""LoLDU: train the diagonal of a permuted LDU factorisation of each weight."""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="loldu",
    kind="adapters",
    summary="Trains r entries of the diagonal of a permuted lower-diagonal-upper factorisation of each weight.",
    target="hfgen_plugins.adapters.loldu.loldu:LoLDUConfig",
    exports=("LoLDUConfig",),
    paper=Paper(
        "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
        "arXiv:2410.13618",
        2024,
    ),
    needs=("Linear or Conv1D targets (quantised ones through peft's backends)", "one LU per target at start and load"),
    conflicts=(
        "PeftMixedModel (closed to third parties); SGD: gradients are uneven, use Adam",
        "FSDP2 with mixed precision, unless decay_to_init=True and no train_scale (refused in words)",
        "FSDP with cpu_ram_efficient_loading; adding or merging on a sharded model; nn.MultiheadAttention (refused)",
        "DDP over unlike hardware, which may factorise differently: save once with save_factors=True and load that",
    ),
    defaults=("r=8 for LoRA's cost; the paper: r=alpha=768 on base models, AdamW, lr 2e-4..4e-4 (GLUE), 3e-3 (ViT)"),
    deviations=(
        "delta form: the base weight is not overwritten by a residual, so the start is exact for every init_z",
        "preserve_function is explicit; in the authors' code it follows from which init_z aliases the residual's storage",
        "a pivot at rounding level is frozen (the authors' D^-1 U is NaN there)",
        "the paper counts a trained scale; the authors' code freezes it: train_scale=False",
        "no claim of orthogonality: L and U are triangular",
    ),
    sources="SKDDJ/LoLDU 4fe87a0 (no licence file): read to settle the inits, numbers compared, no code used",
    claims=(
        Claim(
            "vision",
            "More accurate than LoRA r=16 on image classification with far fewer trained numbers.",
            experiment="hfgen_plugins.adapters.loldu.evidence:EXPERIMENT",
            paper_value="82.79 against 76.22 (ViT-B, r=768; from a transcription of the table)",
        ),
    ),
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"loldu": ["LoLDUConfig"]})
