"""hfgen check: what it selects, runs, prints and writes; that it finds planted faults; that bad plugins harm nobody."""

import json
import os
import subprocess
import sys

import pytest

from hfgen.cli import check
from hfgen.testing import cards, plugin
from tests.core.test_cli import hfgen
from tests.fixtures import dists, strangers

CARD = """
from hfgen.card import MethodCard
CARD = MethodCard(name={name!r}, kind="judges", summary="Always right.", target="{module}_impl:Thing", exports=("Thing",))
def __getattr__(name):
    if name in CARD.exports:
        import {module}_impl
        return getattr({module}_impl, name)
    raise AttributeError(name)
"""
IMPL = "class Thing:\n    def __call__(self, prompt, answer, gold): return True\n"


def judge(folder, name, impl=IMPL):
    """A distribution `stranger-<name>` with one judge: only the checks of cards run, without torch."""
    card = CARD.format(name=name, module=f"stranger_{name}").replace("Thing", name.capitalize())
    dists.make(folder, f"stranger-{name}", name, "judges", card=card, impl=impl.replace("Thing", name.capitalize()))


def test_a_healthy_method_passes_with_report_and_badge(tmp_path):
    judge(tmp_path, "yes")
    (tmp_path / "conftest.py").write_text("raise RuntimeError('the user own conftest')")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    done = hfgen(
        "check", "yes", "--json", str(tmp_path / "r.json"), "--badge", str(tmp_path / "b.json"),
        PYTHONPATH=str(tmp_path), PYTEST_ADDOPTS="--no-such-option", PYTEST_PLUGINS="no_such_plugin",
    )  # fmt: skip
    assert "yes (judges, stranger-yes 1.0): passed: 7 checks" in done.stdout and "no fault in 1 method" in done.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    (method,) = report["methods"]
    assert report["passed"] and method["status"] == "passed" and method["file"].endswith("stranger_yes.py")
    assert [c["check"] for c in method["checks"]] == list(cards.CHECKS)
    assert json.loads((tmp_path / "b.json").read_text()) == {
        "schemaVersion": 1, "label": "hfgen check", "message": "7 checks passed", "color": "brightgreen",
    }  # fmt: skip


