"""IncreLoRA: at an allocation the modules whose products matter most gain components, until the budget is spent.

Score S = sum |dW o dL/ddW| / sqrt(mn); I <- b1 I + (1 - b1) S; U <- b2 U + (1 - b2) |S - I|; modules are ranked by I U.
"""

from __future__ import annotations

import logging
import math
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from hfgen.kit import checks, steps
from hfgen.kit.growing import GrowingConfig, GrowingLayer, GrowingTuner
from hfgen.kit.lowrank import add_orthogonality

logger = logging.getLogger("hfgen")
_told: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class IncreLoraLinear(GrowingLayer):
    """One adapted layer; trains `increlora_A` (R, n), `increlora_E` (R, 1) and `increlora_B` (m, R)."""

    prefix, averages = "increlora", 2  # I and U

    def before_steps(self, name: str, layers: list[Any], optimizer: Optimizer) -> None:
        config, trainer = self._driven[name], steps.trainer_of(optimizer)
        total = trainer and trainer.state.max_steps
        if trainer and trainer.state.global_step == 0 and int(self.increlora_state[name][0]):
            for layer in layers:
                layer.new_run(name)
        plan, left = config.plan(len(layers), total), self._left(name, layers)
        if plan is not None and left:
            plan.check(type(config).__name__, config.gains(len(layers)), total)
        elif left and optimizer not in _told:
            _told.add(optimizer)
            warnings.warn(
                "increlora's ranks stay as they are: no transformers Trainer steps this optimizer; give init_warmup, "
                "incre_interval and top_h in IncreLoraConfig"
            )
        ramp = config.warmup_steps if config.warmup_steps is not None else plan.interval if plan else 0
        self._plans[name] = (plan if left else None), ramp
        if plan is not None and left and plan.near(int(self.increlora_state[name][0]), config.score_window):
            self._average(name, layers)
        for layer in layers:
            layer._scores.pop(name, None)
            if config.orth_reg:
                factor, (a, _, b) = config.orth_reg / (2 * len(layers)), layer.trained_tensors(name)
                add_orthogonality(a, b, factor, getattr(optimizer, "grad_scale", None))

    def _left(self, name: str, layers: list[Any]) -> int:
        """Components that the budget has left."""
        return int(self._driven[name].budget(len(layers)) - sum(layer.sizes(name)[0] for layer in layers))

    def _average(self, name: str, layers: list[Any]) -> None:
        """I and U with the scores of this step. One that is not finite (GradScaler has skipped a step) says nothing."""
        config, device = self._driven[name], self.increlora_state[name].device
        none = torch.zeros((), dtype=torch.float64, device=device)
        scores = torch.stack([layer._scores.get(name, none).to(device) for layer in layers]) / steps.loss_scale()
        scores = steps.mean_over_ranks(scores, steps.ddp_around(self))
        for layer, score in zip(layers, scores, strict=True) if bool(scores.isfinite().all()) else ():
            mean, spread = layer.increlora_state[name][1:].view(torch.float64)
            mean.mul_(config.beta1).add_(score, alpha=1 - config.beta1)
            spread.mul_(config.beta2).add_((score - mean).abs(), alpha=1 - config.beta2)

    def after_steps(self, name: str, layers: list[Any], optimizer: Optimizer) -> None:
        if name not in self._plans:
            return
        (plan, ramp), config, step = self._plans.pop(name), self._driven[name], int(self.increlora_state[name][0])
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for layer in layers:
            layer.restart(name, step, ramp, optimizer, groups)
            layer.increlora_state[name][0] += 1
        if plan is not None and plan.grows(step):
            ratio = steps.rate_ratio(groups[id(self.increlora_A[name])])
            self._allocate(name, layers, optimizer, step, plan.top, ratio)
        due = plan is not None and self._left(name, layers) > 0 and plan.near(step + 1, config.score_window)
        for layer in layers:
            layer._scoring[name] = due

    def _allocate(self, name: str, layers: list[Any], optimizer: Optimizer, step: int, top: int, ratio: float) -> None:
        """The `top` modules of the largest I U (ties: by name) gain components, as far as the budget goes."""
        config, left = self._driven[name], self._left(name, layers)
        rank = [layer.increlora_state[name][1:].view(torch.float64).prod() for layer in layers]
        order = torch.stack(rank).argsort(descending=True, stable=True)[:top].tolist()
        gains = {i: min(config.increment, left - k * config.increment) for k, i in enumerate(order)}
        gains = {i: gain for i, gain in gains.items() if gain > 0}
        spent = sum(gains.values()) == left
        for i in range(len(layers)) if spent else gains:
            r = layers[i].sizes(name)[0] + gains.get(i, 0)
            reserve = config.increment if config.advance_learn and not spent else 0
            layers[i].fit(name, r, r + reserve, step, ratio, optimizer)
        steps.rebuild(steps.ddp_around(self))
        gained = ", ".join(f"{layers[i].module_name} +{gain}" for i, gain in gains.items())
        logger.info("increlora: after step %d %s; of the budget %d are left", step, gained, left - sum(gains.values()))


