"""SVFit (arXiv:2409.05926): train the leading singular values of each weight, keep its singular vectors."""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="svfit",
    kind="adapters",
    summary="Trains only the top r singular values of each weight between its frozen singular vectors.",
    target="hfgen_plugins.adapters.svfit.svfit:SVFitConfig",
    exports=("SVFitConfig",),
    paper=Paper(
        "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
        "arXiv:2409.05926",
        2024,
    ),
    needs=("Linear or Conv1D targets (quantised ones through peft's backends)", "one SVD per target at start and load"),
    conflicts=(
        "PeftMixedModel (closed to third parties)",
        "nn.MultiheadAttention targets",
        "FSDP2 with mixed precision, unless decay_to_init=True and no train_scale (refused in words)",
        "FSDP with cpu_ram_efficient_loading, and adding or merging on a model that is sharded already (refused in words)",
        "DDP over unlike hardware, which may factorise differently: save once with save_factors=True and load that",
    ),
    defaults=(
        "r=8 for parity with LoRA's cost; the paper uses full rank (r=768 on base models). "
        "Learning rate: 10 to 100 times LoRA's."
    ),
    deviations=(
        "delta form: the base weight is not overwritten by a residual, so the start is exact and disable() is bit-exact",
        "`scaling` and `decay_to_init` are ours",
    ),
    sources="none (no public code)",
    claims=(
        Claim(
            "fewer-parameters",
            "At least as accurate as LoRA with 16 times fewer trainable parameters.",
            experiment="hfgen_plugins.adapters.svfit.evidence:EXPERIMENT",
            paper_value="16x (abstract)",
        ),
    ),
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"svfit": ["SVFitConfig"]})
