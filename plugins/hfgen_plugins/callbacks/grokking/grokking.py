"""The states of a run that may grok, from the accuracies of training and test rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hfgen.kit import checks
from hfgen.kit.examples import tiny_run, token_accuracy
from hfgen.kit.measures import Probe, greater, probe_rows, share_above
from hfgen.kit.monitor import Event, MonitorCallback, undisturbed

_TRAIN = "\0training rows"  # of train=None: the name of no evaluation set
_PATIENCE = (
    "if the task has a rule to be found, go on: generalisation may come much later (grokking), unless the softmax has "
    "collapsed (SoftmaxCollapseCallback says so)."
)
STATES = ("learning", "fitted", "memorised", "grokking", "grokked", "generalised")


@dataclass(frozen=True)
class Reading:
    """What a run's accuracies so far say.

    Attributes:
        state: Of `STATES`.
        fit: Step of the first evaluation at which the training rows were fitted, or None.
        memorised: The first at which they were and the test rows near chance, or None.
        general: The first at which the test rows were answered, or None.
        lowest: Lowest test accuracy while memorised; infinite before.
        area: Integral of (train - test) over log step, by trapezoids from the first step above 0.
    """

    state: str
    fit: int | None
    memorised: int | None
    general: int | None
    lowest: float
    area: float

    @property
    def delay(self) -> float | None:
        """general / fit, of a run that has reached both; 1 where it generalised first."""
        if self.fit is None or self.general is None:
            return None
        return max(1.0, self.general / max(1, self.fit))


def read(
    points: Sequence[tuple[int, float, float]], chance: float, fit: float, near: float, rise: float, high: float
) -> Reading:
    """The states from all evaluations so far.

    Args:
        points: (step, training accuracy, test accuracy), by step.
        chance: Accuracy of guessing.
        fit: Training accuracy from which the rows count as fitted.
        near: Test accuracy above chance below which a fitted run has memorised.
        rise: Test accuracy above the lowest while memorised from which it groks.
        high: Share of 1 - chance, above chance, from which the run has generalised.
    """
    fitted = memorised = general = None
    lowest, area, state = math.inf, 0.0, "learning"
    for i, (step, train, test) in enumerate(points):
        if i and points[i - 1][0] > 0:
            before = points[i - 1]
            area += (train - test + before[1] - before[2]) / 2 * math.log(step / before[0])
        fitted = step if fitted is None and train >= fit else fitted
        general = step if general is None and test >= chance + high * (1 - chance) else general
        if general is not None:
            state = "grokked" if memorised is not None else "generalised"
            continue
        if fitted is None:
            continue
        if test < chance + near:
            memorised = step if memorised is None else memorised
            lowest = min(lowest, test)
        rising = memorised is not None and test > lowest + rise
        state = "fitted" if memorised is None else "grokking" if rising else "memorised"
    return Reading(state, fitted, memorised, general, lowest, area)


class GrokkingCallback(MonitorCallback):
    """Says whether a run has memorised its training rows, and when it generalises all the same.

    It rides on the user's evaluations. Metrics, under ``hfgen/grokking/``, at each: ``train`` and ``test`` (accuracies),
    ``rows`` (of the test set), ``state`` (0 learning, 1 fitted, 2 memorised, 3 grokking, 4 grokked, 5 generalised),
    ``gap_area`` (integral of train - test over log step)
    and, once both are reached, ``delay`` (steps to generalise / steps to fit).

    Findings: ``memorised`` (fitted, and the test rows near chance), ``grokking`` (test accuracy rising since) and
    ``grokked``. Confidence: of memorised the probability that the test accuracy is below chance + `near`, given so many
    test rows (uniform prior); of grokking, that it is above the lowest since (two proportions); of grokked, that it is
    above chance + `near`.

    Args:
        test: Name of the evaluation set (its key where ``eval_dataset`` is a dictionary; empty for a single set).
        train: Name of an evaluation set of training rows. None: the callback measures the accuracy of training tokens.
        metric: Name of the accuracy in the evaluation's metrics, without prefix; SFTTrainer: ``mean_token_accuracy``.
        chance: Accuracy of guessing.
        fit, near, rise, high: See `read`.
        rows: Training rows with ``train=None``. None: twice those of an optimizer step on one rank, at most 256.
        tokens: Valid targets of them, evenly spaced.
        trainer: See `MonitorCallback`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range; in `train()`: no such metric in an evaluation, or
            ``train=None`` with a streamed training set, one without class labels, or FSDP 1.
    """

    name = "grokking"
    cost = (
        "none but the user's evaluations; with train=None one forward of training rows beside each, worth two thirds of "
        "a step: under 2 % where 34 steps or more lie between evaluations"
    )
    witness = "an evaluation of both training and test rows"
    looks_first = False

    def __init__(
        self,
        test: str = "",
        train: str | None = None,
        metric: str = "accuracy",
        chance: float = 0.0,
        fit: float = 0.99,
        near: float = 0.5,
        rise: float = 0.05,
        high: float = 0.9,
        rows: int | None = None,
        tokens: int = 1024,
        trainer: Any = None,
    ) -> None:
        owner = type(self).__name__
        for field, text in (("test", test), ("metric", metric), ("train", train)):
            if not (isinstance(text, str) or (text is None and field == "train")):
                kind = "metric" if field == "metric" else "set"
                raise TypeError(f"{owner}.{field} is {text!r}; give the name of an evaluation {kind}, a string")
        if train == test:
            raise ValueError(f"{owner}.train is {train!r}, the same set as test; give the name of one of training rows")
        checks.number(owner, "chance", chance, low=-1e-12, high=1.0)
        for field, value in (("fit", fit), ("near", near), ("rise", rise), ("high", high)):
            checks.number(owner, field, value, low=0.0, high=1.0)
        if rows is not None:
            checks.integer(owner, "rows", rows, low=1)
        checks.integer(owner, "tokens", tokens, low=1)
        super().__init__(None, trainer)
        self.test, self.train, self.metric, self.chance = test, train, metric, chance
        self.fit, self.near, self.rise, self.high, self.rows, self.tokens = fit, near, rise, high, rows, tokens
        self._probe: Probe | None = None
        self._seen: dict[str, tuple[int, float, int]] = {}

    def arguments(self) -> dict[str, Any]:
        fields = ("test", "train", "metric", "chance", "fit", "near", "rise", "high", "rows", "tokens")
        return {field: getattr(self, field) for field in fields}

    def begin(self, event: Event) -> None:
        self._seen = {}
        if self.train is None:
            self.needs_forward(event, ", or give train= the name of an evaluation set of training rows")
            owner = f"{type(self).__name__}(train=None)"
            self._probe = Probe(owner, event, self.rows or probe_rows(event.args), self.tokens)

    def evaluated(self, event: Event, dataset: str, metrics: dict[str, float]) -> dict[str, float]:
        if dataset not in (self.test, self.train):
            return {}
        if self.metric not in metrics:
            raise ValueError(
                f"GrokkingCallback.metric is {self.metric!r}, and the evaluation of {dataset or 'the test rows'!r} has "
                f"{', '.join(sorted(metrics))}; give one of these that is an accuracy, or a compute_metrics to the Trainer"
            )
        step = event.state.global_step
        rows = getattr(event.eval_dataloader, "dataset", ())
        self._seen[dataset] = step, float(metrics[self.metric]), len(rows) if hasattr(rows, "__len__") else 1
        if dataset == self.test and self.train is None:
            assert self._probe is not None
            with undisturbed(event.model):
                self._seen[_TRAIN] = step, self._probe.accuracy(event.model), 1
        train, test = self._seen.get(self.train or _TRAIN), self._seen.get(self.test)
        if train and test and train[0] == test[0]:
            self.fire()
            row: dict[str, Any] = {"train": train[1], "test": test[1], "rows": max(1, test[2])}
            now = self._reading(step, row)
            self.judge(event.state, row)
            row |= {"state": STATES.index(now.state), "gap_area": now.area}
            self._keep(step, row if now.delay is None else row | {"delay": now.delay})
        return {}

    def _reading(self, step: int, row: dict[str, Any]) -> Reading:
        points = [(past["step"], past["train"], past["test"]) for past in self.history]
        points.append((step, row["train"], row["test"]))
        return read(points, self.chance, self.fit, self.near, self.rise, self.high)

    def judge(self, state: Any, row: dict[str, Any]) -> None:
        """Makes the findings of a row of `history` measured at ``state.global_step``: of a log, with any thresholds."""
        step, train, test, rows = state.global_step, row["train"], row["test"], row["rows"]
        now = self._reading(step, row)
        below = 1 - share_above(test * rows, rows, self.chance + self.near)
        if now.state == "memorised":
            sentence = (
                f"Memorised: {train:.0%} of the training rows are answered correctly, "
                f"but only {test:.0%} of the test rows."
            )
            self.finding("memorised", step, below, sentence, "Add weight decay or data; " + _PATIENCE)
        elif now.state == "grokking":
            sentence = (
                f"The run has begun to grok: test accuracy has risen from {now.lowest:.0%} to {test:.0%} since the "
                f"training rows were memorised at step {now.memorised}."
            )
            sure = greater(test, now.lowest, rows)
            self.finding("grokking", step, sure, sentence, "Go on training.", level=logging.INFO)
        elif now.state == "grokked":
            sentence = (
                f"Grokking: test accuracy reached {test:.0%} at step {now.general}, {now.delay:.3g} times as late as the "
                f"training rows were fitted (step {now.fit})."
            )
            advice = "Less delay: more weight decay, more data, or a smaller initialisation."
            follow = ("memorised", "grokking", "overfit", "overconfident")
            self.finding("grokked", step, 1 - below, sentence, advice, logging.INFO, explains=follow)


def example(folder: str) -> dict[str, Any]:
    """Keyword arguments of a tiny Trainer run with evaluations (for the conformance kit)."""
    return tiny_run(folder, evaluate_every=2) | token_accuracy() | {"callbacks": [GrokkingCallback(chance=1 / 32)]}
