"""One thread, no hub: two contended threads cost 3x to 15x, and nothing may be downloaded."""

import os

for name, value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ[name] = value

import subprocess
import sys

import pytest


def pytest_collection_modifyitems(config, items):
    """HFGEN_SLOW_SHARD=i/n keeps every n-th slow test from the i-th on (CI runs one shard per landing)."""
    shard = os.environ.get("HFGEN_SLOW_SHARD")
    if shard:
        index, count = map(int, shard.split("/"))
        slow = sorted((i for i in items if i.get_closest_marker("slow")), key=lambda i: i.nodeid)
        keep = slow[index::count]
        config.hook.pytest_deselected(items=[i for i in items if i not in keep])
        items[:] = keep


@pytest.fixture
def run_python(tmp_path):
    """Run code in a new interpreter (cwd outside the clone); returns the CompletedProcess."""

    def run(code, *, env=None, check=True, timeout=300):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **(env or {})},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if check:
            assert done.returncode == 0, done.stderr[-4000:]
        return done

    return run
