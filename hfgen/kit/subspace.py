"""Layers whose whole tensors move: y = layer(x; weight + dW, bias + db), with dW made from a few trained vectors.

The moved tensors are made for one call and thrown away; backward makes them again (`hfgen.kit.fastfood.reparametrised`),
so what is kept is x, which a trained layer keeps anyway. The base is never written to, but by `merge`. A quantised layer
keeps its own product and gets x dW^T added.

The vectors may belong to all layers together: they live on the tuner (`SharedTuner`), once, and in the file once.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_adapters_to_merge
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hfgen.kit.adapter import DeltaLayer, quantization_backend
from hfgen.kit.fastfood import Reparametrisation, moved, reparametrised
from hfgen.kit.sparse import SparseTuner, is_plain, tied_weights

Shapes = dict[str, tuple[int, ...]]  # of the tensors of one layer, by name, in the order they are moved


class MovedLayer(DeltaLayer):
    """Subclasses implement `vectors` and `shifts` besides what `DeltaLayer` wants.

    Attributes:
        shapes: Of the tensors that move: weight and bias, of a quantised layer the weight as (out, in).
    """

    shapes: Shapes

    @abstractmethod
    def vectors(self, names: Sequence[str]) -> list[Tensor]:
        """What is trained, of these adapters one after the other."""

    @abstractmethod
    def shifts(self, names: Sequence[str], scales: Sequence[float], vectors: Sequence[Tensor]) -> list[Tensor]:
        """The sum over adapters of scale * difference, one per tensor of `shapes`, differentiable in the vectors."""

    def deltas(self, name: str) -> list[Tensor]:
        """The differences of one adapter, where the layer is."""
        device = self.tensors()[0].device
        with torch.no_grad():
            return self.shifts([name], [self.scales.get(name, 1.0)], [v.to(device) for v in self.vectors([name])])

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        return self.deltas(adapter_name)[0]

    def delta_weight(self, adapter_name: str) -> Tensor:
        delta = self.deltas(adapter_name)[0]
        return delta.T if self.is_conv1d else delta

    def delta_forward(self, adapter_name: str, x: Tensor) -> Tensor:
        return self._moved([adapter_name], [1.0], x, F.linear, [None], "out,in")  # DeltaLayer.forward scales

    def _weight_2d(self) -> Tensor:
        weight = self._weight()
        return weight.T if self.is_conv1d else weight.reshape(len(weight), -1)

    def was_loaded(self, adapter_name: str) -> bool:
        return True

    def needs_this_base(self, adapter_name: str) -> bool | None:
        return False

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # dW has full rank

    def tensors(self) -> list[Tensor]:
        """The base's tensors that move. Raises ValueError where a host keeps them in pieces."""
        if self.quantization_backend is not None:
            return [self._weight()]
        found: list[Tensor] = []
        for name, shape in self.shapes.items():
            tensor = self.get_base_layer()._parameters[name]
            if tensor is None or isinstance(tensor, DTensor) or tensor.shape != shape:
                raise ValueError(
                    f"the {name} of {self.module_name} is not whole here (DeepSpeed ZeRO-3, tensor parallelism), "
                    "and a full difference is added to it; train with DDP, FSDP2 or on one device"
                )
            found.append(tensor)
        return found

    def _moved(
        self, names: list[str], scales: list[float], x: Tensor, call: Any, bases: Sequence[Any], layout: str | None
    ) -> Tensor:
        spec = Reparametrisation(call, lambda *vectors: self.shifts(names, scales, vectors), layout)
        vectors = [v.to(x.device) for v in self.vectors(names)]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return spec.call(x, *moved(bases, spec.shift(*vectors), x))
        return reparametrised(spec, x, bases, vectors)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [n for n in self.active_adapters if self._has(n)]
        if self.disable_adapters or self.merged or not names or self.quantization_backend is not None:
            return super().forward(x, *args, **kwargs)
        base, bases = self.get_base_layer(), self.tensors()
        if bases[0].is_meta and not x.is_meta:
            raise ValueError(
                f"the weight of {self.module_name} is off-loaded; load the model without an off-load (device_map), or "
                "leave the module out of target_modules"
            )
        inner, layer = "", self.base_layer
        while isinstance(layer, BaseTunerLayer):  # another method's layer in between
            inner, layer = f"{inner}base_layer.", layer.base_layer  # type: ignore[assignment]

        def call(x: Tensor, *tensors: Tensor) -> Tensor:
            own = {inner + name: tensor for name, tensor in zip(self.shapes, tensors, strict=True)}
            return functional_call(self.base_layer, own, (x, *args), kwargs)  # type: ignore[no-any-return]

        scales = [self.scales.get(n, 1.0) for n in names]
        if inner or args or kwargs or any(True for _ in base.buffers()):  # backward cannot repeat what it does not see
            shifts = self.shifts(names, scales, [v.to(x.device) for v in self.vectors(names)])
            return call(x, *moved(bases, shifts, x))
        layouts = {nn.Linear.forward: "out,in", Conv1D.forward: "in,out"}
        return self._moved(names, scales, x, call, bases, layouts.get(type(base).forward))

    def _add(self, name: str, sign: int, check: bool = False) -> None:
        """Add (+1) or take away (-1) an adapter's differences from the base's tensors, all or none."""
        with torch.no_grad():
            pairs = zip(self.tensors(), self.deltas(name), strict=True)
            new = [(t.to(d.dtype) + sign * d).to(t.dtype) for t, d in pairs]
        if check and not all(torch.isfinite(t).all() for t in new):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self.set_base_weight(new[0])
        for key, tensor in list(zip(self.shapes, new, strict=True))[1:]:
            self.get_base_layer()._parameters[key].data = tensor  # type: ignore[union-attr]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in [n for n in check_adapters_to_merge(self, adapter_names) if self._has(n)]:
            self._add(name, 1, safe_merge)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if self._has(name):
                self._add(name, -1)


