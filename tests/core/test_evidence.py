"""Intervals, checks and verdicts against numbers worked by hand; jobs in worker processes; the files a report makes."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hfgen import evidence
from hfgen.evidence import Arm, Experiment, Job, JobError, Metric, at_least, at_most, interval, run_jobs, verdict
from hfgen.evidence.experiment import finite
from hfgen.evidence.report import render, sentence, show, write_report
from hfgen_plugins.trainers.s3ft import evidence as s3ft

QUIET = Console(quiet=True)


# --- intervals and verdicts ------------------------------------------------------------------------------------------


def test_interval_by_hand():
    """1, 2, 3: mean 2, s = 1, t(.975, 2) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138."""
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2 - 2.484138, abs=1e-6) and found.high == pytest.approx(2 + 2.484138, abs=1e-6)


def test_interval_of_two_and_five_by_hand():
    """0, 1: t(.975, 1) = 12.706205, s = .707107. Five values with s = 1: t(.975, 4) = 2.776445."""
    assert interval([0.0, 1.0]).high == pytest.approx(0.5 + 12.706205 * 0.7071068 / math.sqrt(2), abs=1e-5)
    values = [-1.0, -1.0, 0.0, 1.0, 1.0]
    assert interval(values).high == pytest.approx(2.776445 / math.sqrt(5), abs=1e-6)


def test_one_value_has_an_interval_without_ends():
    found = interval([0.5])
    assert (found.mean, found.low, found.high) == (0.5, -math.inf, math.inf)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_interval_refuses(values):
    with pytest.raises(ValueError, match="give at least one finite number"):
        interval(values)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8), st.floats(-5, 5))
def test_interval_moves_with_the_data_and_holds_the_mean(values, shift):
    a, b = interval(values), interval([v + shift for v in values])
    assert a.low <= a.mean + 1e-9 and a.mean <= a.high + 1e-9
    assert b.mean - a.mean == pytest.approx(shift, abs=1e-9)
    assert b.high - b.low == pytest.approx(a.high - a.low, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "bound", "outcome"),
    [
        ([0.0, 0.0, 0.0], 0.0, "holds"),  # equal to the bound, no spread
        ([1.0, 2.0, 3.0], -0.5, "holds"),  # low end -.484
        ([1.0, 2.0, 3.0], -0.4, "open"),
        ([1.0, 2.0, 3.0], 4.4, "open"),  # high end 4.484
        ([1.0, 2.0, 3.0], 4.5, "fails"),
        ([5.0], 0.0, "open"),
    ],
)
def test_at_least_and_its_mirror(values, bound, outcome):
    assert at_least("x", values, bound).outcome == outcome
    mirrored = at_most("x", [-v for v in values], -bound)
    assert (mirrored.outcome, mirrored.bound) == (outcome, -bound)
    assert mirrored.interval == interval([-v for v in values])


HOLDS, FAILS = at_least("a", [1.0, 1.0], 0.0), at_least("b", [-1.0, -1.0], 0.0)
OPEN = at_least("c", [-1.0, 1.0], 0.0)


@pytest.mark.parametrize(
    ("checks", "expected"),
    [
        ([HOLDS, HOLDS], "reproduced"),
        ([HOLDS, FAILS], "partly"),
        ([HOLDS, OPEN], "partly"),
        ([OPEN, FAILS], "not reproduced"),
        ([OPEN], "not reproduced"),
        ([at_least("one seed", [1.0], 0.0)], "untested"),
    ],
)
def test_verdict(checks, expected):
    assert verdict("arm", checks).verdict == expected
    void = verdict("arm", checks, void="the baseline never learnt")
    assert (void.verdict, void.reason) == ("void", "the baseline never learnt")


def test_verdict_needs_checks():
    with pytest.raises(ValueError, match="is empty"):
        verdict("arm", [])


# --- the verdict of the S3FT experiment on made-up samples -----------------------------------------------------------


def samples(sft_trained=(1.0, 1.0, 1.0), s3ft_held=(0.5, 0.6, 0.7), s3ft_old=(0.8, 0.8, 0.8)):
    def arm(trained, held_out, old):
        return {"trained": list(trained), "held_out": list(held_out), "old_skills": list(old)}

    return {
        "base": arm([0.5, 0.5, 0.6], [0.5, 0.5, 0.3], [1.0] * 3),
        "sft_lora": arm(sft_trained, [0.1, 0.1, 0.2], [0.0, 0.2, 0.1]),
        "s3ft_lora": arm([1.0] * 3, s3ft_held, s3ft_old),
        "s3ft_svfit": arm([0.8] * 3, [0.1, 0.1, 0.2], [0.2, 0.3, 0.3]),
    }


def test_s3ft_verdict_reproduced_and_not():
    lora, svfit = s3ft.judge(samples(), s3ft.SETTINGS)
    assert (lora.arm, lora.verdict) == ("s3ft_lora", "reproduced")
    # drops .2 against half of 1, .8, .9 = .5, .4, .45: differences -.3, -.2, -.25, mean -.25, s .05, half .124207
    assert lora.checks[2].interval.mean == pytest.approx(-0.25)
    assert lora.checks[2].interval.high == pytest.approx(-0.25 + 0.124207, abs=1e-5)
    # SVFit: trained -.2 fails; held out equal holds; drops .8, .7, .7 - .5, .4, .45 > 0 fails
    assert [c.outcome for c in svfit.checks] == ["fails", "holds", "fails"] and svfit.verdict == "partly"


def test_s3ft_margin_is_the_settings():
    """Held out .03 below SFT in every seed: within the margin of .05, outside a margin of .02."""
    made = samples(s3ft_held=(0.07, 0.07, 0.17))
    assert s3ft.judge(made, s3ft.SETTINGS)[0].verdict == "reproduced"
    strict = dataclasses.replace(s3ft.SETTINGS, margin=0.02)
    assert s3ft.judge(made, strict)[0].verdict == "partly"


@pytest.mark.parametrize("trained", [(0.0, 0.0, 0.0), (0.5, 0.5, 0.6), (1.0, 0.5, 0.6)])
def test_s3ft_is_void_when_sft_did_not_learn(trained):
    """Below the base; equal to it; above it in the mean, but not by the interval."""
    for found in s3ft.judge(samples(sft_trained=trained), s3ft.SETTINGS):
        assert found.verdict == "void" and "did not end above the base" in found.reason


def test_s3ft_one_seed_decides_nothing():
    one = {arm: {key: values[:1] for key, values in of.items()} for arm, of in samples().items()}
    assert {v.verdict for v in s3ft.judge(one, s3ft.SETTINGS)} == {"untested"}


def test_s3ft_settings_are_what_the_tuning_chose():
    """The committed rates come from the committed table, by the stated rule, from other seeds, with equal tries."""
    table = json.loads(s3ft.TUNING_FILE.read_text())
    assert s3ft.SETTINGS.learning_rates == table["chosen"]
    assert table["criterion"] == s3ft.CRITERION and min(table["seeds"]) >= 100
    fixed = dataclasses.asdict(s3ft.SETTINGS)
    del fixed["learning_rates"]
    assert fixed == table["settings"]
    for arm in ("sft_lora", "s3ft_lora", "s3ft_svfit"):
        runs = [r for r in table["runs"] if r["arm"] == arm]
        assert {(r["rate"], r["seed"]) for r in runs} == {(g, s) for g in table["grid"] for s in table["seeds"]}
        assert s3ft.choose(runs) == table["chosen"][arm]


def test_choose_by_trained_then_held_out_then_lower_rate():
    def run(rate, trained, held_out):
        return {"rate": rate, "trained": trained, "held_out": held_out, "old_skills": 1 - rate}

    assert s3ft.choose([run(0.1, 0.9, 0.0), run(0.2, 0.8, 1.0)]) == 0.1
    assert s3ft.choose([run(0.1, 0.9, 0.1), run(0.2, 0.9, 0.2)]) == 0.2
    assert s3ft.choose([run(0.2, 0.9, 0.1), run(0.1, 0.9, 0.1)]) == 0.1
    assert s3ft.choose([run(0.1, 1.0, 0.0), run(0.1, 0.0, 0.0), run(0.2, 0.6, 0.0), run(0.2, 0.6, 0.0)]) == 0.2


# --- jobs: these functions run in spawned workers --------------------------------------------------------------------


def square(x, report):
    report(1, 2)
    print("a line from a job")
    return {"square": x * x, "threads": os.environ["OMP_NUM_THREADS"], "offline": os.environ["HF_HUB_OFFLINE"]}


def fail_on_three(x, report):
    if x == 3:
        raise KeyError("three is not allowed")
    time.sleep(0.05)
    return x


def die(x, report):
    time.sleep(0.3)
    os._exit(7)


def measure(arm, seed, settings, report):
    report(1, 1)
    value = {"base": 0.5, "new": 0.9}[arm] + seed / 100
    return {"gain": value, "kept": 1 - value / 2, "parameters": 10, "seconds": settings.steps}


def test_jobs_keep_their_order_and_log(tmp_path):
    before = os.environ.get("OMP_NUM_THREADS")
    found = run_jobs(square, [Job(f"job {x}", {"x": x}) for x in range(5)], 2, tmp_path / "log", QUIET)
    assert [f["square"] for f in found] == [0, 1, 4, 9, 16]
    assert {(f["threads"], f["offline"]) for f in found} == {("1", "1")}
    assert os.environ.get("OMP_NUM_THREADS") == before
    assert (tmp_path / "log").read_text().count("a line from a job") == 5


def test_job_that_raises_stops_the_run_with_its_traceback():
    with pytest.raises(JobError) as caught:
        run_jobs(fail_on_three, [Job(f"job {x}", {"x": x}) for x in range(200)], 2, console=QUIET)
    assert "job 3 failed" in str(caught.value) and "three is not allowed" in str(caught.value)
    assert "in fail_on_three" in str(caught.value)


def test_worker_that_dies_is_noticed():
    with pytest.raises(JobError, match="exit code 7 while job 0"):
        run_jobs(die, [Job("job 0", {"x": 0})], 2, console=QUIET)


def test_workers_below_one_are_refused():
    with pytest.raises(ValueError, match="give 1 or more"):
        run_jobs(square, [Job("job", {"x": 1})], 0)


# --- reports -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = 5


def judge(found, settings):
    gains = [a - b for a, b in zip(found["new"]["gain"], found["base"]["gain"], strict=True)]
    return [verdict("new", [at_least("gains <something>", gains, 0.1)])]


TOY = Experiment(
    method="toy", claim="c", title="A <toy> & more", statement="It works.",
    arms=(Arm("base", "base"), Arm("new", "new")),
    metrics=(Metric("gain", "gain"), Metric("kept", "kept"), Metric("parameters", "parameters", "count"),
             Metric("seconds", "time", "s")),
    chart=("kept", ("gain", "kept")), settings=Settings(), smoke_settings=Settings(1), run=measure, judge=judge,
    notes=("a note",),
)  # fmt: skip


@pytest.fixture(scope="module")
def report():
    return evidence.run_experiment(TOY, [0, 1, 2], console=QUIET)


def test_report_holds_every_run(report):
    assert report["format"] == 1 and report["seeds"] == [0, 1, 2] and report["smoke"] is False
    new = report["arms"][1]["metrics"]["gain"]
    assert new["values"] == pytest.approx([0.9, 0.91, 0.92]) and new["n"] == 3
    # s = .01: half width 4.302653 * .01 / sqrt(3)
    assert new["high"] - new["mean"] == pytest.approx(0.02484138, abs=1e-7)
    assert report["verdicts"][0]["verdict"] == "reproduced" and report["settings"] == {"steps": 5}
    assert set(report["environment"]["packages"]) >= {"torch", "transformers", "peft", "trl"}


def test_smoke_uses_its_settings_and_gives_no_verdict():
    found = evidence.run_experiment(TOY, [7], smoke=True, console=QUIET)
    assert found["smoke"] and found["verdicts"] == [] and found["settings"] == {"steps": 1}
    assert "no verdict" in render(found)


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_are_checked(seeds):
    with pytest.raises(ValueError, match="distinct seeds"):
        evidence.run_experiment(TOY, seeds)


class Resources(HTMLParser):
    """Collects whatever a browser would fetch or run."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset") and not (value or "").startswith("#"):
                self.found.append((tag, name, value))


