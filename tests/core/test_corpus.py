"""The corpus of labelled runs: what is shipped, how its figures come about, and that its runs can be made again."""

import json
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from hfgen.evidence.corpus import COUNTS, halves, plan, read_corpus, read_figures, section, settings
from hfgen.evidence.corpus.__main__ import ENVIRONMENT
from hfgen.evidence.corpus.effects import auroc, soup_figures
from hfgen.evidence.corpus.figures import CORPUS, alarm, area, coverage, hit, make_figures, read_effects, share
from hfgen.evidence.corpus.replay import driven, replay
from hfgen.evidence.corpus.truth import onset

RECORDS = read_corpus()
FIGURES, EFFECTS = read_figures(), read_effects()
ILL = [label for label in COUNTS if label != "healthy"]


def test_the_shipped_runs_are_those_of_the_plan():
    found = [(r["label"], r["number"]) for r in RECORDS]
    assert sorted(found) == sorted(plan()) and COUNTS["healthy"] >= 300
    assert min(COUNTS.values()) >= 30 and len(COUNTS) == 9
    assert CORPUS.stat().st_size < 5e6
    for record in RECORDS:
        config = settings(record["label"], record["number"], record["attempt"])
        assert record["config"] == config and 0 <= record["step"] <= config["steps"]
    healthy = [r["config"] for r in RECORDS if r["label"] == "healthy"]
    assert {c["schedule"] for c in healthy} == {"linear", "cosine", "constant"}
    assert {c["world"] for c in healthy} == {"clouds", "chains"} and {c["adapter"] for c in healthy} == {None, "lora"}
    assert any(c["base_steps"] for c in healthy) and any(not c["base_steps"] for c in healthy)
    assert any(c["dropout"] for c in healthy) and any(c["rows"] < 2000 for c in healthy)


