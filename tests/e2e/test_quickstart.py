"""`hfgen quickstart` as a user runs it: exit code, table, report.json, report.html."""

import json
import os
import re
import subprocess
import sys

import pytest

from hfgen import catalog
from hfgen.cli.quickstart import find_experiment

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
ARMS = ["base", "sft_lora", "s3ft_lora", "s3ft_svfit"]


def command(*arguments, cwd=None):
    code = "import hfgen.cli; hfgen.cli.main()"
    line = [sys.executable, "-c", code, "quickstart", *arguments]
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, cwd=cwd)


def test_experiment_is_found_on_the_card():
    assert find_experiment("s3ft").method == "s3ft"
    with pytest.raises(catalog.CatalogError, match="no claim with an experiment"):
        find_experiment("exact")


def test_bad_seeds_are_refused():
    done = command("--seeds", "0")
    assert done.returncode == 2 and "--seeds" in done.stderr


@pytest.mark.slow
def test_quickstart_fast(tmp_path):
    done = command("--fast", "--seeds", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Smoke run" in done.stdout and "no verdict" in done.stdout
    folder = tmp_path / "hfgen-quickstart"
    report = json.loads((folder / "report.json").read_text())
    assert report["format"] == 1 and report["smoke"] is True and report["verdicts"] == []
    assert min(report["seeds"]) >= 1000  # a smoke run never looks at the reported seeds
    assert [arm["id"] for arm in report["arms"]] == ARMS
    for arm in report["arms"]:
        assert arm["label"] in done.stdout
        for metric in report["metrics"]:
            found = arm["metrics"][metric["key"]]
            assert len(found["values"]) == found["n"] == 1
            assert metric["unit"] != "share" or 0 <= found["mean"] <= 1
    parameters = {arm["id"]: arm["metrics"]["parameters"]["mean"] for arm in report["arms"]}
    # LoRA r=8: 8 * (64 + 64) * 4 + 8 * (64 + 256) * 3 a layer, two layers; SVFit full rank: 64 * 7 * 2
    assert parameters == {"base": 0, "sft_lora": 23552, "s3ft_lora": 23552, "s3ft_svfit": 896}
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|<img", page) and page.count("<svg") == 1


@pytest.mark.slow
def test_quickstart_full_run_gives_a_verdict(tmp_path):
    """The main job with two seeds: every arm has a verdict, whichever it is."""
    done = command("--out", str(tmp_path / "a"), "--seeds", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert {v["arm"] for v in report["verdicts"]} == {"s3ft_lora", "s3ft_svfit"}
    for verdict in report["verdicts"]:
        assert verdict["verdict"] in ("reproduced", "partly", "not reproduced", "void") and len(verdict["checks"]) == 3
        assert verdict["verdict"] in done.stdout
    assert report["settings"]["steps"] == find_experiment("s3ft").settings.steps
