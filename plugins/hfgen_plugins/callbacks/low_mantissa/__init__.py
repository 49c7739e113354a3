"""Training with fewer mantissa bits, simulated, and the sharpness of the loss in the logits (Lee et al. 2024)."""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="low_mantissa",
    kind="callbacks",
    summary="Simulates fewer mantissa bits in a run's matrix products and watches how sharp its loss becomes.",
    target="hfgen_plugins.callbacks.low_mantissa.low_mantissa:LowMantissaCallback",
    exports=("LowMantissaCallback", "simulate_mantissa", "round_mantissa", "loss_sharpness"),
    paper=Paper(
        title="To FP8 and Back Again: Quantifying Reduced Precision Effects on LLM Training Stability",
        id="arXiv:2405.18710",
        year=2024,
    ),
    needs=(
        "a training set with a length whose batches have class labels (of tokens or of rows)",
        "to simulate: nn.Linear or transformers' Conv1D layers, of any dtype but float64",
    ),
    conflicts=(
        "packed (quantised) and offloaded layers, nn.MultiheadAttention: skipped, and listed in a warning",
        "streamed training sets: the same rows cannot be read again",
        "FSDP 1: refused in words, it has flattened the model that a look forwards; FSDP 2 works",
        "torch_compile, tensor parallelism and DeepSpeed were not tried",
    ),
    defaults=(
        "ours: nothing simulated, epsilon 1e-3, every 100 steps, rows worth two thirds of a step and 256 tokens at most"
    ),
    deviations=(
        "the sharpness is the closed form of the maximum over the box around the logits (ours); it is exact, so no L-BFGS; "
        "the title is that of version 2, the abstract is what was read: numbers of the paper are not compared with",
        "products of queries, keys and values, fused experts and the language-model head (head=True) are not rounded",
        "no scaling of tensors: with 4 or 5 exponent bits numbers leave the range as torch's casts let them",
    ),
    sources="none",
    claims=(
        Claim(
            id="sharper-first",
            statement=(
                "With fewer mantissa bits the loss is sharper early in the run, before it is higher itself, and more "
                "pairs of seed and learning rate diverge."
            ),
            experiment="hfgen_plugins.callbacks.low_mantissa.evidence:EXPERIMENT",
        ),
    ),
    example="hfgen_plugins.callbacks.low_mantissa.low_mantissa:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"low_mantissa": ["LowMantissaCallback", "loss_sharpness", "round_mantissa", "simulate_mantissa"]},
)
