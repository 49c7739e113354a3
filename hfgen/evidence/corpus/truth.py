"""Where a run's label sets in, from what was done to it and from rows no monitor sees; None where it did not come true."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Row = dict[str, float]


def smooth(values: Sequence[float]) -> list[float]:
    """Means of each value and its neighbours (five, fewer at the ends)."""
    return [sum(part) / len(part) for part in (values[max(0, i - 2) : i + 3] for i in range(len(values)))]


def onset(label: str, config: dict[str, Any], rows: Sequence[Row]) -> int | None:
    """The step at which `label` sets in (0 for what holds from the start), or None: the run does not show it.

    Args:
        label: What the run is meant to show.
        config: Its settings.
        rows: The truth at each look, by step: ``<set>_loss``, ``<set>_accuracy`` of ``test``, ``train`` and, where there
            are, ``old`` and ``first``; ``train_zero``, the share of training labels whose loss is exactly 0.
    """
    return _OF[label](config, rows)


def _loss(rows: Sequence[Row], name: str = "test") -> list[float]:
    return [row[f"{name}_loss"] for row in rows]


def _healthy(config: dict[str, Any], rows: Sequence[Row]) -> int | None:
    """It learns, ends within 5 % of its lowest loss, and loses less than 3 points of whatever it could before."""
    losses = _loss(rows)
    means = smooth(losses)
    fine = all(map(math.isfinite, losses)) and means[-1] <= 1.05 * min(means)
    fine = fine and losses[-1] < (1.0 if config["base_steps"] else 0.8) * losses[0]
    if "old_accuracy" in rows[0]:
        fine = fine and min(row["old_accuracy"] for row in rows) > rows[0]["old_accuracy"] - 0.03
    if config["boundary"]:
        after = [row["first_accuracy"] for row in rows if row["step"] >= config["boundary"]]
        fine = fine and min(after) > after[0] - 0.03
    return 0 if fine else None


def _overfit(config: dict[str, Any], rows: Sequence[Row]) -> int | None:
    """The step of the lowest loss on new rows, if it ends 10 % higher and began to rise between 5 % and 70 %."""
    means = smooth(_loss(rows))
    if not all(map(math.isfinite, means)):
        return None
    at = min(range(len(means)), key=means.__getitem__)
    step = int(rows[at]["step"])
    risen = means[-1] >= 1.1 * means[at] and rows[-1]["train_loss"] < rows[at]["train_loss"]
    return step if risen and 0.05 <= step / config["steps"] <= 0.7 else None


def _grokked(config: dict[str, Any], rows: Sequence[Row]) -> int | None:
    """The first step with 0.9 of what can be gained over guessing, after all training rows were right and few others."""
    chance = 1 / config["modulus"]
    fitted = [row["step"] for row in rows if row["train_accuracy"] >= 0.99 and row["test_accuracy"] < chance + 0.2]
    reached = [row["step"] for row in rows if row["test_accuracy"] >= chance + 0.9 * (1 - chance)]
    return int(reached[0]) if fitted and reached and fitted[0] < reached[0] else None


def _collapsed(config: dict[str, Any], rows: Sequence[Row]) -> int | None:
    """The first step at which more than half of all training labels have a loss of exactly 0, and from then on."""
    above = [row["train_zero"] > 0.5 for row in rows]
    if not above[-1] or above[0]:
        return None
    return int(rows[len(above) - above[::-1].index(False)]["step"])


def _spike(config: dict[str, Any], rows: Sequence[Row]) -> int | None:
    """The step at which the rate is raised, if the loss on new rows then at least doubles, and comes down again."""
    at = config["surge"][0]
    before = [row["test_loss"] for row in rows if row["step"] <= at][-1]
    peak = max((row["test_loss"] for row in rows if at < row["step"] <= at + config["every"]), default=0.0)
    last = rows[-1]["test_loss"]
    return at if 2 * before <= peak < math.inf and last < (before + peak) / 2 else None


def _too_high(config: dict[str, Any], rows: Sequence[Row]) -> int | None:
    """The step at which the rate is raised for good, if the run ends worse than it began, or nowhere."""
    worse = not rows[-1]["test_loss"] < rows[0]["test_loss"]
    return int(config["surge"][0]) if worse else None


def _noisy(config: dict[str, Any], rows: Sequence[Row]) -> int | None:
    """From the start: the labels were drawn anew before it."""
    return 0


def _switch(config: dict[str, Any], rows: Sequence[Row]) -> int | None:
    """The first task's end, if accuracy on new rows of it falls by 15 points within 100 steps."""
    at = config["boundary"]
    before = [row["first_accuracy"] for row in rows if row["step"] <= at][-1]
    lowest = min(row["first_accuracy"] for row in rows if at < row["step"] <= at + 100)
    return at if before - lowest >= 0.15 else None


def _forgets(config: dict[str, Any], rows: Sequence[Row]) -> int | None:
    """The first step from which accuracy on new rows of the old skill is 5 points lower to the end, and then 10."""
    drops = [rows[0]["old_accuracy"] - row["old_accuracy"] for row in rows]
    if drops[-1] < 0.1:
        return None
    lower = [drop >= 0.05 for drop in drops]
    return int(rows[len(lower) - lower[::-1].index(False)]["step"])


_OF = {
    "healthy": _healthy, "overfit": _overfit, "grokked": _grokked, "softmax collapsed": _collapsed,
    "loss spike": _spike, "rate too high": _too_high, "noisy labels": _noisy, "task switch": _switch,
    "forgets": _forgets,
}  # fmt: skip
