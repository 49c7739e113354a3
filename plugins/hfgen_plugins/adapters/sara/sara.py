"""SaRA, arXiv:2409.06633. M = {|w| < theta} with one theta for all targeted tensors; the entries in M are trained.

After `progressive_at` optimizer steps M shrinks to the entries that are still below theta; the others stay as learnt.
The nuclear term adds lambda ||W o M||_* of one matrix drawn per step.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import Tensor, nn

from hfgen.kit import checks, sparse
from hfgen.kit.adapter import DeltaConfig

logger = logging.getLogger("hfgen")
DENSITY = 0.06  # where neither density nor threshold is given


def sara_learning_rate(threshold: float) -> float:
    """The authors' learning rate, 1e-3 exp(-350 threshold)."""
    return 1e-3 * math.exp(-350 * threshold)


class SaraLinear(sparse.SparseLayer):
    """One adapted module; trains `sara_values` (nnz)."""

    values_name = "sara_values"

    def setup(self) -> None:
        super().setup()
        self.sara_step = BufferDict(persistent=True)  # optimizer steps done (1), int64, where something depends on them
        self.other_param_names = (*self.other_param_names, "sara_step")

    def choose(self, adapter_name: str, config: SaraConfig, tensors: list[Tensor]) -> list[Tensor]:
        return [sparse.below(t, config._threshold) for t in tensors]

    def shrinks(self, config: SaraConfig) -> bool:
        return config.progressive_at is not None

    def build(self, adapter_name: str, config: SaraConfig, weight: Tensor) -> None:
        super().build(adapter_name, config, weight)
        self._facts[adapter_name]["threshold"] = config._threshold
        if config.stepwise:
            self.sara_step[adapter_name] = torch.zeros(1, dtype=torch.int64)
            self.drive(adapter_name, config)

    def before_steps(self, name: str, layers: list[SaraLinear], optimizer: torch.optim.Optimizer) -> None:
        config, step = self._facts[name]["config"], int(self.sara_step[name])
        matrices = [layer for layer in layers if config.nuclear_weight and layer.is_matrix(name)]
        if matrices:
            chosen = matrices[zlib.crc32(f"{config.seed}:{step}".encode()) % len(matrices)]
            chosen.add_nuclear_gradient(name, getattr(optimizer, "grad_scale", None))
        for layer in layers:
            layer.sara_step[name] += 1
            if step == config.progressive_at:
                layer.shrink(name, optimizer if config.reset_state_on_progress else None)
        if step == config.progressive_at:
            active = sum(int(layer.sara_active[name].sum()) for layer in layers)
            every = sum(layer.sara_values[name].numel() for layer in layers)
            logger.info("sara: after step %d, %d of %d entries are still below the threshold", step, active, every)

    def shrink(self, name: str, optimizer: torch.optim.Optimizer | None) -> None:
        """M' = M and {|w| < theta}. With the optimizer: its state of the values is dropped and this step leaves them."""
        values = self.sara_values[name]
        self.freeze(name, sparse.below(values.detach(), self._facts[name]["threshold"]))
        if optimizer is not None:
            optimizer.state.pop(values, None)
            values.grad = None
        elif values.grad is not None:
            values.grad.mul_(self.sara_active[name])

    def is_matrix(self, name: str) -> bool:
        """Whether the nuclear term may act here: a 2-D weight with both sides above nuclear_min_dim, in use."""
        shape, large = self._shape(), self._facts[name]["config"].nuclear_min_dim
        return len(shape) == 2 and min(shape) > large and self.sara_values[name].grad is not None

    def add_nuclear_gradient(self, name: str, grad_scale: Tensor | None) -> None:
        """values.grad += lambda (U V^T) o M, of W o M = U S V^T."""
        values, index = self.sara_values[name], self.indices(name)[0]
        active = self.sara_active[name] if name in self.sara_active else torch.ones_like(values)
        term = sparse.nuclear_gradient(self._shape(), index, (values.detach() * active)[: len(index)])
        term = nn.functional.pad(term, (0, len(values) - len(index))) * active  # zeros for the bias
        factor = self._facts[name]["config"].nuclear_weight * (1.0 if grad_scale is None else grad_scale)
        values.grad += (factor * term).to(values.grad.dtype)