class SharedTuner(SparseTuner):
    """A tuner with containers of its own (`shared_names`): one parameter per adapter for all layers.

    `config._shared` is the tuple of them and `config.resolve(plan)` gets every target's shapes while an adapter is made.
    """

    tuner_layer_cls: type[MovedLayer]  # type: ignore[assignment]
    uses_shared_state: ClassVar[bool] = True

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        for name in self.shared_names:
            setattr(self, name, nn.ParameterDict())

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        config._shared = tuple(getattr(self, name) for name in self.shared_names)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            del config._shared  # a copy or a pickle of the config is no copy of the vectors

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        tied = tied_weights(model)
        if peft_config.target_modules == "all-tensors":
            inside = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, BaseTunerLayer))
            peft_config.target_modules = {
                n
                for n, m in model.named_modules()
                if n
                and not n.startswith(inside)
                and self._takes(m)
                and id(_base(m)._parameters.get("weight")) not in tied
            }
        super()._prepare_model(peft_config, model)
        _maybe_include_all_linear_layers(peft_config, model)
        plan = {}
        for name, module in self.targets(peft_config, model):
            if not self._takes(module):
                continue  # its own refusal names it
            if id(_base(module)._parameters.get("weight")) in tied:
                raise ValueError(f"{name} shares its weight with another module; leave it out of target_modules")
            plan[name] = self._shapes(name, _base(module))
        peft_config.resolve(plan)

    def _takes(self, module: nn.Module) -> bool:
        base = _base(module)
        return is_plain(base) or quantization_backend(base, **get_quantization_kwargs(self)) is not None

    def _shapes(self, name: str, base: nn.Module) -> Shapes:
        if quantization_backend(base, **get_quantization_kwargs(self)) is not None:
            return {"weight": (base.out_features, base.in_features)}  # type: ignore[dict-item]
        found = {n: p for n in ("weight", "bias") if (p := base._parameters.get(n)) is not None}
        if any(hasattr(p, "ds_id") for p in found.values()):
            raise ValueError(
                f"the weight of {name} is cut up by DeepSpeed ZeRO-3, and a full difference is added to it; train with "
                "DDP, FSDP2 or ZeRO up to stage 2"
            )
        return {n: tuple(p.shape) for n, p in found.items()}

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        found = super()._get_adapter_state_dict(model=model, config=config, **kwargs)
        for name, tensor in found.items():
            if isinstance(tensor, DTensor):
                raise ValueError(
                    f"{name} is sharded over processes; save with Trainer.save_model, or pass "
                    "state_dict=accelerator.get_state_dict(model)"
                )
        return found


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def entries(plan: dict[str, Shapes]) -> int:
    """How many numbers the targets hold."""
    return sum(math.prod(shape) for shapes in plan.values() for shape in shapes.values())
