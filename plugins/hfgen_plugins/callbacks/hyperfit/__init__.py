"""Hyperfitting: fine-tuning to near-zero training loss for better greedy text (Carlsson et al., ICLR 2025)."""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="hyperfit",
    kind="callbacks",
    summary="Stops at near-zero training loss and watches what overfitting does to long greedy text.",
    target="hfgen_plugins.callbacks.hyperfit.hyperfit:HyperfitCallback",
    exports=("HyperfitCallback", "hyperfit_args"),
    paper=Paper(
        title="The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation",
        id="openreview:Ij9ilPh36h",
        year=2025,
    ),
    needs=(
        "8 held-out rows of at least `length` tokens (held_out=, or the eval_dataset of the attached trainer)",
        "a logged training loss (logging_strategy other than 'no') for the stop rule",
        "a causal language model with generate()",
    ),
    conflicts=(
        "load_best_model_at_end: it would bring back the model from before hyperfitting",
        "early stopping on eval_loss: validation loss is expected to rise",
        "DeepSpeed ZeRO-3: greedy continuations gather every weight for every token",
    ),
    defaults=(
        "context 32, window 96: the authors' code; near-zero loss below 0.01, 8 rows and 128 new tokens every 150 "
        "steps instead of 128 and 32 rows to 256 tokens every 250: ours, for a cost under 2 %; hyperfit_args: learning "
        "rates and epochs of our method sheet (variant 'paper' from memory) and of the authors' code (variant 'repo')"
    ),
    deviations=(
        "the end-of-text token is held back, so that every continuation has its full length: the authors' code counts "
        "the padding after it as text",
        "training stops at near-zero loss; the authors train a fixed number of epochs",
        "repetition, self-BLEU, top-1 mass, entropy along the continuation, share and length of quotations are added",
        "blocking of quotations at decoding time is not part of it",
    ),
    sources="FreddeFrallan/Hyperfitting (MIT)",
    claims=(
        Claim(
            id="greedy-diversity",
            statement=(
                "A model fine-tuned to near-zero loss writes more varied long greedy continuations of unseen contexts "
                "than the same model stopped at its best validation loss, although its validation loss is worse."
            ),
            experiment="hfgen_plugins.callbacks.hyperfit.evidence:EXPERIMENT",
        ),
    ),
    example="hfgen_plugins.callbacks.hyperfit.hyperfit:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"hyperfit": ["HyperfitCallback", "hyperfit_args"]}
)
