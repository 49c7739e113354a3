"""Adapters that train a low-rank product: the forward of any (`ProductLayer`), and those whose product starts as a part
of the weight, dW = s (B A - B0 A0).

Shapes: A and A0 (r, n), B and B0 (m, r). Of the latter, papers overwrite W with its residual W - s B0 A0 and train A and B
beside it. Here W stays as it is and the frozen A0, B0 are subtracted instead, as

    dW = s [B, B - B0] [A - A0; A0],

which is exactly zero at the start whatever B0 A0 is, and loses nothing to cancellation later.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn import functional as F

from hfgen.kit import checks
from hfgen.kit.adapter import DeltaConfig, DeltaLayer, DeltaTuner


def block_of(name: str) -> int | None:
    """Index of the block a module stands in: the first number in its path, e.g. 3 in `encoder.layer.3.mlp.fc1`."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


@dataclass
class LowRankConfig(DeltaConfig):
    """Fields of adapters that train a product of two low-rank factors.

    Args:
        r: Rank of the trained product, at most min(m, n) of every target.
        alpha: The constant in front of the product is alpha / r; None = r, so that it is 1.
        start_block: Blocks (layers) with a smaller index, and modules outside blocks, are not adapted. 0 = every target is.
    """

    r: int = field(default=8, metadata={"help": "Rank, at most min(in, out) features of every target."})
    alpha: float | None = field(default=None, metadata={"help": "Scale is alpha / r; None = r."})
    start_block: int = field(default=0, metadata={"help": "First block (layer) that is adapted."})

    def __post_init__(self) -> None:
        owner = type(self).__name__
        checks.integer(owner, "r", self.r, 1)
        if self.alpha is not None:
            checks.number(owner, "alpha", self.alpha, 0.0)
        checks.integer(owner, "start_block", self.start_block, 0)
        if self.start_block and self.layers_to_transform is not None:
            raise ValueError(
                f"{owner}.start_block is {self.start_block} and layers_to_transform is {self.layers_to_transform!r}; "
                "give one of them"
            )
        super().__post_init__()

    @property
    def scaling(self) -> float:
        """s, the constant in front of the product."""
        return 1.0 if self.alpha is None else self.alpha / self.r


BLOCK = 1 << 20  # entries of dW looked at in one go by `importance`


def importance(x: Tensor, g: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum |dW o dL/ddW| / sqrt(mn) of dW = left right (m, n), a float64 scalar, in blocks of rows: neither matrix is made.

    Args:
        x: The layer's input (..., n).
        g: The gradient dL/dy at its output (..., m); its dtype is that of the products.
        left, right: (m, r) and (r, n).
    """
    x, g = x.reshape(-1, x.shape[-1]).to(g.dtype), g.reshape(-1, g.shape[-1])
    (m, n), rows = (len(left), right.shape[1]), max(1, BLOCK // right.shape[1])
    total = torch.zeros((), dtype=torch.float64, device=g.device)
    for block, grad in zip(left.split(rows), g.T.split(rows), strict=True):
        total += (block @ right).mul_(grad @ x).abs_().sum().double()
    return total / (m * n) ** 0.5


def orthogonality_gradient(matrix: Tensor) -> Tensor:
    """d ||M M^T - I||_F / dM of M (k, n): 2 (M M^T - I) M over that norm; zero where the norm is."""
    gap = matrix @ matrix.T - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return 2 * gap / gap.norm().clamp_min(torch.finfo(gap.dtype).tiny) @ matrix


def add_orthogonality(a: nn.Parameter, b: nn.Parameter, factor: float, grad_scale: Tensor | None = None) -> None:
    """Add the gradient of factor (||A A^T - I||_F + ||B^T B - I||_F) to those of A (r, n) and B (m, r).

    `grad_scale` is an optimizer's own, where gradients are still multiplied with it (fused ones under GradScaler).
    """
    for p, matrix in ((a, a), (b, b.T)):
        term = orthogonality_gradient(matrix) * (factor if grad_scale is None else factor * grad_scale)
        term = (term if p is a else term.T.contiguous()).to(p.dtype)
        p.grad = term if p.grad is None else p.grad.add_(term)


class _Scored(torch.autograd.Function):
    """delta as it is; in the backward `take` gets the `importance` of the factors, with the loss's own gradient."""

    @staticmethod
    def forward(
        ctx: Any, delta: Tensor, x: Tensor, left: Tensor, right: Tensor, take: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x, left, right)  # which the products have saved already
        ctx.take = take
        return delta.view_as(delta)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, left, right = ctx.saved_tensors  # once: checkpointing computes them anew
        ctx.take(importance(x, g, left, right))
        return g, None, None, None, None


@torch.compiler.disable
def scored(delta: Tensor, x: Tensor, left: Tensor, right: Tensor, take: Callable[[Tensor], None]) -> Tensor:
    """delta = x right^T left^T (..., m), unchanged; its backward calls `take(importance)`. A graph break when compiled."""
    out: Tensor = _Scored.apply(delta, x.detach(), left.detach(), right.detach(), take)
    return out


class ProductLayer(DeltaLayer):
    """dW = left right, with the factors of `lora_factors`."""

    @abstractmethod
    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """right (r, n) and left (m, r): the LoRA with the same function at scaling 1."""

    def delta_forward(self, adapter_name: str, x: Tensor) -> Tensor:
        right, left = self.lora_factors(adapter_name)
        return F.linear(F.linear(self._cast_input_dtype(x, right.dtype), right), left)

    def delta_vector(self, adapter_name: str, x: Tensor) -> Tensor:
        right, left = self.lora_factors(adapter_name)
        return left.double() @ (right.double() @ x.double())

    def delta_weight(self, adapter_name: str) -> Tensor:
        right, left = self.lora_factors(adapter_name)
        if left.device.type == "cpu":  # half-precision products are slow there and lose the small ones
            left, right = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (left, right))
        return left @ right


