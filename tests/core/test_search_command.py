"""`hfgen search`: bits, depth and sparsity from the command line; interrupted runs; refusals in one line."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hfgen import sandbox
from hfgen.cli import quantize as quantize_command
from hfgen.cli import search as command
from hfgen.kit.levels import Levels
from hfgen.quantizers import EasyQuantConfig
from hfgen.sandbox import quality

MODEL = str(sandbox.path())
FAST = [
    "--args",
    '{"offspring": 3, "survivors": [2, 1], "tokens": [40, 120], "initial_tokens": 40}',
    "--generations",
    "2",
]
BITS = ["--average-bits", "3", "--quantizer", "easyquant", "--levels", "2,3,4"]
IDS = torch.tensor([[1, 20, 21, 22, 23]])


@pytest.fixture(scope="module")
def calib(tmp_path_factory):
    file = tmp_path_factory.mktemp("calib") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in quality.rows(0, 40)))
    return str(file)


def app():
    made = typer.Typer()
    made.command("search")(command.search)
    made.command("quantize")(quantize_command.quantize)
    return made


def call(*arguments):
    return CliRunner().invoke(app(), [str(a) for a in arguments])


def test_bits_are_searched_and_the_next_command_takes_them(calib, tmp_path):
    out, packed = tmp_path / "bits.json", tmp_path / "found"
    again = ["search", "evopress", MODEL, "--calib", calib, *BITS, *FAST]
    done = call(*again, "--out", out, "--save", packed, "--held-out", calib)
    assert done.exit_code == 0, done.output
    plan, report = (json.loads(f.read_text()) for f in (out, tmp_path / "bits.report.json"))
    assert len(plan) == 14 and set(plan.values()) <= {2, 3, 4} and report["plan"] == plan
    sizes = {n: sandbox.load_model().get_submodule(n).weight.numel() for n in plan}
    assert sum(sizes[n] * b for n, b in plan.items()) == 3 * sum(sizes.values())
    assert len(report["history"]) == 2 and report["tokens"] == 2 * (3 * 40 + 3 * 120)
    assert report["measured_on"] == "held_out" and report["uniform"] is True
    assert set(report["fitness"]) == {"start", "found"} and report["seconds"] > 0
    assert not (tmp_path / "bits.json.partial").exists()
    assert "KL, nats per token" in done.output and "on held-out rows" in done.output

    done = call(*again, "--out", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == plan
    line = next(line for line in done.output.splitlines() if line.startswith("next: hfgen quantize"))
    shell = f"printf '%s\\0' {line.removeprefix('next: hfgen ')}"  # the words as a shell gives them to the command
    words = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    words[words.index("METHOD")], words[words.index("DIR")] = "easyquant", str(tmp_path / "quantised")
    done = call(*words)
    assert done.exit_code == 0, done.output
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("found", "quantised"))
    assert {n: b.get_submodule(n).config.bits for n in plan} == plan
    assert torch.equal(a(IDS).logits, b(IDS).logits)


def test_depth_and_sparsity_write_plain_models(calib, tmp_path):
    for flags, name in ((["--drop", "1"], "depth"), (["--sparsity", "0.5"], "sparsity")):
        out = tmp_path / f"{name}.json"
        done = call(
            "search", "evopress", MODEL, "--calib", calib, *flags, *FAST, "--out", out, "--save", tmp_path / name
        )
        assert done.exit_code == 0, done.output
    plan = json.loads((tmp_path / "depth.json").read_text())
    assert sorted(plan.values()) == [False, True]
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "depth")
    assert small.config.num_hidden_layers == 1 and not hasattr(small, "hf_quantizer")
    shares = json.loads((tmp_path / "sparsity.json").read_text())
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "sparsity")
    found = {n: float((sparse.get_submodule(n).weight == 0).float().mean()) for n in shares}
    assert found == pytest.approx(shares) and len(shares) == 14


def test_an_interrupted_run_goes_on_and_ends_the_same(calib, tmp_path, monkeypatch):
    arguments = ["search", "evopress", MODEL, "--calib", calib, *BITS, *FAST[:2], "--generations", "4"]
    assert call(*arguments, "--out", tmp_path / "whole.json").exit_code == 0
    original, packed = Levels.assign, []

    def stopped(self, model, plan):
        packed.append(1)
        if len(packed) == 15:
            raise KeyboardInterrupt
        return original(self, model, plan)

    monkeypatch.setattr(Levels, "assign", stopped)
    done = call(*arguments, "--out", tmp_path / "cut.json")
    assert done.exit_code == 130 and "interrupted; the same command goes on from" in done.stderr
    state = json.loads((tmp_path / "cut.json.partial" / "state.json").read_text())
    assert 0 < state["run"]["generation"] < 4 and not (tmp_path / "cut.json").exists()
    monkeypatch.setattr(Levels, "assign", original)
    other = ["--quantizer-args", '{"n_sigma": 2.0}']
    done = call(*arguments, *other, "--out", tmp_path / "cut.json")
    assert done.exit_code == 2 and "holds levels with another config" in done.stderr
    assert call(*arguments, "--out", tmp_path / "cut.json").exit_code == 0
    reports = [json.loads((tmp_path / f"{n}.report.json").read_text()) for n in ("whole", "cut")]
    for key in ("plan", "history", "fitness", "tokens"):
        assert reports[0][key] == reports[1][key]


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (r"no budget given; give one of --average-bits, --drop, --sparsity", []),
        (r"--average-bits and --drop given", [*BITS, "--drop", "1"]),
        (r"--quantizer is missing", BITS[:2]),
        (r"--quantizer is 'easyquant', which only --average-bits reads", ["--drop", "1", *BITS[2:4]]),
        (r"--levels is '2,3', which only --average-bits reads", ["--drop", "1", "--levels", "2,3"]),
        (r"--quantizer-args is '{}', which only --average-bits", ["--sparsity", "0.5", "--quantizer-args", "{}"]),
        (r"--levels is '2-4'; give whole numbers", [*BITS[:4], "--levels", "2-4"]),
        (r"average_bits is 7.0; the levels allow 2 to 4", [*BITS[2:], "--average-bits", "7"]),
        (r"--quantizer-args sets bits to 3; give it as --levels", [*BITS, "--quantizer-args", '{"bits": 3}']),
        (r"EasyQuantConfig.bits is 7", [*BITS[:4], "--levels", "2,7"]),
        (r"hold \d+ tokens .* a minibatch takes 131072; give more rows", BITS),
        (r"preset is 'slow'", [*BITS, "--preset", "slow"]),
        (r"unexpected keyword argument 'offsprings'; did you mean 'offspring'", [*BITS, "--args", '{"offsprings": 1}']),
        (r"drop is 2 of 2; one at least has to stay", ["--drop", "2", *FAST]),
        (r"no installed method is called 'easyquan'.*did you mean 'easyquant'", [*BITS[:3], "easyquan"]),
    ],
)
def test_refusals(words, flags, calib, tmp_path):
    done = call("search", "evopress", MODEL, "--calib", calib, "--out", tmp_path / "x.json", *flags)
    assert done.exit_code == 2 and re.search(words, done.stderr), done.output
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "x.json").exists()


def test_wrong_files_and_names(calib, tmp_path):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"words": "a"}\n')
    (tmp_path / "there.json").write_text("{}")
    good = {"name": "evopress", "calib": calib, "out": tmp_path / "x.json"}
    for words, change in (
        ("did you mean 'evopress'", {"name": "evopres"}),
        (r"has the columns words; wanted: input_ids", {"calib": wrong}),
        (r"out is .*; give the name of a .json file that does not exist yet", {"out": tmp_path / "there.json"}),
        (r"out is .*; give the name of a .json file", {"out": tmp_path / "folder"}),
    ):
        given = good | change
        done = call("search", given["name"], MODEL, "--calib", given["calib"], "--out", given["out"], *BITS, *FAST)
        assert done.exit_code == 2 and re.search(words, done.stderr), done.output


def test_as_a_command(calib, tmp_path):
    """In a process of its own, as installed, and `from_pretrained` takes the map it prints."""
    arguments = [MODEL, "--calib", calib, *BITS, *FAST, "--out", str(tmp_path / "bits.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hfgen", "search", "evopress", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "bits.json").read_text())
    model = sandbox.load_model(quantization_config=EasyQuantConfig(bits_map=plan))
    assert {n: model.get_submodule(n).config.bits for n in plan} == plan
