"""Quantise a folder of safetensors a few tensors at a time, with the host's own loading and saving of weights.

Everything that decides what is quantised, renamed, cast, tied or converted is transformers' `from_pretrained` and
`save_pretrained`: its loader fills a model on the meta device, and what it has filled is taken out again, renamed back
and written, before it reads on. So the result has the tensors that quantising in memory and saving gives, bit for bit.

The work lies in `OUT.partial` until it is whole; one rename then makes it `OUT`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import logging as host_logging

from hfgen.kit.quantizer import PackedConfig, PackedLinear, PackedQuantizer

FORMAT = 1  # of the manifest
STEP = 2**26  # bytes read from the source between two looks at what has been filled
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
IN_MEMORY = "quantise it in memory: from_pretrained(MODEL, quantization_config=...) and save_pretrained"


@dataclass(frozen=True)
class Report:
    """What one run did. Sizes are in bytes.

    Attributes:
        before, after: The safetensors files of the source and of the result.
        weights: Weights in quantised layers (biases not counted).
        packed: What they take now: codes, scales and outliers.
        quantized: Names of the quantised layers.
        left_in_float: Every other parameter of two or more dimensions, and why.
        dropped: Tensors of the source that the model does not have.
        reused: Shards taken over from an interrupted run.
    """

    before: int
    after: int
    weights: int
    packed: int
    quantized: list[str]
    left_in_float: dict[str, str]
    dropped: list[str]
    reused: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.packed / self.weights


def quantize_folder(
    source: Path, config: PackedConfig, out: Path, max_shard_size: int, progress: Callable[[int, int], None]
) -> Report:
    """Write the model in `source`, quantised by `config`, to `out`.

    Args:
        source: Folder with config.json and safetensors.
        out: A folder that does not exist yet or is empty; an interrupted run leaves `out`.partial, which a rerun takes
            up.
        max_shard_size: Bytes of a file, which are also the bytes held in memory (besides the tensors in work).
        progress: Called with (tensors done, tensors in all).

    Raises:
        ValueError: the model cannot be quantised this way, or the folders are not as they must be.
    """
    source, out = source.resolve(), out.resolve()
    check_out(out, source)
    plan = capture(source, config)
    work = _Work.open(out.with_name(out.name + ".partial"), _identity(plan, config, max_shard_size), max_shard_size)
    with quiet_host():
        dropped = _stream(plan, work, progress)
    after = _finish(plan, work, source, out)
    layers = [m for _, m in plan.model.named_modules() if isinstance(m, PackedLinear)]
    names = set(plan.quantizer.quantized)
    packed = {k: v for k, v in work.filled.items() if k.rpartition(".")[0] in names and not k.endswith(".bias")}
    return Report(
        before=sum(Path(f).stat().st_size for f in plan.files),
        after=after,
        weights=sum(layer.in_features * layer.out_features for layer in layers),
        packed=sum(packed.values()),
        quantized=plan.quantizer.quantized,
        left_in_float=plan.quantizer.left_in_float,
        dropped=dropped,
        reused=work.reused,
    )


def check_out(out: Path, source: Path) -> None:
    """Raise ValueError unless `out` can become a new folder beside `source`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"out is {str(out)!r}, which exists and is not an empty folder; give another name or remove it"
        )
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out is {str(out)!r}, a folder inside the model's own; give one outside of it")


