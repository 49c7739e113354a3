"""Annealed weight decay that attaches itself: no call, callback or optimizer of the user's is needed.

torch runs a global hook before every optimizer's step. Ours looks for parameters of the layers in `_layers` among the
optimizer's groups and sets the `weight_decay` of the groups that hold one. The optimizer then decays once, by its own
rule, with the schedule's value in place of whatever the group said.

The step and the last step are those of the transformers Trainer whose optimizer steps; peft gives an adapter no way to it,
so it is looked for among the callers, once per optimizer. Without a Trainer, steps are counted in the group itself,
which every optimizer's state_dict carries, up to `total`.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import sys
import warnings
import weakref
from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

logger = logging.getLogger("hfgen")
STEP = "hfgen_decay_step"  # in an optimizer's group: steps taken so far without a Trainer

_layers: weakref.WeakSet[Any] = weakref.WeakSet()
_hooks: list[Any] = []  # the one hook, from the first watched layer on
_trainers: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()
_told: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class Decay(NamedTuple):
    """A schedule: cosine from `start` to `end` over `total` optimizer steps (None: the Trainer's max_steps)."""

    start: float
    end: float
    total: int | None


def annealed(decay: Decay, step: int, total: int) -> float:
    """The weight decay of the update after `step` of `total` updates; `end` from there on."""
    return decay.end + (decay.start - decay.end) * (1 + math.cos(math.pi * min(step, total) / total)) / 2


def watch(layer: Any) -> None:
    """Anneal the decay of what `layer.decayed_parameters()` yields, (parameter, Decay) pairs, while the layer lives."""
    _layers.add(layer)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))


def _trained() -> dict[int, Decay]:
    """{id of a parameter: its schedule}"""
    return {id(p): decay for layer in _layers for p, decay in layer.decayed_parameters() if p.requires_grad}


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    ours = _trained()
    if not ours:
        return
    groups = [(g, {ours[id(p)] for p in g["params"] if id(p) in ours}) for g in optimizer.param_groups]
    groups = [(group, decays) for group, decays in groups if decays]
    if not groups and any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("DEEPSPEED", "FSDP")):
        gc.collect()  # a model that nobody holds any more is no reason to refuse
        if _trained():
            raise ValueError(
                f"weight_decay cannot be annealed: {type(optimizer).__name__} holds none of the adapter's parameters but "
                "flat shards (DeepSpeed, FSDP1); set weight_decay=None in the adapter's config, or use DDP or FSDP2"
            )
    for group, decays in groups:
        _set(optimizer, group, decays)


def _set(optimizer: Optimizer, group: dict[str, Any], decays: set[Decay]) -> None:
    """Give one group its value for the coming step."""
    if len(decays) > 1:
        raise ValueError(
            f"one group of {type(optimizer).__name__} holds adapters with {len(decays)} weight decay schedules, "
            f"{sorted(decays, key=str)}; give them the same, or one optimizer group each"
        )
    if "weight_decay" not in group:
        raise ValueError(
            f"{type(optimizer).__name__} has no weight_decay to anneal; use one that has, such as AdamW, or set "
            "weight_decay=None in the adapter's config"
        )
    (decay,) = decays
    trainer = _trainer_of(optimizer)
    step = group.get(STEP, 0) if trainer is None else trainer.state.global_step
    total = decay.total or (trainer and trainer.state.max_steps)
    own, name = group["weight_decay"], type(optimizer).__name__
    if not total:
        if optimizer not in _told:
            warnings.warn(
                "weight_decay is not annealed: no transformers Trainer steps this optimizer; give total_steps in the "
                f"adapter's config, or weight_decay=None. {name}'s own weight_decay ({own:g}) stays"
            )
        _told.add(optimizer)
        return
    if own and optimizer not in _told:
        logger.info("the adapter's weight_decay takes the place of %s's own (%g)", name, own)
    _told.add(optimizer)
    group["weight_decay"] = annealed(decay, step, total)
    if trainer is None:
        group[STEP] = step + 1


def _trainer_of(optimizer: Optimizer) -> Any:
    """The Trainer among the callers whose optimizer this is, or None."""
    cls = getattr(sys.modules.get("transformers.trainer"), "Trainer", ())
    found = _trainers.get(optimizer, lambda: None)()
    frame: Any = None if found is not None else sys._getframe(1)
    while frame is not None and found is None:
        owner = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        if isinstance(owner, cls) and getattr(owner.optimizer, "optimizer", owner.optimizer) is optimizer:
            found, _trainers[optimizer] = owner, weakref.ref(owner)
        frame = frame.f_back
    return found
