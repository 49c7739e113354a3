"""AdaQuant (arXiv:2006.10518): weights, grids and biases of each layer fitted to its output on a few sequences."""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="adaquant",
    kind="quantizers",
    summary=(
        "Calibrated 2 to 8 bit weights: each layer's weights, grids and bias are fitted to its output on a few sequences; "
        "widths by integer programming."
    ),
    target="hfgen_plugins.quantizers.adaquant.adaquant:AdaQuantConfig",
    exports=("AdaQuantConfig",),
    paper=Paper(
        "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming",
        "arXiv:2006.10518",
        2020,
    ),
    needs=(
        "Linear or Conv1D layers",
        "calibration sequences: `hfgen quantize --calib FILE`, or config.calibrate(model, rows)",
    ),
    conflicts=(
        "from_pretrained(quantization_config=...) on a float model (refused in words: it has no data); packed ones load",
        "stock peft merges and DoRA on the packed layers (refused in words: dequantize first, or use an hfgen adapter)",
        "fused 3-D experts stay in float (listed in model.hf_quantizer.left_in_float)",
        "tune= needs a backward pass through the whole model; without it memory does not grow with the layers",
    ),
    defaults=(
        "100 Adam steps as in the authors' code. Their rates are absolute, for two CNNs at 8 bit; lr and lr_range are "
        "relative here, chosen on the sandbox's model at 3 bit with seeds that no ledger uses."
    ),
    deviations=(
        "weights only: inputs stay in float, so input ranges are not learnt",
        "it starts from the range of least error in W instead of min and max",
        "the rates fall to zero linearly, the best point is kept, and a layer goes back to its start where held-out tokens "
        "say so",
        "bit allocation measures the divergence from the float model, not the task's loss, on data-free codes",
        "tuning: norm weights may be trained with the biases (Llama has no bias); there is no batch norm to estimate again",
    ),
    sources="github.com/itayhubara/CalibTIP, read for its numbers, no licence given: nothing was copied",
    claims=(
        Claim(
            "closes-the-gap",
            "With a small calibration set a low-bit model comes close to full precision, closer than by fine-tuning on it.",
            experiment="hfgen_plugins.quantizers.adaquant.evidence:EXPERIMENT",
            paper_value="ResNet-50, 4-bit weights and activations but in the smallest two layers: under 1 % accuracy lost",
        ),
        Claim(
            "integer-program",
            "Widths allocated by integer programming lose less than one width everywhere, at equal size.",
            experiment="hfgen_plugins.quantizers.adaquant.evidence_program:EXPERIMENT",
            paper_value="ResNet-50 at 13 % of its size: under 1 % accuracy lost",
        ),
    ),
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"adaquant": ["AdaQuantConfig"]})
