"""NUPES and PowerQuant: levels and codes against brute force, the searches, learning, streaming, bad input."""

import json
import logging
import math
import traceback

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hfgen import sandbox
from hfgen.kit import streaming
from hfgen.kit.packing import WIDTHS, Packed, Quantized
from hfgen.kit.quantizer import PackedLinear
from hfgen.quantizers import NupesConfig
from hfgen.sandbox import quality
from hfgen_plugins.quantizers.nupes import evidence, power

BITS = pytest.mark.parametrize("bits", WIDTHS)
EXPONENTS = st.floats(0.25, 1.0)


def normal(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def students(m, n, df, seed=0):
    return torch.tensor(stats.t.rvs(df, size=(m, n), random_state=seed)).float()


def uniform(m, n):
    return torch.rand(m, n, generator=torch.Generator().manual_seed(0)) * 2 - 1


def restored(config, weight):
    found = config.quantize_checked(weight, "w")
    return Packed.of(found, config.bits).rows(0, weight.shape[0], torch.float32)


def squared(config, weight):
    return float((restored(config, weight) - weight).double().square().sum())


# --- levels and codes -----------------------------------------------------------------------------------------------


def formula(weight, a, bits, group=None):
    """The paper's operator in float64, weight by weight, with the largest |w| as float16 holds it; and how near to a tie."""
    top, rows = 2 ** (bits - 1) - 1, []
    size = group or weight.shape[1]
    ties = []
    for row in weight.double().reshape(-1, size).tolist():
        largest = float(torch.tensor(max(map(abs, row))).half()) or 1.0
        for w in row:
            u = min(abs(w) / largest, 1.0) ** a * top
            q = math.floor(u + 0.5)
            ties.append(abs(u - math.floor(u) - 0.5))
            rows.append(math.copysign(largest * (q / top) ** (1 / a), w) if q else 0.0)
    shape = weight.shape
    return torch.tensor(rows, dtype=torch.float64).view(shape), torch.tensor(ties).view(shape)


@given(
    bits=st.sampled_from(WIDTHS), a=EXPONENTS, m=st.integers(1, 4), n=st.integers(1, 20), grouped=st.booleans(),
    size=st.floats(1e-2, 1e3), seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_codes_and_table_are_the_papers_operator(bits, a, m, n, grouped, size, seed):
    group = n if grouped else None
    weight = normal(m, 2 * n if grouped else n, seed) * size
    want, ties = formula(weight, a, bits, group)
    config = NupesConfig(bits=bits, exponent=a, group_size=group)
    found = config.quantize_checked(weight, "w")
    clear = ties > 1e-3
    off = (Packed.of(found, bits).rows(0, m, torch.float32) - want).abs()[clear]
    assert (off <= 1e-6 * weight.abs().max()).all()
    assert found.codes.min() >= 1, "code 0 is used"
    assert found.scale.dtype == torch.float16 and found.table.dtype == torch.float32 and found.zero is None


@BITS
@pytest.mark.parametrize("a", [0.25, 0.5, 0.7, 1.0])
def test_the_table_is_symmetric_rises_and_ends_at_one(bits, a):
    table, top = power.table(a, bits), 2 ** (bits - 1) - 1
    assert table.shape == (2**bits,) and table[0] == table[1] == -1 == -table[-1] and table[top + 1] == 0
    assert torch.equal(table[1:], -table[1:].flip(0)) and (table[1:].diff() > 0).all()
    assert float(table[-2] if bits > 2 else 0) == pytest.approx(((top - 1) / top) ** (1 / a), rel=1e-6)


def test_codes_by_hand():
    """4 bit, a = 1/2: |q| = round(7 sqrt(t)), so half of the largest weight is read as (5/7)^2."""
    weight = torch.tensor([[1.0, -0.5, 0.0, 0.1, 0.004]])
    found = NupesConfig(exponent=0.5).quantize_checked(weight, "w")
    assert (found.codes.int() - 8).tolist() == [[7, -5, 0, 2, 0]] and found.scale.tolist() == [[1.0]]
    read = restored(NupesConfig(exponent=0.5), weight)
    assert torch.allclose(read, torch.tensor([[1, -25 / 49, 0, 4 / 49, 0]]))


def test_groups_have_scales_of_their_own():
    weight = torch.tensor([[1.0, -0.5, 8.0, 2.0]])
    found = NupesConfig(exponent=0.5, group_size=2).quantize_checked(weight, "w")
    assert found.scale.tolist() == [[1.0, 8.0]] and (found.codes.int() - 8).tolist() == [[7, -5, 7, 4]]


@given(bits=st.sampled_from(WIDTHS), a=EXPONENTS, seed=st.integers(0, 10**6), df=st.sampled_from([2.5, 4, 30]))
@settings(max_examples=60, deadline=None)
def test_nearest_level_is_never_worse_than_nearest_in_the_power_domain(bits, a, seed, df):
    weight = students(3, 50, df, seed)
    found = {r: NupesConfig(bits=bits, exponent=a, rounding=r) for r in ("power", "value")}
    assert squared(found["value"], weight) <= squared(found["power"], weight) * (1 + 1e-6)


@BITS
def test_nearest_level_is_the_nearest(bits):
    weight = students(4, 60, 3)
    found = NupesConfig(bits=bits, exponent=0.6, rounding="value").quantize_checked(weight, "w")
    levels = found.scale.double()[:, :, None] * power.table(0.6, bits).double()
    least = (weight.double()[:, :, None] - levels).abs().amin(2)
    read = Packed.of(found, bits).rows(0, 4, torch.float64)
    assert torch.allclose((read - weight).abs(), least, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("exponent", ["search", "per_layer", 0.5])
def test_half_precision_weights_are_read_as_they_are(dtype, exponent):
    weight, config = students(16, 64, 4).to(dtype), NupesConfig(exponent=exponent)
    for a, b in zip(config.quantize_checked(weight, "w"), config.quantize_checked(weight.float(), "w"), strict=True):
        assert (a is b is None) or torch.equal(a, b)


@pytest.mark.parametrize("exponent", ["search", "per_layer", 0.25, 1])
@pytest.mark.parametrize("rounding", ["power", "value"])
def test_zeros_tiny_rows_and_one_column(exponent, rounding):
    config = NupesConfig(bits=3, exponent=exponent, rounding=rounding)
    assert not restored(config, torch.zeros(3, 5)).any()
    weight = torch.stack([normal(1, 6)[0], torch.zeros(6), torch.full((6,), 1e-9)])
    read = restored(config, weight)  # the least scale that float16 holds is 6e-8
    assert torch.isfinite(read).all() and not read[1].any() and read[0].any() and read[2].abs().max() < 2e-9
    assert torch.allclose(restored(config, normal(4, 1)), normal(4, 1), rtol=2**-10)


def test_blocks_of_rows_change_nothing(monkeypatch):
    weight, config = students(50, 32, 4), NupesConfig(bits=3, exponent="per_layer", group_size=8)
    whole = config.quantize_checked(weight, "w")
    monkeypatch.setattr(power, "CHUNK", 8 * 7)
    for a, b in zip(config.quantize_checked(weight, "w"), whole, strict=True):
        assert (a is b is None) or torch.equal(a, b)


def test_a_scale_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"the weight of w reaches 1e\+05: its scale does not fit float16"):
        NupesConfig(exponent="per_layer").quantize_checked(torch.tensor([[1e5, 1.0]]), "w")


# --- the search -----------------------------------------------------------------------------------------------------


@BITS
@pytest.mark.parametrize("rounding", ["power", "value"])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_the_density_stands_for_the_weights(bits, rounding, p):
    weight = students(64, 256, 4)
    scale = power.scales(weight)
    density = power.density(weight, scale, p)
    for a in (0.3, 0.5, 0.75, 1.0):
        true = (
            float((restored(NupesConfig(bits=bits, exponent=a, rounding=rounding), weight) - weight).double().norm(p))
            ** p
        )
        assert power.error(weight, scale, a, bits, rounding, p) == pytest.approx(true, rel=1e-4)
        assert power.cost(density, a, bits, rounding, p) == pytest.approx(true, rel=3e-2 if bits == 8 else 5e-3)


@given(
    bits=st.sampled_from(WIDTHS), rounding=st.sampled_from(["power", "value"]), seed=st.integers(0, 10**6),
    df=st.sampled_from([2.5, 5, 100]), p=st.sampled_from([1.0, 2.0, 4.0]), n=st.integers(1, 60),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_searched_exponent_is_worse_than_uniform(bits, rounding, seed, df, p, n):
    weight, options = students(3, n, df, seed), {"bits": bits, "rounding": rounding}

    def off(exponent, **more):
        return float((restored(NupesConfig(exponent=exponent, **options, **more), weight) - weight).double().norm(p))

    assert off("per_layer", p=p) <= off(1.0) * (1 + 1e-6) and off("search", p=p) <= off(1.0) * (1 + 1e-6)
    assert off("per_layer", p=p, found_exponent=0.6) <= off(0.6) * (1 + 1e-6)


@pytest.mark.parametrize("exponent", ["search", "per_layer"])
def test_uniform_weights_want_the_uniform_grid_and_heavy_tails_do_not(exponent):
    config = NupesConfig(exponent=exponent)
    assert config._layer_exponent(uniform(128, 512)) > 0.995
    found = config._layer_exponent(students(128, 512, 3))
    brute = min(
        (a / 100 for a in range(25, 101)), key=lambda a: squared(NupesConfig(exponent=a), students(128, 512, 3))
    )
    assert abs(found - brute) < 0.02 and 0.3 < found < 0.6


@pytest.mark.parametrize(("df", "ratio"), [(5, 0.44), (3, 0.29)])
def test_the_square_root_on_student_t_rows(df, ratio):
    """256 rows of 1024, 4 bit: the mean squared error at a = 1/2 beside that at a = 1, in float64 by `formula` once."""
    weight = students(256, 1024, df) * 0.05
    found = squared(NupesConfig(exponent=0.5), weight) / squared(NupesConfig(exponent=1.0), weight)
    assert found == pytest.approx(ratio, abs=0.01)


def test_the_model_s_exponent_is_the_least_of_the_summed_norms():
    """Brute force over a grid of the sum that the paper writes; the large layer decides unless errors are relative."""
    layers = {"large": uniform(40, 200) * 100, "a": students(40, 200, 3), "b": students(40, 200, 4, 1)}

    def total(a, relative):
        sizes = {n: float(w.double().norm()) if relative else 1.0 for n, w in layers.items()}
        return sum(math.sqrt(squared(NupesConfig(exponent=a), w)) / sizes[n] for n, w in layers.items())

    found = {}
    for relative in (False, True):
        config = NupesConfig(relative=relative)
        config.before_reading(lambda: iter(layers.items()))
        found[relative] = config.found_exponent
        best = min((a / 100 for a in range(25, 101)), key=lambda a: total(a, relative))
        assert total(config.found_exponent, relative) <= 1.001 * total(best, relative)
    assert found[False] > 0.85 > 0.75 > found[True]


def test_every_layer_counts_with_its_own_bits():
    layers = {"a": students(40, 200, 3), "b": students(40, 200, 4, 1)}
    found = []
    for bits_map in (None, {"a": 2, "b": 2}):
        config = NupesConfig(bits=6, bits_map=bits_map)
        config.before_reading(lambda: iter(layers.items()))
        found.append(config.found_exponent)
    same = NupesConfig(bits=2)
    same.before_reading(lambda: iter(layers.items()))
    assert found[0] != found[1] == same.found_exponent


def test_weights_are_read_twice_and_one_at_a_time():
    calls = []

    def weights():
        calls.append("pass")
        for name in ("a", "b"):
            calls.append(name)
            yield name, normal(4, 8)

    NupesConfig().before_reading(weights)
    assert calls == ["pass", "a", "b"] * 2
    NupesConfig(exponent=0.5).before_reading(weights)
    assert len(calls) == 6


# --- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_are_those_of_the_formula(bits):
    """To a: finite differences of the levels. To u: of |u|^(1/a) where |u| >= 1, and the slope at 1 below, never 0."""
    top, a, h = 2 ** (bits - 1) - 1, torch.tensor(0.6, dtype=torch.float64, requires_grad=True), 1e-6
    u = (torch.linspace(-1, 1, 41, dtype=torch.float64) * top).requires_grad_()
    v = normal(1, 41)[0].double()
    read = power.decode(u, a, bits)
    assert torch.allclose(read.float(), power.table(0.6, bits)[(u.round() + top + 1).int()], atol=1e-6)
    to_u, to_a = torch.autograd.grad((read * v).sum(), (u, a))

    def levels(exponent):
        q = u.detach().round()
        return (q.sign() * (q.abs() / top) ** (1 / exponent) * v).sum()

    assert float(to_a) == pytest.approx(float(levels(0.6 + h) - levels(0.6 - h)) / (2 * h), rel=1e-5, abs=1e-9)
    at = u.detach().abs().clamp_min(1)
    difference = (((at + h) / top) ** (1 / 0.6) - ((at - h) / top) ** (1 / 0.6)) / (2 * h)
    assert torch.allclose(to_u, difference * v, rtol=1e-5) and to_u.isfinite().all() and (to_u != 0).all()


@given(bits=st.sampled_from([2, 3, 4, 8]), a=EXPONENTS, rounding=st.sampled_from(["power", "value"]))
@settings(max_examples=40, deadline=None)
def test_latent_codes_begin_in_the_cells_of_the_data_free_ones(bits, a, rounding):
    weight = students(5, 40, 3)
    scale = power.scales(weight)
    codes = power.encode(weight, scale, a, bits, rounding)
    u = power.latent(weight, scale, codes, a, bits)
    assert torch.equal(u.round() + 2 ** (bits - 1), codes.float()) and u.abs().max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("tokens", [3, 50])
def test_the_root_keeps_every_output_error(tokens):
    x, d = normal(tokens, 7).double(), normal(2, 7, 1).double()
    root = power.root(x)
    assert len(root) == min(tokens, 7)
    assert torch.allclose((root @ d.T).square().sum(0), (x @ d.T).square().sum(0))


def correlated(tokens, n):
    """Inputs that nearly lie in a third of the dimensions: what rounds away can be made good by other weights."""
    return normal(tokens, n // 3) @ normal(n // 3, n, 9) + 0.1 * normal(tokens, n, 4)


def parts(x):
    return x[len(x) // 4 :], x[: len(x) // 4]


def learnt(weight, x, bits=3, steps=200, a=0.7, **options):
    scale = power.scales(weight)
    codes = power.encode(weight, scale, a, bits, "power")
    options = {"lr": 2e-3, "lr_a": 1e-3} | options
    return scale, codes, power.learn(weight, scale, codes, a, bits, parts(x), steps, **options)


def test_learning_lowers_the_output_error_leaves_cells_and_says_what_it_did():
    weight, x = students(12, 24, 4), correlated(400, 24)
    scale, codes, found = learnt(weight, x)
    held = parts(x)[1]

    def off(codes, a):
        return float((held @ (power.table(a, 3)[codes.int()] * scale.float() - weight).T).square().sum())

    assert found.before == pytest.approx(off(codes, 0.7), rel=1e-3)
    assert found.after == pytest.approx(off(found.codes, found.a), rel=1e-3)
    assert found.after < 0.7 * found.before
    moved = (found.codes.int() - codes.int()).abs()
    assert moved.max() >= 1 and found.codes.min() >= 1 and found.codes.dtype == torch.uint8
    assert found.a != 0.7 and 0.25 <= found.a <= 1


def test_codes_cross_the_whole_grid():
    """NUPES's point: not up or down by one only. From codes of 0 everywhere, and from those of -w."""
    weight, x = students(8, 16, 4), normal(200, 16)
    scale = power.scales(weight)
    good = power.encode(weight, scale, 0.7, 4, "power")
    for codes in (torch.full_like(good, 8), 16 - good):
        found = power.learn(weight, scale, codes, 0.7, 4, (x, x), 600, 5e-2, 1e-3)
        assert (found.codes.int() - codes.int()).abs().max() > 5 and found.after < 0.1 * found.before


def test_the_exponent_moves_to_where_its_codes_want_it():
    """Codes stay; the least of the error over exponents, by brute force, is nearer than the start."""
    weight, x = students(16, 32, 4), normal(300, 32)
    scale = power.scales(weight)
    codes = power.encode(weight, scale, 0.5, 4, "power")
    found = power.learn(weight, scale, codes, 0.6, 4, (x, x), 300, 1e-12, 1e-2)

    def off(a):
        return float((x @ (power.table(a, 4)[codes.int()] * scale.float() - weight).T).square().sum())

    best = min((i / 1000 for i in range(300, 800)), key=off)
    assert found.a == pytest.approx(best, abs=5e-3) and abs(best - 0.6) > 0.05 and found.after < 0.9 * found.before


def test_what_held_out_inputs_do_not_confirm_is_dropped():
    """Few inputs to learn from, quite other ones held out."""
    weight = students(8, 32, 4)
    scale = power.scales(weight)
    codes = power.encode(weight, scale, 0.7, 4, "power")
    inputs = (correlated(4, 33)[:, :32], normal(200, 32, 5))
    found = power.learn(weight, scale, codes, 0.7, 4, inputs, 100, 1e-1, 1e-3)
    assert torch.equal(found.codes, codes) and found.a == 0.7 and found.after == found.before


def test_without_inputs_or_weights_nothing_is_learnt():
    for weight, x in ((students(3, 4, 4), torch.zeros(0, 4)), (torch.zeros(3, 4), normal(40, 4))):
        _, codes, found = learnt(weight, x)
        assert torch.equal(found.codes, codes) and found.before == found.after == 0


# --- models ---------------------------------------------------------------------------------------------------------


def llama(**changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, vocab_size=32, **sizes, **changes)).eval()
    return spread(model)


def spread(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    return model


ROWS = [{"input_ids": torch.randint(0, 32, (9,), generator=torch.Generator().manual_seed(i))} for i in range(40)]
TOKENS = torch.arange(2, 12)[None]


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def packed(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(out)
    return out


def tensors(folder):
    from safetensors.torch import load_file

    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


@pytest.mark.parametrize("exponent", ["search", "per_layer", 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_in_memory_and_reloaded_are_bit_equal(folder, exponent, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "STEP", 1500)
    options = {"exponent": exponent, "bits": 3, "group_size": 8, "bits_map": {"model.layers.1.mlp.up_proj": 6}}
    if dtype == torch.bfloat16:
        source = tmp_path / "half"
        llama().to(dtype).save_pretrained(source)
        folder = source
    in_memory = LlamaForCausalLM.from_pretrained(folder, quantization_config=NupesConfig(**options))
    in_memory.save_pretrained(tmp_path / "memory")
    streaming.quantize_folder(folder, NupesConfig(**options), tmp_path / "out", 4000, lambda *counts: None)
    a, b = tensors(tmp_path / "out"), tensors(tmp_path / "memory")
    assert set(a) == set(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
    raw = [json.loads((tmp_path / d / "config.json").read_text())["quantization_config"] for d in ("out", "memory")]
    assert raw[0] == raw[1] and (raw[0]["found_exponent"] is None) == (exponent == 0.5)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(in_memory)) and len(packed(again)) == 14
    config = again.config.quantization_config
    assert config.found_exponent == in_memory.config.quantization_config.found_exponent
    up = packed(again)["model.layers.1.mlp.up_proj"]
    assert up.weight_table.shape == (64,) and up.config.found_exponent == config.found_exponent


def test_a_model_has_one_exponent_and_each_layer_one_of_its_own(folder):
    def tables(exponent):
        model = LlamaForCausalLM.from_pretrained(folder, quantization_config=NupesConfig(exponent=exponent))
        return model.config.quantization_config, {tuple(m.weight_table.tolist()) for m in packed(model).values()}

    config, one = tables("search")
    assert len(one) == 1 and one == {tuple(power.table(config.found_exponent, 4).tolist())}
    assert len(tables("per_layer")[1]) > 7


def test_no_layer_has_more_error_than_with_the_model_s_exponent(folder):
    plain = llama()
    found = {}
    for exponent in ("per_layer", "search", 1.0):
        model = LlamaForCausalLM.from_pretrained(folder, quantization_config=NupesConfig(bits=3, exponent=exponent))
        found[exponent] = [
            float((m.dequantize() - plain.get_submodule(n).weight).norm()) for n, m in packed(model).items()
        ]
    for other in ("search", 1.0):
        assert all(a <= b * (1 + 1e-6) for a, b in zip(found["per_layer"], found[other], strict=True))
    assert sum(found["search"]) <= sum(found[1.0])


def test_a_weight_with_nan_is_named_before_anything_is_searched(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the weight of model.layers.1.mlp.up_proj holds NaN or Inf"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=NupesConfig())


def test_a_merge_keeps_the_model_s_exponent(folder):
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=NupesConfig())
    layer = packed(model)["model.layers.0.mlp.up_proj"]
    before = layer.weight_table.clone()
    layer.requantize(students(24, 16, 3))
    assert torch.equal(layer.weight_table, before)


@pytest.mark.parametrize("bits", [3, 4])
def test_learned_layers_save_and_reload_bit_equal(bits, tmp_path):
    model, counts = llama(), []
    config = NupesConfig(exponent="learned", bits=bits, steps=30, bits_map={"model.layers.0.mlp.up_proj": 6})
    found = config.calibrate(model, ROWS, lambda *c: counts.append(c))
    assert found is model and counts[-1] == (14, 14) and len(packed(found)) == 14
    account = found.hf_quantizer.calibration
    assert set(account["layers"]) == set(packed(found)) and account["reused"] == 0
    for name, note in account["layers"].items():
        better = note["after"] < note["before"]
        assert (
            note["after"] <= note["before"]
            and note["reverted"] is not better
            and (name in account["reverted"]) is not better
        )
    assert len(account["reverted"]) < 14
    assert packed(found)["model.layers.0.mlp.up_proj"].config.bits == 6
    found.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(found)) and again.config.quantization_config == config
    merged = packed(again)["model.layers.0.mlp.up_proj"]
    merged.requantize(normal(24, 16))  # without data: as exponent="per_layer"
    want = NupesConfig(exponent="per_layer", bits=6).quantize_checked(normal(24, 16), "w")
    assert torch.equal(merged.weight_table, want.table)


def test_an_interrupted_calibration_goes_on_and_ends_the_same(tmp_path):
    def run(**changes):
        config = NupesConfig(exponent="learned", bits=3, steps=20)
        return config.calibrate(**{"model": llama(), "rows": ROWS, "partial": tmp_path / "p"} | changes)

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)
    with pytest.raises(ValueError, match="holds an interrupted run with another rows"):
        run(rows=ROWS[1:])
    with pytest.raises(ValueError, match="holds an interrupted run with another model"):
        run(model=spread(llama(), 1))
    whole, again = run(partial=None), run()
    assert again.hf_quantizer.calibration["reused"] >= 4
    for name, tensor in whole.state_dict().items():
        assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(again.state_dict()[name])), name
    assert whole.hf_quantizer.calibration["layers"] == again.hf_quantizer.calibration["layers"]


def test_conv1d_layers_and_biases_are_learned():
    model = spread(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16))).eval()
    bias = model.transformer.h[0].mlp.c_fc.bias
    want = logits(model)
    found = NupesConfig(exponent="learned", bits=8, steps=20).calibrate(model, ROWS)
    assert len(packed(found)) == 4 and float((logits(found) - want).norm() / want.norm()) < 0.02
    assert found.transformer.h[0].mlp.c_fc.bias is bias


def test_learning_is_closer_to_the_model_than_its_start(tmp_path, caplog):
    """On the sandbox's model at 3 bit, by the distance of next-token distributions on rows it has not seen."""
    base = sandbox.load_model()
    rows = quality.rows(100, 64)
    learned = NupesConfig(exponent="learned", bits=3, steps=100).calibrate(sandbox.load_model(), rows)
    start = sandbox.load_model(quantization_config=NupesConfig(exponent="per_layer", bits=3))
    found = [quality.answers_kl(m, base, 100, 100) for m in (learned, start)]
    assert found[0] < 0.8 * found[1], found


def test_layers_that_learnt_nothing_are_named(caplog):
    with caplog.at_level(logging.WARNING, "hfgen"):
        NupesConfig(exponent="learned", steps=1, lr=3.0).calibrate(llama(), ROWS)
    assert "layers learnt nothing that held-out rows confirm; they stay data-free: model.layers." in caplog.text


def test_learned_on_the_fly_is_refused_with_the_way(folder):
    with pytest.raises(
        ValueError, match=r"hfgen quantize MODEL --method nupes --calib FILE.*config.calibrate\(model, rows\)"
    ):
        LlamaForCausalLM.from_pretrained(folder, quantization_config=NupesConfig(exponent="learned"))
    with pytest.raises(TypeError, match="NupesConfig needs no data"):
        NupesConfig().calibrate(llama(), ROWS)


@pytest.mark.parametrize(
    ("rows", "words"),
    [([{"text": "a"}] * 9, "calibration row 0 has text; give dicts with input_ids"), (ROWS[:2], "hold 18 tokens")],
)
def test_wrong_or_too_few_rows(rows, words):
    with pytest.raises(ValueError, match=words):
        NupesConfig(exponent="learned").calibrate(llama(), rows)


# --- the claim ------------------------------------------------------------------------------------------------------


def logs(**arms):
    base = {"float": [0.1, 0.11, 0.12], "rtn": [0.5, 0.51, 0.52], "per_layer": [0.4, 0.41, 0.42]}
    values = dict.fromkeys(evidence.OPTIONS, base["per_layer"]) | base | arms
    return {arm: {m: [math.exp(v) for v in seeds] for m in evidence.MODELS} for arm, seeds in values.items()}


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (logs(learned=[0.3, 0.31, 0.32]), {"search": "reproduced", "learned": "reproduced"}),
        (logs(learned=[0.45, 0.46, 0.47]), {"search": "reproduced", "learned": "partly"}),
        (logs(search=[0.6, 0.61, 0.62]), {"search": "not reproduced", "per_layer": "reproduced"}),
        (logs(rtn=[0.0, 0.2, 0.1]), {"search": "void", "learned": "void"}),
    ],
)
def test_verdicts(samples, expected):
    found = {v.arm: v.verdict for v in evidence.judge(samples, evidence.SETTINGS)}
    assert set(found) == {"search", "per_layer", "per_layer_value", "learned"}
    assert expected.items() <= found.items(), found


def test_the_experiment_runs_and_codes_have_equal_bits():
    cut = evidence.EXPERIMENT.smoke_settings
    found = {a.id: evidence.run_arm(a.id, 1000, cut, lambda *_: None) for a in evidence.ARMS}
    for name, bits in cut.bits.items():
        stored = {arm: values[f"bits_{name}"] for arm, values in found.items()}
        assert stored["float"] == 32 and bits < stored["rtn"] < stored["search"] < stored["rtn"] + 0.1
        assert stored["search"] == stored["per_layer"] == stored["per_layer_value"] == stored["learned"]
    assert all(math.isfinite(v) for values in found.values() for v in values.values())


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"exponent": "serach"}, ValueError, r"NupesConfig.exponent is 'serach'; did you mean 'search'\?"),
        ({"exponent": 0.2}, ValueError, r"NupesConfig.exponent is 0.2; give a number from 0.25 to 1"),
        ({"exponent": 1.5}, ValueError, r"NupesConfig.exponent is 1.5"),
        ({"exponent": float("nan")}, ValueError, r"NupesConfig.exponent is nan"),
        ({"exponent": True}, TypeError, r"NupesConfig.exponent is True"),
        ({"exponent": None}, TypeError, r"NupesConfig.exponent is None"),
        ({"rounding": "up"}, ValueError, r"NupesConfig.rounding is 'up'"),
        ({"exponent": 0.5, "p": 2.0}, ValueError, r"NupesConfig.p is 2.0 but only a search of the exponent reads it"),
        ({"p": 0}, ValueError, r"NupesConfig.p is 0"),
        ({"relative": 1}, TypeError, r"NupesConfig.relative is 1"),
        ({"exponent": "per_layer", "relative": True}, ValueError, r"relative is True but only exponent='search'"),
        ({"steps": 5}, ValueError, r"NupesConfig.steps is 5 but only exponent='learned' reads it"),
        ({"exponent": "learned", "steps": 0}, ValueError, r"NupesConfig.steps is 0"),
        ({"exponent": "learned", "lr": -1.0}, ValueError, r"NupesConfig.lr is -1"),
        ({"exponent": "learned", "found_exponent": 0.5}, ValueError, r"NupesConfig.found_exponent is 0.5 but only"),
        ({"found_exponent": 0.1}, ValueError, r"NupesConfig.found_exponent is 0.1"),
        ({"bits": 7}, ValueError, r"NupesConfig.bits is 7"),
        ({"bits_map": {"a": 9}}, ValueError, r"NupesConfig.bits_map\['a'\] is 9"),
        ({"expo": 1}, TypeError, r"'expo'; did you mean 'exponent'\?"),
    ],
)
def test_bad_options_are_named(options, error, words):
    with pytest.raises(error, match=words) as caught:
        NupesConfig(**options)
    assert "/hfgen" in traceback.extract_tb(caught.value.__traceback__)[-1].filename


def test_the_options_json_keeps():
    for config in (
        NupesConfig(exponent=1, bits=3),
        NupesConfig(found_exponent=0.7123, relative=True, p=3.0),
        NupesConfig(exponent="learned", steps=7, rounding="value"),
    ):
        assert NupesConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_packed_layers_hold_the_table():
    layer = PackedLinear.of(nn.Linear(8, 4), NupesConfig(), NupesConfig().quantize_checked(normal(4, 8), "w"))
    assert isinstance(layer.packed(), Packed) and layer.weight_table.shape == (16,)
    held = Quantized(*NupesConfig().quantize_checked(normal(4, 8), "w"))
    assert torch.equal(layer.dequantize(), Packed.of(held, 4).rows(0, 4, torch.float32))
