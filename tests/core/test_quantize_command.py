"""`hfgen quantize`: the streamed copy is the in-memory one, bit for bit; interrupted runs; refusals."""

import json
import math
import os
import random
import runpy
import shutil
import signal
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    MixtralForCausalLM,
    ViTForImageClassification,
)
from typer.testing import CliRunner

from hfgen import sandbox
from hfgen.cli import quantize as command
from hfgen.kit import streaming
from hfgen.kit.quantizer import PackedLinear
from hfgen.quantizers import AdaQuantConfig, EasyQuantConfig
from hfgen_plugins.quantizers.adaquant import adaquant
from tests.hosts.test_quantizers import MODELS, build, logits

SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}


def tensors(folder):
    """Every tensor of a folder's safetensors."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(a, b):
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def stream(source, out, config=None, size=4000, progress=lambda done, total: None):
    return streaming.quantize_folder(source, config or EasyQuantConfig(), out, size, progress)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """name -> folder of a plain tiny model."""
    made = {}
    for name, (cls, config, *_) in MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        build(cls, config).save_pretrained(made[name])
    return made


@pytest.mark.parametrize("name", MODELS)
def test_the_streamed_model_is_the_one_quantised_in_memory(name, plain, tmp_path, monkeypatch):
    cls, _, inputs, count, left = MODELS[name]
    monkeypatch.setattr(streaming, "STEP", 1500)
    in_memory = cls.from_pretrained(plain[name], quantization_config=EasyQuantConfig(bits=3))
    in_memory.save_pretrained(tmp_path / "memory")
    report = stream(plain[name], tmp_path / "out", EasyQuantConfig(bits=3))
    same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))
    assert config_of(tmp_path / "out") == config_of(tmp_path / "memory")
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1 and not (tmp_path / "out.partial").exists()
    assert len(report.quantized) == count and not report.dropped
    assert {f"{n}.weight" for n in left} <= set(report.left_in_float)
    assert report.left_in_float == in_memory.hf_quantizer.left_in_float
    assert report.after == sum(s.stat().st_size for s in shards)
    loaded = cls.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, inputs), logits(in_memory, inputs))
    layers = [m for m in in_memory.modules() if isinstance(m, PackedLinear)]
    parts = [t for m in layers for t in (m.weight, m.weight_scale, m.outlier_idx, m.outlier_val)]
    assert report.packed == sum(t.nbytes for t in parts)
    assert report.weights == sum(m.in_features * m.out_features for m in layers)
    assert report.bits_per_weight == 8 * report.packed / report.weights


def test_names_on_disk_differ_from_those_in_memory(plain):
    """Without this the test above would not see a mapping that is never used."""
    for name, cls in (("vit", ViTForImageClassification), ("mixtral", MixtralForCausalLM)):
        assert set(tensors(plain[name])) - set(cls.from_pretrained(plain[name]).state_dict())


def test_a_checkpoint_with_old_names_repeated_ties_and_leftovers(plain, tmp_path):
    """As the hub's gpt2: no base prefix, causal masks saved; and the tied head a second time."""
    cls = MODELS["gpt2"][0]
    old, source = tensors(plain["gpt2"]), tmp_path / "source"
    shutil.copytree(plain["gpt2"], source)
    new = {k.removeprefix("transformer."): v for k, v in old.items()}
    new |= {"h.0.attn.extra": torch.ones(1, 1, 16, 16), "lm_head.weight": new["wte.weight"].clone()}
    save_file(new, source / "model.safetensors", {"format": "pt"})
    cls.from_pretrained(source, quantization_config=EasyQuantConfig()).save_pretrained(tmp_path / "memory")
    seen = []
    report = stream(source, tmp_path / "out", progress=lambda *counts: seen.append(counts))
    same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))
    assert report.dropped == ["h.0.attn.extra"] and seen == [(i, len(old)) for i in range(len(old) + 1)]
    save_file(new | {"lm_head.weight": new["wte.weight"] + 1}, source / "model.safetensors", {"format": "pt"})
    model = cls.from_pretrained(source, quantization_config=EasyQuantConfig())
    stream(source, tmp_path / "untied")
    assert torch.equal(logits(cls.from_pretrained(tmp_path / "untied")), logits(model))
    assert "lm_head.weight" in tensors(tmp_path / "untied")


