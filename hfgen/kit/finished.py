"""The layers that an interrupted calibration has done, in a folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = 1  # of the manifest


@dataclass
class Finished:
    """Layers done so far, in a folder: a manifest and a safetensors file each, so that an interrupted run goes on.

    Attributes:
        notes: What else was found, JSON: {name: anything}; those of a layer lie under the layer's name.
        layers: Layer name -> file.
    """

    folder: Path
    identity: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any]) -> Finished:
        """Take up the run in `folder`, or start one there. `identity`: what must be the same for it to be of use.

        Raises:
            ValueError: the folder holds something else, or a run of another identity.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path, found = folder / "calibration.json", cls(folder, json.loads(json.dumps(identity)))
        if not path.exists():
            if any(folder.iterdir()):
                raise ValueError(f"{folder} is in the way and has no calibration.json; remove or rename it")
            found._write()
            return found
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {manifest.get('format')!r}, this hfgen writes {FORMAT}; delete {folder} to start anew"
            )
        changed = sorted(k for k in found.identity if manifest["identity"].get(k) != found.identity[k])
        if changed and not manifest["layers"] and not manifest["notes"]:  # nothing was done yet
            found._write()
            return found
        if changed:
            raise ValueError(
                f"{folder} holds an interrupted run with another {' and '.join(changed)}; delete it to start anew, or "
                "give the former settings, or another out"
            )
        found.notes, found.layers = manifest["notes"], manifest["layers"]
        gone = [name for name in found.layers.values() if not (folder / name).is_file()]
        if gone:
            raise ValueError(f"{folder} lacks {gone[0]}, which its manifest lists; delete the folder to start anew")
        return found

    def add(self, name: str, tensors: dict[str, Tensor], note: Any) -> None:
        """A layer is done. Its file is written under another name, renamed, then listed."""
        file = f"layer-{len(self.layers) + 1:05d}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.folder / f"{file}.tmp")
        os.replace(self.folder / f"{file}.tmp", self.folder / file)
        self.layers[name] = file
        self.note(name, note)

    def note(self, name: str, note: Any) -> None:
        self.notes[name] = note
        self._write()

    def load(self, name: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = load_file(self.folder / self.layers[name])
        return found

    def _write(self) -> None:
        path = self.folder / "calibration.json"
        manifest = {"format": FORMAT, "identity": self.identity, "notes": self.notes, "layers": self.layers}
        path.with_suffix(".tmp").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        os.replace(path.with_suffix(".tmp"), path)


def digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """sha256 of the rows, for an identity."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps({k: torch.as_tensor(v).flatten().tolist() for k, v in row.items()}).encode())
    return found.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """sha256 of every tensor's name, shape and first entries: whether two models are the same, without reading all."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(str(tensor.flatten()[:64].float().tolist()).encode())
    return found.hexdigest()