def model_class(folder: Path) -> type[PreTrainedModel]:
    """The class config.json names. Raises ValueError if transformers has none such."""
    names = AutoConfig.from_pretrained(str(folder), local_files_only=True).architectures
    cls = getattr(transformers, (names or [""])[0], None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ValueError(
            f"config.json of {folder} has architectures {names!r}, which names no class of "
            f"transformers {transformers.__version__}; save the model with save_pretrained, or upgrade"
        )
    return cls


# --- what the host would do -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """`from_pretrained` as it stands before the first weight is read: the model is on the meta device."""

    model: Any
    files: list[str]
    load_config: Any

    @property
    def quantizer(self) -> PackedQuantizer:
        quantizer: PackedQuantizer = self.load_config.hf_quantizer
        return quantizer


class _Ready(Exception):
    """Carries the plan out of `from_pretrained`."""


def capture(source: Path, config: PackedConfig) -> Plan:
    """Run the host's `from_pretrained` up to the reading of weights."""
    cls = streamable_class(source, config)

    def stop(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any) -> None:
        raise _Ready(Plan(model, list(checkpoint_files or ()), load_config))

    # A subclass of the same name, as the host looks its conversions up by class name; upstream's class is left alone.
    body = {"_load_pretrained_model": staticmethod(stop), "__module__": cls.__module__}
    stopping: Any = type(cls.__name__, (cls,), body)
    try:
        stopping.from_pretrained(str(source), quantization_config=config, local_files_only=True)
    except _Ready as ready:
        plan: Plan = ready.args[0]
    if not plan.files or not all(f.endswith(".safetensors") for f in plan.files):
        raise ValueError(f"{source} holds no safetensors weights, and others cannot be streamed; {IN_MEMORY}")
    return plan


def streamable_class(source: Path, config: PackedConfig) -> type[PreTrainedModel]:
    if not issubclass(config.quantizer_cls, PackedQuantizer):
        raise ValueError(f"method {config.method!r} packs no layers by itself, so it cannot be streamed; {IN_MEMORY}")
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json; give the folder of a model as save_pretrained writes it")
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in raw:
        method = (raw["quantization_config"] or {}).get("quant_method")
        raise ValueError(f"{source} is quantised already (by {method!r}); give the folder of the plain model")
    if (source / "adapter_config.json").is_file():
        raise ValueError(f"{source} is a model with an adapter beside it; merge the adapter first (`hfgen export`)")
    if raw.get("auto_map"):
        raise ValueError(f"{source} brings its own code (auto_map in config.json), which is not run here; {IN_MEMORY}")
    return model_class(source)


@contextlib.contextmanager
def quiet_host() -> Iterator[None]:
    """No progress bar of the host's beside the caller's."""
    shown = host_logging.is_progress_bar_enabled()
    host_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            host_logging.enable_progress_bar()


# --- reading and taking out -----------------------------------------------------------------------------------------


class _Lazy:
    """A tensor of the source for the host's loader, which indexes it when its turn has come."""

    def __init__(self, key: str, entry: Any, stream: _Taker) -> None:
        self.key, self.entry, self.stream = key, entry, stream

    def get_dtype(self) -> str:
        return str(self.entry.get_dtype())

    def get_shape(self) -> list[int]:
        return list(self.entry.get_shape())

    def __getitem__(self, index: Any) -> Tensor:
        self.stream.take_if_due()  # the host has finished with every earlier tensor but those of this conversion
        tensor: Tensor = self.entry[index]
        self.stream.read(self.key, tensor.nbytes)
        return tensor


class _Taker:
    """Takes out of the model what the host's loader has put there, and puts meta tensors back."""

    def __init__(self, plan: Plan, work: _Work, targets: dict[str, str], step: int, read: Callable[[], None]) -> None:
        self.model, self.work, self.targets, self.step, self.on_read = plan.model, work, targets, step, read
        self.empty: dict[str, Tensor] = plan.model.state_dict(keep_vars=True)
        self.ignored = set(plan.model._keys_to_ignore_on_save or ())
        self.bytes, self.keys = 0, list[str]()

    def read(self, key: str, size: int) -> None:
        self.keys.append(key)
        self.bytes += size
        self.on_read()

    def take_if_due(self) -> None:
        if self.bytes >= self.step:
            self.take()

    def take(self) -> None:
        """Hand the filled tensors on under their names on disk.

        The sources of a conversion still under way (some are read, nothing is filled) count with a later batch.
        """
        found = {k: v for k, v in self.model.state_dict().items() if not v.is_meta}
        for name in found:
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            held = module._parameters if leaf in module._parameters else module._buffers
            held[leaf] = self.empty[name]
        kept = {k: v for k, v in found.items() if k not in self.ignored}
        self.work.filled |= {name: tensor.nbytes for name, tensor in found.items()}
        complete = [key for key in self.keys if self.targets[key] in found]
        self.work.add(revert_weight_conversion(self.model, kept), complete)
        self.keys = [key for key in self.keys if self.targets[key] not in found]
        self.bytes = 0


def _stream(plan: Plan, work: _Work, progress: Callable[[int, int], None]) -> list[str]:
    """Everything from the source through the host's loader into shards; returns the names the model does not have."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in plan.files]
        entries = {key: file.get_slice(key) for file in files for key in file.keys()}  # noqa: SIM118 (a file is no dict)
        targets = _targets(plan, entries)
        have = plan.model.state_dict()
        dropped = sorted(key for key, name in targets.items() if name not in have)
        for key in (*_repeated(plan, entries, targets), *dropped):
            del entries[key]
        done, total = len(work.keys & set(entries)), len(entries)

        def read() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        progress(done, total)
        taker = _Taker(plan, work, targets, min(STEP, work.max_shard_size), read)
        wanted = {key: _Lazy(key, entry, taker) for key, entry in entries.items() if key not in work.keys}
        info, _ = convert_and_load_state_dict_in_model(plan.model, wanted, plan.load_config)
        if plan.quantizer.first_error is not None:
            raise plan.quantizer.first_error
        taker.take()
        _check_complete(plan, info, work)
        work.flush()
    return dropped


def _targets(plan: Plan, keys: Any) -> dict[str, str]:
    """Name on disk -> name in the model, by the host's rules. Marks the conversions that are used, as loading does.

    All of them must be known before the first tensor is renamed back, and a resumed run does not read every tensor.
    """
    model, mapping = plan.model, plan.load_config.weight_mapping or []
    renamings = [c for c in mapping if isinstance(c, WeightRenaming)]
    converters = [c for c in mapping if isinstance(c, WeightConverter)]
    have, prefix, out = model.state_dict(), model.base_model_prefix, {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, converters, prefix, have)
        if name not in have and key in have:
            name, _ = rename_source_key(key, [], [], prefix, have)
        out[key] = name
    model._weight_conversions = [c for c in mapping if c.was_used()]
    return out


def _repeated(plan: Plan, entries: dict[str, Any], targets: dict[str, str]) -> list[str]:
    """Tied tensors that the source holds a second time: the host ties what is equal, and saves it once."""
    at = {name: key for key, name in targets.items()}
    pairs = [(at[a], at[b]) for a, b in plan.model.all_tied_weights_keys.items() if a in at and b in at]
    return [a for a, b in pairs if torch.equal(entries[a][...], entries[b][...])]


def _check_complete(plan: Plan, info: Any, work: _Work) -> None:
    if info.mismatched_keys:
        name, found, wanted = sorted(info.mismatched_keys)[0]
        raise ValueError(
            f"{name} has shape {tuple(found)} in the checkpoint, the model wants {tuple(wanted)} "
            f"({len(info.mismatched_keys)} tensors differ); config.json and weights belong to different models"
        )
    if info.conversion_errors:
        name, text = next(iter(info.conversion_errors.items()))
        raise ValueError(f"transformers could not convert {name} ({text.strip().splitlines()[-1]}); {IN_MEMORY}")
    tied = plan.model.all_tied_weights_keys
    there = {tied.get(name, name) for name in work.filled}
    there |= set(plan.model._keys_to_ignore_on_save or ())  # computed, never in a file
    missing = sorted(n for n in info.missing_keys if n not in work.filled and tied.get(n, n) not in there)
    if missing:
        raise ValueError(
            f"the checkpoint has no {', '.join(missing[:5])} ({len(missing)} tensors missing), which would be drawn at "
            f"random; complete it, or {IN_MEMORY}"
        )


# --- the folder in work ---------------------------------------------------------------------------------------------


@dataclass
class _Work:
    """`OUT.partial`: finished shards and a manifest of them. A file that the manifest does not list does not count.

    Attributes:
        shards: File name -> {tensor name on disk: bytes}.
        keys: Names in the source whose results are all in finished shards.
        filled: Name in the model -> bytes.
    """

    folder: Path
    identity: dict[str, Any]
    max_shard_size: int
    shards: dict[str, dict[str, int]] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    filled: dict[str, int] = field(default_factory=dict)
    reused: int = 0
    _buffer: dict[str, Tensor] = field(default_factory=dict)
    _complete: list[str] = field(default_factory=list)  # keys whose results are all in shards or in the buffer

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any], max_shard_size: int) -> _Work:
        work = cls(folder, identity, max_shard_size)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "manifest.json"
        if not path.exists():
            if any(not p.name.endswith(".tmp") for p in folder.iterdir()):
                raise ValueError(f"{folder} is in the way and has no manifest.json of hfgen; remove or rename it")
            work._write()
            return work
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {manifest.get('format')!r}, this hfgen writes {FORMAT}; delete {folder} to start anew"
            )
        changed = sorted(k for k in identity if manifest["identity"].get(k) != identity[k])
        if changed and not manifest["shards"]:  # nothing was done yet
            work._write()
            return work
        if changed:
            raise ValueError(
                f"{folder} holds an interrupted run with another {' and '.join(changed)}; delete it to start anew, or "
                "give the former settings, or another out"
            )
        work.shards, work.keys, work.filled = manifest["shards"], set(manifest["keys"]), manifest["filled"]
        gone = [name for name in work.shards if not (folder / name).is_file() and not work._final(name).is_file()]
        if gone:
            raise ValueError(f"{folder} lacks {gone[0]}, which its manifest lists; delete the folder to start anew")
        work.reused = len(work.shards)
        return work

    def add(self, tensors: dict[str, Tensor], keys: list[str]) -> None:
        """Take tensors on, in shards of at most `max_shard_size` bytes (or one tensor)."""
        written = {name for shard in self.shards.values() for name in shard}
        size = sum(t.nbytes for t in self._buffer.values())
        for name, tensor in tensors.items():
            if name in written:  # of a batch that an interruption cut in two
                continue
            if self._buffer and size + tensor.nbytes > self.max_shard_size:
                self.flush()
                size = 0
            self._buffer[name] = tensor.contiguous()
            size += tensor.nbytes
        self._complete += keys

    def flush(self) -> None:
        """Write the buffer as a shard: under another name first, then by rename, then into the manifest."""
        if self._buffer:
            name = f"shard-{len(self.shards) + 1:05d}.safetensors"
            path = self.folder / name
            save_file(self._buffer, path.with_suffix(".tmp"), metadata={"format": "pt"})
            os.replace(path.with_suffix(".tmp"), path)
            self.shards[name] = {key: tensor.nbytes for key, tensor in self._buffer.items()}
            self._buffer = {}
        self.keys |= set(self._complete)
        self._complete = []
        self._write()

    def finish(self) -> tuple[dict[str, str], int]:
        """Move the shards to their final names; returns weight map and size. Can be interrupted and done again."""
        (self.folder / "final").mkdir(exist_ok=True)
        weight_map: dict[str, str] = {}
        size = 0
        for name, tensors in self.shards.items():
            final = self._final(name)
            if not final.is_file():
                os.replace(self.folder / name, final)
            weight_map |= dict.fromkeys(tensors, final.name)
            size += final.stat().st_size
        return weight_map, size

    def _final(self, name: str) -> Path:
        at, count = list(self.shards).index(name) + 1, len(self.shards)
        leaf = "model.safetensors" if count == 1 else f"model-{at:05d}-of-{count:05d}.safetensors"
        return self.folder / "final" / leaf

    def _write(self) -> None:
        manifest = {
            "format": FORMAT,
            "identity": self.identity,
            "shards": self.shards,
            "keys": sorted(self.keys),
            "filled": self.filled,
        }
        path = self.folder / "manifest.json"
        path.with_suffix(".tmp").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        os.replace(path.with_suffix(".tmp"), path)


def _identity(plan: Plan, config: PackedConfig, max_shard_size: int) -> dict[str, Any]:
    """What must be the same for finished shards to be of use."""
    described = (Path(plan.files[0]).parent / "config.json").read_bytes()
    stats = {Path(f).name: [(s := Path(f).stat()).st_size, s.st_mtime_ns] for f in plan.files}
    return {
        "model": {"files": stats, "config": hashlib.sha256(described).hexdigest()},
        "settings": json.loads(json.dumps(config.to_dict(), default=str)),
        "max_shard_size": max_shard_size,
        "transformers version": transformers.__version__,
    }


def copy_other_files(source: Path, target: Path) -> None:
    """Copy what is no weight and not hidden: config, tokenizer, generation config, README."""
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        if path.is_file() and not path.name.endswith(WEIGHTS) and not any(p.startswith(".") for p in inner.parts):
            (target / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / inner)


def _finish(plan: Plan, work: _Work, source: Path, out: Path) -> int:
    """Index, config and the other files beside the shards; then the one rename that makes the folder appear."""
    weight_map, size = work.finish()
    final = work.folder / "final"
    copy_other_files(source, final)
    if len(work.shards) > 1:
        sizes = sum(sum(tensors.values()) for tensors in work.shards.values())
        index = {"metadata": {"total_size": sizes}, "weight_map": weight_map}
        (final / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
    # As `save_pretrained` sets them.
    config = plan.model.config
    config.dtype = str(plan.model.dtype).removeprefix("torch.")
    config.architectures = [type(plan.model).__name__]
    config.quantization_config = plan.quantizer.quantization_config
    config.save_pretrained(final)
    if out.exists():
        out.rmdir()
    os.rename(final, out)
    shutil.rmtree(work.folder)
    return size
