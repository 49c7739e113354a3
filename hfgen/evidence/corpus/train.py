"""One run of the corpus: a stock Trainer with the monitors attached, and the ground truth measured beside them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hfgen import catalog

from .cases import Config
from .truth import onset
from .worlds import Batch, Rows, additions, draw, joined, judged, make_model

MONITORS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "monitors.json").read_text(encoding="utf-8"))
ATTEMPTS = 8
_VALIDATION, _SKILL = 256, 128  # rows that evaluations and monitors see
_TRUTH = {"clouds": 2000, "chains": 300}  # fresh rows the truth is measured on


class Truth(TrainerCallback):
    """Measures what is really so, on rows that no monitor sees: `rows`, a dictionary per look."""

    def __init__(self, sets: Mapping[str, Batch], train: Batch, every: int) -> None:
        self.sets, self.train, self.every = sets, train, every
        self.rows: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._look(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._look(state.global_step, model)

    def _look(self, step: int, model: nn.Module) -> None:
        row: dict[str, float] = {"step": step}
        for name, rows in (*self.sets.items(), ("train", self.train)):
            losses, right = judged(model, rows)
            row |= {f"{name}_loss": float(losses.double().mean()), f"{name}_accuracy": float(right.double().mean())}
            if name == "train":
                row["train_zero"] = float((losses == 0).double().mean())
        self.rows.append(row)


def flipped(rows: Batch, share: float, classes: int, seed: int) -> Batch:
    """The rows with a share of their labels drawn anew."""
    rng = torch.Generator().manual_seed(seed)
    labels = rows["labels"]
    chosen = torch.rand(labels.shape, generator=rng) < share
    return rows | {"labels": torch.where(chosen, torch.randint(classes, labels.shape, generator=rng), labels)}


def material(config: Config) -> tuple[Batch, dict[str, Batch], dict[str, Batch], Batch | None]:
    """Training rows, evaluation sets, sets of truth and rows of the old skill (None without a base)."""
    seed, world = config["seed"], config["seed"] + 1
    if config["world"] == "additions":
        everything = additions(config["modulus"])
        order = torch.randperm(config["modulus"] ** 2, generator=torch.Generator().manual_seed(seed))
        parts = [{k: v[i] for k, v in everything.items()} for i in (order[: config["rows"]], order[config["rows"] :])]
        return parts[0], {"": parts[1]}, {"test": parts[1]}, None
    count, truth, shift = config["steps"] * config["batch"], _TRUTH[config["world"]], config["shift"]

    def some(number: int, salt: int, moved: float) -> Batch:
        return draw(config, world, number, seed + salt, moved)

    def mixed(number: int, salt: int, old: float, new: float) -> Batch:
        kept = int(number * config["replay"])
        rows = joined(some(number - kept, salt, new), some(kept, salt + 1, old))
        order = torch.randperm(number, generator=torch.Generator().manual_seed(seed + salt))
        return {key: value[order] for key, value in rows.items()}

    base = config["base_steps"] > 0
    skill = some(_SKILL, 7, 0.0) if base else None
    truths = {"old": some(truth, 17, 0.0)} if base else {}
    if config["boundary"]:
        start = shift if base else 0.0
        end = 2 * shift if base else shift
        before = config["boundary"] * config["batch"]
        first = mixed(before, 20, 0.0, start) if base else some(before, 20, start)
        train = joined(first, mixed(count - before, 30, start, end))
        sets = {"first": some(_VALIDATION, 8, start), "second": some(_VALIDATION, 9, end)}
        return train, sets, truths | {"first": some(truth, 18, start), "test": some(truth, 19, end)}, skill
    train = mixed(min(count, config["rows"]), 20, 0.0, shift) if base else some(min(count, config["rows"]), 20, shift)
    if config["flips"]:
        classes = 1 + int(train["labels"].max())
        train = flipped(train, config["flips"], classes, seed)
    return train, {"": some(_VALIDATION, 8, shift)}, truths | {"test": some(truth, 19, shift)}, skill


def pretrained(config: Config) -> nn.Module:
    """The model the run starts from: of the settings' seed, after `base_steps` steps on the world as it was."""
    transformers.set_seed(config["seed"])
    model = make_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(config["base_steps"]):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / config["base_steps"])
        batch = draw(config, config["seed"] + 1, 64, 10**7 + config["seed"] * 1000 + step)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    if config["adapter"]:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj", "up_proj"] if config["world"] == "chains" else ["layers.0", "head"]
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    return model


def _accuracy(prediction: Any) -> dict[str, float]:
    answers, labels = prediction.predictions, prediction.label_ids
    if labels.ndim == 2:
        answers, labels = answers[:, :-1], labels[:, 1:]
    return {"accuracy": float((answers == labels).mean())}


