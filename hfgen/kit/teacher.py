"""What the float model says, kept so that a quantised one can be compared with it when it is gone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfgen.kit.calibration import without_cache

TOP = 256  # classes of a position that are kept apart


@dataclass(frozen=True)
class Teacher:
    """The float model's distributions at each position: of its `TOP` likeliest classes, and of all others as one.

    So a KL divergence from it is at most the full one, and needs no copy of the float model.

    Attributes:
        rows: From `prepare`, as many batches as hold the tokens asked for.
        classes, logp: Per batch (B, L, k) and (B, L, k + 1), the last entry for all others (none if k is all there are).
    """

    rows: list[Mapping[str, Tensor]]
    classes: list[Tensor]
    logp: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, rows: Sequence[Mapping[str, Tensor]], tokens: int) -> Teacher:
        """Ask `model` (in eval mode) about batches of `rows` until `tokens` are seen."""
        made = cls([], [], [])
        for row in rows:
            logits = getattr(_output(model, row), "logits", None)
            if logits is None:
                owner = type(model).__name__
                raise ValueError(f"{owner} gives no logits to compare by; load the model with a head (AutoModelFor...)")
            found = logits.float().log_softmax(-1)
            classes = found.topk(min(TOP, found.shape[-1]), dim=-1).indices.sort(-1).values
            made.rows.append(row)
            made.classes.append(classes)
            made.logp.append(_lumped(found, classes))
            if sum(part.shape[:-1].numel() for part in made.logp) >= tokens:
                break
        return made

    def kl(self, model: Any, at: int) -> Tensor:
        """KL(teacher || model) summed over the positions of each sequence of batch `at`: (B)."""
        found = _lumped(_output(model, self.rows[at]).logits.float().log_softmax(-1), self.classes[at])
        want = self.logp[at]
        return torch.where(want > -math.inf, want.exp() * (want - found), 0.0).flatten(1).sum(1)

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """KL(teacher || model), nats per position."""
        total = sum(float(self.kl(model, at).double().sum()) for at in range(len(self.rows)))
        return total / sum(logp.shape[:-1].numel() for logp in self.logp)


def _output(model: Any, row: Mapping[str, Tensor]) -> Any:
    with without_cache(model):
        return model(**row)


def _lumped(logp: Tensor, classes: Tensor) -> Tensor:
    """Log probabilities (..., k + 1) of `classes` (..., k) and of all others together."""
    if classes.shape[-1] == logp.shape[-1]:
        return logp
    others = logp.scatter(-1, classes, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logp.gather(-1, classes), others], dim=-1)