def test_files(report, tmp_path):
    data, page = write_report(report, tmp_path / "out")
    assert json.loads(data.read_text()) == json.loads(json.dumps(finite(report)))
    text = page.read_text()
    resources = Resources()
    resources.feed(text)
    assert resources.found == [] and "script" not in resources.tags and resources.tags.count("svg") == 1
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "A &lt;toy&gt; &amp; more" in text and "gains &lt;something&gt;" in text and "<toy>" not in text
    assert "reproduced" in text and "a note" in text


def test_page_is_the_same_for_the_same_report(report):
    assert render(report) == render(report)


def test_one_seed_is_written_as_null(tmp_path):
    found = evidence.run_experiment(TOY, [0], console=QUIET)
    data, page = write_report(found, tmp_path)
    metrics = json.loads(data.read_text())["arms"][0]["metrics"]["gain"]
    assert metrics["low"] is None and metrics["high"] is None and metrics["mean"] == 0.5
    assert "one seed" in page.read_text() and "untested" in page.read_text()


def test_show_and_sentence():
    assert show("share", {"mean": 0.9, "low": 0.7, "high": 1.2}) == ("0.90", "0.70 to 1.00")
    assert show("s", {"mean": 2.0, "low": -1.0, "high": 5.0}) == ("2.0 s", "0.0 to 5.0")
    assert show("s", {"mean": 0.0, "low": 0.0, "high": 0.0}) == ("-", "")
    assert show("count", {"mean": 23552.0, "low": 0.0, "high": 0.0}) == ("23,552", "")
    check = dataclasses.asdict(at_most("loses little", [0.0, 0.0], 0.5))
    assert sentence(check) == "loses little: yes (+0.00, interval +0.00 to +0.00, bound +0.50)"


def test_import_brings_no_torch():
    code = (
        "import sys, hfgen.cli.quickstart, hfgen_plugins.trainers.s3ft.evidence; "
        "print(sorted({'torch', 'transformers', 'scipy', 'matplotlib', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
