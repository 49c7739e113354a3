"""The claim of S3FT as an experiment on the sandbox: SFT against S3FT at equal steps, old skills measured.

`EXPERIMENT` is what ``hfgen quickstart`` runs. Its settings are fixed before the reported seeds (0, 1, ...) run. The
learning rate of each arm was chosen on other seeds, the same grid and number of tries for every arm, by

    python -m hfgen_plugins.trainers.s3ft.evidence tune

which rewrites ``tuning.json`` beside this file; `SETTINGS` holds the rates that it chose. torch is imported in the
workers only.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfgen import catalog, sandbox
from hfgen.evidence import Arm, Experiment, Metric, Verdict, at_least, at_most, interval, paired, tuning, verdict
from hfgen.evidence.jobs import trainer_progress
from hfgen.evidence.tuning import best_rate, try_grid
from hfgen.sandbox import tasks

ARMS = (
    Arm("base", "untouched base"),
    Arm("sft_lora", "SFT + LoRA"),
    Arm("s3ft_lora", "S3FT + LoRA"),
    Arm("s3ft_svfit", "S3FT + SVFit"),
)
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TUNING_SEEDS = (100, 101, 102)
TUNING_FILE = Path(__file__).with_name("tuning.json")
CRITERION = (
    "highest mean accuracy on the trained prompts of the new task, then on its held-out prompts, then the lower rate; "
    "old skills are not looked at"
)


@dataclass(frozen=True)
class Settings:
    """Everything that fixes a run but arm and seed. `seed` chooses the 18 trained prompts, adapter init and row order.

    Attributes:
        steps: Optimizer steps, the same in every arm.
        batch_size: Rows per step.
        learning_rates: Per arm, the peak of a linear decay to 0.
        lora_rank, lora_alpha: Of LoRA on all linear layers.
        svfit_rank: Of SVFit on all linear layers; 64 is full rank here, all singular values are trained.
        margin: "At least as good" allows this much less accuracy (about one of 18 prompts).
        ratio: "At most half of the drop": the factor.
    """

    steps: int = 1000
    batch_size: int = 16
    learning_rates: dict[str, float] = field(
        default_factory=lambda: {"sft_lora": 1e-3, "s3ft_lora": 3e-4, "s3ft_svfit": 1e-2}
    )
    lora_rank: int = 8
    lora_alpha: int = 16
    svfit_rank: int = 64
    margin: float = 0.05
    ratio: float = 0.5


SETTINGS = Settings()


def run_arm(arm: str, seed: int, settings: Settings, report: Any) -> dict[str, float]:
    """Trains one arm with one seed and measures it; plain numbers by metric key (see `METRICS`)."""
    import datasets
    import transformers
    from trl import SFTTrainer  # noqa: F401  (the seconds its import takes are not the method's)

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    transformers.set_seed(seed)
    trained, held_out = tasks.D.split(seed)
    tokenizer, model, start = sandbox.load_tokenizer(), sandbox.load_model(), time.monotonic()
    if arm != "base":
        with tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(arm, seed, settings, model, tokenizer, trained, folder)
            trainer.add_callback(trainer_progress(report))
            trainer.train()
            model = trainer.model
    seconds = time.monotonic() - start
    old = {name: sandbox.accuracy(model, tokenizer, tasks.TASKS[name]) for name in "ER"}
    return {
        "trained": sandbox.accuracy(model, tokenizer, tasks.D, trained),
        "held_out": sandbox.accuracy(model, tokenizer, tasks.D, held_out),
        "old_skills": (old["E"] + old["R"]) / 2,
        "old_E": old["E"],
        "old_R": old["R"],
        "parameters": 0 if arm == "base" else sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": seconds if arm != "base" else 0.0,
    }


def _trainer(
    arm: str, seed: int, settings: Settings, model: Any, tokenizer: Any, trained: list[str], folder: str
) -> Any:
    """The stock SFTTrainer for arm ``sft_lora``, S3FTTrainer for the others; same rows, steps, batch and schedule."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from . import S3FTConfig, S3FTTrainer

    common: dict[str, Any] = {
        "output_dir": folder, "max_steps": settings.steps, "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rates[arm], "lr_scheduler_type": "linear", "seed": seed, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    if arm.endswith("lora"):
        adapter = LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    else:  # through the catalogue: one family does not import another
        adapter = catalog.load("svfit", "adapters")(
            r=settings.svfit_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    shared: dict[str, Any] = {
        "train_dataset": Dataset.from_list(tasks.D.rows(trained)), "processing_class": tokenizer,
        "peft_config": adapter,
    }  # fmt: skip
    if arm.startswith("sft"):
        trainer = SFTTrainer(model, args=SFTConfig(**common), **shared)
    else:
        trainer = S3FTTrainer(
            model,
            args=S3FTConfig(**common, s3ft_max_new_tokens=32),
            judge=tasks.D.judge,
            paraphraser=tasks.oracle_paraphraser,
            **shared,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def judge(samples: Any, settings: Settings) -> list[Verdict]:
    """The verdict on the claim for each S3FT arm.

    Void unless SFT ends above the base on the trained prompts (the whole interval of the paired difference above 0).
    """
    base, sft = samples["base"], samples["sft_lora"]
    learnt = interval(paired(sft["trained"], base["trained"]))
    void = None
    if learnt.mean <= 0 or (learnt.n > 1 and learnt.low <= 0):
        void = (
            f"SFT did not end above the base on the trained prompts (difference {learnt.mean:+.2f}, interval "
            f"{learnt.low:+.2f} to {learnt.high:+.2f}), so there is no baseline to compare with"
        )
    found = []
    for arm in (a.id for a in ARMS if a.id.startswith("s3ft")):
        own = samples[arm]
        in_task = (
            at_least(f"at least as good as SFT on {words} prompts", paired(own[key], sft[key]), -settings.margin)
            for key, words in (("trained", "the trained"), ("held_out", "the held-out"))
        )
        drops = paired(base["old_skills"], own["old_skills"])
        allowed = [settings.ratio * d for d in paired(base["old_skills"], sft["old_skills"])]
        kept = at_most(
            f"loses at most {settings.ratio:g} times what SFT loses on old skills", paired(drops, allowed), 0.0
        )
        found.append(verdict(arm, [*in_task, kept], void))
    return found


METRICS = (
    Metric(
        "trained", "in-task, trained prompts", explanation="share right of the 18 prompts of the new task trained on"
    ),
    Metric("held_out", "in-task, held-out prompts", explanation="share right of the 10 other prompts of the new task"),
    Metric("old_skills", "old skills kept", explanation="mean of E and R; the base has all of both"),
    Metric(
        "old_E", "old skill E", explanation="the same sums asked with another prompt, strict on format", detail=True
    ),
    Metric("old_R", "old skill R", explanation="a string reversed", detail=True),
    Metric("parameters", "trainable parameters", "count"),
    Metric("seconds", "time", "s", "data building and training on one thread, without imports and measuring"),
)

EXPERIMENT = Experiment(
    method="s3ft",
    claim="less-forgetting",
    title="S3FT against SFT: what is learnt, what is forgotten",
    statement=(
        "Tested claim: at equal steps S3FT is at least as good as SFT on the new task and loses at most half of "
        "what SFT loses on old skills."
    ),
    arms=ARMS,
    metrics=METRICS,
    chart=("old_skills", ("trained", "held_out")),
    settings=SETTINGS,
    smoke_settings=dataclasses.replace(SETTINGS, steps=60),
    run=run_arm,
    judge=judge,
    steps=SETTINGS.steps,
    tries=len(GRID) * len(TUNING_SEEDS),
    tuning_seeds=TUNING_SEEDS,
    notes=(
        "The model is a Llama of 0.14 million parameters that does sums and reverses strings. The new task asks for "
        "three digits with a given sum; the base model is right on half of its prompts. The gold answers are right, "
        "but written in a style the model never saw.",
        "Old skills: the same sums asked with another prompt (E) and reversing a string (R). The base does both.",
        "S3FT trains on the model's own answer where that is right, otherwise on a rewriting of the gold answer. The "
        "rewriting is done by an ORACLE that knows the model's style, because so small a model cannot paraphrase by "
        "instruction; the paper has the model do it.",
        "All arms take the same number of steps of the same size. Each arm's learning rate was chosen on other seeds, "
        "with the same grid and number of tries: " + CRITERION + ".",
        "Whether an arm is 'at least as good' is decided by the interval of the difference to SFT, paired by seed, "
        "with a margin of 0.05, about one of 18 prompts; 'at most half' has no margin.",
        "The task was made for this comparison to be decided in minutes: it shows the mechanism, not its size "
        "elsewhere.",
    ),
)


def tune(workers: int = 2) -> dict[str, Any]:
    """Runs every arm at every rate of `GRID` on `TUNING_SEEDS`; the table and the chosen rates as plain data."""
    from hfgen_plugins.trainers.s3ft import evidence  # by its own name, also under python -m: workers look it up

    arms = [a for a in ARMS if a.id != "base"]

    def with_rate(arm: str, rate: float) -> Settings:
        return dataclasses.replace(evidence.SETTINGS, learning_rates={arm: rate})

    rows = try_grid(evidence.run_arm, arms, GRID, TUNING_SEEDS, with_rate, workers)
    fixed = dataclasses.asdict(SETTINGS)
    del fixed["learning_rates"]
    return {
        "format": 1, "criterion": CRITERION, "grid": list(GRID), "seeds": list(TUNING_SEEDS), "settings": fixed,
        "chosen": {a.id: choose([r for r in rows if r["arm"] == a.id]) for a in arms}, "runs": rows,
    }  # fmt: skip


def choose(runs: list[dict[str, Any]]) -> float:
    """The learning rate that `CRITERION` picks from the runs of one arm."""
    return best_rate(runs, ("trained", "held_out"))


if __name__ == "__main__":
    tuning.main(tune, TUNING_FILE)