class SaraModel(sparse.SparseTuner):
    """The peft tuner of SaRA."""

    prefix = "sara_"
    tuner_layer_cls = SaraLinear

    def _prepare_model(self, peft_config: SaraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        _maybe_include_all_linear_layers(peft_config, model)
        peft_config.resolve(lambda: self.target_tensors(peft_config, model))

    @classmethod
    def _get_adapter_state_dict(cls, config: SaraConfig, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        found = super()._get_adapter_state_dict(config=config, **kwargs)
        done = next((int(t) for name, t in found.items() if ".sara_step" in name), None)
        if done and config.progressive_at is not None and done <= config.progressive_at:
            logger.warning("sara: saved after %d steps, before the re-threshold at %d", done, config.progressive_at)
        return found


@dataclass
class SaraConfig(DeltaConfig):
    """Configuration of SaRA. Trainable numbers: the entries of all targets below the threshold.

    Args:
        threshold: Entries with |w| < threshold are trained (the authors' 2e-4, 8e-4, 2e-3); give this or `density`.
        density: Share of all targeted entries that is trained, the smallest first; ties are all taken. None, without a
            threshold, = 0.06.
        nuclear_weight: Factor lambda of the nuclear norm of W o M, of one matrix drawn per optimizer step (authors' script:
            5e-4). Its gradient is added once per step, after clipping. Needs a torch.optim.Optimizer.
        nuclear_min_dim: The term acts on 2-D weights with both sides above this.
        progressive_at: After so many optimizer steps only the entries still below the threshold go on (authors: half of
            the steps); None = never. Counted across resumes. Needs a torch.optim.Optimizer.
        reset_state_on_progress: Drop the optimizer's state of the values at that step, which then does not move them
            (the paper); False keeps it.
        seed: Of the draw of the nuclear term.

    `target_modules` may also be "all-tensors": every linear, convolution and norm layer. `bias` must be "none": the
    targets' biases take part by their size. Other arguments: see `hfgen.kit.adapter.DeltaConfig`.

    Raises:
        TypeError, ValueError: a field has a wrong type or value, no entry is below the threshold, or the base is on the
            meta device; the sentence names field, value and fix.
    """

    threshold: float | None = field(default=None, metadata={"help": "Entries of smaller magnitude are trained."})
    density: float | None = field(default=None, metadata={"help": "Share of entries trained; None = 0.06."})
    nuclear_weight: float = field(default=0.0, metadata={"help": "Factor of the nuclear norm; 0 = off."})
    nuclear_min_dim: int = field(default=64, metadata={"help": "Smallest side a matrix of that term exceeds."})
    progressive_at: int | None = field(default=None, metadata={"help": "Steps after which the mask shrinks."})
    reset_state_on_progress: bool = field(default=True, metadata={"help": "With a fresh optimizer state then."})
    seed: int = field(default=0, metadata={"help": "Of the draw of the nuclear term."})

    tuner_cls: ClassVar = SaraModel

    def __post_init__(self) -> None:
        owner = "SaraConfig"
        sparse.check_amount(owner, self.threshold, self.density)
        if self.nuclear_weight != 0 or isinstance(self.nuclear_weight, bool):
            checks.number(owner, "nuclear_weight", self.nuclear_weight, 0.0)
        checks.integer(owner, "nuclear_min_dim", self.nuclear_min_dim, 0)
        if self.progressive_at is not None:
            checks.integer(owner, "progressive_at", self.progressive_at, 1)
        checks.boolean(owner, "reset_state_on_progress", self.reset_state_on_progress)
        if not self.reset_state_on_progress and self.progressive_at is None:
            raise ValueError(f"{owner}.reset_state_on_progress is False, which needs progressive_at; set it too")
        checks.integer(owner, "seed", self.seed, 0)
        if isinstance(self.bias, str) and self.bias in ("all", "sara_only"):
            raise ValueError(
                f"{owner}.bias is {self.bias!r}; leave it 'none': biases of targets take part by their size"
            )
        super().__post_init__()

    @property
    def stepwise(self) -> bool:
        """Whether something happens at optimizer steps."""
        return bool(self.nuclear_weight) or self.progressive_at is not None

    def resolve(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Turn the density into the threshold of these tensors, and note both in the `hfgen` block of the file."""
        shapes = [tuple(t.shape) for t in tensors()]
        if not shapes:
            return  # nothing that can be adapted: the layer's own refusal names it
        if self.nuclear_weight and not any(len(s) == 2 and min(s) > self.nuclear_min_dim for s in shapes):
            raise ValueError(
                f"SaraConfig.nuclear_weight is {self.nuclear_weight} but no target is a matrix with both sides above "
                f"nuclear_min_dim={self.nuclear_min_dim}; lower that, or set nuclear_weight=0.0"
            )
        density = DENSITY if self.density is None else self.density
        self._threshold = sparse.magnitude_threshold("SaraConfig", self.threshold, density, tensors)
        if not self._fingerprint:  # else the config is a file's, and says what the file was made on
            dtype = str(next(iter(tensors())).dtype).removeprefix("torch.")
            self.hfgen = {**(self.hfgen or {}), "threshold": self._threshold, "base_dtype": dtype}
