"""The packed format beyond plain codes: zeros, tables, five and six bits, one width per layer, models put together."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from hfgen.kit import packing as kit
from hfgen.kit.packing import Packed, PackedMatmul, Quantized, pack
from hfgen.kit.quantizer import PackedLinear, adopt, quantizable
from hfgen.quantizers import EasyQuantConfig

WIDTHS = st.sampled_from(kit.WIDTHS)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


class Affine(EasyQuantConfig):
    method, has_zeros = "test_affine", True


class Table(EasyQuantConfig):
    method, has_table = "test_table", True


def llama(cls=LlamaForCausalLM):
    torch.manual_seed(0)
    return cls(LlamaConfig(num_key_value_heads=1, vocab_size=32, **SMALL)).eval()


def drawn(bits, m, groups, width, seed, sparse=0):
    """Codes, scales, zeros, a table, and outliers, all at random."""
    generator = torch.Generator().manual_seed(seed)
    n = groups * width

    def integers(high, *shape):
        return torch.randint(high, shape, generator=generator)

    where = torch.randperm(m * n, generator=generator)[:sparse].sort().values.int()
    return {
        "codes": integers(2**bits, m, n).to(torch.uint8), "scale": (1 + integers(1000, m, groups)).half() / 512,
        "positions": where if sparse else None, "values": 3 * torch.randn(sparse, generator=generator).half() if sparse else None,
        "zero": integers(2**bits, m, groups).to(torch.uint8), "table": torch.randn(2**bits, generator=generator),
    }  # fmt: skip


def without(parts, *names):
    return Quantized(**{**parts, **dict.fromkeys(names)})


def brute_force(found, bits):
    """W in float64, entry by entry of its definition."""
    n = found.codes.shape[1]
    scale = found.scale.double().repeat_interleave(n // found.scale.shape[1], dim=1)
    if found.table is not None:
        weight = found.table.double()[found.codes.long()]
    elif found.zero is not None:
        weight = found.codes.double() - found.zero.double().repeat_interleave(n // found.zero.shape[1], dim=1)
    else:
        weight = found.codes.double() - 2 ** (bits - 1)
    weight = weight * scale
    if found.positions is not None:
        weight.view(-1)[found.positions.long()] = found.values.double()
    return weight


@given(bits=WIDTHS, m=st.integers(1, 5), groups=st.integers(1, 3), width=st.integers(1, 11), seed=st.integers(0, 10**6))
@settings(max_examples=120, deadline=None)
def test_weights_are_those_of_the_definition(bits, m, groups, width, seed):
    parts = drawn(bits, m, groups, width, seed, sparse=min(3, m * groups * width))
    for found in (
        without(parts, "table"),
        without(parts, "zero"),
        without(parts, "zero", "table", "positions", "values"),
    ):
        packed = Packed.of(found, bits)
        want = brute_force(found, bits)
        assert torch.equal(packed.dense(torch.float64), want.float().double())  # one rounding to float32
        x = torch.randn(2, groups * width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        x.requires_grad_()
        y = PackedMatmul.apply(x, *packed)
        assert torch.allclose(y.double(), x.double() @ want.T, atol=1e-4)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.allclose(grad.double(), want.sum(0).expand(2, -1), atol=1e-4)


@given(bits=st.sampled_from([2, 4, 8]), groups=st.integers(1, 3), width=st.integers(1, 9), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_few_tokens_see_the_zeros_and_the_outliers(bits, groups, width, seed):
    if kit.bag_kernel(bits) is None:
        return
    parts = drawn(bits, 6, groups, width, seed, sparse=4)
    found = without(parts, "table")
    packed = Packed.of(found, bits)
    x = torch.randn(3, groups * width, generator=torch.Generator().manual_seed(seed))
    y = kit.Columns.of(packed, packed.codes).linear(x, packed.scale, bits)
    assert torch.allclose(y.double(), x.double() @ brute_force(found, bits).T, atol=1e-5 * 4**bits)


def test_a_table_of_plain_codes_gives_plain_weights():
    for bits in kit.WIDTHS:
        parts = drawn(bits, 4, 2, 7, bits)
        table = torch.arange(2.0**bits) - 2 ** (bits - 1)
        same = Packed.of(without({**parts, "table": table}, "zero"), bits)
        assert torch.equal(same.dense(), Packed.of(without(parts, "zero", "table"), bits).dense())


# --- layers and models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_cls", [Affine, Table])
@pytest.mark.parametrize("bits", [3, 4])
def test_zeros_and_tables_live_in_the_layer(config_cls, bits):
    parts = drawn(bits, 6, 2, 4, 0, sparse=3)
    found = without(parts, "table" if config_cls is Affine else "zero")
    config = config_cls(bits=bits, group_size=4)
    plain = torch.nn.Linear(8, 6)
    layer = PackedLinear.of(plain, config, found).eval()
    want = brute_force(found, bits).float()
    assert torch.equal(layer.dequantize(), want) and layer.bias is plain.bias
    x = torch.randn(2, 8)
    with torch.no_grad():
        assert torch.allclose(layer(x), x @ want.T + plain.bias, atol=1e-3)
    again = PackedLinear(8, 6, True, config)
    names = {"weight_zero"} if config_cls is Affine else {"weight_table"}
    assert set(layer.state_dict()) == {"weight", "bias", "weight_scale", "outlier_idx", "outlier_val", *names}
    again.outlier_idx, again.outlier_val = torch.empty(3, dtype=torch.int32), torch.empty(3).half()
    again.load_state_dict(layer.state_dict())
    for other in (again, copy.deepcopy(layer), layer.to(torch.bfloat16).float()):
        assert torch.equal(other.dequantize(), want)


def test_a_map_gives_every_layer_its_bits_and_is_saved(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "plain")
    wanted = {"model.layers.0.self_attn.q_proj": 6, "model.layers.1.mlp.down_proj": 2, "model.layers.1.mlp.up_proj": 5}
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=EasyQuantConfig(bits=3, bits_map=wanted)
    )
    held = {name: m.config.bits for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert {name: bits for name, bits in held.items() if bits != 3} == wanted and len(held) == 14
    for name, bits in wanted.items():  # as if the whole model had these bits
        alone = EasyQuantConfig(bits=bits).quantize_weight(base.get_submodule(name).weight)
        assert torch.equal(model.get_submodule(name).dequantize(), Packed.of(alone, bits).dense())
    model.save_pretrained(tmp_path / "packed")
    assert json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]["bits_map"] == wanted
    ids = torch.arange(6)[None]
    with torch.no_grad():
        want = model(ids)
        again = LlamaForCausalLM.from_pretrained(tmp_path / "packed")
        assert torch.equal(again(ids).logits, want.logits)
        # The base of the model finds the names of the whole, and keeps them in its own.
        inner = LlamaModel.from_pretrained(tmp_path / "packed")
        assert torch.equal(inner(ids).last_hidden_state, model.model(ids).last_hidden_state)
        assert set(inner.config.quantization_config.bits_map) == {n.removeprefix("model.") for n in wanted}


def test_names_in_a_map_that_mean_nothing_are_refused(tmp_path):
    llama().save_pretrained(tmp_path)

    def load(**options):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=EasyQuantConfig(**options))

    with pytest.raises(ValueError, match=r"bits_map names 'model.layers.0.self_attn.qproj'.*did you mean .*q_proj"):
        load(bits_map={"model.layers.0.self_attn.qproj": 3})
    with pytest.raises(ValueError, match=r"bits_map names 'lm_head', which is kept in float \(head"):
        load(bits_map={"lm_head": 3})
    with pytest.raises(ValueError, match=r"bits_map\['a'\] is 7.*2, 3, 4, 5, 6"):
        EasyQuantConfig(bits_map={"a": 7})
    with pytest.raises(TypeError, match=r"bits_map is \['a'\]; give a dict"):
        EasyQuantConfig(bits_map=["a"])


@pytest.mark.parametrize(
    "make", [llama, lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))]
)
def test_an_adopted_model_is_what_loading_gives(make, tmp_path):
    """Packed layer by layer in memory: the same files, the same model after a reload, as by from_pretrained."""
    base = make().eval()
    base.save_pretrained(tmp_path / "plain")
    config = EasyQuantConfig(bits=4)
    want = type(base).from_pretrained(tmp_path / "plain", quantization_config=EasyQuantConfig(bits=4))
    want.save_pretrained(tmp_path / "want")
    layers = {}
    for i, (name, module) in enumerate(quantizable(base, config)[0].items()):
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        layers[name] = PackedLinear.of(module, config.for_layer(name), config.for_layer(name).quantize_weight(weight))
        if i % 2:  # as a calibration does that goes on with what it has
            base.set_submodule(name, layers[name])
    model = adopt(base, config, layers)
    assert model is base and model.hf_quantizer.quantized == want.hf_quantizer.quantized
    assert model.hf_quantizer.left_in_float == want.hf_quantizer.left_in_float
    model.save_pretrained(tmp_path / "found")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "want" / name).read_bytes() == (tmp_path / "found" / name).read_bytes()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(type(base).from_pretrained(tmp_path / "found")(ids).logits, model(ids).logits)
    assert not any(isinstance(m, PackedLinear) for m in model.dequantize().modules())


def test_adopting_a_layer_too_few_is_refused():
    base, config = llama(), EasyQuantConfig()
    with pytest.raises(ValueError, match=r"layers has 0 entries, the config quantises 14 layers"):
        adopt(base, config, {})


def test_weights_are_read_before_they_are_quantised(tmp_path):
    """Names as in the model, Conv1D as (out, in), in whichever class."""
    seen = {}

    class Looks(EasyQuantConfig):
        method = "test_looks"

        def before_reading(self, weights):
            seen.update(weights())
            seen["again"] = len(list(weights()))

    for base in (llama(), GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))):
        seen.clear()
        folder = tmp_path / type(base).__name__
        base.save_pretrained(folder)
        model = type(base).from_pretrained(folder, quantization_config=Looks())
        assert seen.pop("again") == len(seen) and set(seen) == set(model.hf_quantizer.quantized)
        for name, weight in seen.items():
            plain = base.get_submodule(name).weight
            assert torch.equal(weight, plain.T if type(base) is GPT2LMHeadModel else plain)
    torch.save(base.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="looks at all weights.*needs safetensors"):
        type(base).from_pretrained(folder, quantization_config=Looks())


def test_methods_that_need_data_say_so(tmp_path):
    class Calibrated(EasyQuantConfig):
        method, calibrated = "test_calibrated", True

    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"needs data.*--calib FILE.*config.calibrate\(model, rows\)"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=Calibrated())
    with pytest.raises(TypeError, match="EasyQuantConfig needs no data"):
        EasyQuantConfig().calibrate(llama(), [])


def test_files_of_the_first_format_have_no_new_tensors(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "plain")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=EasyQuantConfig(bits=4))
    found.save_pretrained(tmp_path / "packed")
    with safe_open(tmp_path / "packed/model.safetensors", "pt") as file:
        leaves = {key.rpartition(".")[2] for key in file.keys()}  # noqa: SIM118
    assert leaves == {"weight", "weight_scale", "outlier_idx", "outlier_val"}


def test_codes_beyond_four_bits_are_packed_in_planes():
    codes = torch.arange(32, dtype=torch.uint8)[None]
    assert torch.equal(pack(codes, 5)[:, :16], pack(codes & 15, 4)) and pack(codes, 5).shape == (1, 20)
    assert torch.equal(pack(codes, 6)[:, :16], pack(codes & 15, 4)) and pack(codes, 6).shape == (1, 24)
