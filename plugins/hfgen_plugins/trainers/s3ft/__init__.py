"""S3FT: Selective Self-to-Supervised Fine-Tuning (Gupta et al., arXiv 2502.08130).

Supervised fine-tuning in which the target of a row is, in this order, what the model itself answers when a judge finds
it right, the model's own rewriting of the gold answer when that is right, and the gold answer otherwise.
"""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="s3ft",
    kind="trainers",
    summary="SFT on the model's own answer where it is right, its own rewriting of the gold answer otherwise.",
    target="hfgen_plugins.trainers.s3ft.trainer:S3FTTrainer",
    exports=("S3FTTrainer", "S3FTConfig", "build_s3ft_dataset"),
    paper=Paper(
        title="Selective Self-to-Supervised Fine-Tuning for Generalization in Large Language Models",
        id="arXiv:2502.08130",
        year=2025,
    ),
    needs=(
        "a judge of answers (hfgen.judges or a callable)",
        "generation before training: at most two answers per row",
        "with several machines, an output_dir (or s3ft_cache_dir) that all of them see",
        "vLLM is optional (s3ft_vllm): one process, a model without adapters",
    ),
    conflicts=(
        "DeepSpeed ZeRO-3: build the data with build_s3ft_dataset first and pass that as train_dataset",
        "a PeftModel whose adapter changed the base weights at init (PiSSA, OLoRA, CorDA, LoftQ): pass peft_config",
        "images, streaming datasets, formatting_func",
    ),
    defaults=(
        "learning rate 1e-4, 2 epochs, greedy, 512 new tokens, one candidate, one paraphrase: our method sheet, which "
        "has the paper's hyper-parameters from memory only (no code is released); all else is trl's SFTConfig"
    ),
    deviations=(
        "the paraphrase is judged too: an unjudged one may lose numbers",
        "an answer that is empty or not ended by the model is wrong, whatever it holds",
        "num_candidates and paraphrase_attempts above 1 (rejection sampling) are extensions, off by default",
        "the rewriting instruction is our wording",
        "no_paraphrase, drop_failures and string_judge are ablations, off by default",
    ),
    claims=(
        Claim(
            id="less-forgetting",
            statement=(
                "At equal steps S3FT is at least as good as SFT on the task and loses at most half as much elsewhere."
            ),
            experiment="hfgen_plugins.trainers.s3ft.evidence:EXPERIMENT",
            paper_value="mean drop on old benchmarks: SFT 4.4, S3FT 2.5 points (abstract)",
        ),
        Claim(
            id="ablations",
            statement=(
                "On two tasks S3FT holds against SFT, and each part of it (rewriting, training on failures too, a judge of "
                "meaning) adds held-out accuracy and costs no old skills."
            ),
            experiment="hfgen_plugins.trainers.s3ft.evidence_ablations:EXPERIMENT",
        ),
    ),
    example="hfgen_plugins.trainers.s3ft.trainer:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"trainer": ["S3FTTrainer"], "config": ["S3FTConfig"], "data": ["build_s3ft_dataset"]},
)
