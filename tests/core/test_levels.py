"""The level database: packed at every width, swapped where choices differ, saved and mapped back."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hfgen import catalog
from hfgen.kit.levels import Levels, nbytes, shared_copy
from hfgen.kit.quantizer import PackedLinear
from hfgen.quantizers import EasyQuantConfig, NupesConfig

RTN = {"n_sigma": None, "optimizer": "none"}
IDS = torch.tensor([[1, 2, 3, 4, 5]])


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2,
            num_hidden_layers=2, attention_bias=True,
        )
    ).eval()  # fmt: skip


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("config", [EasyQuantConfig(), NupesConfig(), EasyQuantConfig(**RTN, group_size=16)])
def test_every_width_is_what_from_pretrained_gives(make, config, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    levels = Levels.build(model, config, (2, 3, 5))
    assert levels.bits == (2, 3, 5) and all(type(m) is not PackedLinear for m in model.modules())
    student = shared_copy(model)
    for bits in (2, 3, 5):
        levels.assign(student, dict.fromkeys(levels.sizes, bits))
        fields = {k: v for k, v in config.to_dict().items() if k not in ("bits", "hfgen", "quant_method")}
        wanted = type(model).from_pretrained(tmp_path, quantization_config=type(config)(bits=bits, **fields))
        assert torch.equal(student(IDS).logits, wanted(IDS).logits)
        assert levels.stored(dict.fromkeys(levels.sizes, bits)) == pytest.approx(
            8 * sum(nbytes(m) for m in wanted.modules() if isinstance(m, PackedLinear)) / sum(levels.sizes.values())
        )


def test_the_database_is_packed_and_shares_the_model():
    model = llama()
    levels = Levels.build(model, EasyQuantConfig(**RTN), (2, 3, 4, 5, 6))
    weights = sum(levels.sizes.values())
    assert weights == sum(model.get_submodule(n).weight.numel() for n in levels.sizes)
    scales = sum(2 * m.get_submodule(n).weight.shape[0] for m in [model] for n in levels.sizes) * 5
    assert levels.nbytes == weights * 20 // 8 + scales
    for name in levels.sizes:
        assert levels.layers[3][name].bias is model.get_submodule(name).bias
    copied = shared_copy(model)
    assert all(a is b for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    assert not set(copied.modules()) & set(model.modules())


def test_assign_swaps_what_differs_and_counts_it():
    model = llama()
    wanted = model(IDS).logits
    levels, names = Levels.build(model, EasyQuantConfig(**RTN), (2, 3, 4)), None
    names = list(levels.sizes)
    assert levels.assign(model, dict.fromkeys(names)) == 0  # float as it is
    assert levels.assign(model, dict.fromkeys(names, 3)) == 14
    assert levels.assign(model, dict.fromkeys(names, 3)) == 0
    assert levels.assign(model, dict.fromkeys(names, 3) | {names[0]: 2, names[5]: 4}) == 2
    assert levels.assign(model, {names[0]: 3}) == 1 and model.get_submodule(names[5]) is levels.layers[4][names[5]]
    assert levels.swaps == 17 and levels.average({names[0]: 2, names[1]: 4}) == 3
    assert levels.assign(model, dict.fromkeys(names)) == 14
    assert torch.equal(model(IDS).logits, wanted)


def test_a_saved_database_is_mapped_back(tmp_path):
    model = llama()
    config = EasyQuantConfig()
    made = Levels.build(model, config, (2, 3, 4))
    made.save(tmp_path)
    (tmp_path / "3-bit.safetensors").unlink()  # an interrupted run makes what is missing
    seen = []
    opened = Levels.open(tmp_path, model, config, (2, 3, 4), lambda done, total: seen.append((done, total)))
    assert seen[0] == (15, 42) and seen[-1] == (28, 42) and opened.identity() == made.identity()
    for bits in (2, 3, 4):
        for name, layer in made.layers[bits].items():
            again = opened.layers[bits][name]
            assert torch.equal(again.dequantize(), layer.dequantize()) and again.config == layer.config
    student = shared_copy(model)
    opened.assign(student, dict.fromkeys(opened.sizes, 3))
    logits = student(IDS).logits
    made.assign(student, dict.fromkeys(opened.sizes, 3))
    assert torch.equal(student(IDS).logits, logits)

    for words, other, options in (
        ("holds levels with another model", llama(1), config),
        ("holds levels with another config", model, EasyQuantConfig(n_sigma=2.0)),
    ):
        with pytest.raises(ValueError, match=words):
            Levels.open(tmp_path, other, options, (2, 3, 4))
    whole = (tmp_path / "2-bit.safetensors").read_bytes()
    (tmp_path / "2-bit.safetensors").write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"2-bit.safetensors is no level of this model"):
        Levels.open(tmp_path, model, config, (2, 3, 4))
    (tmp_path / "2-bit.safetensors").write_bytes((tmp_path / "4-bit.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"2-bit.safetensors is no level of this model"):
        Levels.open(tmp_path, model, config, (2, 3, 4))
    (tmp_path / "levels.json").write_text("{")
    with pytest.raises(ValueError, match=r"levels.json cannot be read"):
        Levels.open(tmp_path, model, config, (2, 3, 4))


def test_a_plan_becomes_a_quantised_model(tmp_path):
    model = gpt2()
    levels = Levels.build(model, EasyQuantConfig(bits=8, **RTN), (2, 4, 6))
    plan = {name: (2, 4, 6, 6)[i % 4] for i, name in enumerate(levels.sizes)}
    config = levels.config_for(plan)
    assert config.bits == 6 and config.bits_map == plan
    made = levels.export(model, plan)
    made.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["bits_map"] == plan
    assert torch.equal(GPT2LMHeadModel.from_pretrained(tmp_path)(IDS).logits, made(IDS).logits)
    assert all(type(m) is not PackedLinear for m in model.modules())


def test_bad_input_is_named():
    model = llama()
    for error, words, config, bits in (
        (TypeError, "config is str", "easyquant", (2, 3)),
        (ValueError, "distinct widths", EasyQuantConfig(), (2, 2)),
        (ValueError, "distinct widths", EasyQuantConfig(), ()),
        (ValueError, "bits is 7", EasyQuantConfig(), (2, 7)),
        (TypeError, "bits is 2.5", EasyQuantConfig(), (2.5,)),
        (
            ValueError,
            "NupesConfig needs data, and a level database is made without",
            NupesConfig(exponent="learned"),
            (2,),
        ),
    ):
        with pytest.raises(error, match=words):
            Levels.build(model, config, bits)
    levels = Levels.build(model, EasyQuantConfig(**RTN), (2, 3))
    for words, plan in (
        ("did you mean 'model.layers.0.mlp.up_proj'", {"model.layers.0.mlp.up_prj": 2}),
        ("bits; the level database has 2, 3", {"model.layers.0.mlp.up_proj": 4}),
    ):
        with pytest.raises(ValueError, match=words):
            levels.assign(model, plan)
    with pytest.raises(ValueError, match="are of another model"):
        levels.check(gpt2())
    levels.check(llama())


def test_the_shelf_gives_the_search():
    from hfgen import searches

    assert searches.evopress is catalog.load("evopress", "searches")
    assert {"evopress", "evopress_depth", "drop_layers"} <= set(dir(searches))
