"""What monitors measure with: fixed rows to look at the model with, probabilities of shares.

`Probe` gives logits and targets of the same tokens at every look, whatever the trainer does with its
own (micro-batches, ranks, trl's fused head): a look forwards the rows itself and projects the drawn tokens only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .monitor import Event, on_device, shifts_labels, summed


def probe_rows(args: Any, most: int = 256) -> int:
    """Rows of which one forward costs two thirds of an optimizer step: twice the step's own, at most `most`."""
    return min(most, 2 * args.per_device_train_batch_size * args.gradient_accumulation_steps)


class Probe:
    """The same rows, as the trainer's collator makes them, at every look, however many ranks, after a resume.

    The rows are drawn once, without touching the run's random state; of their valid targets (not -100; shifted where the
    model's loss shifts them) `tokens` are kept, evenly spaced. Ranks share the micro-batches: add what they find with
    `summed`.

    Args:
        owner: Who asks, for messages.
        event: Of ``begin``: the collator, and the training set without `dataloader`, are its dataloader's.
        rows: How many rows; fewer where the set is smaller.
        tokens: How many valid targets at most.
        seed: Of the draw.
        dataloader: Whose rows and collator it takes; None: the training dataloader.

    Attributes:
        of_tokens: Whether targets belong to tokens (not to whole rows).

    Raises:
        ValueError: the training set is a stream, or its batches have no class labels.
    """

    def __init__(self, owner: str, event: Event, rows: int, tokens: int, seed: int = 0, dataloader: Any = None) -> None:
        loader = event.train_dataloader if dataloader is None else dataloader
        dataset, collate = loader.dataset, loader.collate_fn
        if not hasattr(dataset, "__len__") or isinstance(dataset, torch.utils.data.IterableDataset):
            kind = "train" if dataloader is None else "eval"
            raise ValueError(
                f"{owner}: {kind}_dataset is a stream ({type(dataset).__name__}), from "
                "which the same rows cannot be read twice; give a dataset with a length"
            )
        args, size = event.args, event.args.per_device_train_batch_size
        with _own_randomness(seed):
            chosen = random.sample(range(len(dataset)), min(rows, len(dataset)))
            batches = [collate([dataset[i] for i in chosen[k : k + size]]) for k in range(0, len(chosen), size)]
        self._shifts = shifts_labels(event.model)
        parts = [self._split(owner, dict(batch)) for batch in batches]
        wheres = _evenly([targets != -100 for _, targets in parts], tokens)
        while len(parts) % args.world_size:  # every rank forwards as often as the others, the last ones for nothing
            parts.append(parts[0])
            wheres.append(tuple(i[:0] for i in wheres[0]))
        mine = slice(args.process_index, None, args.world_size)
        self._parts = list(zip(parts[mine], wheres[mine], strict=True))
        self._device = args.device
        self.of_tokens = parts[0][1].dim() == 2

    def _split(self, owner: str, batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        shifted = batch.get("shift_labels")
        targets = batch.get("labels") if shifted is None else shifted
        if targets is None or targets.is_floating_point() or targets.dim() > 2:
            found = "none" if targets is None else f"{targets.dtype} of shape {tuple(targets.shape)}"
            raise ValueError(f"{owner}: a batch has as labels {found}; it needs class labels (int64) of tokens or rows")
        if shifted is None and self._shifts:
            targets = nn.functional.pad(targets, (0, 1), value=-100)[..., 1:]
        return batch, targets

    def forward(
        self, model: nn.Module, before: Callable[[dict[str, Any]], None] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Logits (n, classes) of the drawn targets, the targets (n,) and the inputs, one micro-batch of rows at a time.

        Call it in a look (evaluation mode, no gradients). The output head projects the drawn tokens only. `before` is
        told the inputs before each forward.
        """
        for (batch, targets), where in self._parts:
            inputs = on_device(batch, self._device)
            index = tuple(i.to(self._device) for i in where)
            if before is not None:
                before(inputs)
            yield _logits_at(model, inputs, targets, index), targets[where].to(self._device), inputs

    def accuracy(self, model: nn.Module) -> float:
        """Share of the drawn targets that the model puts on top, over all ranks; 0 without targets."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for logits, targets, _ in self.forward(model):
            sums += torch.stack([(logits.argmax(-1) == targets).sum(), targets.new_tensor(len(targets))])
        right, count = summed(sums).tolist()
        return right / max(1.0, count)


def _logits_at(model: Any, inputs: dict[str, Any], targets: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    """Logits (n, classes) at `index`, without the others where the model has a head for tokens."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if targets.dim() == 1 or head is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return _of_output(model(**inputs))[index]
    inputs = {key: value for key, value in inputs.items() if key not in ("labels", "shift_labels")}

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]  # (rows, length, width); tokens that a prompt adapter adds come first
        return (hidden[index[0], index[1] + hidden.shape[1] - targets.shape[1]][None], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        return _of_output(model(**inputs))[0]
    finally:
        handle.remove()


def _of_output(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        return output["logits"]
    return output[0] if isinstance(output, tuple) else output


def _evenly(valid: list[Tensor], most: int) -> list[tuple[Tensor, ...]]:
    """Index tuples of at most `most` True entries of all masks together, evenly spaced."""
    total = sum(int(mask.sum()) for mask in valid)
    picked = torch.linspace(0, total - 1, min(most, total), dtype=torch.float64).round().long()
    found, start = [], 0
    for mask in valid:
        places = mask.nonzero()
        mine = picked[(picked >= start) & (picked < start + len(places))] - start
        found.append(tuple(places[mine].unbind(-1)))
        start += len(places)
    return found


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """A seeded state for datasets and collators that draw; the run's own is put back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the accelerator as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def greater(share: float, other: float, count: float) -> float:
    """Probability that `share` of `count` drawn exceeds `other` of as many in truth: two proportions, normal, pooled."""
    pooled = (share + other) / 2
    spread = math.sqrt(max(2 * pooled * (1 - pooled), 1 / count) / count)
    return 0.5 * (1 + math.erf((share - other) / spread / math.sqrt(2)))


def share_above(hits: float, count: float, threshold: float) -> float:
    """Probability that the share of which `hits` of `count` is a sample exceeds `threshold`; uniform prior."""
    from scipy.special import betainc

    return float(1.0 - betainc(hits + 1.0, count - hits + 1.0, threshold))
