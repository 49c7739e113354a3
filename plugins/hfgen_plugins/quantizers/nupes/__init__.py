"""PowerQuant (arXiv:2301.09858) and NUPES (arXiv:2308.05600): levels that are powers of a uniform grid."""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="nupes",
    kind="quantizers",
    summary="2 to 8 bit weights on powers of a uniform grid: one exponent for the model, one per layer, or learned.",
    target="hfgen_plugins.quantizers.nupes.nupes:NupesConfig",
    exports=("NupesConfig",),
    paper=Paper(
        "NUPES : Non-Uniform Post-Training Quantization via Power Exponent Search",
        "arXiv:2308.05600",
        2023,
    ),
    needs=("Linear or Conv1D layers", "no data, but for exponent='learned' some rows of input_ids"),
    conflicts=(
        "exponent='learned' is no on-the-fly quantisation: use hfgen quantize --calib, or config.calibrate(model, rows)",
        "a merge into a learned layer quantises it again without data (exponent='per_layer')",
        "stock peft merges and DoRA on the packed layers (refused in words: dequantize first, or use an hfgen adapter)",
        "FSDP with cpu_ram_efficient_loading",
        "fused 3-D experts stay in float (listed in model.hf_quantizer.left_in_float)",
    ),
    defaults=(
        "exponent='search' and rounding='power' are PowerQuant's (arXiv:2301.09858): one exponent by Nelder-Mead from 1 on "
        "the sum of the layers' errors, 2-norms. One scale per output row. steps, lr and lr_exponent of 'learned' are ours."
    ),
    deviations=(
        "weights only: activations stay as they are, so nonlinearities need no change; a look into a table decodes",
        "the search reads the weights twice: first a density in 16384 bins stands for each layer, then the found exponent "
        "and 1 are compared by their true error",
        "exponents below 0.25 are not searched: most levels would lie next to 0",
        "exponent='learned' follows the abstract (codes over the whole grid, exponent by gradient); loss, rates and the "
        "check on held-out tokens are ours: the full text was not read",
        "rounding='value' is ours: nearest level instead of nearest in the power domain",
    ),
    sources="none (no public code)",
    claims=(
        Claim(
            "beats-rtn",
            "At equal bits the perplexity with one searched exponent is lower than with round to nearest.",
            experiment="hfgen_plugins.quantizers.nupes.evidence:EXPERIMENT",
        ),
    ),
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"nupes": ["NupesConfig"]})
