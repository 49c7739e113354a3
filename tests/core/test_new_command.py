"""hfgen new: what it writes, what it refuses, and that what it writes works in an environment of its own."""

import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from hfgen.catalog import CatalogError
from hfgen.cli import new
from tests.core.test_cli import hfgen
from tests.fixtures import strangers
from tests.fixtures.venvs import LinkedVenv

ROOT = Path(__file__).parents[2]
KINDS = pytest.mark.parametrize("kind", strangers.NAMES)


@KINDS
def test_files(kind, tmp_path):
    name = strangers.NAMES[kind]
    out = tmp_path / "made" / "here"
    files = {str(p.relative_to(out)) for p in new.create(kind, name, out)}
    assert files == {
        "pyproject.toml", "README.md", "LICENSE", ".gitignore", f"src/{name}/__init__.py", f"src/{name}/{kind}.py",
        f"tests/test_{name}.py", "tests/test_conformance.py",
    }  # fmt: skip
    project = tomllib.loads((out / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {f"hfgen.{kind}s": {name: f"{name}:CARD"}}
    for path in out.rglob("*.*"):
        text = path.read_text() if path.is_file() else ""
        assert "${" not in text and "NAME" not in text, path
        if path.suffix == ".py":
            compile(text, str(path), "exec")
            assert max(map(len, text.splitlines())) <= 124, path


def test_there_is_a_template_for_every_kind_that_has_checks():
    from hfgen.testing import _CASES

    assert {f"{kind}s" for kind in new.kinds()} == set(_CASES)


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("adaptor", "rowcos", "kind is 'adaptor', which has no template; did you mean 'adapter'?"),
        ("judge", "rowcos", "give one of adapter, callback, quantizer, trainer"),
        ("shared", "rowcos", "kind is 'shared'"),
        ("adapter", "RowCos", "name is 'RowCos', which is no name of a method; give a lower-case identifier"),
        ("adapter", "row-cos", "no name of a method"),
        ("adapter", "../rowcos", "no name of a method"),
        ("adapter", "", "no name of a method"),
        ("adapter", "rowcos_", "no name of a method"),
        ("adapter", "zeiß", "no name of a method"),
        ("adapter", "lambda", "a keyword of Python"),
        ("adapter", "match", "a keyword of Python"),
        ("adapter", "json", "Python's standard library"),
        ("adapter", "torch", "a module that is installed here"),
        ("adapter", "hfgen", "a module that is installed here"),
        ("adapter", "tests", "tools take for something else"),
        ("adapter", "svfit", "which hfgen 0.1.0 offers already (adapters)"),
        ("quantizer", "svfit", "which hfgen 0.1.0 offers already (adapters)"),
        ("adapter", "loha", "which peft has an adapter for"),
        ("adapter", "row_cos", "try 'rowcos'"),
        ("quantizer", "gptq", "which transformers has a quantizer for"),
    ],
)
def test_refused_names(kind, name, words, tmp_path):
    with pytest.raises(CatalogError, match=re.escape(words)) as caught:
        new.create(kind, name, tmp_path / "out")
    assert caught.traceback[-1].path.name == "new.py" and not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(CatalogError, match="exists and is not an empty folder; nothing is overwritten"):
            new.create("trainer", "gce", out)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert new.create("trainer", "gce", tmp_path / "empty")


def test_the_command_prints_the_next_three(tmp_path):
    done = hfgen("new", "callback", "normwatch", "--out", str(tmp_path / "out"))
    lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert lines == [f"pip install -e {tmp_path / 'out'}", "hfgen show normwatch", "hfgen check normwatch"]
    wrong = hfgen("new", "callback", "class", "--out", str(tmp_path / "x"), check=False)
    assert (
        wrong.returncode == 2
        and wrong.stderr == "hfgen: name is 'class', which is a keyword of Python; choose another name\n"
    )


def test_templates_are_in_the_package():
    """hatchling takes every file below hfgen/; a git-ignored one it would leave out."""
    ignored = [line for line in (ROOT / ".gitignore").read_text().split() if "tmpl" in line or "templates" in line]
    assert not ignored and new.TEMPLATES == ROOT / "hfgen" / "templates"


@KINDS
@pytest.mark.slow
def test_what_is_written_passes_its_checks_and_its_own_tests(kind, tmp_path):
    name, site = strangers.NAMES[kind], tmp_path / "site"
    site.mkdir()
    out = strangers.generate(tmp_path, kind, name)
    strangers.link(out, site)
    listed = hfgen("ls", f"{kind}s", PYTHONPATH=str(site)).stdout
    assert re.search(rf"^{name} +{kind}s +{name} ", listed, re.M), listed
    done = hfgen("check", name, PYTHONPATH=str(site), check=False)
    assert done.returncode == 0, done.stdout
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_{name}.py"], cwd=out,
        env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert tests.returncode == 0, tests.stdout[-3000:]


TRAIN = """
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from hfgen import sandbox
from hfgen.adapters import RowcosConfig

model = sandbox.load_model()
model.save_pretrained("base")
model = get_peft_model(model, RowcosConfig(r=8, target_modules="all-linear"))
ids = torch.arange(2, 34).view(4, 8)
rows = [{"input_ids": row, "labels": row} for row in ids]
args = TrainingArguments("run", max_steps=5, learning_rate=0.05, use_cpu=True, report_to="none", save_strategy="no",
                         logging_steps=1)
trainer = Trainer(model=model, args=args, train_dataset=rows)
trainer.train()
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
assert losses[-1] < losses[0], losses
model.save_pretrained("saved")
with torch.no_grad():
    torch.save(model.eval()(ids).logits, "logits.pt")
"""
RELOAD = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "saved").eval()
with torch.no_grad():
    same = torch.equal(model(torch.arange(2, 34).view(4, 8)).logits, torch.load("logits.pt"))
assert same, "the reloaded adapter gives other logits"
assert "rowcos.adapter" in sys.modules
"""


@pytest.mark.slow
def test_from_new_to_a_reloaded_adapter_in_a_fresh_environment_in_under_three_minutes(tmp_path):
    venv = LinkedVenv(tmp_path)
    venv.install(str(ROOT))
    command = "import sys\nfrom hfgen.cli import main\nsys.argv = ['hfgen', *{}]\nmain()"
    start = time.monotonic()
    said = venv.run(command.format(["new", "adapter", "rowcos", "--out", "rowcos"])).stdout
    assert "hfgen check rowcos" in said
    venv.install(str(tmp_path / "rowcos"))
    assert re.search("^rowcos +adapters +rowcos ", venv.run(command.format(["ls"])).stdout, re.M)
    venv.run(TRAIN)
    venv.run(RELOAD)
    reloaded = time.monotonic() - start
    out = venv.run(command.format(["check", "rowcos"])).stdout
    checked = time.monotonic() - start
    print(f"reloaded after {reloaded:.0f} s, checked after {checked:.0f} s")
    assert re.search(r"rowcos \(adapters, rowcos 0.1.0\): passed: 3\d checks", out)
    assert checked < 180, f"{reloaded:.0f} s to a reloaded adapter, {checked:.0f} s with hfgen check"