def test_tensors_that_are_computed_and_never_saved(tmp_path):
    """Marian's positions are parameters that no file holds."""
    shape = {f"{part}_{leaf}": n for part in ("encoder", "decoder") for leaf, n in SIDE.items()}
    config = MarianConfig(vocab_size=33, d_model=16, pad_token_id=32, decoder_start_token_id=32, **shape)
    build(MarianMTModel, config).save_pretrained(tmp_path / "source")
    positions = set(MarianMTModel._keys_to_ignore_on_save)
    assert positions and not positions & set(tensors(tmp_path / "source"))
    memory = MarianMTModel.from_pretrained(tmp_path / "source", quantization_config=EasyQuantConfig())
    memory.save_pretrained(tmp_path / "memory")
    stream(tmp_path / "source", tmp_path / "out")
    same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))
    # The same positions in a file are read, and not written.
    full = tensors(tmp_path / "source") | {n: memory.get_parameter(n).detach().clone() for n in positions}
    save_file(full, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    stream(tmp_path / "source", tmp_path / "again")
    same(tensors(tmp_path / "again"), tensors(tmp_path / "memory"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_many_files(dtype, plain, tmp_path):
    cls = MODELS["encoder-decoder"][0]  # keeps some layers in float32
    model = cls.from_pretrained(plain["encoder-decoder"], dtype=dtype)
    model.save_pretrained(tmp_path / "source", max_shard_size="5KB")
    config = EasyQuantConfig(group_size=8, modules_to_not_convert=["wo", "wi"])
    memory = cls.from_pretrained(tmp_path / "source", quantization_config=config)
    memory.save_pretrained(tmp_path / "memory")
    stream(tmp_path / "source", tmp_path / "out", config, size=10**9)
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))
    assert config_of(tmp_path / "out") == config_of(tmp_path / "memory")


def test_shards_and_other_files(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(sandbox.path(), source)
    (source / "extra").mkdir()
    (source / "extra" / "template.jinja").write_text("x")
    (source / "pytorch_model.bin").write_bytes(b"weights of another format")
    (source / ".cache").mkdir()
    (source / ".cache" / "lock").write_text("x")
    out = tmp_path / "out"
    out.mkdir()  # empty: taken
    stream(source, out, size=30_000)
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            sizes = [file.get_tensor(k).nbytes for k in file.keys()]  # noqa: SIM118
            assert file.metadata() == {"format": "pt"} and (sum(sizes) <= 30_000 or len(sizes) == 1)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(out))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(out).values())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "extra/template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "pytorch_model.bin").exists() and not (out / ".cache").exists()
    assert sandbox.answers(
        LlamaForCausalLM.from_pretrained(out), sandbox.load_tokenizer(), [":17="]
    ) == sandbox.answers(sandbox.load_model(quantization_config=EasyQuantConfig()), sandbox.load_tokenizer(), [":17="])


# --- interrupted runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["decoder", "mixtral"])
def test_an_interrupted_run_leaves_nothing_and_goes_on(name, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "STEP", 1000)
    stream(plain[name], tmp_path / "whole")
    out, reused, counts = tmp_path / "out", [], []

    def stop(at):
        def progress(done, total):
            counts.append(done)
            if done == at:
                raise KeyboardInterrupt

        return progress

    total = len(tensors(plain[name]))
    for at in range(4, total, 3):
        done_before = len(counts)
        with pytest.raises(KeyboardInterrupt):
            stream(plain[name], out, progress=stop(at))
        assert not out.exists() and len(counts) > done_before
        reused.append(len(list((tmp_path / "out.partial").glob("shard-*.safetensors"))))
    assert reused == sorted(reused) and reused[-1] > 0
    report = stream(plain[name], out)
    assert report.reused == reused[-1]
    assert sum(len(load_file(p)) for p in out.glob("*.safetensors")) == len(tensors(out))  # none twice
    same(tensors(out), tensors(tmp_path / "whole"))
    assert config_of(out) == config_of(tmp_path / "whole")
    assert report.packed == stream(plain[name], tmp_path / "again").packed


