"""PowerQuant (arXiv:2301.09858) and NUPES (arXiv:2308.05600), for weights: levels that are powers of a uniform grid.

With M = 2^(b-1) - 1, s the largest |w| of a row or group and t = |w| / s in [0, 1], a weight becomes

    q = sign(w) round(t^a M),    and is read as    s sign(q) (|q| / M)^(1/a),    0.25 <= a <= 1.

The code is q + 2^(b-1); code 0 is never used (its entry is that of -M). Powers are taken of the M levels and of the M
borders between them, never of weights: rounding is a search among borders, reading one look into a table.

Rows below are groups: (m G, n / G).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor

from hfgen.kit.packing import CHUNK

LOWEST = 0.25  # exponents below put most levels next to 0
BINS = 2**14  # of t, for the search
GRID = 31  # exponents looked at before a layer's bounded search
EVERY = 10  # steps of learning between two looks at the held-out inputs


# --- levels and codes -----------------------------------------------------------------------------------------------


def magnitudes(a: float, bits: int) -> Tensor:
    """(k / M)^(1/a) for k = 0 .. M, float64 (M + 1)."""
    top = 2 ** (bits - 1) - 1
    return (torch.arange(top + 1, dtype=torch.float64) / top) ** (1 / a)


def table(a: float, bits: int) -> Tensor:
    """What each code stands for in units of s, float32 (2^b); the unused code 0 repeats -1."""
    positive = magnitudes(a, bits)[1:]
    return torch.cat([-positive[-1:], -positive.flip(0), torch.zeros(1), positive]).float()


def borders(a: float, bits: int, rounding: str) -> Tensor:
    """t at which |q| becomes 1, 2 .. M, float32 (M): half-way in the power domain, or between two levels."""
    if rounding == "value":
        level = magnitudes(a, bits)
        return ((level[1:] + level[:-1]) / 2).float()
    top = 2 ** (bits - 1) - 1
    return (((torch.arange(top, dtype=torch.float64) + 0.5) / top) ** (1 / a)).float()


def scales(rows: Tensor) -> Tensor:
    """s (rows, 1) as it is stored, float16: codes belong to this one."""
    return rows.abs().amax(1, keepdim=True).half().clamp_min(2.0**-24)


def encode(rows: Tensor, scale: Tensor, a: float, bits: int, rounding: str) -> Tensor:
    """Codes (rows, n), uint8."""
    at = borders(a, bits, rounding).to(rows.device)
    q = torch.bucketize((rows.abs() / scale.float()).contiguous(), at, out_int32=True, right=True)
    return torch.where(rows < 0, -q, q).add_(2 ** (bits - 1)).to(torch.uint8)


def error(rows: Tensor, scale: Tensor, a: float, bits: int, rounding: str, p: float) -> float:
    """Sum of |w - w'|^p over the weights as they are read back."""
    found, total = table(a, bits).to(rows.device), 0.0
    for part, s in blocks(rows, scale):
        read = found[encode(part, s, a, bits, rounding).int()].mul_(s.float())
        total += float(read.sub_(part).abs_().pow_(p).sum(dtype=torch.float64))
    return total


