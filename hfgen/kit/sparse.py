"""Adapters that train single entries of the base tensors: the values live inside the weight, so a forward costs what
the base's costs.

A `SparseLayer` keeps, per adapter, the flat indices of the chosen entries of its module's weight and bias (int32), what
stood there (the undo buffer) and one trainable vector of what stands there now. Before a forward the vector is written
into the weight in place; disabling, switching and saving write the old entries back, to the bit. The gradient is torch's
own for a dense weight, of which only the chosen entries are kept; the base is never a trained parameter.

Where writing in place is impossible (a quantised weight) or would reach another module (a tied weight), the layer adds
x dW^T with a scattered dW instead, which costs a second product.

Shapes: nnz = chosen entries of one module, the weight's first, then the bias's.
"""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from hfgen.kit import checks
from hfgen.kit.adapter import DeltaLayer, DeltaTuner, _unpacked_bnb, probe, quantization_backend
from hfgen.kit.steps import Stepwise, refuse_sharded

CHUNK = 1 << 22  # entries looked at in one go by `kth_smallest`
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


# --- mathematics ------------------------------------------------------------------------------------------------------


def kth_smallest(tensors: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The k-th smallest (from 1) |entry| of all tensors together: exact, in O(CHUNK) memory, by radix selection.

    For floats >= 0 the order of the numbers is the order of their bits, so each pass counts 16 bits of those entries
    that share the bits found so far: two passes for float32 and narrower, four if a float64 tensor is among them.

    Args:
        tensors: Called once per pass; gives the tensors, of any floating dtype and device.

    Raises:
        ValueError: there are fewer than k entries.
    """
    wide = any(t.dtype == torch.float64 for t in tensors())
    number, word = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    found, left = 0, k
    for shift in range(word.itemsize * 8 - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for tensor in tensors():
            for part in tensor.detach().reshape(-1).split(CHUNK):
                bits = part.to(number).abs().view(word)
                if shift < word.itemsize * 8 - 16:
                    bits = bits[(bits >> (shift + 16)) == found]
                counts += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16).cpu()
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, left))
        if digit == len(counts):
            raise ValueError(f"the {k}-th smallest of {int(below[-1])} entries was asked for")
        left -= int(below[digit] - counts[digit])
        found = (found << 16) | digit
    return float(torch.tensor(found, dtype=word).view(number))


def polar_factor(matrix: Tensor, quintic: int = 5, cubic: int = 4) -> Tensor:
    """U V^T (m, n) of M = U diag(s) V^T (m, n), the gradient of the nuclear norm, by Newton-Schulz products only.

    Singular values above about 0.01 s_max come out as 1 to three digits, zero stays zero; those between are drawn
    towards 1, which lies in the subdifferential's range [0, 1] of what s = 0 allows. A zero matrix gives zeros.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(quintic):  # lifts small singular values quickly, to about 0.7..1.2
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    for _ in range(cubic):  # converges to 1
        x = 1.5 * x - 0.5 * (x @ x.T) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def below(tensor: Tensor, threshold: float) -> Tensor:
    """{|w| < threshold}, compared in float32 or wider: rounding the threshold to bf16 would move the mask."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).abs() < threshold


def check_amount(owner: str, threshold: Any, density: Any) -> None:
    """Raises where a threshold (> 0) or a density (0 < d <= 1) is wrong, or both are given."""
    for name, value, high in (("threshold", threshold, math.inf), ("density", density, 1.0)):
        if value is not None:
            checks.number(owner, name, value, 0.0, high)
    if threshold is not None and density is not None:
        raise ValueError(f"{owner}.threshold is {threshold} and density is {density}; give one of them")


def magnitude_threshold(
    owner: str, threshold: float | None, density: float, tensors: Callable[[], Iterable[Tensor]]
) -> float:
    """The threshold given; else that below which a share `density` of all entries lies (one at least; ties are all in).

    Raises:
        ValueError: a tensor is on the meta device, or no entry is below the threshold.
    """
    if any(t.is_meta for t in tensors()):
        raise ValueError(f"the model is on the meta device, and {owner} chooses entries by their values; load it first")
    if threshold is None:
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors()) else torch.float32
        wanted = max(1, round(density * sum(t.numel() for t in tensors())))
        last = torch.tensor(kth_smallest(tensors, wanted), dtype=dtype)
        return float(torch.nextafter(last, torch.full_like(last, math.inf)))
    if not any(bool(below(t, threshold).any()) for t in tensors()):
        raise ValueError(
            f"{owner}.threshold is {threshold} and no targeted entry is below it; raise it or give density"
        )
    return threshold


def nuclear_gradient(shape: tuple[int, ...], index: Tensor, entries: Tensor) -> Tensor:
    """d ||S||_* / d entries (nnz): (U V^T) at `index`, for the matrix S = U diag(s) V^T (m, n) that holds only them."""
    wide = torch.promote_types(entries.dtype, torch.float32)
    matrix = torch.zeros(math.prod(shape), dtype=wide, device=entries.device)
    return polar_factor(matrix.put_(index, entries.to(wide)).view(shape)).take(index)


def mask_hash(facts: Any, parts: list[Tensor]) -> int:
    """A 64-bit number (signed) of which entries are chosen of what (its repr), equal on every machine."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8)
    for part in parts:
        digest.update(part.cpu().to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


# --- what of a model can be thinned -----------------------------------------------------------------------------------


def is_plain(module: nn.Module) -> bool:
    """A linear, convolution or normalisation layer with a weight of its own (norms are told by their class's name)."""
    kind = isinstance(module, (nn.Linear, Conv1D, *_CONV)) or type(module).__name__.rstrip("123d").endswith("Norm")
    return kind and isinstance(module._parameters.get("weight"), Tensor)


def _takes_adapters(module: nn.Module) -> bool:
    return isinstance(module, SparseLayer) or hasattr(module, "hfgen_backend")


def base_tensors(base: nn.Module, backend: Any, tied: bool) -> list[Tensor]:
    """The tensors of a layer that are looked at: weight and bias; the weight only of a quantised or tied layer."""
    if backend is not None:
        with _unpacked_bnb(base):
            return [backend.get_base_weight(base).detach()]
    found = [base._parameters.get(name) for name in ("weight", "bias")]
    return [t.data for t in found[: 1 if tied else 2] if t is not None]


def tied_weights(model: nn.Module) -> set[int]:
    """ids of the parameters that several modules hold."""
    counts = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {key for key, n in counts.items() if n > 1}


# --- autograd ---------------------------------------------------------------------------------------------------------


class _Overlay(torch.autograd.Function):
    """(values...) -> the base tensors they are written into, as aliases; backward picks dvalues out of the dense dW."""

    @staticmethod
    def forward(ctx: Any, layer: SparseLayer, names: list[str], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.layer, ctx.names, ctx.written, ctx.dtypes = layer, names, layer._written, [v.dtype for v in values]
        # torch then tells of an optimizer step between forward and backward
        ctx.save_for_backward(*(getattr(layer, layer.values_name)[name] for name in names))
        # .data: an alias that does not see the writes of a switch away and back (DPO's reference pass) as a fault
        return tuple(t.data for t in layer.tensors())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer, out, _ = ctx.layer, [], ctx.saved_tensors
        if layer._written != ctx.written:
            raise RuntimeError(
                f"the adapters of {layer.module_name} were switched between forward and backward; switch back before "
                "backward, or run it first"
            )
        for name, dtype in zip(ctx.names, ctx.dtypes, strict=True):
            picked = torch.cat([g.take(i) for g, i in zip(grads, layer.indices(name), strict=True)]).to(dtype)
            out.append(picked * layer.scales[name] if name in layer.scales else picked)
        return None, None, *out


@contextmanager
def _swapped(module: nn.Module, tensors: Iterable[Tensor]) -> Iterator[None]:
    """The module's weight and bias are these tensors within (torch.func.functional_call in one microsecond)."""
    own = module._parameters
    before = [(name, own[name]) for name in ("weight", "bias") if own.get(name) is not None]
    try:
        for (name, _), tensor in zip(before, tensors, strict=True):
            own[name] = tensor  # type: ignore[assignment]
        yield
    finally:
        own.update(before)


# --- without an adapter ----------------------------------------------------------------------------------------------


class SparseAdamW(torch.optim.AdamW):
    """AdamW over chosen entries of a model's own parameters; every other entry stays as it is.

    Each parameter with chosen entries gives one flat float32 (or wider) vector of them, which AdamW trains (state 2 nnz)
    and `step` writes back. A parameter's dense gradient is thinned out and freed as soon as it is accumulated, so
    `p.grad` stays None: clip `optimizer.values`, e.g. ``clip_grad_norm_(optimizer.values, 1.0)``.

    Args:
        chosen: (parameter, bool mask of its shape) pairs.
        **kwargs: torch.optim.AdamW's own (lr, betas, eps, weight_decay, ...).

    Attributes:
        values: The trained vectors, in the order of the parameters that have chosen entries.
    """

    def __init__(self, chosen: Iterable[tuple[Tensor, Tensor]], **kwargs: Any) -> None:
        self.dense: list[tuple[Tensor, Tensor, nn.Parameter]] = []
        self._hooks: list[RemovableHandle] = []
        for p, mask in chosen:
            refuse_sharded(type(self).__name__, p)
            index, target = mask.reshape(-1).nonzero().flatten(), None
            if len(index):
                start = p.detach().take(index).to(torch.promote_types(p.dtype, torch.float32))
                target = (p, index.to(torch.int32) if p.numel() < 2**31 else index, nn.Parameter(start))
                self.dense.append(target)
            self._hooks.append(p.register_post_accumulate_grad_hook(functools.partial(_thin, target)))
        self.values = [value for _, _, value in self.dense]
        super().__init__(self.values, **kwargs)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = super().step(closure)
        self.write()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """AdamW's own, and the values: of a bf16 model the parameters are their rounding."""
        return super().state_dict() | {"values": [value.detach() for value in self.values]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, values and all. Build the optimizer on the pretrained model first.

        Raises:
            ValueError: the values are of other entries (the optimizer was built on a model trained in between).
        """
        state_dict = dict(state_dict)
        values = state_dict.pop("values")
        if [v.shape for v in values] != [v.shape for v in self.values]:
            raise ValueError(
                f"the state holds {sum(v.numel() for v in values)} entries and this optimizer chose "
                f"{sum(v.numel() for v in self.values)}; build it on the pretrained model with the same options, then load"
            )
        super().load_state_dict(state_dict)
        with torch.no_grad():
            for own, loaded in zip(self.values, values, strict=True):
                own.copy_(loaded)
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Put the values into the parameters."""
        for p, index, value in self.dense:
            p.put_(index.long(), value.to(p.dtype))

    def remove(self) -> None:
        """Take the hooks off the parameters, whose gradients are dense again from then on."""
        while self._hooks:
            self._hooks.pop().remove()


def _thin(target: tuple[Tensor, Tensor, nn.Parameter] | None, p: Tensor) -> None:
    """Move the chosen entries of p's gradient to the vector's, and free the dense one."""
    if target is not None and p.grad is not None:
        _, index, value = target
        picked = p.grad.take(index.long()).to(value.dtype)
        value.grad = picked if value.grad is None else value.grad + picked
    p.grad = None


# --- the layer --------------------------------------------------------------------------------------------------------


class SparseLayer(Stepwise, DeltaLayer):
    """Subclasses set `values_name` and implement `choose`; `before_steps` where they `drive`.

    Attributes:
        values_name: Container of the trained vectors (nnz), e.g. `"sara_values"`.
        in_place: False where the weight is quantised or tied.
    """

    values_name: ClassVar[str]

    def setup(self) -> None:
        prefix = self.values_name.partition("_")[0]
        self.index_name, self.origin_name, self.hash_name = f"{prefix}_index", f"{prefix}_origin", f"{prefix}_mask_hash"
        self.adapter_layer_names = (self.values_name,)
        self.active_name = f"{prefix}_active"  # entries still trained (nnz), bool, where a mask shrinks
        self.other_param_names = (
            self.index_name,
            self.origin_name,
            self.hash_name,
            self.active_name,
            "_facts",
            "_kept",
            "_driven",
            "_first",
        )
        self.prepare_steps()
        setattr(self, self.values_name, nn.ParameterDict())
        setattr(self, self.index_name, BufferDict(persistent=False))
        setattr(self, self.origin_name, BufferDict(persistent=False))
        setattr(self, self.hash_name, BufferDict(persistent=True))
        setattr(self, self.active_name, BufferDict(persistent=True))
        self._kept: dict[str, Tensor] = {}
        self.in_place = self.quantization_backend is None
        self._facts: dict[str, dict[str, Any]] = {}
        self._written: tuple[tuple[str, float], ...] = ()  # adapters whose values stand in the weight, with their scale
        self._versions: list[tuple[int, int]] = []  # of those values when they were written
        self.register_state_dict_pre_hook(_pristine_before_saving)

    @abstractmethod
    def choose(self, adapter_name: str, config: Any, tensors: list[Tensor]) -> list[Tensor]:
        """One bool mask per base tensor, of its shape. The tensors are never to be written to."""

    def shrinks(self, config: Any) -> bool:
        """Whether `freeze` will be used, so that what is still trained must be kept and saved."""
        return False

    def trained(self, name: str) -> Tensor:
        """The values (nnz), detached where they no longer train."""
        values: Tensor = getattr(self, self.values_name)[name]
        active = getattr(self, self.active_name)
        return torch.where(active[name], values, values.detach()) if name in active else values

    def freeze(self, name: str, active: Tensor) -> None:
        """Train only these entries (nnz, bool) from now on; needs `shrinks` in `build`, and `drive`."""
        getattr(self, self.active_name)[name].copy_(active)

    def before_step(self, name: str) -> None:
        if name in getattr(self, self.active_name):
            self._kept[name] = getattr(self, self.values_name)[name].detach().clone()

    def after_step(self, name: str) -> None:
        kept = self._kept.pop(name, None)
        if kept is not None:  # weight decay and old momentum move an entry without gradient too
            values = getattr(self, self.values_name)[name]
            values.copy_(torch.where(getattr(self, self.active_name)[name], values, kept))

    def build(self, adapter_name: str, config: Any, weight: Tensor) -> None:
        if weight.is_meta:
            raise ValueError(
                f"{self.module_name} is on the meta device, and {type(config).__name__} chooses entries by their values; "
                "load the base model first"
            )
        base = self.get_base_layer()
        if not config.inference_mode:
            refuse_sharded(type(config).__name__, base._parameters.get("weight"))
        self.in_place = self.in_place and id(base._parameters.get("weight")) not in config._tied
        if not self.in_place and (isinstance(base, _CONV) or self.in_features is None):
            raise ValueError(
                f"{self.module_name} shares its weight with another module; leave it out of target_modules"
            )
        tensors = self.tensors() if self.in_place else [self._weight()]
        parts = [m.reshape(-1).nonzero().flatten() for m in self.choose(adapter_name, config, tensors)]
        code = mask_hash([(str(t.dtype), *t.shape) for t in tensors], parts)
        narrow = torch.int32 if max(t.numel() for t in tensors) < 2**31 else torch.int64
        origin = torch.cat([t.take(i) for t, i in zip(tensors, parts, strict=True)])
        start = origin.to(torch.promote_types(origin.dtype, torch.float32), copy=True)
        if not config.init_weights:
            start += weight.abs().mean() * torch.randn_like(start).clamp(-3, 3)
        self._facts[adapter_name] = {
            "config": config, "split": [len(i) for i in parts], "hash": code, "start": start.cpu().clone(),
        }  # fmt: skip
        getattr(self, self.index_name)[adapter_name] = torch.cat(parts).to(narrow)
        getattr(self, self.origin_name)[adapter_name] = origin if self.in_place else origin.to(start.dtype)
        getattr(self, self.hash_name)[adapter_name] = torch.tensor([code], device=origin.device)
        getattr(self, self.values_name)[adapter_name] = nn.Parameter(start)
        if self.shrinks(config):
            getattr(self, self.active_name)[adapter_name] = torch.ones(
                start.shape, dtype=torch.bool, device=start.device
            )

    def tensors(self) -> list[Tensor]:
        """The base tensors as they stand, with whatever values are written into them."""
        return base_tensors(self.get_base_layer(), None, tied=False)

    def indices(self, name: str) -> list[Tensor]:
        """The chosen entries, int64 flat indices, per tensor."""
        return list(getattr(self, self.index_name)[name].long().split(self._facts[name]["split"]))

    def shift(self, name: str) -> Tensor:
        """values - origin (nnz), in the values' dtype."""
        values = self.trained(name)
        return values - getattr(self, self.origin_name)[name].to(values.dtype)

    # --- writing into the weight --------------------------------------------------------------------------------------
    def _wanted(self) -> tuple[tuple[str, float], ...]:
        names = self.merged_adapters if self.merged else [] if self.disable_adapters else self.active_adapters
        return tuple((n, self.scales.get(n, 1.0)) for n in names if self._has(n))

    @torch.no_grad()
    def _write(self, wanted: tuple[tuple[str, float], ...]) -> None:
        """Make `wanted` what stands in the base tensors: their origin, plus each scale * (values - origin)."""
        alone = len(wanted) == 1 and wanted[0][1] == 1.0  # then the values themselves, with no rounding of a sum
        for name, _ in self._written:
            if not (alone and name == wanted[0][0]):
                self._put(name, getattr(self, self.origin_name)[name])
        for name, scale in wanted:
            values = getattr(self, self.values_name)[name]
            if not alone:
                now = torch.cat([t.take(i) for t, i in zip(self.tensors(), self.indices(name), strict=True)])
                values = now.to(values.dtype) + scale * self.shift(name)
            self._put(name, values)
        self._written, self._versions = wanted, [self._version(n) for n, _ in wanted]

    def _put(self, name: str, new: Tensor) -> None:
        index = self.indices(name)
        for tensor, i, part in zip(self.tensors(), index, new.detach().split([len(i) for i in index]), strict=True):
            if tensor.is_meta:
                raise ValueError(
                    f"the weight of {self.module_name} is off-loaded, so nothing can be written into it; load the model "
                    "without an off-load (device_map) or leave the module out of target_modules"
                )
            tensor.put_(i, part.to(tensor.dtype))

    def _version(self, name: str) -> tuple[int, int]:
        values = getattr(self, self.values_name)[name]
        return values.data_ptr(), values._version

    def sync(self) -> None:
        """Bring the weight up to date. In training it is written each time: optimizers may write without torch knowing."""
        wanted = self._wanted()
        fresh = wanted == self._written and self._versions == [self._version(n) for n, _ in wanted]
        if not fresh or (wanted and self.training and not self.merged):
            self._write(wanted)

    def _check_host(self) -> None:
        """Raises, once and only in training, where the weights are in pieces."""
        trained = [n for n, _ in self._wanted() if getattr(self, self.values_name)[n].requires_grad]
        if self.training and trained and not self._checked:
            owner = type(self._facts[trained[0]]["config"]).__name__
            refuse_sharded(owner, getattr(self, self.values_name)[trained[0]], self)
            self._checked = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._versions = []  # of the original's tensors

    # --- casts --------------------------------------------------------------------------------------------------------
    def undo_casts(self) -> None:
        """The values in float32 again: trl casts what trains on a bitsandbytes model to bfloat16.

        Where the cast rounded what the adapter started from or was loaded with, that comes back. Anything else has lost
        what it lost. `autocast_adapter_dtype=False` is no cast to undo: it narrows the undo buffer too.
        """
        for name, facts in self._facts.items():
            values, origin = getattr(self, self.values_name)[name], getattr(self, self.origin_name)[name]
            wide = torch.promote_types(values.dtype, origin.dtype)
            if values.is_meta or isinstance(values, DTensor) or wide == values.dtype:
                continue
            known = [t for t in (facts.get("loaded"), facts["start"]) if t is not None]
            same = (t for t in known if torch.equal(t.to(values.dtype), values.detach().cpu()))
            values.data = next(same, values.data).to(values.device, wide)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.undo_casts()
        super()._load_from_state_dict(*args)
        for name, facts in self._facts.items():
            values = getattr(self, self.values_name)[name]
            facts["loaded"] = None if values.is_meta or isinstance(values, DTensor) else values.detach().cpu().clone()

    # --- the contract with peft ---------------------------------------------------------------------------------------
    def get_base_weight(self) -> Tensor:
        if self.in_place and not self.merged:
            self._write(())
        weight: Tensor = super().get_base_weight()
        return weight

    def _weight_2d(self) -> Tensor:
        weight = super()._weight_2d()
        return weight.flatten(1) if weight.ndim > 1 else weight[None]

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._switched()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._switched()

    def _switched(self) -> None:
        """Write at once: a backward may come before the next forward."""
        wanted = self._wanted()
        if (
            self.in_place
            and not self.merged
            and all(getattr(self, self.values_name)[n].device.type != "meta" for n, _ in wanted)
        ):
            self._write(wanted)

    def delete_adapter(self, adapter_name: str) -> None:
        if self.in_place and adapter_name in dict(self._written):
            self._write(())
        super().delete_adapter(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # dW is sparse, of any rank

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            self._check_host()
        if not self.in_place:
            return super().forward(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self._unverified and not self.disable_adapters:
            for name in self.active_adapters:
                self.verify(name)
                self.forget_first(name)
        if torch.compiler.is_compiling():
            return self._traced(x, *args, **kwargs)
        self.sync()
        names = [n for n, _ in self._written if not self.merged and getattr(self, self.values_name)[n].requires_grad]
        if not names or not torch.is_grad_enabled():
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        for name in set(names) & set(self._driven):
            self.refuse_unseen_steps(name, self.values_name, getattr(self, self.values_name)[name])
        alias = _Overlay.apply(self, names, *(self.trained(n) for n in names))
        with _swapped(self.get_base_layer(), alias):
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]

    def _traced(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The forward as torch.compile sees it: the values put into a copy of the weight, which no step can outdate."""
        wanted, base = self._wanted(), self.get_base_layer()
        if not wanted or self.merged:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        flat = [t.reshape(-1) for t in self.tensors()]
        for name, scale in wanted:
            alone = len(wanted) == 1 and scale == 1.0
            new = self.trained(name) if alone else getattr(self, self.origin_name)[name]
            flat = self._put_out(flat, name, new, accumulate=False)
        for name, scale in wanted if not alone else ():
            flat = self._put_out(flat, name, scale * self.shift(name), accumulate=True)
        shaped = [f.view(t.shape) for f, t in zip(flat, self.tensors(), strict=True)]
        return functional_call(base, dict(zip(("weight", "bias"), shaped, strict=False)), (x, *args), kwargs)  # type: ignore[no-any-return]

    def _put_out(self, flat: list[Tensor], name: str, new: Tensor, accumulate: bool) -> list[Tensor]:
        index = self.indices(name)
        parts = new.split(self._facts[name]["split"])
        return [f.index_put((i,), v.to(f.dtype), accumulate) for f, i, v in zip(flat, index, parts, strict=True)]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if not self.in_place:
            super().merge(safe_merge, adapter_names)
            return
        for name in [n for n in check_adapters_to_merge(self, adapter_names) if self._has(n)]:
            if self._unverified:
                self.verify(name)
            if safe_merge and not torch.isfinite(getattr(self, self.values_name)[name]).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.merged_adapters.append(name)
            self._write(self._wanted())

    def unmerge(self) -> None:
        """Write the old entries back, to the bit."""
        if not self.in_place or not self.merged:
            super().unmerge()
            return
        self.merged_adapters.clear()
        self._write(())

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.in_place and not self.merged:
            self._write(())
        return self.get_base_layer()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """dW in the layout of the base weight (for a merge of quantised bases; of a bias nothing is said)."""
        if self._unverified:
            self.verify(adapter_name)
        return self._scattered(adapter_name) * self.scales.get(adapter_name, 1.0)

    def _scattered(self, name: str) -> Tensor:
        shape = self._shape()
        index, shift = self.indices(name)[0], self.shift(name)
        return shift.new_zeros(math.prod(shape)).index_put((index,), shift[: len(index)]).view(shape)

    def _shape(self) -> tuple[int, ...]:
        if self.in_place:
            return tuple(self.get_base_layer()._parameters["weight"].shape)  # type: ignore[union-attr]
        return (self.in_features, self.out_features) if self.is_conv1d else (self.out_features, self.in_features)

    def delta_weight(self, adapter_name: str) -> Tensor:
        delta = self._scattered(adapter_name)
        return delta.T if self.is_conv1d else delta

    def delta_forward(self, adapter_name: str, x: Tensor) -> Tensor:
        delta = self.delta_weight(adapter_name)
        return F.linear(self._cast_input_dtype(x, delta.dtype), delta)

    # --- is this the base the adapter was trained on? -----------------------------------------------------------------
    def _delta_probe(self, adapter_name: str) -> list[float]:
        shift = self.shift(adapter_name).detach().double()
        return [float(shift @ probe(len(shift), i, shift)) for i in (0, 1)] + [float(shift.norm())]

    def was_loaded(self, adapter_name: str) -> bool:
        values, facts = getattr(self, self.values_name)[adapter_name], self._facts[adapter_name]
        if values.device.type == "meta":
            return False
        same = torch.equal(values.detach().cpu(), facts["start"].to(values.dtype))
        return not (same and int(getattr(self, self.hash_name)[adapter_name]) == facts["hash"])

    def check_loaded(self, adapter_name: str) -> str | None:
        try:
            self.compare_mask(adapter_name, getattr(self, self.hash_name)[adapter_name], None)
        except ValueError:
            self._unverified[adapter_name] = {}  # stays refused
            raise
        return None

    def compare_mask(self, adapter_name: str, stored: Tensor, nnz: int | None) -> None:
        """Raises ValueError when a file's mask (hash, and its entries) is not the one drawn from this base."""
        facts, now = self._facts[adapter_name], sum(self._facts[adapter_name]["split"])
        if int(stored) == facts["hash"]:
            return
        made, here = facts["config"].hfgen.get("base_dtype"), str(self.get_base_weight().dtype).removeprefix("torch.")
        raise ValueError(
            f"adapter {adapter_name!r} does not fit {self.module_name}: it trains {nnz or 'other'} entries chosen on a "
            f"{made} base, and of this {here} base the mask has {now} and another hash; load the base it was trained "
            f"on, with dtype=torch.{made}"
        )


def _pristine_before_saving(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    """`state_dict()` names the base's own weights; the next forward writes the values again."""
    assert isinstance(layer, SparseLayer)
    if layer.in_place and not layer.merged:
        layer._write(())


class SparseTuner(DeltaTuner):
    """The tuner of a sparse method: convolutions and norms besides linear layers, and the tensors they hold."""

    tuner_layer_cls: type[SparseLayer]

    def targets(self, config: Any, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(name, module) of what `config.target_modules` names, outside of adapters."""
        inside = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, BaseTunerLayer))
        names = [(n, m) for n, m in model.named_modules() if n and not n.startswith(inside)]
        return [(n, m) for n, m in names if self._check_target_module_exists(config, n)]

    def target_tensors(self, config: Any, model: nn.Module) -> Iterator[Tensor]:
        """The base tensors of all targets, one after the other, as they were before any adapter."""
        for _, module in self.targets(config, model):
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if isinstance(module, SparseLayer) and module.in_place and not module.merged:
                module._write(())
            backend = quantization_backend(base)
            if backend is not None or is_plain(base):
                yield from base_tensors(base, backend, id(base._parameters.get("weight")) in config._tied)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        peft_config._tied = tied_weights(model)
        if peft_config.target_modules == "all-tensors":
            peft_config.target_modules = {
                n for n, m in model.named_modules() if n and (is_plain(m) or _takes_adapters(m))
            }
        super()._prepare_model(peft_config, model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        linear = isinstance(target, (nn.Linear, Conv1D, BaseTunerLayer))
        if linear or not is_plain(target):
            super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key)
            return
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Unsupported layer type"
            )  # peft knows no sizes of norms, nor do we need any
            new = self.tuner_layer_cls(target, adapter_name, peft_config, module_name=current_key)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        mapped = BaseTuner._remap_adapter_state_dict_for_load.__func__(cls, model, config, adapter_name, state_dict)
        for name, layer in model.named_modules():
            if isinstance(layer, SparseLayer) and layer._has(adapter_name):
                stored = mapped.get(f"{name}.{layer.hash_name}.{adapter_name}")
                values = mapped.get(f"{name}.{layer.values_name}.{adapter_name}")
                if stored is not None:
                    layer.compare_mask(adapter_name, stored, None if values is None else values.numel())
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
