"""EasyQuant, arXiv:2403.02775. Data-free: outliers apart (eq. 3), then a scale per row that minimises (eq. 2)

    r(s) = sum over normal weights of (s q - w)^2,   q = clamp(round(w / s), low, high).

Rows below are groups: (m G, n / G), with outliers set to 0, where they cost no error and stretch no range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hfgen.kit import checks
from hfgen.kit.packing import CHUNK, Quantized
from hfgen.kit.quantizer import PackedConfig, PackedQuantizer

COARSE, FINE = 56, 24  # candidates of the two searches
SHRINK = (0.03, 1.05)  # of the coarse search, relative to the scale that clips nothing
LLOYD = 5  # steps s <- <q, w> / <q, q>
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam's own


def outliers(weight: Tensor, n_sigma: float | None) -> Tensor:
    """Mask (m, n) of |w - mean| >= n_sigma * std over the whole matrix (eq. 3); float32, population std."""
    std, mean = torch.std_mean(weight, correction=0)
    if n_sigma is None or not std > 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    return (weight - mean).abs() >= n_sigma * std


def start_scale(rows: Tensor, bits: int) -> Tensor:
    """The scale (rows, 1) that clips nothing: max|w| / (2^(b-1) - 1); 1 for rows of zeros."""
    scale = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return scale.masked_fill(scale == 0, 1.0)


def encode(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    """q = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1), as floating numbers."""
    return (rows / scale).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def error(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    """r(s) of each row (rows, 1). One pass over the weights."""
    return encode(rows, scale, bits).mul_(scale).sub_(rows).square_().sum(1, keepdim=True)


def error_gradient(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    """dr/ds = 2 sum (s q - w) q (rows, 1), with the clamped q (eq. 2 as printed leaves it unclamped)."""
    q = encode(rows, scale, bits)
    return 2 * ((q * scale - rows) * q).sum(1, keepdim=True)


class _Best:
    """The scale of least error seen so far, for each row."""

    def __init__(self, rows: Tensor, scale: Tensor, bits: int) -> None:
        self.rows, self.bits = rows, bits
        self.scale, self.error = scale, error(rows, scale, bits)

    def offer(self, scale: Tensor) -> None:
        found = error(self.rows, scale, self.bits)
        better = found < self.error
        self.scale, self.error = torch.where(better, scale, self.scale), torch.where(better, found, self.error)


def grid_scale(rows: Tensor, bits: int) -> Tensor:
    """Coarse geometric grid, a fine one around its best, then Lloyd steps: 1 + 56 + 24 + 2 * 5 passes."""
    start = start_scale(rows, bits)
    best = _Best(rows, start, bits)
    low, high = SHRINK
    step = (high / low) ** (1 / (COARSE - 1))
    for i in range(COARSE):
        best.offer(start * (low * step**i))
    centre = best.scale
    for i in range(FINE):
        best.offer(centre * step ** (2 * (i + 0.5) / FINE - 1))
    for _ in range(LLOYD):
        q = encode(rows, best.scale, bits)
        qq = (q * q).sum(1, keepdim=True)
        best.offer(torch.where(qq > 0, (q * rows).sum(1, keepdim=True) / qq.clamp_min(1), best.scale))
    return best.scale


def adam_scale(rows: Tensor, bits: int, steps: int, lr: float) -> Tensor:
    """The paper's Adam on the range of each row, relative to its start; the best iterate is kept. 2 passes a step."""
    start = start_scale(rows, bits)
    size = rows.square().sum(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    best = _Best(rows, start, bits)
    rho = torch.ones_like(start)
    mean, var = torch.zeros_like(rho), torch.zeros_like(rho)
    for t in range(1, steps + 1):
        grad = error_gradient(rows, start * rho, bits) * start / size
        mean = BETA1 * mean + (1 - BETA1) * grad
        var = BETA2 * var + (1 - BETA2) * grad * grad
        rho = rho - lr * (mean / (1 - BETA1**t)) / ((var / (1 - BETA2**t)).sqrt() + EPS)
        rho = rho.clamp_min(SHRINK[0])
        best.offer(start * rho)
    return best.scale


@dataclass(kw_only=True, repr=False)
class EasyQuantConfig(PackedConfig):
    """Configuration of EasyQuant. Bytes: bits / 8 a weight, 2 a scale, 6 an outlier.

    Args:
        n_sigma: Weights that far from the mean, in standard deviations of the whole matrix, are kept as they are
            (paper: 2.5 to 3, under 1 % of the weights); None = no outliers.
        optimizer: "grid" (a search, default), "adam" (the paper's) or "none" (the range of the normal weights).
        steps: Steps of "adam"; None = 100.
        lr: Its learning rate, relative to each row's starting range; None = 1.3e-2, the paper's 1e-3 on a range of 0.078.

    Other arguments: see `hfgen.kit.quantizer.PackedConfig`.
    """

    n_sigma: float | None = 3.0
    optimizer: str = "grid"
    steps: int | None = None
    lr: float | None = None

    method: ClassVar[str] = "easyquant"
    quantizer_cls: ClassVar = PackedQuantizer

    def __post_init__(self) -> None:
        if self.n_sigma is not None:
            checks.number("EasyQuantConfig", "n_sigma", self.n_sigma, 0.0)
        checks.one_of("EasyQuantConfig", "optimizer", self.optimizer, ("grid", "adam", "none"))
        if self.optimizer == "adam":
            self.steps = 100 if self.steps is None else self.steps
            self.lr = 1.3e-2 if self.lr is None else self.lr
            checks.integer("EasyQuantConfig", "steps", self.steps, 1)
            checks.number("EasyQuantConfig", "lr", self.lr, 0.0)
        for name in ("steps", "lr"):  # an option that would be ignored is an error
            if self.optimizer != "adam" and getattr(self, name) is not None:
                raise ValueError(
                    f"EasyQuantConfig.{name} is {getattr(self, name)} but only optimizer='adam' reads it; leave it out"
                )
        super().__post_init__()

    @property
    def has_outliers(self) -> bool:
        return self.n_sigma is not None

    def quantize_weight(self, weight: Tensor) -> Quantized:
        """Outliers apart, then codes and scales in blocks of rows that bound the memory."""
        full = weight.float()
        mask = outliers(full, self.n_sigma)
        normal = full.masked_fill(mask, 0.0).reshape(-1, self.group_size or weight.shape[1])
        step = max(1, CHUNK // normal.shape[1])
        parts = [self._block(rows) for rows in normal.split(step)]
        codes = torch.cat([codes for codes, _ in parts]).view(weight.shape)
        scale = torch.cat([scale for _, scale in parts]).view(weight.shape[0], -1)
        if not self.has_outliers:
            return Quantized(codes, scale)
        positions = mask.flatten().nonzero().flatten()
        values = weight.flatten()[positions]
        half = weight.dtype != torch.bfloat16 and bool(torch.isfinite(values.half()).all())
        values = values.to(torch.float16 if half else torch.bfloat16)  # float16 where its range allows
        return Quantized(codes, scale, positions.to(torch.int32), values)

    def _block(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.optimizer == "grid":
            scale = grid_scale(rows, self.bits)
        elif self.steps is not None and self.lr is not None:
            scale = adam_scale(rows, self.bits, self.steps, self.lr)
        else:
            scale = start_scale(rows, self.bits)
        half = scale.half().clamp_min(2.0**-24)  # codes belong to the scale as it is stored
        return (encode(rows, half.float(), self.bits) + 2 ** (self.bits - 1)).to(torch.uint8), half
