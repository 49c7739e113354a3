"""A level database: every layer of a model packed at several widths, and modules swapped to go from one choice to another.

All widths together take the sum of their bits (2 to 6: 20 bits a weight), in memory or mapped from files; nothing is made
dense but the layer at work. Going to another choice puts other modules into the model, and only where the two differ.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfgen.kit import checks
from hfgen.kit.quantizer import PackedConfig, PackedLinear, PackedWeight, adopt, plain, quantizable

FORMAT = 1  # of levels.json
Report = Callable[[int, int], None]
Layers = dict[str, PackedLinear]


def shared_copy(model: Any) -> Any:
    """A model of its own modules on the same tensors: modules can be swapped in it while `model` stays as it is."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(t): t for t in tensors})


class Levels:
    """Every quantizable layer of a model, packed at every width.

    Args:
        config: The quantizer's config; its `bits` and `bits_map` say nothing here.
        layers: Packed layers by width and name.
        floats: The plain layers.
        fingerprint: Hash of their weights.

    Attributes:
        bits: The widths, ascending.
        sizes: Weights of each layer, {name: number}.
        swaps: Modules that `assign` has put into models so far.
    """

    def __init__(
        self, config: PackedConfig, layers: dict[int, Layers], floats: dict[str, nn.Module], fingerprint: str
    ) -> None:
        self.config, self.layers, self.floats, self.fingerprint = config, layers, floats, fingerprint
        self.bits = tuple(sorted(layers))
        self.sizes = {name: module.weight.numel() for name, module in floats.items()}
        self.swaps = 0

    @classmethod
    def build(
        cls, model: Any, config: PackedConfig, bits: Sequence[int] = (2, 3, 4, 5, 6), progress: Report | None = None
    ) -> Levels:
        """Pack the layers of a float model at every width.

        Args:
            model: In memory; it stays as it is.
            config: A data-free quantizer's config.
            progress: Called with (layers packed, layers to pack).

        Raises:
            TypeError: `config` is none of a packed quantizer.
            ValueError: it needs data, a width is unknown or named twice, or nothing can be quantised.
        """
        widths = _check(config, bits)
        floats, _ = quantizable(model, _at(config, None, ()))
        layers: dict[int, Layers] = {}
        total, done = len(floats) * len(widths), 0
        for width in widths:
            layers[width] = {}
            for name, layer in _packed(config, width, floats):
                layers[width][name], done = layer, done + 1
                if progress is not None:
                    progress(done, total)
        return cls(config, layers, floats, fingerprint(floats))

    @classmethod
    def open(
        cls,
        folder: Path,
        model: Any,
        config: PackedConfig,
        bits: Sequence[int] = (2, 3, 4, 5, 6),
        progress: Report | None = None,
    ) -> Levels:
        """The database kept in `folder`, its layers mapped from the files; widths that are not there are built and saved.

        Raises:
            TypeError, ValueError: as `build`; or the folder is of another model or config, or damaged.
        """
        widths = _check(config, bits)
        floats, _ = quantizable(model, _at(config, None, ()))
        found = fingerprint(floats)
        _claim(folder, config, found)
        layers = {}
        for i, width in enumerate(widths):
            file = folder / f"{width}-bit.safetensors"
            if not file.is_file():
                made = {}
                for name, layer in _packed(config, width, floats):
                    made[name] = layer
                    if progress is not None:
                        progress(i * len(floats) + len(made), len(widths) * len(floats))
                _write(file, made)
            layers[width] = dict(_mapped(file, config, width, floats))
        return cls(config, layers, floats, found)

    def save(self, folder: Path) -> None:
        """Write it where `open` reads it: levels.json and a safetensors file per width."""
        _claim(folder, self.config, self.fingerprint)
        for width, layers in self.layers.items():
            _write(folder / f"{width}-bit.safetensors", layers)

    def assign(self, model: Any, plan: Mapping[str, int | None]) -> int:
        """Give the named layers of `model` their widths (None: the plain layer); others stay as they are.

        Returns:
            How many modules were put in: those that differ from what the model held.

        Raises:
            ValueError: an unknown layer, or a width that the database has not.
        """
        swapped = 0
        for name, width in plan.items():
            new = self._layer(name, width)
            if model.get_submodule(name) is not new:
                model.set_submodule(name, new)
                swapped += 1
        self.swaps += swapped
        return swapped

    def check(self, model: Any) -> None:
        """Raise ValueError unless `model` is the float model that the levels were made of, or equal to it."""
        for name, module in self.floats.items():
            try:
                weight = model.get_submodule(name).weight
            except AttributeError:
                weight = None
            if weight is not module.weight and (weight is None or not torch.equal(plain(weight), module.weight)):
                raise ValueError(f"the levels are of another model: {name} differs; build them from this one")

    def _layer(self, name: str, width: int | None) -> nn.Module:
        if name not in self.floats:
            close = difflib.get_close_matches(name, list(self.floats), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(list(self.floats)[:3])}, ..."
            raise ValueError(f"the plan names {name!r}, which is no layer of the level database; {hint}")
        if width is None:
            return self.floats[name]
        if width not in self.layers:
            raise ValueError(
                f"the plan gives {name} {width!r} bits; the level database has {', '.join(map(str, self.bits))} "
                "(None: the plain layer)"
            )
        return self.layers[width][name]

    def average(self, plan: Mapping[str, int]) -> float:
        """Bits of codes per weight."""
        return sum(self.sizes[name] * bits for name, bits in plan.items()) / sum(self.sizes[name] for name in plan)

    def stored(self, plan: Mapping[str, int]) -> float:
        """Stored bits per weight: codes, scales and whatever else a layer has but its bias."""
        return 8 * sum(nbytes(self.layers[b][n]) for n, b in plan.items()) / sum(self.sizes[n] for n in plan)

    @property
    def nbytes(self) -> int:
        """Bytes of all packed layers."""
        return sum(nbytes(layer) for layers in self.layers.values() for layer in layers.values())

    def identity(self) -> dict[str, Any]:
        """What tells this database from another, as JSON."""
        return {"quantizer": _plain_config(self.config), "bits": list(self.bits), "model": self.fingerprint}

    def config_for(self, plan: Mapping[str, int]) -> PackedConfig:
        """The quantizer's config with `bits_map`; `bits` is the plan's most frequent width."""
        widths = list(plan.values())
        return _at(self.config, max(sorted(set(widths)), key=widths.count), plan)

    def export(self, model: Any, plan: Mapping[str, int]) -> Any:
        """The quantised model of a plan that names every layer, on the tensors of `model`, ready for `save_pretrained`."""
        return adopt(shared_copy(model), self.config_for(plan), {n: self.layers[b][n] for n, b in plan.items()})


