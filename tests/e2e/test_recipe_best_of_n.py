"""recipes/best_of_n.py as a user starts it, and its pieces."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import TrlParser

from hfgen import sandbox
from hfgen.decoding import best_of_n_curves
from hfgen.trainers import EnsembleRewardModel
from tests.core.test_cli import hfgen

ROOT = Path(__file__).parents[2]
RECIPE, YAML = ROOT / "recipes" / "best_of_n.py", ROOT / "recipes" / "best_of_n.yaml"
FILES = ["best.jsonl", "curves.json", "curves.png", "samples.jsonl"]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_best_of_n", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def arguments(recipe, **changes):
    return recipe.RecipeArguments(
        **{"output_dir": "x", "num_generations": 4, "max_new_tokens": 12, "temperature": 1.5} | changes
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(launcher, output, *options):
    command = [sys.executable, "-m", *launcher, RECIPE, "--config", YAML, "--output_dir", output, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_as_it_stands_it_shows_over_optimisation(tmp_path):
    done = run(("accelerate.commands.launch", "--num_processes", "1", "--cpu"), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES and "written to" in done.stdout
    samples, best = lines(tmp_path / "samples.jsonl"), lines(tmp_path / "best.jsonl")
    assert len(samples) == 28 * 128 and [row["prompt_id"] for row in best] == list(range(28))
    for row in samples:
        right = sandbox.tasks.D.judge(row["prompt"], row["answer"])
        assert row["gold"] == right and row["proxy"] == pytest.approx(right + 0.2 * len(row["answer"]))
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert curves["n"][-1] == 128 and curves["advice"]["turns_down"] is True and 1 < curves["advice"]["n"] < 128
    hfgen("bon", str(tmp_path / "samples.jsonl"), "--json", str(tmp_path / "again.json"))
    assert json.loads((tmp_path / "again.json").read_text()) == curves


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    options = ("--num_generations", 16, "--batch_size", 32)
    run(("torch.distributed.run", "--standalone", "--nproc_per_node", "2"), tmp_path / "two", *options)
    run(("accelerate.commands.launch", "--num_processes", "1", "--cpu"), tmp_path / "one", *options)
    for name in FILES[:2] + FILES[3:]:
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()


def test_every_yaml_key_is_an_argument_and_is_commented(recipe):
    parser = TrlParser((recipe.RecipeArguments,))
    assert set(yaml.safe_load(YAML.read_text())) == {a.dest for a in parser._actions} - {"help"}
    for line in YAML.read_text().splitlines():
        if re.match(r"\w+:", line):
            assert re.search(r"\s# .+", line), f"{line} has no comment"
    (args,) = parser.parse_args_and_config(["--config", str(YAML)])
    assert args.num_generations == 128 and args.gold_reward == "sandbox"


def test_reward_model_and_judges_on_own_data(recipe, tmp_path):
    rows = [{"q": p, "a": sandbox.tasks.E.gold(p)} for p in sandbox.tasks.E.prompts[:5]]
    Dataset.from_list(rows).to_json(tmp_path / "d.jsonl")
    tokenizer = sandbox.load_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    args = arguments(
        recipe, dataset_name=str(tmp_path / "d.jsonl"), prompt_column="q", gold_column="a",
        reward=str(tmp_path / "rm"), gold_reward="exact",
    )  # fmt: skip
    found = recipe.sample(args, recipe.read_data(args), PartialState())
    assert len(found) == 20 and len({row["proxy"] for row in found}) > 1
    for row in found:
        assert row["gold"] == float(row["answer"] == rows[row["prompt_id"]]["a"])
    (tmp_path / "r.py").write_text(
        "def f(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]"
    )
    args = arguments(recipe, reward=f"{tmp_path / 'r.py'}:f")
    found = recipe.sample(args, recipe.read_data(args), PartialState())
    assert all(row["proxy"] == len(row["answer"]) and "gold" not in row for row in found)


def test_a_folder_of_an_ensemble(recipe, tmp_path):
    """The members' scores reach the samples, and without gold their disagreement is the signal."""
    torch.manual_seed(0)
    model = EnsembleRewardModel.from_base(sandbox.load_model(), num_members=3, backend="heads")
    model.config.pad_token_id = sandbox.load_tokenizer().pad_token_id
    model.calibrate(torch.randn(20, 3))
    model.save_pretrained(tmp_path / "rm")
    sandbox.load_tokenizer().save_pretrained(tmp_path / "rm")
    args = arguments(recipe, reward=str(tmp_path / "rm"))
    found = recipe.sample(args, recipe.read_data(args), PartialState())
    assert len(found) == 28 * 4 and {len(row["members"]) for row in found} == {3}
    curves = best_of_n_curves(recipe.by_prompt(found, "proxy"), members=recipe.by_prompt(found, "members"))
    assert curves.advice.signal == "stand_in" and list(curves.curves) == ["proxy", "stand_in", "disagreement"]


def test_bad_arguments(recipe, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}\n')
    (tmp_path / "d.xlsx").touch()
    for change, words in (
        ({"dataset_name": str(tmp_path / "d.jsonl")}, "row 2 of the data repeats the prompt of row 0"),
        ({"dataset_name": str(tmp_path / "d.jsonl"), "prompt_column": "q"}, "prompt_column is 'q'"),
        ({"dataset_name": str(tmp_path / "d.xlsx")}, "give one of .json"),
    ):
        with pytest.raises(ValueError, match=words):
            recipe.read_data(arguments(recipe, **change))
    for spec, words in (
        ("nowhere", "reward is 'nowhere'; give a model's folder"),
        ("no.py:f", "no.py is no file"),
        (f"{RECIPE}:f", "has no function 'f'"),
    ):
        with pytest.raises(ValueError, match=words):
            recipe.make_reward(spec, "reward", arguments(recipe), torch.device("cpu"))
    judge = recipe.make_reward("exact", "reward", arguments(recipe), torch.device("cpu"))
    with pytest.raises(ValueError, match="gold_column is 'gold', which the data lacks"):
        judge(["a"], ["b"])