def _optimizers(config: Config, model: nn.Module) -> tuple[Any, Any]:
    """(None, None), or, for a run whose learning rate is raised, AdamW and a schedule that raises it."""
    if not config["surge"]:
        return None, None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["lr"], weight_decay=config["decay"])
    plain = transformers.get_scheduler(
        config["schedule"], torch.optim.SGD(trained, lr=1.0), config["warmup"], config["steps"]
    ).lr_lambdas[0]
    at, factor, length = config["surge"]
    surged = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: plain(step) * (factor if at <= step < at + length else 1)
    )
    return optimizer, surged


def monitors(
    context: Mapping[str, Any],
    changed: Mapping[str, Mapping[str, Any]] | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The monitors of `MONITORS` (or those of `names`) whose needs `context` meets, with defaults but for `changed`."""
    found = {}
    for name in MONITORS if names is None else names:
        wanted = {key: str(value).removeprefix("$") for key, value in MONITORS[name]["arguments"].items()}
        if set(wanted.values()) <= set(context):
            arguments = {key: context[value] for key, value in wanted.items()}
            found[name] = catalog.load(name, "callbacks")(**arguments, **(changed or {}).get(name, {}))
    return found


def context_of(config: Config, skill: Any) -> dict[str, Any]:
    """What monitors are told of a run."""
    chance = {"clouds": 0.1, "chains": 1 / 16}.get(config["world"], 1 / config.get("modulus", 1))
    context: dict[str, Any] = {"chance": chance, "test": "second" if config["boundary"] else ""}
    if config["boundary"]:
        context |= {"tasks": ["first", "second"], "ends": [config["boundary"]]}
    return context | ({"skills": {"old": skill}} if skill is not None else {})


def run(label: str, config: Config) -> dict[str, Any] | None:
    """Trains one run; the record that is kept of it, or None where the truth denies the label."""
    train, sets, truths, skill = material(config)
    model = pretrained(config)
    rows = None if skill is None else [{k: v.tolist() for k, v in Rows(skill)[i].items()} for i in range(_SKILL)]
    names = [
        name for name, entry in MONITORS.items() if entry.get("parity") in (None, config["seed"] % 2)
    ]  # to save time
    attached = monitors(context_of(config, rows), names=names)
    every = config["every"] if label == "healthy" else max(1, config["every"] // 2)
    truth = Truth(truths, {key: value[:1000] for key, value in train.items()}, every)
    batch = min(config["batch"], len(train["labels"]))
    transformers.set_seed(config["seed"])
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=config["steps"], per_device_train_batch_size=batch, per_device_eval_batch_size=512,
            learning_rate=config["lr"], lr_scheduler_type=config["schedule"], warmup_steps=config["warmup"],
            weight_decay=config["decay"], logging_steps=max(1, config["steps"] // 80), eval_strategy="steps",
            eval_steps=config["every"], save_strategy="no", seed=config["seed"], use_cpu=True, report_to="none",
            disable_tqdm=True, label_names=["labels"], log_level="error", dataloader_pin_memory=False,
            train_sampling_strategy="sequential" if config["boundary"] else "random", logging_nan_inf_filter=False,
        )  # fmt: skip
        evaluated = {name: Rows(part) for name, part in sets.items()}
        trainer = Trainer(
            model, args, train_dataset=Rows(train), eval_dataset=evaluated.get("", evaluated),
            compute_metrics=_accuracy, optimizers=_optimizers(config, model),
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1), callbacks=[*attached.values(), truth],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    step = onset(label, config, truth.rows)
    if step is None:
        return None
    return {
        "label": label, "step": step, "config": config, "log": _log(trainer.state.log_history),
        "rows": {name: [_kept(name, row) for row in callback.history] for name, callback in attached.items()},
        "findings": {
            name: [rounded({k: f[k] for k in ("kind", "step", "confidence", "noticed")}) for f in callback.findings]
            for name, callback in attached.items() if callback.findings
        },
    }  # fmt: skip


def rounded(row: Mapping[str, Any], digits: int = 6) -> dict[str, Any]:
    """The row with floats cut to `digits` significant digits."""
    return {k: float(f"{v:.{digits}g}") if isinstance(v, float) else v for k, v in row.items()}


def _kept(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a row of the monitor called `name`, what its findings are made of."""
    keys = ("step", *MONITORS[name]["keep"])
    return rounded({key: value for key, value in row.items() if key.rpartition("/")[2] in keys})


def _log(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the Trainer's log what monitors read: losses, evaluations."""
    kept = []
    for row in history:
        keys = [k for k in row if k == "loss" or (k.startswith("eval_") and k.endswith(("loss", "accuracy")))]
        if keys:
            kept.append(rounded({"step": row["step"], **{k: row[k] for k in keys}}))
    return kept
