"""SaRA (arXiv:2409.06633): train the entries of smallest magnitude, in place."""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="sara",
    kind="adapters",
    summary="Trains the entries of smallest magnitude, below one threshold for the whole model, inside the base weights.",
    target="hfgen_plugins.adapters.sara.sara:SaraConfig",
    exports=("SaraConfig", "SaraAdamW", "sara_learning_rate"),
    paper=Paper(
        "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
        "arXiv:2409.06633",
        2024,
    ),
    needs=(
        "Linear, Conv1D, convolution and norm targets, their weights and biases; of quantised (peft's backends, EasyQuant) "
        "and tied Linear weights only, where dW is added by a second product",
        "for nuclear_weight and progressive_at a torch.optim.Optimizer (torch's step hooks); another one is refused",
    ),
    conflicts=(
        "FSDP and DeepSpeed ZeRO, and off-loaded weights (refused)",
        "PeftMixedModel (closed to third parties); nn.MultiheadAttention and embedding targets",
        "bias='all' and 'sara_only' (biases of targets take part by their size)",
        "code that reads a target's weight without calling it sees the active adapter's values; state_dict() does not",
        "torch.compile: right and without graph break, but each forward then copies the target's weight",
    ),
    defaults=(
        "density 0.06: ours, near what the authors' threshold 2e-3 gives on SD-1.5 (from memory). nuclear_weight and "
        "progressive_at are off, as in the authors' constructor; their finetune.sh uses 5e-4 and half of the steps. "
        "Learning rate: sara_learning_rate(threshold) = 1e-3 exp(-350 threshold)."
    ),
    deviations=(
        "sign-preserving start: the authors' adamw.py writes |w| into the weights",
        "the nuclear term acts (theirs goes to detached tensors), once per optimizer step, after clipping; its gradient is "
        "a Newton-Schulz polar factor: singular values below about 1 % of the largest count in part",
        "one layer's dense gradient at a time is made and thinned out; it is not cut into row blocks",
        "progressive_at is a number of steps, not a share: an adapter does not know the run's length",
        "frozen entries stay in the trained vector after a re-threshold: the optimizer's state stays 2 nnz",
        "the file holds values and the mask's 64-bit hash; the threshold stands in adapter_config.json",
        "bf16 bases train float32 masters (PEFT's rule), which are rounded into the weight",
    ),
    sources="sjtuplayer/SaRA was read for the method sheet (no licence file in the stored copy); no code of it is used",
    claims=(
        Claim(
            "against-cousins",
            "Learns about as much as full fine-tuning and SHiRA of as many entries, and keeps at least as much of the old.",
            experiment="hfgen_plugins.adapters.sara.evidence:EXPERIMENT",
        ),
    ),
)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"sara": ["SaraConfig", "sara_learning_rate"], "optim": ["SaraAdamW"]}
)