def test_a_killed_process(plain, tmp_path, run_python):
    out = tmp_path / "out"
    code = f"""
import os, signal
from pathlib import Path
from hfgen.kit.streaming import quantize_folder
from hfgen.quantizers import AdaQuantConfig, EasyQuantConfig
from hfgen_plugins.quantizers.adaquant import adaquant
import hfgen.kit.streaming as s
s.STEP = 1000
def progress(done, total):
    if done == 12:
        os.kill(os.getpid(), signal.SIGKILL)
quantize_folder(Path({str(plain["decoder"])!r}), EasyQuantConfig(), Path({str(out)!r}), 4000, progress)
"""
    assert run_python(code, check=False).returncode == -signal.SIGKILL
    partial = tmp_path / "out.partial"
    assert not out.exists() and list(partial.glob("shard-*.safetensors"))
    listed = json.loads((partial / "manifest.json").read_text())["shards"]
    nth = len(listed) + 1
    (partial / f"shard-{nth:05d}.tmp").write_bytes(b"half a shard")
    (partial / f"shard-{nth:05d}.safetensors").write_bytes(b"renamed but not in the manifest")
    report = stream(plain["decoder"], out)
    assert report.reused == len(listed) > 0
    stream(plain["decoder"], tmp_path / "whole")
    same(tensors(out), tensors(tmp_path / "whole"))


