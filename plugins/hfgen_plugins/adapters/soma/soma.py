"""SoMA (SoRA in its authors' code). W = U S V^T; the r smallest singular components are trained as a product B A.

y = (W - s B0 A0) x + s B A x with B0 = U_r sqrt(S_r / s), A0 = sqrt(S_r / s) V_r^T, in the delta form of
`hfgen.kit.lowrank`. Blocks below `start_block` stay as they are, and weight decay is annealed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hfgen.kit import checks
from hfgen.kit.lowrank import LowRankConfig, LowRankLayer, LowRankTuner
from hfgen.kit.steps import Stepwise
from hfgen_plugins.adapters.soma.decay import Decay, anneal

logger = logging.getLogger("hfgen")


def minor_components(weight: Tensor, r: int, scaling: float = 1.0) -> tuple[Tensor, Tensor, int]:
    """B0 (m, r) and A0 (r, n) with scaling B0 A0 = the r smallest singular components of `weight` (m, n), largest first.

    By a full SVD: a sketch finds the largest components. The largest entry of every left vector is positive. A component
    at rounding level, sigma <= eps sqrt(max(m, n)) sigma_1 (noise: up to a quarter of it), would give two zero factors,
    which no gradient ever moves: it gets a zero column in B0 and its unit right vector in A0, LoRA's start. The third
    result is how many there are.
    """
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    u, minor, vt = u[:, -r:], sigma[-r:], vt[-r:]
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()  # (1, r)
    root = (minor / scaling).sqrt()
    null = minor <= torch.finfo(sigma.dtype).eps * max(weight.shape) ** 0.5 * sigma[0]
    left = torch.where(null, 0, u * sign * root)
    return left, torch.where(null, 1, root)[:, None] * sign.T * vt, int(null.sum())


class SomaLinear(Stepwise, LowRankLayer):
    """One adapted layer; trains `soma_A` (r, n) and `soma_B` (m, r)."""

    prefix = "soma"

    def setup(self) -> None:
        super().setup()
        self.other_param_names = (*self.other_param_names, "_driven", "_first")
        self.prepare_steps()

    def factorise(self, config: SomaConfig, weight: Tensor) -> tuple[Tensor, Tensor]:
        left, right, null = minor_components(weight, config.r, config.scaling)
        if null:
            logger.warning("soma: %d of the %d smallest singular values of %s are zero; those components start as LoRA's",
                           null, config.r, self.module_name)  # fmt: skip
        return left, right

    def build(self, adapter_name: str, config: SomaConfig, weight: Tensor) -> None:
        super().build(adapter_name, config, weight)
        if config.weight_decay is not None:
            self.drive(adapter_name, Decay(config.weight_decay, config.weight_decay_end, config.total_steps))

    @classmethod
    def on_step(cls, event: str, layers: list[Any], optimizer: Optimizer) -> None:
        if event == "before":
            anneal(layers, optimizer)  # all at once: adapters may share a group

    def decayed_parameters(self) -> Iterator[tuple[nn.Parameter, Decay]]:
        """The trained factors of every adapter with a schedule."""
        for adapter_name, decay in self._driven.items():
            yield self.soma_A[adapter_name], decay
            yield self.soma_B[adapter_name], decay


class SomaModel(LowRankTuner):
    """The peft tuner of SoMA."""

    prefix = "soma_"
    tuner_layer_cls = SomaLinear


@dataclass
class SomaConfig(LowRankConfig):
    """Configuration of SoMA. Trainable numbers: the sum over targets of r (m + n).

    Args:
        r: How many of the smallest singular components are trained (the paper: 16, from block 8 of 24 on: `start_block`).
        weight_decay: Weight decay of the first update, in the optimizer's own sense of it; it follows a cosine down to
            `weight_decay_end`, takes the place of the optimizer's (`TrainingArguments.weight_decay`) in every group that
            holds an adapter's factor, and attaches itself. None = leave the optimizer alone.
        weight_decay_end: What it ends at.
        total_steps: Optimizer steps until then; None = the Trainer's. A loop without a Trainer has to say it: without, a
            warning says so and the optimizer keeps its own.

    Other arguments: see `hfgen.kit.lowrank.LowRankConfig` and `hfgen.kit.adapter.DeltaConfig`.
    """

    weight_decay: float | None = field(default=0.05, metadata={"help": "First weight decay; None = do not anneal."})
    weight_decay_end: float = field(default=1e-5, metadata={"help": "Last weight decay."})
    total_steps: int | None = field(default=None, metadata={"help": "Steps of the schedule; None = the Trainer's."})

    tuner_cls: ClassVar = SomaModel

    def __post_init__(self) -> None:
        owner = "SomaConfig"
        if self.total_steps is not None:
            checks.integer(owner, "total_steps", self.total_steps, 1)
        if self.weight_decay is not None:
            checks.number(owner, "weight_decay", self.weight_decay, 0.0, 1.0)
            checks.number(owner, "weight_decay_end", self.weight_decay_end, 0.0, self.weight_decay)
        for name in ("weight_decay_end", "total_steps") if self.weight_decay is None else ():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"{owner}.{name} is {getattr(self, name)!r} but weight_decay is None; leave {name} out"
                )
        super().__post_init__()
