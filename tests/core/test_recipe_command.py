"""hfgen recipe: what it lists and copies, that a wheel brings it along, and that accelerate knows every key it ships."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from hfgen.catalog import CatalogError
from hfgen.cli import recipe
from tests.core.test_cli import hfgen
from tests.fixtures.venvs import LinkedVenv

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SCRIPTS = sorted(path.stem for path in RECIPES.glob("*.py"))
CONFIGS = sorted((RECIPES / "accelerate").glob("*.yaml"))


def test_every_script_is_listed_with_its_yaml_and_a_sentence():
    found = recipe.recipes()
    assert {"sft", "s3ft", "classify", "quantize"} <= set(SCRIPTS) and list(found) == [*SCRIPTS, "accelerate"]
    for name in SCRIPTS:
        assert found[name] == [Path(f"{name}.py"), Path(f"{name}.yaml")]
        sentence = recipe.summary(name, found[name])
        assert sentence in (RECIPES / f"{name}.py").read_text() and sentence.endswith(".") and len(sentence) < 120
    assert {path.stem for path in found["accelerate"]} == {"ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"}


def test_ls_prints_them_all():
    out = hfgen("recipe", "ls").stdout
    for words in (*SCRIPTS, "sft.yaml", "accelerate/ddp.yaml", "Supervised fine-tuning"):
        assert words in out, words


def test_cp_gives_the_files_and_the_command(tmp_path):
    out = tmp_path / "my folder"
    printed = hfgen("recipe", "cp", "sft", str(out)).stdout
    assert sorted(p.name for p in out.iterdir()) == ["sft.py", "sft.yaml"]
    for name in ("sft.py", "sft.yaml"):
        assert (out / name).read_bytes() == (RECIPES / name).read_bytes() and str(out / name) in printed
    assert printed.splitlines()[-1] == f"  accelerate launch '{out}/sft.py' --config '{out}/sft.yaml'"
    recipe.copy("accelerate", out)
    assert sorted(p.name for p in (out / "accelerate").iterdir()) == [p.name for p in CONFIGS]
    assert str(out / "accelerate" / "ddp.yaml") in recipe.command("accelerate", out)


def test_cp_overwrites_only_when_told_to(tmp_path):
    (tmp_path / "sft.yaml").write_text("mine")
    with pytest.raises(CatalogError, match=r"sft\.yaml exists; choose another DIR, or overwrite with --force"):
        recipe.copy("sft", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["sft.yaml"] and (tmp_path / "sft.yaml").read_text() == "mine"
    recipe.copy("sft", tmp_path, force=True)
    assert (tmp_path / "sft.yaml").read_bytes() == (RECIPES / "sft.yaml").read_bytes()


@pytest.mark.parametrize(
    ("name", "words"),
    [("sfft", "did you mean"), ("../pyproject", "there are: best_of_n, classify, "), ("bench", "no recipe 'bench'")],
)
def test_cp_of_an_unknown_name(name, words, tmp_path):
    done = hfgen("recipe", "cp", name, str(tmp_path / "out"), check=False)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_install_without_recipes_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.hfgen, "__file__", str(tmp_path / "site" / "hfgen" / "__init__.py"))
    (tmp_path / "site" / "recipes").mkdir(parents=True)  # somebody else's
    with pytest.raises(CatalogError, match="reinstall hfgen"):
        recipe.source()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_accelerate_knows_every_key_and_each_has_a_comment(path):
    config = load_config_from_file(str(path))  # raises for an unknown key at the top
    assert config.num_processes == 2 and config.num_machines == 1 and not config.use_cpu
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED")
    launch = vars(launch_command_parser().parse_args(["--config_file", str(path), "script.py"]))
    inner = {key for values in yaml.safe_load(path.read_text()).values() if isinstance(values, dict) for key in values}
    assert inner <= set(launch), inner - set(launch)
    for line in path.read_text().splitlines():
        if re.match(r"\s*\w+:", line):
            assert re.search(r"\s# .+", line), f"{line} has no comment"


def test_accelerate_configs_are_what_their_names_say():
    values = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS}
    assert values["fsdp2"]["fsdp_config"]["fsdp_version"] == 2
    assert [values[f"deepspeed_zero{n}"]["deepspeed_config"]["zero_stage"] for n in (2, 3)] == [2, 3]


def build_wheel(folder):
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", str(folder), str(ROOT)], check=True)
    return next(folder.glob("*.whl"))


def test_a_wheel_holds_the_recipes_and_not_the_benches(tmp_path):
    archive = zipfile.ZipFile(build_wheel(tmp_path))
    held = {name.removeprefix("hfgen/recipes/") for name in archive.namelist() if name.startswith("hfgen/recipes/")}
    assert held == {str(file) for files in recipe.recipes().values() for file in files}
    assert not [name for name in archive.namelist() if name.startswith("recipes")]
    assert archive.read("hfgen/recipes/sft.py") == (RECIPES / "sft.py").read_bytes()


@pytest.mark.slow
def test_a_copy_of_an_installed_recipe_runs_outside_the_clone(tmp_path):
    folder = tmp_path / "site-packages"  # dill pickles by value what it does not take for installed by its path
    venv = LinkedVenv(folder)
    venv.install(str(build_wheel(tmp_path)))
    main = "from hfgen.cli import main; import sys; sys.argv = ['hfgen', 'recipe', {!r}, *{!r}]; main()"
    assert "sft.yaml" in venv.run(main.format("ls", [])).stdout
    venv.run(main.format("cp", ["sft", "mine"]))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(venv.python), "mine/sft.py", "--config", "mine/sft.yaml"],
        env=env, cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{venv.site}/hfgen_plugins/adapters/svfit" in done.stdout  # not the clone's
    assert "largest change of the logits 0.0\n" in done.stdout
