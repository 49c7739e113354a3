"""LoLDU, arXiv:2410.13618. P W = L D U with unit triangular L, U; z (the first r entries of D) is trained.

y = W x + s * PL_r ((z - z0) * (U_r x)), s = alpha / r, PL_r = the first r columns of L with rows in W's order.
"First r" is pivot order, not magnitude.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from hfgen.kit import checks
from hfgen.kit.adapter import DeltaTuner
from hfgen.kit.diagonal import DiagonalConfig, DiagonalLayer, Factors

logger = logging.getLogger("hfgen")
INITS = ("lu", "uniform", "normal", "constant", "s_uniform", "s_normal", "ones", "zeros")


def ldu(weight: Tensor, r: int, perm: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First r terms of W[perm] = L diag(d) U: PL (m, r) in W's row order, d (r), U (r, n), perm (m, int32).

    With `perm` None, rows are ordered by partial pivoting. With a stored `perm` the factors are unique, so they come out
    the same on a machine whose LAPACK would have broken a near-tie the other way. A pivot |d_i| <= eps max|W| k is at
    rounding level: its column of PL and its d become 0, its row of U a unit vector (D^-1 U would be NaN).
    """
    (m, n), k, like = weight.shape, min(weight.shape), {"dtype": weight.dtype, "device": weight.device}
    if perm is None:
        packed, pivots, _ = torch.linalg.lu_factor_ex(weight)  # an exact zero pivot is ours to handle
        order = torch.arange(m)
        for i, j in enumerate((pivots.cpu() - 1).tolist()):  # LAPACK gives row swaps, one after the other
            order[[i, j]] = order[[j, i]]
        lower, upper = torch.tril(packed[:, :k], -1)[:, :r] + torch.eye(m, r, **like), torch.triu(packed[:k])[:r]
    else:
        order = perm.long().cpu()
        lower, upper = _eliminate(weight[order.to(weight.device)], r)
    d = upper.diagonal()
    tiny = d.abs() <= torch.finfo(d.dtype).eps * weight.abs().max() * k
    unit = torch.where(tiny[:, None], torch.eye(r, n, **like), upper / torch.where(tiny, 1, d)[:, None])
    left = torch.empty_like(lower)
    left[order.to(weight.device)] = torch.where(tiny, 0, lower)
    return left, torch.where(tiny, 0, d), unit, order.to(torch.int32).to(weight.device)


