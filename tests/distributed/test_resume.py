"""Killed by SIGKILL between two checkpoints and resumed in a new process, a run ends as the one that went through."""

import os
import signal
import subprocess
import sys

import pytest

from tests.distributed import worker
from tests.distributed.compare import differing, facts, once

FAST = ("svfit", "hyperfit", "s3ft")
REST = ("loldu", "soma", "increlora", "sara", "intrinsic", "easyquant_lora", "easyquant_svfit")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def killed_and_resumed(folder, methods):
    run = [sys.executable, worker.__file__, str(folder), "--resume", *methods]
    done = subprocess.run(run, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return once(tmp_path_factory, "fast", lambda folder: killed_and_resumed(folder, FAST))


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return once(tmp_path_factory, "rest", lambda folder: killed_and_resumed(folder, REST))


CASES = [("fast", m) for m in FAST] + [pytest.param("rest", m, marks=pytest.mark.slow) for m in REST]


@pytest.mark.parametrize(("which", "method"), CASES)
def test_killed_and_resumed_is_bit_equal(which, method, request):
    folder = request.getfixturevalue(which)
    codes = {k: (folder / f"one.{method}.{k}.code").read_text() for k in ("whole_run", "cut", "again")}
    again = facts(folder, f"one/again/{method}")  # first, for its trace
    assert codes == {"whole_run": "0", "cut": str(-signal.SIGKILL), "again": "0"}
    assert again["step"] == 8 and again["steps"] == list(range(1, 9))
    cut = folder / f"one.{method}.cut"
    assert sorted(p.name for p in cut.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6, 8)]
    ended_equal(folder, "one", method)
    if method == "s3ft":
        assert (folder / "one.s3ft.cut_data.code").read_text() == str(-signal.SIGKILL)
        data = [folder / f"one.s3ft.{n}" / "_s3ft_data" / "part-0.jsonl" for n in ("whole", "cut")]
        assert data[0].read_bytes() == data[1].read_bytes()


def ended_equal(folder, mode, method):
    """Weights, adapter files, optimizer, scheduler, random states, the trainer's and the callbacks' state: all bytes."""
    names, differ = differing(*(folder / f"{mode}.{method}.{n}" / "checkpoint-8" for n in ("whole", "cut")))
    wanted = {"scheduler.pt", "trainer_state.json"} | ({"rng_state.pth"} if mode == "one" else {"rng_state_1.pth"})
    wanted |= {"optimizer.bin", "pytorch_model_fsdp.bin"} if mode == "fsdp2" else {"optimizer.pt"}
    wanted |= {"model.safetensors", "hfgen_hyperfit.json"} if method == "hyperfit" else {"adapter_model.safetensors"}
    assert wanted <= names and not differ


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "method"), [("ddp", "svfit"), ("fsdp2", "svfit"), ("ddp", "increlora"), ("ddp", "sara")]
)
def test_killed_and_resumed_on_two_processes(tmp_path, mode, method):
    """The second process is killed, which ends the first; a new launch goes on."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker.__file__]

    def run(*tasks):
        command = [*launch, str(tmp_path), *tasks]
        return subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=200)

    first = run(f"{mode}/cut/{method}")
    assert first.returncode != 0 and "SIGKILL" in first.stderr
    second = run(f"{mode}/again/{method}", f"{mode}/whole_run/{method}")
    assert second.returncode == 0, second.stderr[-3000:]
    for rank in (0, 1):
        assert facts(tmp_path, f"{mode}/again/{method}", rank)["step"] == 8
    ended_equal(tmp_path, mode, method)
