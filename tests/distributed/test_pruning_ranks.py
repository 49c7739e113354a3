"""Gradual pruning in two processes: under DDP their masks are equal and hold, FSDP2 is refused in words."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["per_layer", "global"])
def test_two_processes_have_the_same_masks(tmp_path, scope):
    """Equal to the bit on both; micro-batches count as steps of the optimizer only; every mask holds on each."""
    first, second = launch("ddp", tmp_path, scope)
    assert first == second and first["held"] and len(first["masks"]) == 14
    if scope == "per_layer":
        assert {round(0.6 * size) - count for size, count in first["masks"].values()} == {0}
    else:
        assert sum(count for _, count in first["masks"].values()) == round(
            0.6 * sum(size for size, _ in first["masks"].values())
        )
    assert [row["step"] for row in first["history"]] == [1, 3, 5, 6]


@pytest.mark.slow
def test_sharded_weights_are_refused(tmp_path):
    for found in launch("fsdp2", tmp_path, "per_layer"):
        assert "zeroes single entries of whole weights, which FSDP keeps in pieces; train with DDP" in found["said"]


def launch(mode, folder, scope):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, *LAUNCH, __file__, mode, str(folder), scope]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{mode}-{rank}.json").read_text()) for rank in (0, 1)]


def main(mode, folder, scope):
    import hashlib

    from fsdp_cpu_shim import fsdp2
    from transformers import Trainer

    from hfgen.callbacks import GradualPruningCallback
    from hfgen.kit.examples import tiny_run

    callback = GradualPruningCallback(0.6, scope=scope, begin_step=1, end_step=5, frequency=2)
    with fsdp2() if mode == "fsdp2" else nullcontext():
        run = tiny_run(
            str(folder / mode),
            layers=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_strategy="no",
        )
        trainer, found = Trainer(**run, callbacks=[callback]), {}
        try:
            trainer.train()
        except ValueError as error:
            found["said"] = str(error)
    if "said" not in found:
        masks = callback.pruned()
        weights = {name: trainer.model.get_submodule(name).weight.detach() for name in masks}
        found["masks"] = {name: (mask.numel(), int(mask.sum())) for name, mask in masks.items()}
        found["held"] = all(bool((weights[name] == 0).eq(mask).all()) for name, mask in masks.items())
        bits = b"".join(t.numpy().tobytes() for part in (masks, weights) for t in part.values())
        found["digest"] = hashlib.sha256(bits).hexdigest()
        found["history"] = callback.history
    (folder / f"{mode}-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    import torch

    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads do not always end
