"""Adapters that act at optimizer steps: one pair of torch's global step hooks for all of them, and what is done there.

The hooks (`register_optimizer_step_pre_hook`, `..._post_hook`) come once per step whatever the accumulation, see every
torch.optim.Optimizer, need no call by the user, and go when no watched layer is left.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

_watched: weakref.WeakSet[Any] = weakref.WeakSet()
_handles: list[RemovableHandle] = []
_trainers: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()
_wrappers: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_SQUARE = {False: "exp_avg_sq", True: "max_exp_avg_sq"}


class Stepwise:
    """A `DeltaLayer` that hears of every optimizer step which trains one of its adapters (mixin, named before it).

    `setup` calls `prepare_steps` and lists `_driven` and `_first` in other_param_names; `build` calls `drive`.
    """

    adapter_layer_names: tuple[str, ...]
    module_name: str
    training: bool

    def prepare_steps(self) -> None:
        """Before any `drive`."""
        self._driven: dict[str, Any] = {}  # per adapter what drives it, mostly its config
        self._first: dict[str, Tensor | None] = {}  # values before a step was seen, None from then on
        self._checked = False

    def drive(self, adapter_name: str, by: Any) -> None:
        """From now on the steps of this adapter are heard of. Layers of one `by` are told together."""
        self._driven[adapter_name] = by
        _watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if self._driven:  # a copy is another layer
            _watch(self)

    @classmethod
    def on_step(cls, event: str, layers: list[Any], optimizer: Optimizer) -> None:
        """`event` ("before" or "after" a step of `optimizer`) for all live layers of this class: adapter by adapter."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        groups: dict[tuple[str, int], list[Any]] = {}
        for layer in layers:
            for name, by in layer._driven.items():
                if id(getattr(layer, layer.adapter_layer_names[0])[name]) in owned:
                    groups.setdefault((name, id(by)), []).append(layer)
        for (name, _), held in groups.items():
            if event == "after":
                for layer in held:
                    layer.after_step(name)
                held[0].after_steps(name, held, optimizer)
            elif any(p.grad is not None for layer in held for p in layer.trained_tensors(name)):
                # else it is another adapter's turn; a layer that was not called this time (an expert) takes part
                held[0].before_steps(name, held, optimizer)
                for layer in held:
                    layer._first[name] = None
                    layer.before_step(name)

    def trained_tensors(self, name: str) -> list[nn.Parameter]:
        """The adapter's parameters, in the order of `adapter_layer_names`."""
        return [getattr(self, attr)[name] for attr in self.adapter_layer_names]

    def before_steps(self, name: str, layers: list[Any], optimizer: Optimizer) -> None:
        """Called on one layer for all that the optimizer trains, when gradients are final (clipped, unscaled)."""

    def before_step(self, name: str) -> None:
        """Then on each."""

    def after_step(self, name: str) -> None:
        """On each, when the optimizer has stepped."""

    def after_steps(self, name: str, layers: list[Any], optimizer: Optimizer) -> None:
        """Then on one for all; also when `before_steps` was passed over, for want of any gradient."""

    def refuse_unseen_steps(self, name: str, what: str, values: Tensor) -> None:
        """Raises when an optimizer moved `values` and torch's hooks told nothing of it. Until the first step seen."""
        first = self._first.setdefault(name, values.detach().clone())
        if first is not None and not torch.equal(first, values.detach()):
            raise RuntimeError(
                f"{what} of {self.module_name} changed without a step of a torch.optim.Optimizer that "
                "holds it, so what this method does at each step cannot happen; use such an optimizer"
            )

    def forget_first(self, name: str) -> None:
        """After a load: what the values are now is no step."""
        if self._first.get(name) is not None:
            del self._first[name]


def _watch(layer: Any) -> None:
    _watched.add(layer)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(lambda opt, *_: _call("before", opt)))
        _handles.append(register_optimizer_step_post_hook(lambda opt, *_: _call("after", opt)))


def watched(kind: type) -> list[Any]:
    """The live layers of one class, by their modules' names."""
    return sorted((layer for layer in _watched if type(layer) is kind), key=lambda layer: layer.module_name)


