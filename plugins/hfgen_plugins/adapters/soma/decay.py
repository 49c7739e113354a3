"""Annealed weight decay that attaches itself: no call, callback or optimizer of the user's is needed.

Before every optimizer step (`hfgen.kit.steps`) the layers' parameters are looked for among the optimizer's groups, and
the `weight_decay` of the groups that hold one is set. The optimizer then decays once, by its own rule, with the schedule's
value in place of whatever the group said.

The step and the last step are those of the transformers Trainer whose optimizer steps. Without a Trainer, steps are counted
in the group itself, which every optimizer's state_dict carries, up to `total`.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import warnings
import weakref
from typing import Any, NamedTuple

from torch.optim import Optimizer

from hfgen.kit import steps

logger = logging.getLogger("hfgen")
STEP = "hfgen_decay_step"  # in an optimizer's group: steps taken so far without a Trainer

_told: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class Decay(NamedTuple):
    """A schedule: cosine from `start` to `end` over `total` optimizer steps (None: the Trainer's max_steps)."""

    start: float
    end: float
    total: int | None


def annealed(decay: Decay, step: int, total: int) -> float:
    """The weight decay of the update after `step` of `total` updates; `end` from there on."""
    return decay.end + (decay.start - decay.end) * (1 + math.cos(math.pi * min(step, total) / total)) / 2


def _trained(layers: list[Any]) -> dict[int, Decay]:
    """{id of a parameter: its schedule}"""
    return {id(p): decay for layer in layers for p, decay in layer.decayed_parameters() if p.requires_grad}


def anneal(layers: list[Any], optimizer: Optimizer) -> None:
    """Set what the coming step of `optimizer` decays with, by the layers' `decayed_parameters()`, (parameter, Decay) pairs.

    Raises:
        ValueError: an optimizer's group has no weight decay, or adapters with several schedules, or the optimizer holds
            flat shards.
    """
    ours = _trained(layers)
    if not ours:
        return
    groups = [(g, {ours[id(p)] for p in g["params"] if id(p) in ours}) for g in optimizer.param_groups]
    groups = [(group, decays) for group, decays in groups if decays]
    if not groups and any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("DEEPSPEED", "FSDP")):
        kind = type(layers[0])
        layers.clear()
        gc.collect()  # a model that nobody holds any more is no reason to refuse
        if _trained(steps.watched(kind)):
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
    trainer = steps.trainer_of(optimizer)
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
