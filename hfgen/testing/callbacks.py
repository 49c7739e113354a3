"""Conformance of callbacks: what every card of kind `callbacks` promises to people who pass one to a Trainer.

A check takes a `CallbackCase` and raises AssertionError in words. Each is shown to fail on a mutant in hfgen's own tests.
The card's `example` is called with a folder and gives keyword arguments of a tiny transformers Trainer run of at least
4 steps, its ``callbacks`` one instance of the class, in which the witness fires.
"""

from __future__ import annotations

import importlib
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from hfgen.card import MethodCard

from .runs import all_weights, assert_same_step_however_cut

CHECKS: dict[str, Callable[[CallbackCase], None]] = {}


def check(function: Callable[[CallbackCase], None]) -> Callable[[CallbackCase], None]:
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


@dataclass
class CallbackCase:
    """A callback class under test with the card that describes it."""

    callback_cls: Any
    card: MethodCard

    def build(self, folder: str, callback: bool = True, **arguments: Any) -> Trainer:
        """A Trainer on the card's example, with or without the callback, some TrainingArguments changed."""
        if self.card.example is None:
            raise AssertionError(f"the card of {self.card.name} has no example; the kit cannot run the callback")
        module, _, function = self.card.example.partition(":")
        torch.manual_seed(0)
        options = getattr(importlib.import_module(module), function)(folder)
        if not callback:
            options["callbacks"] = [c for c in options["callbacks"] if not isinstance(c, self.callback_cls)]
        for name, value in arguments.items():
            assert hasattr(options["args"], name), f"the example's args have no {name}"
            setattr(options["args"], name, value)
        return Trainer(**options)

    def of(self, trainer: Trainer) -> Any:
        """The callback of a trainer."""
        found = [c for c in trainer.callback_handler.callbacks if isinstance(c, self.callback_cls)]
        assert len(found) == 1, f"the example's callbacks hold {len(found)} of {self.callback_cls.__name__}; give one"
        return found[0]


def _hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


class _Stop(TrainerCallback):  # type: ignore[misc]
    """Ends a run, or fails it, at a step."""

    def __init__(self, step: int, error: bool = False) -> None:
        self.step, self.error = step, error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            if self.error:
                raise RuntimeError("the kit fails this run")
            control.should_training_stop = True


@check
def check_is_a_callback(case: CallbackCase) -> None:
    """It is a TrainerCallback, which Trainer and every trl trainer take."""
    assert issubclass(case.callback_cls, TrainerCallback), f"{case.callback_cls} is not a transformers.TrainerCallback"


@check
def check_events_exist(case: CallbackCase) -> None:
    """Every method named on_... is an event of the host: a misspelt one is never called, and nothing says so."""
    unknown = [n for n in dir(case.callback_cls) if n.startswith("on_") and not hasattr(TrainerCallback, n)]
    assert not unknown, f"{unknown} are no events of transformers.TrainerCallback; they would never be called"


@check
def check_says_its_cost(case: CallbackCase) -> None:
    """`cost` says in a sentence what a look costs, and `witness` what the callback waits for."""
    for name in ("cost", "witness"):
        text = getattr(case.callback_cls, name, None)
        assert isinstance(text, str) and len(text.split()) >= 3, f"{name} is {text!r}; say it in a sentence"


