"""The affine quantizer of AdaQuant (arXiv:2006.10518, section 3 and the authors' code), with straight-through gradients.

    Q(W; s, z) = s (clamp(round(W / s) + z, 0, 2^b - 1) - z)

Rows are groups: (m G, n / G); scale s and zero point z (m G, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfgen.kit.packing import Quantized

LEAST_RANGE = 1e-6  # of a row (the paper's clamp)
TINY = 2.0**-24  # the smallest scale that float16 holds
COARSE, FINE = 32, 16  # candidates of the two searches
SHRINK = (0.1, 1.05)  # of the coarse search, relative to the range that clips nothing


def affine(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale, zero) of the range from min(low, 0) to max(high, 0): scale = R / (2^b - 1), zero one of the codes."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low).clamp_min(LEAST_RANGE) / (2**bits - 1)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def encode(rows: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """clamp(round(w / s) + z, 0, 2^b - 1), as floating numbers."""
    return (rows / scale).round_().add_(zero).clamp_(0, 2**bits - 1)


def stored(scale: Tensor) -> Tensor:
    """The scale as float16 keeps it, in the dtype it came in: codes belong to that one."""
    return scale.half().clamp_min(TINY).to(scale.dtype)


def searched(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale, zero) (rows, 1) of least squared error in W: a grid of ranges, then a fine one, zero moved by one as well.

    1 + 32 + 3 * 16 passes over the weights. The scales are `stored` ones.
    """
    start, zero = affine(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), bits)

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        return encode(rows, scale, zero, bits).sub_(zero).mul_(scale).sub_(rows).square_().sum(1, keepdim=True)

    scale = stored(start)
    least, best = error(scale, zero), zero

    def offer(candidate: Tensor, moved: Tensor) -> None:
        nonlocal least, scale, best
        candidate = stored(candidate)
        found = error(candidate, moved)
        won = found < least
        least, scale = torch.where(won, found, least), torch.where(won, candidate, scale)
        best = torch.where(won, moved, best)

    low, high = SHRINK
    step = (high / low) ** (1 / (COARSE - 1))
    for i in range(COARSE):
        offer(start * (low * step**i), zero)
    centre = scale
    for shift in (0, -1, 1):
        moved = (zero + shift).clamp(0, 2**bits - 1)
        for i in range(FINE):
            offer(centre * step ** (2 * (i + 0.5) / FINE - 1), moved)
    return scale, best


class _Through(torch.autograd.Function):
    """f(x) forward, the gradient of x backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        return f(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def fake_quantize(rows: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Q(W; s, z), bit for bit what the codes will decode to, with straight-through gradients to all three."""
    s = _Through.apply(scale, stored)
    z = _Through.apply(zero, torch.round).clamp(0, 2**bits - 1)
    return (_Through.apply(rows / s, torch.round) + z).clamp(0, 2**bits - 1).sub(z) * s


class Point(NamedTuple):
    """What is optimised: W and the grid of its groups, and what is added to the bias (m)."""

    rows: Tensor
    scale: Tensor
    zero: Tensor
    shift: Tensor


def output_error(weight: Tensor, point: Point, bits: int, x: Tensor) -> Tensor:
    """Mean over tokens of || x (Q - W0)^T + shift ||^2; W0 = `weight` (m, n), x (tokens, n)."""
    change = fake_quantize(*point[:3], bits).view_as(weight) - weight
    return torch.addmm(point.shift, x, change.T).square().sum(1).mean()


@torch.no_grad()
def packed_point(point: Point, bits: int, shape: torch.Size) -> Quantized:
    """Codes derived from the optimised W, scale and zero, as `fake_quantize` reads them; `shape` (m, n)."""
    scale, zero = stored(point.scale), point.zero.round().clamp(0, 2**bits - 1)
    codes = encode(point.rows, scale, zero, bits).to(torch.uint8).view(shape)
    return Quantized(codes, scale.half().view(shape[0], -1), zero=zero.to(torch.uint8).view(shape[0], -1))
