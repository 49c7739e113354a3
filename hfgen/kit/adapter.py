"""Additive adapters on peft's BaseTuner: a method writes its factors, its forward delta and its weight delta.

What this base gives every method: several adapters, disable, merge / unmerge / safe_merge, delete, save and load with or
without frozen factors, the check that a loaded adapter meets the base it was trained on, Linear and Conv1D,
modules_to_save, low_cpu_mem_usage, autocast rules, peft's conversion to LoRA, transformers' `add_adapter`, and quantised
bases through peft's backends (or the layer's own `hfgen_backend()`).

Shapes: a weight W is handled as (m, n) = (out, in), whatever the host stores.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    TaskType,
    get_quantization_kwargs,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from peft.utils.constants import DUMMY_TARGET_MODULES, INCLUDE_LINEAR_LAYERS_SHORTHAND, SAFETENSORS_WEIGHTS_NAME
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from hfgen import catalog
from hfgen.kit import checks

FORMAT = 1  # of the `hfgen` block in adapter_config.json; readers accept every number up to this one
BASE_TOLERANCE = 5e-3  # of the base probes, relative to ||W||_F: above what a bf16 cast moves them, below 4 bit
DELTA_TOLERANCE = 1e-3  # of the delta probes, relative to ||dW p||


@dataclass
class DeltaConfig(PeftConfig):
    """Fields every additive adapter has; all are peft's own, but for `hfgen`.

    Args:
        target_modules: Module names (suffixes), a regular expression, or "all-linear"; None = peft's choice for the
            architecture.
        exclude_modules: Names or a regular expression to leave out.
        layers_to_transform: Layer indices to adapt; None = all.
        layers_pattern: Name of the list of layers, where `layers_to_transform` cannot find it.
        modules_to_save: Modules trained and saved in full besides the adapter (a classification head).
        bias: "none", "all" or "<method>_only".
        init_weights: True = the method's own start, which leaves the model's function unchanged; False = random values
            that do change it (for tests).
        hfgen: What wrote the adapter and what to install; filled in, do not set.

    Raises:
        TypeError, ValueError: a field has a wrong type or value; the sentence names field, value and fix.
    """

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved in full."})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or '<method>_only'."})
    init_weights: bool = field(default=True, metadata={"help": "False starts from random values (tests)."})
    hfgen: dict[str, Any] | None = field(default=None, metadata={"help": "What wrote the adapter; filled in."})

    tuner_cls: ClassVar[type[BaseTuner]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        tuner = cls.__dict__.get("tuner_cls")
        if tuner is not None:  # so that a pickled config can be read as soon as its class's module is imported
            _hosts_peft().extend_peft_type(tuner.prefix.removesuffix("_"))

    def __new__(cls, *args: Any, **kwargs: Any) -> DeltaConfig:
        checks.known_options(cls.__name__, kwargs, [f.name for f in dataclasses.fields(cls) if f.init])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        owner, method = type(self).__name__, self.method
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            checks.names(owner, name, getattr(self, name))
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"{owner}.modules_to_save is {self.modules_to_save!r}; give a list of names")
        layers = self.layers_to_transform
        for index in layers if isinstance(layers, (list, tuple, set)) else [] if layers is None else [layers]:
            checks.integer(owner, "layers_to_transform", index, 0)
        checks.one_of(owner, "bias", self.bias, ("none", "all", f"{method}_only"))
        checks.boolean(owner, "init_weights", self.init_weights)
        checks.boolean(owner, "inference_mode", self.inference_mode)
        if self.task_type is not None:
            checks.one_of(
                owner, "task_type", getattr(self.task_type, "value", self.task_type), [t.value for t in TaskType]
            )
        _hosts_peft().register(method, type(self))
        self.peft_type = _hosts_peft().extend_peft_type(method)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"{owner}.layers_to_transform is set while target_modules is the string {self.target_modules!r}; "
                "give target_modules as a list"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"{owner}.layers_pattern is {self.layers_pattern!r}; it needs layers_to_transform too")
        super().__post_init__()
        self._stamp()

    @property
    def method(self) -> str:
        """The method's name, e.g. `"svfit"`."""
        return type(self).tuner_cls.prefix.removesuffix("_")

    def _stamp(self) -> None:
        """Write who made this adapter, or check what a loaded file says."""
        if self.hfgen is None:
            dist, version = _distribution_of(self.method, type(self))
            self.hfgen = {
                "format": FORMAT,
                "method": self.method,
                "distribution": dist,
                "version": version,
                "install": f"pip install '{dist}>={version}'",
            }
        elif not isinstance(self.hfgen, dict) or not isinstance(self.hfgen.get("format"), int):
            raise TypeError(f"{type(self).__name__}.hfgen is {self.hfgen!r}; leave it out, it is filled in")
        elif self.hfgen["format"] > FORMAT:
            raise ValueError(
                f"{type(self).__name__}.hfgen says format {self.hfgen['format']}, this hfgen reads up to {FORMAT}; "
                "upgrade the package that offers it (`hfgen show` names it)"
            )
        # Kept apart: what a file says is compared once, what a save computes is written once.
        self._fingerprint: dict[str, dict[str, list[float]]] = self.hfgen.pop("fingerprint", {})
        if not _is_fingerprint(self._fingerprint):
            raise ValueError(
                f"{type(self).__name__}.hfgen has a malformed fingerprint; the file is damaged, save it again"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the fingerprint of the last save in the `hfgen` block."""
        out: dict[str, Any] = super().to_dict()
        if self._fingerprint:
            out["hfgen"]["fingerprint"] = self._fingerprint
        return out

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """peft's loader, after a look at a local weights file, so that a damaged one is named in words.

        Raises:
            ValueError: the folder's adapter_model.safetensors cannot be read.
        """
        path = os.path.join(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if os.path.isfile(path):
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, "pt") as file:
                    file.keys()
            except SafetensorError as exc:
                raise ValueError(f"{path} is not a complete safetensors file ({exc}); copy or save it again") from None
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save adapter_config.json, and say in the folder's README.md what the adapter needs."""
        super().save_pretrained(save_directory, **kwargs)
        _write_readme(os.path.join(save_directory, "README.md"), self)


def _hosts_peft() -> Any:
    from hfgen.hosts import peft

    return peft


def _distribution_of(method: str, cls: type) -> tuple[str, str]:
    """Distribution and version that offer the method; its top-level package where no entry point names it."""
    return catalog.distribution("adapters", method) or (cls.__module__.partition(".")[0], "0")


def _is_fingerprint(found: Any) -> bool:
    """{module: {"base": 3 numbers, "delta": 3 numbers}}"""
    return isinstance(found, dict) and all(
        isinstance(entry, dict)
        and all(
            isinstance(entry.get(part), list)
            and len(entry[part]) == 3
            and all(isinstance(v, (int, float)) for v in entry[part])
            for part in ("base", "delta")
        )
        for entry in found.values()
    )


_README_MARK = "<!-- hfgen -->"


def _write_readme(path: str, config: DeltaConfig) -> None:
    text = ""
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            text = file.read()
    if _README_MARK in text:
        return
    assert config.hfgen is not None
    with open(path, "a", encoding="utf-8") as file:
        file.write(
            f"\n\n{_README_MARK}\n## How to load this adapter\n\nIts method is `{config.method}`, a plugin for peft. "
            f"Install it once with `{config.hfgen['install']}`; `PeftModel.from_pretrained` and `AutoPeftModel` then "
            f"load this folder without any further import. Without it peft raises `KeyError: '{config.method.upper()}'`.\n"
        )


class DeltaLayer(nn.Module, BaseTunerLayer):
    """An adapter y = base(x) + delta(x) on one (possibly quantised) linear layer.

    A method implements `setup`, `build`, `delta_forward` and `delta_weight`, and lists its containers (dicts keyed by
    adapter name) in `adapter_layer_names` (trainable) and `other_param_names`.
    """

    adapter_layer_names: tuple[str, ...]
    other_param_names: tuple[str, ...]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, module_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.quantization_backend = quantization_backend(base, **kwargs)
        self.in_features, self.out_features = _get_in_out_features(base)
        self.is_conv1d = isinstance(base, Conv1D)
        self.module_name = module_name
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self._active_adapter = adapter_name
        # Adapters whose loaded state was not compared with the base yet, with the fingerprint their file gives.
        self._unverified: dict[str, dict[str, Any]] = {}
        self.base_probes: dict[str, list[float]] = {}
        self.scales: dict[str, float] = {}  # set at run time by scale_layer / set_scale; never saved
        self.setup()
        self.register_load_state_dict_post_hook(_verify_after_load)
        self.update_layer(adapter_name, config)

    # --- what a method implements ---------------------------------------------------------------------------------
    @abstractmethod
    def setup(self) -> None:
        """Create the containers."""

    @abstractmethod
    def build(self, adapter_name: str, config: Any, weight: Tensor) -> None:
        """Fill the containers from the base weight (m, n), given in float32 or wider and never to be written to.

        Do not read a parameter back after registering it: with low_cpu_mem_usage it is on the meta device. The weight
        itself is there when the base model is: then only shapes are wanted.
        """

    @abstractmethod
    def delta_forward(self, adapter_name: str, x: Tensor) -> Tensor:
        """delta(x): (..., n) -> (..., m)."""

    @abstractmethod
    def delta_weight(self, adapter_name: str) -> Tensor:
        """dW (m, n), such that delta(x) = x dW^T."""

    def delta_vector(self, adapter_name: str, x: Tensor) -> Tensor:
        """delta(x) of one vector (n), for the fingerprint: the same on every device, so wider than `delta_forward`."""
        return self.delta_forward(adapter_name, x)

    def undo_casts(self) -> None:
        """Takes back what a host has cast since the adapter was made; by default nothing has to be."""

    def train(self, mode: bool = True) -> DeltaLayer:
        if mode:  # asked for before every training step
            self.undo_casts()
        return super().train(mode)

    @abstractmethod
    def was_loaded(self, adapter_name: str) -> bool:
        """Whether the state differs from what `build` put there."""

    def check_loaded(self, adapter_name: str) -> str | None:
        """What is wrong with the loaded state given what `build` saw in the base; None if nothing. May mend factors."""
        return None

    def needs_this_base(self, adapter_name: str) -> bool | None:
        """True: refuse another base. None: only warn. False: the file holds all it needs (saved factors)."""
        return True

    # --- the contract with peft -----------------------------------------------------------------------------------
    def update_layer(self, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Add an adapter. Raises ValueError while another one is merged: its factors would come from the merged weight."""
        if self.merged:
            raise ValueError(
                f"adapter {adapter_name!r} cannot be added while {self.merged_adapters} is merged; "
                "call unmerge_adapter() first"
            )
        base = self.get_base_layer()
        with gather_params_ctx(getattr(base, "weight", None)), torch.no_grad():
            weight = self._weight_2d()
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if not weight.is_meta:  # a meta model has shapes to count, and nothing to look at
                if not torch.isfinite(weight).all():
                    raise ValueError(f"the weight of {self.module_name} holds NaN or Inf; mend the base model first")
                self.base_probes[adapter_name] = base_probe(weight)
            self.build(adapter_name, config, weight)
        if config._fingerprint:  # the config comes from a file; a fresh adapter has nothing to compare
            self._unverified[adapter_name] = config._fingerprint.get(self.module_name, {})
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The device only: a cast to a half-precision base would round the factors before peft widens them again.
        base = self.get_base_layer()
        target = device or next((t.device for t in (*base.parameters(), *base.buffers())), None)
        for container in self._containers(adapter_name):
            if target is not None and container[adapter_name].device.type != "meta":
                container[adapter_name] = container[adapter_name].to(target)

    def cast_adapter(self, adapter_name: str) -> None:
        """Cast the floating tensors of one adapter to the base layer's dtype (`autocast_adapter_dtype=False`)."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        for container in self._containers(adapter_name):
            if dtype is not None and dtype.is_floating_point and container[adapter_name].is_floating_point():
                container[adapter_name] = container[adapter_name].to(dtype)

    def _containers(self, adapter_name: str) -> list[Any]:
        modules = [getattr(self, name) for name in (*self.adapter_layer_names, *self.other_param_names)]
        return [m for m in modules if isinstance(m, nn.Module) and adapter_name in m]

    def _has(self, adapter_name: str) -> bool:
        return adapter_name in getattr(self, self.adapter_layer_names[0])

    def _weight_2d(self) -> Tensor:
        return self._weight().T if self.is_conv1d else self._weight()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """dW in the layout of the base weight, in the adapter's dtype (float32 for half precision on CPU)."""
        if self._unverified:
            self.verify(adapter_name)
        delta = self.delta_weight(adapter_name) * self.scales.get(adapter_name, 1.0)
        return delta.T if self.is_conv1d else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active (or named) adapters' dW to the base weight.

        Raises:
            ValueError: `safe_merge` and the result is not finite; the base is untouched then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self._has(name)]
        for name in names:
            weight = self._weight()
            delta = self.get_delta_weight(name)
            merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract what `merge` added (equal to rounding)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if self._has(name):
                weight, delta = self._weight(), self.get_delta_weight(name)
                self.set_base_weight((weight.to(delta.dtype) - delta).to(weight.dtype))

    def _weight(self) -> Tensor:
        with _unpacked_bnb(self.get_base_layer()):
            weight: Tensor = self.get_base_weight()
        if isinstance(weight, DTensor):
            raise ValueError(
                f"the weight of {self.module_name} is sharded over processes, so no adapter can be added to it or merged "
                "into it; add adapters before the model is sharded, and merge a saved one in one process"
            )
        return weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        dtype = result.dtype
        for name in self.active_adapters:
            if self._has(name):
                if self._unverified:
                    self.verify(name)
                delta = self.delta_forward(name, x)
                result = result + (delta * self.scales[name] if name in self.scales else delta)
        return result.to(dtype)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply one adapter's delta by `scale` from now on (diffusers' `set_adapters` weights)."""
        if self.merged:
            raise ValueError(
                f"adapter {adapter!r} cannot be scaled while {self.merged_adapters} is merged; unmerge first"
            )
        if self._has(adapter):
            self.scales[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' deltas by `scale`, on top of what was set before."""
        for name in self.active_adapters:
            self.set_scale(name, self.scales.get(name, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the active adapters' deltas by `scale`; None takes every scale away."""
        for name in self.active_adapters:
            self.set_scale(name, 1.0 if scale is None else self.scales.get(name, 1.0) / scale)

    def delete_adapter(self, adapter_name: str) -> None:
        self.scales.pop(adapter_name, None)
        self._unverified.pop(adapter_name, None)
        self.base_probes.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    # --- is this the base the adapter was trained on? -------------------------------------------------------------
    def fingerprint(self, adapter_name: str) -> dict[str, list[float]]:
        """Numbers that change with the base weight and with dW, kept in adapter_config.json.

        `base`: two projections of W, and ||W||_F; `delta`: two projections of dW, and the larger ||dW p||.
        """
        return {"base": self.base_probes[adapter_name], "delta": self._delta_probe(adapter_name)}

    def _delta_probe(self, adapter_name: str) -> list[float]:
        with torch.no_grad():
            out = []
            scale = 0.0
            for i in (0, 1):
                moved = self.delta_vector(adapter_name, self._probe_input(i)).double()
                out.append(float(moved @ probe(self.out_features, i + 2, moved)))
                scale = max(scale, float(moved.norm()))
            return [*out, scale]

    def _probe_input(self, seed: int) -> Tensor:
        like = next(c[n] for n in self.base_probes for c in self._containers(n) if c[n].is_floating_point())
        return probe(self.in_features, seed, like).to(torch.promote_types(like.dtype, torch.float32))

    @torch.compiler.disable
    def verify(self, adapter_name: str) -> None:
        """Compare a loaded adapter with the base it sits on, once per load. Raises ValueError on a foreign base."""
        stored = self._unverified.pop(adapter_name, None)
        strict = self.needs_this_base(adapter_name)
        if stored is None or strict is False or not self.was_loaded(adapter_name):
            return
        fault = self.check_loaded(adapter_name)
        if fault is None and stored:
            fault = _compare("base weight", stored["base"], self.base_probes[adapter_name], BASE_TOLERANCE)
            fault = fault or _compare("weight delta", stored["delta"], self._delta_probe(adapter_name), DELTA_TOLERANCE)
        if fault is None:
            return
        message = (
            f"adapter {adapter_name!r} does not fit {self.module_name}: {fault}; it was trained on another (or an "
            "otherwise quantised) base: load that base, or save the adapter with save_factors=True"
        )
        if strict:
            self._unverified[adapter_name] = stored  # stays refused
            raise ValueError(message)
        warnings.warn(message)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def _compare(what: str, stored: list[float], now: list[float], tolerance: float) -> str | None:
    limit = tolerance * max(abs(stored[2]), abs(now[2]))
    worst = max(abs(a - b) for a, b in zip(stored[:2], now[:2], strict=True))
    return None if worst <= limit else f"the {what}'s fingerprint differs by {worst:.3g} where {limit:.3g} is allowed"


def probe(size: int, seed: int, like: Tensor) -> Tensor:
    """A fixed vector of about unit-variance entries, the same on every machine and torch version (no generator)."""
    index = torch.arange(1, size + 1, dtype=torch.float64)
    return (2**0.5 * torch.cos(index * index * (0.5 + 2**0.5 / (seed + 2)))).to(like.device)


def base_probe(weight: Tensor) -> list[float]:
    """[q0^T W p0, q1^T W p1, ||W||_F] with the fixed probes: about N(0, ||W||_F^2) for an unrelated weight."""
    m, n = weight.shape
    values = []
    for i in (0, 1):
        moved = weight @ probe(n, i, weight).to(weight.dtype)
        values.append(float(moved.double() @ probe(m, i + 2, weight)))
    return [*values, float(weight.double().norm())]


def _verify_after_load(layer: nn.Module, incompatible_keys: Any) -> None:
    # The hosts' loaders that set tensors one by one (transformers' load_adapter) run no hook: the first forward checks.
    assert isinstance(layer, DeltaLayer)
    for name in list(layer._unverified):
        if layer._has(name) and layer.was_loaded(name):
            layer.verify(name)


class _Fingerprint(nn.Module):
    """`DeltaLayer.fingerprint` as a forward, for `functional_call`."""

    def __init__(self, layer: DeltaLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, adapter_name: str) -> dict[str, list[float]]:
        return self.layer.fingerprint(adapter_name)


def _saved_fingerprint(
    layer: DeltaLayer, name: str, adapter_name: str, saved: dict[str, Tensor]
) -> dict[str, list[float]]:
    """The fingerprint with the tensors that are saved: of a sharded model they are whole, and on this rank only."""
    name = name.replace("_fsdp_wrapped_module.", "")
    own = {}
    for attr in (*layer.adapter_layer_names, *layer.other_param_names):
        tensor = saved.get(f"{name}.{attr}.{adapter_name}")
        if isinstance(tensor, DTensor):
            raise ValueError(
                f"{attr} of {layer.module_name} is sharded over processes; save with Trainer.save_model, or pass "
                "state_dict=accelerator.get_state_dict(model)"
            )
        if tensor is not None:
            own[f"layer.{attr}.{adapter_name}"] = tensor.to(getattr(layer, attr)[adapter_name].device)
    found: dict[str, list[float]] = functional_call(_Fingerprint(layer), own, (adapter_name,))
    return found


def quantization_backend(base: nn.Module, **kwargs: Any) -> Any:
    """peft's backend of a quantised layer, else the layer's own `hfgen_backend()`, else None."""
    backend = resolve_quantization_backend(base, **kwargs)
    if backend is None and hasattr(base, "hfgen_backend"):
        backend = base.hfgen_backend()
    return backend


@contextmanager
def _unpacked_bnb(base: nn.Module) -> Iterator[None]:
    """Read a bitsandbytes 4-bit weight that its first CPU eval forward has repacked, which peft would misread.

    The packed state is put back: packing it again would not give the same bits.
    """
    weight = getattr(base, "weight", None)
    state = getattr(weight, "quant_state", None)
    if weight is None or not getattr(state, "packing_format_for_cpu", False):
        yield
        return
    from bitsandbytes.nn.modules import _convert_weight_packed_for_cpu_inverse

    packed = weight.data
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(packed.clone(), copy.deepcopy(state))
    try:
        yield
    finally:
        weight.data, weight.quant_state = packed, state


class DeltaTuner(BaseTuner):
    """The tuner of an additive method: subclasses set `prefix` (`"<name>_"`) and `tuner_layer_cls`."""

    tuner_layer_cls: type[DeltaLayer]
    # Containers on the tuner itself (dicts keyed by adapter name) of what all layers share; needs `uses_shared_state`.
    shared_names: ClassVar[tuple[str, ...]] = ()
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        kind = model_config.get("model_type")
        if peft_config.target_modules is None and kind not in self.target_module_mapping:
            raise ValueError(
                f"{type(peft_config).__name__}.target_modules is None and there is no default for model type {kind!r}; "
                'name the modules, e.g. target_modules=["q_proj", "v_proj"] or "all-linear"'
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Refuse targets that match nothing before anything is replaced."""
        targets = peft_config.target_modules
        if targets in (INCLUDE_LINEAR_LAYERS_SHORTHAND, DUMMY_TARGET_MODULES) or self._matches(peft_config, model):
            return
        leaves = sorted(
            {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
        )
        wanted = [targets] if isinstance(targets, str) else sorted(targets)
        close = [c for t in wanted for c in difflib.get_close_matches(t, leaves, n=1)]
        hint = (
            f"did you mean {close[0]!r}?"
            if close
            else f"the model's linear layers are called {', '.join(leaves) or 'nothing'}"
        )
        raise ValueError(f"{type(peft_config).__name__}.target_modules {wanted} matches no module of the model; {hint}")

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Read by DistributedDataParallel: frozen factors, equal on all ranks, which it would send at every forward.

        Names from here and from the PeftModel around, which hands the question down. (An adapter put on with
        transformers' `add_adapter` has no tuner to ask; `ddp_broadcast_buffers=False` does the same there.)
        """
        names = [f"model.{name}" for name in getattr(self.model, "_ddp_params_and_buffers_to_ignore", ())]
        for name, layer in self.named_modules():
            if isinstance(layer, DeltaLayer):
                layer.undo_casts()  # the last moment: DDP is about to lay out its buckets by dtype
                frozen = [a for a in layer.other_param_names if isinstance(getattr(layer, a), nn.Module)]
                names += [f"{name}.{a}.{adapter}" for a in frozen for adapter, _ in getattr(layer, a).named_buffers()]
        return [*names, *(f"base_model.{name}" for name in names)]

    def _matches(self, peft_config: Any, model: nn.Module) -> bool:
        return any(self._check_target_module_exists(peft_config, name) for name, _ in model.named_modules() if name)

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
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(parent, nn.MultiheadAttention):
            raise TypeError(
                f"{current_key} belongs to nn.MultiheadAttention, which reads its weight without calling the layer, so an "
                "adapter there would do nothing; leave it out of target_modules"
            )
        kwargs = get_quantization_kwargs(self)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)):
            backend = quantization_backend(base, **kwargs)
            if backend is None or backend.layer_type != "linear":
                raise TypeError(
                    f"{type(peft_config).__name__} cannot adapt {current_key} ({type(base).__name__}); "
                    "target Linear or Conv1D layers"
                )
        new = self.tuner_layer_cls(target, adapter_name, peft_config, module_name=current_key, **kwargs)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for module in self.model.modules():
                if isinstance(module, DeltaLayer) and module._has(adapter_name):
                    module.cast_adapter(adapter_name)

    # --- saving and loading ---------------------------------------------------------------------------------------
    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Any, unwanted_adapter_names: Any
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if found:  # empty on the ranks that do not save
            config._fingerprint = {
                layer.module_name: _saved_fingerprint(layer, name, adapter_name, found)
                for name, layer in model.named_modules()
                if isinstance(layer, DeltaLayer) and layer._has(adapter_name) and layer.base_probes
            }
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """peft's key mapping, then a look at the whole file: every layer's tensors are there and have its shapes."""
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        have = model.state_dict()
        for name, layer in model.named_modules():
            if isinstance(layer, DeltaTuner):
                attrs, owner = layer.shared_names, "the model"
            elif isinstance(layer, DeltaLayer) and layer._has(adapter_name):
                attrs, owner = (*layer.adapter_layer_names, *layer.other_param_names), layer.module_name
            else:
                continue
            for attr in attrs:
                key = f"{name}.{attr}.{adapter_name}"
                if key not in have:
                    continue
                if key not in mapped:
                    raise ValueError(
                        f"the adapter file has no {attr} for {owner}; it is incomplete or belongs to another model"
                    )
                if mapped[key].ndim == 0 and have[key].shape == (1,):  # as scalars were saved before FSDP2 forbade them
                    mapped[key] = mapped[key].reshape(1)
                if mapped[key].shape != have[key].shape:
                    raise ValueError(
                        f"{attr} of {owner} has shape {tuple(mapped[key].shape)} in the adapter file and "
                        f"{tuple(have[key].shape)} in this model; the file belongs to another base or configuration"
                    )
                if mapped[key].is_floating_point() and not torch.isfinite(mapped[key]).all():
                    raise ValueError(
                        f"{attr} of {owner} holds NaN or Inf in the adapter file; the run that saved it "
                        "diverged or the file is damaged, take an earlier checkpoint"
                    )
            if isinstance(layer, DeltaLayer):
                layer._unverified.setdefault(adapter_name, {})
        return mapped