def test_interrupted_while_finishing(plain, tmp_path, monkeypatch):
    real, calls = os.replace, []

    def replace(a, b):
        if "final" in str(b) and len(calls) < 3:
            calls.append(b)
            if len(calls) == 3:
                raise OSError("no space left on device")
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no space"):
        stream(plain["decoder"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = stream(plain["decoder"], tmp_path / "out")
    monkeypatch.undo()
    stream(plain["decoder"], tmp_path / "whole")
    assert report.reused == len(list((tmp_path / "out").glob("*.safetensors")))  # nothing was quantised again
    same(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))


def interrupted(source, out, config=None):
    def progress(done, total):
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(source, out, config, progress=progress)


def test_a_partial_folder_of_another_run_is_refused(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "STEP", 1000)
    out, source = tmp_path / "out", tmp_path / "source"
    shutil.copytree(plain["decoder"], source)
    interrupted(source, out)
    with pytest.raises(ValueError, match="interrupted run with another settings; delete it to start anew, or give the"):
        stream(source, out, EasyQuantConfig(bits=3))
    with pytest.raises(ValueError, match="interrupted run with another max_shard_size"):
        stream(source, out, size=5000)
    os.utime(source / "model.safetensors", (1, 1))
    with pytest.raises(ValueError, match="interrupted run with another model"):
        stream(source, out)
    path = tmp_path / "out.partial" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, this hfgen writes 1; delete"):
        stream(source, out)
    path.write_text(json.dumps(manifest))
    next((tmp_path / "out.partial").glob("shard-*.safetensors")).unlink()
    os.utime(source / "model.safetensors", ns=(1, manifest["identity"]["model"]["files"]["model.safetensors"][1]))
    with pytest.raises(ValueError, match="lacks shard-0000..safetensors, which its manifest lists; delete the folder"):
        stream(source, out)
    path.unlink()
    path.with_name("notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="in the way and has no manifest.json"):
        stream(source, out)


# --- refusals -------------------------------------------------------------------------------------------------------


def edited(source, folder, **changes):
    shutil.copytree(source, folder)
    raw = config_of(folder) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return folder


def test_folders_that_are_refused(plain, tmp_path):
    source, out = plain["decoder"], tmp_path / "out"
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("x")
    with pytest.raises(ValueError, match="full', which exists and is not an empty folder; give another name or"):
        stream(source, full)
    with pytest.raises(ValueError, match="a folder inside the model's own; give one outside"):
        stream(source, source / "out")
    with pytest.raises(ValueError, match="has no config.json; give the folder of a model"):
        stream(full, out)
    stream(source, tmp_path / "packed")
    with pytest.raises(ValueError, match="is quantised already .by 'easyquant'.; give the folder of the plain model"):
        stream(tmp_path / "packed", out)
    with pytest.raises(ValueError, match="brings its own code .auto_map .*quantise it in memory"):
        stream(edited(source, tmp_path / "code", auto_map={"AutoModel": "m.M"}), out)
    for i, value in enumerate((None, ["LlamaForNothing"], ["logging"])):
        with pytest.raises(ValueError, match="which names no class of transformers .*; save the model with"):
            stream(edited(source, tmp_path / f"arch{i}", architectures=value), out)
    adapted = edited(source, tmp_path / "adapted")
    (adapted / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="an adapter beside it; merge the adapter first"):
        stream(adapted, out)
    pickled = edited(source, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no safetensors weights, .*; quantise it in memory"):
        stream(pickled, out)
    assert not out.exists() and not (tmp_path / "out.partial").exists()


def test_weights_that_are_refused(plain, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(plain["decoder"], source)
    good, path = load_file(source / "model.safetensors"), source / "model.safetensors"

    def attempt(message, changes=None, without=""):
        changed = {k: v for k, v in (good | (changes or {})).items() if k != without}
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            stream(source, out, size=10**9)  # one shard, never written: the next try starts anew by itself
        assert not out.exists()

    up, embed = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"
    attempt(f"the weight of {up.removesuffix('.weight')} holds NaN or Inf", {up: good[up].fill_(float("nan")).clone()})
    good = tensors(plain["decoder"])
    attempt("the checkpoint's .*up_proj.weight has shape .*they belong to different models", {up: good[up][:3]})
    attempt(r"embed_tokens.weight has shape \(3, 16\) in the checkpoint, the model wants", {embed: good[embed][:3]})
    attempt("the checkpoint has no model.layers.1.mlp.up_proj.* which would be drawn at random", without=up)
    attempt("the checkpoint has no lm_head.weight .1 tensors missing.", without="lm_head.weight")
    save_file(good, path, {"format": "pt"})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        stream(source, out)


def test_other_kinds_of_quantizer_are_refused(plain, tmp_path):
    class Foreign(EasyQuantConfig):
        quantizer_cls = type("Other", (), {})

        def __post_init__(self):
            self.quant_method = "easyquant"

    with pytest.raises(ValueError, match="packs no layers by itself, so it cannot be streamed; quantise it in memory"):
        stream(plain["decoder"], tmp_path / "out", Foreign())


# --- the command ----------------------------------------------------------------------------------------------------


def hfgen(*arguments):
    app = typer.Typer()
    app.command()(command.quantize)
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "140"})


def test_the_command(plain, tmp_path):
    out = tmp_path / "out"
    options = ("--method", "easyquant", "--bits", 3, "--args", '{"n_sigma": 2.5}', "--max-shard-size", "4KB")
    done = hfgen(plain["decoder"], "--out", out, *options)
    assert done.exit_code == 0, done.output
    config = config_of(out)["quantization_config"]
    assert (config["bits"], config["n_sigma"], config["quant_method"]) == (3, 2.5, "easyquant")
    stream(plain["decoder"], tmp_path / "direct", EasyQuantConfig(bits=3, n_sigma=2.5))
    same(tensors(out), tensors(tmp_path / "direct"))
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    for words in (f"{size:,}", "bits per weight", "14, with", "1 x head or tied embedding", "RssAnon, polled"):
        assert words in done.output, (words, done.output)


def test_the_command_says_what_was_taken_over(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "STEP", 1000)
    interrupted(plain["decoder"], tmp_path / "out")
    done = hfgen(plain["decoder"], "--out", tmp_path / "out", "--method", "easyquant", "--max-shard-size", "4KB")
    assert done.exit_code == 0 and "shards of an interrupted run" in done.output


def test_ctrl_c_says_how_to_go_on(plain, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "_stream", stop)
    done = hfgen(plain["decoder"], "--out", tmp_path / "out", "--method", "easyquant")
    assert done.exit_code == 130 and "out.partial" in done.output and "the same command goes on" in done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "easyquan"), "did you mean 'easyquant'"),
        (("--method", "easyquant", "--bits", "7"), "EasyQuantConfig.bits is 7; give one of 2, 3, 4, 5, 6, 8"),
        (("--method", "easyquant", "--args", '{"n_sgma": 3}'), "'n_sgma'; did you mean 'n_sigma'"),
        (("--method", "easyquant", "--args", "n_sigma=3"), "--args is 'n_sigma=3', which is not JSON"),
        (("--method", "easyquant", "--args", "[3]"), "--args is '[3]', which is no JSON object"),
        (("--method", "easyquant", "--args", '{"bits": 3}'), "--args sets bits to 3; give it as --bits"),
        (("--method", "easyquant", "--max-shard-size", "big"), "max_shard_size is 'big'; give a size such as 500MB"),
    ],
)
def test_wrong_options_are_one_line(options, words, plain, tmp_path):
    done = hfgen(plain["decoder"], "--out", tmp_path / "out", *options)
    assert done.exit_code == 2 and words in done.output and len(done.output.splitlines()) == 1, done.output
    assert not (tmp_path / "out").exists()


def test_no_such_model(tmp_path):
    done = hfgen("no/such-model", "--out", tmp_path / "out", "--method", "easyquant")
    assert done.exit_code == 2 and "MODEL is 'no/such-model', which is no folder, and the hub did not" in done.output


def test_peak_memory_sees_what_was_freed():
    with command.PeakMemory() as peak:
        before = command.rss_anon()
        block = torch.ones(16 * 2**20)
        held = command.rss_anon()
        import time

        time.sleep(5 * command.POLL)
        del block
    assert held - before > 60 * 2**20 and peak.bytes >= before + 60 * 2**20


