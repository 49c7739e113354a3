"""recipes/bench/ensembles.py at toy size: the report's shape is the kept one's. No timing."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "recipes" / "bench"


def shape(value):
    """Keys and types of a report, all the way down; a list by its first entry."""
    if isinstance(value, dict):
        return {key: shape(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


@pytest.mark.slow
def test_report_has_the_shape_of_the_kept_one(tmp_path):
    spec = importlib.util.spec_from_file_location("bench_ensembles", BENCH / "ensembles.py")
    bench = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = bench  # dataclasses look their module up
    spec.loader.exec_module(bench)
    out = tmp_path / "report.json"
    small = {"rounds": 1, "hidden": 32, "layers": 1, "pairs": 2, "tokens": 8, "peak_hidden": 64, "out": out}
    bench.main([word for key, value in small.items() for word in (f"--{key}", str(value))])
    report, kept = json.loads(out.read_text()), json.loads((BENCH / "results" / "ensembles.json").read_text())
    assert shape(report) == shape(kept)
    assert [b["what"] for b in report["bars"]] == [b["what"] for b in kept["bars"]] == list(bench.BARS)
    assert (
        report["arms"]["one"]["step"]["median"] == 1 and report["weights"]["heads"] == kept["weights"]["heads"] < 1.001
    )
    for row in report["arms"].values():
        assert sum(v for k, v in row["bytes"].items() if k != "total") == row["bytes"]["total"]
