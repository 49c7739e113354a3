"""`hfgen export`: stock LoRA, merged and plain models have the function of the original; refusals."""

import json
import re
import shutil

import pytest
import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from hfgen import sandbox
from hfgen.adapters import LoLDUConfig, SomaConfig, SVFitConfig
from hfgen.cli import export as command
from hfgen.quantizers import EasyQuantConfig
from tests.hosts.test_quantizers import MODELS, build, logits

CASES = {  # model -> targets
    "decoder": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "encoder-decoder": ["q", "wi"],
    "vit": ["q_proj", "fc1"],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}
    for name in CASES:
        made[name] = tmp_path_factory.mktemp(name)
        build(*MODELS[name][:2]).save_pretrained(made[name])
    return made


def adapter(base, out, name="decoder", config=SVFitConfig, quantization=None, **fields):
    """An adapter with a random state, saved; returns the model it was saved from."""
    kwargs = {} if quantization is None else {"quantization_config": quantization}
    model = MODELS[name][0].from_pretrained(base, **kwargs)
    torch.manual_seed(1)
    fields = {"r": 4, "target_modules": CASES[name], "init_weights": False} | fields
    model = get_peft_model(model, config(**fields)).eval()
    model.save_pretrained(out)
    return model


def hfgen(*arguments):
    app = typer.Typer()
    app.command()(command.export)
    return CliRunner().invoke(app, list(map(str, arguments)))


def printed(done):
    """The deviation on the last line."""
    assert done.exit_code == 0, done.output
    found = re.search(
        r"maximal deviation of the logits: (\S+) \(float32, fixed probe; the largest logit is", done.output
    )
    return float(found[1])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("config", "rank"), [(SVFitConfig, 4), (LoLDUConfig, 4), (SomaConfig, 8)])
def test_lora_and_merged_have_the_same_function(name, config, rank, bases, tmp_path):
    cls, _, inputs, *_ = MODELS[name]
    model = adapter(bases[name], tmp_path / "adapter", name, config)
    expected = logits(model, inputs)
    plain = logits(cls.from_pretrained(bases[name]), inputs)
    assert (expected - plain).abs().max() > 1e-2  # else nothing is tested
    assert printed(hfgen(tmp_path / "adapter", "--to", "lora", "--out", tmp_path / "lora")) < 1e-4
    stock = PeftModel.from_pretrained(cls.from_pretrained(bases[name]), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(stock, inputs), expected, atol=1e-4, rtol=1e-4)
    said = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert said["peft_type"] == "LORA" and "hfgen" not in said and said["r"] == said["lora_alpha"] == rank
    assert printed(hfgen(tmp_path / "adapter", "--to", "merged", "--out", tmp_path / "merged")) < 1e-4
    merged = cls.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, inputs), expected, atol=1e-4, rtol=1e-4)
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(
        load_file(bases[name] / "model.safetensors")
    )


def test_the_factors_are_exact_not_recomputed(bases, tmp_path):
    model = adapter(bases["decoder"], tmp_path / "adapter")
    assert hfgen(tmp_path / "adapter", "--to", "lora", "--out", tmp_path / "lora").exit_code == 0
    found = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    assert torch.equal(found[key.format("A")], layer.svfit_right["default"])
    assert torch.equal(found[key.format("B")], layer.svfit_left["default"] * layer.coefficient("default").detach())


def test_the_lora_needs_no_hfgen(bases, tmp_path, run_python):
    model = adapter(bases["decoder"], tmp_path / "adapter")
    assert hfgen(tmp_path / "adapter", "--to", "lora", "--out", tmp_path / "lora").exit_code == 0
    code = f"""
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import LlamaForCausalLM
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained({str(bases["decoder"])!r}), {str(tmp_path / "lora")!r})
with torch.no_grad():
    print("sum", model(input_ids=torch.arange(2, 12)[None]).logits.double().sum().item())
assert not [m for m in sys.modules if m.startswith("hfgen_plugins") or m == "hfgen.kit"]
"""
    out = run_python(code, env={"HFGEN_AUTOLOAD": "0"}).stdout
    assert float(out.split("sum")[1]) == pytest.approx(logits(model).double().sum().item(), abs=1e-3)


def test_differing_ranks_and_saved_modules(bases, tmp_path):
    """Energy gives each layer its own rank; the classifier is trained in full."""
    cls, _, inputs, *_ = MODELS["vit"]
    model = get_peft_model(
        cls.from_pretrained(bases["vit"]),
        SVFitConfig(energy=0.6, target_modules=CASES["vit"], init_weights=False, modules_to_save=["classifier"]),
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(1.0)
    model.save_pretrained(tmp_path / "adapter")
    assert printed(hfgen(tmp_path / "adapter", "--to", "lora", "--out", tmp_path / "lora")) < 1e-4
    said = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert said["rank_pattern"] and said["rank_pattern"] == said["alpha_pattern"]
    stock = PeftModel.from_pretrained(cls.from_pretrained(bases["vit"]), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(stock, inputs), logits(model, inputs), atol=1e-4, rtol=1e-4)
    assert printed(hfgen(tmp_path / "adapter", "--to", "merged", "--out", tmp_path / "merged")) < 1e-4
    torch.testing.assert_close(
        logits(cls.from_pretrained(tmp_path / "merged"), inputs), logits(model, inputs), atol=1e-4, rtol=1e-4
    )


def test_an_adapter_on_a_quantised_base(bases, tmp_path):
    """The LoRA goes on the quantised base; merging makes a plain model."""
    cls = MODELS["decoder"][0]
    cls.from_pretrained(bases["decoder"], quantization_config=EasyQuantConfig()).save_pretrained(tmp_path / "packed")
    model = adapter(tmp_path / "packed", tmp_path / "adapter")
    assert printed(hfgen(tmp_path / "adapter", "--to", "lora", "--out", tmp_path / "lora")) < 1e-4
    assert printed(hfgen(tmp_path / "adapter", "--to", "merged", "--out", tmp_path / "merged")) < 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged = cls.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)


