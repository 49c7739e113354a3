"""Random subspaces of weights: projections P (D, d) that are never stored, and layers whose tensors move in them.

A projection is drawn from (seed, name) on the CPU: the same on every machine, device and rank. `project` and `adjoint`
are each other's gradient, so neither keeps anything for backward. `reparametrised` calls a layer with tensors
base + shift(vectors) and makes the shift again in backward instead of keeping it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def fwht(x: Tensor) -> Tensor:
    """H x of a vector (L), L a power of two; H the Hadamard matrix in Sylvester's order, entries +-1, not normalised.

    H is symmetric, and H H = L I. In-place butterflies on one working copy; an intermediate transpose keeps every pass on
    runs of at least sqrt(L) neighbours.
    """
    bits = x.numel().bit_length() - 1
    if x.ndim != 1 or x.numel() != 1 << max(bits, 0):
        raise ValueError(f"x has shape {tuple(x.shape)}; give a vector whose length is a power of two")
    high = _butterflies(x.clone().view(1 << (bits // 2), -1))
    return _butterflies(high.T.contiguous()).T.reshape(-1)


def _butterflies(matrix: Tensor) -> Tensor:
    """H times the matrix (n, c), written into it."""
    n, c = matrix.shape
    half = 1
    while half < n:
        a, b = matrix.view(n // (2 * half), 2, half * c).unbind(1)
        difference = a - b
        a.add_(b)
        b.copy_(difference)
        half *= 2
    return matrix


def _normal(size: int, generator: torch.Generator) -> Tensor:
    """N(0, 1) float64 (size). By the quantile function of exact uniforms: torch's own randn depends on the CPU's kind."""
    uniform = torch.rand(size, dtype=torch.float64, generator=generator)
    return torch.special.ndtri(uniform.clamp_(2.0**-54, 1 - 2.0**-53))


class Projection:
    """A random P (size, d) with columns of unit norm, drawn from (seed, name) when it is first used.

    Attributes:
        d: Columns. Those beyond `reach` are zero.
        size: Rows.
        reach: Coordinates that act.
    """

    def __init__(self, d: int, size: int, seed: int, name: str) -> None:
        self.d, self.size, self.key, self.reach = d, size, f"{seed}:{name}", d
        self._drawn: tuple[Tensor, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_drawn": ()}  # drawn again by whoever unpickles it

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def draw(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """What P is made of, on the device; drawn once."""
        if not self._drawn:
            digest = hashlib.blake2b(self.key.encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            with torch.device("cpu"), torch.no_grad():  # a default device of the caller's must not matter
                self._drawn = self._draw(generator)
        if self._drawn[0].device != torch.device(device):
            self._drawn = tuple(t.to(device) for t in self._drawn)
        return self._drawn

    def project(self, theta: Tensor) -> Tensor:
        """P theta: (d) -> (size), in float32 or wider. Differentiable; nothing is kept for backward."""
        out: Tensor = _Linear.apply(theta, self, False)
        return out

    def adjoint(self, moved: Tensor) -> Tensor:
        """P^T moved: (size) -> (d)."""
        out: Tensor = _Linear.apply(moved, self, True)
        return out

    def _project(self, theta: Tensor) -> Tensor:
        raise NotImplementedError

    def _adjoint(self, moved: Tensor) -> Tensor:
        raise NotImplementedError


class Fastfood(Projection):
    """P = H G Pi H B / sqrt(size * sum G^2), its first `size` rows; L = 2^ceil(log2 size), B = +-1, Pi a permutation,
    G ~ N(0, 1), H unnormalised (Le, Sarlos and Smola 2013, as in Li et al., arXiv:1804.08838).

    O(L log L) time and 8 L bytes. Columns have unit norm where size = L, and in expectation otherwise. Where d > L only
    the first L coordinates act.
    """

    def __init__(self, d: int, size: int, seed: int, name: str) -> None:
        super().__init__(d, size, seed, name)
        self.length = 1 << (size - 1).bit_length()
        self.reach = min(d, self.length)

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        signs = torch.randint(0, 2, (self.reach,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        order = torch.randperm(self.length, generator=generator)
        gauss = _normal(self.length, generator)
        return signs, order.to(torch.int32), (gauss / (self.size * gauss.square().sum()).sqrt()).float()

    def _project(self, theta: Tensor) -> Tensor:
        signs, order, gauss = self.draw(theta.device)
        x = theta.new_zeros(self.length)
        x[: self.reach] = theta[: self.reach] * signs
        return fwht(fwht(x).index_select(0, order).mul_(gauss))[: self.size]

    def _adjoint(self, moved: Tensor) -> Tensor:
        signs, order, gauss = self.draw(moved.device)
        x = moved.new_zeros(self.length)
        x[: self.size] = moved
        x = fwht(torch.zeros_like(x).index_add_(0, order, fwht(x).mul_(gauss)))
        out = moved.new_zeros(self.d)
        out[: self.reach] = x[: self.reach] * signs
        return out


class Dense(Projection):
    """P with N(0, 1) entries and columns scaled to unit norm (Li et al., arXiv:1804.08838). 4 size d bytes."""

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        matrix = _normal(self.size * self.d, generator).view(self.size, self.d)
        return ((matrix / matrix.norm(dim=0)).float(),)

    def _project(self, theta: Tensor) -> Tensor:
        return self.draw(theta.device)[0].to(theta.dtype) @ theta

    def _adjoint(self, moved: Tensor) -> Tensor:
        return self.draw(moved.device)[0].to(moved.dtype).T @ moved


class _Linear(torch.autograd.Function):
    """P v or P^T v; each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, projection: Projection, transposed: bool) -> Tensor:
        ctx.projection, ctx.transposed, ctx.dtype = projection, transposed, vector.dtype
        wide = vector.to(torch.promote_types(vector.dtype, torch.float32))
        return projection._adjoint(wide) if transposed else projection._project(wide)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Linear.apply(grad, ctx.projection, not ctx.transposed).to(ctx.dtype), None, None


