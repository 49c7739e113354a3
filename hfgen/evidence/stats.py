"""Intervals over seeds, checks on them, and the verdict: small pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LEVEL = 0.95
METHOD = "95 % Student t interval of the mean over seeds (n - 1 degrees of freedom); differences are paired by seed"
Outcome = Literal["holds", "fails", "open"]
_TINY = 1e-9  # a difference of equal accuracies may be off zero by a rounding error


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; one value alone has an interval without ends (-inf, inf)."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The t interval of the mean: mean +- t(level, n - 1) * s / sqrt(n), s with n - 1 in the denominator.

    Raises:
        ValueError: `values` is empty or holds a number that is not finite.
    """
    n = len(values)
    if not n or not all(map(math.isfinite, values)):
        raise ValueError(f"values={list(values)!r}: give at least one finite number")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    from scipy.stats import t

    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf(0.5 + level / 2, n - 1)) * spread / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """The differences a - b, seed by seed."""
    return [x - y for x, y in zip(a, b, strict=True)]


@dataclass(frozen=True)
class Check:
    """One testable part of a claim: an interval against a bound fixed in advance.

    `outcome` is ``holds`` when the whole interval is on the right side of the bound, ``fails`` when it is on the wrong
    side, ``open`` when the bound lies within it: then these seeds do not decide.
    """

    statement: str
    interval: Interval
    bound: float
    outcome: Outcome


def at_least(statement: str, values: Sequence[float], bound: float) -> Check:
    """Holds when the mean of `values` (one per seed) is shown to be >= bound."""
    found = interval(values)
    return Check(statement, found, bound, _outcome(found.low - bound, found.high - bound))


def at_most(statement: str, values: Sequence[float], bound: float) -> Check:
    """Holds when the mean of `values` (one per seed) is shown to be <= bound."""
    found = interval(values)
    return Check(statement, found, bound, _outcome(bound - found.high, bound - found.low))


def _outcome(low: float, high: float) -> Outcome:
    """What an interval of "how much better than the bound" says."""
    if low >= -_TINY:
        return "holds"
    return "fails" if high < -_TINY else "open"


@dataclass(frozen=True)
class Verdict:
    """What came out for one arm: reproduced, partly, not reproduced, void or untested, with the checks behind it."""

    arm: str
    verdict: Literal["reproduced", "partly", "not reproduced", "void", "untested"]
    reason: str
    checks: tuple[Check, ...] = ()


def verdict(arm: str, checks: Sequence[Check], void: str | None = None) -> Verdict:
    """All checks hold: reproduced; some: partly; none: not reproduced.

    Args:
        arm: The arm's id.
        checks: The parts of the claim, one or more.
        void: Why the comparison says nothing (its baseline never learnt); wins over every check.

    Raises:
        ValueError: no checks.
    """
    if not checks:
        raise ValueError(f"checks of arm {arm!r} is empty: give the parts of the claim to look at")
    if void:
        return Verdict(arm, "void", void, tuple(checks))
    if all(check.interval.n == 1 for check in checks):
        return Verdict(arm, "untested", "one seed gives no interval; run two or more", tuple(checks))
    held = sum(check.outcome == "holds" for check in checks)
    reason = f"{held} of {len(checks)} parts of the claim hold"
    if undecided := sum(check.outcome == "open" for check in checks):
        reason += f", {undecided} not decided by {checks[0].interval.n} seeds: more would narrow the interval"
    if held == len(checks):
        return Verdict(arm, "reproduced", reason, tuple(checks))
    return Verdict(arm, "partly" if held else "not reproduced", reason, tuple(checks))
