"""`hfgen evidence` and the ledger: a made-up method in a git repository of its own, from the run to EVIDENCE.md."""

import copy
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hfgen import catalog
from hfgen.card import MethodCard
from hfgen.cli.evidence import evidence as command
from hfgen.evidence import LedgerError, enter, find_experiment, ledger_file, read_ledger, render, run_experiment
from hfgen.evidence.experiment import finite
from hfgen.evidence.ledger import current
from hfgen.evidence.tuning import at_edge, best_rate
from tests.fixtures import dists

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
CARD = """
from hfgen.card import Claim, MethodCard
CARD = MethodCard(name="toy", kind="data", summary="a stranger", target="toydist_impl:Thing", exports=("Thing",), claims=(
    Claim("grows", "It | grows.", "toydist_evidence:EXPERIMENT", "1 % (table 1)"),
    Claim("empty", "It says nothing.", "toydist_evidence:VOID"),
    Claim("words", "It is only said."),
    Claim("broken", "It does not load.", "toydist_missing:EXPERIMENT"),
))
"""
EVIDENCE = """
import dataclasses
from hfgen.evidence import Arm, Experiment, Metric, at_least, paired, verdict

@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = 5
    bound: float = 0.1

def run(arm, seed, settings, report):
    report(1, 1)
    return {"gain": {"base": 0.5, "new": 0.9}[arm] + seed / 100 * (arm == "new"), "seconds": float(settings.steps)}

def judge(samples, settings):
    return [verdict("new", [at_least("gains", paired(samples["new"]["gain"], samples["base"]["gain"]), settings.bound)])]

def nothing(samples, settings):
    return [dataclasses.replace(judge(samples, settings)[0], verdict="void", reason="the baseline never learnt")]

EXPERIMENT = Experiment(
    method="toy", claim="grows", title="Toy", statement="Tested: it grows.",
    arms=(Arm("base", "base"), Arm("new", "the | new")), metrics=(Metric("gain", "gain"), Metric("seconds", "time", "s")),
    chart=("gain", ("gain",)), settings=Settings(), smoke_settings=Settings(1), run=run, judge=judge, notes=("A note.",),
    steps=5, tries=6, tuning_seeds=(100, 101, 102),
)
VOID = dataclasses.replace(EXPERIMENT, claim="empty", judge=nothing)
"""


