"""Adapters that train a diagonal between two frozen factors of the base weight: dW = Left diag(c) Right.

Shapes: Left (m, r), Right (r, n), z and its reference z0 (r). In the delta form y = W x + Left (c * (Right x)) with
c = scale * z - scale0 * z0, so the base weight is never written to and the start is exact: c = 0.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.integrations import is_fsdp_enabled

from hfgen.kit import checks
from hfgen.kit.adapter import DeltaConfig, DeltaLayer

REFERENCE_TOLERANCE = 1e-4  # of z0 as recomputed against z0 as loaded, relative to max|z0|


class Factors(NamedTuple):
    """What a method takes from a weight (m, n): `left` (m, r), `right` (r, n), `start` (r) and `reference` (r).

    `start` is the trained diagonal's first value and `reference` what is subtracted from it; equal = function unchanged.
    """

    left: Tensor
    right: Tensor
    start: Tensor
    reference: Tensor


def _shapes(config: Any, weight: Tensor) -> Factors:
    """Factors of a meta weight: shapes only."""
    if getattr(config, "energy", None) is not None:
        raise ValueError("energy needs the base model's weights, which are on the meta device; load them, or give r")
    (m, n), r = weight.shape, min(config.r, *weight.shape)
    vector = weight.new_empty(r)
    return Factors(weight.new_empty(m, r), weight.new_empty(r, n), vector, vector)


@dataclass
class DiagonalConfig(DeltaConfig):
    """Fields of adapters that train a diagonal between frozen factors.

    Args:
        r: Trained entries per layer; clipped to min(m, n).
        decay_to_init: Keep z - z0 as the parameter, so that weight decay pulls towards the pretrained weight; False = the
            parameter is z itself and decay shrinks components of the pretrained weight, as in the papers' code. The saved
            tensor is the parameter.
        save_factors: "auto" = the factors are recomputed from the base at load and checked (ValueError on another base);
            True = they are saved too (r (m + n) numbers per layer) and need no check; False = as "auto", but a mismatch
            only warns.
        seed: Of whatever the method draws at random, together with the layer's name: every rank draws the same.
    """

    r: int = field(default=8, metadata={"help": "Trained entries per layer; clipped to min(in, out) features."})
    decay_to_init: bool = field(default=False, metadata={"help": "Weight decay pulls towards the pretrained weight."})
    save_factors: bool | str = field(
        default="auto", metadata={"help": "'auto', True or False: save the frozen factors."}
    )
    seed: int = field(default=0, metadata={"help": "Of what the method draws at random, with the layer's name."})

    def __post_init__(self) -> None:
        owner = type(self).__name__
        checks.integer(owner, "r", self.r, 1)
        checks.boolean(owner, "decay_to_init", self.decay_to_init)
        checks.one_of(owner, "save_factors", self.save_factors, ("auto", True, False))
        checks.integer(owner, "seed", self.seed, 0)
        super().__post_init__()


class DiagonalLayer(DeltaLayer):
    """Subclasses set the names of the saved tensors and implement `factorise`.

    Attributes:
        z_name: Container of the trained diagonal, e.g. `"svfit_sigma"`; its reference is saved as `z_name + "0"`.
    """

    z_name: ClassVar[str]

    def setup(self) -> None:
        prefix = self.z_name.partition("_")[0]
        self.left_name, self.right_name, self.scale_name = f"{prefix}_left", f"{prefix}_right", f"{prefix}_scale"
        self.adapter_layer_names = (self.z_name, self.scale_name)
        self.other_param_names = (f"{self.z_name}0", self.left_name, self.right_name, "_facts")
        setattr(self, self.z_name, nn.ParameterDict())
        setattr(self, self.scale_name, nn.ParameterDict())  # filled only where a method trains its scale
        setattr(self, f"{self.z_name}0", BufferDict(persistent=True))
        setattr(self, self.left_name, BufferDict(persistent=False))
        setattr(self, self.right_name, BufferDict(persistent=False))
        self._facts: dict[str, dict[str, Any]] = {}

    @abstractmethod
    def factorise(self, adapter_name: str, config: Any, weight: Tensor) -> Factors:
        """Factors of the weight (m, n), given in float32 or wider."""

    def scaling(self, config: Any) -> float:
        """The constant in front of dW."""
        return 1.0

    def build(self, adapter_name: str, config: Any, weight: Tensor) -> None:
        if is_fsdp_enabled():  # the host's name for FSDP with cpu_ram_efficient_loading
            raise ValueError(
                "fsdp_cpu_ram_efficient_loading is true, which accelerate can do for parameters only, and this adapter has "
                f"a buffer ({self.z_name}0): set it to false in the accelerate config"
            )
        factors = _shapes(config, weight) if weight.is_meta else self.factorise(adapter_name, config, weight)
        reference, start = factors.reference.clone(), factors.start.clone()
        if not config.init_weights:
            spread = reference.abs().mean().clamp_min(torch.finfo(reference.dtype).tiny)
            start = reference + spread * torch.randn_like(reference).clamp(-3, 3)
        trained = start - reference if config.decay_to_init else start
        scale = self.scaling(config)
        self._facts[adapter_name] = {
            "scale": scale,
            "shift": config.decay_to_init,
            "save_factors": config.save_factors,
            "start": trained if trained.is_meta else trained.detach().cpu().clone(),
            "reference": reference if reference.is_meta else reference.cpu().clone(),
        }
        self._set_factors(adapter_name, factors)
        getattr(self, f"{self.z_name}0")[adapter_name] = reference
        getattr(self, self.z_name)[adapter_name] = nn.Parameter(trained.contiguous())
        if getattr(config, "train_scale", False):  # (1), for FSDP2 shards no scalars
            getattr(self, self.scale_name)[adapter_name] = nn.Parameter(reference.new_full((1,), scale))

    def _set_factors(self, adapter_name: str, factors: Factors) -> None:
        persistent = self._facts[adapter_name]["save_factors"] is True
        for name, value in ((self.left_name, factors.left), (self.right_name, factors.right)):
            container = getattr(self, name)
            container.persistent = persistent  # of the entry registered next, not of its neighbours
            container[adapter_name] = value.contiguous()

    def undo_casts(self) -> None:
        for name in self._facts:
            self._widen(name)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.undo_casts()
        super()._load_from_state_dict(*args)
        for name, facts in self._facts.items():
            z = getattr(self, self.z_name)[name]
            facts["loaded"] = None if z.is_meta or isinstance(z, DTensor) else z.detach().cpu().clone()

    def _widen(self, adapter_name: str) -> None:
        """The diagonal in its reference's dtype again: trl casts what trains on a bitsandbytes model to bfloat16.

        Where the cast rounded what the adapter started from or was loaded with, that comes back. Anything else has lost
        what it lost.
        """
        z0, facts = getattr(self, f"{self.z_name}0")[adapter_name], self._facts[adapter_name]
        z = getattr(self, self.z_name)[adapter_name]
        if isinstance(z, DTensor) or z.is_meta or torch.promote_types(z.dtype, z0.dtype) == z.dtype:
            return
        for known in (facts.get("loaded"), facts["start"]):
            if known is not None and not known.is_meta and torch.equal(known.to(z.dtype), z.detach().cpu()):
                z.data = known.to(z.device, z0.dtype)
                break
        scales = getattr(self, self.scale_name)
        if adapter_name in scales:
            scales[adapter_name].data = scales[adapter_name].data.to(z0.dtype)

    def coefficient(self, adapter_name: str) -> Tensor:
        """c (r) = scale * z - scale0 * z0, exactly zero at the start."""
        z = getattr(self, self.z_name)[adapter_name]
        z0 = getattr(self, f"{self.z_name}0")[adapter_name]
        facts, scales = self._facts[adapter_name], getattr(self, self.scale_name)
        if torch.promote_types(z.dtype, z0.dtype) != z.dtype and (adapter_name in scales or not facts["shift"]):
            raise ValueError(  # the rounding of z would be larger than what a step changes, and the start not exact
                f"{self.z_name} of {self.module_name} arrives in {z.dtype} and its reference in {z0.dtype}, as FSDP2 with "
                "mixed precision has it, or a cast after training began: set decay_to_init=True and no train_scale, which "
                "trains the small difference, or mixed_precision: 'no'"
            )
        fixed = facts["scale"]
        if adapter_name in scales:
            scale = scales[adapter_name]
            return scale * z + (scale - fixed) * z0 if facts["shift"] else scale * z - fixed * z0
        shift = z if facts["shift"] else z - z0
        return shift if fixed == 1.0 else fixed * shift

    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Right (r, n) and Left diag(c) (m, r): the LoRA with the same function at scaling 1."""
        left, right = getattr(self, self.left_name)[adapter_name], getattr(self, self.right_name)[adapter_name]
        return right, left * self.coefficient(adapter_name)

    def delta_forward(self, adapter_name: str, x: Tensor) -> Tensor:
        right = getattr(self, self.right_name)[adapter_name]
        left = getattr(self, self.left_name)[adapter_name]
        x = self._cast_input_dtype(x, right.dtype)
        return F.linear(F.linear(x, right) * self.coefficient(adapter_name), left)

    def delta_vector(self, adapter_name: str, x: Tensor) -> Tensor:
        right = getattr(self, self.right_name)[adapter_name].double()
        left = getattr(self, self.left_name)[adapter_name].double()
        return left @ (self.coefficient(adapter_name).double() * (right @ x.double()))

    def delta_weight(self, adapter_name: str) -> Tensor:
        left, right = getattr(self, self.left_name)[adapter_name], getattr(self, self.right_name)[adapter_name]
        c = self.coefficient(adapter_name)
        if left.device.type == "cpu":  # half-precision products are slow there and lose the small ones
            left, right, c = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (left, right, c))
        return (left * c) @ right

    # --- is this the base the adapter was trained on? -------------------------------------------------------------
    def was_loaded(self, adapter_name: str) -> bool:
        z = getattr(self, self.z_name)[adapter_name]
        z0 = getattr(self, f"{self.z_name}0")[adapter_name]
        facts = self._facts[adapter_name]
        if z.device.type == "meta":
            return False
        same = torch.equal(z.detach().cpu(), facts["start"].to(z.dtype))
        return not (same and torch.equal(z0.cpu(), facts["reference"].to(z0.dtype)))

    def needs_this_base(self, adapter_name: str) -> bool | None:
        return {"auto": True, True: False, False: None}[self._facts[adapter_name]["save_factors"]]

    def check_loaded(self, adapter_name: str) -> str | None:
        z0 = getattr(self, f"{self.z_name}0")[adapter_name].double().cpu()
        expected = self._facts[adapter_name]["reference"].double()
        worst, limit = float((z0 - expected).abs().max()), REFERENCE_TOLERANCE * float(expected.abs().max())
        if worst <= limit:
            return None
        return f"{self.z_name}0 differs by {worst:.3g} from the base's where {limit:.3g} is allowed"

    def generator_seed(self, config: Any) -> int:
        """A seed from (config.seed, the layer's name): the same on every rank and machine."""
        return zlib.crc32(f"{config.seed}:{self.module_name}".encode())