def nbytes(layer: PackedLinear) -> int:
    """Bytes of a packed layer without its bias."""
    return sum(t.nbytes for t in _tensors(layer).values())


def fingerprint(floats: Mapping[str, nn.Module]) -> str:
    """Hash of the names and weights."""
    found = hashlib.blake2b(digest_size=16)
    for name, module in floats.items():
        found.update(f"{name} {tuple(module.weight.shape)} {module.weight.dtype}".encode())
        for part in module.weight.detach().reshape(-1).split(2**24):
            found.update(part.contiguous().cpu().view(torch.uint8).numpy())
    return found.hexdigest()


def _check(config: Any, bits: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(config, PackedConfig):
        raise TypeError(f"config is {type(config).__name__}; give the config of one of hfgen's packed quantizers")
    owner = type(config).__name__
    if config.calibrated:
        raise ValueError(
            f"{owner} needs data, and a level database is made without; build it with a data-free quantizer, the "
            f"bits_map found works for {owner} as well"
        )
    if not isinstance(bits, (list, tuple)) or not bits or len(set(bits)) != len(bits):
        raise ValueError(f"bits is {bits!r}; give distinct widths such as (2, 3, 4)")
    for width in bits:
        checks.integer("Levels", "bits", width)
        _at(config, width, ())  # the config says which widths there are
    return tuple(sorted(bits))


def _at(config: PackedConfig, width: int | None, plan: Mapping[str, int] | tuple[()]) -> PackedConfig:
    return dataclasses.replace(config, bits=config.bits if width is None else width, bits_map=dict(plan) or None)


def _plain_config(config: PackedConfig) -> dict[str, Any]:
    """As JSON, without what says nothing about a database."""
    return {k: v for k, v in config.to_dict().items() if k not in ("bits", "bits_map", "hfgen")}


def _weight(module: nn.Module) -> Tensor:
    """(m, n) = (out, in)."""
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _packed(config: PackedConfig, width: int, floats: Mapping[str, nn.Module]) -> Iterator[tuple[str, PackedLinear]]:
    """Every layer at one width, as a checkpoint is quantised when it is read."""
    whole = _at(config, width, ())
    whole.before_reading(lambda: ((name, _weight(module)) for name, module in floats.items()))
    for name, module in floats.items():
        own = whole.for_layer(name)
        yield name, PackedLinear.of(module, own, own.quantize_checked(_weight(module), name))


def _tensors(layer: PackedLinear) -> dict[str, Tensor]:
    return {"weight": plain(layer.weight)} | dict(layer.named_buffers())


def _write(file: Path, layers: Layers) -> None:
    new = file.with_name(file.name + ".new")
    tensors = {f"{n}.{leaf}": t.contiguous() for n, layer in layers.items() for leaf, t in _tensors(layer).items()}
    save_file(tensors, str(new), metadata={"format": "pt"})
    os.replace(new, file)


def _mapped(
    file: Path, config: PackedConfig, width: int, floats: Mapping[str, nn.Module]
) -> Iterator[tuple[str, PackedLinear]]:
    """The layers of a file; on a CPU their tensors stay in it until they are used."""
    try:
        with safe_open(file, "pt") as opened:
            found: dict[str, dict[str, Tensor]] = {name: {} for name in floats}
            for key in opened.keys():  # noqa: SIM118 (a file is no dict)
                name, _, leaf = key.rpartition(".")
                found[name][leaf] = opened.get_tensor(key).to(floats[name].weight.device)
        whole = _at(config, width, ())
        for name, module in floats.items():
            (m, n), turned = _weight(module).shape, isinstance(module, Conv1D)
            own = whole.for_layer(name)
            layer = PackedLinear(n, m, module.bias is not None, own, turned, "meta", module.weight.dtype)
            layer.bias = module.bias
            missing = _tensors(layer).keys() ^ found[name].keys()
            if missing or found[name]["weight"].shape != layer.weight.shape:
                raise KeyError(f"{name}: {', '.join(sorted(missing)) or 'its shape'}")
            for leaf, tensor in found[name].items():
                setattr(layer, leaf, PackedWeight(tensor) if leaf == "weight" else tensor)
            yield name, layer.train(module.training)
    except (SafetensorError, KeyError) as exc:
        raise ValueError(f"{file} is no level of this model ({exc}); remove it, it is made again") from None


def _claim(folder: Path, config: PackedConfig, model: str) -> None:
    """Write whose levels the folder holds, or compare that with what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = json.loads(json.dumps({"format": FORMAT, "config": _plain_config(config), "model": model}))
    file = folder / "levels.json"
    if not file.is_file():
        new = file.with_name(file.name + ".new")
        new.write_text(json.dumps(identity), encoding="utf-8")
        os.replace(new, file)
        return
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as exc:
        raise ValueError(f"{file} cannot be read ({exc}); remove its folder, the levels are made again") from None
    other = sorted(key for key in identity.keys() | found.keys() if identity.get(key) != found.get(key))
    if other:
        raise ValueError(f"{folder} holds levels with another {' and '.join(other)}; name another folder, or remove it")
