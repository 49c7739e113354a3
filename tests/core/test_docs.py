"""What the documents say is true: README's code runs, its table is the ledger's, CATALOG.md is what the cards give."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hfgen_plugins.trainers.s3ft import evidence
from tests.fixtures.venvs import LinkedVenv

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
LEDGER = json.loads((ROOT / "plugins/hfgen_plugins/trainers/s3ft/ledger.json").read_text())


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.S | re.M)


def test_catalog_is_what_the_cards_give():
    done = subprocess.run(
        [sys.executable, "-m", "hfgen", "ls", "--markdown"], capture_output=True, text=True, check=True
    )
    assert (ROOT / "CATALOG.md").read_text() == done.stdout, "run: hfgen ls --markdown > CATALOG.md"


def test_the_two_commands_stand_in_the_readme():
    assert "pip install -c constraints.txt . && hfgen quickstart\n" in blocks("sh")
    assert "pip install -c constraints.txt -e '.[test]' && pytest\n" in blocks("sh")


def test_readme_python_runs(tmp_path):
    """Every block that is not a file of the example distribution, in order, each in a new process."""
    snippets = [b for b in blocks("python") if not b.startswith("# ")]
    assert len(snippets) >= 3
    for snippet in snippets:
        done = subprocess.run(
            [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, env={**os.environ}
        )
        assert done.returncode == 0, snippet + done.stderr[-3000:]


def test_readme_table_is_the_ledgers():
    for arm in LEDGER["arms"]:
        means = {k: v["mean"] for k, v in arm["metrics"].items()}
        row = f"| {arm['label']} | {means['trained']:.2f} | {means['held_out']:.2f} | {means['old_skills']:.2f} | {means['parameters']:,.0f} |"
        assert row in README, row
    verdicts = {v["arm"]: v["verdict"] for v in LEDGER["verdicts"]}
    assert verdicts == {"s3ft_lora": "reproduced", "s3ft_svfit": "partly"}
    assert "**S3FT + LoRA:\nreproduced. S3FT + SVFit: partly**" in README
    assert LEDGER["settings_commit"][:7] in README


def test_readme_speed_and_classify_tables_are_the_results():
    bench = json.loads((ROOT / "recipes/bench/results/adapters.json").read_text())
    names = {("8", "q,v"): "r=8, q and v", ("8", "all linears"): "r=8, all linear layers",
             ("full", "q,v"): "full rank, q and v", ("full", "all linears"): "full rank, all linear layers"}  # fmt: skip
    for setting in bench["settings"]:
        svfit, loldu = setting["methods"]["svfit"], setting["methods"]["loldu"]
        label = names[setting["rank"], setting["targets"]]
        row = (f"| {label} | {svfit['step']['median']:.2f}x | {loldu['step']['median']:.2f}x "
               f"| {max(svfit['memory_ratio'], loldu['memory_ratio']):.2f}x |")  # fmt: skip
        assert row in README, row
    bench = json.loads((ROOT / "recipes/bench/results/selective.json").read_text())
    for setting in bench["settings"]:
        steps = [setting["increlora"]["default"]]
        steps += [setting["arms"][name]["step"]["median"] for name in ("sara", "soma", "intrinsic")]
        label = {"q,v": "q and v", "all linears": "all linear layers"}[setting["targets"]]
        row = " | ".join((f"| {label}", *(f"{step:.2f}x" for step in steps))) + " |"
        assert row in README, row
    arms = json.loads((ROOT / "recipes/bench/results/classify.json").read_text())["arms"]
    for name, arm in arms.items():
        low, high = arm["interval"]
        row = f"| {name} | {arm['adapter_parameters']:,} | {arm['accuracy']:.3f} ({low:.3f} to {high:.3f}) |"
        assert row in README, row


def test_ledger_is_of_the_settings_that_stand_in_the_code():
    import dataclasses

    assert LEDGER["settings"] == json.loads(json.dumps(dataclasses.asdict(evidence.SETTINGS)))
    assert len(LEDGER["seeds"]) >= 5 and not set(LEDGER["seeds"]) & set(evidence.TUNING_SEEDS)
    tuning = json.loads(evidence.TUNING_FILE.read_text())
    assert tuning["chosen"] == evidence.SETTINGS.learning_rates
    tries = {arm: sum(r["arm"] == arm for r in tuning["runs"]) for arm in tuning["chosen"]}
    assert len(set(tries.values())) == 1, tries


@pytest.mark.slow
def test_the_five_minute_method(tmp_path):
    """README's example distribution, as written: installs, shows up, passes the kit, is picked up without an import."""
    for block in [*blocks("toml"), *blocks("python")]:
        if block.startswith("# "):
            path = tmp_path / "dist" / block.splitlines()[0].removeprefix("# ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)
    venv = LinkedVenv(tmp_path)
    venv.install(str(ROOT))
    venv.install(str(tmp_path / "dist"))
    assert "qrfit" in venv.run("from hfgen.cli import main; import sys; sys.argv = ['hfgen', 'ls']; main()").stdout
    venv.run(
        "from hfgen import sandbox\nfrom hfgen.adapters import QRFitConfig\nfrom peft import get_peft_model\n"
        "get_peft_model(sandbox.load_model(), QRFitConfig(r=4, init_weights=False)).save_pretrained('saved')"
    )
    out = venv.run("from peft import PeftConfig\nprint(type(PeftConfig.from_pretrained('saved')).__name__)").stdout
    assert out.strip() == "QRFitConfig"
    kit = venv.run(
        "import pytest, sys; sys.exit(pytest.main(['--pyargs', 'hfgen.testing', '--hfgen-plugin', 'qrfit', '-q']))"
    ).stdout
    assert re.search(r"\n3\d passed", kit), kit[-2000:]