class IncreLoraModel(GrowingTuner):
    """The peft tuner of IncreLoRA."""

    prefix = "increlora_"
    tuner_layer_cls = IncreLoraLinear


@dataclass
class IncreLoraConfig(GrowingConfig):
    """Configuration of IncreLoRA. Trainable numbers: the sum over targets of r (m + n + 1), and of the reserve's.

    Args:
        lora_alpha: Numerator of the constant s in front of the product.
        lora_dropout: Dropout of the input of the factors.
        advance_learn: Keep a reserve of incre_rank components per module, whose directions learn before they count. It
            takes part in training forwards only, with the weight 1e-5.
        scale: "alpha_over_rank", s = lora_alpha / (r + 1e-5) (the authors'; dW shrinks when r grows), or "constant",
            s = lora_alpha / target_r.
        beta1, beta2: Of the moving averages of the score and of its deviation.
        orth_reg: Factor of the orthogonality term; 0 = off.
        score_window: Score in so many steps before each allocation; None = in every one until the budget is spent.

    Other arguments: see `hfgen.kit.growing.GrowingConfig` (ranks, budget, schedule) and `hfgen.kit.adapter.DeltaConfig`.
    """

    lora_alpha: float = field(default=16, metadata={"help": "Numerator of the scale."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the factors' input."})
    advance_learn: bool = field(default=True, metadata={"help": "Keep a reserve that learns in advance."})
    scale: str = field(default="alpha_over_rank", metadata={"help": "'alpha_over_rank' or 'constant'."})
    beta1: float = field(default=0.85, metadata={"help": "Of the moving average of the score."})
    beta2: float = field(default=0.85, metadata={"help": "Of the moving average of its deviation."})
    orth_reg: float = field(default=0.1, metadata={"help": "Factor of the orthogonality term."})
    score_window: int | None = field(default=64, metadata={"help": "Steps scored before an allocation; None = all."})

    tuner_cls: ClassVar = IncreLoraModel

    def __post_init__(self) -> None:
        owner = "IncreLoraConfig"
        if self.score_window is not None:
            checks.integer(owner, "score_window", self.score_window, 1)
        checks.number(owner, "lora_alpha", self.lora_alpha, 0.0)
        for name, high in (("lora_dropout", 0.99), ("beta1", 0.9999), ("beta2", 0.9999), ("orth_reg", math.inf)):
            if getattr(self, name) != 0 or isinstance(getattr(self, name), bool):
                checks.number(owner, name, getattr(self, name), 0.0, high)
        checks.boolean(owner, "advance_learn", self.advance_learn)
        checks.one_of(owner, "scale", self.scale, ("alpha_over_rank", "constant"))
        super().__post_init__()

    @property
    def start(self) -> tuple[int, int]:
        """(rank, components) of a new module."""
        grows = self.advance_learn and (self.target_total_rank is not None or self.target_r > self.init_r)
        return self.init_r, self.init_r + self.increment * grows

    def scaling(self, rank: int) -> float:
        """s, the constant in front of a product of that rank."""
        return self.lora_alpha / (rank + 1e-5 if self.scale == "alpha_over_rank" else self.target_r)
