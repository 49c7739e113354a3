"""Proxy and gold reward of the best of n against n and KL, with intervals over prompts, and the n at which to stop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .estimator import Floats, best_of_n_kl, check_n, expected_best_of_n

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.95
FEWEST_UNITS = 5  # of a bootstrap that decides anything
_ELEMENTS = 2**24  # of the bootstrap's counts held at once


@dataclass(frozen=True)
class Curve:
    """One score of the best of n.

    Args:
        mean: (L,) mean over prompts, one value per n.
        low: (L,) lower end of the 95 % bootstrap interval.
        high: (L,) upper end.
        sd: Standard deviation of the score over all samples, the unit of the plot.
    """

    mean: Floats
    low: Floats
    high: Floats
    sd: float


@dataclass(frozen=True)
class Advice:
    """Where to stop, in the sense of `best_of_n_curves`.

    Args:
        signal: `"gold"` or `"stand_in"`: what the advice rests on.
        n: The advised n.
        turns_down: Whether the signal is shown to be lower at the largest n than at its peak; None: too few units.
        drop: (mean, low, high) of signal(largest n) - signal(peak), paired, with its 95 % interval; None as above.
        text: The same in words.
    """

    signal: str
    n: int
    turns_down: bool | None
    drop: tuple[float, float, float] | None
    text: str


@dataclass(frozen=True)
class BestOfNCurves:
    """What `best_of_n_curves` found.

    Args:
        n: The L numbers of samples, ascending.
        kl: (L,) upper bound of KL(best-of-n || one sample), nats.
        curves: By name: `proxy`; `gold`; `stand_in` and `disagreement` (variance over members) with member scores.
        prompts: Number of prompts.
        samples: Smallest and largest number of samples of a prompt.
        units: How many independent units the intervals are over: prompts, or groups of them.
        advice: None without gold and member scores.
    """

    n: list[int]
    kl: Floats
    curves: dict[str, Curve]
    prompts: int
    samples: tuple[int, int]
    units: int
    advice: Advice | None

    def to_dict(self) -> dict[str, Any]:
        """The curves as JSON-serialisable data."""
        curves = {
            name: {"mean": c.mean.tolist(), "low": c.low.tolist(), "high": c.high.tolist(), "sd": c.sd}
            for name, c in self.curves.items()
        }
        advice = None if self.advice is None else vars(self.advice) | {"drop": self.advice.drop and [*self.advice.drop]}
        return {
            "n": self.n, "kl_upper_bound": self.kl.tolist(), "curves": curves, "prompts": self.prompts,
            "samples": list(self.samples), "units": self.units, "level": LEVEL, "advice": advice,
        }  # fmt: skip


def best_of_n_curves(
    proxy: Sequence[ArrayLike] | NDArray,
    gold: Sequence[ArrayLike] | NDArray | None = None,
    members: Sequence[ArrayLike] | NDArray | None = None,
    n: Iterable[int] | None = None,
    *,
    groups: Sequence[Any] | None = None,
    penalty: float = 0.5,
    resamples: int = 2000,
    seed: int = 0,
) -> BestOfNCurves:
    """Curves of proxy and gold of the best of n by `proxy`, and the n from which more samples harm.

    The *signal* of the advice is the gold reward where it is given (of a judge or people that did not train the proxy).
    Without it, it is a stand-in from the ensemble: the members' mean minus `penalty` times their variance, each member
    first brought to mean 0 and standard deviation 1 over all samples. The stand-in only sees errors that the members
    do not share: it can miss a turn, and says nothing about the gold reward's height. Nor can it turn where the proxy is
    the same formula (UWO of these members with this penalty): what chooses by a score only raises that score.

    The *peak* is the n with the largest mean signal. The signal *turns down* when the signal at the largest n minus that
    at the peak is below 0 with the whole 95 % interval. For this the units are split at random into halves, and the peak
    that a unit is measured against is chosen on the other half: a peak that is luck does not count. The advice is then
    the peak of all prompts; otherwise the largest n, with the words that no turn is shown.

    Args:
        proxy: P arrays of proxy scores, (N_p,) each, or one (P, N) array; prompts may have different N_p.
        gold: Gold rewards of the same shape, or None.
        members: Scores of the K >= 2 ensemble members, (N_p, K) each, or (P, N, K), or None.
        n: Whole numbers in 1..min N_p; None: powers of two and min N_p. At n = N_p one answer per prompt decides: sample
            more than the largest n of interest for narrow intervals.
        groups: One label per prompt. The bootstrap draws whole groups, e.g. seeds of reward models; None: prompts.
        penalty: Weight of the members' variance in the stand-in, at least 0.
        resamples: Bootstrap resamples of the units; percentile intervals. Under 20 units they are too narrow.
        seed: Of the bootstrap and of the halves.

    Raises:
        ValueError: no prompts, shapes that differ, one sample per prompt, scores that are not finite, an n that is too
            large, a member with one score for all samples, one member only.
        TypeError: an n that is no whole number.
    """
    scores = _arrays("proxy", proxy, 1)
    sizes = [len(s) for s in scores]
    if min(sizes) < 2:
        raise ValueError(f"prompt {sizes.index(min(sizes))} has {min(sizes)} samples; give every prompt 2 or more")
    if resamples < 100 or penalty < 0:
        raise ValueError(f"resamples is {resamples} and penalty {penalty}; give at least 100, and a penalty from 0 on")
    chosen = check_n(n, min(sizes))
    series = {"proxy": scores}
    if gold is not None:
        series["gold"] = _arrays("gold", gold, 1, sizes)
    if members is not None:
        series["stand_in"], series["disagreement"] = _stand_in(_arrays("members", members, 2, sizes), penalty)
    values = _values(scores, list(series.values()), sizes, chosen)
    units = _units(groups, len(scores))
    means = _bootstrap(values, units, resamples, seed)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    curves = {
        name: Curve(values[i].mean(0), low[i], high[i], float(np.concatenate(series[name]).std(ddof=1)))
        for i, name in enumerate(series)
    }
    signal = next((s for s in ("gold", "stand_in") if s in series), None)
    advice = None
    if signal is not None:
        advice = _advise(signal, values[list(series).index(signal)], chosen, units, resamples, seed)
    return BestOfNCurves(
        chosen, best_of_n_kl(chosen), curves, len(scores), (min(sizes), max(sizes)), int(units.max()) + 1, advice
    )


def _arrays(name: str, given: Any, dims: int, sizes: list[int] | None = None) -> list[Floats]:
    found = [np.asarray(v, dtype=np.float64) for v in given]
    if not found or (sizes is not None and len(found) != len(sizes)):
        raise ValueError(f"{name} has {len(found)} prompts; give {len(sizes) if sizes else 'at least 1'}")
    for index, array in enumerate(found):
        if array.ndim != dims or (sizes is not None and len(array) != sizes[index]):
            want = f"({sizes[index] if sizes else 'samples'},{' members' if dims == 2 else ''})"
            raise ValueError(f"{name} of prompt {index} has shape {array.shape}; give {want}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} of prompt {index} has a score that is not finite; leave such samples out")
    return found


def _stand_in(members: list[Floats], penalty: float) -> tuple[list[Floats], list[Floats]]:
    """Mean - penalty * variance over normalised members, and that variance (ddof=0, as in Coste et al.), per sample."""
    counts = {m.shape[1] for m in members}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(f"members has {sorted(counts)} members; give every prompt the same ones, 2 or more")
    every = np.concatenate(members)
    mean, sd = every.mean(0), every.std(0, ddof=1)
    if not np.all(sd > 0):
        raise ValueError(f"member {int(np.argmin(sd))} gives every sample one score; leave it out")
    normal = [(m - mean) / sd for m in members]
    variance = [m.var(1) for m in normal]
    return [m.mean(1) - penalty * v for m, v in zip(normal, variance, strict=True)], variance


def _values(proxy: list[Floats], series: list[list[Floats]], sizes: list[int], n: list[int]) -> Floats:
    """(S, P, L) expected scores; prompts of one size are worked through together."""
    values = np.empty((len(series), len(proxy), len(n)))
    for size in sorted(set(sizes)):
        which = [i for i, s in enumerate(sizes) if s == size]
        stacked = np.stack([np.stack([s[i] for i in which]) for s in series])
        values[:, which] = expected_best_of_n(np.stack([proxy[i] for i in which]), stacked, n)
    return values


def _units(groups: Sequence[Any] | None, prompts: int) -> NDArray[np.intp]:
    """(P,) the unit each prompt belongs to, 0, 1, ..."""
    if groups is None:
        return np.arange(prompts)
    if len(groups) != prompts:
        raise ValueError(f"groups has {len(groups)} labels; give {prompts}, one per prompt")
    return np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)


def _bootstrap(values: Floats, units: NDArray[np.intp], resamples: int, seed: int) -> Floats:
    """(R, S, L) means over the prompts of units drawn with replacement, of (S, P, L) values."""
    count = int(units.max()) + 1
    sums = np.zeros((count, values.shape[0] * values.shape[2]))
    np.add.at(sums, units, values.transpose(1, 0, 2).reshape(len(units), -1))
    sizes = np.bincount(units).astype(np.float64)
    rng, shares = np.random.default_rng(seed), np.full(count, 1 / count)
    block, means = max(1, _ELEMENTS // count), []
    for first in range(0, resamples, block):
        drawn = rng.multinomial(count, shares, size=min(block, resamples - first)).astype(np.float64)
        means.append(drawn @ sums / (drawn @ sizes)[:, None])
    return np.concatenate(means).reshape(resamples, values.shape[0], values.shape[2])


def _advise(signal: str, values: Floats, n: list[int], units: NDArray[np.intp], resamples: int, seed: int) -> Advice:
    """The advice from (P, L) values of the signal."""
    name = "gold reward" if signal == "gold" else "stand-in for the gold reward (members' mean less variance)"
    peak, count = int(values.mean(0).argmax()), int(units.max()) + 1
    if count < FEWEST_UNITS:
        text = (
            f"The {name} peaks at n = {n[peak]}; {count} units are too few to show a turn, {FEWEST_UNITS} are needed."
        )
        return Advice(signal, n[peak], None, None, text)
    half = np.random.default_rng(seed).permutation(count)[units] % 2
    differences = np.empty(len(values))
    for side in (0, 1):  # the peak of one half is what the other half is measured against
        own = half == side
        differences[own] = values[own, -1] - values[own, int(values[~own].mean(0).argmax())]
    means = _bootstrap(differences[None, :, None], units, resamples, seed)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    drop = (float(differences.mean()), float(low), float(high))
    shown = f"{drop[0]:+.3g} (95 % interval {drop[1]:+.3g} to {drop[2]:+.3g})"
    if high < 0:
        text = f"Stop at n = {n[peak]}: from this peak to n = {n[-1]} the {name} changes by {shown}."
        return Advice(signal, n[peak], True, drop, text)
    text = f"No turn is shown up to n = {n[-1]}: from its peak on the other half of the data the {name} changes by {shown}."
    return Advice(signal, n[-1], False, drop, text)


def plot_best_of_n(found: BestOfNCurves, path: str | Path | None = None) -> Figure:
    """Gain of proxy and gold (or stand-in) over one sample, in standard deviations of each score, against KL.

    Args:
        found: The curves.
        path: A file to write (.png, .svg, .pdf), or None.

    Returns:
        The matplotlib figure. Bands are the 95 % intervals; the ticks above are n; a line marks the advised n.
    """
    import matplotlib
    from matplotlib.figure import Figure

    styles = {"proxy": ("#9ca3af", "--", "proxy"), "gold": ("#1d4ed8", "-", "gold"),
              "stand_in": ("#b45309", "-", "stand-in (members' mean less variance)")}  # fmt: skip
    with matplotlib.rc_context({"axes.spines.right": False, "svg.fonttype": "path", "svg.hashsalt": "hfgen"}):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for name, (colour, line, label) in styles.items():
            if name in found.curves:
                curve = found.curves[name]
                scale = curve.sd if curve.sd > 0 else 1.0
                mean, low, high = ((v - curve.mean[0]) / scale for v in (curve.mean, curve.low, curve.high))
                axes.plot(found.kl, mean, line, color=colour, label=label, marker="o", ms=3)
                axes.fill_between(found.kl, low, high, color=colour, alpha=0.18, lw=0)
        if found.advice is not None and found.advice.turns_down:
            at = float(best_of_n_kl(found.advice.n))
            axes.axvline(at, color="#b91c1c", lw=1, ls=":", label=f"stop at n = {found.advice.n}")
        axes.set_xlabel("log n - (n - 1)/n: upper bound of the KL divergence from one sample (nats)")
        axes.set_ylabel(f"gain over n = {found.n[0]} (standard deviations)")
        axes.grid(color="#e5e7eb", lw=0.8)
        axes.legend(frameon=False)
        shown = [0, *(i for i in range(1, len(found.n)) if found.kl[i] - found.kl[i - 1] > 0.02 * found.kl[-1])]
        above = axes.secondary_xaxis("top")
        above.set_xticks(found.kl[shown], [str(found.n[i]) for i in shown], fontsize=7, rotation=45)
        above.set_xlabel("n")
        if path is not None:
            figure.savefig(path, dpi=150)
    return figure