# --- layers with moved tensors ----------------------------------------------------------------------------------------


@dataclass
class Reparametrisation:
    """A layer y = call(x, *tensors) with tensors base + shift.

    Args:
        call: (x, *tensors) -> y; of `layout` None any function without state, which backward calls a second time.
        shift: (*vectors) -> one difference per tensor, of its shape.
        layout: Where call is linear in x: "out,in" or "in,out", that of the first tensor; a second one is the bias.
    """

    call: Callable[..., Tensor]
    shift: Callable[..., Sequence[Tensor]]
    layout: str | None = None


def reparametrised(
    spec: Reparametrisation, x: Tensor, bases: Sequence[Tensor | None], vectors: Sequence[Tensor]
) -> Tensor:
    """call(x, *(bases + shift(*vectors))), keeping x, the bases and the vectors for backward, and nothing new.

    Gradients reach x, the bases and the vectors, once (no second derivative). A base of None counts as zero, in x's dtype.
    """
    out: Tensor = _Recomputed.apply(spec, len(bases), x, *bases, *vectors)
    return out


def moved(bases: Sequence[Tensor | None], shifts: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """bases + shifts, added in the wider dtype and given in the base's (without a base: x's)."""
    pairs = zip(bases, shifts, strict=True)
    return [s.to(x.dtype) if b is None else (b.to(s.dtype) + s).to(b.dtype) for b, s in pairs]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Reparametrisation, count: int, x: Tensor, *tensors: Tensor | None) -> Tensor:
        device = x.device.type
        ctx.spec, ctx.count = spec, count
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(x, *tensors)
        return spec.call(x, *moved(tensors[:count], spec.shift(*tensors[count:]), x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        bases, vectors = tensors[: ctx.count], tensors[ctx.count :]
        with torch.enable_grad():
            leaves = [v.detach().requires_grad_() for v in vectors]
            shifts = ctx.spec.shift(*leaves)
        with torch.autocast(ctx.autocast[0], *ctx.autocast[1:]):
            at = moved(bases, [s.detach() for s in shifts], x)
            dx, *dtensors = _gradients(ctx.spec, x, at, grad, ctx.needs_input_grad[2])
        wide = [d.to(s.dtype).reshape(s.shape) for d, s in zip(dtensors, shifts, strict=True)]
        dvectors = torch.autograd.grad(shifts, leaves, wide, allow_unused=True)
        return None, None, dx, *(d if b is not None else None for d, b in zip(dtensors, bases, strict=True)), *dvectors


def _gradients(spec: Reparametrisation, x: Tensor, at: list[Tensor], grad: Tensor, want_x: bool) -> list[Any]:
    """[dx or None, one per tensor]."""
    if spec.layout is None:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(want_x), *(t.detach().requires_grad_() for t in at)]
            wanted = inputs if want_x else inputs[1:]
            found = torch.autograd.grad(spec.call(*inputs), wanted, grad)
        return list(found) if want_x else [None, *found]
    weight = at[0] if spec.layout == "out,in" else at[0].T
    rows, sent = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    dweight = sent.T @ rows if spec.layout == "out,in" else rows.T @ sent
    return [grad @ weight if want_x else None, dweight, *(sent.sum(0) for _ in at[1:])]
