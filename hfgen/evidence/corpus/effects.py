"""Callbacks that name no trouble: the soup beside its best member, data_diet's scores beside label noise.

Runs of their own, drawn as those of the corpus are (numbers from 1000 on) and trained by a stock Trainer; nothing was
chosen on them.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from hfgen import catalog
from hfgen.evidence.stats import interval

from .cases import Config, settings
from .figures import share
from .train import material, pretrained
from .worlds import Batch, Rows, judged

NAMES = json.loads((Path(__file__).parent / "others.json").read_text(encoding="utf-8"))
FIRST, SOUPS, DIETS = 1000, 20, 20  # the first number; runs of each label; noisy runs
ROUNDING = 1e-5  # nats: the callback takes the mean over labels in another order


class Members(TrainerCallback):
    """At every evaluation, so of what the soup has as members, the loss on the gate rows and on fresh ones."""

    def __init__(self, gate: Batch, fresh: Batch) -> None:
        self.gate, self.fresh = gate, fresh
        self.losses: list[tuple[float, float]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.losses.append((_loss(model, self.gate), _loss(model, self.fresh)))


def _loss(model: Any, rows: Batch) -> float:
    return float(judged(model, rows)[0].double().mean())


def _trained(config: Config, train: Any, evaluation: Any, callbacks: list[Any]) -> Any:
    """The model after a run of `config`."""
    model = pretrained(config)
    transformers.set_seed(config["seed"])
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=config["steps"], per_device_train_batch_size=min(config["batch"], len(train)),
            per_device_eval_batch_size=512, learning_rate=config["lr"], lr_scheduler_type=config["schedule"],
            warmup_steps=config["warmup"], weight_decay=config["decay"], eval_strategy="steps",
            eval_steps=config["every"], save_strategy="no", seed=config["seed"], use_cpu=True, report_to="none",
            disable_tqdm=True, label_names=["labels"], log_level="error", dataloader_pin_memory=False,
            train_sampling_strategy="sequential" if config["boundary"] else "random",
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=train, eval_dataset=evaluation, callbacks=callbacks)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return model


def soup_run(label: str, number: int) -> dict[str, Any]:
    """Losses in nats of the greedy soup and of its best member, on the gate rows and on fresh ones."""
    config = settings(label, number)
    train, sets, truths, _ = material(config)
    gate, fresh = list(sets.values())[-1], truths["test"]  # of the task that is trained at the end
    soup, members = catalog.load(NAMES["averages"], "callbacks")(), Members(gate, fresh)
    model = _trained(config, Rows(train), Rows(gate), [soup, members])
    gate_best, fresh_best = min(members.losses)
    model.load_state_dict(soup.soup, strict=False)
    return {
        "label": label, "members": soup.members, "gate": _loss(model, gate), "gate_best": gate_best,
        "fresh": _loss(model, fresh), "fresh_best": fresh_best,
    }  # fmt: skip


def diet_run(number: int) -> dict[str, Any]:
    """AUROC of each score for labels that were drawn anew (and came out another) against the others."""
    config = settings("noisy labels", number)
    train, sets, _, _ = material(config)
    true = material(config | {"flips": 0.0})[0]["labels"]
    diet = catalog.load(NAMES["ranks"], "callbacks")(share=1.0)
    _trained(config, Rows(train), Rows(sets[""]), [diet])
    table = datasets.Dataset.from_dict({"wrong": (train["labels"] != true).tolist()})
    read = diet.scored(table).filter(lambda row: row["el2n"] is not None)  # a short run is allowed fewer than all
    events = [row["forgetting_events"] if row["learnt"] else 10**6 for row in read]
    return {
        "rows": len(read), "el2n": auroc(read["el2n"], read["wrong"]), "forgetting_events": auroc(events, read["wrong"])
    }  # fmt: skip


def auroc(scores: Sequence[float], flags: Sequence[bool]) -> float:
    """P(a flagged row's score > an unflagged one's) + half of the ties, by ranks (Mann and Whitney 1947)."""
    from scipy.stats import rankdata

    ranks = rankdata(list(scores))
    flagged = sum(flags)
    above = sum(rank for rank, flag in zip(ranks, flags, strict=True) if flag) - flagged * (flagged + 1) / 2
    return float(above / (flagged * (len(flags) - flagged)))


def make_effects(soups: int = SOUPS, diets: int = DIETS) -> dict[str, Any]:
    """All figures; about two minutes, trains."""
    soup = [soup_run(label, FIRST + i) for label in ("healthy", "overfit") for i in range(soups)]
    points = (n for n in itertools.count(FIRST) if settings("noisy labels", n)["world"] == "clouds")  # a label per row
    diet = [diet_run(number) for number in itertools.islice(points, diets)]
    return {
        "format": 1,
        "averages": {name: soup_figures([r for r in soup if r["label"] == name]) for name in ("healthy", "overfit")},
        "ranks": {"runs": diets} | {score: _mean([r[score] for r in diet]) for score in ("el2n", "forgetting_events")},
    }  # fmt: skip


def soup_figures(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of `soup_run`s: how often the soup is worse on the gate, has more than one member, and is better on fresh rows."""
    return {
        "worse_on_gate": share(sum(run["gate"] > run["gate_best"] + ROUNDING for run in runs), len(runs)),
        "mixed": share(sum(run["members"] > 1 for run in runs), len(runs)),
        "better": share(sum(run["fresh"] < run["fresh_best"] for run in runs), len(runs)),
        "change": _mean([run["fresh"] / run["fresh_best"] - 1 for run in runs]),
        "members": statistics.median(run["members"] for run in runs),
    }


def _mean(values: Sequence[float]) -> dict[str, float]:
    """The mean with its 95 % interval (Student's)."""
    found = interval(list(values))
    return {"mean": round(found.mean, 4), "low": round(found.low, 4), "high": round(found.high, 4)}
