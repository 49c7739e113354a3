"""How far runs are apart; and one run for all pytest workers."""

import json
import os
import shutil

import torch
from filelock import FileLock
from safetensors.torch import load_file

# Names of a run, times, and the token count that SFTTrainer (trl 1.16) starts anew when a run is resumed.
FREE = {"run", "num_tokens", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def once(tmp_path_factory, name, make):
    """The folder `make(folder)` fills, made by the first pytest-xdist worker that asks; the others wait for it."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


def facts(folder, task, rank=0):
    path = folder / task.replace("/", ".") / f"rank-{rank}.json"
    assert path.is_file(), f"{task} left nothing on rank {rank}"
    found = json.loads(path.read_text())
    assert "error" not in found, found["trace"]
    return found


def tensors(folder, task, prefix=""):
    found = load_file(folder / task.replace("/", ".") / "tensors.safetensors")
    return {n.removeprefix(prefix): t.double() for n, t in found.items() if n.startswith(prefix)}


def apart(ours, theirs):
    """||ours - theirs|| / ||theirs|| over all tensors of two dicts with the same names."""
    assert ours.keys() == theirs.keys() and ours
    far = sum(float((ours[n] - t).square().sum()) for n, t in theirs.items())
    size = sum(float(t.square().sum()) for t in theirs.values())
    assert size > 0, "nothing to compare with"
    return (far / size) ** 0.5


def change(found):
    """end - start of each tensor of a `train` task."""
    start = {n.removeprefix("start."): t for n, t in found.items() if n.startswith("start.")}
    return {n: found[f"end.{n}"] - t for n, t in start.items()}


def without(value, names=FREE):
    """JSON without some keys, at every depth."""
    if isinstance(value, dict):
        return {k: without(v, names) for k, v in value.items() if k not in names}
    return [without(v, names) for v in value] if isinstance(value, list) else value


def _load(path):
    return torch.load(path, weights_only=True)


def _same(a, b):
    """Bit-equal, but for a tuple that came back as a list (betas, in torch's whole state of a sharded optimizer)."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


def differing(one, other):
    """Names of the files of a checkpoint that differ, in anything but times and the names of runs and folders."""
    skip = "training_args.bin"  # has the folder's name
    names = {p.relative_to(one).as_posix() for p in one.rglob("*") if p.is_file() and p.name != skip}
    assert names == {p.relative_to(other).as_posix() for p in other.rglob("*") if p.is_file() and p.name != skip}
    found = []
    for name in sorted(names):
        a, b = (one / name).read_bytes(), (other / name).read_bytes()
        if name.endswith(".json"):
            a, b = without(json.loads(a)), without(json.loads(b))
        if a != b and not (name == "optimizer.bin" and _same(*(_load(folder / name) for folder in (one, other)))):
            found.append(name)
    return names, found
