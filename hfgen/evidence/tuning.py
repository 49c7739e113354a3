"""Choosing one number per arm (a learning rate) before a claim is tested: the same grid and seeds for every arm."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .experiment import Arm
from .jobs import Job, run_jobs

Row = dict[str, Any]
"""One try: ``{"arm": id, "rate": number, "seed": number, metric key: number, ...}``."""


def try_grid(
    run: Callable[..., dict[str, float]],
    arms: Sequence[Arm],
    grid: Sequence[float],
    seeds: Sequence[int],
    settings: Callable[[str, float], Any],
    workers: int = 2,
) -> list[Row]:
    """Runs every arm at every rate of `grid` on every seed of `seeds`, seed after seed.

    Args:
        run: The experiment's, importable by name.
        arms: Those that have something to choose.
        grid: The rates.
        seeds: Seeds that are never reported.
        settings: ``settings(arm id, rate)``: the settings of a try.
        workers: Worker processes of one thread each.
    """
    tries = [(seed, arm, rate) for seed in seeds for arm in arms for rate in grid]
    jobs = [
        Job(f"{arm.label} {rate:g}, seed {seed}", {"arm": arm.id, "seed": seed, "settings": settings(arm.id, rate)})
        for seed, arm, rate in tries
    ]
    found = run_jobs(run, jobs, workers)
    return [{"arm": a.id, "rate": rate, "seed": s, **r} for (s, a, rate), r in zip(tries, found, strict=True)]


def best_rate(rows: Sequence[Row], keys: Sequence[str]) -> float:
    """The rate of highest mean of the first of `keys`, then of the next, then the lower rate; `rows` are of one arm."""

    def merit(rate: float) -> tuple[float, ...]:
        of_rate = [row for row in rows if row["rate"] == rate]
        return *(round(sum(row[key] for row in of_rate) / len(of_rate), 9) for key in keys), -rate

    return max(sorted({row["rate"] for row in rows}), key=merit)


def at_edge(chosen: dict[str, float], grid: Sequence[float]) -> list[str]:
    """The arms whose chosen rate is the lowest or the highest of the grid: a wider grid might have found a better one."""
    return [arm for arm, rate in chosen.items() if rate in (min(grid), max(grid))]


def main(tune: Callable[[int], dict[str, Any]], file: Path, arguments: list[str] | None = None) -> None:
    """Command line of an ``evidence.py``: ``tune [--out FILE] [--workers N]`` writes the table of `tune(workers)`."""
    parser = argparse.ArgumentParser(description="Chooses the learning rates of an experiment on seeds apart.")
    parser.add_argument("command", choices=["tune"])
    parser.add_argument("--out", type=Path, default=file)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    table = tune(options.workers)
    options.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"chosen: {table['chosen']}; now write these into SETTINGS and commit before any reported seed runs")
    if edge := at_edge(table["chosen"], table["grid"]):
        print(f"at the edge of the grid: {', '.join(edge)}; widen the grid for every arm and run again")