class LowRankLayer(ProductLayer):
    """Subclasses set `prefix` and implement `factorise`.

    The four factors are parameters `<prefix>_A`, `_B` (trained), `_A0` and `_B0` (frozen), and all four are saved: a part
    of the spectrum recomputed on another machine may be cut elsewhere, so the file alone says what is subtracted.

    Attributes:
        prefix: The method's name.
    """

    prefix: ClassVar[str]

    def setup(self) -> None:
        self.adapter_layer_names = tuple(f"{self.prefix}_{part}" for part in ("A", "B", "A0", "B0"))
        self.other_param_names = ("_scaling", "_awaited")
        # Frozen parameters and not buffers: whatever casts or shards the trained factors does the same to these.
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._scaling: dict[str, float] = {}
        self._awaited: dict[str, Any] = {}  # configs of adapters whose factors are to come from a file
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())

    @abstractmethod
    def factorise(self, config: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        """B0 (m, r) and A0 (r, n) of the weight (m, n), given in float32 or wider; `config.scaling` B0 A0 is subtracted."""

    def build(self, adapter_name: str, config: Any, weight: Tensor) -> None:
        """The weight is factorised, but where a config that was saved with factors says that those will be loaded."""
        (m, n), r = weight.shape, config.r
        if r > min(m, n):
            raise ValueError(
                f"{type(config).__name__}.r is {r}, but {self.module_name} is {m} x {n} and has {min(m, n)} components; "
                f"give r up to {min(m, n)}, or leave the module out"
            )
        if self.module_name in config._fingerprint:
            self._awaited[adapter_name] = config
        if weight.is_meta or adapter_name in self._awaited:
            b0, a0 = weight.new_full((m, r), torch.nan), weight.new_full((r, n), torch.nan)
        else:
            b0, a0 = self.factorise(config, weight)
        a, b = self._start(config, a0, b0)
        for name, value in zip(self.adapter_layer_names, (a, b, a0, b0), strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(value.contiguous())
        self.frozen_peft_weight_names[adapter_name] = self.adapter_layer_names[2:]
        self._scaling[adapter_name] = config.scaling

    @staticmethod
    def _start(config: Any, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
        a, b = a0.clone(), b0.clone()
        if not config.init_weights:
            b += b0.abs().mean().clamp_min(1 / len(b0)) * torch.randn_like(b0).clamp(-3, 3)
        return a, b

    def cast_adapter(self, adapter_name: str) -> None:
        super().cast_adapter(adapter_name)
        self._freeze_non_trainable_peft_weights(adapter_name)  # a new tensor in a ParameterDict wants a gradient

    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """[A - A0; A0] (2r, n) and s [B, B - B0] (m, 2r): the LoRA with the same function at scaling 1.

        Where a host has cast only what trains (trl does, on quantised models), A0 and B0 are rounded alike.
        """
        a, b, a0, b0 = (getattr(self, name)[adapter_name] for name in self.adapter_layer_names)
        a0, b0, scaling = a0.to(a.dtype), b0.to(b.dtype), self._scaling[adapter_name]
        left = torch.cat([b, b - b0], 1)
        return torch.cat([a - a0, a0]), left if scaling == 1.0 else left * scaling

    def was_loaded(self, adapter_name: str) -> bool:
        b0 = getattr(self, self.adapter_layer_names[3])[adapter_name]
        return not (b0.is_meta or bool(b0.isnan().any()))

    @torch.compiler.disable
    def verify(self, adapter_name: str) -> None:
        """At the first use: an adapter started afresh with a config that was saved gets the factors it waits for."""
        config = self._awaited.pop(adapter_name, None)
        if config is not None and not self.was_loaded(adapter_name):
            if self.merged:
                self._awaited[adapter_name] = config
                raise ValueError(
                    f"adapter {adapter_name!r} cannot start while {self.merged_adapters} is merged; "
                    "call unmerge_adapter() first"
                )
            with torch.no_grad():
                weight = self._weight_2d()
                b0, a0 = self.factorise(config, weight.to(torch.promote_types(weight.dtype, torch.float32)))
                for name, value in zip(self.adapter_layer_names, (*self._start(config, a0, b0), a0, b0), strict=True):
                    getattr(self, name)[adapter_name].copy_(value)
        super().verify(adapter_name)

    def needs_this_base(self, adapter_name: str) -> bool | None:
        return False


class LowRankTuner(DeltaTuner):
    """The tuner of a low-rank method."""

    @staticmethod
    def _check_target_module_exists(peft_config: LowRankConfig, key: str) -> Any:
        found = BaseTuner._check_target_module_exists(peft_config, key)
        block = block_of(key)
        return found if not peft_config.start_block or (block or 0) >= peft_config.start_block else False

    def _prepare_model(self, peft_config: LowRankConfig, model: nn.Module) -> None:
        last = max((block_of(name) or 0 for name, _ in model.named_modules()), default=0)
        if peft_config.start_block > last:
            raise ValueError(
                f"{type(peft_config).__name__}.start_block is {peft_config.start_block}, but the model's blocks are 0 to "
                f"{last}; give at most {last}"
            )
        super()._prepare_model(peft_config, model)

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As saved: A0 and B0 rounded as the forward rounds them, or a file would have another function than the run."""
        found = super()._get_adapter_state_dict(*args, **kwargs)
        for part in ("A", "B"):
            here = f".{cls.prefix}{part}"
            for key in [key for key in found if f"{here}0." in key]:
                found[key] = found[key].to(found[key.replace(f"{here}0.", f"{here}.")].dtype)
        return found
