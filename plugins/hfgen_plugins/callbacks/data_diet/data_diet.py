"""Scores of training rows, taken while the run goes."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hfgen.kit import checks
from hfgen.kit.examples import tiny_run
from hfgen.kit.monitor import Event, MonitorCallback, labelled_logits, on_device, rank_batches, summed

_LOG = logging.getLogger("hfgen.data_diet")


class DataDietCallback(MonitorCallback):
    """Scores rows of the training set at each look, and gives the dataset with the scores as columns: `scored`.

    A look reads the same rows every time, by their index, in evaluation mode; shuffling and the padding of distributed
    samplers do not touch it. Per row: ``el2n`` (Paul et al. 2021: ||softmax(z) - onehot||_2, of several
    labelled tokens the mean, in [0, sqrt 2]) and, with `grand`, ``grand`` (theirs as well: the 2-norm of the gradient
    of the row's mean loss over the trained parameters), both as means over looks; ``forgetting_events`` (looks at which
    a row that was right is wrong) and ``learnt`` (it was right at some look; the paper of Toneva et al. 2019 gives rows
    never learnt infinitely many events).

    Metrics, under ``hfgen/data_diet/``: ``el2n`` and ``grand`` (means over rows at this look), ``right`` and ``learnt``
    (shares of rows), ``odd`` (share of rows with an EL2N above 1: the model says something else, and is sure of it),
    ``events`` (forgetting events so far per row), ``rows``, ``epoch``.

    Args:
        every: See `MonitorCallback`; None: at the user's evaluations.
        share: Largest share of the training's time that looks may take: it says how many rows are read. A row that is
            read counts a third of a row trained on, with `grand` four thirds.
        rows: Read so many rows instead (evenly spread); refused where they need more than `share`.
        grand: Whether to take GraNd, one backward for every row read.
        right: Share of a row's labels that must be right for the row to be right.
        batch_size: Rows in one forward; None: ``per_device_eval_batch_size``.
        trainer: See `MonitorCallback`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range; in a run: no evaluations and no `every`, a
            training set that is a stream or packed, `rows` above `share`, `grand` with sharded weights.
    """

    name = "data_diet"
    cost = (
        "looks read as many rows as `share` of the training's time allows (2 % unless told otherwise); GraNd, off by "
        "default, takes one backward per row read at each look (every `every` steps, or at the user's evaluations), and "
        "counts it"
    )
    witness = "a second look at the same rows, which forgetting events need,"
    looks_first = False

    def __init__(
        self,
        every: int | None = None,
        share: float = 0.02,
        rows: int | None = None,
        grand: bool = False,
        right: float = 0.9,
        batch_size: int | None = None,
        trainer: Any = None,
    ) -> None:
        for field, value in (("rows", rows), ("batch_size", batch_size)):
            checks.integer("DataDietCallback", field, 1 if value is None else value, low=1)
        for field, number in (("share", share), ("right", right)):
            checks.number("DataDietCallback", field, number, low=0.0, high=1.0)
        checks.boolean("DataDietCallback", "grand", grand)
        super().__init__(every, trainer)
        self.share, self.rows, self.grand, self.right, self.batch_size = share, rows, grand, right, batch_size
        self._reset()

    def _reset(self) -> None:
        self.looks, self.length = 0, 0
        # one row per row read: its index, sum of el2n, sum of grand, right at the last look, learnt, events
        self.scores = torch.zeros(0, 6, dtype=torch.float64)

    def arguments(self) -> dict[str, Any]:
        fields = ("share", "rows", "grand", "right", "batch_size")
        return super().arguments() | {field: getattr(self, field) for field in fields}

    def state_dict(self) -> dict[str, Any]:
        return {"looks": self.looks, "length": self.length, "scores": self.scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.looks, self.length, self.scores = state["looks"], state["length"], state["scores"]

    def begin(self, event: Event) -> None:
        self.needs_forward(event)
        self.needs_evaluations(event, ", or give every=")
        dataset = event.train_dataloader.dataset
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ValueError(
                f"train_dataset is a {type(dataset).__name__}, a stream; DataDietCallback needs one with a length"
            )
        for option in ("packing", "padding_free"):
            if getattr(event.args, option, False):
                raise ValueError(f"args.{option} is True: a batch row is no longer one training row; set it to False")
        if self.grand and any(isinstance(p, DTensor) for p in event.model.parameters()):
            raise ValueError("DataDietCallback.grand is True and the weights are sharded (FSDP2); set it to False")
        if not event.state.global_step or not self.length:
            self._reset()
            self.length = len(dataset)
            self.scores = torch.zeros(self._count(event), 6, dtype=torch.float64)
            self.scores[:, 0] = torch.from_numpy(np.linspace(0, self.length - 1, len(self.scores)).round())
        if self.length != len(dataset):
            raise ValueError(
                f"the training set has {len(dataset)} rows and the resumed run had {self.length}; its scores belong to "
                "other rows"
            )

    def _count(self, event: Event) -> int:
        """How many rows a look reads, so that all looks of the run together take `share` of its time."""
        args, state = event.args, event.state
        interval = self.every or (state.eval_steps if args.eval_strategy == "steps" else 0)
        interval = interval or state.max_steps / state.num_train_epochs
        looks = math.ceil(state.max_steps / interval) + (self.every is not None)  # one before the first step
        trained = state.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        cost = looks * (1 + 3 * self.grand) / 3  # of a row that all looks read, in rows trained on
        allowed = int(self.share * trained / cost + 1e-9)
        count = min(self.length, self.rows or max(1, allowed))
        if self.rows and count > allowed:
            raise ValueError(
                f"DataDietCallback.rows is {self.rows}: reading them at {looks} looks takes about "
                f"{count * cost / trained:.0%} of the training's time; give a share of that, fewer rows, or look less often"
            )
        _LOG.info(f"data_diet: reads {count} of {self.length} training rows at each look (share {self.share:.0%})")
        return count

    def look(self, event: Event) -> dict[str, float]:
        now = self._read(event).cpu()
        el2n, grand, right = now.T
        old = self.scores
        if self.looks:
            self.fire()
            old[:, 5] += (old[:, 3] > 0) & (right == 0)
        old[:, 1] += el2n
        old[:, 2] += grand
        old[:, 3] = right
        old[:, 4] = torch.maximum(old[:, 4], right)
        self.looks += 1
        found = {"rows": len(old), "el2n": float(el2n.mean()), "right": float(right.mean())}
        found |= {"learnt": float(old[:, 4].mean()), "events": float(old[:, 5].mean())}
        found |= {"odd": float((el2n > 1).double().mean()), "epoch": float(event.state.epoch or 0.0)}
        return found | ({"grand": float(grand.mean())} if self.grand else {})

    def _read(self, event: Event) -> Tensor:
        """EL2N, GraNd (0 without) and right (0 or 1) of the rows, (rows, 3) float64, the same on every process."""
        model, loader, device = event.model, event.train_dataloader, event.args.device
        found = torch.zeros(len(self.scores), 3, dtype=torch.float64, device=device)
        indices = self.scores[:, 0].long().tolist()
        for numbers, counting in rank_batches(len(indices), self.batch_size or event.args.eval_batch_size):
            rows = [loader.dataset[indices[i]] for i in numbers]
            batch = on_device(loader.collate_fn(rows), device)
            scores = [row_scores(logits, labels, self.right) for logits, labels in labelled_logits(model, batch)]
            if len(scores) != len(numbers):
                raise ValueError(
                    f"the collator makes {len(scores)} rows of {len(numbers)}; DataDietCallback needs one for one"
                )
            for place in range(counting):
                found[numbers[place], [0, 2]] = scores[place]
                if self.grand:
                    one = on_device(loader.collate_fn(rows[place : place + 1]), device)
                    found[numbers[place], 1] = gradient_of_row(model, one)
        return summed(found)

    def scored(self, dataset: Any) -> Any:
        """The training set with the columns ``el2n``, ``grand`` (if taken), ``forgetting_events`` and ``learnt``.

        Args:
            dataset: The ``datasets.Dataset`` that was trained on, its rows in the same places.

        Returns:
            A new ``datasets.Dataset``; rows that were not read have None.

        Raises:
            ValueError: no look was taken yet, or `dataset` has another length.
        """
        if not self.looks:
            raise ValueError("DataDietCallback.scored: no look was taken yet; train with evaluations, or with every=")
        if len(dataset) != self.length:
            raise ValueError(
                f"DataDietCallback.scored: dataset has {len(dataset)} rows and the one trained on had {self.length}; give "
                "that one"
            )
        columns: dict[str, list[Any]] = {name: [None] * self.length for name in ("el2n", "forgetting_events", "learnt")}
        if self.grand:
            columns["grand"] = [None] * self.length
        for index, el2n, grand, _, learnt, events in self.scores.tolist():
            row = {"el2n": el2n / self.looks, "grand": grand / self.looks, "learnt": learnt > 0}
            row["forgetting_events"] = int(events)
            for name, values in columns.items():
                values[int(index)] = row[name]
        for name, values in columns.items():
            dataset = (dataset.remove_columns(name) if name in dataset.column_names else dataset).add_column(
                name, values
            )
        return dataset


def row_scores(logits: Tensor, labels: Tensor, right: float) -> Tensor:
    """EL2N and right (0 or 1) of one row from logits (n, classes) and labels (n,): (2,) float64; zeros if n = 0.

    EL2N^2 of a label is sum p^2 - 2 p_label + 1; the row's is the mean of EL2N over its labels.
    """
    if not len(labels):
        return torch.zeros(2, dtype=torch.float64, device=logits.device)
    p = logits.softmax(-1)
    of_label = p.gather(-1, labels[:, None])[:, 0].double()
    # sum of the others' squares + (1 - p_label)^2: no cancellation where p_label is near 1
    others = p.scatter(-1, labels[:, None], 0.0).square().sum(-1, dtype=torch.float64)
    el2n = (others + (1 - of_label) ** 2).sqrt().mean()
    share = (logits.argmax(-1) == labels).double().mean()
    return torch.stack((el2n, (share >= right).double()))


def gradient_of_row(model: Any, batch: dict[str, Any]) -> Tensor:
    """2-norm of the gradient of the batch's one row's mean loss over the trained parameters; ``.grad`` is not touched."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        logits, labels = next(labelled_logits(model, batch))
        loss = torch.nn.functional.cross_entropy(logits, labels) if len(labels) else logits.sum() * 0
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
    squares = [g.double().square().sum() for g in grads if g is not None]
    return torch.stack(squares).sum().sqrt()


def example(folder: str) -> dict[str, Any]:
    """Keyword arguments of a tiny Trainer run that is looked at every other step (for the conformance kit)."""
    return tiny_run(folder) | {"callbacks": [DataDietCallback(every=2, share=1.0, rows=2, grand=True)]}
