"""One experiment for all: an adapter against its cousins on a task of images and one of language, forgetting measured.

Images: a ViT pretrained here, in seconds, on scikit-learn's handwritten digits learns to read them turned by a quarter;
its head stays as it is, so the old task is simply asked again. Language: the sandbox's model learns to sort letters; two
of the skills it has are asked again. Every arm is the stock Trainer with AdamW, the same rows, steps and batches, and a
learning rate chosen for each arm and task on other seeds by the same grid.

Which arms, what is claimed and with what margins is data in `Settings`; nothing here knows a method. Nothing is
downloaded or saved. torch and the hosts are imported in the workers only.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hfgen import catalog, sandbox
from hfgen.sandbox import tasks

from .experiment import Arm, Metric, Samples
from .jobs import trainer_progress
from .stats import Verdict, at_least, interval, paired, verdict
from .tuning import Row, best_rate, try_grid

CLAIM = "against-cousins"
"""The claim's id on every card that is compared here: EVIDENCE.md puts the claims of one id side by side."""
BASE = "base"
"""Id of the reference arm: the untouched model."""
TASKS = {"images": "digits, turned", "language": "letters, sorted"}
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TUNING_SEEDS = (100, 101)
CRITERION = "highest mean accuracy on the new task, then the lower rate; the old task is not looked at"
SIDE, PATCH, DIGITS = 8, 2, 10  # pixels, pixels, classes
WORDS, TEST_WORDS = 500, 128


@dataclass(frozen=True)
class Settings:
    """Everything that fixes a run but arm and seed. `seed` draws the ViT, which digits and words are trained on, the
    adapter's start and the order.

    Attributes:
        method: Id of the arm that the claim is about.
        arms: By arm id, how its model is made: ``label`` for people; ``config``, a class of peft, a name of the
            catalogue, or None, which trains the targets' own weights; ``options``, its arguments; ``shares``, arguments
            that are this share of the steps, at least 1; ``images`` and ``language``, arguments of one task only.
        claims: (cousin's arm id, "new" or "kept", bound): on both tasks, the method's accuracy minus the cousin's is at
            least `bound`.
        equal: The arms that end with as many trained numbers as the method, but for a factor of `tolerance`.
        tolerance: That factor; where it is exceeded the comparison is void.
        rates: By "task/arm id", the peak of a linear decay to 0; AdamW, no weight decay but what an adapter sets itself.
        steps, batch_size: Of the adaptation to either task.
        hidden_size, layers: Of the ViT.
        source_steps, source_batch_size, source_rate: Of its pretraining.
    """

    method: str
    arms: dict[str, dict[str, Any]]
    claims: tuple[tuple[str, str, float], ...]
    equal: tuple[str, ...]
    tolerance: float
    rates: dict[str, float] = field(default_factory=dict)
    steps: int = 300
    batch_size: int = 32
    hidden_size: int = 64
    layers: int = 2
    source_steps: int = 400
    source_batch_size: int = 64
    source_rate: float = 3e-3


METRICS = (
    *(
        metric
        for task, words in TASKS.items()
        for metric in (
            Metric(f"{task}_new", f"{words}: learnt", explanation="share right of the new task"),
            Metric(f"{task}_kept", f"{words}: old kept", explanation="share right of what the base model could do"),
            Metric(f"{task}_numbers", f"{words}: trained", "count", "trained numbers in use at the end of training"),
        )
    ),
    Metric("seconds", "time", "s", "both adaptations on one thread, without pretraining and measuring"),
)
CAPTION = (
    "Up: more of the new task learnt (turned digits); right: more of the old task kept. Large marks are means over seeds, "
    "bars their 95 % intervals, small marks the single seeds. The dashed lines are the untouched model."
)
NOTES = (
    "Two small tasks, no benchmark of the paper. Images: a ViT of 0.07 million parameters, pretrained for each seed on 800 "
    "of scikit-learn's 1797 digits (8 x 8 pixels), learns from 500 others to read them turned by a quarter; old task: the "
    "upright ones, by the same head, which is frozen in every arm; both on 497 others. Language: the sandbox's Llama of "
    "0.14 million parameters, the same for every seed, learns to sort four letters from 500 words, measured on 128 others; "
    "old task: the mean of its skills E (sums) and R (a string reversed).",
    "Adapted are all linear layers of the blocks. Each of the two adaptations has the stated steps of 32 rows; all arms "
    "have the same rows, start and linear decay, by the stock Trainer.",
    "Each arm's learning rate was chosen for each task with the same grid, number of tries and other seeds: "
    + CRITERION
    + ".",
    "Tasks, steps and grids were settled with a few runs of most arms on seed 99; the checks and their bounds were written "
    "after those and before the tuning. Differences are paired by seed. A loss stands here as it came out.",
    "Rates that learn most forget much: where an arm has forgotten nearly all, 'old task kept' says little.",
)


