"""Intrinsic dimension (arXiv:1804.08838, arXiv:2012.13255): all targets move in one random subspace of d numbers.

DID: theta_i = theta0_i + P_i v with one trained v (d) for all tensors i. SAID: theta_i = theta0_i + lambda_i P_i v with
v (d - m) and one trained lambda_i per tensor, m tensors: d numbers in all. v starts at 0 and lambda at 1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hfgen.kit import checks, subspace
from hfgen.kit.adapter import DeltaConfig
from hfgen.kit.dimension import IntrinsicDimension as IntrinsicDimension
from hfgen.kit.dimension import estimate_d90 as estimate_d90
from hfgen.kit.fastfood import Dense, Fastfood, Projection

PROJECTIONS: dict[str, type[Projection]] = {"fastfood": Fastfood, "dense": Dense}


class IntrinsicLinear(subspace.MovedLayer):
    """One adapted module. It has no numbers of its own: v and lambda are the tuner's."""

    adapter_layer_names = ("intrinsic_theta", "intrinsic_lambda")
    other_param_names = ("_parts", "_narrow")

    def setup(self) -> None:
        self._shared = (nn.ParameterDict(), nn.ParameterDict())  # a tuple: registered on the tuner, not here
        # Per adapter and tensor: P, the constant in front of it, and which lambda is its own.
        self._parts: dict[str, list[tuple[Projection, float, int]]] = {}
        self._narrow: dict[str, bool] = {}  # adapters whose cast was asked for

    @property
    def intrinsic_theta(self) -> nn.ParameterDict:
        """v of each adapter of the model: (d), of SAID (d - m)."""
        return self._shared[0]

    @property
    def intrinsic_lambda(self) -> nn.ParameterDict:
        """lambda of each SAID adapter of the model: (m)."""
        return self._shared[1]

    def build(self, adapter_name: str, config: IntrinsicConfig, weight: Tensor) -> None:
        self.base_probes.clear()  # P depends on names and shapes alone, which the config compares
        self._shared, self.shapes = config._shared, config._plan[self.module_name]
        total, columns = config._total, config._columns
        if adapter_name not in self.intrinsic_theta:  # in float32 or wider, as the weight is given
            start = torch.zeros(columns, dtype=weight.dtype)
            if not config.init_weights:
                start = 0.1 * math.sqrt(total / columns) * torch.randn_like(start).clamp(-3, 3)
            self.intrinsic_theta[adapter_name] = nn.Parameter(start)
            if config.mode == "said":
                self.intrinsic_lambda[adapter_name] = nn.Parameter(torch.ones(config._tensors, dtype=weight.dtype))
        tensors = [(module, name) for module, shapes in config._plan.items() for name in shapes]
        self._parts[adapter_name] = parts = []
        for name, shape in self.shapes.items():
            size, place = math.prod(shape), tensors.index((self.module_name, name))
            projection = PROJECTIONS[config.projection](columns, size, config.seed, f"{self.module_name}.{name}")
            parts.append((projection, math.sqrt(size / total) if config.projection_scope == "global" else 1.0, place))
            if not weight.is_meta:
                projection.draw(weight.device)  # now, so that torch.compile need not trace it

    def _has(self, adapter_name: str) -> bool:
        return adapter_name in self._parts

    def vectors(self, names: Sequence[str]) -> list[Tensor]:
        return [container[n] for n in names for container in self._shared if n in container]

    def shifts(self, names: Sequence[str], scales: Sequence[float], vectors: Sequence[Tensor]) -> list[Tensor]:
        left, found = iter(vectors), []
        for name, scale in zip(names, scales, strict=True):
            v, factors = next(left), next(left) if name in self.intrinsic_lambda else None
            one = []
            for (projection, share, place), shape in zip(self._parts[name], self.shapes.values(), strict=True):
                delta = (projection.project(v) * (share * scale)).view(shape)
                one.append(delta if factors is None else delta * factors[place])
            found.append(one)
        return [sum(deltas[1:], deltas[0]) for deltas in zip(*found, strict=True)]

    def cast_adapter(self, adapter_name: str) -> None:
        super().cast_adapter(adapter_name)
        self._narrow[adapter_name] = True

    def undo_casts(self) -> None:
        """v and lambda in float32 again: trl casts what trains on a bitsandbytes model to bfloat16."""
        for parameter in self.vectors([n for n in self._parts if n not in self._narrow]):
            wide = torch.promote_types(parameter.dtype, torch.float32)
            if parameter.dtype != wide and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(wide)


