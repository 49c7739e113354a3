"""The callback that prunes along the schedule and keeps the zeros."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hfgen.kit import checks
from hfgen.kit.examples import tiny_run
from hfgen.kit.monitor import Event, MonitorCallback
from hfgen.kit.steps import refuse_sharded

from .magnitude import OWNER, extended, inputs_last, outside_pattern, select, sparsity_at

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a weight: integers of that size


class GradualPruningCallback(MonitorCallback):
    """Prunes a model while it trains, by magnitude and along a cubic schedule; pruned weights are zero from then on.

    After an optimizer step in which the schedule asks for it, the smallest weights are added to the mask until exactly
    round(s * N) of a layer's N weights (of all layers' together with ``scope="global"``) are zero. After every optimizer
    step pruned weights are set to zero again, whatever momentum and weight decay made of them, and their gradients are
    zeroed before they are clipped. So evaluations and checkpoints at any step, and what `save_pretrained` writes, hold
    plain weights with zeros; masks are in the callback's own file of a checkpoint and resume by themselves.

    What it buys: a checkpoint with zeros is NOT smaller on disk (compressed it is), nor faster where the runtime has no
    kernels for its pattern (2:4). At equal non-zero weights the pruned model was better than a small dense one in the
    paper, up to some sparsity; beyond it the small dense one wins (the card's claim measures where).

    Without begin_step, end_step and frequency: from a sixth of the run (not before the end of the warm-up), over three
    fifths of the steps that are then left, every twentieth of these. They are fixed when a run begins and saved.

    Metrics, under ``hfgen/gradual_pruning/``, at every update, evaluation and at the end: ``sparsity`` (share of zeros in
    the pruned layers), ``scheduled``, ``zeros`` (their number), ``sparsest_layer`` (the highest share in one layer).

    Findings: ``too_late`` (the schedule is longer than the run), ``unfinished`` (the run ended before it did),
    ``empty_layer`` (no weight of a layer is left).

    Args:
        final_sparsity: s_f, share of the weights that are zero in the end; None with a pattern, which gives it.
        pattern: ``"n:m"``, e.g. ``"2:4"``: n of every m consecutive inputs of an output stay. Under way the smallest of
            those that the pattern would drop are pruned.
        scope: ``per_layer``: every layer is as sparse; ``global``: one threshold for all layers.
        begin_step: t_0 in optimizer steps; 0 prunes before the first.
        end_step: t_n, from which s_f holds; equal to begin_step: all at once.
        frequency: dt, steps between updates; the last interval may be shorter.
        initial_sparsity: s_i, of the update at t_0.
        exponent: Of the schedule; 3 is the paper's.
        modules: Names of layers, ends of names, or one regular expression for the whole name (Linear, Conv1D, nn.Conv*).
            None: all Linear and Conv1D layers but output heads. `left_out` then says what was left out and why.
        trainer: See `MonitorCallback`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range; in a run: sharded weights, a PEFT adapter in
            training, load_best_model_at_end, nothing to prune, weights that are not finite, masks of other layers.
    """

    name = "gradual_pruning"
    cost = (
        "after each step one pass over the pruned layers' weights and one over their gradients (together less than a fused "
        "AdamW step); at each of some 20 updates about 30 ms per million weights on one CPU core, with a pattern 70; "
        "memory: a mask as large as these weights"
    )
    witness = "a pruning of weights"
    observes = False
    looks_first = False
    _fields = (
        "final_sparsity", "pattern", "scope", "begin_step", "end_step", "frequency", "initial_sparsity", "exponent",
        "modules",
    )  # fmt: skip

    def __init__(
        self,
        final_sparsity: float | None = None,
        pattern: str | None = None,
        scope: str = "per_layer",
        begin_step: int | None = None,
        end_step: int | None = None,
        frequency: int | None = None,
        initial_sparsity: float = 0.0,
        exponent: float = 3.0,
        modules: str | Sequence[str] | None = None,
        trainer: Any = None,
    ) -> None:
        super().__init__(None, trainer)
        checks.one_of(OWNER, "scope", scope, ("per_layer", "global"))
        self.group = _group(pattern)
        self.final = _final(final_sparsity, self.group)
        if not isinstance(initial_sparsity, int | float) or not 0.0 <= initial_sparsity < self.final:
            raise ValueError(
                f"{OWNER}.initial_sparsity is {initial_sparsity!r}; give a number from 0 to below {self.final}"
            )
        checks.number(OWNER, "exponent", exponent, low=0.0)
        for field, value, low in (
            ("begin_step", begin_step, 0),
            ("end_step", end_step, 0),
            ("frequency", frequency, 1),
        ):
            if value is not None:
                checks.integer(OWNER, field, value, low=low)
        if begin_step is not None and end_step is not None and end_step < begin_step:
            raise ValueError(f"{OWNER}.end_step is {end_step}, before begin_step {begin_step}; give a later step")
        if initial_sparsity and begin_step is not None and begin_step == end_step:
            raise ValueError(
                f"{OWNER}.initial_sparsity is {initial_sparsity} and begin_step is end_step, all at once; leave it out"
            )
        _check_modules(modules)
        self.final_sparsity, self.pattern, self.scope = final_sparsity, pattern, scope
        self.begin_step, self.end_step, self.frequency = begin_step, end_step, frequency
        self.initial_sparsity, self.exponent = initial_sparsity, exponent
        self.modules = modules if modules is None or isinstance(modules, str) else sorted(modules)
        self.left_out: dict[str, str] = {}
        self.schedule: tuple[int, int, int] | None = None  # (begin, end, frequency) of this run
        self._layers: dict[str, nn.Module] = {}
        self._masks: dict[str, Tensor] = {}  # integers of the weight's size: all bits set, or none where pruned
        self._loaded: dict[str, Tensor] = {}

    def arguments(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self._fields}

    def pruned(self) -> dict[str, Tensor]:
        """The masks: by layer, bool of the weight's shape, True where it is pruned."""
        return {name: mask == 0 for name, mask in self._masks.items()}

    def state_dict(self) -> dict[str, Any]:
        masks = {f"mask.{name}": torch.from_numpy(np.packbits(m.cpu().numpy())) for name, m in self.pruned().items()}
        return {"schedule": self.schedule, **masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.schedule = tuple(state["schedule"]) if state["schedule"] else None
        self._loaded = {k.removeprefix("mask."): v for k, v in state.items() if k.startswith("mask.")}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule, self._loaded, self._masks = None, {}, {}
        super().on_train_begin(args, state, control, **kwargs)

    def begin(self, event: Event) -> None:
        refuse(event.model)
        self._layers, self.left_out = select(event.model, self.modules, self.group and self.group[1])
        self.schedule = _schedule(self, event, self.schedule)
        begin, end, _ = self.schedule
        if event.args.load_best_model_at_end and end > 0:
            raise ValueError(
                f"args.load_best_model_at_end is True and {OWNER} prunes until step {end}: the best checkpoint may be one "
                "of less sparsity; set it to False, or prune before the first step (begin_step=0, end_step=0)"
            )
        steps = event.state.max_steps
        if end > steps:
            when = f"begins at step {begin}" if begin > steps else f"is complete at step {end}"
            self.finding(
                "too_late", event.state.global_step, 1.0, f"The run has {steps} steps, and pruning {when}.",
                "Give an earlier end_step (and begin_step), or train longer.",
            )  # fmt: skip
        if self._loaded and self._loaded.keys() != self._layers.keys():
            odd = sorted(self._loaded.keys() ^ self._layers.keys())[0]
            raise ValueError(
                f"{OWNER}.modules is {self.modules!r}; the checkpoint's masks differ in {odd}: give its own"
            )
        for name, layer in self._layers.items():
            self._masks[name] = _unpacked(self._loaded.get(name), layer.weight, name)
            # before gradients are clipped, and without disturbing DDP, which reduces afterwards
            hold = layer.weight.register_post_accumulate_grad_hook(_Zero(self._masks[name]))
            self._hooks.append(hold)
        self.hook(event.model, lambda *_: None)  # takes the hooks off when a run has failed: see `MonitorCallback.hook`
        if self._prune(event.state.global_step):  # begin_step is 0, or a checkpoint was not pruned
            self._look(event)

    def _prune(self, step: int) -> bool:
        """Brings the masks to the sparsity in effect after `step`, zeroes what is pruned; whether a mask moved."""
        assert self.schedule is not None
        share = sparsity_at(step, *self.schedule, self.final, self.initial_sparsity, self.exponent)
        names = list(self._layers)
        moved = False
        for part in [names] if self.scope == "global" else [[name] for name in names]:
            weights, pruned = [self._weight(n) for n in part], [self._masks[n] == 0 for n in part]
            total = sum(w.numel() for w in weights)
            barred = [self._barred(n, p) for n, p in zip(part, pruned, strict=True)]
            for n, old, new in zip(part, pruned, extended(weights, pruned, barred, round(share * total)), strict=True):
                if not torch.equal(old, new):
                    moved = True
                    self._masks[n].copy_(-(~new).to(self._masks[n].dtype))
        self._hold()
        if moved:
            self.fire()
        return moved

    def _weight(self, name: str) -> Tensor:
        return self._layers[name].weight.detach()  # type: ignore[operator, union-attr, return-value]

    def _barred(self, name: str, pruned: Tensor) -> Tensor:
        """What the pattern keeps, as the weights are now; nothing without a pattern."""
        if self.group is None:
            return torch.zeros_like(pruned)
        layer = self._layers[name]
        weight, mask = (inputs_last(layer, t) for t in (self._weight(name), pruned))
        return inputs_last(layer, outside_pattern(weight, mask, *self.group)).contiguous()

    def _hold(self) -> None:
        """Zeroes the pruned weights, in place."""
        for name, mask in self._masks.items():
            _zero(self._weight(name), mask)

    def _due(self, step: int) -> bool:
        assert self.schedule is not None
        begin, end, frequency = self.schedule
        return step == end or (begin <= step < end and (step - begin) % frequency == 0)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        step = state.global_step + 1  # the host counts this step after the event
        with self._failing_safely():
            if self._due(step):
                self._prune(step)
                self.seconds += time.perf_counter() - start
            else:
                self._hold()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if self._due(state.global_step) or state.global_step >= state.max_steps or control.should_training_stop:
            self.look_now(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.schedule is not None and state.global_step < self.schedule[1]:
            share = sparsity_at(state.global_step, *self.schedule, self.final, self.initial_sparsity, self.exponent)
            self.finding(
                "unfinished", state.global_step, 1.0,
                f"The run ended at a sparsity of {share:.1%}, before step {self.schedule[1]} with its {self.final:.1%}.",
                "Give an earlier end_step, or train longer.",
            )  # fmt: skip
        super().on_train_end(args, state, control, **kwargs)

    def look(self, event: Event) -> dict[str, float]:
        zeros = {name: int((self._weight(name) == 0).sum()) for name in self._layers}
        sizes = {name: self._weight(name).numel() for name in self._layers}
        shares = {name: zeros[name] / sizes[name] for name in sizes}
        for name in (n for n, share in shares.items() if share == 1.0):
            self.finding(
                f"empty_layer/{name}", event.state.global_step, 1.0, f"All weights of {name} are zero.",
                "Lower final_sparsity, use scope='per_layer', or leave the layer out of modules.",
            )  # fmt: skip
        assert self.schedule is not None
        step = event.state.global_step
        return {
            "sparsity": sum(zeros.values()) / sum(sizes.values()),
            "scheduled": sparsity_at(step, *self.schedule, self.final, self.initial_sparsity, self.exponent),
            "zeros": sum(zeros.values()),
            "sparsest_layer": max(shares.values()),
        }


class _Zero:
    """What a parameter calls when its gradient is there."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            _zero(parameter.grad, self.mask)


def _zero(tensor: Tensor, mask: Tensor) -> None:
    """Zeroes `tensor` where the mask has no bits, in place, also nan and inf: 17 times as fast as masked_fill_ on a CPU."""
    with torch.no_grad():
        if tensor.element_size() == mask.element_size():
            tensor.view(mask.dtype).bitwise_and_(mask)
        else:  # a gradient of another width
            tensor.masked_fill_(mask == 0, 0.0)


def _unpacked(bits: Tensor | None, weight: Tensor, name: str) -> Tensor:
    """The mask of a weight from a checkpoint's bits (None: nothing is pruned), on its device."""
    words = _WORDS[weight.element_size()]
    if bits is None:
        return torch.full(weight.shape, -1, dtype=words, device=weight.device)
    if len(bits) != -(-weight.numel() // 8):
        raise ValueError(
            f"the checkpoint's mask of {name} is of another size than its weight {tuple(weight.shape)}; resume the model "
            "it was made with"
        )
    pruned = np.unpackbits(bits.numpy(), count=weight.numel()).reshape(weight.shape)
    return (torch.from_numpy(pruned).to(words) - 1).to(weight.device)


def _schedule(
    callback: GradualPruningCallback, event: Event, saved: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    """(begin, end, frequency): what was given, else what the run began with, else by the run's length."""
    steps = event.state.max_steps
    begin, end, frequency = callback.begin_step, callback.end_step, callback.frequency
    if begin is None:
        begin = saved[0] if saved else max(steps // 6, event.args.get_warmup_steps(steps))
        begin = begin if end is None else min(begin, end)
    if end is None:
        end = max(begin, saved[1] if saved else begin + 3 * (steps - begin) // 5)
    if frequency is None:
        frequency = saved[2] if saved else max(1, (end - begin) // 20)
    return begin, end, frequency


def _group(pattern: Any) -> tuple[int, int] | None:
    """(n, m) of "n:m"."""
    if pattern is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(f"{OWNER}.pattern is {pattern!r}; give 'n:m' with 0 < n < m, such as '2:4'")
    return int(found[1]), int(found[2])


def _final(sparsity: Any, group: tuple[int, int] | None) -> float:
    if sparsity is None and group:
        return 1 - group[0] / group[1]
    if sparsity is None:
        raise ValueError(f"{OWNER}.final_sparsity is None and so is pattern; give one, e.g. final_sparsity=0.5")
    if group:
        raise ValueError(
            f"{OWNER}.final_sparsity is {sparsity!r} and pattern is '{group[0]}:{group[1]}', which gives it; leave one out"
        )
    checks.number(OWNER, "final_sparsity", sparsity, low=0.0, high=1.0)
    if sparsity == 1:
        raise ValueError(f"{OWNER}.final_sparsity is {sparsity}, which leaves nothing; give a number below 1")
    return float(sparsity)


def _check_modules(modules: Any) -> None:
    checks.names(OWNER, "modules", modules)
    if modules is not None and not modules:
        raise ValueError(f"{OWNER}.modules is {modules!r}; give names of layers, or None for all")
    try:
        re.compile(modules if isinstance(modules, str) else "")
    except re.error as exc:
        raise ValueError(
            f"{OWNER}.modules is {modules!r}, no regular expression ({exc}); mend it or give a list of names"
        ) from None


def refuse(model: nn.Module) -> None:
    """Raises ValueError, in words, for models that cannot be pruned in training."""
    pieces = (p for p in model.parameters() if isinstance(p, DTensor) or hasattr(p, "_fsdp_flattened"))
    refuse_sharded(OWNER, next(pieces, None), does="zeroes single entries of whole weights")
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"the model trains a PEFT adapter, and {OWNER} would prune a base that is frozen and not in its checkpoints; "
            "prune the plain model first and put the adapter on the pruned checkpoint, or merge the adapter and prune then"
        )


def example(folder: str) -> dict[str, Any]:
    """Keyword arguments of a tiny Trainer run that is pruned (for the conformance kit)."""
    return tiny_run(folder) | {"callbacks": [GradualPruningCallback(final_sparsity=0.5)]}
