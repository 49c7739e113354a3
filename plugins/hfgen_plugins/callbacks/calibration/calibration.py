"""Expected calibration error, reliability table, Brier score and fitted temperature at the user's evaluations."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfgen.kit import checks
from hfgen.kit.examples import tiny_run
from hfgen.kit.monitor import (
    Event,
    MonitorCallback,
    gathered,
    labelled_logits,
    on_device,
    rank_batches,
    spread_rows,
    summed,
    undisturbed,
)

_KEPT, _POSITIONS = 2**24, 2048  # logits (64 MiB) and labels the temperature is fitted on, at most
_DRAWS, _BLOCK = 999, 256
_COLDEST, _HOTTEST = 0.05, 20.0  # temperatures between which the fit looks
_ADVICE = (
    "Divide the logits by {temperature:.3g} (fitted on these evaluation rows; it changes no answer); in training: "
    "{training}."
)


class CalibrationCallback(MonitorCallback):
    """Says whether the model is right as often as it says it is, at each of the user's evaluations.

    It reads `rows` evenly spread rows of the set that was just evaluated (of long ones fewer, 32 at least, that have about
    8192 labels together). A prediction is a row of a classifier, or a
    labelled position of a token classifier or language model (labels of -100 are left out). Metrics, under
    ``hfgen/calibration/`` (with ``<set>/`` for a dictionary of evaluation sets): ``confidence`` (mean probability of the
    most likely class), ``accuracy``, ``ece`` and ``ece_mass`` (expected calibration error with `bins` bins of equal
    width, of equal mass), ``nll`` (nats), ``brier`` (sum over classes of (p - y)^2, in [0, 2]), ``temperature`` (the
    divisor of the logits with the lowest nll, in [0.05, 20]), ``temperature_labels`` (how many predictions it is fitted
    on), ``nll_mended`` and ``ece_mended`` (of those, with it), ``p_value`` (see `p_value`). The reliability tables of
    the last evaluation of each set are in `tables`, and so in the state.

    There is a finding ``overconfident`` (or, at INFO, ``underconfident``) when ``ece`` is at least `max_ece` and the
    p-value at most `alpha`; its confidence is 1 - p-value, its step the first of the evaluations in a row with such an
    error.

    Args:
        rows: Evaluation rows that are read, evenly spread over the set; fewer where 8192 labels are enough.
        bins: Bins of the reliability tables.
        max_ece: Smallest expected calibration error of a finding.
        alpha: Largest p-value of a finding.
        batch_size: Rows in one forward; None: ``per_device_eval_batch_size``.
        trainer: See `MonitorCallback`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range; in a run: no evaluations, a set that is a stream,
            or rows and models that give no classes.
    """

    name = "calibration"
    cost = (
        "at each of the user's evaluations one more forward over `rows` of its rows (fewer of long ones) and about ten "
        "passes over the logits of at most 2048 labels: 5 training steps' time at a batch of 8 x 256 tokens, so under 2 % "
        "where 260 steps lie between evaluations (recipes/bench/callbacks.py)"
    )
    witness = "an evaluation, so a reliability table,"
    looks_first = False

    def __init__(
        self,
        rows: int = 256,
        bins: int = 15,
        max_ece: float = 0.15,
        alpha: float = 0.01,
        batch_size: int | None = None,
        trainer: Any = None,
    ) -> None:
        for field, value in (("rows", rows), ("bins", bins), ("batch_size", 1 if batch_size is None else batch_size)):
            checks.integer("CalibrationCallback", field, value, low=1)
        for field, number in (("max_ece", max_ece), ("alpha", alpha)):
            checks.number("CalibrationCallback", field, number, low=0.0, high=1.0)
        super().__init__(None, trainer)
        self.rows, self.bins, self.max_ece, self.alpha, self.batch_size = rows, bins, max_ece, alpha, batch_size
        self.tables: dict[str, dict[str, Any]] = {}
        self._since: dict[str, int] = {}

    def arguments(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in ("rows", "bins", "max_ece", "alpha", "batch_size")}

    def state_dict(self) -> dict[str, Any]:
        return {"tables": dict(self.tables), "since": dict(self._since)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tables, self._since = dict(state["tables"]), dict(state["since"])

    def begin(self, event: Event) -> None:
        self.needs_forward(event)
        self.needs_evaluations(event)
        if not event.state.global_step:
            self.tables, self._since = {}, {}

    def evaluated(self, event: Event, dataset: str, metrics: dict[str, float]) -> dict[str, float]:
        start = time.perf_counter()
        with undisturbed(event.model):
            seen, logits, labels = read(
                event.model, event.eval_dataloader, self.rows, self.batch_size or event.args.eval_batch_size,
                event.args.device,
            )  # fmt: skip
            heat = temperature(logits, labels)
            mended = gathered(predictions(logits.div_(heat), labels)).cpu().numpy()
        values = seen.cpu().numpy()
        if not len(values):
            raise ValueError(
                f"the {min(self.rows, len(event.eval_dataloader.dataset))} evaluation rows read have no labels other than "
                "-100; CalibrationCallback needs some"
            )
        confidence, right, nll, brier = values.T
        width = table(confidence, right, of_width(confidence, self.bins))
        mass = table(confidence, right, of_mass(confidence, right, self.bins))
        self.tables[dataset] = {"step": event.state.global_step, "width": width.tolist(), "mass": mass.tolist()}
        found = {
            "confidence": float(confidence.mean()), "accuracy": float(right.mean()), "ece": ece(width),
            "ece_mass": ece(mass), "nll": float(nll.mean()), "brier": float(brier.mean()), "temperature": heat,
            "temperature_labels": len(mended), "nll_mended": float(mended[:, 2].mean()),
            "ece_mended": ece(table(mended[:, 0], mended[:, 1], of_width(mended[:, 0], self.bins))),
            "p_value": p_value(confidence, of_width(confidence, self.bins), ece(width)),
        }  # fmt: skip
        self.seconds += time.perf_counter() - start
        self.fire()
        self._judge(dataset, event.state.global_step, found)
        return found

    def judge(self, state: Any, row: dict[str, Any]) -> None:
        """Makes the findings of a row of `history` measured at ``state.global_step``: of a log, with any thresholds."""
        for prefix in [key.removesuffix("ece") for key in row if key == "ece" or key.endswith("/ece")]:
            found = {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
            self._judge(prefix.removesuffix("/"), state.global_step, found)

    def _judge(self, dataset: str, step: int, found: dict[str, float]) -> None:
        if found["ece"] < self.max_ece or found["p_value"] > self.alpha:
            self._since.pop(dataset, None)
            return
        since = self._since.setdefault(dataset, step)
        over = found["confidence"] > found["accuracy"]
        training = "label_smoothing_factor=0.1, fewer epochs, or a lower learning_rate" if over else "more steps"
        self.finding(
            f"{'over' if over else 'under'}confident{f'/{dataset}' if dataset else ''}", since, 1 - found["p_value"],
            f"The model is {'over' if over else 'under'}confident{f' on {dataset!r}' if dataset else ''}: it is "
            f"{found['confidence']:.0%} sure on average and right {found['accuracy']:.0%} of the time.",
            _ADVICE.format(temperature=found["temperature"], training=training),
            logging.WARNING if over else logging.INFO,
        )  # fmt: skip


def read(model: Any, loader: Any, rows: int, size: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The model's predictions of `rows` evenly spread rows of the loader's dataset.

    Returns:
        `predictions` of all of them over all processes (n, 4); this process's logits (m, classes) float32 and labels
        (m,) kept for the temperature.
    """
    taken, dataset = spread_rows("CalibrationCallback", loader, rows, size), loader.dataset
    seen, kept, of_kept = [], [], []
    for numbers, counting in rank_batches(len(taken), size):
        batch = on_device(loader.collate_fn([dataset[taken[i]] for i in numbers]), device)
        for place, (logits, labels) in enumerate(labelled_logits(model, batch)):
            if place < counting:
                seen.append(predictions(logits, labels))
                quota = max(1, min(_KEPT // logits.shape[-1], _POSITIONS) // len(taken))
                stride = max(1, -(-len(labels) // quota))
                kept.append(logits[::stride].clone())  # a view would hold the whole row
                of_kept.append(labels[::stride])
            elif not kept:  # a process without rows of its own
                kept, of_kept, seen = [logits[:0]], [labels[:0]], [predictions(logits[:0], labels[:0])]
    return gathered(torch.cat(seen)), torch.cat(kept), torch.cat(of_kept)


def predictions(logits: Tensor, labels: Tensor) -> Tensor:
    """Confidence, right (0 or 1), nll and Brier score of logits (n, classes) for labels (n,): (n, 4) float64."""
    if len(logits) > _BLOCK:
        parts = zip(logits.split(_BLOCK), labels.split(_BLOCK), strict=True)
        return torch.cat([predictions(*part) for part in parts])
    log_p = logits.log_softmax(-1)
    confidence, answer = log_p.max(-1)
    of_label = log_p.gather(-1, labels[:, None])[:, 0].double()
    brier = log_p.exp().square().sum(-1, dtype=torch.float64) - 2 * of_label.exp() + 1
    return torch.stack((confidence.double().exp(), (answer == labels).double(), -of_label, brier), -1)


def of_width(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each confidence (n,): k where k / bins < confidence <= (k + 1) / bins; int (n,)."""
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def of_mass(confidence: np.ndarray, right: np.ndarray, bins: int) -> np.ndarray:
    """Bins of as equal counts as can be, in the order of confidence (of equal ones, the wrong first); int (n,)."""
    found = np.empty(len(confidence), dtype=int)
    order = np.lexsort((right, confidence))
    for number, members in enumerate(np.array_split(order, bins)):
        found[members] = number
    return found


def table(confidence: np.ndarray, right: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The reliability table: a row of (count, mean confidence, accuracy) for each bin that is not empty."""
    count = np.bincount(groups)
    filled = count > 0
    means = [np.bincount(groups, values)[filled] / count[filled] for values in (confidence, right)]
    return np.stack((count[filled], *means), 1)


def ece(rows: np.ndarray) -> float:
    """Expected calibration error: sum over bins of count / n * |accuracy - confidence|, from a reliability table."""
    count, confidence, accuracy = rows.T
    return float((count * np.abs(accuracy - confidence)).sum() / count.sum())


def p_value(confidence: np.ndarray, groups: np.ndarray, error: float) -> float:
    """P(ece >= `error`) of a perfectly calibrated model with these confidences, in [0.001, 1] (consistency resampling).

    The right answers of a bin then have the mean sum c and the variance sum c (1 - c); 999 draws from the normal.
    """
    spread = np.sqrt(np.bincount(groups, confidence * (1 - confidence)).clip(0))
    draws = np.abs(np.random.default_rng(0).standard_normal((_DRAWS, len(spread))) * spread).sum(1) / len(confidence)
    return float((1 + (draws >= error).sum()) / (1 + _DRAWS))


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in [0.05, 20] that minimises the nll of logits / T, over all processes (Guo et al. 2017).

    The nll is convex in b = 1 / T with the derivative sum (E_p[z] - z_label) and the second derivative sum Var_p[z];
    Newton's method, kept inside the bracket of its root, to a relative step of 1e-8.

    Args:
        logits: (n, classes) of this process; n may be 0.
        labels: (n,) int64.
    """
    low, high, b = 1 / _HOTTEST, 1 / _COLDEST, 1.0
    for _ in range(100):
        slope, curvature = summed(_slope(logits, labels, b)).tolist()
        low, high = (low, b) if slope > 0 else (b, high)
        step = b - slope / curvature if curvature > 0 else low
        step = step if low < step < high else (low * high) ** 0.5
        if abs(step - b) <= 1e-8 * b:
            break
        b = step
    return 1 / b


def _slope(logits: Tensor, labels: Tensor, b: float) -> Tensor:
    """First and second derivative of the nll in b = 1 / T, summed: (2,) float64."""
    found = torch.zeros(2, dtype=torch.float64, device=logits.device)
    for z, label in zip(logits.split(_BLOCK), labels.split(_BLOCK), strict=True):
        z = z - z.amax(-1, keepdim=True)
        p = (b * z).softmax(-1)
        mean = (p * z).sum(-1, dtype=torch.float64)
        variance = (p * (z - mean[:, None].to(z.dtype)) ** 2).sum(-1, dtype=torch.float64)
        found += torch.stack(((mean - z.gather(-1, label[:, None])[:, 0]).sum(), variance.sum()))
    return found


def example(folder: str) -> dict[str, Any]:
    """Keyword arguments of a tiny Trainer run that is evaluated at every other step (for the conformance kit)."""
    return tiny_run(folder, evaluate_every=2) | {"callbacks": [CalibrationCallback(rows=4)]}
