"""Signs of an unstable run: attention logits, output logits and gradients near Adam's eps (Wortsman et al. 2023)."""

import lazy_loader

from hfgen.card import MethodCard, Paper

CARD = MethodCard(
    name="instability",
    kind="callbacks",
    summary="Watches attention logits, log Z, gradients against Adam's eps and the loss, and says when a run will blow up.",
    target="hfgen_plugins.callbacks.instability.instability:InstabilityCallback",
    exports=("InstabilityCallback",),
    paper=Paper(
        title="Small-scale proxies for large-scale Transformer training instabilities", id="arXiv:2309.14322", year=2023
    ),
    needs=(
        "a training set with a length whose batches have class labels (of tokens or of rows)",
        "for the attention: a transformers model whose attention goes through the host's AttentionInterface",
    ),
    conflicts=(
        "streamed training sets: the same rows cannot be read again",
        "DeepSpeed ZeRO: it keeps the gradients to itself, their metrics are left out",
        "FSDP 1: refused, a look forwards the model that the host hands to callbacks, whose weights are flat; FSDP 2 works",
    ),
    defaults=(
        "warning at attention logits of 1e3 and alarm at 1e4, gradients below 10 eps: our method sheet, after the paper; "
        "every 100 steps, a shift of log Z by 20: ours; a spike of 6 robust deviations and a loss 0.3 nats above the "
        "first: calibrated on half of the corpus of labelled runs (EVIDENCE.md)"
    ),
    deviations=(
        "attention logits are exact under every attention implementation: a look sends its own rows through an attention "
        "function registered with the host, which measures before it computes",
        "the blow-up is predicted over the steps of one run (log-linear, Student's interval); the paper extrapolates over "
        "model sizes",
        "spikes and divergence of the logged loss are added; attention entropy, z-loss and qk-layernorm are not part",
    ),
    sources="none",
    example="hfgen_plugins.callbacks.instability.instability:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"instability": ["InstabilityCallback"]})
