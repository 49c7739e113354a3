"""The expected score of the best of n, from N scored samples per prompt, for every n <= N, without drawing again.

Best-of-n takes the sample with the largest proxy score. Averaged over all C(N, n) ways to take n of the N samples
(without replacement), the sample of ascending proxy rank i wins in C(i-1, n-1) of them, so

    E_n = sum over i = n..N of  C(i-1, n-1) / C(N, n) * g_(i)          g_(i): the score to be estimated, in proxy order

is the mean of g over all subsets, and unbiased for n fresh samples (OpenAI, "Measuring Goodhart's law", 2022; used by
Gao et al., arXiv 2210.10760, and Coste et al., arXiv 2310.02743). Samples of equal proxy score win equally often.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ELEMENTS = 2**21  # of the matrices held at once: 16 MiB in float64

Floats = NDArray[np.float64]


def best_of_n_kl(n: ArrayLike) -> Floats:
    """log n - (n - 1)/n, in nats: an upper bound of KL(best-of-n || one sample); same shape as `n` (float64).

    It is the divergence itself when no two samples can have equal proxy scores (then answers are as good as unique);
    with few distinct answers or ties it can be far too large (Beirami et al., arXiv 2401.01879).

    Raises:
        ValueError: an n below 1.
    """
    values = np.asarray(n, dtype=np.float64)
    if not np.all(values >= 1):
        raise ValueError(f"n is {n!r}; give whole numbers from 1 on")
    return np.log(values) - (values - 1) / values


def default_n(samples: int) -> list[int]:
    """1, 2, 4, ... up to and with `samples`."""
    powers = [2**k for k in range(samples.bit_length())]
    return powers if powers[-1] == samples else [*powers, samples]


def check_n(n: Iterable[int] | None, samples: int) -> list[int]:
    """`n` as a sorted list without repetition; None gives `default_n`.

    Raises:
        TypeError: an n that is no whole number.
        ValueError: none, or one outside 1..`samples`.
    """
    chosen = default_n(samples) if n is None else list(n)
    odd = [v for v in chosen if isinstance(v, bool) or not isinstance(v, int | np.integer)]
    if odd:
        raise TypeError(f"n has {odd[0]!r}; give whole numbers")
    wrong = [int(v) for v in chosen if not 1 <= v <= samples]
    if wrong or not chosen:
        raise ValueError(
            f"n has {wrong[0] if wrong else 'no value'}; the best of n can be estimated for 1 to {samples}, the number "
            "of samples of a prompt (the smallest one's)"
        )
    return sorted({int(v) for v in chosen})


def best_of_n_weights(samples: int, n: int) -> Floats:
    """C(i-1, n-1) / C(N, n) for i = 1..N in float64, shape (N,); they sum to 1 and are 0 below i = n.

    In log space, from the largest weight n/N downwards by the ratios w(i-1)/w(i) = (i - n)/(i - 1): nothing overflows
    (C(12600, 6300) is 10^3791) and no large logarithms cancel, as they do in differences of log-gammas.
    """
    steps = np.log1p(-(n - 1) / np.arange(samples - 1, n - 1, -1, dtype=np.float64))
    weights = np.zeros(samples)
    weights[n - 1 :] = np.exp(np.log(n / samples) + np.concatenate([[0.0], np.cumsum(steps)]))[::-1]
    return weights


def expected_best_of_n(proxy: ArrayLike, scores: ArrayLike, n: Iterable[int] | None = None) -> Floats:
    """The expected score of the sample that is best by `proxy` among n, per prompt and n; unbiased.

    Args:
        proxy: (P, N) proxy scores of N samples of P prompts, finite.
        scores: (P, N), or (S, P, N) for several scores of the same samples: gold rewards, the proxy itself, variances.
        n: Whole numbers in 1..N; None: powers of two, and N. Sorted, each once.

    Returns:
        (P, len(n)), or (S, P, len(n)), float64.

    Raises:
        ValueError: shapes that do not fit, a score that is not finite, an n outside 1..N.
        TypeError: an n that is no whole number.
    """
    ranks, values = np.asarray(proxy), np.asarray(scores)
    if ranks.ndim != 2 or 0 in ranks.shape or values.ndim not in (2, 3) or values.shape[-2:] != ranks.shape:
        raise ValueError(
            f"proxy has shape {ranks.shape} and scores {values.shape}; give (prompts, samples) and the same, or "
            "(series, prompts, samples)"
        )
    prompts, samples = ranks.shape
    chosen = check_n(n, samples)
    series = values.reshape(-1, prompts, samples)
    found = np.empty((len(series), prompts, len(chosen)))
    rows, columns = max(1, _ELEMENTS // samples), max(1, _ELEMENTS // samples)
    for left in range(0, len(chosen), columns):
        few = chosen[left : left + columns]
        weights = np.stack([best_of_n_weights(samples, v) for v in few], axis=1)
        for first in range(0, prompts, rows):
            part = slice(first, first + rows)
            found[:, part, left : left + columns] = _weighted(ranks[part], series[:, part], weights)
    return found.reshape(*values.shape[:-1], len(chosen))


def _weighted(proxy: NDArray, series: NDArray, weights: Floats) -> Floats:
    """(R, N) proxy, (S, R, N) scores, (N, L) weights of ascending ranks -> (S, R, L)."""
    _check_finite("proxy", proxy)
    order = np.argsort(proxy, axis=1)
    ordered = np.take_along_axis(proxy, order, axis=1)
    new = np.ones(ordered.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    found = np.empty((len(series), len(proxy), weights.shape[1]))
    for index, scores in enumerate(series):
        _check_finite("scores", scores)
        values = np.take_along_axis(scores, order, axis=1).astype(np.float64, copy=False)
        if not new.all():
            first = np.flatnonzero(new)
            sizes = np.diff(first, append=new.size)
            values = np.repeat(np.add.reduceat(values.ravel(), first) / sizes, sizes).reshape(values.shape)
        found[index] = values @ weights
    return found


def _check_finite(name: str, values: NDArray) -> None:
    if not np.isfinite(values).all():
        odd = values[~np.isfinite(values)][0]
        raise ValueError(f"{name} has {odd}; every sample needs a finite score, leave out those that have none")