def test_a_table_without_proc(plain, tmp_path):
    console = Console(record=True, width=120)
    command.print_report(stream(plain["decoder"], tmp_path / "out"), tmp_path / "[out]", 1.0, None, console)
    text = console.export_text()
    assert "not measured" in text and "[out]" in text


# --- methods that need data -----------------------------------------------------------------------------------------


@pytest.fixture
def calib(tmp_path):
    path, rng = tmp_path / "rows.jsonl", random.Random(0)
    path.write_text(
        "".join(json.dumps({"input_ids": [rng.randrange(1, 32) for _ in range(12)]}) + "\n" for _ in range(20))
    )
    return path


ADAQUANT = ("--method", "adaquant", "--bits", 3, "--args", '{"steps": 10}')


def test_calibrating_is_the_same_in_memory(plain, calib, tmp_path):
    done = hfgen(plain["decoder"], "--out", tmp_path / "out", *ADAQUANT, "--calib", calib, "--max-shard-size", "4KB")
    assert done.exit_code == 0, done.output
    config = AdaQuantConfig(bits=3, steps=10)
    base = LlamaForCausalLM.from_pretrained(plain["decoder"])
    model = config.calibrate(base, [json.loads(line) for line in calib.read_text().splitlines()])
    model.save_pretrained(tmp_path / "memory")
    same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))
    assert config_of(tmp_path / "out") == config_of(tmp_path / "memory")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 and not (tmp_path / "out.partial").exists()
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    stored = sum(t.nbytes for m in layers for t in (m.weight, m.weight_scale, m.weight_zero))
    bits = 8 * stored / sum(m.in_features * m.out_features for m in layers)
    for words in ("14, with", f"{bits:.3f} in quantised layers", "kept as they began", "RssAnon, polled"):
        assert words in done.output, (words, done.output)


def test_average_bits(plain, calib, tmp_path):
    args = ("--args", '{"steps": 2, "choices": [2, 4]}', "--average-bits", 3.0)
    done = hfgen(plain["decoder"], "--out", tmp_path / "out", "--method", "adaquant", *args, "--calib", calib)
    assert done.exit_code == 0 and "bits of layers" in done.output, done.output
    config = config_of(tmp_path / "out")["quantization_config"]
    assert set(config["bits_map"].values()) == {2, 4} and config["average_bits"] == 3.0


def test_bits_of_single_layers_from_a_file(plain, tmp_path):
    """As `hfgen search` writes it; streamed in small pieces it is what quantising in memory gives."""
    plan = {"model.layers.0.self_attn.q_proj": 6, "model.layers.1.mlp.up_proj": 2}
    (tmp_path / "bits.json").write_text(json.dumps(plan))
    arguments = ("--method", "easyquant", "--bits", 5, "--bits-map", tmp_path / "bits.json", "--max-shard-size", "4KB")
    done = hfgen(plain["decoder"], *arguments, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    config = EasyQuantConfig(bits=5, bits_map=plan)
    model = LlamaForCausalLM.from_pretrained(plain["decoder"], quantization_config=config)
    model.save_pretrained(tmp_path / "memory")
    same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))
    assert config_of(tmp_path / "out")["quantization_config"]["bits_map"] == plan
    for text, words in (("[1]", "holds no JSON object"), ("{", "cannot be read as JSON"), ('{"a": 3}', "no layer of")):
        (tmp_path / "bits.json").write_text(text)
        done = hfgen(plain["decoder"], *arguments, "--out", tmp_path / "other")
        assert done.exit_code == 2 and words in done.output, done.output


