"""What a callback is written with: schedule, state across checkpoints, hooks that do not outlive a run, metrics, witness.

A subclass of `MonitorCallback` says ``name``, ``cost`` and ``witness`` and writes `begin` and `look` or, where the user's
own evaluations are enough, `evaluated`; everything a Trainer asks of a callback is done here. What it concludes it says
with `finding`. Gradients and per-sample numbers have helpers of their own: `gradient_norm` and `SampleTracker`.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_callback import ExportableState

from . import checks

FORMAT = 1  # of the state file in a checkpoint
LABELS, _LEAST = 8192, 32  # of evaluation rows: labels that are enough, and rows that are always read


@dataclass(frozen=True)
class Event:
    """What the host passes to a callback at one event; the model is the one that is saved (under FSDP2 the sharded)."""

    args: Any
    state: Any
    control: Any
    model: Any
    processing_class: Any
    optimizer: Any
    train_dataloader: Any
    eval_dataloader: Any


class MonitorCallback(TrainerCallback, ExportableState):
    """Base of callbacks that look at a run every `every` optimizer steps, or whenever the user evaluates.

    A look is taken before the first step, at every multiple of `every`, and at the last step; with ``every=None``
    before the first step (unless `looks_first` is False) and at each of the user's evaluations, once per step however
    many evaluation sets there are. What it measured goes into the host's log as ``hfgen/<name>/<key>`` with the next row
    the Trainer logs (``hfgen/<name>/step`` says when it was measured), and stays in `history`, one row per step.
    Trackers of ``report_to`` have run by then; with `trainer` the metrics are logged at once through `Trainer.log`,
    which reaches them.

    Whatever `every` is, each evaluation inside `train()` also calls `evaluated` with the name of its set and its
    metrics; what that gives is kept and logged in the same way, its keys preceded by ``<set>/`` where ``eval_dataset``
    is a dictionary.

    State: `history`, `findings`, `fired` and what `state_dict` adds are written to ``checkpoint-N/hfgen_<name>.json``
    (tensors to ``hfgen_<name>.safetensors``) and, tensors apart, into ``trainer_state.json``; a resumed run takes them
    back by itself, with or without ``restore_callback_states_from_checkpoint``.

    Class attributes of a subclass:
        name: The card's name.
        cost: What a look costs, in one sentence.
        witness: What `fire` counts, in words that finish "the run ended and ... never happened".
        observes: True when the callback leaves the trained weights as they would be without it (the kit checks it).
        looks_first: With ``every=None``: whether there is a look before the first step.

    Args:
        every: Optimizer steps between looks; None: at the user's evaluations.
        trainer: The Trainer the callback belongs to, for `Trainer.log` and its eval_dataset; `attach` sets it later.

    Raises:
        TypeError, ValueError: `every` is not an integer of at least 1.
    """

    name: ClassVar[str]
    cost: ClassVar[str]
    witness: ClassVar[str]
    observes: ClassVar[bool] = True
    looks_first: ClassVar[bool] = True

    def __init__(self, every: int | None, trainer: Any = None) -> None:
        if every is not None:
            checks.integer(type(self).__name__, "every", every, low=1)
        self.every = every
        self.trainer: Any = None
        self.fired = 0
        self.history: list[dict[str, Any]] = []
        self.findings: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._step, self._looked, self._speaks = 0, -1, True
        self._evaluated: dict[str, int] = {}
        self._hooks: list[Any] = []
        self._pending: dict[str, Any] = {}
        self._run = ""
        self._saved: dict[str, Any] | None = None
        if trainer is not None:
            self.attach(trainer)

    # --- what a subclass writes -------------------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-serialisable values: the host builds a new object of them."""
        return {"every": self.every}

    def begin(self, event: Event) -> None:
        """Called before the first step of every `train()`, resumed or not, after the state was taken back."""

    def look(self, event: Event) -> dict[str, float]:
        """One look at the run: the metrics, without prefix. Runs in `undisturbed`, on every rank."""
        return {}

    def evaluated(self, event: Event, dataset: str, metrics: dict[str, float]) -> dict[str, float]:
        """Called at every evaluation inside `train()`, on every rank, before the look of ``every=None``.

        Args:
            event: What the host passes; ``event.control`` may be told to stop.
            dataset: The set's key in a dictionary of evaluation sets; empty for a single set.
            metrics: The evaluation's, without the host's prefix: ``{"loss": ..., "runtime": ..., ...}``.

        Returns:
            What is to be kept and logged, without prefix; may be empty.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume beyond `history` and `fired`: JSON-serialisable values and tensors by name.

        Asked on the saving rank only: gather sharded tensors in `look`, which every rank runs.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""

    # --- what a subclass uses ---------------------------------------------------------------------------------------

    def attach(self, trainer: Any) -> None:
        """Lets the callback log through `trainer` and use its eval_dataset.

        Raises:
            TypeError: not a transformers Trainer.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(f"{type(self).__name__}.trainer is {trainer!r}; give the transformers Trainer of the run")
        self.trainer = trainer

    def fire(self) -> None:
        """The witness: what the method is there for happened once more."""
        self.fired += 1

    def finding(
        self, kind: str, step: int, confidence: float, sentence: str, advice: str = "", level: int = logging.WARNING,
        explains: Sequence[str] = (),
    ) -> bool:  # fmt: skip
        """Says what is wrong with the run (or what it has reached), in plain words; the first of a kind stands.

        It is logged once and kept in `findings` with the step at which it was said (``noticed``), so in
        ``checkpoint-N/hfgen_<name>.json`` and ``trainer_state.json``, from which a report is made. Say it before the
        last checkpoint is saved: in `look` or `evaluated`.

        Args:
            kind: Short identifier; several sets or layers make kinds of their own (``"overfit/chat"``).
            step: The optimizer step at which it began.
            confidence: Probability in [0, 1] that it is so; say in the callback's docstring what it is computed from.
            sentence: One plain sentence for people who do not know the method.
            advice: What to try next.
            level: `logging.WARNING`, or `logging.INFO` for what is no trouble.
            explains: Kinds of findings, of any monitor, that follow from this one: a report puts them after it.

        Returns:
            False when there is a finding of this kind already (nothing is changed).

        Raises:
            ValueError: `confidence` is not in [0, 1].
        """
        if not 0.0 <= confidence <= 1.0:
            raise ValueError(f"{type(self).__name__}.finding: confidence is {confidence}; give a number from 0 to 1")
        if any(found["kind"] == kind for found in self.findings):
            return False
        self.findings.append(
            {
                "kind": kind, "step": int(step), "confidence": float(confidence), "sentence": sentence,
                "advice": advice, "level": logging.getLevelName(level), "noticed": self._step,
            } | ({"explains": list(explains)} if explains else {})
        )  # fmt: skip
        if self._speaks:
            said = f"{self.name}: {sentence} (since step {step}, {confidence:.0%} sure) {advice}"
            logging.getLogger(f"hfgen.{self.name}").log(level, said.rstrip())
        return True

    def look_now(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at the run outside the schedule, once per step."""
        with self._failing_safely():
            self._look(_event(args, state, control, kwargs))

    def needs_evaluations(self, event: Event, fix: str = "") -> None:
        """To be called in `begin` by a callback that rides on the user's evaluations.

        Raises:
            ValueError: with ``every=None`` the run has no evaluations; `fix` is another way out, in words.
        """
        if self.every is None and event.args.eval_strategy == "no":
            raise ValueError(
                f"args.eval_strategy is 'no'; {type(self).__name__} reads evaluations: set 'steps' or 'epoch'{fix}"
            )

    def needs_forward(self, event: Event, instead: str = "") -> None:
        """To be called in `begin` by a callback that forwards the model itself, outside the loop's own calls.

        Raises:
            ValueError: FSDP 1 has flattened the weights (FSDP 2 is fine); `instead` is another way out, in words.
        """
        if _flattened(event.model):
            raise ValueError(
                f"the model is wrapped by FSDP 1, and {type(self).__name__} forwards it itself, which is not possible with "
                f"its flat weights; use fsdp_version: 2 (in args.fsdp_config: version){instead}"
            )

    def holds_share(self, event: Event, rows: int, share: float) -> None:
        """To be called in `begin` by a callback whose look reads `rows` rows: holds a denser schedule to a share.

        A row that is only read counts a third of a row that is trained on (forward of forward and backward); rows are
        taken as equally long; the look before the first step is not counted. It is an estimate before the run, so that a
        resumed run looks at the same steps.

        Raises:
            ValueError: with ``every`` set, looks would take more than `share` of the training's time.
        """
        if self.every is None:
            return
        per_step = event.args.train_batch_size * event.args.gradient_accumulation_steps * event.args.world_size
        taken = rows / (3 * self.every * per_step)
        if taken > share:
            least = math.ceil(rows / (3 * share * per_step))
            raise ValueError(
                f"{type(self).__name__}.every is {self.every}: reading {rows} rows that often takes about {taken:.0%} of "
                f"the training's time; give at least {least}, fewer rows or a larger share, or None to look when the run "
                "is evaluated"
            )

    def hook(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Puts a forward hook ``function(module, args, output)`` on `module` for this run.

        It is taken off when training ends. The host tells a callback nothing of an exception elsewhere in the loop:
        then the hook does nothing any more, and takes itself and its fellows off at the first forward outside the loop.
        """
        alive = still_training()

        def guarded(*call: Any) -> Any:
            if not alive():
                self.unhook()
                return None
            try:
                return function(*call)
            except BaseException:
                self.unhook()
                raise

        self._hooks.append(module.register_forward_hook(guarded))

    def unhook(self) -> None:
        """Takes all hooks off."""
        while self._hooks:
            self._hooks.pop().remove()

    # --- the host's events ------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.unhook()  # of a run that failed, or of a first try of auto_find_batch_size
        key = type(self).__name__
        stored = state.stateful_callbacks.get(key)
        if isinstance(stored, list):
            raise ValueError(
                f"callbacks holds {key} {len(stored)} times; their states would overwrite each other: keep one"
            )
        self._pending, self._evaluated = {}, {}
        self._step, self._speaks = state.global_step, state.is_world_process_zero
        if state.global_step:
            self._resume(args, state, stored)
        else:
            self._run, self.fired, self.history, self.seconds = uuid.uuid4().hex, 0, [], 0.0
            self.findings, self._looked = [], -1
        # The host writes stateful_callbacks[key] when it saves, and fails if a resumed run brought a new callback.
        state.stateful_callbacks.setdefault(key, self.state())
        with self._failing_safely():
            event = _event(args, state, control, kwargs)
            self.begin(event)
            if not state.global_step and (self.every is not None or self.looks_first):
                self._look(event)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step
        last = state.global_step >= state.max_steps or control.should_training_stop
        if self.every is not None and (last or state.global_step % self.every == 0):
            self.look_now(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if _training_frame() is None:
            return  # evaluate() called by hand, before or after the run
        dataset, values = _of_dataset(metrics or {})
        with self._failing_safely():
            event = _event(args, state, control, kwargs)
            if self._evaluated.get(dataset) != state.global_step:  # eval_on_start evaluates a resumed run once more
                self._evaluated[dataset] = state.global_step
                found = self.evaluated(event, dataset, values)
                self._keep(state.global_step, {f"{dataset}/{k}" if dataset else k: v for k, v in found.items()})
            if self.every is None:
                self._look(event)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._pending and logs is not None and self.trainer is None:
            logs.update(self._pending)
            state.log_history[-1].update(self._pending)
            self._pending = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():  # in a hyperparameter search it is elsewhere; the host's copy serves
            with self._failing_safely():
                self._write(folder, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.unhook()
        log = logging.getLogger(f"hfgen.{self.name}")
        if not self.fired and state.is_world_process_zero:
            log.warning(f"{self.name}: the run ended at step {state.global_step} and {self.witness} never happened")
        log.info(f"{self.name}: {len(self.history)} looks took {self.seconds:.1f} s")

    def state(self) -> dict[str, Any]:
        """The host's ExportableState: what it stores in trainer_state.json."""
        state = self.state_dict()
        tensors = sorted(key for key, value in state.items() if isinstance(value, Tensor))
        values = {key: value for key, value in state.items() if key not in tensors}
        saved = self._own() | {"state": values, "tensors": tensors}
        return {"args": self.arguments(), "attributes": {"_saved": saved}}

    # --- inside -----------------------------------------------------------------------------------------------------

    def _own(self) -> dict[str, Any]:
        own = {"format": FORMAT, "name": self.name, "run": self._run, "fired": self.fired}
        own |= {"history": [dict(row) for row in self.history], "pending": dict(self._pending)}
        return own | {
            "findings": [dict(found) for found in self.findings],
            "looked": self._looked,
            "evaluated": dict(self._evaluated),
        }

    def _look(self, event: Event) -> None:
        step = event.state.global_step
        if self._looked == step:
            return
        start = time.perf_counter()
        with undisturbed(event.model):
            found = self.look(event)
        self.seconds += time.perf_counter() - start
        self._looked = step
        self._keep(step, found)

    def _keep(self, step: int, found: dict[str, float]) -> None:
        """Into the history's row of this step, and to the log."""
        if not found:
            return
        if not (self.history and self.history[-1]["step"] == step):
            self.history.append({"step": step})
        self.history[-1] |= found
        if self._pending.get(f"hfgen/{self.name}/step") != step:
            self._pending = {}
        self._pending |= {f"hfgen/{self.name}/{key}": value for key, value in {"step": step, **found}.items()}
        if self.trainer is not None:
            self.trainer.log(dict(self._pending))
            self._pending = {}

    def _write(self, folder: Path, step: int) -> None:
        state = self.state_dict()
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items() if isinstance(value, Tensor)}
        values = {key: value for key, value in state.items() if key not in tensors}
        if tensors:
            path = folder / f"hfgen_{self.name}.safetensors"
            save_file(tensors, f"{path}.part", metadata={"run": self._run, "step": str(step)})
            os.replace(f"{path}.part", path)
        record = self._own() | {"step": step, "state": values, "tensors": sorted(tensors)}
        path = folder / f"hfgen_{self.name}.json"
        Path(f"{path}.part").write_text(json.dumps(record), encoding="utf-8")
        os.replace(f"{path}.part", path)

    def _resume(self, args: Any, state: Any, stored: dict[str, Any] | None) -> None:
        """The state of the checkpoint at `state.global_step`.

        The host does not say which folder it resumes from. Its own copy in trainer_state.json is always the right one;
        the file is asked when there is none, and for tensors, and must then be of the same run and step.
        """
        folders = [args.resume_from_checkpoint, Path(args.output_dir) / f"checkpoint-{state.global_step}"]
        folder = next((Path(f) for f in folders if f and (Path(f) / f"hfgen_{self.name}.json").is_file()), None)
        record = self._saved or (stored or {}).get("attributes", {}).get("_saved")
        self._saved = None
        of_file = _read_record(folder / f"hfgen_{self.name}.json", self.name) if folder else None
        if record is None and of_file is not None and of_file["step"] == state.global_step:
            record = of_file
        if record is None:
            self._run = uuid.uuid4().hex
            logging.getLogger(f"hfgen.{self.name}").warning(
                f"{self.name}: the checkpoint at step {state.global_step} has no state of this callback; it starts anew"
            )
            return
        if record.get("format", 0) > FORMAT:
            raise ValueError(f"the state of {self.name} has format {record['format']}; this hfgen reads up to {FORMAT}")
        self._run, self.fired, self.history = record["run"], record["fired"], list(record["history"])
        self._pending = dict(record["pending"])
        # what hfgen 0.1 did not write
        self.findings = list(record.get("findings", []))
        self._looked = record.get("looked", self.history[-1]["step"] if self.history else -1)
        self._evaluated = dict(record.get("evaluated", {}))
        values = dict(record["state"])
        if record.get("tensors") or (of_file and of_file["tensors"]):
            if folder is None:
                raise ValueError(
                    f"the state of {self.name} has tensors, and no hfgen_{self.name}.json is in {folders[1]}; set "
                    "args.resume_from_checkpoint to the checkpoint's folder"
                )
            values |= _read_tensors(folder / f"hfgen_{self.name}.safetensors", self._run, state.global_step)
        self.load_state_dict(values)

    @contextmanager
    def _failing_safely(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.unhook()
            raise


def _event(args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> Event:
    keys = ("model", "processing_class", "optimizer", "train_dataloader", "eval_dataloader")
    return Event(args, state, control, **{key: kwargs.get(key) for key in keys})


def _of_dataset(metrics: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The evaluation set's key and the metrics without the host's prefix (which always has a runtime)."""
    prefix = min((key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")), key=len, default="eval")
    # trl names its own metrics eval_<key> whatever the set
    plain = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
    values = {key.removeprefix(f"{prefix}_"): value for key, value in metrics.items() if key.startswith(f"{prefix}_")}
    values = {k: v for k, v in plain.items() if f"eval_{k}".removeprefix(prefix) == f"eval_{k}"} | values
    return prefix.removeprefix("eval").removeprefix("_"), values


def _read_record(path: Path, name: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"format", "name", "run", "step", "fired", "history", "pending", "state", "tensors"} - set(record)
    except (ValueError, TypeError) as exc:
        raise ValueError(f"{path} is damaged ({exc}); delete it to start {name} anew") from None
    if missing or record["name"] != name:
        raise ValueError(f"{path} is not the state of {name}; delete it to start {name} anew")
    return dict(record)


def _read_tensors(path: Path, run: str, step: int) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), "pt") as file:
            found = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as exc:
        raise ValueError(f"{path} cannot be read ({exc}); resume from another checkpoint") from None
    if found.get("run") != run or found.get("step") != str(step):
        raise ValueError(
            f"{path} belongs to another run; resume with args.resume_from_checkpoint set to the checkpoint's folder"
        )
    return tensors


def _training_frame() -> Any:
    """The frame of the Trainer's loop this call comes from, or None outside one."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not Trainer._inner_training_loop.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else id(frame)


def still_training() -> Callable[[], bool]:
    """A test of whether the loop's call that this is asked in is still under way.

    Other threads say yes: on CUDA autograd recomputes checkpointed layers in one of its own, which the loop did not call.
    """
    loop, thread = _training_frame(), threading.get_ident()
    return lambda: threading.get_ident() != thread or _runs_inside(loop)


def _runs_inside(loop: int | None) -> bool:
    """Whether this thread is still inside the loop's call: 1 to 5 microseconds."""
    frame: Any = sys._getframe(1)
    code = Trainer._inner_training_loop.__code__
    while frame is not None:
        if frame.f_code is code:
            return loop is None or id(frame) == loop
        frame = frame.f_back
    return loop is None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module's mode and the random state are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def collated(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows as a batch, padded on the right: lists of integers with 0 (labels -100), arrays of one shape stacked.

    ``attention_mask`` is made where rows have ``input_ids`` and none. Keys that no row has as numbers are left out.
    """
    batch: dict[str, Tensor] = {}
    for key in rows[0]:
        values = [torch.as_tensor(row[key]) for row in rows if not isinstance(row[key], str | None)]
        if len(values) == len(rows):
            ragged = values[0].dim() == 1 and len({len(v) for v in values}) > 1
            padding = -100 if key == "labels" else 0
            pad = nn.utils.rnn.pad_sequence
            batch[key] = pad(values, batch_first=True, padding_value=padding) if ragged else torch.stack(values)
    if "input_ids" in batch and "attention_mask" not in batch:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch


def spread_rows(owner: str, loader: Any, rows: int, size: int) -> list[int]:
    """Numbers of evenly spread rows of the loader's set: `rows`, or fewer that have about `LABELS` labels together.

    At least 32; how many labels a row has is taken from `size` of them, the same on every process.

    Raises:
        ValueError: the set is a stream.
    """
    dataset = loader.dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(f"the evaluation set is a {type(dataset).__name__}, a stream; {owner} needs one with a length")
    count = min(rows, len(dataset))
    if count > _LEAST:
        batch = loader.collate_fn([dataset[i] for i in _spread(len(dataset), min(count, size))])
        labels = batch.get("shift_labels", batch.get("labels"))
        known = 0 if labels is None else int((labels != -100).sum())
        count = min(count, max(_LEAST, math.ceil(LABELS * len(labels) / known))) if known else count
    return _spread(len(dataset), count)


def _spread(length: int, count: int) -> list[int]:
    """`count` of range(length), evenly spread, with both ends."""
    return sorted({round(i * (length - 1) / max(1, count - 1)) for i in range(count)})


def rank_batches(count: int, size: int) -> Iterator[tuple[list[int], int]]:
    """Batches of row numbers for this process: (numbers, how many of them count).

    Every process gets as many batches as every other, as sharded models need; where rows run out, row 0 is repeated and
    does not count. Together they hold each of the `count` rows once.
    """
    spread = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    own = list(range(rank, count, world))
    for start in range(0, -(-count // world), size):
        numbers = own[start : start + size]
        yield numbers or [0], len(numbers)


def summed(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, in its dtype; every process must call it."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gathered(values: Tensor) -> Tensor:
    """`values` (n, ...) of all processes one after the other, n may differ; every process must call it."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=values.device)
    counts[dist.get_rank()] = len(values)
    counts = summed(counts)
    padded = values.new_zeros(int(counts.max()), *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])


def labelled_logits(model: Any, batch: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row: logits (n, classes) in float32 and labels (n,) int64, n = 1 or the tokens that have a label.

    The model is called without labels, so that trl's fused head is not taken and logits are built, and with those keys
    that its forward names, as the Trainer does. Logits of a causal language model are shifted as its own loss does
    (``shift_labels`` are taken as they are).

    Raises:
        ValueError: the batch has no integer labels, the model gives no logits, or their shapes are those of no
            classifier or language model (regression, several labels per row).
    """
    labels = batch.get("shift_labels", batch.get("labels"))
    if labels is None or labels.is_floating_point():
        raise ValueError(
            f"rows have {'no labels' if labels is None else 'labels that are no integers'}; give class or token labels"
        )
    named = inspect.signature(_inner(model).forward).parameters
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "shift_labels", "num_items_in_batch")}
    output = model(**({k: v for k, v in inputs.items() if k in named} or inputs))
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != labels.dim() + 1:
        shape = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"the model gives {shape} for labels of shape {tuple(labels.shape)}; only classifiers and language models "
            "can be read"
        )
    if labels.dim() == 1:
        logits, labels = logits[:, None], labels[:, None]
    logits = logits[:, -labels.shape[1] :]  # without virtual tokens of prompt learning
    if "shift_labels" not in batch and labels.shape[1] > 1 and shifts_labels(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    for row, wanted in zip(logits, labels, strict=True):
        known = wanted != -100
        yield row[known].float(), wanted[known]


def shifts_labels(model: Any) -> bool:
    """Whether the model's own loss compares position i with the label of i + 1, as the Trainer decides it."""
    inner = _inner(model)
    causal = LOSS_MAPPING.get(getattr(inner, "loss_type", None)) is ForCausalLMLoss
    return causal and not getattr(getattr(inner, "config", None), "is_encoder_decoder", False)


def _inner(model: Any) -> Any:
    """The model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def on_device(batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """The batch's tensors on `device`."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _flattened(model: nn.Module) -> bool:
    """Whether FSDP 1 holds the weights, as accelerate or the model says."""
    plugin = AcceleratorState._shared_state.get("fsdp_plugin")
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return wrapped or getattr(plugin, "fsdp_version", 2) == 1


def gradient_norm(event: Event) -> Tensor:
    """The 2-norm of the whole gradient, a scalar, equal on all ranks; to be asked in ``on_pre_optimizer_step``.

    Clipping has run by then: with ``max_grad_norm > 0`` it is the norm after clipping. Sharded gradients (FSDP2) are
    reduced over ranks; gradients times a loss scale (fp16) are divided by it.

    Raises:
        ValueError: there is no gradient to be seen (DeepSpeed, or another event), or FSDP1 has flattened it.
    """
    grads = [p.grad for p in event.model.parameters() if p.grad is not None]
    if getattr(event.args, "deepspeed", None):
        raise ValueError(
            "args.deepspeed is set: ZeRO keeps gradients to itself; read its own norm, engine.get_global_grad_norm()"
        )
    if _flattened(event.model):
        raise ValueError(
            "the model is wrapped by FSDP 1, whose flat gradient a callback cannot read; use fsdp_version: 2"
        )
    if not grads:
        raise ValueError(
            "no parameter has a gradient; call gradient_norm in on_pre_optimizer_step, before they are zeroed"
        )
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
    norm = torch.linalg.vector_norm(torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]))
    return norm / loss_scale(event.optimizer)


def loss_scale(optimizer: Any) -> float:
    """By what fp16's loss scale still multiplies the gradients of the Trainer's optimizer in ``on_pre_optimizer_step``.

    1 without a scaler, and where the host has unscaled them already: when it clips, and (transformers 5.23) when it takes
    the norm it logs.
    """
    scaler: Any = getattr(optimizer, "scaler", None)
    while hasattr(optimizer, "optimizer"):  # accelerate's around torch's
        optimizer = optimizer.optimizer
    state = getattr(scaler, "_per_optimizer_states", {}).get(id(optimizer), {})
    unscaled = getattr(state.get("stage"), "name", "") == "UNSCALED"  # torch has no public way to ask
    return 1.0 if scaler is None or unscaled else float(scaler.get_scale())


class SampleTracker:
    """Carries each row's index of the training set to where a method needs it, in Trainer and in SFTTrainer.

    It adds the column ``sample_index``, lets the collator hand it on, and takes it out of the model's keyword arguments
    before the forward (also under DDP). Use it after the trainer is made: ``tracker = SampleTracker(trainer)``; inside
    the step `current` holds the indices of the micro-batch, int64 of shape (rows,), on the batch's device.

    A distributed sampler pads the last batch with rows it has already given: the same index may come twice.

    Raises:
        ValueError: the training set is a stream, or its rows are packed together.
    """

    column: ClassVar[str] = "sample_index"

    def __init__(self, trainer: Any) -> None:
        dataset = trainer.train_dataset
        if not (hasattr(dataset, "add_column") and hasattr(dataset, "__len__")):
            raise ValueError(
                f"train_dataset is a {type(dataset).__name__}; a per-sample index needs a datasets.Dataset with a length"
            )
        if getattr(trainer.args, "packing", False):
            raise ValueError("args.packing is True: a packed row is no longer one sample; set packing=False")
        if self.column in dataset.column_names:
            dataset = dataset.remove_columns(self.column)
        self.current: Tensor | None = None
        trainer.train_dataset = dataset.add_column(self.column, range(len(dataset)))
        trainer.data_collator = _IndexedCollator(trainer.data_collator, self.column)
        trainer._set_signature_columns_if_needed()
        if self.column not in trainer._signature_columns:
            trainer._signature_columns.append(self.column)
        self._handle = trainer.model.register_forward_pre_hook(self._take, with_kwargs=True)

    def remove(self) -> None:
        """Takes the hook off; batches then still hold the column, so train no further with this trainer."""
        self._handle.remove()

    def _take(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self.column in kwargs:
            kwargs = dict(kwargs)
            self.current = kwargs.pop(self.column)
        return args, kwargs


class _IndexedCollator:
    """A collator that hands the index on; evaluation rows have none."""

    def __init__(self, inner: Callable[[list[Any]], dict[str, Any]], column: str) -> None:
        self.inner, self.column = inner, column

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        rows = [dict(row) for row in rows]
        found = [row.pop(self.column) for row in rows if self.column in row]
        batch = self.inner(rows)
        if found:
            batch[self.column] = torch.as_tensor(found, dtype=torch.int64)
        return batch