def _call(event: str, optimizer: Optimizer) -> None:
    if not _watched:
        while _handles:
            _handles.pop().remove()
        return
    skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer under GradScaler skips by itself
    if skipped is not None and bool(skipped):
        return
    with torch.no_grad():
        for kind in sorted({type(layer) for layer in _watched}, key=lambda kind: kind.__name__):
            kind.on_step(event, watched(kind), optimizer)


# --- who steps --------------------------------------------------------------------------------------------------------


def _callers(kind: Any) -> Iterator[Any]:
    """The `self` of the functions that are running, innermost first, where it is a `kind`."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        if isinstance(owner, kind):
            yield owner
        frame = frame.f_back


def trainer_of(optimizer: Optimizer) -> Any:
    """The transformers Trainer among the callers whose optimizer this is, or None.

    peft gives an adapter no way to it, so it is looked for in the frames, once per optimizer.
    """
    found = _trainers.get(optimizer, lambda: None)()
    if found is None:
        for owner in _callers(getattr(sys.modules.get("transformers.trainer"), "Trainer", ())):
            if getattr(owner.optimizer, "optimizer", owner.optimizer) is optimizer:
                found, _trainers[optimizer] = owner, weakref.ref(owner)
                break
    return found


def loss_scale() -> float:
    """What the GradScaler that is stepping has multiplied the loss with; 1 without one."""
    scaler = next(_callers(torch.amp.GradScaler), None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def refuse_sharded(
    owner: str,
    parameter: Tensor | None = None,
    module: nn.Module | None = None,
    does: str = "writes single entries into whole weights",
) -> None:
    """Raises ValueError under FSDP and DeepSpeed ZeRO, in words: they hold the weights in pieces or flat copies.

    Args:
        owner: Class of the method's config.
        parameter: Looked at for FSDP's marks.
        module: A part of the model that is in its forward, where FSDP shows whole tensors for the time being.
        does: What the method does with weights that must be whole.
    """
    host = str(getattr(AcceleratorState._shared_state.get("distributed_type"), "value", ""))
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            host = name
    if isinstance(parameter, DTensor) or getattr(parameter, "_fsdp_flattened", False):
        host = "FSDP"
    if module is not None and dist.is_available() and dist.is_initialized():
        from torch.distributed._composable_state import _module_state_mapping  # fully_shard's modules
        from torch.distributed.fsdp import FSDPModule

        sharded = [m for m in _module_state_mapping if isinstance(m, FSDPModule)]
        if not isinstance(parameter, nn.Parameter) or any(module is inner for m in sharded for inner in m.modules()):
            host = "FSDP"
    if host in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"{owner} {does}, which {host} keeps in pieces; train with DDP "
            "(`accelerate launch --multi_gpu`) or on one device"
        )


# --- DDP --------------------------------------------------------------------------------------------------------------


def ddp_around(module: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel that a module trains in, or None."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    found: DistributedDataParallel | None = _wrappers.get(module, lambda: None)()
    if found is None:
        live = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
        found = next((ddp for ddp in live if any(m is module for m in ddp.modules())), None)
        if found is not None:
            _wrappers[module] = weakref.ref(found)
    return found


def mean_over_ranks(values: Tensor, ddp: DistributedDataParallel | None) -> Tensor:
    """The mean of `values` (any shape) over DDP's processes; the values themselves without DDP."""
    if ddp is None:
        return values
    group = cast("dist.ProcessGroup", ddp.process_group)
    values = values.to(ddp.device, copy=True)
    dist.all_reduce(values, group=group)
    return values / dist.get_world_size(group)


def rebuild(ddp: DistributedDataParallel | None) -> None:
    """Let DDP lay out its buckets anew, after parameters have changed their shapes: what its unpickling does.

    Raises:
        RuntimeError: DDP runs in a process group that is not the default one.
    """
    if ddp is not None:
        ddp.__setstate__(ddp.__getstate__())  # type: ignore[no-untyped-call]


# --- parameters that grow ---------------------------------------------------------------------------------------------