def test_halves_are_fixed_and_share_nothing():
    one, other = halves(RECORDS)
    names = [{(r["label"], r["number"]) for r in half} for half in (one, other)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == len(RECORDS)
    for label, count in COUNTS.items():
        assert sum(r["label"] == label for r in other) == count - count // 2
    assert halves(RECORDS[::-1])[1] == halves(RECORDS[::-1])[1]
    assert {(r["label"], r["number"]) for r in halves(RECORDS[::-1])[1]} == names[1]


@given(st.integers(1, 60), st.data())
def test_the_interval_of_a_share_is_exact(count, data):
    rounded = 0.5001e-4  # four digits are kept
    hits = data.draw(st.integers(0, count))
    found = share(hits, count)
    if hits:
        low, high = (binom.sf(hits - 1, count, found["low"] + at) for at in (-rounded, rounded))
        assert low <= 0.025 <= high
    if hits < count:
        high, low = (binom.cdf(hits, count, found["high"] + at) for at in (-rounded, rounded))
        assert low <= 0.025 <= high
    assert found["low"] <= hits / count <= found["high"]


def test_area_under_the_curve():
    assert area([(0.0, 1.0)]) == 1.0 and area([(0.5, 0.5)]) == 0.5 and area([]) == 0.5
    assert area([(0.2, 0.8), (0.1, 0.5)]) == pytest.approx(0.1 * 0.25 + 0.1 * 0.65 + 0.8 * 0.9)


def test_truth_by_hand():
    def rows(values, **more):
        return [{"step": 10 * i, "test_loss": v, "train_loss": 1 - i / 100, **more} for i, v in enumerate(values)]

    falling = [2 - i / 20 for i in range(20)]
    plain = {"steps": 400, "base_steps": 0, "boundary": 0, "surge": [100, 10, 3], "every": 20}
    assert onset("healthy", plain, rows(falling)) == 0 and onset("overfit", plain, rows(falling)) is None
    bent = [2 - i / 10 if i < 10 else 1 + (i - 10) / 10 for i in range(41)]
    assert abs(onset("overfit", plain, rows(bent)) - 100) <= 10 and onset("healthy", plain, rows(bent)) is None
    jump = [0.5] * 11 + [3.0, 3.0] + [0.6] * 10
    assert onset("loss spike", plain, rows(jump)) == 100 and onset("loss spike", plain, rows([0.5] * 30)) is None
    assert onset("rate too high", plain, rows([2.0, 1.0, 3.0])) == 100
    assert onset("rate too high", plain, rows([2.0, math.nan])) == 100
    assert onset("rate too high", plain, rows([2.0, 1.0])) is None
    zero = [{"step": 10 * i, "train_zero": z} for i, z in enumerate([0.0, 0.6, 0.2, 0.7, 0.9])]
    assert onset("softmax collapsed", plain, zero) == 30
    old = [{"step": 10 * i, "old_accuracy": a} for i, a in enumerate([0.9, 0.8, 0.88, 0.84, 0.7])]
    assert onset("forgets", plain, old) == 30 and onset("forgets", plain, old[:4]) is None
    first = [{"step": 10 * i, "first_accuracy": a} for i, a in enumerate([0.5, 0.9, 0.6, 0.9])]
    assert onset("task switch", plain | {"boundary": 10}, first) == 10
    assert onset("task switch", plain | {"boundary": 20}, first) is None
    words = [
        {"step": 10 * i, "train_accuracy": a, "test_accuracy": b} for i, (a, b) in enumerate([(1, 0.1), (1, 0.99)])
    ]
    assert onset("grokked", plain | {"modulus": 25}, words) == 10
    assert onset("grokked", plain | {"modulus": 25}, words[1:]) is None


def test_the_published_bars():
    rows = {(row["monitor"], row["label"]): row for row in FIGURES["rows"]}
    assert all(row["false_alarms"]["high"] <= 0.05 for row in rows.values()), rows
    assert all(row["threshold"] == row["default"] for row in rows.values())  # what is published is what is shipped
    good = {
        row["label"].partition(",")[0]
        for row in rows.values()
        if row["detected"]["hits"] >= 0.9 * row["detected"]["of"]
    }
    assert good >= {"grokked", "softmax collapsed", "task switch", "forgets"}


def test_the_counts_of_one_monitor_follow_from_the_shipped_runs():
    row = next(r for r in FIGURES["rows"] if r["label"] == "softmax collapsed")
    reported = [r for r in halves(RECORDS)[1] if r["label"] in ("healthy", "softmax collapsed")]
    kinds, changed = row["finding"].split(" or "), {row["monitor"]: {row["argument"]: row["threshold"]}}
    found = [(r, replay(r, changed, row["monitor"])[row["monitor"]]) for r in reported]
    false = [alarm(f, kinds) for r, f in found if r["label"] == "healthy"]
    true = [hit(f, kinds, r) is not None for r, f in found if r["label"] != "healthy"]
    assert [sum(false), len(false)] == [row["false_alarms"]["hits"], row["false_alarms"]["of"]]
    assert [sum(true), len(true)] == [row["detected"]["hits"], row["detected"]["of"]]


def test_a_finding_long_before_the_label_is_no_detection():
    record = {"step": 50, "config": {"steps": 100}}
    early, late = {"kind": "overfit/a", "noticed": 39}, {"kind": "overfit/b", "noticed": 40}
    assert hit([early], ["overfit"], record) is None and hit([early, late], ["overfit"], record) == late
    assert hit([late], ["forgetting"], record) is None and alarm([early], ["overfit"]) and not alarm([early], ["over"])


def test_the_section_shows_every_row():
    text = section()
    assert all(
        f"| {row['monitor']} | {row['finding']} | {row['label']} | {row['argument']} " in text
        for row in FIGURES["rows"]
    )
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == len(FIGURES["rows"]) + 1


def test_area_of_ranks():
    scores, flags = [1.0, 2.0, 2.0, 3.0, 0.5], [False, True, False, True, False]
    above, below = ([s for s, f in zip(scores, flags, strict=True) if f is wanted] for wanted in (True, False))
    pairs = [(a > b) + (a == b) / 2 for a in above for b in below]
    assert auroc(scores, flags) == pytest.approx(sum(pairs) / len(pairs))


def test_figures_of_soups_by_hand():
    runs = [
        {"gate": 1.0, "gate_best": 1.0, "fresh": 1.0, "fresh_best": 1.0, "members": 1},
        {"gate": 0.9, "gate_best": 1.0, "fresh": 0.9, "fresh_best": 1.0, "members": 3},
        {"gate": 0.9, "gate_best": 0.8, "fresh": 1.2, "fresh_best": 1.0, "members": 3},
    ]
    found = soup_figures(runs)
    assert [found[key]["hits"] for key in ("worse_on_gate", "mixed", "better")] == [1, 2, 1] and found["members"] == 3
    assert found["change"]["mean"] == pytest.approx((0.0 - 0.1 + 0.2) / 3, abs=1e-4)


def test_effects_as_published():
    """What soup promises holds in every run; data_diet ranks wrong labels above right ones, and not by chance."""
    for row in EFFECTS["averages"].values():
        assert row["worse_on_gate"]["hits"] == 0 and row["worse_on_gate"]["of"] >= 20
    assert EFFECTS["ranks"]["runs"] >= 15 and EFFECTS["ranks"]["el2n"]["low"] > 0.5
    assert all(f"drawn as those labelled {label}" in section() for label in EFFECTS["averages"])
    assert f"{EFFECTS['ranks']['el2n']['mean']:.3f}" in section()


@pytest.mark.slow
def test_effects_are_made_again():
    done = subprocess.run(
        [sys.executable, "-c", "import json; from hfgen.evidence.corpus.effects import *; "
         "print(json.dumps([soup_run('overfit', FIRST), diet_run(FIRST)]))"],
        capture_output=True, text=True, check=True, env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    soup, diet = json.loads(done.stdout.splitlines()[-1])
    assert soup["gate"] <= soup["gate_best"] + 1e-5 and diet["el2n"] > 0.5


def test_the_learning_curve_is_judged_again_from_the_log():
    """Coverage follows from the shipped evaluations, with the interval as the callback makes it today."""
    record = next(r for r in halves(RECORDS)[1] if r["label"] == "healthy" and "learning_curve" in r["rows"]
                  and r["config"]["schedule"] == "constant")  # fmt: skip
    monitor = driven(record, only="learning_curve")["learning_curve"]
    assert [(row["step"], row["value"]) for row in monitor.history] == [
        (row["step"], row["value"]) for row in record["rows"]["learning_curve"]
    ]
    assert any("predicted" in row for row in monitor.history)
    found = coverage([record])
    assert sum(row["of"] for row in found["held"].values()) == 2 and found["enough"]["of"] == 1


@pytest.mark.slow
def test_all_figures_are_made_again():
    assert json.loads(json.dumps(make_figures(RECORDS))) == FIGURES


@pytest.mark.slow
@pytest.mark.parametrize("label", COUNTS)
def test_the_shortest_run_of_each_label_is_made_again_bit_equal(label):
    record = min((r for r in RECORDS if r["label"] == label), key=lambda r: (r["config"]["steps"], r["number"]))
    command = [sys.executable, "-m", "hfgen.evidence.corpus", "one", "--label", label]
    command += ["--number", str(record["number"]), "--attempt", str(record["attempt"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | ENVIRONMENT)
    again = json.loads(done.stdout)
    live = again.pop("findings")
    assert again == record
    for name, found in replay(record).items():  # the monitors in the run said what they say of its log
        said = [(f["kind"], f["step"], f["noticed"], f["confidence"]) for f in live.get(name, [])]
        assert said == [(f["kind"], f["step"], f["noticed"], pytest.approx(f["confidence"], abs=1e-4)) for f in found]
