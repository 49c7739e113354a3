"""What a run loses of skills the model had before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfgen.kit import checks
from hfgen.kit.examples import ROWS, tiny_run
from hfgen.kit.monitor import Event, MonitorCallback, collated, labelled_logits, on_device, rank_batches, summed

_DRAWS = 1000  # of the bootstrap
_SAVED = 500_000  # numbers in the rows of a skill up to which they are written into trainer_state.json
_ADVICE = (
    "Mix rows of this skill into training (5 % to 10 % is a start), lower learning_rate, train fewer steps, or train an "
    "adapter of small rank; the last look without this drop was at step {step}."
)


class ForgettingCallback(MonitorCallback):
    """Measures what the model still has of the skills it came with: before training, at each look, and at the end.

    Metrics, under ``hfgen/forgetting/<skill>/``: ``loss`` (nats per label), ``accuracy`` (share of labels, or tokens,
    that the largest logit names), ``loss_rise`` (loss - loss at the start), ``drop`` (accuracy at the start - accuracy
    now, so a loss of skill is positive) with ``drop_low`` and ``drop_high``, its 95 % interval from 1000 paired
    bootstrap draws over rows; ``worse`` and ``better`` (rows with fewer and with more right answers than then).
    Over skills: ``mean_drop`` with its interval, and ``worst_drop`` with an interval at
    1 - 0.05 / skills, which holds although the worst was picked.

    There is a finding ``forgetting/<skill>`` when the drop is at least `min_drop` and an exact one-sided sign test over
    the rows whose count of right answers changed (McNemar's test where a row has one label) gives p <= `alpha` / skills;
    its confidence is 1 - p, its step the first of the looks in a row with such a drop.

    Args:
        skills: ``{name: rows}``: datasets or lists of mappings with ``input_ids`` (or other numeric inputs) and
            ``labels``; -100 is masked. Without labels, those of ``input_ids`` where ``completion_mask`` is 1 (trl's
            rows), or all of them.
        every: See `MonitorCallback`; None: at the user's evaluations.
        rows: The first so many rows of each skill.
        min_drop: Smallest drop in accuracy of a finding.
        alpha: Largest p-value of a finding, over all skills together.
        share: Largest share of the training's time that looks may take with `every`; see `holds_share`.
        batch_size: Rows in one forward; None: ``per_device_eval_batch_size``.
        trainer: See `MonitorCallback`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range, a skill has no rows or rows that cannot be read;
            in a run: no evaluations and no `every`, or `every` takes more than `share`.
    """

    name = "forgetting"
    cost = (
        "one forward over `rows` rows of every skill before training and at each of the user's evaluations: for one skill "
        "5.5 training steps' time at a batch of 8, so under 2 % where 280 steps lie between evaluations; with every=, held "
        "to `share` of the training's time (10 % unless told otherwise)"
    )
    witness = "a look at the skills after the first one"

    def __init__(
        self,
        skills: Mapping[str, Any],
        every: int | None = None,
        rows: int = 128,
        min_drop: float = 0.05,
        alpha: float = 0.01,
        share: float = 0.1,
        batch_size: int | None = None,
        trainer: Any = None,
    ) -> None:
        if not isinstance(skills, Mapping) or not skills or not all(isinstance(name, str) for name in skills):
            raise TypeError(
                f"ForgettingCallback.skills is {str(skills)[:80]!r}; give {{name: rows}} of one skill or more"
            )
        for field, value in (("rows", rows), ("batch_size", 1 if batch_size is None else batch_size)):
            checks.integer("ForgettingCallback", field, value, low=1)
        for field, number in (("min_drop", min_drop), ("alpha", alpha), ("share", share)):
            checks.number("ForgettingCallback", field, number, low=0.0, high=1.0)
        super().__init__(every, trainer)
        self.rows, self.min_drop, self.alpha, self.share, self.batch_size = rows, min_drop, alpha, share, batch_size
        self.skills = {
            name: None if data is None else read_rows(f"skills[{name!r}]", data, rows) for name, data in skills.items()
        }
        self.start: dict[str, list[list[float]]] = {}  # per row: right, labels, loss
        self._since: dict[str, list[int]] = {}  # last look without a drop, first of those in a row with one

    def arguments(self) -> dict[str, Any]:
        fields = ("rows", "min_drop", "alpha", "share", "batch_size")
        skills = {name: rows if rows and _numbers(rows) <= _SAVED else None for name, rows in self.skills.items()}
        return super().arguments() | {"skills": skills} | {field: getattr(self, field) for field in fields}

    def state_dict(self) -> dict[str, Any]:
        return {"start": dict(self.start), "since": {name: list(steps) for name, steps in self._since.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self._since = dict(state["start"]), dict(state["since"])

    def begin(self, event: Event) -> None:
        self.needs_forward(event)
        self.needs_evaluations(event, ", or give every=")
        if missing := [name for name, rows in self.skills.items() if rows is None]:
            raise ValueError(
                f"ForgettingCallback.skills {missing} were too large to be saved with the checkpoint; set "
                "restore_callback_states_from_checkpoint=False and give the callback to the Trainer anew"
            )
        self.holds_share(event, sum(len(rows or ()) for rows in self.skills.values()), self.share)
        if not event.state.global_step:
            self.start, self._since = {}, {}

    def look(self, event: Event) -> dict[str, float]:
        size = self.batch_size or event.args.eval_batch_size
        found: dict[str, float] = {}
        worst, mean = -math.inf, np.zeros(_DRAWS)
        level = 1 - 0.05 / len(self.skills)
        for number, (name, rows) in enumerate(self.skills.items()):
            now = row_scores(event.model, rows or [], size, event.args.device).cpu().numpy()
            then = np.array(self.start.setdefault(name, now.tolist()))
            right, labels, loss = now.sum(0)
            if not labels:
                raise ValueError(
                    f"ForgettingCallback.skills[{name!r}] has no labels other than -100; give rows with some"
                )
            draws = drop_draws(then[:, 0], now[:, 0], now[:, 1], seed=number)
            drop = float((then[:, 0].sum() - right) / labels)
            low, high = interval(draws, 0.95)
            found |= {f"{name}/loss": float(loss / labels), f"{name}/accuracy": float(right / labels)}
            found |= {f"{name}/loss_rise": float((loss - then[:, 2].sum()) / labels), f"{name}/drop": drop}
            found |= {f"{name}/drop_low": low, f"{name}/drop_high": high}
            found |= {f"{name}/worse": int((now < then)[:, 0].sum()), f"{name}/better": int((now > then)[:, 0].sum())}
            mean += draws / len(self.skills)
            if drop > worst:
                worst, (worst_low, worst_high) = drop, interval(draws, level)
        self.judge(event.state, found)
        drops = [found[f"{name}/drop"] for name in self.skills]
        low, high = interval(mean, 0.95)
        if self.history:
            self.fire()
        return found | {
            "mean_drop": sum(drops) / len(drops), "mean_drop_low": low, "mean_drop_high": high,
            "worst_drop": worst, "worst_drop_low": worst_low, "worst_drop_high": worst_high,
        }  # fmt: skip

    def judge(self, state: Any, row: dict[str, Any]) -> None:
        """Makes the findings of a row of `history` measured at ``state.global_step``: of a log, with any thresholds."""
        step = state.global_step
        for name in self.skills:
            fine, since = self._since.setdefault(name, [step, -1])
            drop, accuracy = row[f"{name}/drop"], row[f"{name}/accuracy"]
            if drop < self.min_drop:
                self._since[name] = [step, -1]
                continue
            since = since if since >= 0 else step
            self._since[name] = [fine, since]
            p = sign_test(row[f"{name}/worse"], row[f"{name}/better"])
            if p <= self.alpha / len(self.skills):
                sentence = (
                    f"The model forgets {name!r}: its accuracy there was {accuracy + drop:.1%} before training and is "
                    f"{accuracy:.1%} now."
                )
                follow = ("overconfident", "loss_spike")
                self.finding(f"forgetting/{name}", since, 1 - p, sentence, _ADVICE.format(step=fine), explains=follow)


def read_rows(field: str, data: Any, most: int) -> list[dict[str, Any]]:
    """The first `most` rows of `data`, without what is no number: plain lists, so that they can be saved.

    Raises:
        TypeError, ValueError: a row is no mapping, has no inputs, or there is no row.
    """
    found: list[dict[str, Any]] = []
    for row in data:
        if not isinstance(row, Mapping):
            raise TypeError(
                f"ForgettingCallback.{field} has a row {str(row)[:60]!r}; give mappings of inputs and labels"
            )
        values = {k: v.tolist() if isinstance(v, Tensor | np.ndarray) else v for k, v in row.items()}
        values = {k: v for k, v in values.items() if v is not None and not isinstance(v, str) and _numeric(v)}
        mask = values.pop("completion_mask", None)
        if "labels" not in values and "label" in values:
            values["labels"] = values.pop("label")
        if "labels" not in values and "input_ids" in values:
            ids = values["input_ids"]
            values["labels"] = [t if kept else -100 for t, kept in zip(ids, mask or [1] * len(ids), strict=True)]
        if len(values) < 2 or "labels" not in values:
            raise ValueError(
                f"ForgettingCallback.{field} has a row with {sorted(row)}; give numeric inputs and labels (tokenise text)"
            )
        found.append(values)
        if len(found) == most:
            break
    if not found:
        raise ValueError(f"ForgettingCallback.{field} has no rows; give at least one")
    return found


def _numbers(value: Any) -> int:
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_numbers, value)) if isinstance(value, list) else 1


def _numeric(value: Any) -> bool:
    """Whether the first thing inside `value` is a number."""
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, int | float)


def row_scores(model: Any, rows: list[dict[str, Any]], size: int, device: Any) -> Tensor:
    """For each row: right answers, labels, sum of the loss in nats; (rows, 3) float64, the same on every process."""
    scores = torch.zeros(len(rows), 3, dtype=torch.float64, device=device)
    for numbers, counting in rank_batches(len(rows), size):
        batch = on_device(collated([rows[i] for i in numbers]), device)
        for place, (logits, labels) in enumerate(labelled_logits(model, batch)):
            if place < counting:
                loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double().sum()
                right = (logits.argmax(-1) == labels).sum()
                scores[numbers[place]] = torch.stack((right.double(), right.new_tensor(len(labels)).double(), loss))
    return summed(scores)


def drop_draws(then: np.ndarray, now: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Bootstrap of the drop in accuracy over rows, paired: (_DRAWS,).

    `then`, `now`: right answers of each row (rows,), `labels`: labels of each row (rows,). A draw takes as many rows
    with replacement; its drop is (sum then - sum now) / sum labels.
    """
    taken = np.random.default_rng(seed).integers(len(labels), size=(_DRAWS, len(labels)))
    return np.asarray((then - now)[taken].sum(1) / np.maximum(labels[taken].sum(1), 1))


def interval(draws: np.ndarray, level: float) -> tuple[float, float]:
    """The central `level` of the draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_test(worse: int, better: int) -> float:
    """P(at least `worse` of `worse + better` fair coins), exact; 1 without any."""
    n = worse + better
    return sum(math.comb(n, k) for k in range(worse, n + 1)) / 2**n


def example(folder: str) -> dict[str, Any]:
    """Keyword arguments of a tiny Trainer run that is evaluated at every other step (for the conformance kit)."""
    monitor = ForgettingCallback({"even": ROWS[16::2], "odd": ROWS[17::2]}, rows=4)
    return tiny_run(folder, evaluate_every=2) | {"callbacks": [monitor]}
