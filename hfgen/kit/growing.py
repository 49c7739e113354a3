"""Adapters whose rank changes while they train: dW = s B diag(E) A with A (R, n), E (R, 1), B (m, R).

The first r of R components count; the others are a reserve that learns its directions in advance, with a small fixed E.
Parameters stay the objects they are and change their shape in place, so the optimizer keeps its groups and a run is
resumed by the host's own ways.
"""

from __future__ import annotations

import functools
import logging
import zlib
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from hfgen.kit import checks, steps
from hfgen.kit.adapter import DeltaConfig, DeltaTuner
from hfgen.kit.lowrank import ProductLayer, scored

logger = logging.getLogger("hfgen")
RESERVE = 1e-5  # E of a component that does not count yet
LONG_AGO = 1 << 40  # steps
DOES = "changes the shapes of its factors while it trains"


class Plan(NamedTuple):
    """Growth takes place at 0-based steps t > warmup with t % interval == 0, in `top` modules each."""

    warmup: int
    interval: int
    top: int

    def grows(self, step: int) -> bool:
        """Whether growth takes place at the end of this step."""
        return step > self.warmup and step % self.interval == 0

    def near(self, step: int, window: int | None) -> bool:
        """Whether `step` is one of the last `window` up to a growth (that one among them); None: always."""
        after = max(step, self.warmup + 1)
        return window is None or after - step + -after % self.interval < window

    def length(self, gains: int) -> int:
        """Steps of a run in which there are so many gains."""
        first = (self.warmup // self.interval + 1) * self.interval
        return first + (-(-gains // self.top) - 1) * self.interval + 1

    def check(self, owner: str, gains: int, total: int | None) -> None:
        """Raises ValueError where a run of `total` steps is too short for so many gains (None: not known)."""
        if gains > 0 and total is not None and self.length(gains) > total:
            raise ValueError(
                f"max_steps is {total}, but {owner} needs {self.length(gains)} steps for {gains} gains "
                f"(init_warmup={self.warmup}, incre_interval={self.interval}, top_h={self.top}); train longer, lower "
                "init_warmup or incre_interval, or raise top_h"
            )


def half_run_plan(
    gains: int, modules: int, total: int | None, warmup: int | None, interval: int | None, top: int | None
) -> Plan | None:
    """Fills in what is None, such that `gains` take place in the first half of a run of `total` steps, if that can be:
    an interval of a hundredth of the run, a warm-up of one interval. None where that takes a length and there is none."""
    if total is None and (warmup is None or interval is None or top is None):
        return None
    interval = interval or max(1, (total or 0) // 100)
    warmup = interval if warmup is None else warmup
    rounds = ((total or 0) // 2 - Plan(warmup, interval, 1).length(1) + 1) // interval + 1
    return Plan(warmup, interval, min(modules, top or max(1, -(-gains // max(1, rounds)))))


@dataclass
class GrowingConfig(DeltaConfig):
    """Fields of adapters that start with a small rank everywhere and grow until a budget is spent.

    Args:
        init_r: Rank every module starts with.
        target_r: Mean rank at the end: the budget is target_r per module.
        target_total_rank: The budget as the sum of all ranks, in place of target_r.
        incre_rank: Components a module gains at a time; None = 1, 2, 3, 4 for target_r 2, 4, 6, 8, else 1.
        init_warmup: Steps before the first allocation. None = incre_interval.
        incre_interval: Steps between allocations. None = a hundredth of the Trainer's.
        top_h: Modules that gain at an allocation. None = so many that half of the Trainer's steps spend the budget.
        warmup_steps: Ramp of a new component's own learning rate. None = incre_interval.
        seed: Of the components' directions.
    """

    init_r: int = field(default=1, metadata={"help": "Rank at the start."})
    target_r: int = field(default=2, metadata={"help": "Mean rank at the end."})
    target_total_rank: int | None = field(default=None, metadata={"help": "Sum of ranks at the end."})
    incre_rank: int | None = field(default=None, metadata={"help": "Components a module gains at a time."})
    init_warmup: int | None = field(default=None, metadata={"help": "Steps before the first allocation."})
    incre_interval: int | None = field(default=None, metadata={"help": "Steps between allocations."})
    top_h: int | None = field(default=None, metadata={"help": "Modules that gain at an allocation."})
    warmup_steps: int | None = field(default=None, metadata={"help": "Ramp of a new component's learning rate."})
    seed: int = field(default=0, metadata={"help": "Of the components' directions."})

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("target_total_rank", "incre_rank", "init_warmup", "incre_interval", "top_h", "warmup_steps"):
            if getattr(self, name) is not None:
                checks.integer(owner, name, getattr(self, name), 0 if "warmup" in name else 1)
        for name, low in (("init_r", 1), ("target_r", 1), ("seed", 0)):
            checks.integer(owner, name, getattr(self, name), low)
        if self.target_total_rank is None and self.target_r < self.init_r:
            raise ValueError(
                f"{owner}.target_r is {self.target_r} and init_r is {self.init_r}; give at least {self.init_r}"
            )
        super().__post_init__()

    @property
    def increment(self) -> int:
        """h, components per gain."""
        return self.incre_rank or {2: 1, 4: 2, 6: 3, 8: 4}.get(self.target_r, 1)

    def budget(self, modules: int) -> int:
        """The sum of ranks at the end. Raises ValueError where so many modules start with more."""
        total = self.target_total_rank or self.target_r * modules
        if total < self.init_r * modules:
            raise ValueError(
                f"{type(self).__name__}.target_total_rank is {total}, but {modules} modules start with "
                f"init_r={self.init_r} each; give at least {self.init_r * modules}"
            )
        return total

    def gains(self, modules: int) -> int:
        """How often a module gains until the budget is spent."""
        return -(-(self.budget(modules) - self.init_r * modules) // self.increment)

    def plan(self, modules: int, total: int | None) -> Plan | None:
        """When ranks grow in a run of `total` steps; None where that has to be said and there is no Trainer."""
        return half_run_plan(self.gains(modules), modules, total, self.init_warmup, self.incre_interval, self.top_h)


class GrowingLayer(steps.Stepwise, ProductLayer):
    """One adapted layer; trains `<prefix>_A` (R, n), `_E` (R, 1) and `_B` (m, R). Subclasses set `prefix` and `averages`.

    `<prefix>_born` (2, R) and `_promoted` (2, r) are the times that `hfgen.kit.steps.restart` wants, of A and B, and of E;
    `_state` (1 + averages) is the number of steps done (-1: to be loaded) and the method's own averages. All are int64,
    floats by their bits, so that no cast of the model rounds them.

    The config is a `GrowingConfig` with `start` (r, R), `scaling(r)` and `lora_dropout`.
    """

    prefix: ClassVar[str]
    averages: ClassVar[int]

    def setup(self) -> None:
        self.adapter_layer_names = tuple(f"{self.prefix}_{part}" for part in ("A", "E", "B"))
        self._buffers_of = tuple(f"{self.prefix}_{part}" for part in ("born", "promoted", "state"))
        self.other_param_names = (*self._buffers_of, "_driven", "_first", "_scores", "_scoring", "_plans", "_before")
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in self._buffers_of:
            setattr(self, name, BufferDict(persistent=True))
        self.prepare_steps()
        self.training = self.base_layer.training  # a new module is in training mode, whatever the model is in
        self._scores: dict[str, Tensor] = {}  # `importance` of the coming step, so far
        self._scoring: dict[str, bool] = {}  # whether it is wanted; unknown, so True, at the first
        self._plans: dict[str, Any] = {}  # between the two hooks of a step
        self._before: dict[str, list[tuple[nn.Parameter, int, Tensor, Tensor]]] = {}  # what `restart` wants

    def build(self, adapter_name: str, config: Any, weight: Tensor) -> None:
        if not config.inference_mode:
            steps.refuse_sharded(type(config).__name__, self.get_base_layer()._parameters.get("weight"), does=DOES)
        saved = config._fingerprint.get(self.module_name, {}).get("ranks")  # the shapes that a file will fill
        self._start(adapter_name, config, weight, -1 if saved else 0, *(saved or config.start))
        self.drive(adapter_name, config)

    def _start(self, name: str, config: Any, like: Tensor, step: int, r: int, size: int) -> None:
        a, b = self._draw(config, -1, size, like)
        e = like.new_zeros(size, 1)
        if not config.init_weights:
            a, b = torch.randn_like(a) / self.in_features**0.5, torch.randn_like(b) / self.out_features**0.5
            e += 1 / config.scaling(r)
        e[r:] = RESERVE
        for attr, value in zip(self.adapter_layer_names, (a, e, b), strict=True):
            if name in getattr(self, attr):
                getattr(self, attr)[name].data = value
            else:
                getattr(self, attr)[name] = nn.Parameter(value)
        state = torch.tensor([step, *[0] * self.averages])
        zeros = (torch.zeros(2, size, dtype=torch.int64), torch.zeros(2, r, dtype=torch.int64), state)
        for attr, value in zip(self._buffers_of, zeros, strict=True):
            getattr(self, attr)[name] = value.to(like.device)

    def _draw(self, config: Any, step: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """A (count, n) and B (m, count) from N(0, 0.02^2), the same on every rank and in every resumed run."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed}:{self.module_name}:{step}".encode()))
        a, b = (torch.randn(count, s, generator=generator) * 0.02 for s in (self.in_features, self.out_features))
        return a.to(like), b.T.contiguous().to(like)

    def times(self, name: str, part: str) -> Tensor:
        """One of the buffers: "born", "promoted" or "state"."""
        found: Tensor = getattr(self, f"{self.prefix}_{part}")[name]
        return found

    def sizes(self, name: str) -> tuple[int, int]:
        """(r, R): the components that count, and all."""
        return self.times(name, "promoted").shape[1], len(getattr(self, self.adapter_layer_names[0])[name])

    # --- the product --------------------------------------------------------------------------------------------------
    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        right, left = self._factors(adapter_name)
        r = self.sizes(adapter_name)[0]
        return right[:r], left[:, :r]

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """s E o A (R, n) and B (m, R), with the reserve, whose E gets no gradient."""
        (a, e, b), (r, _) = self.trained_tensors(name), self.sizes(name)
        return self._driven[name].scaling(r) * torch.cat([e[:r], e[r:].detach()]) * a, b

    def delta_forward(self, adapter_name: str, x: Tensor) -> Tensor:
        """The reserve takes part in training only."""
        a, e, _ = self.trained_tensors(adapter_name)
        if not (self.training and a.requires_grad):
            return super().delta_forward(adapter_name, x)
        config = self._driven[adapter_name]
        if not torch.compiler.is_compiling():
            if not self._checked:
                steps.refuse_sharded(type(config).__name__, a, self, DOES)
                self._checked = True
            self.refuse_unseen_steps(adapter_name, self.adapter_layer_names[1], e)
        right, left = self._factors(adapter_name)
        x = F.dropout(self._cast_input_dtype(x, right.dtype), config.lora_dropout)
        delta = F.linear(F.linear(x, right), left)
        if self._scoring.get(adapter_name, True) and delta.requires_grad:
            delta = scored(delta, x, left, right, functools.partial(self._take, adapter_name))
        return delta

    def _take(self, name: str, score: Tensor) -> None:
        self._scores[name] = self._scores.get(name, 0) + score

    # --- steps --------------------------------------------------------------------------------------------------------
    def before_step(self, name: str) -> None:
        """Note the components that were not there at the start, their dimension and times: for `restart`."""
        first_r, first = self._driven[name].start
        starts = (first, first_r, first)
        self._before[name] = [
            (p, dim, p.detach().narrow(dim, start, p.shape[dim] - start).clone(), self.times(name, part)[:, start:])
            for p, dim, start, part in zip(
                self.trained_tensors(name), (0, 0, 1), starts, ("born", "promoted", "born"), strict=True
            )
            if p.shape[dim] > start
        ]

    def new_run(self, name: str) -> None:
        """Steps count from 0 again, and the components that are there have the rate of their group."""
        self.times(name, "state")[0] = 0
        one = torch.tensor(1.0, dtype=torch.float64).view(torch.int64)
        for part in ("born", "promoted"):
            self.times(name, part)[0], self.times(name, part)[1] = -LONG_AGO, one.to(self.times(name, part).device)

    def restart(self, name: str, step: int, warmup: int, optimizer: Optimizer, groups: dict[int, Any]) -> None:
        """Give the components born in training the update of their own rates; `groups`: of the parameters' ids."""
        if step == 0:
            steps.refuse_odd_state(optimizer, self.trained_tensors(name))
        for p, dim, old, times in self._before.pop(name):
            steps.restart(p, dim, old, times, step, warmup, optimizer, groups[id(p)])

    @torch.no_grad()
    def fit(
        self, name: str, r: int, size: int, step: int = 0, ratio: float = 0.0, optimizer: Optimizer | None = None
    ) -> None:
        """Make it `size` components of which `r` count; new ones are born at `step`, with the rate ratio `ratio`."""
        now, parameters = self.sizes(name), self.trained_tensors(name)
        if now == (r, size):
            return
        extra = max(0, size - now[1])
        a, b = self._draw(self._driven[name], step, extra, parameters[0])
        e = parameters[1].new_full((extra, 1), RESERVE)
        e[: max(0, r - now[1])] = 0.0  # without a reserve
        for p, dim, new in zip(parameters, (0, 0, 1), (a, e, b), strict=True):
            steps.resize(p, dim, size, new, optimizer)
        birth = torch.stack([torch.tensor(step), torch.tensor(ratio, dtype=torch.float64).view(torch.int64)])[:, None]
        for part, count in (("born", size), ("promoted", r)):
            old = self.times(name, part)
            added = birth.to(old).expand(2, max(0, count - old.shape[1]))
            getattr(self, f"{self.prefix}_{part}")[name] = torch.cat([old[:, :count], added], 1)

    # --- files --------------------------------------------------------------------------------------------------------
    def fingerprint(self, adapter_name: str) -> dict[str, list[Any]]:
        return {**super().fingerprint(adapter_name), "ranks": list(self.sizes(adapter_name))}

    def was_loaded(self, adapter_name: str) -> bool:
        state = self.times(adapter_name, "state")
        return not state.is_meta and int(state[0]) >= 0

    def needs_this_base(self, adapter_name: str) -> bool | None:
        return False

    @torch.compiler.disable
    def verify(self, adapter_name: str) -> None:
        """At the first use: an adapter started afresh with a config that was saved starts with the ranks of a start."""
        if not self.was_loaded(adapter_name):
            config, like = self._driven[adapter_name], getattr(self, self.adapter_layer_names[0])[adapter_name].detach()
            self._start(adapter_name, config, like, 0, *config.start)
        self.forget_first(adapter_name)
        super().verify(adapter_name)


class GrowingTuner(DeltaTuner):
    """The tuner of a growing method."""

    tuner_layer_cls: type[GrowingLayer]

    def _layers(self, adapter_name: str) -> list[GrowingLayer]:
        return [m for m in self.modules() if isinstance(m, GrowingLayer) and m._has(adapter_name)]

    def ranks(self, adapter_name: str = "default") -> dict[str, int]:
        """{module: its rank now}"""
        return {layer.module_name: layer.sizes(adapter_name)[0] for layer in self._layers(adapter_name)}

    def counts(self, adapter_name: str = "default") -> tuple[int, int]:
        """Trained numbers of the components that count, r (m + n + 1) a module, and of the reserve, (R - r)(m + n)."""
        layers = self._layers(adapter_name)
        found = [(layer.in_features + layer.out_features, *layer.sizes(adapter_name)) for layer in layers]
        return sum(r * (mn + 1) for mn, r, _ in found), sum((size - r) * mn for mn, r, size in found)

    def finalize(self, adapter_name: str = "default") -> None:
        """Drop the reserve; the function in eval stays as it is. After training: an optimizer would not follow."""
        for layer in self._layers(adapter_name):
            r = layer.sizes(adapter_name)[0]
            layer.fit(adapter_name, r, r)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As saved; a budget that is not spent is told of."""
        found = super()._get_adapter_state_dict(model, config, *args, **kwargs)
        ranks = [t.shape[1] for name, t in found.items() if f".{cls.prefix}promoted" in name]
        done = max((int(t[0]) for name, t in found.items() if f".{cls.prefix}state" in name), default=0)
        if done > 0 and sum(ranks) < config.budget(len(ranks)):
            words = "%s: saved after %d steps with %d of the budget's %d components"
            logger.warning(words, config.method, done, sum(ranks), config.budget(len(ranks)))
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """A file of other ranks (a checkpoint to resume from) first gives the layers its shapes."""
        mapped = BaseTuner._remap_adapter_state_dict_for_load.__func__(cls, model, config, adapter_name, state_dict)
        for name, layer in model.named_modules():
            if isinstance(layer, GrowingLayer) and layer._has(adapter_name):
                a, times = (mapped.get(f"{name}.{cls.prefix}{part}.{adapter_name}") for part in ("A", "promoted"))
                if a is not None and times is not None and times.ndim == 2 and 0 < times.shape[1] <= len(a):
                    layer.fit(adapter_name, times.shape[1], len(a))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
