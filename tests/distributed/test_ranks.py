"""One process, DDP and FSDP2 do the same: one torchrun of two gloo processes runs all tasks of `worker.py`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from hfgen import sandbox
from hfgen.quantizers import EasyQuantConfig
from tests.distributed import worker
from tests.distributed.compare import apart, change, facts, once, tensors

QUANTISED = ("easyquant_lora", "easyquant_svfit")
METHODS = ("svfit", "loldu", "soma", "intrinsic", "intrinsic_said", "s3ft", "hyperfit", *QUANTISED)
WHOLE = ("increlora", "sara")  # refuse FSDP: shapes and masks change while they train
TRAINED = [(mode, m) for mode in ("ddp", "fsdp2") for m in METHODS] + [("fsdp2", "loldu_scale")]
TRAINED += [("ddp", m) for m in WHOLE]
RUNS = pytest.mark.parametrize(("mode", "method"), TRAINED)
# hyperfit trains all weights, and the fused head of trl's SFTTrainer sums the head's gradient in float32 whatever the
# model's dtype: with it two cuts of a float64 batch agree to 1.4e-7 there. So it is taken with Trainer here.
SUMMED = ("svfit", "loldu", "soma", "intrinsic", "s3ft", "hyperfit_trainer")
CUTS = {"one": ("8x1", "4x2", "2x4"), "ddp": ("4x1", "2x2"), "fsdp2": ("4x1", "2x2")}


def launched(folder, tasks):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker.__file__]
    done = subprocess.run([*launch, str(folder), *tasks], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    tasks = [f"{mode}/train/{m}" for mode, m in TRAINED]
    tasks += [f"ddp/broadcast/{m}" for m in ("svfit", "intrinsic", "easyquant_lora", "easyquant_svfit")]
    tasks += ["ddp/indices/svfit", "fsdp2/indices/svfit"]
    tasks += ["ddp/stop/hyperfit", "fsdp2/stop/hyperfit", "fsdp2/ram_efficient/svfit"]
    tasks += [f"fsdp2/half/{m}" for m in ("svfit", "svfit_decay", "loldu_scale", "intrinsic")]
    return once(tmp_path_factory, "ranks", lambda folder: launched(folder, tasks))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The same task in this process, once: (facts, tensors)."""
    folder, done = tmp_path_factory.mktemp("single"), {}

    def get(task):
        if task not in done:
            done[task] = worker.run(f"one/{task}", folder)
        found, made = done[task]
        assert "error" not in found, found["trace"]
        return found, {n: t.double() for n, t in made.items()}

    return get


