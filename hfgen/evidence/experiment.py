"""What an experiment is, and running one: arms x seeds -> a report as plain data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from .jobs import Job, run_jobs
from .stats import METHOD, Verdict, interval

FORMAT = 1
CAPTION = (
    "Up and to the right is better: more of the new task learnt, less of the old skills lost. Large marks are means over "
    "seeds, bars their 95 % intervals, small marks the single seeds. The dashed lines are the untouched base model."
)
Samples = Mapping[str, Mapping[str, list[float]]]
"""arm id -> metric key -> one value per seed, seeds in one order throughout (so differences can be paired)."""


@dataclass(frozen=True)
class Arm:
    """One way of training that is compared, or the untouched base."""

    id: str
    label: str


@dataclass(frozen=True)
class Metric:
    """One figure every run gives. `unit` is ``share`` (an accuracy in [0, 1]), ``number``, ``count`` or ``s``.

    A metric with `detail` stands in the files, not in the terminal's table.
    """

    key: str
    label: str
    unit: str = "share"
    explanation: str = ""
    detail: bool = False


@dataclass(frozen=True)
class Experiment:
    """A runnable claim.

    Attributes:
        method: The card's name.
        claim: The id of the claim on that card.
        title: For people.
        statement: The claim in one sentence, as it is tested.
        arms: What is compared, the reference (the untouched base) first.
        metrics: What every run measures.
        chart: (metric on the x axis, metrics on the y axes): one panel each.
        settings: A frozen dataclass with everything that fixes a run but arm and seed.
        smoke_settings: The same, cut down to a run of seconds that decides nothing.
        run: ``run(arm, seed, settings, report) -> {metric key: number}``, importable by name.
        judge: ``judge(samples, settings) -> verdicts``, one per arm that the claim is about.
        notes: Sentences a reader of the report must know.
        steps: Optimizer steps of a run; 0 = nothing is trained.
        tries: Runs spent on choosing the settings of each arm (settings x seeds); 0 = nothing was chosen by trying.
        tuning_seeds: The seeds of those; they are never reported.
        caption: What the chart shows, which way is better.
    """

    method: str
    claim: str
    title: str
    statement: str
    arms: tuple[Arm, ...]
    metrics: tuple[Metric, ...]
    chart: tuple[str, tuple[str, ...]]
    settings: Any
    smoke_settings: Any
    run: Callable[..., dict[str, float]]
    judge: Callable[[Samples, Any], list[Verdict]]
    notes: tuple[str, ...] = ()
    steps: int = 0
    tries: int = 0
    tuning_seeds: tuple[int, ...] = ()
    caption: str = CAPTION


def run_experiment(
    experiment: Experiment,
    seeds: Sequence[int],
    smoke: bool = False,
    workers: int = 2,
    log: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs every arm with every seed and returns the report: JSON-serialisable, see `FORMAT` and the keys below.

    Args:
        experiment: What to run.
        seeds: The seeds, distinct.
        smoke: Use the cut-down settings and give no verdict.
        workers: Worker processes of one thread each.
        log: File for what the runs print.
        console: Where progress is drawn.

    Raises:
        ValueError: no seeds or the same one twice.
        JobError: a run failed.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds is {list(seeds)!r}; give one or more distinct seeds")
    settings = experiment.smoke_settings if smoke else experiment.settings
    pairs = [(arm, seed) for seed in seeds for arm in experiment.arms]
    jobs = [Job(f"{a.label}, seed {s}", {"arm": a.id, "seed": s, "settings": settings}) for a, s in pairs]
    start, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    results = run_jobs(experiment.run, jobs, workers, log, console)
    keys = [metric.key for metric in experiment.metrics]
    samples: dict[str, dict[str, list[float]]] = {arm.id: {key: [] for key in keys} for arm in experiment.arms}
    for (arm, _seed), result in zip(pairs, results, strict=True):
        for key in keys:
            samples[arm.id][key].append(float(result[key]))
    verdicts = [] if smoke else experiment.judge(samples, settings)
    report = _report(experiment, seeds, smoke, settings, samples, verdicts, time.monotonic() - start)
    return report | {"started": started, "caption": experiment.caption}


def _report(
    experiment: Experiment,
    seeds: Sequence[int],
    smoke: bool,
    settings: Any,
    samples: Samples,
    verdicts: list[Verdict],
    seconds: float,
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "method": experiment.method,
        "claim": experiment.claim,
        "title": experiment.title,
        "statement": experiment.statement,
        "smoke": smoke,
        "seeds": list(seeds),
        "interval": METHOD,
        "settings": dataclasses.asdict(settings),
        "settings_sha256": settings_sha256(dataclasses.asdict(settings)),
        "metrics": [dataclasses.asdict(metric) for metric in experiment.metrics],
        "chart": {"x": experiment.chart[0], "y": list(experiment.chart[1])},
        "arms": [
            {
                "id": arm.id,
                "label": arm.label,
                "metrics": {
                    key: {"values": values, **dataclasses.asdict(interval(values))}
                    for key, values in samples[arm.id].items()
                },
            }
            for arm in experiment.arms
        ],
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
        "notes": list(experiment.notes),
        "seconds": seconds,
        "environment": _environment(),
    }


def settings_sha256(settings: Mapping[str, Any]) -> str:
    """The hash by which a report names its settings, given as plain data; the same before and after JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def samples_of(report: Mapping[str, Any]) -> Samples:
    """What the runs of a report (or of a ledger) gave."""
    return {a["id"]: {key: found["values"] for key, found in a["metrics"].items()} for a in report["arms"]}


def _environment() -> dict[str, Any]:
    """Versions and machine, without importing any of them."""
    packages = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
    versions = {name: metadata.version(name) for name in packages}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": versions,
    }


def finite(data: Any) -> Any:
    """`data` with every number that JSON cannot hold (an interval without ends) replaced by None."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
