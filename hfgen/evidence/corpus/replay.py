"""Findings made again from a shipped run, by the monitors themselves, with any thresholds: nothing is trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from .train import MONITORS, context_of, monitors

Finding = dict[str, Any]


def replay(
    record: Mapping[str, Any], changed: Mapping[str, Mapping[str, Any]] | None = None, only: str | None = None
) -> dict[str, list[Finding]]:
    """What each monitor finds in the run; monitors that keep no rows to judge are left out.

    Args:
        record: Of `read_corpus`.
        changed: Arguments other than the defaults: ``{monitor: {argument: value}}``.
        only: One monitor's name; None: all.
    """
    return {name: monitor.findings for name, monitor in driven(record, changed, only).items()}


def driven(
    record: Mapping[str, Any], changed: Mapping[str, Mapping[str, Any]] | None = None, only: str | None = None
) -> dict[str, Any]:
    """The monitors themselves after the run, with their findings and histories; see `replay`."""
    skill = [{"x": [0.0], "labels": 0}]  # rows are not read again
    context = context_of(record["config"], skill if record["config"]["base_steps"] else None)
    names = [only] if only else [name for name, entry in MONITORS.items() if entry["replay"] != "none"]
    with _quiet():
        found = monitors(context, changed, [n for n in names if n in record["rows"]])
        for name, monitor in found.items():
            _drive(monitor, name, record)
    return found


def _drive(monitor: Any, name: str, record: Mapping[str, Any]) -> None:
    """Tells the monitor of the run in the order in which the Trainer did: looks, the log, evaluations."""
    config = record["config"]
    steps = config["steps"]
    args = SimpleNamespace(
        eval_strategy="steps", logging_strategy="steps", lr_scheduler_type=config["schedule"],
        get_warmup_steps=lambda _: config["warmup"],
    )  # fmt: skip
    by_rows = MONITORS[name]["replay"] == "rows"
    events = [(row["step"], 0, row) for row in record["rows"][name] if by_rows]
    events += [(row["step"], 1, row) for row in record["log"]]
    if not by_rows:
        monitor.begin(SimpleNamespace(args=args, state=SimpleNamespace(global_step=0)))
    for step, kind, row in sorted(events, key=lambda event: event[:2]):
        state = SimpleNamespace(global_step=step, max_steps=steps, log_history=[{}])
        before = len(monitor.findings)
        if kind == 0:
            monitor.judge(state, row)
            monitor.history.append(row)
        elif "loss" in row:
            monitor.on_log(args, state, None, logs={"loss": row["loss"]})
        elif not by_rows:
            dataset = next(key for key in row if key.endswith("loss")).removeprefix("eval_").removesuffix("loss")
            values = {key.removeprefix(f"eval_{dataset}"): value for key, value in row.items() if key != "step"}
            event = SimpleNamespace(args=args, state=state, eval_dataloader=SimpleNamespace(dataset=range(256)))
            monitor.evaluated(event, dataset.removesuffix("_"), values)
        for finding in monitor.findings[before:]:
            finding["noticed"] = step


@contextmanager
def _quiet() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