def arms(settings: Settings) -> tuple[Arm, ...]:
    """The untouched model, then the arms of the settings in their order."""
    return (Arm(BASE, "untouched"), *(Arm(key, spec["label"]) for key, spec in settings.arms.items()))


def parts(settings: Settings, notes: tuple[str, ...], grid: Sequence[float] = GRID) -> dict[str, Any]:
    """What every `Experiment` of this kind has in common, as its keyword arguments."""
    return {
        "method": settings.method, "claim": CLAIM, "arms": arms(settings), "metrics": METRICS,
        "chart": ("images_kept", ("images_new",)), "settings": settings,
        "smoke_settings": dataclasses.replace(settings, steps=20, source_steps=20), "run": run_arm, "judge": judge,
        "notes": (*NOTES, *notes), "steps": settings.steps, "tries": len(grid) * len(TUNING_SEEDS),
        "tuning_seeds": TUNING_SEEDS, "caption": CAPTION,
    }  # fmt: skip


def tune(settings: Settings, grid: Sequence[float] = GRID, workers: int = 2) -> dict[str, Any]:
    """Runs every arm at every rate on `TUNING_SEEDS` and chooses one for each task; the table as plain data."""

    def with_rate(arm: str, rate: float) -> Settings:
        return dataclasses.replace(settings, rates={f"{task}/{arm}": rate for task in TASKS})

    rows = try_grid(run_arm, arms(settings)[1:], grid, TUNING_SEEDS, with_rate, workers)
    fixed = dataclasses.asdict(settings)
    del fixed["rates"]
    return {
        "format": 1, "criterion": CRITERION, "grid": list(grid), "seeds": list(TUNING_SEEDS), "settings": fixed,
        "chosen": choose(rows), "runs": rows,
    }  # fmt: skip


def choose(rows: Sequence[Row]) -> dict[str, float]:
    """The rates that `CRITERION` picks from the tries, by "task/arm id"."""
    ids = dict.fromkeys(row["arm"] for row in rows)
    return {f"{t}/{a}": best_rate([r for r in rows if r["arm"] == a], (f"{t}_new",)) for t in TASKS for a in ids}


def judge(samples: Samples, settings: Settings) -> list[Verdict]:
    """The verdict on the method: one check per task and claim of `settings`; void where `_void` says so."""
    own, said = samples[settings.method], {"new": "new task learnt", "kept": "old task kept"}
    checks = [
        at_least(
            f"{words}: {said[key]}, minus {settings.arms[cousin]['label']}'s",
            paired(own[f"{task}_{key}"], samples[cousin][f"{task}_{key}"]),
            bound,
        )
        for cousin, key, bound in settings.claims
        for task, words in TASKS.items()
    ]
    return [verdict(settings.method, checks, _void(samples, settings))]


