"""recipes/sft.py as a user starts it: what is refused before anything loads, its data, whole runs, two processes."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from safetensors.torch import load_file
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from hfgen import catalog
from tests.fixtures import dists

ROOT = Path(__file__).parents[2]
RECIPE, YAML = ROOT / "recipes" / "sft.py", ROOT / "recipes" / "sft.yaml"
HYPERFIT = {"stop_loss": 0.05, "every": 2, "length": 16, "context": 8, "new_tokens": 16, "window": 8}
ALL = (
    *("--quantizer", "easyquant", "--quantizer_args", '{"bits": 4}', "--callbacks", "hyperfit"),
    *("--callback_args", json.dumps({"hyperfit": HYPERFIT})),
)


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_sft", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def main(recipe, tmp_path, monkeypatch):
    """The recipe's main with these options, in this process."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["sft.py", "--output_dir", str(tmp_path / "out"), *map(str, options)])
        recipe.main()

    return run


class Loaded(Exception):
    pass


@pytest.fixture
def nothing_loads(recipe, monkeypatch):
    """Raises Loaded as soon as a model or data is loaded."""

    def refuse(*args, **kwargs):
        raise Loaded

    for name in ("read_splits", "load_dataset", "load_from_disk", "SFTTrainer"):
        monkeypatch.setattr(recipe, name, refuse)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)


def test_good_names_get_as_far_as_loading(main, nothing_loads):
    """The proof that `nothing_loads` would show a load."""
    with pytest.raises(Loaded):
        main("--adapter", "svfit", "--adapter_args", '{"r": 8}', *ALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--adapter", "svfitt"), "adapter is 'svfitt', which neither hfgen nor peft has; did you mean 'svfit'"),
        (("--adapter", "lorra"), "did you mean 'lora'"),
        (("--adapter", "LoRA"), "did you mean 'lora'"),
        (("--adapter", "zzzzzz"), "give one of .*lora.*svfit"),
        (("--quantizer", "easyquent"), "did you mean 'easyquant'"),
        (("--callbacks", "hyperfitt"), "did you mean 'hyperfit'"),
        (("--callbacks", "hyperfit", "hyper"), "'hyper'.*did you mean 'hyperfit'"),
        (("--callbacks", "hyperfit", "hyperfit"), "callbacks names 'hyperfit' twice"),
        (("--adapter", "easyquant"), "adapter is 'easyquant', which neither"),
        (("--adapter_args", '{"r": 8}'), "adapter_args is given without adapter"),
        (("--quantizer_args", '{"bits": 8}'), "quantizer_args is given without quantizer"),
        (("--callback_args", '{"hyperfit": {}}'), "callback_args has 'hyperfit', which callbacks does not name"),
        (("--adapter", "svfit", "--use_peft", "true"), "--adapter and --use_peft are both given"),
        (("--quantizer", "easyquant", "--load_in_4bit", "true"), "choose one"),
        (("--adapter", "svfit", "--adapter_args", "r=8"), "adapter_args is 'r=8'; give a JSON object"),
        (("--adapter", "svfit", "--adapter_args", "[8]"), "give a JSON object"),
        (("--adapter", "svfit", "--adapter_args", '{"scalin": 8}'), "adapter_args has 'scalin'.*mean 'scaling'"),
        (("--adapter", "lora", "--adapter_args", '{"lora_alfa": 8}'), "LoraConfig does not take; .*'lora_alpha'"),
        (("--adapter", "svfit", "--adapter_args", '{"r": 0}'), r"SVFitConfig\.r is 0; give"),
        (("--quantizer", "easyquant", "--quantizer_args", '{"bit": 4}'), "quantizer_args has 'bit'.*'bits'"),
        (("--quantizer", "easyquant", "--quantizer_args", '{"bits": 7}'), r"EasyQuantConfig\.bits is 7; give"),
        (("--callbacks", "hyperfit", "--callback_args", '{"hyperfit": 3}'), r"callback_args\.hyperfit is 3; give"),
        (
            ("--callbacks", "hyperfit", "--callback_args", '{"hyperfit": {"stop_los": 1}}'),
            r"callback_args\.hyperfit has 'stop_los', which HyperfitCallback does not take; did you mean 'stop_loss'",
        ),
        (
            ("--callbacks", "hyperfit", "--callback_args", '{"hyperfit": {"every": 0}}'),
            r"HyperfitCallback\.every is 0; give",
        ),
        (("--dataset_name", "data.json"), "model_name_or_path is missing"),
        (("--model_name_or_path", "somewhere"), "dataset_name is missing"),
    ],
)
def test_bad_names_and_options_fail_before_anything_loads(main, nothing_loads, options, message):
    with pytest.raises(ValueError, match=message):
        main(*options)


