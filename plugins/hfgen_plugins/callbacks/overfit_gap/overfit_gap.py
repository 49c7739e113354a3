"""The gap between training and validation loss, and a change-point test for a validation loss that has begun to rise."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from hfgen.kit import checks
from hfgen.kit.examples import tiny_run
from hfgen.kit.monitor import Event, MonitorCallback

_POINTS = 32  # evaluations the test takes at most; more are averaged in pairs
_DRAWS = 999  # of the null distribution: the smallest p-value is 1 / (_DRAWS + 1)
_ADVICE = (
    "Take the checkpoint of step {step} (load_best_model_at_end=True, or EarlyStoppingCallback); next: fewer epochs, a "
    "lower learning_rate, weight_decay or dropout, an adapter of smaller rank, or more varied training rows."
)


class OverfitGapCallback(MonitorCallback):
    """Says whether the validation loss has begun to rise while the training loss falls, since when, and how sure it is.

    At each of the user's evaluations it keeps, under ``hfgen/overfit_gap/`` (with ``<set>/`` for a dictionary of
    evaluation sets): ``train_loss`` (mean of the logged training loss since the evaluation before, weighted by steps),
    ``gap`` (validation loss - training loss), ``best_step`` and ``rise`` (validation loss / lowest so far - 1), and from
    `min_evaluations` evaluations on ``p_value``.

    The test (see `p_value`): the null hypothesis is a validation loss whose mean never rises; the statistic is the
    largest studentised contrast of the last evaluations with a stretch before them. There is a finding ``overfit`` when
    the p-value is at most `alpha`, the rise at least `min_rise` and `min_nats`, and the training loss lower than
    at the lowest validation loss; its step is that of the lowest validation loss, its confidence 1 - p-value. When both
    losses rise it is no overfitting, and nothing is said. A loss that is no finite number is a finding ``diverged``.

    Args:
        alpha: Largest p-value of a finding.
        min_rise: Smallest rise over the lowest validation loss of a finding, relative to it.
        min_nats: The same in nats, so that a loss near 0 that wavers is none.
        min_evaluations: Evaluations before the first test.
        trainer: See `MonitorCallback`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range; in a run: evaluations or the logged training loss
            are off, or the evaluation gives no loss.
    """

    name = "overfit_gap"
    cost = "no pass of its own: it reads the user's evaluations; the test takes some milliseconds at each"
    witness = "an evaluation after min_evaluations of them, so a test for overfitting,"
    looks_first = False

    def __init__(
        self,
        alpha: float = 0.01,
        min_rise: float = 0.05,
        min_nats: float = 0.03,
        min_evaluations: int = 5,
        trainer: Any = None,
    ) -> None:
        checks.number("OverfitGapCallback", "alpha", alpha, low=0.0, high=1.0)
        for field, value in (("min_rise", min_rise), ("min_nats", min_nats)):
            checks.number("OverfitGapCallback", field, value, low=0.0)
        checks.integer("OverfitGapCallback", "min_evaluations", min_evaluations, low=4)
        super().__init__(None, trainer)
        self.alpha, self.min_rise, self.min_nats, self.min_evaluations = alpha, min_rise, min_nats, min_evaluations
        self._reset()

    def _reset(self) -> None:
        self.curves: dict[str, list[tuple[int, float, float | None]]] = {}  # per set: step, validation, training loss
        self._logged: list[tuple[int, int, float]] = []  # after which step, up to which, mean training loss
        self._began = 0

    def arguments(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in ("alpha", "min_rise", "min_nats", "min_evaluations")}

    def state_dict(self) -> dict[str, Any]:
        return {
            "curves": {key: [list(p) for p in curve] for key, curve in self.curves.items()},
            "logged": [list(row) for row in self._logged],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curves = {key: [(s, v, t) for s, v, t in curve] for key, curve in state["curves"].items()}
        self._logged = [(after, to, loss) for after, to, loss in state["logged"]]

    def begin(self, event: Event) -> None:
        if event.args.eval_strategy == "no":
            raise ValueError("args.eval_strategy is 'no'; OverfitGapCallback reads evaluations: set 'steps' or 'epoch'")
        if event.args.logging_strategy == "no":
            raise ValueError("args.logging_strategy is 'no', which hides the training loss; set 'steps' or 'epoch'")
        if not event.state.global_step:
            self._reset()
        self._began = event.state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and math.isfinite(logs.get("loss", math.nan)):
            after = self._logged[-1][1] if self._logged else self._began
            self._logged.append((after, state.global_step, float(logs["loss"])))
        super().on_log(args, state, control, logs=logs, **kwargs)

    def evaluated(self, event: Event, dataset: str, metrics: dict[str, float]) -> dict[str, float]:
        if "loss" not in metrics:
            raise ValueError(
                f"the evaluation gives {sorted(metrics)} and no loss; OverfitGapCallback needs evaluation rows with labels"
            )
        step, loss = event.state.global_step, float(metrics["loss"])
        name = f"/{dataset}" if dataset else ""
        if not math.isfinite(loss):
            self.finding(
                f"diverged{name}", step, 1.0, f"The validation loss{_of(dataset)} is no finite number any more.",
                "Lower learning_rate or max_grad_norm, and go back to a checkpoint before it.",
            )  # fmt: skip
            return {}
        curve = self.curves.setdefault(dataset, [])
        curve.append((step, loss, self._training_loss(curve[-1][0] if curve else 0)))
        return self._judge(curve, dataset, name)

    def _training_loss(self, since: int) -> float | None:
        """Mean of the logged loss over the steps after `since`; the last one logged when there is none."""
        rows = [row for row in self._logged if row[1] > since] or self._logged[-1:]
        self._logged = [row for row in self._logged if row[1] > self._oldest()] or rows
        steps = sum(to - after for after, to, _ in rows)
        return sum(loss * (to - after) for after, to, loss in rows) / steps if steps else None

    def _oldest(self) -> int:
        """The step up to which every set was evaluated: logged rows before it are not needed any more."""
        return min(curve[-1][0] for curve in self.curves.values() if curve) if any(self.curves.values()) else 0

    def _judge(self, curve: list[tuple[int, float, float | None]], dataset: str, name: str) -> dict[str, float]:
        _, loss, train = curve[-1]
        best_step, best, best_train = min(curve, key=lambda point: point[1])
        rise = loss / best - 1 if best > 0 else 0.0
        found: dict[str, float] = {"best_step": best_step, "rise": rise}
        if train is not None:
            found |= {"train_loss": train, "gap": loss - train}
        if len(curve) < self.min_evaluations:
            return found
        self.fire()
        p = found["p_value"] = p_value([point[1] for point in curve])
        falls = train is not None and best_train is not None and train < best_train
        if p <= self.alpha and rise >= self.min_rise and loss - best >= self.min_nats and falls:
            sentence = (
                f"The model overfits: the validation loss{_of(dataset)} was lowest ({best:.4g}) at step {best_step} and "
                f"has risen by {rise:.1%} while the training loss went on falling to {train:.4g}."
            )
            advice = _ADVICE.format(step=best_step)
            self.finding(f"overfit{name}", best_step, 1 - p, sentence, advice, explains=("overconfident", "memorised"))
        return found


def _of(dataset: str) -> str:
    return f" of {dataset!r}" if dataset else ""


def noise(values: np.ndarray) -> np.ndarray:
    """Standard deviation of the noise in `values` (..., n), n >= 3, around a smooth curve: (...).

    From second differences: sigma^2 = mean (y[i-1] - 2 y[i] + y[i+1])^2 / 6 (Gasser, Sroka, Jennen-Steinmetz 1986).
    """
    return np.asarray(np.sqrt((np.diff(values, 2, axis=-1) ** 2).mean(-1) / 6))


def rise_statistic(values: np.ndarray) -> np.ndarray:
    """The largest studentised rise at the end of `values` (..., n): (...).

    max over 0 <= a < b < n of (mean y[b:] - mean y[a:b]) / (noise * sqrt(1 / (n - b) + 1 / (b - a))). Where the mean of
    y never rises no contrast has a mean above 0, so the flat curve is the least favourable case. Without noise: +-inf.
    """
    n = values.shape[-1]
    total = np.concatenate([np.zeros_like(values[..., :1]), np.cumsum(values, -1)], -1)
    most = np.full(values.shape[:-1], -np.inf)
    for b in range(1, n):
        before = (total[..., b, None] - total[..., :b]) / np.arange(b, 0, -1)
        after = (total[..., -1] - total[..., b]) / (n - b)
        scale = np.sqrt(1 / (n - b) + 1 / np.arange(b, 0, -1))
        most = np.maximum(most, ((after[..., None] - before) / scale).max(-1))
    sigma = noise(values)
    return np.asarray(np.where(sigma > 0, most / np.where(sigma > 0, sigma, 1.0), np.copysign(np.inf, most)))


@functools.cache
def _null(n: int) -> np.ndarray:
    """The statistic of flat curves of n evaluations with normal noise, (_DRAWS,): always the same draws."""
    return rise_statistic(np.random.default_rng(n).standard_normal((_DRAWS, n)))


def thinned(values: np.ndarray, most: int = _POINTS) -> np.ndarray:
    """`values` (n,) averaged in pairs until there are at most `most`; an odd one at the start is left out."""
    while len(values) > most:
        values = values[len(values) % 2 :].reshape(-1, 2).mean(1)
    return values


def p_value(losses: list[float]) -> float:
    """Monte Carlo p-value of `rise_statistic` under a flat curve with independent normal noise, in [0.001, 1].

    (1 + draws at least as large) / (1 + draws), with 999 draws that depend on the number of evaluations only. Of more
    than 32 evaluations neighbours are averaged.
    """
    return _p_value(tuple(losses))


@functools.lru_cache(2**14)  # a log that is judged again with other thresholds asks the same again
def _p_value(losses: tuple[float, ...]) -> float:
    values = thinned(np.asarray(losses, dtype=np.float64))
    return float((1 + (_null(len(values)) >= rise_statistic(values)).sum()) / (1 + _DRAWS))


def example(folder: str) -> dict[str, Any]:
    """Keyword arguments of a tiny Trainer run that is evaluated at every step (for the conformance kit)."""
    return tiny_run(folder, evaluate_every=1) | {"callbacks": [OverfitGapCallback(min_evaluations=4)]}