def git(folder, *arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of an installed distribution whose files are committed."""
    folder = tmp_path_factory.mktemp("toy")
    dists.make(folder, "toydist", "toy", "data", card=CARD)
    (folder / "toydist_evidence.py").write_text(EVIDENCE)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "settings")
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(folder))
    patch.setattr(sys, "dont_write_bytecode", True)
    catalog.refresh()
    yield folder
    patch.undo()
    catalog.refresh()
    for name in ("toydist", "toydist_evidence", "toydist_impl"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def report(toy):
    return json.loads(json.dumps(finite(run_experiment(find_experiment("toy"), range(5), console=QUIET))))


@pytest.fixture
def clean(toy):
    """No ledger before and after."""
    yield toy
    for path in toy.glob("ledger*.json"):
        path.unlink()
    git(toy, "checkout", "-q", ".")


def claim(i):
    return catalog.get_card("toy").claims[i]


# --- the command ------------------------------------------------------------------------------------------------------


def test_fast_run_as_a_user_runs_it(toy, tmp_path):
    code = "import hfgen.cli; hfgen.cli.main()"
    line = [
        sys.executable,
        "-c",
        code,
        "evidence",
        "run",
        "toy",
        "--seeds",
        "9",
        "--fast",
        "--out",
        str(tmp_path / "o"),
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(toy), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no verdict" in done.stdout and "the | new" in done.stdout
    found = json.loads((tmp_path / "o" / "report.json").read_text())
    assert found["smoke"] and found["seeds"] == [1000, 1001] and found["settings"]["steps"] == 1
    assert (tmp_path / "o" / "report.html").is_file()


def test_which_claim(toy):
    assert find_experiment("toy").claim == find_experiment("toy", "grows").claim == "grows"
    assert find_experiment("toy", "empty").claim == "empty"
    for name, said in (("wrong", "it has: grows, empty, words, broken"), ("words", "no claim 'words' with an exp"),
                       ("broken", "toydist_missing:EXPERIMENT cannot be loaded: ModuleNotFound")):  # fmt: skip
        with pytest.raises(catalog.CatalogError, match=said):
            find_experiment("toy", name)


def test_commands_enter_ls_render(clean, report, tmp_path):
    file, page = tmp_path / "report.json", tmp_path / "E.md"
    file.write_text(json.dumps(report))
    entered = CliRunner().invoke(command, ["enter", str(file)])
    assert entered.exit_code == 0 and str(clean / "ledger.json") in entered.output
    file.write_text(json.dumps(report | {"smoke": True}))
    assert CliRunner().invoke(command, ["enter", str(file)]).exit_code == 2
    listed = CliRunner().invoke(command, ["ls"], env={"COLUMNS": "200"}).output
    assert "reproduced" in listed and "untested" in listed
    assert CliRunner().invoke(command, ["render", "--out", str(page)]).exit_code == 0
    assert page.read_text() == CliRunner().invoke(command, ["render"]).output == render(catalog.list_cards())


# --- what may be entered ----------------------------------------------------------------------------------------------


def test_ledger_round_trip(clean, report):
    path = enter(copy.deepcopy(report))
    assert path == clean / "ledger.json" == ledger_file(catalog.get_card("toy"), claim(0))
    found = read_ledger(path)
    assert found == json.loads(path.read_text()) and found["format"] == 2
    assert found["settings_commit"] == git(clean, "rev-parse", "HEAD")
    assert found["paper"] == "1 % (table 1)"
    assert found["budget"] == {"steps": 5, "tries": 6, "seconds": report["seconds"]}
    for key in ("seeds", "settings", "settings_sha256", "arms", "verdicts", "interval", "started", "environment"):
        assert found[key] == report[key]
    before = path.read_bytes()
    assert enter(report).read_bytes() == before


def test_second_claim_has_a_file_of_its_own(clean):
    found = run_experiment(find_experiment("toy", "empty"), range(5), console=QUIET)
    assert enter(json.loads(json.dumps(finite(found)))) == clean / "ledger-empty.json"


def changed(report, **fields):
    return copy.deepcopy(report) | fields


REFUSED = {
    "smoke run": lambda r: changed(r, smoke=True),
    "the experiment has": lambda r: changed(r, settings_sha256="0" * 64),
    "settings [0-9a-f]{12}": lambda r: changed(r, settings=r["settings"] | {"bound": 0.2}),
    "4 seeds; run 5": lambda r: changed(r, seeds=r["seeds"][:4]),
    r"\[100\], on which": lambda r: changed(r, seeds=[*r["seeds"], 100]),
    "one value per seed": lambda r: changed(r, seeds=[*r["seeds"], 5]),
    "do not follow": lambda r: changed(r, verdicts=[r["verdicts"][0] | {"verdict": "partly"}]),
    "after the run began": lambda r: changed(r, started="2001-01-01T00:00:00+00:00"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_report_that_may_not_count_is_refused(clean, report, said):
    with pytest.raises(LedgerError, match=said):
        enter(REFUSED[said](report))
    assert not (clean / "ledger.json").exists()


def test_settings_that_are_not_committed_are_refused(clean, report):
    (clean / "toydist_evidence.py").write_text(EVIDENCE.replace("bound: float = 0.1", "bound: float = 0.0"))
    with pytest.raises(LedgerError, match="commit the settings before the run"):
        enter(report)


def test_a_report_of_other_settings_than_the_committed_is_refused(clean, report):
    """The settings change, are committed, and the old report comes afterwards."""
    head = git(clean, "rev-parse", "HEAD")
    module = sys.modules["toydist_evidence"]
    (clean / "toydist_evidence.py").write_text(EVIDENCE.replace("bound: float = 0.1", "bound: float = 0.0"))
    git(clean, "commit", "-q", "-am", "another bound")
    try:
        del sys.modules["toydist_evidence"]
        importlib.invalidate_caches()
        with pytest.raises(LedgerError, match="run it again"):
            enter(report)
    finally:
        git(clean, "reset", "-q", "--hard", head)
        sys.modules["toydist_evidence"] = module


# --- reading and rendering --------------------------------------------------------------------------------------------


def test_format_1_is_read(clean, report):
    """As S3FT's first ledger was: the bare report with settings_commit."""
    old = {k: v for k, v in report.items() if k not in ("started", "caption")} | {"settings_commit": "f" * 40}
    path = clean / "ledger.json"
    path.write_text(json.dumps(old))
    found = read_ledger(path)
    assert found["format"] == 2 and found["paper"] is None and found["started"] is None
    assert found["budget"] == {"steps": 5, "tries": None, "seconds": report["seconds"]}
    assert "tries not recorded" in render([catalog.get_card("toy")])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 99}', '{"format": "2"}'])
def test_what_is_no_ledger_is_refused(tmp_path, text):
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(LedgerError, match=str(path)):
        read_ledger(path)