def _eliminate(a: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """r steps of Gaussian elimination without pivoting of A (m, n): L (m, r) unit lower, U0 (r, n) upper."""
    (m, n), like = a.shape, {"dtype": a.dtype, "device": a.device}
    lower, upper = torch.zeros(m, r, **like), torch.zeros(r, n, **like)
    for i in range(r):
        upper[i, i:] = a[i, i:] - lower[i, :i] @ upper[:i, i:]
        column = a[i:, i] - lower[i:, :i] @ upper[:i, i]
        lower[i:, i] = column / upper[i, i] if upper[i, i] != 0 else 0
        lower[i, i] = 1
    return lower, upper


def initial_z(d: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """The first value of z (r) from the pivots d (r), by the names of the authors' ablation."""

    def draw(normal: bool) -> Tensor:
        value = torch.empty(d.shape, dtype=d.dtype)
        value = value.normal_(generator=generator) if normal else value.uniform_(-1, 1, generator=generator)
        return value.to(d.device)

    mean = d.mean()
    match kind:
        case "lu":
            return d
        case "uniform":
            return draw(normal=False) * mean.abs() / 2
        case "normal":
            return mean + d.std(correction=min(1, len(d) - 1)) * draw(normal=True)
        case "constant":
            return mean.expand_as(d)
        case "s_uniform" | "s_normal":
            return draw(normal=kind == "s_normal")
        case _:
            return torch.ones_like(d) if kind == "ones" else torch.zeros_like(d)


class LoLDULinear(DiagonalLayer):
    """One adapted layer; trains `loldu_z` (r), and `loldu_scale` (1) with train_scale."""

    z_name = "loldu_z"

    def setup(self) -> None:
        super().setup()
        self.loldu_perm = BufferDict(persistent=True)
        self.other_param_names = (*self.other_param_names, "loldu_perm", "_perms")
        self._perms: dict[str, Tensor] = {}  # the row order the factors were built with

    def factorise(self, adapter_name: str, config: LoLDUConfig, weight: Tensor) -> Factors:
        left, d, right, perm = ldu(weight, min(config.r, *weight.shape))
        if bool((d == 0).any()):
            logger.warning("loldu froze %d pivots at rounding level in %s", int((d == 0).sum()), self.module_name)
        z = initial_z(d, config.init_z, torch.Generator().manual_seed(self.generator_seed(config)))
        self.loldu_perm[adapter_name], self._perms[adapter_name] = perm, perm.cpu().clone()  # a load writes in place
        return Factors(left, right, z, z if config.preserve_function else d)

    def scaling(self, config: LoLDUConfig) -> float:
        return 1.0 if config.alpha is None else config.alpha / config.r

    def was_loaded(self, adapter_name: str) -> bool:
        same = torch.equal(self.loldu_perm[adapter_name].cpu(), self._perms[adapter_name])
        return super().was_loaded(adapter_name) or not same

    def check_loaded(self, adapter_name: str) -> str | None:
        perm = self.loldu_perm[adapter_name].cpu()
        if not torch.equal(perm.long().sort().values, torch.arange(self.out_features)):
            return "loldu_perm is not a permutation of its rows"
        # A near-tie may have fallen the other way on the machine that saved it.
        if not torch.equal(perm, self._perms[adapter_name]):
            weight = self._weight_2d()
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            left, d, right, _ = ldu(weight, len(self._facts[adapter_name]["reference"]), perm)
            self._set_factors(adapter_name, Factors(left, right, d, d))
            self._perms[adapter_name] = perm.clone()
            if self._facts[adapter_name]["reference_is_d"]:
                self._facts[adapter_name]["reference"] = d.cpu()
        # A drawn or constant reference says nothing about the base; it is taken as saved and the fingerprint decides.
        return super().check_loaded(adapter_name) if self._facts[adapter_name]["reference_is_d"] else None

    def build(self, adapter_name: str, config: Any, weight: Tensor) -> None:
        super().build(adapter_name, config, weight)
        self._facts[adapter_name]["reference_is_d"] = config.init_z == "lu" or not config.preserve_function


class LoLDUModel(DeltaTuner):
    """The peft tuner of LoLDU."""

    prefix = "loldu_"
    tuner_layer_cls = LoLDULinear


@dataclass
class LoLDUConfig(DiagonalConfig):
    """Configuration of LoLDU. Trainable numbers: the sum over targets of min(r, m, n), plus one each with train_scale.

    Args:
        r: Trained entries per layer; clipped to min(m, n).
        alpha: The constant in front of the delta is alpha / r; None = r, so that it is 1.
        init_z: First value of z: "lu" (the pivots), "uniform", "normal", "constant" (from the pivots' mean and spread),
            "s_uniform", "s_normal", "ones", "zeros".
        preserve_function: True = z0 is the first value of z, so the model's function is unchanged at the start; False =
            z0 is the pivots, as in the authors' code for the last four inits (useful to reproduce their ablation only).
        train_scale: Train the scale as well (the paper's count; the authors' code freezes it).

    Other arguments: see `hfgen.kit.diagonal.DiagonalConfig` and `hfgen.kit.adapter.DeltaConfig`.
    """

    alpha: float | None = field(default=None, metadata={"help": "Scale is alpha / r; None = r."})
    init_z: str = field(default="lu", metadata={"help": f"One of {', '.join(INITS)}."})
    preserve_function: bool = field(default=True, metadata={"help": "Subtract the first value of z, not the pivots."})
    train_scale: bool = field(default=False, metadata={"help": "Train the scale as well."})

    tuner_cls: ClassVar = LoLDUModel

    def __post_init__(self) -> None:
        if self.alpha is not None:
            checks.number("LoLDUConfig", "alpha", self.alpha, 0.0)
        checks.one_of("LoLDUConfig", "init_z", self.init_z, INITS)
        checks.boolean("LoLDUConfig", "preserve_function", self.preserve_function)
        checks.boolean("LoLDUConfig", "train_scale", self.train_scale)
        super().__post_init__()