@pytest.mark.parametrize(
    ("option", "kind"), [("--adapter", "adapters"), ("--quantizer", "quantizers"), ("--callbacks", "callbacks")]
)
def test_an_unhealthy_plugin_that_is_named_is_an_error(option, kind, main, nothing_loads, tmp_path, monkeypatch):
    site = tmp_path / "site"
    dists.make(site, f"{kind}-a", "stra", kind, card="raise RuntimeError('card boom')")
    dists.make(site, f"{kind}-b", "strb", kind, impl="raise RuntimeError('impl boom')")
    dists.make(site, f"{kind}-c", "strc", kind, impl="Other = 1")
    for dist in (f"{kind}-d", f"{kind}-e"):
        dists.make(site, dist, "twice", kind)
    dists.make(site, f"{kind}-f", "liar", kind, card=dists.CARD.format(name="liar", kind="judges", module="m"))
    dists.make(site, f"{kind}-g", "blocked", kind)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("HFGEN_BLOCK", "blocked")
    catalog.refresh()
    try:
        for name, message in {
            "stra": f"{kind}-a.*card boom",
            "strb": f"{kind}-b.*impl boom",
            "strc": f"{kind}-c.*no attribute 'Thing'",
            "twice": f"{kind}-[de] 1.0 and {kind}-[de] 1.0 both offer the name",
            "liar": f"{kind}-f.*its card says kind 'judges'",
            "blocked": "blocked.*HFGEN_BLOCK names it",
        }.items():
            with pytest.raises(ValueError, match=f"(?s)'{name}'.*{message}|{message}.*'{name}'"):
                main(option, name)
        with pytest.raises(Loaded):  # the others are as they were
            main("--adapter", "svfit", *ALL)
    finally:
        monkeypatch.undo()
        catalog.refresh()


def test_what_a_constructor_needs(recipe):
    class Needy:
        def __init__(self, size, *, depth=1):
            self.size, self.depth = size, depth

    class Open:
        def __init__(self, **options):
            self.options = options

    assert vars(recipe.construct("x_args", Needy, {"size": 2, "depth": 3})) == {"size": 2, "depth": 3}
    assert recipe.construct("x_args", Open, {"anything": 1}).options == {"anything": 1}
    with pytest.raises(ValueError, match="x_args lacks 'size', which Needy needs"):
        recipe.construct("x_args", Needy, {"depth": 3})
    with pytest.raises(ValueError, match=r"x_args has 'zzz', which Needy does not take; give one of depth, size"):
        recipe.construct("x_args", Needy, {"size": 2, "zzz": 3})


def test_adapters_of_hfgen_and_of_peft(recipe):
    def config(use_peft=False, **options):
        return recipe.adapter_config(recipe.RecipeArguments(**options), ModelConfig(use_peft=use_peft))

    assert config() is None and isinstance(config(use_peft=True), LoraConfig)
    for options in ('{"r": 3}', {"r": 3}):  # the command line, YAML
        svfit = config(adapter="svfit", adapter_args=options)
        assert type(svfit).__name__ == "SVFitConfig" and svfit.r == 3 and svfit.task_type == "CAUSAL_LM"
    lora = config(adapter="lora", adapter_args={"r": 3, "task_type": "SEQ_CLS"})
    assert isinstance(lora, LoraConfig) and lora.r == 3 and lora.task_type == "SEQ_CLS"
    assert type(config(adapter="ia3")).__name__ == "IA3Config"


def test_every_yaml_key_is_an_argument_and_is_commented(recipe):
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, recipe.RecipeArguments))
    known = {action.dest for action in parser._actions}
    keys = []
    for line in YAML.read_text().splitlines():
        found = re.match(r"(?:# )?(\w+): \S.*?(\s#\s.+)?$", line)
        if found:
            keys.append(found[1])
            assert found[2], f"{found[1]} has no comment"
    assert len(keys) > 25 and set(keys) <= known and set(recipe.RecipeArguments.__dataclass_fields__) <= set(keys)
    *_, args, _, own = parser.parse_args_and_config(["--config", str(YAML), "--use_cpu", "true", "--bf16", "false"])
    assert args.learning_rate == 1e-2 and own.adapter == "svfit" and own.adapter_args["r"] == 64


