"""recipes/reward_ensemble.py and recipes/grpo_ensemble.py as a user starts them, and their pieces."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

from hfgen import sandbox
from hfgen.trainers import EnsembleRewardConfig, EnsembleRewardModel

RECIPES = Path(__file__).parents[2] / "recipes"
ACCELERATE = ("accelerate.commands.launch", "--num_processes", "1", "--cpu")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def load(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(launcher, name, output, *options, check=True):
    command = [
        *(sys.executable, "-m", *launcher, RECIPES / f"{name}.py", "--config", RECIPES / f"{name}.yaml"),
        *("--model_name_or_path", "sandbox", "--dataset_name", "sandbox", "--output_dir", output, *options),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ACCELERATE, TORCHRUN], ids=["one", "two"])
def test_an_ensemble_and_a_policy(tmp_path, launcher):
    rm = tmp_path / "rm"
    train = ("--learning_rate", "3e-3", "--num_train_epochs", "1", "--num_members", "3", "--backend", "lora")
    run(launcher, "reward_ensemble", rm, *train, "--gradient_accumulation_steps", "1")
    assert "## Reward ensemble" in (rm / "README.md").read_text()
    config = EnsembleRewardModel.from_pretrained(rm).config
    assert config.aggregation == "uwo" and len(config.calibration_mean) == 3
    options = ("--reward_ensemble", rm, "--max_steps", "2", "--max_completion_length", "8", "--logging_steps", "1")
    done = run(launcher, "grpo_ensemble", tmp_path / "policy", *options)
    assert "'ensemble_reward/std'" in done.stdout and (tmp_path / "policy" / "model.safetensors").is_file()


@pytest.mark.parametrize(("name", "config"), [("reward_ensemble", EnsembleRewardConfig), ("grpo_ensemble", GRPOConfig)])
def test_every_yaml_key_is_an_argument_and_is_commented(name, config):
    parser = TrlParser((ScriptArguments, config, ModelConfig, load(name).RecipeArguments))
    known = {action.dest for action in parser._actions}
    keys, path = [], RECIPES / f"{name}.yaml"
    for line in path.read_text().splitlines()[4:]:
        found = re.match(r"(?:# )?(\w+): \S.*?(\s#\s.+)?$", line)
        if found:
            keys.append(found[1])
            assert found[2], f"{found[1]} has no comment"
    assert len(keys) > 18 and set(keys) <= known
    _script, args, *_ = parser.parse_args_and_config(["--config", str(path), "--use_cpu", "true", "--bf16", "false"])
    assert args.output_dir == path.stem.replace("_", "-")


def test_pairs_of_the_sandbox_are_right():
    rows = load("reward_ensemble").sandbox_pairs(50)
    judge = sandbox.tasks.D.judge
    assert all(judge(r["prompt"], r["chosen"]) and not judge(r["prompt"], r["rejected"]) for r in rows)


def test_data_of_every_form(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3
    dataset, recipes = Dataset.from_list(rows), [load("reward_ensemble"), load("grpo_ensemble")]
    dataset.to_csv(tmp_path / "d.csv"), dataset.save_to_disk(tmp_path / "disk")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "d.xlsx").touch()
    for name in ("d.csv", "d.jsonl", "disk"):
        script = ScriptArguments(dataset_name=str(tmp_path / name))
        assert recipes[0].read_data(script, "train").to_list() == recipes[1].read_data(script).to_list() == rows
    for options, message in (
        ({}, "dataset_name is missing"),
        ({"dataset_name": str(tmp_path / "d.xlsx")}, "give one of"),
    ):
        for read in (lambda s: recipes[0].read_data(s, "train"), recipes[1].read_data):
            with pytest.raises(ValueError, match=message):
                read(ScriptArguments(**options))
    train, calibration = recipes[0].split_data(dataset, 0.4, 0)
    assert (len(train), len(calibration)) == (2, 1) and recipes[0].split_data(dataset, 0, 0) == (dataset, None)
    with pytest.raises(ValueError, match="calibration_share is 1"):
        recipes[0].split_data(dataset, 1, 0)
