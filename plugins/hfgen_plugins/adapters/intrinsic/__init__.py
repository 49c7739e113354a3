"""Intrinsic dimension (arXiv:1804.08838, arXiv:2012.13255): train d numbers, a point in a random subspace of the model."""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="intrinsic",
    kind="adapters",
    summary="Trains d numbers for all targets together: a point in a random d-dimensional subspace of their weights.",
    target="hfgen_plugins.adapters.intrinsic.intrinsic:IntrinsicConfig",
    exports=("IntrinsicConfig", "estimate_d90", "IntrinsicDimension"),
    paper=Paper(
        "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
        "arXiv:2012.13255",
        2020,
    ),
    needs=(
        "Linear, Conv1D, convolution and norm targets, weights and biases; of quantised ones (peft's backends, EasyQuant) "
        "the weight, where x dW^T is added by a second product",
        "dL/dW of one target at a time, as full fine-tuning; saved are the optimizer's state and memory for backward",
        "8 bytes of memory per entry of the targets (rounded up to a power of two per tensor) for the drawn projection",
    ),
    conflicts=(
        "transformers' add_adapter and load_adapter, diffusers, inject_adapter_in_model: one vector belongs to all layers "
        "(uses_shared_state), so peft refuses and get_peft_model / PeftModel.from_pretrained are the way",
        "DeepSpeed ZeRO-3, tensor parallelism and off-loaded weights (refused in words)",
        "PeftMixedModel (closed to third parties); nn.MultiheadAttention and embedding targets; tied weights (refused)",
        "bias='all' and 'intrinsic_only' (biases of targets move with their weights)",
        "torch.compile: right and without graph break, but what is kept for backward is then the compiler's choice",
        "generating token by token with an adapter that is not merged: each forward makes dW again; merge_adapter() first",
    ),
    defaults=(
        "d=256, global scope, DID, Fastfood: ours. From memory, not checked: d90 of MRPC is some hundred numbers for "
        "RoBERTa-large and 1000 to 2000 for BERT-base. Learning rate: a compacter example uses 3e-2 at d=20000 "
        "(per-tensor); global scope wants about sqrt(number of tensors) more."
    ),
    deviations=(
        "the gradient is the true one; the Fastfood of compacter's code gives 1/L of it, unevenly across tensors",
        "global scope: one block of P per tensor, scaled by sqrt(D_i / D), instead of slices of one transform of length "
        "2^ceil(log2 D)",
        "coordinates beyond a small tensor's L = 2^ceil(log2 D_i) do not reach it (the reference crops likewise)",
        "SAID: d is what is trained in all, d - m in the subspace for m tensors (the code of the authors: d - m - 1)",
        "embedding tables do not take part; the papers move every parameter",
        "G is drawn by the quantile function in float64, so that the bits do not depend on the machine",
    ),
    sources=(
        "for the method sheet rabeehk/compacter and jgamper/intrinsic-dimensionality were read; no code of them is used"
    ),
    claims=(
        Claim(
            "few-numbers",
            "A few hundred to a few thousand trained numbers reach 90 % of the score of full fine-tuning.",
        ),
        Claim(
            "against-cousins",
            ("At as many trained numbers it learns and keeps about as much as VeRA and TinyLoRA."),
            experiment="hfgen_plugins.adapters.intrinsic.evidence:EXPERIMENT",
        ),
    ),
)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"intrinsic": ["IntrinsicConfig", "estimate_d90", "IntrinsicDimension"]}
)