def test_what_stands_in_the_yaml_as_an_example_works(recipe, tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(re.sub(r"(?m)^# (quantizer|callback)", r"\1", YAML.read_text()))
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, recipe.RecipeArguments))
    cpu = ["--use_cpu", "true", "--bf16", "false"]
    *_, model_args, own = parser.parse_args_and_config(["--config", str(path), *cpu])
    assert recipe.quantization_config(own, model_args).bits == 4
    (callback,) = recipe.make_callbacks(own)
    assert type(callback).__name__ == "HyperfitCallback" and callback.stop_loss == 0.05 and callback.length == 16


def read(recipe, tmp_path, name, *, eval_strategy="no", script=None, **options):
    args = SFTConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, eval_strategy=eval_strategy)
    script = ScriptArguments(dataset_name=None if name is None else str(tmp_path / name), **(script or {}))
    return recipe.read_data(script, recipe.RecipeArguments(**options), args)


def test_data_of_every_form(recipe, tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(6)]
    dataset = Dataset.from_list(rows)
    (
        dataset.to_csv(tmp_path / "d.csv"),
        dataset.to_parquet(tmp_path / "d.parquet"),
        dataset.to_json(tmp_path / "d.jsonl"),
    )
    (tmp_path / "d.json").write_text(json.dumps(rows))
    dataset.save_to_disk(tmp_path / "disk")
    DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "disks")
    (tmp_path / "folder").mkdir()
    (
        dataset.to_json(tmp_path / "folder" / "train.jsonl"),
        dataset.select([1]).to_json(tmp_path / "folder" / "test.jsonl"),
    )
    for name, test in {
        **dict.fromkeys(("d.csv", "d.parquet", "d.jsonl", "d.json", "disk")),
        "disks": rows[:1], "folder": rows[1:2],
    }.items():  # fmt: skip
        found = read(recipe, tmp_path, name)
        assert found[0].to_list() == rows and (found[1] and found[1].to_list()) == test, name
    (tmp_path / "d.txt").write_text("one line\nand another\n")
    assert read(recipe, tmp_path, "d.txt")[0].to_list() == [{"text": "one line"}, {"text": "and another"}]
    stream, _ = read(recipe, tmp_path, "d.csv", script={"dataset_streaming": True})
    assert list(stream) == rows
    renamed, _ = read(recipe, tmp_path, "d.csv", script={"dataset_train_split": "rows"}, completion_column="completion")
    assert renamed.to_list() == rows


def test_rows_for_evaluation(recipe, tmp_path):
    Dataset.from_list([{"question": str(i), "answer": "x"} for i in range(10)]).to_json(tmp_path / "d.json")
    names = {"prompt_column": "question", "completion_column": "answer"}
    train, test = read(recipe, tmp_path, "d.json", eval_strategy="epoch", eval_rows=3, **names)
    assert len(train) == 7 and len(test) == 3 and not set(train["prompt"]) & set(test["prompt"])
    assert read(recipe, tmp_path, "d.json", eval_rows=3, **names)[1]["prompt"] == test["prompt"]
    train, test = read(recipe, tmp_path, None)  # the sandbox's own
    assert train.column_names == ["prompt", "completion"] and len(train) == 18 and len(test) == 10
    assert not set(train["prompt"]) & set(test["prompt"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("d.xlsx", {}, "give one of .json, "),
        ("d.json", {}, "the data has columns answer, question; name prompts and answers with --prompt_column"),
        ("d.json", {"prompt_column": "query"}, "column 'query' cannot become 'prompt'"),
        ("d.json", {"script": {"dataset_train_split": "train"}, "eval_strategy": "epoch"}, "give --eval_rows"),
        (None, {"eval_rows": 2}, "eval_rows is 2, but the data has a split 'test'"),
        ("d.json", {"eval_rows": 2, "script": {"dataset_streaming": True}}, "or is a stream"),
        ("disk", {"script": {"dataset_train_split": "trian"}}, "dataset_train_split is 'trian'; the data has train"),
    ],
)
def test_bad_data(recipe, tmp_path, name, options, message):
    dataset = Dataset.from_list([{"question": "a", "answer": "b"}])
    dataset.to_json(tmp_path / "d.json"), DatasetDict(train=dataset).save_to_disk(tmp_path / "disk")
    (tmp_path / "d.xlsx").touch()
    with pytest.raises(ValueError, match=message):
        read(recipe, tmp_path, name, **options)


