"""d90 of Li et al. (arXiv:1804.08838): the smallest d that reaches 90 % of what full fine-tuning reaches."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean

from hfgen.kit import checks

logger = logging.getLogger("hfgen")


@dataclass(frozen=True)
class IntrinsicDimension:
    """What `estimate_d90` found.

    Attributes:
        d90: The smallest d tried whose mean score reaches the target; None where none did.
        target: share * baseline.
        scores: (d, mean score over the seeds) of every d tried, by d.
        note: How far to trust d90: between which two d it lies, or at which end the grid was too small.
    """

    d90: int | None
    target: float
    scores: tuple[tuple[int, float], ...]
    note: str


def estimate_d90(
    train_and_score: Callable[[int, int], float],
    baseline: float,
    grid: Iterable[int] | None = None,
    *,
    low: int = 10,
    high: int = 10_000,
    share: float = 0.9,
    seeds: Iterable[int] = (0,),
    resolution: float = 1.1,
) -> IntrinsicDimension:
    """Search the smallest d whose score is at least `share` of full fine-tuning's, by bisection.

    The score is taken to grow with d; where noise breaks that, more seeds help. About log2 of the grid's length trainings
    per seed for the place in the grid, and a few between two of its points.

    Args:
        train_and_score: (d, seed) -> score, higher is better: make a model with ``IntrinsicConfig(d=d, seed=seed, ...)``,
            train it, score it.
        baseline: The score of full fine-tuning, above 0 (give a score that is 0 without any skill).
        grid: Values of d; None = low, 2 low, 4 low, ... up to `high`.
        low: First d of that grid.
        high: Its last.
        share: 0.9 by definition; in (0, 1].
        seeds: Each d is trained with each of these and the scores are averaged.
        resolution: Between two points of the grid it goes on until d90 is known to this factor; 1.0 = to the integer,
            math.inf = the grid's own points only.

    Raises:
        TypeError, ValueError: an argument, or a score that is returned, has a wrong type or value.
    """
    owner = "estimate_d90"
    if not callable(train_and_score):
        raise TypeError(f"{owner}.train_and_score is {train_and_score!r}; give a function of (d, seed)")
    checks.number(owner, "baseline", baseline, 0.0)
    checks.number(owner, "share", share, 0.0, 1.0)
    if resolution != math.inf:
        checks.number(owner, "resolution", resolution)
    if resolution < 1:
        raise ValueError(f"{owner}.resolution is {resolution}; give a factor of at least 1.0")
    tried, chosen = _grid(owner, grid, low, high), list(seeds)
    if not chosen:
        raise ValueError(f"{owner}.seeds is empty; give at least one")
    target, scores = share * baseline, {}

    def reaches(d: int) -> bool:
        found = [train_and_score(d, seed) for seed in chosen]
        for score in found:
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
                raise ValueError(f"{owner}.train_and_score gave {score!r} at d={d}; it must return a finite number")
        scores[d] = fmean(found)
        logger.info("estimate_d90: d=%d scores %.4g of the %.4g wanted", d, scores[d], target)
        return scores[d] >= target

    fails, passes = -1, len(tried)  # indices; what lies outside of the grid is assumed, and said in the note
    while passes - fails > 1:
        middle = (fails + passes) // 2
        fails, passes = (fails, middle) if reaches(tried[middle]) else (middle, passes)
    if passes == len(tried):
        return _result(None, target, scores, f"the grid is too small: even d={tried[-1]} misses the target; go higher")
    best = tried[passes]
    if passes == 0:
        return _result(
            best, target, scores, f"the grid starts too high: its first d={best} reaches the target; start lower"
        )
    worst = tried[fails]
    while best - worst > 1 and best > worst * resolution:
        middle = min(max(round(math.sqrt(best * worst)), worst + 1), best - 1)
        worst, best = (worst, middle) if reaches(middle) else (middle, best)
    return _result(best, target, scores, f"d={worst} misses the target and d={best} reaches it")


def _grid(owner: str, grid: Iterable[int] | None, low: int, high: int) -> list[int]:
    """The values of d, ascending."""
    if grid is None:
        checks.integer(owner, "low", low, 1)
        checks.integer(owner, "high", high, low)
        count = int(math.log2(high / low)) + 1
        return sorted({*(low << i for i in range(count)), high})
    values = list(grid)
    for d in values:
        checks.integer(owner, "grid", d, 1)
    if not values or values != sorted(set(values)):
        raise ValueError(f"{owner}.grid is {values}; give ascending values of d, each once")
    return values


def _result(d90: int | None, target: float, scores: dict[int, float], note: str) -> IntrinsicDimension:
    return IntrinsicDimension(d90, target, tuple(sorted(scores.items())), note)
