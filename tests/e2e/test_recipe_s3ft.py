"""recipes/s3ft.py as a user starts it, and its pieces."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig, PeftModel
from trl import ModelConfig, ScriptArguments, TrlParser

from hfgen import sandbox
from hfgen.adapters import SVFitConfig
from hfgen.trainers import S3FTConfig

ROOT = Path(__file__).parents[2]
RECIPE, YAML = ROOT / "recipes" / "s3ft.py", ROOT / "recipes" / "s3ft.yaml"
D = sandbox.tasks.D
USER_FILE = """
from hfgen.sandbox import tasks

def judge(prompt, answer, gold):
    return tasks.D.judge(prompt, answer)

def rewrite(prompt, gold):
    return tasks.oracle_paraphraser(prompt, gold)
"""


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_s3ft", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path):
    (tmp_path / "user.py").write_text(USER_FILE)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in D.rows()))
    return tmp_path


def run(launcher, folder, output, *options, check=True):
    command = [
        *(sys.executable, "-m", *launcher, RECIPE, "--config", YAML, "--model_name_or_path", sandbox.path()),
        *("--dataset_name", folder / "data.jsonl", "--output_dir", folder / output, "--s3ft_max_new_tokens", "24"),
        *("--judge", f"{folder / 'user.py'}:judge", "--paraphraser", f"{folder / 'user.py'}:rewrite", *options),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


ACCELERATE = ("accelerate.commands.launch", "--num_processes", "1", "--cpu")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.slow
def test_launched_stopped_and_resumed(files):
    straight = run(ACCELERATE, files, "straight", "--num_train_epochs", "2")
    assert "'s3ft/frac_self'" in straight.stdout and "saved to" in straight.stdout
    # a stop after the first of two epochs, with the second one's schedule: kill by a step limit of its own is no kill,
    # so the later checkpoint and the final model are taken away
    stopped = files / "stopped"
    run(ACCELERATE, files, "stopped", "--num_train_epochs", "2", "--resume_from_checkpoint", "true")
    checkpoints = sorted(stopped.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert len(checkpoints) == 2
    for path in checkpoints[1].iterdir():
        path.unlink()
    checkpoints[1].rmdir()
    (stopped / "adapter_model.safetensors").unlink()
    resumed = run(ACCELERATE, files, "stopped", "--num_train_epochs", "2", "--resume_from_checkpoint", "true")
    assert f"resuming from {checkpoints[0]}" in resumed.stdout
    final = [(files / name / "adapter_model.safetensors").read_bytes() for name in ("straight", "stopped")]
    assert final[0] == final[1]
    PeftModel.from_pretrained(sandbox.load_model(), stopped)


@pytest.mark.slow
def test_two_processes_with_an_hfgen_adapter(files):
    svfit = ("--use_peft", "false", "--adapter", "svfit", "--adapter_args", '{"r": 4}', "--max_steps", "3")
    run(TORCHRUN, files, "two", *svfit)
    parts = [p.read_text() for p in sorted((files / "two" / "_s3ft_data").glob("part-*.jsonl"))]
    assert len(parts) == 2 and all(parts)
    saved = json.loads((files / "two" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SVFIT" and saved["r"] == 4


@pytest.mark.slow
def test_a_missing_judge_says_what_to_do(files):
    done = run(ACCELERATE, files, "none", "--judge", "nummeric", check=False)
    assert done.returncode != 0 and "did you mean 'numeric'?" in done.stderr


def test_every_yaml_key_is_an_argument_and_is_commented(recipe):
    parser = TrlParser((ScriptArguments, S3FTConfig, ModelConfig, recipe.RecipeArguments))
    known = {action.dest for action in parser._actions}
    keys = []
    for line in YAML.read_text().splitlines():
        found = re.match(r"(?:# )?(\w+): \S.*?(\s#\s.+)?$", line)
        if found and line.strip() and not line.startswith("# S3FT"):
            keys.append(found[1])
            assert found[2], f"{found[1]} has no comment"
    assert len(keys) > 20 and set(keys) <= known
    *_, args, _, _ = parser.parse_args_and_config(["--config", str(YAML), "--use_cpu", "true", "--bf16", "false"])
    assert args.learning_rate == 1e-4 and args.s3ft_max_new_tokens == 512


def test_data_of_every_form(recipe, files):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    dataset = Dataset.from_list(rows)
    dataset.to_csv(files / "d.csv"), dataset.to_parquet(files / "d.parquet"), dataset.to_json(files / "d.json")
    dataset.save_to_disk(files / "disk")
    (files / "folder").mkdir()
    dataset.to_json(files / "folder" / "train.jsonl")
    columns = recipe.RecipeArguments(prompt_column="question", completion_column="answer")
    for name in ("d.csv", "d.parquet", "d.json", "disk", "folder"):
        found = recipe.read_data(ScriptArguments(dataset_name=str(files / name)), columns, "train")
        assert found.to_list() == [{"prompt": r["question"], "completion": r["answer"]} for r in rows], name
    (files / "d.xlsx").touch()
    for options, message in (
        ({}, "dataset_name is missing"),
        ({"dataset_name": str(files / "d.xlsx")}, "give one of .json"),
        ({"dataset_name": str(files / "d.csv"), "dataset_streaming": True}, "dataset_streaming is true"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.read_data(ScriptArguments(**options), columns, "train")
    with pytest.raises(ValueError, match="column 'query' cannot become 'prompt'"):
        recipe.read_data(
            ScriptArguments(dataset_name=str(files / "d.csv")), recipe.RecipeArguments(prompt_column="query"), "x"
        )


def test_functions_of_a_file(recipe, files):
    judge = recipe.from_file(f"{files / 'user.py'}:judge")
    assert judge("D06=", "1+2+3", "") is True and judge("D06=", "1+2+4", "") is False
    assert recipe.from_file(None) is None and recipe.from_file("numeric") is None
    with pytest.raises(ValueError, match="names no file"):
        recipe.from_file("nowhere.py:judge")
    with pytest.raises(ValueError, match="has no function 'juge'"):
        recipe.from_file(f"{files / 'user.py'}:juge")


def test_adapter_arguments(recipe):
    def config(use_peft=False, **options):
        return recipe.adapter_config(recipe.RecipeArguments(**options), ModelConfig(use_peft=use_peft))

    assert config() is None and isinstance(config(use_peft=True), LoraConfig)
    svfit = config(adapter="svfit", adapter_args='{"r": 2}')
    assert isinstance(svfit, SVFitConfig) and svfit.r == 2 and svfit.task_type == "CAUSAL_LM"
    for options, message in (
        ({"adapter_args": "{}"}, "adapter_args is given without adapter"),
        ({"adapter": "svfit", "use_peft": True}, "choose one"),
        ({"adapter": "svfit", "adapter_args": "r=8"}, "give a JSON object"),
        ({"adapter": "svfitt"}, "did you mean 'svfit'"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**options)