def _void(samples: Samples, settings: Settings) -> str | None:
    """Why the comparison says nothing: a cousin did not end above the untouched model (the whole interval of the paired
    difference above 0), or the budgets differ."""
    for task, words in TASKS.items():
        for cousin in dict.fromkeys(cousin for cousin, _, _ in settings.claims):
            learnt = interval(paired(samples[cousin][f"{task}_new"], samples[BASE][f"{task}_new"]))
            if learnt.mean <= 0 or (learnt.n > 1 and learnt.low <= 0):
                return (
                    f"{settings.arms[cousin]['label']} did not end above the untouched model ({words}: difference "
                    f"{learnt.mean:+.3f}, interval {learnt.low:+.3f} to {learnt.high:+.3f}), so it is no baseline"
                )
        for arm in settings.equal:
            pairs = zip(samples[settings.method][f"{task}_numbers"], samples[arm][f"{task}_numbers"], strict=True)
            ratio = max(max(a, b) / max(min(a, b), 1.0) for a, b in pairs)
            if ratio > settings.tolerance:
                return f"{words}: the budget is {ratio:.2f} times that of {settings.arms[arm]['label']}, or it of ours"
    return None


def run_arm(arm: str, seed: int, settings: Settings, report: Any) -> dict[str, float]:
    """Adapts both models by one arm and measures; plain numbers by metric key."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    found: dict[str, float] = {"seconds": 0.0}
    for task, run in (("images", _images), ("language", _language)):
        new, kept, numbers, seconds = run(arm, seed, settings, report)
        found |= {f"{task}_new": new, f"{task}_kept": kept, f"{task}_numbers": numbers}
        found["seconds"] += seconds
    return found


# --- the two tasks ----------------------------------------------------------------------------------------------------


def _images(arm: str, seed: int, settings: Settings, report: Any) -> tuple[float, float, float, float]:
    shape = dataclasses.astuple(settings)[-5:]
    _, new, test = _digits(seed)
    model = _vit(*shape[:2])
    model.load_state_dict(_pretrained(seed, *shape))
    model, numbers, seconds = _adapt(arm, "images", seed, settings, model, _turned(new), report)
    return _share_right(model, _turned(test)), _share_right(model, test), numbers, seconds


def _language(arm: str, seed: int, settings: Settings, report: Any) -> tuple[float, float, float, float]:
    tokenizer, model = sandbox.load_tokenizer(), sandbox.load_model()
    words = _words(seed)
    rows = []
    for word in words[:WORDS]:
        ask = tokenizer(f"S{word}=")["input_ids"]
        ids = ask + tokenizer(_sorted(word), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append({"input_ids": ids, "labels": [-100] * len(ask) + ids[len(ask) :]})
    model, numbers, seconds = _adapt(arm, "language", seed, settings, model, rows, report)
    found = sandbox.answers(model, tokenizer, [f"S{word}=" for word in words[WORDS:]])
    new = [answer == _sorted(word) for answer, word in zip(found, words[WORDS:], strict=True)]
    kept = [sandbox.accuracy(model, tokenizer, task) for task in (tasks.E, tasks.R)]
    return sum(new) / len(new), sum(kept) / len(kept), numbers, seconds


def _words(seed: int) -> list[str]:
    """Different words of four letters, drawn by `seed`: `WORDS` to train on, then `TEST_WORDS` to measure on."""
    rng, found = random.Random(f"words {seed}"), dict[str, None]()
    while len(found) < WORDS + TEST_WORDS:
        found["".join(rng.choices(tasks.LETTERS, k=4))] = None
    return list(found)


def _sorted(word: str) -> str:
    return "".join(sorted(word))


@functools.lru_cache(maxsize=2)
def _digits(seed: int) -> tuple[list[dict[str, Any]], ...]:
    """scikit-learn's 1797 digits, shuffled by `seed`: 800 of the old task, 500 of the new, 497 to measure both on."""
    import torch
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    x = (torch.tensor(images, dtype=torch.float32).reshape(-1, 1, SIDE, SIDE) / 8 - 1)[order]
    rows = [{"pixel_values": a, "labels": b} for a, b in zip(x, torch.tensor(classes)[order], strict=True)]
    return rows[:800], rows[800:1300], rows[1300:]


