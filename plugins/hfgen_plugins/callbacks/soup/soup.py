"""Running averages of the weights of one run, kept in float32 outside the model."""

from __future__ import annotations

import hashlib
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import SAFE_WEIGHTS_NAME

from hfgen.kit import checks
from hfgen.kit.examples import tiny_run
from hfgen.kit.monitor import (
    Event,
    MonitorCallback,
    labelled_logits,
    on_device,
    rank_batches,
    spread_rows,
    summed,
    undisturbed,
)

_LOG = logging.getLogger("hfgen.soup")
_METHODS = ("greedy", "uniform", "ema")
_MOVING = {"ADALORA": "its ranks change while it is trained", "XLORA": "it mixes other adapters"}


class SoupCallback(MonitorCallback):
    """Averages the run's weights at each of the user's evaluations and saves the average as a plain checkpoint.

    Each evaluation makes a member of the trained parameters as they are. With ``greedy`` the soup, the mean of soup and
    member, and the member alone are compared on the gate rows, and the best becomes the soup (of equals the one with more
    members); ``uniform`` is the mean of all members; ``ema`` is decay * soup + (1 - decay) * member. For these two the
    best member is kept as well, and is saved instead where the soup is worse on the gate rows. So what is saved is never
    worse than the best member on them. At the end of training it is written to `folder` of ``output_dir`` by the model's
    own ``save_pretrained``; the trained model itself is left as it is.

    Metrics, under ``hfgen/soup/``: ``member_loss``, ``soup_loss``, ``best_member_loss`` (nats per label on the gate rows),
    ``members`` (in the soup), ``saved_loss`` (of what would be saved now).

    Args:
        method: ``greedy``, ``uniform`` or ``ema``.
        decay: Of ``ema``, per member.
        rows: Gate rows: so many of the evaluated set, evenly spread; fewer (32 at least) where these have about 8192
            labels together.
        gate: The set that is the gate, a key of a dictionary of evaluation sets; None: the first that is evaluated.
        folder: Where the soup is saved, within ``output_dir``.
        batch_size: Rows in one forward; None: ``per_device_eval_batch_size``.
        trainer: See `MonitorCallback`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range; in a run: no evaluations, sharded weights, trained
            BatchNorm, an adapter that cannot be averaged, gate rows that cannot be read.
    """

    name = "soup"
    cost = (
        "at each of the user's evaluations two forwards over `rows` of its rows (fewer of long ones) and some passes over "
        "the trained parameters in main memory: 3 training steps' time at a batch of 8 x 256 tokens, so under 2 % where "
        "140 steps lie between evaluations; every checkpoint holds one or two float32 copies of them"
    )
    witness = "a soup of more than one member"
    looks_first = False

    def __init__(
        self,
        method: str = "greedy",
        decay: float = 0.8,
        rows: int = 256,
        gate: str | None = None,
        folder: str = "soup",
        batch_size: int | None = None,
        trainer: Any = None,
    ) -> None:
        checks.one_of("SoupCallback", "method", method, _METHODS)
        checks.number("SoupCallback", "decay", decay, low=0.0, high=1.0)
        for field, value in (("rows", rows), ("batch_size", 1 if batch_size is None else batch_size)):
            checks.integer("SoupCallback", field, value, low=1)
        if not isinstance(folder, str) or not folder or Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ValueError(f"SoupCallback.folder is {folder!r}; give a name of a folder within output_dir")
        super().__init__(None, trainer)
        self.method, self.decay, self.rows, self.gate, self.folder = method, decay, rows, gate, folder
        self.batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self.soup: dict[str, Tensor] = {}
        self.best: dict[str, Tensor] = {}  # the best member; empty for greedy
        self.members = 0
        self.soup_loss = self.best_loss = float("inf")
        self._gated: str | None = None
        self._fixed = ""

    def arguments(self) -> dict[str, Any]:
        return {f: getattr(self, f) for f in ("method", "decay", "rows", "gate", "folder", "batch_size")}

    def state_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"members": self.members, "gated": self._gated, "fixed": self._fixed}
        if self.members:
            values |= {"soup_loss": self.soup_loss, "best_loss": self.best_loss}
        values |= {f"soup.{name}": tensor for name, tensor in self.soup.items()}
        return values | {f"best.{name}": tensor for name, tensor in self.best.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.members, self._gated, self._fixed = state["members"], state["gated"], state["fixed"]
        if self.members:
            self.soup_loss, self.best_loss = state["soup_loss"], state["best_loss"]
        for kind, into in (("soup.", self.soup), ("best.", self.best)):
            into.clear()
            into.update({k.removeprefix(kind): v for k, v in state.items() if k.startswith(kind)})

    def begin(self, event: Event) -> None:
        self.needs_evaluations(event)
        refuse(event.model, getattr(event.args, "deepspeed", None))
        if not event.state.global_step:
            self._reset()

    def evaluated(self, event: Event, dataset: str, metrics: dict[str, float]) -> dict[str, float]:
        self._gated = self._gated if self._gated is not None else self.gate if self.gate is not None else dataset
        if dataset != self._gated:
            return {}
        start = time.perf_counter()
        with undisturbed(event.model):
            found = self._stir(event)
        self.seconds += time.perf_counter() - start
        if self.members > 1:
            self.fire()
        return found

    def _stir(self, event: Event) -> dict[str, float]:
        member = trained(event.model)
        if self.soup and {k: v.shape for k, v in self.soup.items()} != {k: v.shape for k, v in member.items()}:
            raise ValueError("the trained parameters are not those the soup began with; train the same ones throughout")
        fixed = fixed_part(event.model)
        if self.members and fixed != self._fixed:
            raise ValueError(
                "a mask or an index of the adapter has changed since the soup began: one entry is no longer the same "
                "weight in two members, so they cannot be averaged; keep it fixed, or use no soup"
            )
        self._fixed = fixed
        loss = self._loss(event)
        if not math.isfinite(loss):
            _LOG.warning(f"soup: the member of step {event.state.global_step} has no finite loss and is left out")
            return {}
        mixed, mixed_loss = member, loss
        if self.members:
            if self.method == "ema":
                mixed = mix(self.soup, member, 1 - self.decay)
            else:
                mixed = mix(self.soup, member, 1 / (self.members + 1))
            with swapped(event.model, mixed):
                mixed_loss = self._loss(event)
        mixed_loss = mixed_loss if math.isfinite(mixed_loss) else sys.float_info.max  # stays JSON
        if not self.members or (self.method == "greedy" and loss < min(mixed_loss, self.soup_loss)):
            self.soup, self.members, self.soup_loss = member, 1, loss
        elif self.method != "greedy" or mixed_loss <= self.soup_loss:
            self.soup, self.members, self.soup_loss = mixed, self.members + 1, mixed_loss
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = {} if self.method == "greedy" else member
        return {
            "member_loss": loss, "soup_loss": self.soup_loss, "best_member_loss": self.best_loss,
            "members": self.members, "saved_loss": min(self.soup_loss, self.best_loss),
        }  # fmt: skip

    def _loss(self, event: Event) -> float:
        return gate_loss(
            event.model, event.eval_dataloader, self.rows, self.batch_size or event.args.eval_batch_size,
            event.args.device,
        )  # fmt: skip

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.members and args.should_save:
            self.save(model, Path(args.output_dir) / self.folder, kwargs.get("processing_class"))
        super().on_train_end(args, state, control, model=model, **kwargs)

    def save(self, model: Any, folder: str | Path, processing_class: Any = None) -> None:
        """Writes the soup (or the best member, where that is better on the gate rows) as `model` would be saved.

        Raises:
            ValueError: there is no member yet.
        """
        if not self.members:
            raise ValueError("SoupCallback.save: there is no member yet; train with evaluations")
        chosen = self.best if self.best and self.best_loss < self.soup_loss else self.soup
        with torch.no_grad(), swapped(model, chosen):
            if hasattr(model, "save_pretrained"):
                model.save_pretrained(folder)
            else:  # any other module, as the Trainer saves it
                Path(folder).mkdir(parents=True, exist_ok=True)
                save_model(model, str(Path(folder) / SAFE_WEIGHTS_NAME))
        if hasattr(processing_class, "save_pretrained"):
            processing_class.save_pretrained(folder)


def refuse(model: nn.Module, deepspeed: Any) -> None:
    """Raises ValueError, in words, for what cannot be averaged."""
    flat = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    if deepspeed or flat or any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError("the weights are sharded (FSDP or DeepSpeed); SoupCallback averages whole ones: use DDP")
    for name, module in model.named_modules():
        running = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        if running and any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"{name} is a BatchNorm that is trained: the mean of its running statistics is not that of the mean "
                "weights; freeze it (requires_grad False)"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter is trained; SoupCallback has nothing to average")
    for config in getattr(model, "peft_config", {}).values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind in _MOVING:
            raise ValueError(f"adapters of type {kind} cannot be averaged: {_MOVING[kind]}; use LoRA, or no soup")


def fixed_part(model: nn.Module) -> str:
    """Digest of the masks and indices an adapter saves (integers, more than one), empty without an adapter."""
    if not hasattr(model, "peft_config"):
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(get_peft_model_state_dict(model).items()):
        if not tensor.is_floating_point() and tensor.numel() > 1:
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained parameters by name, in float32 (float64 stays) in main memory."""
    return {
        name: p.detach().to("cpu", torch.promote_types(p.dtype, torch.float32), copy=True)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def mix(soup: Mapping[str, Tensor], member: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """soup + weight * (member - soup) for every tensor; of equal members it is the member, exactly."""
    return {name: tensor + weight * (member[name] - tensor) for name, tensor in soup.items()}


def _put(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():  # not p.data: an adapter that writes its values into the base looks at their version
        for name, p in parameters.items():
            p.copy_(weights[name])


@contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with `weights` (rounded to its dtypes) inside the block; its own are put back bit for bit."""
    parameters = {name: p for name, p in model.named_parameters() if name in weights}
    own = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
    try:
        _put(parameters, weights)
        yield
    finally:
        _put(parameters, own)


def gate_loss(model: Any, loader: Any, rows: int, size: int, device: Any) -> float:
    """Mean loss in nats per label of evenly spread rows (see `spread_rows`) of the loader's set, on every process."""
    taken, dataset = spread_rows("SoupCallback", loader, rows, size), loader.dataset
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for numbers, counting in rank_batches(len(taken), size):
        batch = on_device(loader.collate_fn([dataset[taken[i]] for i in numbers]), device)
        for place, (logits, labels) in enumerate(labelled_logits(model, batch)):
            if place < counting:
                loss = nn.functional.cross_entropy(logits, labels, reduction="none").double().sum()
                total += torch.stack((loss, loss.new_tensor(float(len(labels)))))
    loss, count = summed(total).tolist()
    if not count:
        raise ValueError(f"the {len(taken)} gate rows have no labels other than -100; SoupCallback needs some")
    return float(loss / count)


def example(folder: str) -> dict[str, Any]:
    """Keyword arguments of a tiny Trainer run that is evaluated at every step (for the conformance kit)."""
    return tiny_run(folder, evaluate_every=1) | {"callbacks": [SoupCallback("uniform", rows=4)]}