@check
def check_runs(case: CallbackCase) -> None:
    """A run ends, and its logged metrics stand under hfgen/<name>/ as finite numbers, also in the trainer's history."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = case.build(folder, save_strategy="no", logging_strategy="steps", logging_steps=1)
        trainer.train()
        rows = trainer.state.log_history
    host = {"loss", "grad_norm", "learning_rate", "epoch", "step", "num_input_tokens_seen", "total_flos", "train_loss"}
    own = {k: v for row in rows for k, v in row.items() if k not in host and not k.startswith(("train_", "eval_"))}
    assert own, "nothing was logged by the callback"
    stray = [key for key in own if not key.startswith(f"hfgen/{case.card.name}/")]
    assert not stray, f"{stray} are not under hfgen/{case.card.name}/"
    assert all(isinstance(v, int | float) and abs(v) < float("inf") for v in own.values()), f"not finite numbers: {own}"


@check
def check_does_not_disturb(case: CallbackCase) -> None:
    """A callback that observes leaves weights, module modes and random state exactly as they are without it."""
    if not getattr(case.callback_cls, "observes", False):
        return
    ends = []
    for with_it in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            trainer = case.build(folder, callback=with_it, save_strategy="no")
            trainer.train()
            modes = [m.training for m in trainer.model.modules()]
            ends.append((all_weights(trainer), torch.random.get_rng_state(), modes, trainer.state.global_step))
    (weights, noise, modes, steps), (plain, plain_noise, plain_modes, plain_steps) = ends
    assert steps == plain_steps, (
        f"the run has {steps} steps with it and {plain_steps} without: the example must not stop"
    )
    assert torch.equal(weights, plain), "the trained weights differ from those without the callback"
    assert torch.equal(noise, plain_noise), "it consumes random numbers of the run"
    assert modes == plain_modes, "it leaves modules in another mode (train/eval)"


@check
def check_hooks(case: CallbackCase) -> None:
    """Hooks are gone when training has ended, and at the next forward when it has ended with an error."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = case.build(folder, save_strategy="no")
        before = _hooks(trainer.model)
        trainer.train()
        assert _hooks(trainer.model) == before, "hooks are left on the model after training"
        trainer = case.build(folder, save_strategy="no")
        before = _hooks(trainer.model)
        trainer.add_callback(_Stop(2, error=True))
        try:
            trainer.train()
        except RuntimeError as exc:
            assert "the kit fails this run" in str(exc), f"the callback fails: {exc}"
        batch = trainer.data_collator([trainer.train_dataset[0]])
        trainer.model(**{k: v.to(trainer.model.device) for k, v in batch.items()})
        assert _hooks(trainer.model) == before, "hooks are left on the model after a run that failed"


@check
def check_exports_its_state(case: CallbackCase) -> None:
    """It is an ExportableState; its state is JSON and its "args" build it anew (the host does that on request)."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = case.build(folder, save_strategy="no")
        callback = case.of(trainer)
        assert isinstance(callback, ExportableState), f"{case.callback_cls.__name__} is no ExportableState"
        trainer.train()
        state = json.loads(json.dumps(callback.state()))
        again = case.callback_cls(**state["args"])
    assert json.loads(json.dumps(again.state()))["args"] == state["args"], (
        "an object built of state()['args'] has others"
    )


def _resumed(case: CallbackCase, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as cut:
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **options}
        one = case.build(whole, **options)
        one.train()
        first = case.build(cut, **options)
        first.add_callback(_Stop(2))
        first.train()
        second = case.build(cut, **options)
        second.train(resume_from_checkpoint=True)
        assert second.state.global_step == one.state.global_step, "the resumed run ends at another step"
        assert torch.equal(all_weights(one), all_weights(second)), "the resumed run ends with other weights"
        ends = []
        for trainer in (one, second):
            state = json.loads(json.dumps(case.of(trainer).state()))
            ends.append({k: v for k, v in state["attributes"].get("_saved", state["attributes"]).items() if k != "run"})
        assert ends[0] == ends[1], f"the callback's state differs after a resume:\n{ends[0]}\n{ends[1]}"


@check
def check_resume(case: CallbackCase) -> None:
    """Stopped at a checkpoint and resumed, weights and the callback's own state end as in a run that was not stopped."""
    _resumed(case)


@check
def check_resume_by_the_host(case: CallbackCase) -> None:
    """The same when the host restores callbacks itself (restore_callback_states_from_checkpoint)."""
    _resumed(case, restore_callback_states_from_checkpoint=True)


@check
def check_joins_a_resumed_run(case: CallbackCase) -> None:
    """Added to a run that is resumed from a checkpoint without it, it works and can be saved."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        first = case.build(folder, callback=False, **options)
        first.add_callback(_Stop(2))
        first.train()
        second = case.build(folder, **options)
        second.train(resume_from_checkpoint=True)
        assert (Path(folder) / "checkpoint-4").is_dir(), "the resumed run could not save"


@check
def check_witness(case: CallbackCase) -> None:
    """The example's run fires the witness, and a run in which it stays flat says so."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = case.build(folder, save_strategy="no")
        trainer.train()
        assert case.of(trainer).fired, "the witness stayed flat in the card's example"
        trainer = case.build(folder, save_strategy="no")
        callback = case.of(trainer)
        callback.fire = lambda: None
        heard: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
        log = logging.getLogger(f"hfgen.{case.card.name}")
        log.addHandler(handler)
        try:
            trainer.train()
        finally:
            log.removeHandler(handler)
    assert any(case.callback_cls.witness in text for text in heard), (
        "a run in which the witness never fired says nothing"
    )


@check
def check_accumulation(case: CallbackCase) -> None:
    """The same 8 rows cut as 8x1, 4x2 and 2x4 give the same SGD step with the callback on, to 1e-5 of its norm."""
    assert_same_step_however_cut(case.build)
