"""EasyQuant and the packed format: exact mathematics, layout, properties, quality and bad input."""

import copy
import io
import math
import pickle
import traceback

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hfgen import sandbox
from hfgen.kit import packing as kit
from hfgen.kit.packing import pack, packed_shape, unpack
from hfgen.kit.quantizer import PackedLinear, PackedWeight
from hfgen.quantizers import EasyQuantConfig
from hfgen.sandbox import tasks
from hfgen_plugins.quantizers.easyquant import easyquant as eq

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
RTN = {"n_sigma": None, "optimizer": "none"}


def normal(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def heavy(m, n, seed=0):
    """Normal weights with one in a thousand ten times as large."""
    weight = normal(m, n, seed)
    big = torch.rand(m, n, generator=torch.Generator().manual_seed(seed + 1)) < 1e-3
    return torch.where(big, 10 * weight, weight)


def restored(config, weight):
    found = config.quantize_checked(weight, "w")
    parts = (found.scale, found.positions, found.values)
    return kit.Packed(pack(found.codes, config.bits), *parts, config.bits, weight.shape[1]).rows(
        0, weight.shape[0], torch.float32
    )


def relative(config, weight):
    return float((restored(config, weight) - weight).square().sum() / weight.square().sum())


def layer_of(weight, bias=False, **options):
    layer = PackedLinear(weight.shape[1], weight.shape[0], bias, EasyQuantConfig(**options))
    layer.requantize(weight)
    return layer


# --- the format -----------------------------------------------------------------------------------------------------


@given(bits=st.sampled_from([2, 3, 4, 5, 6, 8]), m=st.integers(1, 5), n=st.integers(1, 37), seed=st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_unpack_inverts_pack_and_no_shape_is_plain(bits, m, n, seed):
    codes = torch.randint(0, 2**bits, (m, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous() and packed.shape == packed_shape(m, n, bits)
    assert torch.equal(unpack(packed, bits, n), codes)
    assert packed.shape not in ((m, n), (n, m))
    half = -(-n // 2)
    width = {2: -(-n // 4), 3: 3 * -(-n // 8), 4: half, 5: half + -(-n // 8), 6: half + -(-n // 4), 8: n}[bits]
    assert packed.numel() == m * width
    if bits not in kit.PLANES:  # whose planes are padded each for itself
        whole = unpack(packed, bits, packed.numel() // m * 8 // bits)
        assert (whole[:, n:] == 2 ** (bits - 1)).all(), "padding is not the code of 0"


@given(bits=st.sampled_from([2, 3, 4, 5, 6, 8]), m=st.integers(1, 4), n=st.integers(1, 30), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_levels_by_table_and_by_shifts_are_the_codes_less_their_zero(bits, m, n, seed):
    codes = torch.randint(0, 2**bits, (m, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    want = codes.float() - 2 ** (bits - 1)
    assert torch.equal(kit.levels(pack(codes, bits), bits, n), want)
    if bits in (2, 4):  # what CUDA takes
        assert torch.equal(kit._looked_up(pack(codes, bits), kit._table(bits, codes.device))[:, :n], want)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "KERNELS", {})
        assert torch.equal(kit.levels(pack(codes, bits), bits, n), want)


@given(
    bits=st.sampled_from([2, 4, 8]), m=st.integers(1, 4), groups=st.integers(1, 3), width=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_kernel_makes_the_same_weights_bit_for_bit(bits, m, groups, width, seed):
    """For every scale that float16 holds: the kernel's own scale and bias have no wider range."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (m, groups * width), generator=generator, dtype=torch.uint8)
    scale = torch.randint(1, 31744, (m, groups), generator=generator, dtype=torch.int16).view(torch.float16)
    parts = kit.Packed(pack(codes, bits), scale, None, None, bits, groups * width)
    want = (codes.double().view(m, groups, width) - 2 ** (bits - 1)) * scale[..., None].double()
    assert torch.equal(parts.rows(0, m, torch.float64), want.view(m, -1))


def test_the_layout_is_the_documented_one():
    assert pack(torch.tensor([[1, 2, 15]], dtype=torch.uint8), 4).tolist() == [[1 + 2 * 16, 15 + 8 * 16]]
    assert pack(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 2).tolist() == [[1 + 2 * 4 + 3 * 16]]
    eight = [1, 2, 3, 4, 5, 6, 7, 0]
    word = sum(code << (3 * i) for i, code in enumerate(eight))
    assert bytes(pack(torch.tensor([eight], dtype=torch.uint8), 3)[0].tolist()) == word.to_bytes(3, "little")
    five = pack(torch.tensor([[1, 18, 31]], dtype=torch.uint8), 5)  # low nibbles 1, 2, 15, then the fifth bits 0, 1, 1
    assert five.tolist() == [[[1 + 2 * 16], [15 + 0 * 16], [0b11111110]]]
    six = pack(torch.tensor([[1, 18, 63, 32]], dtype=torch.uint8), 6)
    assert six.tolist() == [[1 + 2 * 16, 15, 0 + 1 * 4 + 3 * 16 + 2 * 64]]
    assert pack(torch.tensor([[7, 200]], dtype=torch.uint8), 8).tolist() == [[[7], [200]]]


@BITS
@pytest.mark.parametrize("group_size", [None, 5])
def test_chunks_of_rows_change_nothing(bits, group_size, monkeypatch):
    weight = heavy(9, 15)
    layer = layer_of(weight, bias=True, bits=bits, group_size=group_size, n_sigma=1.5)
    assert len(layer.outlier_idx) > 3
    x = normal(4, 15, 2).requires_grad_()
    seen = []
    for chunk in (2**22, 15, 40):
        monkeypatch.setattr(kit, "CHUNK", chunk)
        y = layer(x)
        seen.append((layer.dequantize(), y, torch.autograd.grad(y.square().sum(), x)[0]))
    dense = x @ seen[0][0].T + layer.bias
    assert torch.allclose(seen[0][1], dense, atol=1e-5)
    assert torch.allclose(seen[0][2], torch.autograd.grad(dense.square().sum(), x)[0], atol=1e-4)
    for found in seen[1:]:
        assert torch.equal(found[0], seen[0][0])
        assert torch.allclose(found[1], seen[0][1], atol=1e-5) and torch.allclose(found[2], seen[0][2], atol=1e-4)


FAST = pytest.mark.parametrize("bits", [2, 4, 8])


@FAST
@pytest.mark.parametrize("group_size", [None, 5])
@pytest.mark.parametrize("n_sigma", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_tokens_at_inference_are_near_the_dense_product(bits, group_size, n_sigma, dtype, monkeypatch):
    """Within 2e-6 of a row's largest possible sum of products, and what the dtype rounds: odd widths, chunks, biases."""
    weight = heavy(11, 15)
    layer = layer_of(weight, bias=True, bits=bits, group_size=group_size, n_sigma=n_sigma).eval()
    monkeypatch.setattr(kit, "CHUNK", 60)
    largest = layer.dequantize(torch.float64).abs() + 2**bits * layer.weight_scale.double().amax(1, keepdim=True)
    for shape in ((15,), (1, 15), (2, 2, 15)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.no_grad():
            y = layer(x)
        assert layer._columns is not None and y.dtype == dtype
        want = x.double() @ layer.dequantize(torch.float64).T + layer.bias.double()
        near = 2e-6 * x.double().abs() @ largest.T + 2 * torch.finfo(dtype).eps * (want.abs() + layer.bias.abs())
        assert y.shape == want.shape and ((y.double() - want).abs() <= near).all()


@FAST
def test_an_outlier_replaces_its_code_also_where_that_is_not_zero(bits):
    """EasyQuant writes the code of 0 there; another method need not."""
    codes = torch.randint(0, 2**bits, (6, 15), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[2, 3] = 0
    where, values = torch.tensor([2 * 15 + 3, 5 * 15 + 14], dtype=torch.int32), torch.tensor([3.0, -4.0]).half()
    packed = kit.Packed(pack(codes, bits), torch.ones(6, 1).half(), where, values, bits, 15)
    x = normal(2, 15, 1)
    y = kit.Columns.of(packed, codes).linear(x, packed.scale, bits)
    assert torch.allclose(y, x @ packed.rows(0, 6, torch.float32).T, atol=1e-6 * 4**bits)


def test_only_few_tokens_at_inference_leave_the_exact_path():
    layer = layer_of(heavy(6, 16))
    few, many = normal(kit.FEW, 16, 1), normal(kit.FEW + 1, 16, 1)
    exact = kit.PackedMatmul.apply(few, *layer.packed())
    for x, mode, grad in ((few, True, False), (few, False, True), (many, False, False), (few.double(), False, False)):
        with torch.set_grad_enabled(grad):
            y = layer.train(mode)(x)
        assert layer._columns is None
        assert x is not few or torch.equal(y, exact)
    plain = layer_of(heavy(6, 16), bits=3).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(few).dtype == torch.bfloat16 and layer._columns is None
    with torch.no_grad():
        assert torch.equal(plain(few), kit.PackedMatmul.apply(few, *plain.packed()))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, other: layer.requantize(other.dequantize()),
        lambda layer, other: layer.load_state_dict(other.state_dict()),
        lambda layer, other: layer.__setstate__(copy.deepcopy(other.__getstate__())),
        lambda layer, other: setattr(layer, "weight", other.weight),
        lambda layer, other: layer.weight_scale.mul_(2),
    ],
)
def test_inference_sees_every_change_of_the_weight(change):
    options = {"n_sigma": None}
    layer, other, x = layer_of(normal(6, 16), **options).eval(), layer_of(normal(6, 16, 1), **options), normal(1, 16, 2)
    with torch.no_grad():
        before = layer(x)
        change(layer, other)
        after = layer.eval()(x)
        assert layer._columns is not None and not torch.equal(after, before)
        assert torch.allclose(after, x @ layer.dequantize().T, atol=1e-4)


def test_training_saving_copying_and_moving_drop_what_inference_keeps():
    layer, x = layer_of(normal(6, 16)).eval(), normal(1, 16, 2)
    drops = (layer.train, layer.state_dict, layer.double, lambda: layer.requantize(normal(6, 16)))
    for drop in drops:
        with torch.no_grad():
            layer.eval()(x)
        kept = layer._columns
        assert kept.table.nbytes == layer.weight.nbytes + 4 * 16
        assert copy.deepcopy(layer)._columns is None is pickle.loads(pickle.dumps(layer))._columns
        drop()
        assert layer._columns is None


def test_a_bias_trains_and_the_codes_do_not():
    layer = layer_of(normal(3, 4), bias=True)
    layer(torch.ones(2, 4)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((3,), 2.0)) and layer.weight.grad is None
    assert not layer.weight.requires_grad


def test_double_precision_and_checked_gradient():
    layer = layer_of(normal(3, 4), n_sigma=1.0)
    x = normal(2, 4, 1).double().requires_grad_()
    assert layer(x).dtype == torch.float64 and torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: w.data + torch.ones(3, 2),
        lambda w: w.data.clone().add_(1),
        lambda w: w.float(),
        lambda w: w.to(torch.bfloat16),
        lambda w: torch.linalg.vector_norm(w.float()),
        lambda w: nn.functional.linear(torch.ones(2, 2), w),
        lambda w: 2.0 * w,
    ],
)
def test_nothing_computes_with_codes(compute):
    layer = layer_of(normal(3, 4))
    assert isinstance(layer.weight, PackedWeight)
    before = layer.weight.tolist()
    with pytest.raises(ValueError, match="packed codes, not weights.*dequantize"):
        compute(layer.weight)
    assert layer.weight.tolist() == before


def test_saved_codes_are_plain_tensors_and_copies_are_sealed():
    layer = layer_of(normal(3, 4))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["weight"], layer.packed().codes)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied.weight) is PackedWeight and copied.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(copied.dequantize(), layer.dequantize())


def test_half_precision_gradients_add_up_over_chunks(monkeypatch):
    layer = layer_of(normal(64, 15))
    x = normal(4, 15, 2).bfloat16().requires_grad_()
    whole = torch.autograd.grad(layer(x).float().sum(), x)[0]
    monkeypatch.setattr(kit, "CHUNK", 15)
    rows = torch.autograd.grad(layer(x).float().sum(), x)[0]
    assert whole.dtype == rows.dtype == torch.bfloat16
    assert torch.allclose(whole.float(), rows.float(), rtol=2**-7, atol=0.05)


def test_integer_activations_are_refused():
    with pytest.raises(TypeError, match="uint8.*modules_to_not_convert"):
        layer_of(normal(3, 4))(torch.ones(2, 4, dtype=torch.uint8))


# --- the mathematics ------------------------------------------------------------------------------------------------


def exact_optimum(row, bits):
    """Brute force in float64: r(s) is quadratic between breakpoints |w| / (k + 1/2); the least over all pieces."""
    w = row.double()
    steps = torch.arange(0, 2 ** (bits - 1), dtype=torch.float64) + 0.5
    breaks = (w.abs()[:, None] / steps).flatten()
    breaks = breaks[breaks > 0].unique()
    edges = torch.cat([breaks[:1] / 2, breaks, breaks[-1:] * 2])
    middle = (edges[1:] + edges[:-1]) / 2

    def code(scale):
        return torch.clamp(torch.round(w / scale[:, None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    q = code(middle)
    best = torch.where(q.any(1), (q * w).sum(1) / q.square().sum(1).clamp_min(1), middle).clamp_min(1e-9)
    return min(float(((code(s) * s[:, None] - w) ** 2).sum(1).min()) for s in (middle, best))


@pytest.mark.parametrize(("bits", "mean", "worst"), [(2, 1.001, 1.01), (3, 1.002, 1.05), (4, 1.005, 1.1)])
@pytest.mark.parametrize("make", [normal, heavy])
def test_the_grid_reaches_the_exact_optimum(bits, mean, worst, make):
    rows = make(24, 96)
    found = eq.error(rows, eq.grid_scale(rows, bits), bits)[:, 0].double()
    exact = torch.tensor([exact_optimum(row, bits) for row in rows], dtype=torch.float64)
    ratio = found / exact
    assert ratio.min() > 1 - 1e-4, "the oracle is not the optimum"
    assert ratio.mean() < mean and ratio.max() < worst, (ratio.mean(), ratio.max())


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    n=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    size=st.floats(1e-4, 1e3),
)
@settings(max_examples=60, deadline=None)
def test_no_search_is_worse_than_its_start_and_all_scale_with_the_weights(bits, n, seed, size):
    rows = normal(3, n, seed) * size
    start = eq.error(rows, eq.start_scale(rows, bits), bits)
    for scale in (eq.grid_scale(rows, bits), eq.adam_scale(rows, bits, 10, 1.3e-2)):
        assert (scale > 0).all() and (eq.error(rows, scale, bits) <= start).all()
    twice = eq.grid_scale(2 * rows, bits)  # a power of two: exact
    assert torch.equal(twice, 2 * eq.grid_scale(rows, bits))


def test_adam_gets_near_the_optimum_in_the_papers_hundred_steps():
    rows = normal(24, 96)
    exact = torch.tensor([exact_optimum(row, 3) for row in rows])
    ratio = eq.error(rows, eq.adam_scale(rows, 3, 100, 1.3e-2), 3)[:, 0] / exact
    start = eq.error(rows, eq.start_scale(rows, 3), 3)[:, 0] / exact
    assert ratio.mean() < 1.1 < 1.4 < start.mean()


def test_the_gradient_is_the_clamped_one():
    """Against finite differences in float64; the form printed in the paper (codes not clamped) is not it."""
    rows, bits = normal(1, 64).double(), 3
    scale = torch.tensor([[float(rows.abs().max()) / 5]], dtype=torch.float64)  # clips
    h = 1e-7
    difference = (eq.error(rows, scale + h, bits) - eq.error(rows, scale - h, bits)) / (2 * h)
    found = eq.error_gradient(rows, scale, bits)
    q = torch.round(rows / scale)
    printed = 2 * ((scale * q - rows) * q).sum()
    assert torch.allclose(found, difference, rtol=1e-4)
    assert abs(float(printed - difference)) > 0.1 * abs(float(difference))


def test_outliers_are_of_the_whole_matrix_around_its_mean():
    weight = normal(40, 50) + 7  # far from zero: |w| > n sigma would take everything
    weight[0] *= 0  # 7 sigma below the mean, but ordinary within its row
    flat = [float(v) for v in weight.flatten().double()]
    mean = math.fsum(flat) / len(flat)
    sigma = math.sqrt(math.fsum((v - mean) ** 2 for v in flat) / len(flat))
    want = torch.tensor([abs(v - mean) >= 3 * sigma for v in flat]).view(40, 50)
    assert torch.equal(eq.outliers(weight, 3.0), want) and want[0].all() and not want[1:].all()
    assert not eq.outliers(weight, None).any() and not eq.outliers(torch.full((3, 4), 2.0), 3.0).any()


def test_outliers_are_out_of_the_range_and_kept_as_they_are():
    weight = normal(8, 200)
    weight[2, 5], weight[2, 9] = 100.0, -90.0
    config = EasyQuantConfig(bits=4)
    found = config.quantize_checked(weight, "w")
    assert {2 * 200 + 5, 2 * 200 + 9} <= set(found.positions.tolist())
    assert (
        found.positions.dtype == torch.int32
        and (found.positions.diff() > 0).all()
        and found.values.dtype == torch.float16
    )
    assert found.codes.flatten()[found.positions.long()].tolist() == [8] * len(found.positions), (
        "codes of outliers are not 0"
    )
    assert found.scale[2] < 1 and found.scale.dtype == torch.float16 and found.scale.shape == (8, 1)
    back = restored(config, weight)
    assert back[2, 5] == 100 and back[2, 9] == -90 and (back - weight)[2].abs().max() < 1
    assert 0 < len(eq.outliers(normal(300, 300), 3.0).nonzero()) < 0.01 * 300 * 300


def test_codes_and_scales_by_hand():
    """Two groups in a row, no search: s = max|w| / 7, q = round(w / s)."""
    weight = torch.tensor([[7.0, -3.2, 0.0, 1.4, -0.65, 0.25]])
    found = EasyQuantConfig(group_size=3, n_sigma=None, optimizer="none").quantize_checked(weight, "w")
    assert found.scale.tolist() == [[1.0, pytest.approx(0.2, rel=1e-3)]]
    assert (found.codes.int() - 8).tolist() == [[7, -3, 0, 7, -3, 1]]
    assert found.positions is None and found.values is None


@BITS
def test_more_bits_and_smaller_groups_are_better(bits):
    weight = heavy(32, 64)
    assert relative(EasyQuantConfig(bits=bits, group_size=16), weight) < relative(EasyQuantConfig(bits=bits), weight)
    if bits < 8:
        assert relative(EasyQuantConfig(bits=8), weight) < 3e-4 < relative(EasyQuantConfig(bits=bits), weight)
        assert bits == 6 or relative(EasyQuantConfig(bits=bits), weight) > 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_both_parts_help_on_heavy_tails(bits):
    """The sheet's order: both < range only, outliers only < round to nearest."""
    weight = heavy(64, 256)
    both = relative(EasyQuantConfig(bits=bits), weight)
    parts = [relative(EasyQuantConfig(bits=bits, **o), weight) for o in ({"n_sigma": None}, {"optimizer": "none"})]
    rtn = relative(EasyQuantConfig(bits=bits, **RTN), weight)
    assert both < min(parts) and max(parts) < rtn
    adam = relative(EasyQuantConfig(bits=bits, optimizer="adam"), weight)
    assert both < 1.001 * adam < rtn


@pytest.mark.parametrize("rows", [3, 300])
def test_under_a_hundred_passes_and_no_loop_over_rows(rows, monkeypatch):
    calls, encode = [], eq.encode
    monkeypatch.setattr(eq, "encode", lambda *a: calls.append(a[0].shape) or encode(*a))
    EasyQuantConfig().quantize_checked(normal(rows, 32), "w")
    assert len(calls) < 100 and set(calls) == {(rows, 32)}


def test_blocks_of_rows_change_nothing(monkeypatch):
    weight, config = heavy(50, 32), EasyQuantConfig(bits=3, group_size=8)
    whole = config.quantize_checked(weight, "w")
    monkeypatch.setattr(eq, "CHUNK", 8 * 7)
    for a, b in zip(config.quantize_checked(weight, "w"), whole, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_ranges(dtype):
    weight = heavy(16, 64).to(dtype)
    found = EasyQuantConfig().quantize_checked(weight, "w")
    assert found.values.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    if dtype != torch.float32:
        assert torch.equal(found.values, weight.flatten()[found.positions.long()]), "an outlier was rounded"
    if dtype != torch.float16:
        large = weight * 1e4
        large[0, 0] = 1e7
        value = EasyQuantConfig().quantize_checked(large, "w").values
        assert value.dtype == torch.bfloat16 and torch.isfinite(value).all()
        with pytest.raises(ValueError, match=r"the weight of w reaches .*float16"):
            EasyQuantConfig().quantize_checked(weight * 1e8, "w")


@pytest.mark.parametrize("optimizer", ["grid", "adam", "none"])
def test_rows_of_zeros_and_one_column(optimizer):
    weight = normal(4, 1)
    weight[1] = 0
    config = EasyQuantConfig(bits=2, optimizer=optimizer)
    assert torch.isfinite(restored(config, weight)).all() and restored(config, weight)[1] == 0
    assert not restored(config, torch.zeros(3, 5)).any()


# --- quality on a trained model -------------------------------------------------------------------------------------


def perplexity(model):
    """Of every valid answer of the sandbox's old skills, answer tokens only."""
    tok = sandbox.load_tokenizer()
    texts = [f":{n:02d}={tasks.plain(t)}" for n in tasks.SUMS for t in tasks.triples(n)]
    texts += [f"{prompt}{prompt[1:-1][::-1]}" for prompt in tasks.R.prompts]
    batch = tok([text + tok.eos_token for text in texts], return_tensors="pt", padding=True)
    ids = batch["input_ids"]
    equals = ids == tok.convert_tokens_to_ids("=")
    answer = (equals.cumsum(1) - equals.long() > 0) & (batch["attention_mask"] == 1)
    with torch.no_grad():
        return math.exp(model(**batch, labels=ids.masked_fill(~answer, -100)).loss)


def test_at_three_bits_easyquant_beats_rounding_on_a_trained_model():
    plain = sandbox.load_model()
    found = {}
    for name, options in (("rtn", RTN), ("easyquant", {})):
        model = sandbox.load_model(quantization_config=EasyQuantConfig(bits=3, **options))
        off = [
            float((layer.dequantize() - plain.get_submodule(n).weight.detach()).norm())
            for n, layer in model.named_modules()
            if isinstance(layer, PackedLinear)
        ]
        found[name] = (perplexity(model), off)
    (rtn, rtn_off), (easy, easy_off) = found["rtn"], found["easyquant"]
    assert len(easy_off) == 14 and all(a < b for a, b in zip(easy_off, rtn_off, strict=True))
    base = perplexity(plain)
    assert base < easy < rtn and easy - base < 0.75 * (rtn - base), (base, easy, rtn)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bits": 7}, ValueError, r"EasyQuantConfig.bits is 7; give one of 2, 3, 4, 5, 6, 8"),
        ({"bits": "4"}, ValueError, r"EasyQuantConfig.bits is '4'"),
        ({"bits": True}, ValueError, r"EasyQuantConfig.bits is True"),
        ({"bitz": 4}, TypeError, r"'bitz'; did you mean 'bits'\?"),
        ({"n_sigma": 0}, ValueError, r"EasyQuantConfig.n_sigma is 0"),
        ({"n_sigma": float("nan")}, ValueError, r"EasyQuantConfig.n_sigma is nan"),
        ({"n_sigma": "3"}, TypeError, r"EasyQuantConfig.n_sigma is '3'"),
        ({"group_size": 0}, ValueError, r"EasyQuantConfig.group_size is 0"),
        ({"group_size": 64.0}, TypeError, r"EasyQuantConfig.group_size is 64.0"),
        ({"optimizer": "grit"}, ValueError, r"did you mean 'grid'\?"),
        ({"steps": 50}, ValueError, r"EasyQuantConfig.steps is 50 but only optimizer='adam' reads it"),
        ({"lr": 0.1}, ValueError, r"EasyQuantConfig.lr is 0.1 but only optimizer='adam' reads it"),
        ({"optimizer": "adam", "steps": 0}, ValueError, r"EasyQuantConfig.steps is 0"),
        ({"optimizer": "adam", "lr": -1.0}, ValueError, r"EasyQuantConfig.lr is -1"),
        ({"modules_to_not_convert": [3]}, TypeError, r"EasyQuantConfig.modules_to_not_convert is \[3\]"),
        ({"quant_method": "hqq"}, ValueError, r"quant_method is 'hqq'; this is the config of 'easyquant'"),
        ({"hfgen": {"format": 3}}, ValueError, r"format 3, this hfgen reads up to 2"),
        ({"hfgen": "x"}, TypeError, r"EasyQuantConfig.hfgen is 'x'"),
    ],
)
def test_bad_options_are_named(options, error, words):
    with pytest.raises(error, match=words) as caught:
        EasyQuantConfig(**options)
    assert "/hfgen" in traceback.extract_tb(caught.value.__traceback__)[-1].filename


def test_the_options_json_keeps():
    config = EasyQuantConfig(bits=3, group_size=32, optimizer="adam", steps=7, modules_to_not_convert="lm_head")
    again = EasyQuantConfig.from_dict(config.to_dict())
    assert again == config and again.modules_to_not_convert == ["lm_head"] and again.steps == 7
    assert again.hfgen["install"].startswith("pip install '")