def test_an_interrupted_calibration_goes_on(plain, calib, tmp_path, monkeypatch):
    arguments = (plain["decoder"], *ADAQUANT, "--calib", calib)
    assert hfgen(*arguments, "--out", tmp_path / "whole").exit_code == 0
    real, calls = adaquant.calibrated_layer, []

    def layer(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(adaquant, "calibrated_layer", layer)
    done = hfgen(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == 130 and "the same command goes on" in done.output and not (tmp_path / "out").exists()
    other = hfgen(plain["decoder"], "--method", "adaquant", "--bits", 4, "--calib", calib, "--out", tmp_path / "out")
    assert other.exit_code == 2 and "interrupted run with another settings" in other.output
    done = hfgen(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == 0 and "5 layers of an interrupted run" in done.output and len(calls) == 6 + 14 - 5
    same(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))
    assert not (tmp_path / "out.partial").exists()


def test_a_streamed_run_in_the_way_of_a_calibration(plain, calib, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "STEP", 1000)
    interrupted(plain["decoder"], tmp_path / "out")
    done = hfgen(plain["decoder"], *ADAQUANT, "--calib", calib, "--out", tmp_path / "out")
    assert done.exit_code == 2 and "in the way and holds no interrupted calibration" in done.output
    assert (tmp_path / "out.partial" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "adaquant"), "--method adaquant needs data to quantise with; give --calib FILE"),
        (
            ("--method", "easyquant", "--calib", "CALIB"),
            "--method easyquant uses no data to quantise with; leave --calib",
        ),
        (("--method", "easyquant", "--calib-rows", "3"), "--calib-rows is 3, which only --calib reads; leave it out"),
        (("--method", "easyquant", "--average-bits", "3"), "'average_bits'; options are bits"),
        (
            ("--method", "adaquant", "--args", '{"average_bits": 3}'),
            "--args sets average_bits to 3; give it as --average",
        ),
        (
            ("--method", "adaquant", "--calib", "none.jsonl"),
            "is 'none.jsonl'; give an existing .jsonl, .json, .parquet",
        ),
        (("--method", "adaquant", "--calib", "CALIB", "--calib-rows", "2"), "hold 24 tokens (padding not counted), at"),
        (
            ("--method", "adaquant", "--calib", "CALIB", "--calib-rows", "0"),
            "calib_rows is 0; give an integer of at lea",
        ),
        (
            ("--method", "adaquant", "--calib", "CALIB", "--average-bits", "1.9"),
            "average_bits is 1.9, but with the widths",
        ),
        (("--method", "adaquant", "--calib", "CALIB", "--args", '{"tune": "biases"}'), "but LlamaForCausalLM has none"),
    ],
)
def test_wrong_calibrations_are_one_line(options, words, plain, calib, tmp_path):
    options = [str(calib) if o == "CALIB" else o for o in options]
    done = hfgen(plain["decoder"], "--out", tmp_path / "out", *options)
    lines = [line for line in done.output.splitlines() if not line.startswith("calibrating")]
    assert done.exit_code == 2 and words in done.output and len(lines) == 1, done.output
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


# --- the recipe: the same in memory ---------------------------------------------------------------------------------


def test_the_recipe(tmp_path, monkeypatch, capsys):
    """Its folder is the streamed one; its perplexity is that of each token predicted by itself."""
    recipe = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "quantize.py"))
    tokenizer, text = (
        sandbox.load_tokenizer(),
        "".join(f":{n:02d}={n // 3}+{n // 3}+{n - 2 * (n // 3)}\n" for n in range(9, 20)),
    )
    (tmp_path / "text").write_text(text)
    options = {"model_name_or_path": sandbox.path(), "text_file": tmp_path / "text", "method": "easyquant"}
    options |= {"output_dir": tmp_path / "out", "options": '{"bits": 3}', "max_length": 16, "batch_size": 3}
    arguments = [str(a) for name, value in options.items() for a in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["quantize.py", *arguments])
    recipe["main"]()
    table = capsys.readouterr().out
    stream(sandbox.path(), tmp_path / "streamed", EasyQuantConfig(bits=3), size=10**9)
    same(tensors(tmp_path / "out"), tensors(tmp_path / "streamed"))
    found = json.loads((tmp_path / "out" / "quantize.json").read_text())
    ids = tokenizer(text)["input_ids"]
    assert found["tokens"] == len(ids) and len(ids) % 16 > 1  # so there is a shorter window, too
    for name, model in (
        ("plain", sandbox.load_model()),
        ("easyquant", LlamaForCausalLM.from_pretrained(tmp_path / "out")),
    ):
        losses = []
        for start in range(0, len(ids), 16):
            window = ids[start : start + 16]
            for i in range(1, len(window)):
                with torch.no_grad():
                    scores = model(input_ids=torch.tensor([window[:i]])).logits[0, -1].double()
                losses.append(-scores.log_softmax(-1)[window[i]].item())
        row = found["models"][name]
        assert row["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
        assert f"{row['perplexity']:.4f}" in table and f"{row['bytes']:,}" in table
    assert found["models"]["easyquant"]["bytes"] < 0.3 * found["models"]["plain"]["bytes"]
    with pytest.raises(ValueError, match="the text has 1 tokens; give one with at least 2"):
        recipe["perplexity"](model, torch.tensor([1]), 16, 1)
