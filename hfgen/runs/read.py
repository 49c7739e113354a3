"""Reads a run's folder: the Trainer's state files and those of hfgen's callbacks. Nothing is executed or unpickled."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STATE = "trainer_state.json"
INFO_KEYS = ("step", "epoch")
TOTALS = ("train_runtime", "train_loss", "total_flos", "train_samples_per_second", "train_steps_per_second")


@dataclass(frozen=True)
class Finding:
    """What a monitor said: what, when, how sure, and what to try.

    Attributes:
        kind: A short name, e.g. "overfit".
        step: The optimizer step at which it began.
        confidence: In [0, 1], as the monitor defines it.
        sentence: What is wrong, in plain words.
        advice: What to change in the next run.
        source: Who said it: a callback's name, or "log".
        noticed: The optimizer step at which it was said.
        trouble: False for what is no trouble, such as a goal that was reached.
        explains: Kinds of other findings that follow from this one.
    """

    kind: str
    step: int
    confidence: float
    sentence: str
    advice: str
    source: str
    noticed: int
    trouble: bool = True
    explains: tuple[str, ...] = ()


@dataclass
class Run:
    """One run as far as its folder tells.

    Attributes:
        name, folder: The folder's name, and the folder.
        rows: The Trainer's log, one dict of numbers per row, each with "step".
        step, max_steps: Where the newest state stands, and where the run was to end (0 = not known).
        findings: What others explain comes last; trouble before the rest, the surest first.
        problems: What could not be read, in sentences.
        totals: Figures of the whole run that the Trainer logs at its end (seconds, ...); empty when it did not end.
    """

    name: str
    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    max_steps: int = 0
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the log shows the end of the training."""
        return bool(self.totals) or (self.max_steps > 0 and self.step >= self.max_steps)

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a logged number; of rows with one step the last counts. NaN and Inf are left out."""
        found = {row["step"]: float(row[key]) for row in self.rows if _is_number(row.get(key))}
        return list(found), list(found.values())

    def keys(self) -> list[str]:
        """The numbers that were logged, in order of appearance."""
        seen = {k: None for row in self.rows for k, v in row.items() if _is_number(v) and k not in INFO_KEYS}
        return list(seen)


def read_run(folder: Path) -> Run:
    """The run in `folder`: an output_dir, or one of its checkpoints.

    Raises:
        ValueError: `folder` is not a directory.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the output_dir of a run")
    run = Run(folder.resolve().name, folder)
    states = []
    for path in [folder / STATE, *sorted(folder.glob(f"checkpoint-*/{STATE}"))]:
        if path.is_file():
            state = _read(path, run.problems)
            if state is not None:
                states.append((state["global_step"], path.parent, state))
    if not states:
        run.problems.append(
            f"there is no {STATE} in {folder} or its checkpoints, so nothing is known of this run; the Trainer writes "
            "one with every checkpoint (save_strategy), and trainer.save_state() writes one at the end"
        )
        return run
    run.step, place, state = max(states, key=lambda found: found[0])
    run.max_steps = state.get("max_steps", 0)
    for row in state["log_history"]:
        if "train_runtime" in row:
            run.totals = {k: float(row[k]) for k in TOTALS if _is_number(row.get(k))}
        else:
            run.rows.append(row)
    found = [*_findings(place, state, run.problems), *_of_log(run)]
    run.findings = sorted(found, key=lambda f: (_explained(f, found), not f.trouble, -f.confidence, f.step, f.kind))
    return run


def _explained(finding: Finding, others: list[Finding]) -> bool:
    """Whether one of the others says why there is this one ("overfit/chat" is of the kind "overfit")."""
    kind = finding.kind.partition("/")[0]
    return any(kind in other.explains and other.kind.partition("/")[0] != kind for other in others)


def _read(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """A state file, or None and a sentence in `problems`."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        rows = state["log_history"]
        if not isinstance(rows, list) or not all(isinstance(r, dict) and isinstance(r["step"], int) for r in rows):
            raise ValueError("log_history is not a list of rows with a step")
        if not isinstance(state["global_step"], int) or not isinstance(state.get("max_steps", 0), int):
            raise ValueError("global_step or max_steps is no integer")
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as exc:
        problems.append(f"{path} cannot be read ({type(exc).__name__}: {exc}); the run may have died while writing it")
        return None
    return dict(state)


def _findings(place: Path, state: dict[str, Any], problems: list[str]) -> list[Finding]:
    """What the callbacks recorded, beside trainer_state.json and in it (which counts where both have a callback)."""
    records: dict[str, Any] = {}
    for path in sorted(place.glob("hfgen_*.json")):
        try:
            records[path.stem.removeprefix("hfgen_")] = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as exc:
            problems.append(f"{path} cannot be read ({type(exc).__name__}: {exc})")
    for stored in _dict(state.get("stateful_callbacks")).values():
        record = _dict(_dict(_dict(stored).get("attributes")).get("_saved"))
        if isinstance(record.get("name"), str):
            records[record["name"]] = record
    found = []
    for name, record in records.items():
        items = _dict(record).get("findings", [])
        for item in items if isinstance(items, list) else [items]:
            try:
                kind, sentence, advice = (str(item[key]) for key in ("kind", "sentence", "advice"))
                step, sure = int(item["step"]), float(item["confidence"])
                noticed, trouble = int(item.get("noticed", step)), item.get("level") != "INFO"
                explains = item.get("explains", [])
                explains = tuple(map(str, explains)) if isinstance(explains, list) else ()
                found.append(Finding(kind, step, sure, sentence, advice, name, noticed, trouble, explains))
            except (KeyError, TypeError, ValueError, OverflowError):
                problems.append(f"a finding of {name} in {place} has not the form this hfgen reads: {item!r}"[:300])
    return found


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _of_log(run: Run) -> list[Finding]:
    """What the log alone shows beyond doubt."""
    advice = "lower the learning rate, warm up for longer, or clip gradients (max_grad_norm); in fp16 use bf16"
    for row in run.rows:
        bad = [
            k for k in ("loss", "eval_loss", "grad_norm") if isinstance(row.get(k), float) and not _is_number(row[k])
        ]
        if bad:
            sentence = f"{bad[0]} became {row[bad[0]]} at step {row['step']}: the run diverged."
            return [Finding("diverged", row["step"], 1.0, sentence, advice, "log", row["step"])]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