def test_render(clean, report):
    enter(report)
    enter(json.loads(json.dumps(finite(run_experiment(find_experiment("toy", "empty"), range(5), console=QUIET)))))
    text = render([catalog.get_card("toy")])
    assert "| toy | It \\| grows. | the \\| new | reproduced | 1 of 1 | 5 |" in text
    assert "| toy | It says nothing. | the \\| new | void | 1 of 1 | 5 |" in text
    assert "**the | new: void** (the baseline never learnt)" in text
    assert "| toy | It is only said. |  | untested |  |  |" in text
    assert "| toy | It does not load. |  | untested (experiment toydist_missing:EXPERIMENT cannot be loaded" in text
    # gains .4, .41 .. .44: mean .42, s = .015811, half width 2.776445 * .015811 / sqrt(5) = .019632
    assert "- gains: yes (+0.420, interval +0.400 to +0.440, bound +0.100)" in text
    assert "Paper: 1 % (table 1)." in text and "Paper: no figure that we are sure of." in text
    assert "5 steps per run, 6 tries per arm on other seeds" in text and "- A note." in text


def test_settings_changed_since_are_said(clean, report):
    path = enter(report)
    ledger = json.loads(path.read_text())
    path.write_text(json.dumps(ledger | {"settings_sha256": "0" * 64}))
    assert current(catalog.get_card("toy"), claim(0))["stale"]
    assert "untested (settings changed)" in render([catalog.get_card("toy")])


def test_a_ledger_of_another_claim_is_refused(clean, report):
    path = enter(report)
    path.rename(clean / "ledger-empty.json")
    with pytest.raises(LedgerError, match="is of toy grows, not of toy empty"):
        render([catalog.get_card("toy")])


def test_render_needs_no_claim_and_no_card():
    bare = MethodCard(name="bare", kind="data", summary="s", target="a:b", exports=())
    assert render([bare]) == render([]) and render([]).startswith("# Evidence\n")


def test_evidence_md_is_what_the_ledgers_give():
    cards = [p.card for p in catalog.plugins() if p.distribution == "hfgen" and p.card is not None]
    assert (ROOT / "EVIDENCE.md").read_text() == render(cards), "run: hfgen evidence render --out EVIDENCE.md"


# --- workers ----------------------------------------------------------------------------------------------------------

ENDLESS = """
import os, pathlib, time
from hfgen.evidence import Job, run_jobs

def work(file, report):
    pathlib.Path(file).write_text(str(os.getpid()))
    for i in range(600):
        time.sleep(0.05)
        report(i, 600)

def main(file):
    run_jobs(work, [Job("endless", {"file": file})], 1)
"""


def test_a_killed_run_leaves_no_worker_behind(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    file = tmp_path / "pid"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    line = [sys.executable, "-c", f"import endless; endless.main({str(file)!r})"]
    parent = subprocess.Popen(line, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.DEVNULL)
    wait_for(lambda: file.is_file() and file.read_text(), 20)
    state = Path(f"/proc/{file.read_text()}/stat")
    assert running(state)
    parent.terminate()
    parent.wait(timeout=20)
    wait_for(lambda: not running(state), 10)


def running(stat):
    """Whether the process is there and no zombie."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "too late"
        time.sleep(0.05)


# --- tuning -----------------------------------------------------------------------------------------------------------


def test_best_rate_and_edge():
    rows = [{"rate": r, "seed": s, "a": a, "b": b} for r, s, a, b in
            [(0.1, 0, 0.4, 1), (0.1, 1, 0.6, 1), (0.2, 0, 0.5, 0), (0.2, 1, 0.5, 0), (0.3, 0, 0.5, 1), (0.3, 1, 0.4, 9)]]  # fmt: skip
    assert best_rate(rows, ("a",)) == 0.1  # equal means: the lower rate
    assert best_rate(rows, ("b",)) == 0.3
    assert best_rate(rows, ("a", "b")) == 0.1
    assert at_edge({"x": 0.1, "y": 0.2, "z": 0.3}, (0.1, 0.2, 0.3)) == ["x", "z"]


def test_experiment_settings_hash_is_that_of_json(toy, report):
    """A hash taken from settings and one taken from a file's settings agree (tuples become lists there)."""
    from hfgen.evidence import settings_sha256

    settings = {"targets": ("q", "v"), "rate": 1e-3, "nested": {"b": 1, "a": 2.5}}
    assert settings_sha256(settings) == settings_sha256(json.loads(json.dumps(settings)))
    assert report["settings_sha256"] == settings_sha256(dataclasses.asdict(find_experiment("toy").settings))
