"""Conformance of trainers: what every card of kind `trainers` promises to people who use trl and Trainer.

A check takes a `TrainerCase` and raises AssertionError in words. Each is shown to fail on a mutant in hfgen's own tests.
The card's `example` gives keyword arguments of a tiny run with at least 8 rows.
"""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer

from hfgen.card import MethodCard

from .runs import all_weights, assert_same_step_however_cut

CHECKS: dict[str, Callable[[TrainerCase], None]] = {}
_HOSTS = ("transformers", "trl")


def check(function: Callable[[TrainerCase], None]) -> Callable[[TrainerCase], None]:
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


@dataclass
class TrainerCase:
    """A trainer class under test with the card that describes it."""

    trainer_cls: type
    card: MethodCard

    def build(self, folder: str, **arguments: Any) -> Any:
        """A trainer on the card's example, with some of its TrainingArguments changed."""
        if self.card.example is None:
            raise AssertionError(f"the card of {self.card.name} has no example; the kit cannot run the trainer")
        module, _, function = self.card.example.partition(":")
        torch.manual_seed(0)
        options = getattr(importlib.import_module(module), function)(folder)
        for name, value in arguments.items():
            assert hasattr(options["args"], name), f"the example's args have no {name}"
            setattr(options["args"], name, value)
        return self.trainer_cls(**options)


@check
def check_is_a_trainer(case: TrainerCase) -> None:
    """It is a transformers Trainer, so that callbacks, launchers and trackers work."""
    assert issubclass(case.trainer_cls, Trainer), f"{case.trainer_cls} is not a transformers.Trainer"


@check
def check_loss_scaling_is_said(case: TrainerCase) -> None:
    """`loss_is_scaled_for_ga` is set by the method itself: guessed by the host, a batch mean trains GA times too fast."""
    own = [c for c in case.trainer_cls.__mro__ if c.__module__.partition(".")[0] not in _HOSTS]
    assert any("loss_is_scaled_for_ga" in vars(c) for c in own), "loss_is_scaled_for_ga is left to the host's guess"


@check
def check_arguments(case: TrainerCase) -> None:
    """The example's args are a dataclass of TrainingArguments; every field of the method's own has a help text."""
    with tempfile.TemporaryDirectory() as folder:
        args = case.build(folder).args
    host = {f.name for c in type(args).__mro__ if c.__module__.partition(".")[0] in _HOSTS and dataclasses.is_dataclass(c)
            for f in dataclasses.fields(c)}  # fmt: skip
    silent = [f.name for f in dataclasses.fields(args) if f.name not in host and not f.metadata.get("help")]
    assert not silent, f"no help for {silent}"


@check
def check_trains(case: TrainerCase) -> None:
    """A run moves the trainable parameters, logs a finite loss, and leaves frozen ones alone."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = case.build(folder, logging_steps=1, save_strategy="no")
        before = all_weights(trainer)
        frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        after, now = all_weights(trainer), dict(trainer.model.named_parameters())
    assert losses and all(torch.isfinite(torch.tensor(losses))), f"losses {losses}"
    assert not torch.equal(before, after), "no parameter moved"
    assert all(torch.equal(p, now[n]) for n, p in frozen.items()), "a frozen parameter moved"


@check
def check_deterministic(case: TrainerCase) -> None:
    """Two runs with one seed end with the same weights."""
    ends = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            trainer = case.build(folder, save_strategy="no")
            trainer.train()
            ends.append(all_weights(trainer))
    assert torch.equal(*ends), "two runs with one seed differ"


@check
def check_accumulation(case: TrainerCase) -> None:
    """The same 8 rows cut as 8x1, 4x2 and 2x4 give the same SGD step, to 1e-5 of its norm."""
    assert_same_step_however_cut(case.build)


@check
def check_resume(case: TrainerCase) -> None:
    """Stopped at a checkpoint and resumed in a new trainer, a run ends bit-equal to one that was not stopped."""
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as cut:
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        one = case.build(whole, **options)
        one.train()
        first = case.build(cut, **options)
        first.add_callback(_StopAt(2))
        first.train()
        assert first.state.global_step == 2, "the run did not stop at step 2"
        second = case.build(cut, **options)
        second.train(resume_from_checkpoint=True)
        assert second.state.global_step == 4, "the resumed run did not finish"
        assert torch.equal(all_weights(one), all_weights(second)), "the resumed run ends elsewhere"


def _StopAt(step: int) -> Any:
    from transformers import TrainerCallback

    class StopAt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= step or control.should_training_stop

    return StopAt()