def _turned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"pixel_values": row["pixel_values"].rot90(1, (-2, -1))} for row in rows]


def _vit(hidden_size: int, layers: int) -> Any:
    """transformers' ViTForImageClassification, one grey channel, no dropout."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=layers, num_attention_heads=4,
        image_size=SIDE, patch_size=PATCH, num_channels=1, num_labels=DIGITS, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


@functools.lru_cache(maxsize=1)  # a worker takes the arms of one seed one after the other
def _pretrained(seed: int, hidden_size: int, layers: int, steps: int, batch_size: int, rate: float) -> dict[str, Any]:
    """State of a ViT that reads upright digits."""
    import transformers

    transformers.set_seed(seed)
    model = _vit(hidden_size, layers)
    _fit(model, _digits(seed)[0], steps, batch_size, rate, seed)
    return model.state_dict()


def _share_right(model: Any, rows: list[dict[str, Any]]) -> float:
    import torch

    with torch.no_grad():
        logits = model(pixel_values=torch.stack([r["pixel_values"] for r in rows])).logits
    return float((logits.argmax(-1) == torch.stack([r["labels"] for r in rows])).float().mean())


# --- the arms ---------------------------------------------------------------------------------------------------------


def _adapt(
    arm: str, task: str, seed: int, settings: Settings, model: Any, rows: list[dict[str, Any]], report: Any
) -> tuple[Any, float, float]:
    """The adapted model in eval mode, how many numbers were trained, the seconds of training; the base arm as it is."""
    import transformers

    model.eval()
    if arm == BASE:
        return model, 0.0, 0.0
    transformers.set_seed(seed)
    model = adapted(settings.arms[arm], task, settings.steps, model)
    start = time.monotonic()
    _fit(model, rows, settings.steps, settings.batch_size, settings.rates[f"{task}/{arm}"], seed, report)
    return model, trained_numbers(model), time.monotonic() - start


def adapted(spec: dict[str, Any], task: str, steps: int, model: Any) -> Any:
    """`model` as the arm trains it; the targets are all linear layers of its blocks."""
    from torch import nn

    blocks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{n}"]
    if spec.get("config") is None:
        model.requires_grad_(False)
        for _, module in blocks:
            module.requires_grad_(True)
        return model
    from peft import get_peft_model

    options = spec.get("options", {}) | spec.get(task, {})
    options |= {key: max(1, round(share * steps)) for key, share in spec.get("shares", {}).items()}
    config = getattr(importlib.import_module("peft"), spec["config"], None) or catalog.load(spec["config"], "adapters")
    return get_peft_model(model, config(target_modules=[name for name, _ in blocks], **options))


def trained_numbers(model: Any) -> int:
    """Trained numbers in use: those of a component whose trained gate (``lora_E`` of AdaLoRA) is 0 do not count."""
    own = {tuple(n.split(".")): p for n, p in model.named_parameters() if p.requires_grad}
    gates = {name[:-2]: p for name, p in own.items() if name[-2].endswith("_E")}
    used = {module: (int((p != 0).sum()), p.numel()) for module, p in gates.items()}
    return sum(p.numel() * used.get(name[:-2], (1, 1))[0] // used.get(name[:-2], (1, 1))[1] for name, p in own.items())


def _fit(
    model: Any, rows: list[dict[str, Any]], steps: int, batch_size: int, rate: float, seed: int, report: Any = None
) -> None:
    """The stock Trainer, linear decay to 0."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Allocate(TrainerCallback):
        """peft's AdaLoRA allocates only when told to, between the optimizer's step and zero_grad()."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model.base_model.update_and_allocate(state.global_step)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=rate,
            lr_scheduler_type="linear", seed=seed, use_cpu=True, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        if hasattr(getattr(model, "base_model", None), "update_and_allocate"):
            trainer.add_callback(Allocate())
        if report is not None:
            trainer.add_callback(trainer_progress(report))
        trainer.train()
    model.eval()
