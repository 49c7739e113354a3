"""EasyQuant (arXiv:2403.02775): data-free; outliers are kept apart, and each row's scale minimises its own error."""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="easyquant",
    kind="quantizers",
    summary="Data-free 2 to 8 bit weights: outliers beyond n sigma are kept apart, each row's scale minimises its error.",
    target="hfgen_plugins.quantizers.easyquant.easyquant:EasyQuantConfig",
    exports=("EasyQuantConfig",),
    paper=Paper(
        "EasyQuant: An Efficient Data-free Quantization Algorithm for LLMs",
        "arXiv:2403.02775",
        2024,
    ),
    needs=("Linear or Conv1D layers", "no data"),
    conflicts=(
        "models without large outliers at 2 and 3 bit: keeping outliers apart can cost perplexity there, try n_sigma=None",
        "stock peft merges and DoRA on the packed layers (refused in words: dequantize first, or use an hfgen adapter)",
        "FSDP with cpu_ram_efficient_loading",
        "fused 3-D experts stay in float (listed in model.hf_quantizer.left_in_float)",
    ),
    defaults=(
        "4 bit, one scale per output row, n_sigma=3 as in the paper. steps and lr of optimizer='adam' are the paper's for "
        "BLOOM (100, 1e-3 on a range of 0.078), with lr made relative to the range."
    ),
    deviations=(
        "the gradient uses clamped codes: with the printed unclamped ones it is wrong for clipped weights",
        "the outlier rule uses the standard deviation; it is printed as n * var(W)",
        "codes lie in [-2^(b-1), 2^(b-1) - 1], the mirror image of the printed range",
        "optimizer='grid' is ours and the default: 91 passes, closer to the exact optimum than 100 Adam steps",
    ),
    sources="none (no public code)",
    claims=(
        Claim(
            "beats-rtn",
            "At equal bits the perplexity is lower than with round to nearest.",
            experiment="hfgen_plugins.quantizers.easyquant.evidence:EXPERIMENT",
            paper_value="LLaMA-7B, 4 bit, WikiText2: 6.01 against 6.29 (fp16 5.68)",
        ),
    ),
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"easyquant": ["EasyQuantConfig"]})
