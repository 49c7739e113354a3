"""A power law through a run's evaluations, its bootstrap interval and the stop rule."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfgen.kit import checks
from hfgen.kit.examples import tiny_run
from hfgen.kit.monitor import Event, MonitorCallback

_LOG = logging.getLogger("hfgen.learning_curve")
EXPONENTS = (1e-3, 5.0)
_GRID = np.geomspace(*EXPONENTS, 200)
_STEADY = ("constant", "constant_with_warmup", "warmup_stable_decay", "reduce_lr_on_plateau")
_GOLDEN = (math.sqrt(5) - 1) / 2
_ORIGINS = 4  # earlier points the run is predicted from once more, to see how wrong that was


@dataclass(frozen=True)
class Curve:
    """y(x) = limit + scale * (x / unit)^-exponent, of one fit (numbers) or of many (arrays (fits,))."""

    limit: Any
    scale: Any
    exponent: Any
    unit: float

    def __call__(self, x: Any) -> Any:
        return self.limit + self.scale * (x / self.unit) ** -self.exponent


def solve(x: np.ndarray, y: np.ndarray, exponents: np.ndarray, rising: bool, best: float) -> tuple[np.ndarray, ...]:
    """Exact least squares of y = c + a x^-b for every b and every row of y, with a of the right sign and c not past `best`.

    Args:
        x: (points,), positive. y: (fits, points).
        exponents: (b,).
        rising: a <= 0 (accuracy) instead of a >= 0 (loss).
        best: c <= best when rising, c >= best otherwise.

    Returns:
        c, a and the sum of squares, each (fits, b).
    """
    f = x[None] ** -exponents[:, None]
    mean, level = f.mean(1), y.mean(1)[:, None]
    off = f - mean[:, None]
    a = (y - level) @ off.T / (off**2).sum(1)
    c = level - a * mean
    past = c > best if rising else c < best
    a = np.where(past, (y - best) @ f.T / (f**2).sum(1), a)
    c = np.where(past, best, c)
    wrong = a > 0 if rising else a < 0  # then the curve is flat
    flat = np.minimum(level, best) if rising else np.maximum(level, best)
    a, c = np.where(wrong, 0.0, a), np.where(wrong, flat, c)
    squares = ((y - level) ** 2).sum(1)[:, None]  # sum (y - c - a f)^2, expanded around the mean of y
    d = c - level
    rest = squares + len(x) * d**2 + a**2 * (f**2).sum(1) + 2 * a * d * f.sum(1) - 2 * a * ((y - level) @ f.T)
    return c, a, rest


def fit(x: np.ndarray, y: np.ndarray, rising: bool, best: float) -> Curve:
    """The least-squares power law through (x, y): the best exponent of a grid, refined by golden section."""
    unit = float(x.max())
    scaled = x / unit

    def rests(exponents: np.ndarray) -> np.ndarray:  # not as `solve` gives them, expanded: for curves without noise
        c, a, _ = solve(scaled, y[None], exponents, rising, best)
        return np.asarray(((y - c.T - a.T * scaled[None] ** -exponents[:, None]) ** 2).sum(1))

    def rest(b: float) -> float:
        return float(rests(np.array([b]))[0])

    found = int(rests(_GRID).argmin())
    low, high = math.log(_GRID[max(0, found - 1)]), math.log(_GRID[min(len(_GRID) - 1, found + 1)])
    for _ in range(60):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if rest(math.exp(left)) <= rest(math.exp(right)):
            high = right
        else:
            low = left
    b = min((math.exp((low + high) / 2), float(_GRID[found])), key=rest)
    c, a, _ = solve(scaled, y[None], np.array([b]), rising, best)
    return Curve(float(c[0, 0]), float(a[0, 0]), b, unit)


def residuals(x: np.ndarray, y: np.ndarray, curve: Curve) -> np.ndarray:
    """What the fit leaves of y (points,), scaled up because it has fitted three parameters."""
    return np.asarray((y - curve(x)) * math.sqrt(len(x) / max(1, len(x) - 3)))


def resampled(x: np.ndarray, y: np.ndarray, curve: Curve, rising: bool, best: float, draws: int) -> Curve:
    """Fits to `draws` residual bootstrap samples; seeded by the number of points.

    The grid of exponents is drawn in around those chosen, four times, so that it is fine beside their spread.
    """
    left = residuals(x, y, curve)
    samples = curve(x)[None] + left[np.random.default_rng(len(x)).integers(len(x), size=(draws, len(x)))]
    exponents, rows = _GRID, np.arange(draws)
    for last in (False, False, False, True):
        c, a, rest = solve(x / curve.unit, samples, exponents, rising, best)
        pick = rest.argmin(1)
        if last:
            break
        edges = exponents[max(0, pick.min() - 1)], exponents[min(len(exponents) - 1, pick.max() + 1)]
        exponents = np.geomspace(*edges, len(_GRID))
    return Curve(c[rows, pick], a[rows, pick], exponents[pick], curve.unit)


def interval(x: np.ndarray, y: np.ndarray, curve: Curve, many: Curve, at: np.ndarray) -> tuple[np.ndarray, ...]:
    """The curve at `at` (steps,) and how far one evaluation there may lie below and above it (95 %), each (steps,).

    The prediction interval of the residual bootstrap: a resampled fit's curve plus one residual drawn anew (Davison and
    Hinkley 1997, Bootstrap Methods and their Application).
    """
    left = residuals(x, y, curve)
    noise = np.random.default_rng([len(x), 1]).choice(left, len(np.atleast_1d(many.limit)))
    low, high = np.quantile(many(at[:, None]) + noise, [0.025, 0.975], axis=1)
    return curve(at), np.maximum(curve(at) - low, 0.0), np.maximum(high - curve(at), 0.0)


def widening(x: np.ndarray, y: np.ndarray, rising: bool, best: float, draws: int) -> tuple[float, float]:
    """The factors (below, above) by which `interval` is too short: for so few points, and by what it has missed so far.

    From up to four earlier points, the fifth to the last but one, all evaluations since are predicted; the factor of a
    side is the 97.5 % quantile of how far these lie on that side of the curve, in lengths of the interval. It is at least
    that of Student's quantile, with n - 3 degrees of freedom, over the normal one.
    """
    below, above = [], []
    for count in sorted({round(k) for k in np.linspace(min(5, len(x) - 1), len(x) - 1, _ORIGINS)}):
        curve = fit(x[:count], y[:count], rising, best)
        many = resampled(x[:count], y[:count], curve, rising, best, draws)
        middle, down, up = interval(x[:count], y[:count], curve, many, x[count:])
        least = 1e-9 * max(1e-30, float(np.abs(y).max()))  # an interval of no length: a curve without noise
        off = np.where(np.abs(y[count:] - middle) <= 1e3 * least, 0.0, y[count:] - middle)
        below.append(-off / np.maximum(down, least))
        above.append(off / np.maximum(up, least))
    from scipy.special import stdtrit

    few = float(stdtrit(max(1, len(x) - 3), 0.975) / stdtrit(np.inf, 0.975))
    factors = [max(few, float(np.quantile(np.concatenate(side), 0.975))) for side in (below, above)]
    return factors[0], factors[1]


class LearningCurveCallback(MonitorCallback):
    """Predicts what a run will end with, and says when the rest of it is not worth the time.

    At each of the user's evaluations from `points` on, y = c + a x^-b (x: steps) is fitted to all of them after the
    warm-up. Metrics, under ``hfgen/learning_curve/``: ``value`` (the evaluation's), ``predicted`` (at the last step) with
    ``low`` and ``high`` (95 % for the evaluation there: `interval`, made wider by `widening`), ``limit`` (c), ``exponent``
    (b), ``gain_left`` (what the curve still gains until the end; upper end of its 95 %, as much wider) and ``sure`` (share
    of the fits in which that is less than `worth` of what was gained so far).

    Finding ``enough``: `sure` has reached `confidence` in `patience` evaluations one after the other; its confidence is
    the last of them. It ends the run with ``stop=True``. The interval knows the noise of the evaluations and how wrong
    predictions of this run have been, not what will change: under a decaying learning rate there is a warning and no
    finding, and after a change of the data in mid-run the curve is another (EVIDENCE.md says how often it holds).

    Args:
        metric: Name in the evaluation's metrics, without prefix.
        rising: True when higher is better. None: for any metric but a loss.
        dataset: Name of the evaluation set (its key where ``eval_dataset`` is a dictionary; empty for a single set).
        best: What no curve can pass. None: 1 when rising, else 0.
        worth: Share of the gain so far that the rest must bring.
        confidence: How sure a finding must be.
        patience: Evaluations one after the other.
        points: Evaluations after the warm-up before the first fit, 5 or more.
        stop: Whether to end training at the finding.
        draws: Bootstrap samples.
        trainer: See `MonitorCallback`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range; in `train()`: no such metric in an evaluation, or
            ``stop=True`` with a decaying learning rate.
    """

    name = "learning_curve"
    cost = "none but the user's evaluations: the fits take about 50 milliseconds beside each"
    witness = "a fit to the curve"
    looks_first = False

    def __init__(
        self,
        metric: str = "loss",
        rising: bool | None = None,
        dataset: str = "",
        best: float | None = None,
        worth: float = 0.01,
        confidence: float = 0.95,
        patience: int = 3,
        points: int = 5,
        stop: bool = False,
        draws: int = 200,
        trainer: Any = None,
    ) -> None:
        owner = type(self).__name__
        for field, text in (("metric", metric), ("dataset", dataset)):
            if not isinstance(text, str):
                raise TypeError(f"{owner}.{field} is {text!r}; give a string")
        for field, flag in (("rising", rising), ("stop", stop)):
            if not (flag is None and field == "rising"):
                checks.boolean(owner, field, flag)
        if best is not None:
            checks.number(owner, "best", best)
        checks.number(owner, "worth", worth, low=0.0, high=1.0)
        checks.number(owner, "confidence", confidence, low=0.0, high=1.0)
        for field, value, low in (("patience", patience, 1), ("points", points, 5), ("draws", draws, 20)):
            checks.integer(owner, field, value, low=low)
        super().__init__(None, trainer)
        self.metric, self.dataset, self.best, self.worth, self.confidence = metric, dataset, best, worth, confidence
        self.rising, self.patience, self.points, self.stop, self.draws = rising, patience, points, stop, draws
        self._decays = False

    def arguments(self) -> dict[str, Any]:
        fields = ("metric", "rising", "dataset", "best", "worth", "confidence", "patience", "points", "stop", "draws")
        return {field: getattr(self, field) for field in fields}

    def begin(self, event: Event) -> None:
        schedule = getattr(event.args.lr_scheduler_type, "value", event.args.lr_scheduler_type)
        self._decays = schedule not in _STEADY
        if self._decays and self.stop:
            raise ValueError(
                f"LearningCurveCallback.stop is True and args.lr_scheduler_type is {schedule!r}, under which the curve "
                "falls once more at its end; set 'constant', 'constant_with_warmup' or 'warmup_stable_decay', or stop=False"
            )
        if self._decays:
            _LOG.warning(
                f"learning_curve: args.lr_scheduler_type is {schedule!r}: a decaying learning rate bends the curve at its "
                "end, so that the prediction is too pessimistic until then; it makes no finding"
            )

    def evaluated(self, event: Event, dataset: str, metrics: dict[str, float]) -> dict[str, float]:
        if dataset != self.dataset:
            return {}
        if self.metric not in metrics:
            raise ValueError(
                f"LearningCurveCallback.metric is {self.metric!r}, and the evaluation has {', '.join(sorted(metrics))}; "
                "give one of these, or a compute_metrics to the Trainer"
            )
        step, value = event.state.global_step, float(metrics[self.metric])
        if math.isfinite(value):
            self._keep(step, {"value": value} | self._fit(event, step, value))
        return {}

    def _fit(self, event: Event, step: int, value: float) -> dict[str, float]:
        """The metrics of the fit to all evaluations so far, or nothing while there are too few."""
        warm = event.args.get_warmup_steps(event.state.max_steps)
        rows = [(row["step"], row["value"]) for row in self.history if "value" in row] + [(step, value)]
        x, y = np.array([row for row in rows if row[0] > warm], float).reshape(-1, 2).T
        if len(x) < self.points:
            return {}
        self.fire()
        rising = not self.metric.endswith("loss") if self.rising is None else self.rising
        best = self.best if self.best is not None else float(rising)
        end = max(step, event.state.max_steps)
        curve = fit(x, y, rising, best)
        many = resampled(x, y, curve, rising, best, self.draws)
        middle, down, up = (float(v[0]) for v in interval(x, y, curve, many, np.array([float(end)])))
        below, above = widening(x, y, rising, best, self.draws)
        low, high = middle - below * down, middle + above * up
        sign = 1 if rising else -1
        gain, gains = sign * (curve(end) - curve(step)), sign * (many(end) - many(step))
        gains = gain + np.where(gains > gain, above if rising else below, 1.0) * (gains - gain)
        so_far = max(0.0, float((sign * y).max() - sign * y[0]))
        found = {
            "predicted": middle, "low": low if rising else max(low, best), "high": min(high, best) if rising else high,
            "limit": curve.limit, "exponent": curve.exponent, "gain_left": float(np.quantile(gains, 0.975)),
            "sure": float((gains < self.worth * so_far).mean()),
        }  # fmt: skip
        self._judge(event, found)
        return found

    def _judge(self, event: Event, found: dict[str, float]) -> None:
        step, steps = event.state.global_step, event.state.max_steps
        sure = [row["sure"] for row in self.history if "sure" in row][1 - self.patience :] if self.patience > 1 else []
        enough = len(sure) == self.patience - 1 and min([*sure, found["sure"]]) >= self.confidence
        if self._decays or not enough or step >= steps:
            return
        sentence = (
            f"The rest of the run is not worth it: {self.metric} is predicted to end at {found['predicted']:.4g} "
            f"({found['low']:.4g} to {found['high']:.4g}) at step {steps}, less than {self.worth:.0%} of the gain so far "
            "away."
        )
        advice = "Stop here, lower the learning rate for a last stretch, or change what limits the run (data, model)."
        self.finding("enough", step, found["sure"], sentence, advice, level=logging.INFO)
        if self.stop:
            event.control.should_training_stop = True


def example(folder: str) -> dict[str, Any]:
    """Keyword arguments of a tiny Trainer run whose curve is fitted (for the conformance kit)."""
    run = tiny_run(folder, evaluate_every=1, max_steps=8, lr_scheduler_type="constant")
    return run | {"callbacks": [LearningCurveCallback()]}