def resize(parameter: nn.Parameter, dim: int, size: int, new: Tensor, optimizer: Optimizer | None = None) -> None:
    """Cut a parameter to `size` components along `dim`, or append `new`; it stays the same object, without gradient.

    The optimizer's state tensors of the parameter's shape are cut too, or filled up with zeros.

    Raises:
        ValueError: the optimizer keeps a state of another shape, of which no part belongs to a component.
    """
    old = parameter.shape
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old:
            state[key] = _fitted(value, dim, size, value.new_zeros(new.shape))
    data = _fitted(parameter.data, dim, size, new)
    parameter.grad = None
    # A graph that is still held (a loss from before) keeps autograd's accumulator, with the old shape; a change of dtype
    # is what makes torch take a new one.
    parameter.data = data.new_empty(0, dtype=torch.float16 if data.dtype == torch.float64 else torch.float64)
    parameter.data = data


def _fitted(old: Tensor, dim: int, size: int, new: Tensor) -> Tensor:
    kept = old.narrow(dim, 0, min(size, old.shape[dim]))
    return torch.cat([kept, new.to(old)], dim) if size > old.shape[dim] else kept.clone()


def refuse_odd_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    """Raises ValueError where `resize` could not follow: factored and quantised states (Adafactor, 8-bit)."""
    for parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}, which cannot grow with it; use an optimizer such as AdamW or SGD"
                )


def restart(
    parameter: nn.Parameter,
    dim: int,
    old: Tensor,
    times: Tensor,
    step: int,
    warmup: int,
    optimizer: Optimizer,
    group: dict[str, Any],
) -> None:
    """Turn the last update of the components born during training into that of a learning rate of their own.

    A component born at step b, of a group with initial rate L and rate g(t), has L (t - b) / warmup up to b + warmup, and
    from there g(t) L / g(b + warmup): under a linear schedule to zero at T, L (T - t) / (T - b - warmup), what an optimizer
    group of its own with that schedule has. Adam's bias correction (Adam, AdamW) is that of a state which begins at b.

    Args:
        parameter: After the step.
        dim: The dimension of its components; the last ones are those that were born.
        old: Those components (K of them), before the step.
        times: (2, K') int64, K' <= K: the step of birth, and the bits of the float64 g-ratio L / g(b + warmup), written
            when it is known. Components K' to K do not move.
        step: t, from 0.
        warmup: Steps of the ramp.
        optimizer, group: Which stepped, and its group with the parameter.
    """
    shape = [-1 if d == dim else 1 for d in range(parameter.ndim)]
    lr = float(group["lr"])
    age, ratio = step - times[0], times[1].view(torch.float64)
    ratio.masked_fill_(age == warmup, rate_ratio(group))
    factor = torch.where(age < warmup, rate_ratio(group) / max(warmup, 1) * age.double(), ratio)
    missing = old.shape[dim] - len(age)
    factor = nn.functional.pad(factor, (0, missing)).view(shape).to(old)
    now = parameter.data.narrow(dim, parameter.shape[dim] - old.shape[dim], old.shape[dim])
    decay = lr * float(group["weight_decay"]) if group.get("decoupled_weight_decay") else 0.0
    update = now - (1 - decay) * old
    if isinstance(optimizer, Adam):
        age = age.double().clamp(1, max(1.0, float(optimizer.state[parameter]["step"])))  # a new run's state is younger
        age = nn.functional.pad(age, (0, missing), value=1.0).view(shape)
        update = _fresh_adam(optimizer.state[parameter], group, age, dim, now)
    now.copy_(old + factor * (update - decay * old))


def _fresh_adam(state: dict[str, Any], group: dict[str, Any], age: Tensor, dim: int, like: Tensor) -> Tensor:
    """Adam's update of the last components, as it is where its state began `age` steps ago."""
    start, size, (b1, b2) = state["exp_avg"].shape[dim] - like.shape[dim], like.shape[dim], group["betas"]
    mean, square = (state[key].narrow(dim, start, size) for key in ("exp_avg", _SQUARE[bool(group["amsgrad"])]))
    first, second = (1 - float(b1) ** age).to(like), (1 - float(b2) ** age).sqrt().to(like)
    return -float(group["lr"]) / first * mean / (square.sqrt() / second + group["eps"])


def rate_ratio(group: dict[str, Any]) -> float:
    """L / g: the initial learning rate of an optimizer's group over the present one; 0 where that is 0."""
    lr = float(group["lr"])
    return float(group.get("initial_lr", lr)) / lr if lr else 0.0