class IntrinsicModel(subspace.SharedTuner):
    """The peft tuner of the intrinsic dimension; holds v and lambda."""

    prefix = "intrinsic_"
    tuner_layer_cls = IntrinsicLinear
    shared_names = ("intrinsic_theta", "intrinsic_lambda")


@dataclass
class IntrinsicConfig(DeltaConfig):
    """Configuration of DID and SAID. Trainable numbers: d, whatever the targets.

    Args:
        d: Numbers trained in all. With "said" m of them are the tensors' lambdas and d - m move in the subspace.
        mode: "did" or "said" (one trained factor per tensor).
        projection_scope: "global" = the columns of P have unit norm over all tensors together (Li et al.); "per_tensor" =
            within each tensor (Aghajanyan et al.), which moves sqrt(m) times further for the same v.
        projection: "fastfood", or "dense" = 4 d bytes per entry of the targets, for small models.
        seed: Of P, together with each tensor's name. All of P that is saved.

    `target_modules` may also be "all-tensors": every linear, convolution and norm layer that shares its weight with no
    other module. Biases of targets take part, so `bias` must be "none". Other arguments: see
    `hfgen.kit.adapter.DeltaConfig`.

    Raises:
        TypeError, ValueError: a field has a wrong type or value, d is larger than the targets or not above the number of
            lambdas, or a loaded file's P is not the one drawn here; the sentence names field, value and fix.
    """

    d: int = field(default=256, metadata={"help": "Numbers trained in all."})
    mode: str = field(default="did", metadata={"help": "'did' or 'said' (a trained factor per tensor)."})
    projection_scope: str = field(default="global", metadata={"help": "Unit columns over 'global' or 'per_tensor'."})
    projection: str = field(default="fastfood", metadata={"help": "'fastfood' or 'dense'."})
    seed: int = field(default=0, metadata={"help": "Of the projection, with each tensor's name."})

    tuner_cls: ClassVar = IntrinsicModel

    def __post_init__(self) -> None:
        owner = "IntrinsicConfig"
        checks.integer(owner, "d", self.d, 1)
        checks.one_of(owner, "mode", self.mode, ("did", "said"))
        checks.one_of(owner, "projection_scope", self.projection_scope, ("global", "per_tensor"))
        checks.one_of(owner, "projection", self.projection, tuple(PROJECTIONS))
        checks.integer(owner, "seed", self.seed, 0)
        if self.bias in ("all", "intrinsic_only"):
            raise ValueError(
                f"{owner}.bias is {self.bias!r}; leave it 'none': biases of targets move with their weights"
            )
        super().__post_init__()
        # Kept apart: what a file says is compared, what a save computes is written.
        self._stored = (self.hfgen or {}).pop("projection", None)
        self._digest: str | None = None

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        if self._digest:
            out["hfgen"]["projection"] = self._digest
        return out

    def resolve(self, plan: dict[str, subspace.Shapes]) -> None:
        """Note the targets' shapes, on which P depends. Raises ValueError where d or a file does not fit them."""
        self._plan, self._total, self._tensors = plan, subspace.entries(plan), sum(map(len, plan.values()))
        self._columns = self.d - (self._tensors if self.mode == "said" else 0)
        if not plan:
            return  # nothing that can be adapted: the layer's own refusal names it
        if self._columns < 1:
            raise ValueError(
                f"IntrinsicConfig.d is {self.d}, which mode='said' spends on the lambdas of {self._tensors} tensors; "
                "give more, or mode='did'"
            )
        if self._columns > self._total:
            raise ValueError(
                f"IntrinsicConfig.d is {self.d} and the targets hold only {self._total} numbers; lower d or target "
                "more modules"
            )
        canary = PROJECTIONS[self.projection](4, 16, self.seed, "").draw()
        facts = repr((self.d, self.mode, self.projection_scope, plan, [(t * 1e4).round().tolist() for t in canary]))
        self._digest = hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()
        if self._stored not in (None, self._digest):
            raise ValueError(
                f"the adapter's projection is {self._stored} and of this model it would be {self._digest}: names and "
                "shapes of its targets, or torch's generator, are others; load the model class the adapter was trained on"
            )