def blocks(rows: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time, which bounds the memory."""
    step = max(1, CHUNK // rows.shape[1])
    yield from zip(rows.split(step), scale.split(step), strict=True)


# --- the search -----------------------------------------------------------------------------------------------------


def density(rows: Tensor, scale: Tensor, p: float) -> Tensor:
    """Sum of s^p over the weights in each of `BINS` equal bins of t, float64: one pass, then every exponent is cheap."""
    total = torch.zeros(BINS, dtype=torch.float64, device=rows.device)
    for part, s in blocks(rows, scale):
        where = (part.abs() / s.float()).mul_(BINS).int().clamp_(max=BINS - 1)
        total += torch.bincount(where.flatten(), s.double().pow(p).expand_as(part).flatten(), BINS)
    return total.cpu()


def cost(found: Tensor, a: float, bits: int, rounding: str, p: float) -> float:
    """`error` as the density gives it: each weight counts as the middle of its bin."""
    middle = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    q = torch.bucketize(middle, borders(a, bits, rounding).double(), right=True)
    return float(found @ (magnitudes(a, bits)[q] - middle).abs().pow(p))


def norm(rows: Tensor, p: float) -> float:
    """The p-norm of all weights; 1 where they are zeros."""
    return float(torch.linalg.vector_norm(rows, p, dtype=torch.float64)) or 1.0


def model_exponent(total: Callable[[float], float]) -> float:
    """PowerQuant's search of one exponent: Nelder-Mead from a = 1 on `total`, to four digits."""
    options = {"initial_simplex": [[1.0], [0.9]], "xatol": 1e-3, "fatol": math.inf}
    bounds = [(LOWEST, 1.0)]
    found = minimize(lambda x: total(float(x[0])), [1.0], method="Nelder-Mead", bounds=bounds, options=options)
    return round(float(found.x[0]), 4)


def layer_exponent(total: Callable[[float], float]) -> float:
    """The least of `total` on a grid, then a bounded search between its neighbours; to four digits."""
    step = (1 - LOWEST) / (GRID - 1)
    best = min((LOWEST + step * i for i in range(GRID)), key=total)
    bounds = max(LOWEST, best - step), min(1.0, best + step)
    found = minimize_scalar(total, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return round(float(found.x if found.fun < total(best) else best), 4)


# --- learning (NUPES) -----------------------------------------------------------------------------------------------


def decode(u: Tensor, a: Tensor, bits: int) -> Tensor:
    """Levels of the latent codes u, with gradients to u and to a (0-dim); u is within [-M, M].

    To u straight through the rounding, with the slope of |u|^(1/a) at |u| >= 1: at 0 it vanishes, and a weight read as 0
    would stay there. To a through the M levels above 0; the level 0 is a constant, so t^(1/a) ln t is never seen at 0.
    """
    top = 2 ** (bits - 1) - 1
    q = u.detach().round()
    level = (torch.arange(1, top + 1, dtype=u.dtype, device=u.device) / top) ** (1 / a)
    read = torch.cat([level.new_zeros(1), level])[q.abs().int()] * q.sign()
    power = 1 / a.detach()
    slope = power / top * (u.detach().abs().clamp_min(1) / top) ** (power - 1)
    return read + slope * (u - u.detach())


def root(x: Tensor) -> Tensor:
    """R of at most n rows with R^T R = x^T x, so |x d| = |R d| for every d; x (tokens, n)."""
    return torch.linalg.qr(x, mode="r").R if x.shape[0] > x.shape[1] else x


def latent(rows: Tensor, scale: Tensor, codes: Tensor, a: float, bits: int) -> Tensor:
    """u = sign(w) t^a M, moved into the cell of its code where that was not rounded in the power domain."""
    top = 2 ** (bits - 1) - 1
    q = codes.to(rows.dtype) - 2 ** (bits - 1)
    u = rows.sign() * (rows.abs() / scale.float()).clamp_max(1) ** a * top
    return u.clamp(q - 0.499, q + 0.499).clamp(-top, top)


@dataclass(frozen=True)
class Learned:
    """Codes (rows, n), exponent, and |x (w - w')|^2 on the held-out inputs before and after."""

    codes: Tensor
    a: float
    before: float
    after: float


def learn(
    weight: Tensor,
    scale: Tensor,
    codes: Tensor,
    a: float,
    bits: int,
    inputs: tuple[Tensor, Tensor],
    steps: int,
    lr: float,
    lr_a: float,
) -> Learned:
    """Codes on the whole grid and the exponent by Adam on |x (w - w')|^2; the best on held-out inputs is kept.

    Args:
        weight: (m, n) float32; `scale` and `codes` are those of its rows, by the data-free method.
        inputs: x (tokens, n) to learn from, and those held out.
    """
    m, _ = weight.shape
    rows, s, middle = weight.reshape(codes.shape), scale.float(), 2 ** (bits - 1)
    fit, held = (root(x.float()) for x in inputs)

    def loss(read: Tensor, r: Tensor) -> Tensor:
        return ((read * s - rows).reshape(m, -1) @ r.T).square().sum()

    first = table(a, bits).to(weight.device)[codes.int()]
    start, before = float(loss(first, fit)), float(loss(first, held))
    best = Learned(codes, a, before, before)
    if start == 0:
        return best
    with torch.enable_grad():
        u = latent(rows, scale, codes, a, bits).requires_grad_()
        theta = torch.tensor((a - LOWEST) / (1 - LOWEST)).clamp(0.01, 0.99).logit().to(u).requires_grad_()
        adam = torch.optim.Adam([{"params": [u], "lr": lr}, {"params": [theta], "lr": lr_a}])
        decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)  # or codes hop between two levels to the end
        for i in range(1, steps + 1):
            exponent = LOWEST + (1 - LOWEST) * theta.sigmoid()
            adam.zero_grad()
            (loss(decode(u, exponent, bits), fit) * (u.numel() / start)).backward()  # gradients of usual size for Adam
            adam.step()
            decay.step()
            with torch.no_grad():
                u.clamp_(1 - middle, middle - 1)
                if i % EVERY and i < steps:
                    continue
                now = float(LOWEST + (1 - LOWEST) * theta.sigmoid())
                found = (u.round() + middle).to(torch.uint8)
                after = float(loss(table(now, bits).to(weight.device)[found.int()], held))
                best = Learned(found, now, before, after) if after < best.after else best
    return best