def test_faults_crashes_and_hangs_are_named_and_the_rest_goes_on(tmp_path):
    """A distribution with four judges: one wrong, one that ends the process, one that hangs, one healthy."""
    judge(tmp_path, "wrong", "Thing = 3\n")
    judge(tmp_path, "ends", "import os\nos._exit(0)\n")
    judge(tmp_path, "hangs", "import time\ntime.sleep(600)\n")
    judge(tmp_path, "yes")
    dists.make(tmp_path, "stranger-q", "quarantined", card="raise RuntimeError('boom')")
    report, badge = tmp_path / "r.json", tmp_path / "b.json"
    done = hfgen(
        "check", "--json", str(report), "--badge", str(badge), "--timeout", "2", check=False,
        PYTHONPATH=str(tmp_path), HFGEN_PLUGINS="wrong,ends,hangs,yes,quarantined",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    methods = {m["name"]: m for m in json.loads(report.read_text())["methods"]}
    status = {name: m["status"] for name, m in methods.items()}
    assert (status["wrong"], status["ends"], status["hangs"], status["yes"]) == ("failed", "failed", "failed", "passed")
    assert status["quarantined"] == "quarantined" and status["svfit"] == "blocked"
    said = {name: {c["check"]: c["message"] for c in m["checks"]} for name, m in methods.items()}
    assert all(set(said[name]) == set(cards.CHECKS) for name in ("wrong", "ends", "hangs", "yes"))
    assert said["wrong"]["card_target"] == "stranger_wrong_impl:Wrong is int, which cannot be called"
    assert said["ends"]["card_target"] == "the check ended the process (exit code 0)"
    assert said["hangs"]["card_target"] == "the check hung: nothing came of it in 2 s"
    assert said["ends"]["card_words"] == said["hangs"]["card_light"] == ""
    assert "quarantined (adapters, stranger-q 1.0): quarantined: RuntimeError: boom" in done.stdout
    assert "blocked: HFGEN_PLUGINS=" in done.stdout and "card_target" in done.stdout
    message = json.loads(badge.read_text())
    assert message["color"] == "red" and message["message"].endswith("of 28 checks failed, 1 quarantined")


def test_a_distribution_means_all_its_methods(tmp_path):
    for name in ("one", "two"):
        judge(tmp_path, name)
    (tmp_path / "stranger_one-1.0.dist-info" / "entry_points.txt").write_text(
        "[hfgen.judges]\none = stranger_one:CARD\ntwo = stranger_two:CARD\n"
    )
    (tmp_path / "stranger_two-1.0.dist-info" / "entry_points.txt").unlink()
    out = hfgen("check", "Stranger_One", PYTHONPATH=str(tmp_path)).stdout
    assert "one (judges, stranger-one 1.0): passed" in out and "two (judges, stranger-one 1.0): passed" in out


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        (("svfitt",), {}, "no installed method is called 'svfitt'; did you mean 'svfit'?"),
        (("pytest",), {}, "no installed method is called 'pytest'"),
        (("svfit",), {"HFGEN_BLOCK": "svfit"}, "'svfit' is blocked: HFGEN_BLOCK names it"),
        (("svfit", "--badge", "no/such/b.json"), {}, "no/such/b.json cannot be written: there is no folder"),
        (("stranger-odd",), {}, "offers 'odd' in group 'hfgen.adapter', which is none; groups are hfgen.<kind>"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(arguments, env, words, tmp_path):
    dists.make(tmp_path, "stranger-odd", "odd", "adapter")
    done = hfgen("check", *arguments, check=False, PYTHONPATH=str(tmp_path), **env)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_quarantined_method_that_is_named_is_a_fault(tmp_path):
    dists.make(tmp_path, "stranger-b", "strangerb", card="raise RuntimeError('boom')")
    done = hfgen("check", "strangerb", check=False, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "quarantined: RuntimeError: boom" in done.stdout and "1 of 1 method" in done.stdout


def test_without_pytest_it_says_what_to_install(tmp_path):
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'pytest' else find(name, *a)\n"
        "sys.argv = ['hfgen', 'check', 'svfit']\nfrom hfgen.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "hfgen: `hfgen check` runs on pytest, which is not installed: pip install pytest\n"


def test_the_same_by_pytest(tmp_path):
    judge(tmp_path, "yes")

    def run(*names):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--pyargs", "hfgen.testing"]
        return subprocess.run(
            [*command, *(f"--hfgen-plugin={n}" for n in names)], capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )  # fmt: skip

    assert "14 passed" in run("yes", "judges/exact").stdout
    wrong = run("yess")
    assert wrong.returncode == 4 and "--hfgen-plugin yess: no installed method is called 'yess'" in wrong.stderr


def test_words_of_a_failure():
    def failing(error):
        try:
            raise error
        except type(error) as exc:
            return plugin.words(exc)

    assert failing(AssertionError("merged differs")) == "merged differs"
    assert failing(AssertionError()).startswith("raise error (core/test_check_command.py:")
    assert failing(KeyError("x")).startswith("KeyError: 'x' (core/test_check_command.py:")
    long = failing(AssertionError("a" * 1000 + "b" * 1000))
    assert len(long) <= plugin.LONGEST + 5 and long[0] == "a" and long[-1] == "b"


def test_a_cut_report_is_read_up_to_the_cut(tmp_path):
    path = tmp_path / "report.jsonl"
    assert plugin.read(path) == []
    path.write_text('{"a": 1}\n{"a": ')
    assert plugin.read(path) == [{"a": 1}]


def test_badge_of_nothing_wrong_and_of_faults():
    ok = {"check": "a", "outcome": "passed"}
    bad = {"check": "b", "outcome": "failed"}
    methods = [{"status": "failed", "checks": [ok, bad]}, {"status": "quarantined", "checks": []}]
    assert check.make_badge({"passed": False, "methods": methods})["message"] == "1 of 2 checks failed, 1 quarantined"
    assert (
        check.make_badge({"passed": True, "methods": [{"status": "passed", "checks": [ok]}]})["message"]
        == "1 checks passed"
    )


@pytest.mark.slow
def test_every_planted_fault_is_found_by_its_check(tmp_path):
    """Whole distributions as `hfgen new` writes them, each with one fault, in one run."""
    site = tmp_path / "site"
    site.mkdir()
    for mutant in strangers.MUTANTS:
        strangers.plant(tmp_path, site, mutant)
    report = tmp_path / "r.json"
    done = hfgen(
        "check", "--json", str(report), check=False, PYTHONPATH=str(site), HFGEN_PLUGINS=",".join(strangers.MUTANTS)
    )
    assert done.returncode == 1, done.stderr
    found = {m["name"]: m for m in json.loads(report.read_text())["methods"] if m["status"] != "blocked"}
    assert set(found) == set(strangers.MUTANTS)
    for name, (_, _, wanted, words) in strangers.MUTANTS.items():
        failed = {c["check"]: c["message"] for c in found[name]["checks"] if c["outcome"] == "failed"}
        assert words in failed.get(wanted, ""), (name, failed)
        assert words in " ".join(done.stdout.split()), name


# --- quarantine -----------------------------------------------------------------------------------------------------

FIRST_PARTY = """
import hashlib, sys
import torch
from peft import get_peft_model
from hfgen import catalog, sandbox
from hfgen.adapters import LoLDUConfig, SVFitConfig
from hfgen.callbacks import HyperfitCallback
from hfgen.quantizers import EasyQuantConfig
from hfgen.trainers import S3FTTrainer
from transformers import AutoModelForCausalLM

torch.manual_seed(0)  # of init_weights=False
digest, ids = hashlib.sha256(), torch.arange(2, 40)[None]
for model in (
    get_peft_model(sandbox.load_model(), SVFitConfig(r=4, init_weights=False)),
    get_peft_model(sandbox.load_model(), LoLDUConfig(r=4, init_weights=False)),
    AutoModelForCausalLM.from_pretrained(str(sandbox.path()), quantization_config=EasyQuantConfig(bits=3)),
):
    with torch.no_grad():
        digest.update(model.eval()(ids).logits.numpy().tobytes())
modules = [c.__module__ for c in (SVFitConfig, LoLDUConfig, HyperfitCallback, EasyQuantConfig, S3FTTrainer)]
first = sorted((p.kind, p.name, p.status) for p in catalog.plugins() if p.distribution == "hfgen")
print(digest.hexdigest(), modules, first)
"""


@pytest.mark.slow
def test_bad_plugins_change_nothing_for_others_and_are_named(tmp_path):
    """Bit for bit the same outputs with and without plugins that raise, name nothing, shadow names or lie."""
    adapter = dists.CARD.replace('exports=("Thing",)', 'exports=("Thing", "SVFitConfig", "LoLDUConfig")')
    dists.make(tmp_path, "stranger-a", "raises", card="raise RuntimeError('boom')")
    dists.make(tmp_path, "stranger-b", "exits", card="import sys; sys.exit(3)")
    dists.make(tmp_path, "stranger-c", "missing", impl="")
    dists.make(
        tmp_path, "stranger-d", "lies", card=dists.CARD.format(name="lies", kind="trainers", module="stranger_d")
    )
    dists.make(tmp_path, "stranger-e", "liestoo", kind="callbacks")
    dists.make(tmp_path, "stranger-f", "svf", card=adapter.format(name="svf", kind="adapters", module="stranger_f"),
               impl="class Thing: pass\nSVFitConfig = LoLDUConfig = Thing\n")  # fmt: skip
    dists.make_adapter(tmp_path, "stranger-g", "lora")
    command = [sys.executable, "-c", FIRST_PARTY]
    outputs = []
    for path in ("", str(tmp_path)):
        env = {**os.environ, "PYTHONPATH": path}
        outputs.append(subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300))
    assert all(done.returncode == 0 for done in outputs), outputs[1].stderr[-2000:]
    assert outputs[0].stdout == outputs[1].stdout and len(outputs[0].stdout) > 100
    listed = {r["name"]: r for r in json.loads(hfgen("ls", "--json", PYTHONPATH=str(tmp_path)).stdout)}
    assert {n: listed[n]["status"] for n in ("raises", "exits", "lies")} == dict.fromkeys(
        ("raises", "exits", "lies"), "broken"
    )
    report = tmp_path / "r.json"
    bad = "raises,exits,missing,lies,liestoo,svf,lora"
    done = hfgen("check", "--json", str(report), check=False, PYTHONPATH=str(tmp_path), HFGEN_PLUGINS=bad)
    assert done.returncode == 1
    methods = {m["name"]: m for m in json.loads(report.read_text())["methods"]}
    assert all(methods[name]["status"] in ("quarantined", "failed") for name in bad.split(",")), done.stdout
    said = {n: {c["check"]: c["message"] for c in methods[n]["checks"]} for n in ("missing", "liestoo", "lora")}
    assert "no attribute 'Thing'" in said["missing"]["card_target"]
    assert "is no TrainerCallback" in said["liestoo"]["card_target"]
    assert "ships its own LORA" in said["lora"]["card_target"]
