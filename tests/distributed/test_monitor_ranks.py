"""Monitors that read fixed rows and the user's evaluations: two processes see what one sees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path):
    """DDP and FSDP2 (on CPU): ranks equal to the bit, and to one process up to the order of sums."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
    found = {}
    for mode, start in (("one", []), ("ddp", LAUNCH), ("fsdp2", LAUNCH)):
        command = [sys.executable, *start, str(HERE / "monitors.py"), mode, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        found[mode] = [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"{mode}-*.json"))]
    (one,) = found["one"]
    assert len(one) == 4
    for mode in ("ddp", "fsdp2"):
        first, second = found[mode]
        assert first == second, mode
        for name, rows in one.items():
            assert len(rows) == len(first[name]) >= 2, name
            for row, wanted in zip(first[name], rows, strict=True):
                assert row == pytest.approx(wanted, abs=1e-5, rel=1e-5), (mode, name)