def test_a_short_run_with_everything(main, tmp_path, capsys):
    """In this process, without the reload check: the callback is attached and looks, results are written."""
    main(
        "--config",
        YAML,
        "--max_steps",
        4,
        "--check_reload",
        "false",
        "--save_steps",
        2,
        "--save_strategy",
        "steps",
        *ALL,
    )
    out, printed = tmp_path / "out", capsys.readouterr().out
    assert all(f"{kind}: {name} (hfgen" in printed for kind, name in
               (("adapters", "svfit"), ("quantizers", "easyquant"), ("callbacks", "hyperfit")))  # fmt: skip
    results = json.loads((out / "train_results.json").read_text())
    assert f"trained: an adapter, {results['trained_parameters']:,} parameters" in printed
    assert results["train_loss"] > 0 and json.loads((out / "eval_results.json").read_text())["eval_loss"] > 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "SVFIT" and config["r"] == 64
    state = json.loads((out / "checkpoint-4" / "hfgen_hyperfit.json").read_text())
    assert [look["step"] for look in state["history"]] == [0, 2, 4]  # rows of the attached trainer's evaluation split
    log = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert any("hfgen/hyperfit/ttr" in row for row in log)


# --- as a process -------------------------------------------------------------------------------------------------
def run(*options, launcher=(), check=True):
    command = [sys.executable, *launcher, RECIPE, "--config", YAML, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_everything_then_resumed_bit_equal(tmp_path):
    straight = run("--output_dir", tmp_path / "a", "--learning_rate", "0.03", "--save_total_limit", 9, *ALL)
    assert "reloaded in a new process: largest change of the logits 0.0\n" in straight.stdout
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")  # killed after the first epoch
    resume = ("--resume_from_checkpoint", "true", "--check_reload", "false")
    resumed = run("--output_dir", tmp_path / "b", "--learning_rate", "0.03", "--save_total_limit", 9, *resume, *ALL)
    assert f"resuming from {tmp_path / 'b' / 'checkpoint-3'}" in resumed.stdout
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert adapters[0] == adapters[1]
    looks = [json.loads((tmp_path / name / "checkpoint-9" / "hfgen_hyperfit.json").read_text()) for name in "ab"]
    assert looks[0] == looks[1] and len(looks[0]["history"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("--adapter", "lora"), ("--adapter", "loldu"), ()], ids=["peft's lora", "loldu", "all weights"]
)
def test_the_reload_is_exact(options, main, tmp_path, capfd):
    main("--max_steps", 2, "--report_to", "none", "--logging_steps", 1, "--learning_rate", "0.001", *options)
    assert "reloaded in a new process: largest change of the logits 0.0\n" in capfd.readouterr().out
    assert (tmp_path / "out" / "adapter_config.json").is_file() == bool(options)


def adapter_of(folder):
    """Trained numbers and where they started, each as one vector."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = sorted(name for name in tensors if name.endswith("svfit_sigma"))
    return torch.cat([tensors[n] for n in names]), torch.cat([tensors[f"{n}0"] for n in names])


@pytest.mark.slow
def test_two_processes_under_accelerate_launch(tmp_path):
    """The same rows in one process and over two: same looks, same adapter, and one report."""
    ddp = ("-m", "accelerate.commands.launch", "--config_file", ROOT / "recipes" / "accelerate" / "ddp.yaml")
    for name, rows, launcher in (("one", 6, ()), ("two", 3, ddp)):  # 18 rows: 3 whole steps
        done = run("--output_dir", tmp_path / name, "--per_device_train_batch_size", rows, *ALL, launcher=launcher)
        assert done.stdout.count("saved to") == 1
        assert done.stdout.count("largest change of the logits 0.0\n") == 1
    last = [tmp_path / name / "checkpoint-9" for name in ("one", "two")]
    assert len(list(last[1].glob("rng_state_*.pth"))) == 2  # two ranks
    looks = [json.loads((folder / "hfgen_hyperfit.json").read_text())["history"] for folder in last]
    for one, two in zip(*looks, strict=True):
        assert one["step"] == two["step"] and one["val_loss"] == pytest.approx(two["val_loss"], abs=1e-4)
    (one, start), (two, same) = (adapter_of(tmp_path / name) for name in ("one", "two"))
    assert torch.equal(start, same)
    assert (one - two).norm() <= 1e-3 * (one - start).norm() > 0