@RUNS
def test_the_same_training(ranks, single, mode, method):
    """Eight AdamW steps at the recipe's rate: losses to 1e-4, the change to 1e-3 of its norm, ranks bit-equal."""
    expected, weights = single(f"train/{method}")
    found = facts(ranks, f"{mode}/train/{method}")
    assert len(found["losses"]) == 8 and found["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    assert apart(change(tensors(ranks, f"{mode}/train/{method}")), change(weights)) <= 1e-3
    assert found["equal"] == facts(ranks, f"{mode}/train/{method}", rank=1)["equal"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_hyperfit_measures_the_same(ranks, single, mode):
    expected, _ = single("train/hyperfit")
    found = [facts(ranks, f"{mode}/train/hyperfit", rank)["history"] for rank in (0, 1)]
    assert found[0] == found[1] and [row["step"] for row in found[0]] == [0, 2, 4, 6, 8]
    for row, wanted in zip(found[0], expected["history"], strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_hyperfit_stops_everywhere_at_once(ranks, single, mode):
    expected, _ = single("stop/hyperfit")
    assert 1 <= expected["step"] < 20 and expected["fired"] == 1
    for rank in (0, 1):
        found = facts(ranks, f"{mode}/stop/hyperfit", rank)
        assert (found["step"], found["fired"]) == (expected["step"], 1)
        assert found["history"][-1]["step"] == expected["step"]


@RUNS
def test_what_was_saved_reloads_in_one_process(ranks, mode, method):
    """With the weights that were trained, bit for bit; an hfgen adapter also passes its check of the base."""
    folder = ranks / f"{mode}.train.{method}"
    if method == "hyperfit":
        model = LlamaForCausalLM.from_pretrained(folder / "saved")
    else:
        quantization = EasyQuantConfig(bits=4) if method in QUANTISED else None
        model = PeftModel.from_pretrained(sandbox.load_model(quantization_config=quantization), folder / "saved")
    loaded, end = dict(model.named_parameters()), tensors(ranks, f"{mode}/train/{method}", "end.")
    assert end and all(torch.equal(loaded[n].double(), t) for n, t in end.items())
    with torch.no_grad():
        logits = model.train()(input_ids=torch.arange(4, 24).view(2, 10)).logits
    assert torch.allclose(logits.double(), tensors(ranks, f"{mode}/train/{method}")["logits"], atol=1e-5)


@pytest.mark.parametrize("method", ["svfit", "intrinsic", "easyquant_lora", "easyquant_svfit"])
def test_frozen_tensors_are_not_sent_at_every_forward(ranks, method):
    """What is left to DDP's broadcast is the model's own: two vectors of rotary frequencies."""
    assert facts(ranks, f"ddp/broadcast/{method}")["bytes"] < 1000


@pytest.mark.parametrize("method", ["svfit", "loldu"])
def test_a_sharded_weight_is_not_merged_into(ranks, method):
    found = facts(ranks, f"fsdp2/train/{method}")
    for words in (found["merge"], found["add"]):
        assert "q_proj is sharded over processes, so no adapter can be added to it or merged into it" in words


def test_ram_efficient_loading_is_refused_in_words(ranks):
    """accelerate 1.15 cannot load a model with persistent buffers so: 'Tensor' object has no attribute 'device_mesh'."""
    for rank in (0, 1):
        said = facts(ranks, "fsdp2/ram_efficient/svfit", rank)["said"]
        assert said.startswith("fsdp_cpu_ram_efficient_loading is true") and "set it to false" in said


def test_bfloat16(ranks):
    """FSDP2 gathers parameters in bfloat16, which would round z by more than a step changes it: refused, with the way out.

    With decay_to_init the parameter is z - z0, and the losses are those of a float32 run to bfloat16's precision.
    """
    for half, whole in (("svfit_decay", "svfit"), ("intrinsic", "intrinsic")):
        found, expected = facts(ranks, f"fsdp2/half/{half}"), facts(ranks, f"fsdp2/train/{whole}")
        assert found["said"] == "nothing" and found["losses"] == pytest.approx(expected["losses"], abs=0.03)
    for method in ("svfit", "loldu_scale"):
        words = facts(ranks, f"fsdp2/half/{method}")["said"]
        assert "arrives in torch.bfloat16 and its reference in torch.float32" in words and "decay_to_init=True" in words


def test_a_scale_saved_as_a_scalar_is_read(ranks, tmp_path):
    """FSDP2 shards no scalars, so loldu's scale has shape (1); files from before have ()."""
    saved = shutil.copytree(ranks / "fsdp2.train.loldu_scale" / "saved", tmp_path / "old")
    file = saved / "adapter_model.safetensors"
    old = {n: t.reshape(()) if "loldu_scale" in n else t for n, t in load_file(file).items()}
    assert any(t.ndim == 0 for t in old.values())
    save_file(old, file)
    one, other = (
        PeftModel.from_pretrained(sandbox.load_model(), f) for f in (saved, ranks / "fsdp2.train.loldu_scale" / "saved")
    )
    pairs = list(zip(one.named_parameters(), other.named_parameters(), strict=True))
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_every_index_arrives_on_some_rank(ranks, mode):
    seen = [facts(ranks, f"{mode}/indices/svfit", rank) for rank in (0, 1)]
    found = sorted(i for rank in seen for batch in rank["seen"] for i in batch)
    assert found == list(range(seen[0]["rows"]))
    assert seen[0]["seen"] != seen[1]["seen"]


def part(found, prefix):
    return {n: t for n, t in found.items() if n.startswith(prefix)}


def same_step(found, expected, dtype):
    limit = {"float32": 1e-5, "float64": 1e-10}[dtype]
    assert apart(part(found, "grad."), part(expected, "grad.")) <= limit
    assert apart(part(found, "step."), part(expected, "step.")) <= 1e-5


SOME = ("svfit", "s3ft")  # the float64 bars are the tighter ones
CASES = [(d, m) for d in ("float32", "float64") for m in SUMMED]


@pytest.mark.parametrize(
    ("dtype", "method"),
    [pytest.param(d, m, marks=() if (d, m) in [("float64", n) for n in SOME] else pytest.mark.slow) for d, m in CASES],
)
def test_accumulation_in_one_process(single, method, dtype):
    """The same eight rows as 8x1, 4x2 and 2x4 give one gradient and one SGD step."""
    _, expected = single(f"accumulate/{method}/{dtype}/8x1")
    for cut in CUTS["one"][1:]:
        same_step(single(f"accumulate/{method}/{dtype}/{cut}")[1], expected, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_accumulation_over_ranks(single, tmp_path, dtype):
    """And over two processes; the kit's norm of a sharded gradient is the one-process norm."""
    tasks = [f"{mode}/accumulate/{m}/{dtype}/{cut}" for mode in ("ddp", "fsdp2") for m in SUMMED for cut in CUTS[mode]]
    launched(tmp_path, tasks)
    for task in tasks:
        expected, whole = single(f"accumulate/{task.split('/')[2]}/{dtype}/8x1")
        same_step(tensors(tmp_path, task), whole, dtype)
        for rank in (0, 1):
            assert facts(tmp_path, task, rank)["norm"] == pytest.approx(expected["norm"], rel=1e-5), task


def test_the_shim_is_in_the_tests_only():
    root = Path(worker.__file__).parents[2]
    code = [p for top in ("hfgen", "plugins", "recipes") for p in (root / top).rglob("*.py")]
    assert code and not any("fsdp_cpu_shim" in p.read_text() for p in code)
