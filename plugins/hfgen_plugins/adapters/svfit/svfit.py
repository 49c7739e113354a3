"""SVFit, arXiv:2409.05926. W = U S V^T; sigma (the top r singular values) is trained, U_r and V_r are frozen.

y = W x + scaling * U_r ((sigma - sigma0) * (V_r^T x)), the delta form of W_e + U_r diag(sigma) V_r^T.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hfgen.kit import checks
from hfgen.kit.adapter import DeltaTuner
from hfgen.kit.diagonal import DiagonalConfig, DiagonalLayer, Factors


def top_singular(weight: Tensor, r: int, energy: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Leading part of the thin SVD of `weight` (m, n): U (m, r), sigma (r), V^T (r, n).

    With `energy`, r is the smallest rank whose singular values hold that share of ||W||_F^2 (the abstract's 99% rule).
    """
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    if energy is not None:
        share = torch.cumsum(s.double() ** 2, 0)
        r = int(torch.searchsorted(share, energy * share[-1] * (1 - 1e-12)).item()) + 1
    return u[:, :r], s[:r], vt[:r]


def sketched_singular(weight: Tensor, r: int, oversample: int, n_iter: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `top_singular` by a seeded randomised range finder (Halko et al. 2011): orthonormal factors, approximate sigma."""
    q = min(r + oversample, *weight.shape)
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, q=q, niter=n_iter)
    return u[:, :r], s[:r], v[:, :r].T


class SVFitLinear(DiagonalLayer):
    """One adapted layer; trains `svfit_sigma` (r)."""

    z_name = "svfit_sigma"

    def factorise(self, adapter_name: str, config: SVFitConfig, weight: Tensor) -> Factors:
        r = min(config.r, *weight.shape)
        if config.init_svd == "exact":
            u, s, vt = top_singular(weight, r, config.energy)
        else:
            u, s, vt = sketched_singular(weight, r, config.oversample, config.n_iter, self.generator_seed(config))
        return Factors(u, vt, s, s)

    def scaling(self, config: SVFitConfig) -> float:
        return float(config.scaling)


class SVFitModel(DeltaTuner):
    """The peft tuner of SVFit."""

    prefix = "svfit_"
    tuner_layer_cls = SVFitLinear


@dataclass
class SVFitConfig(DiagonalConfig):
    """Configuration of SVFit. Trainable numbers: the sum over targets of min(r, m, n).

    Args:
        r: Trained singular values per layer; clipped to min(m, n).
        energy: Choose r per layer as the smallest rank that holds this share (0, 1] of ||W||_F^2, instead of `r`.
        scaling: Constant in front of the weight delta (the paper has none: 1).
        init_svd: "exact" (LAPACK), or "lowrank" = a seeded sketch for wide layers and small r. Its factors are
            orthonormal, so the start is exact whatever its error.
        oversample: Extra columns of the sketch.
        n_iter: Power iterations of the sketch.

    Other arguments: see `hfgen.kit.diagonal.DiagonalConfig` and `hfgen.kit.adapter.DeltaConfig`.
    """

    energy: float | None = field(default=None, metadata={"help": "Share of ||W||_F^2 that chooses r per layer."})
    scaling: float = field(default=1.0, metadata={"help": "Constant in front of the weight delta."})
    init_svd: str = field(default="exact", metadata={"help": "'exact' or 'lowrank'."})
    oversample: int = field(default=16, metadata={"help": "Extra columns of the sketch (init_svd='lowrank')."})
    n_iter: int = field(default=4, metadata={"help": "Power iterations of the sketch (init_svd='lowrank')."})

    tuner_cls: ClassVar = SVFitModel

    def __post_init__(self) -> None:
        if self.energy is not None:
            checks.number("SVFitConfig", "energy", self.energy, 0.0, 1.0)
        checks.number("SVFitConfig", "scaling", self.scaling)
        checks.one_of("SVFitConfig", "init_svd", self.init_svd, ("exact", "lowrank"))
        checks.integer("SVFitConfig", "oversample", self.oversample, 0)
        checks.integer("SVFitConfig", "n_iter", self.n_iter, 0)
        if self.energy is not None and self.init_svd == "lowrank":
            raise ValueError(
                f"SVFitConfig.energy is {self.energy}, which needs every singular value; set init_svd='exact'"
            )
        # An option that would be ignored is an error.
        ignored = {"r": "energy chooses the rank"} if self.energy is not None else {}
        if self.init_svd == "exact":
            ignored |= dict.fromkeys(("oversample", "n_iter"), "init_svd='exact' draws no sketch")
        for name, why in ignored.items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"SVFitConfig.{name} is {getattr(self, name)!r} but {why}; leave {name} out")
        super().__post_init__()