def test_dequantized(tmp_path, run_python):
    """On the sandbox model; the other files come along, and no hfgen is needed."""
    model = sandbox.load_model(quantization_config=EasyQuantConfig(bits=3))
    model.save_pretrained(tmp_path / "packed")
    sandbox.load_tokenizer().save_pretrained(tmp_path / "packed")
    done = hfgen(tmp_path / "packed", "--to", "dequantized", "--out", tmp_path / "plain")
    assert printed(done) < 1e-4
    said = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in said and (tmp_path / "plain" / "tokenizer.json").exists()
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(t.is_floating_point() for t in tensors.values())
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(tensors["model.layers.0.mlp.up_proj.weight"], layer.dequantize(torch.float32))


def test_the_deviation_is_measured(bases, tmp_path):
    """bfloat16 rounds a merge: the line says by how much, as measured here apart."""
    cls = MODELS["decoder"][0]
    cls.from_pretrained(bases["decoder"], dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "adapter")
    worst = printed(hfgen(tmp_path / "adapter", "--to", "merged", "--out", tmp_path / "merged"))
    base = cls.from_pretrained(tmp_path / "base", dtype=torch.float32)
    one = command.logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    two = command.logits(cls.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert load_file(tmp_path / "merged" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert worst > 1e-4 and worst == pytest.approx(float((one - two).abs().max()), rel=0.01)


def test_another_base(bases, tmp_path):
    adapter(bases["decoder"], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(path.read_text())
    out = tmp_path / "out"
    for name, words in (
        (None, "does not name its base model; give it with --base"),
        ("no/base", "'no/base' is not to"),
    ):
        path.write_text(json.dumps(said | {"base_model_name_or_path": name}))
        done = hfgen(tmp_path / "adapter", "--to", "merged", "--out", out)
        assert done.exit_code == 2 and words in done.output and len(done.output.splitlines()) == 1
    assert printed(hfgen(tmp_path / "adapter", "--to", "merged", "--out", out, "--base", bases["decoder"])) < 1e-4
    other = build(MODELS["decoder"][0], MODELS["decoder"][1])
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    other.save_pretrained(tmp_path / "other")
    done = hfgen(tmp_path / "adapter", "--to", "lora", "--out", tmp_path / "x", "--base", tmp_path / "other")
    assert done.exit_code == 2 and "does not fit" in done.output
    assert not [p for p in tmp_path.iterdir() if p.name.lstrip(".").startswith("x")]


def test_refusals(bases, tmp_path):
    adapter(bases["decoder"], tmp_path / "adapter")
    adapter(bases["decoder"], tmp_path / "biased", bias="all")
    stock = get_peft_model(
        MODELS["decoder"][0].from_pretrained(bases["decoder"]), LoraConfig(target_modules=["q_proj"])
    )
    stock.save_pretrained(tmp_path / "stock")
    model = MODELS["decoder"][0].from_pretrained(bases["decoder"], quantization_config=EasyQuantConfig())
    model.save_pretrained(tmp_path / "packed")
    foreign = tmp_path / "foreign"
    shutil.copytree(bases["decoder"], foreign)
    said = json.loads((foreign / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (foreign / "config.json").write_text(json.dumps(said))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for folder, to, options, words in (
        ("adapter", "lorra", (), "--to is 'lorra'; did you mean 'lora'?"),
        ("adapter", "onnx", (), "--to is 'onnx'; give one of lora, merged, dequantized"),
        (
            "adapter",
            "dequantized",
            (),
            "has no config.json, which --to dequantized needs; it is an adapter, --to lora or",
        ),
        ("packed", "lora", (), "has no adapter_config.json, which --to lora needs; it is a model, --to dequantized"),
        ("nothing", "lora", (), "nothing', which is no folder; give one that save_pretrained wrote"),
        ("full", "lora", (), "has no adapter_config.json, which --to lora needs; give one that save_pretrained wrote"),
        ("stock", "lora", (), "is an adapter of peft's own (LORA), which hfgen does not export"),
        ("foreign", "dequantized", (), "is quantised by 'gptq', not by hfgen"),
        (bases["decoder"], "dequantized", (), "is not quantised; there is nothing to export"),
        ("packed", "dequantized", ("--base", "x"), "--base is 'x', but a quantised model has no base"),
        ("biased", "lora", (), "trains biases (bias='all'), which a LoRA has not; use --to merged"),
        ("adapter", "lora", ("--out", tmp_path / "full"), "exists and is not an empty folder"),
    ):
        done = hfgen(tmp_path / folder, "--to", to, "--out", tmp_path / "out", *options)
        assert done.exit_code == 2 and words in done.output, (folder, to, done.output)
        assert len(done.output.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "file").read_text() == "x"


def test_a_method_without_exact_factors_names_pefts_way(bases, tmp_path):
    """Not a diagonal between factors: refused, with the approximation peft offers."""
    from hfgen.kit.diagonal import DiagonalLayer

    model = adapter(bases["decoder"], tmp_path / "adapter")
    for layer in model.modules():
        if isinstance(layer, DiagonalLayer):
            layer.__class__ = type("Other", DiagonalLayer.__bases__, {})
    with pytest.raises(ValueError, match="method 'svfit' has no exact LoRA; peft.save_as_lora.*makes a near one"):
        command.as_lora(model)


def test_the_probe_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="a model that takes 'input_values' cannot be measured"):
        command.probe(type("Odd", (), {"config": None, "main_input_name": "input_values"}))
