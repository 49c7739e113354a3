"""AdaQuant: its quantizer against the formulas in float64, one layer's fit, whole models, interrupted runs."""

import copy
import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from hfgen.evidence.tuning import best_rate
from hfgen.kit.calibration import Inputs, held_out, prepare
from hfgen.kit.quantizer import PackedLinear, quantizable
from hfgen.kit.teacher import Teacher
from hfgen.quantizers import AdaQuantConfig
from hfgen_plugins.quantizers.adaquant import adaquant, evidence, evidence_program, grid, tuning

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 32}
FAST = {"steps": 20, "batch_size": 64}


def spread(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    return model.eval()


def llama():
    return spread(LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, num_hidden_layers=2, **SMALL)))


def gpt2():
    return spread(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=32)))


def opt():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24, "vocab_size": 32}
    return spread(OPTForCausalLM(OPTConfig(word_embed_proj_dim=16, **sizes)))


MODELS = {"llama": llama, "gpt2": gpt2, "opt": opt}


def rows(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 32, (12,), generator=generator)} for _ in range(count)]


def logits(model):
    with torch.no_grad():
        return model(rows(1, seed=9)[0]["input_ids"][None]).logits


def layer(m=6, n=16, tokens=400, seed=0, bias=False):
    """A Linear and correlated inputs of 40 rows."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(n, m, bias=bias)
    with torch.no_grad():
        for p in linear.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    mix = torch.randn(n, n, generator=generator) * torch.logspace(0, -2, n)
    x = torch.randn(tokens, n, generator=generator) @ mix
    return linear, Inputs("layer", linear, x, torch.arange(tokens) // (tokens // 40))


# --- the quantizer --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-8, 8, width=16), min_size=2, max_size=12), st.sampled_from([2, 3, 4, 8]))
def test_the_formulas(values, bits):
    """Range, scale and zero point as printed, in float64 by hand; 0 is always one of the levels."""
    w, top = torch.tensor([values], dtype=torch.float64), 2**bits - 1
    scale, zero = grid.affine(w.amin(1, keepdim=True), w.amax(1, keepdim=True), bits)
    low, high = min(0.0, *values), max(0.0, *values)
    want = max(high - low, 1e-6) / top
    assert float(scale) == pytest.approx(want, rel=1e-12)
    assert float(zero) == min(max(round(-low / want), 0), top)
    codes = [min(max(round(v / want) + int(zero), 0), top) for v in values]
    assert grid.encode(w, scale, zero, bits).tolist() == [codes]
    assert grid.encode(torch.zeros(1, 1), scale, zero, bits).item() == zero
    decoded = scale * (grid.encode(w, scale, zero, bits) - zero)
    assert (decoded - w).abs().max() <= 1.001 * want + 1e-12  # half a step, and half for the zero point's rounding


def test_fake_quantize_is_what_the_codes_decode_to():
    torch.manual_seed(0)
    w = torch.randn(5, 12)
    scale, zero = (t.view(10, 1) for t in (torch.rand(10) * 0.2 + 0.05, torch.rand(10) * 8))
    for bits in (2, 3, 4):
        point = grid.Point(w.view(10, 6), scale, zero, torch.zeros(5))
        found = grid.packed_point(point, bits, w.shape)
        linear = nn.Linear(12, 5, bias=False)
        packed = PackedLinear.of(linear, AdaQuantConfig(bits=bits, group_size=6), found)
        assert torch.equal(packed.dequantize(), grid.fake_quantize(*point[:3], bits).view(5, 12))
        assert found.scale.dtype == torch.float16 and found.zero.dtype == torch.uint8


def test_straight_through_gradients():
    """By hand: inside the range dQ/dW = 1 and dQ/dz = 0, outside dQ/dW = 0 and dQ/dz = -s; dQ/ds = code - z - W/s inside."""
    s, z, bits = 0.25, 3.0, 3
    w = torch.tensor([[0.30, -0.60, 2.0, -2.0]], requires_grad=True)
    scale, zero = torch.tensor([[s]], requires_grad=True), torch.tensor([[z]], requires_grad=True)
    for i, (inside, level) in enumerate([(True, 1.0), (True, -2.0), (False, 4.0), (False, -3.0)]):
        out = grid.fake_quantize(w, scale, zero, bits)
        assert out[0, i].item() == s * level
        gw, gs, gz = torch.autograd.grad(out[0, i], (w, scale, zero))
        assert gw[0].tolist() == [float(inside and i == j) for j in range(4)]
        assert float(gz) == pytest.approx(0.0 if inside else -s)
        assert float(gs) == pytest.approx(level - (w[0, i].item() / s if inside else 0.0), rel=1e-6)


def test_the_search_beats_min_and_max_and_is_near_the_best():
    """Against every pair of a fine grid of scales and every zero point."""
    torch.manual_seed(0)
    w = torch.randn(20, 64)
    for bits in (2, 3):
        scale, zero = grid.searched(w, bits)

        def error(s, z, bits=bits):
            return (grid.fake_quantize(w, s, z, bits) - w).square().sum(1, keepdim=True)

        found = error(scale, zero)
        start = grid.affine(w.amin(1, keepdim=True), w.amax(1, keepdim=True), bits)
        assert (found <= error(*start)).all() and found.sum() < 0.85 * error(*start).sum()
        span = w.abs().amax(1, keepdim=True)
        best = torch.stack(
            [error(span * f, torch.full_like(span, z)) for f in torch.linspace(0.02, 1, 250) for z in range(2**bits)]
        ).amin(0)
        assert found.sum() <= 1.02 * best.sum()
        assert torch.equal(scale, scale.half().float()) and torch.equal(zero, zero.round())


# --- one layer ------------------------------------------------------------------------------------------------------


def test_the_objective_is_the_layers_output_error():
    linear, given_ = layer(bias=True)
    config = AdaQuantConfig(bits=3)
    found, note = adaquant.calibrated_layer(given_, config)
    held = held_out(given_.row)
    with torch.no_grad():
        error = (found(given_.x[held]) - linear(given_.x[held])).square().sum(1).mean()
    assert note["after"] == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [None, 8])
def test_the_output_error_falls(group, bias):
    linear, given_ = layer(bias=bias)
    found, note = adaquant.calibrated_layer(given_, AdaQuantConfig(bits=3, group_size=group))
    assert not note["reverted"] and note["after"] < 0.8 * note["before"]
    start = AdaQuantConfig(bits=3, group_size=group).quantize_checked(linear.weight, "layer")
    moved = (found.packed().codes != PackedLinear.of(linear, found.config, start).packed().codes).float().mean()
    assert moved > 0.1
    assert found.weight_scale.shape == (6, 1 if group is None else 2)
    assert (found.bias is not None and not torch.equal(found.bias, linear.bias)) if bias else found.bias is None


def test_weights_leave_their_cells():
    """More than to the next code up or down, which is all that adaptive rounding can do."""
    linear, given_ = layer(n=32)
    config = AdaQuantConfig(bits=4, lr=0.2)
    start = config.quantize_checked(linear.weight, "layer")
    point = adaquant.fit(
        linear.weight.detach(),
        grid.Point(linear.weight.detach(), start.scale.float(), start.zero.float(), torch.zeros(6)),
        given_.x, torch.arange(len(given_.x)), config, False,
    )  # fmt: skip
    cells = (linear.weight.detach() / start.scale.float()).round()
    assert ((point.rows / start.scale.float()).round() - cells).abs().max() >= 2


def test_worse_on_held_out_rows_is_reverted():
    """Inputs of the held-out rows are others than those of the rest, so that fitting the rest makes them worse."""
    linear, given_ = layer(n=16)
    held = held_out(given_.row)
    x = torch.zeros_like(given_.x)
    generator = torch.Generator().manual_seed(1)
    direction = torch.ones(16)
    x[~held] = torch.randn(int((~held).sum()), 1, generator=generator) * direction  # one direction only
    x[held] = torch.randn(int(held.sum()), 16, generator=generator)
    config = AdaQuantConfig(bits=3)
    found, note = adaquant.calibrated_layer(Inputs("layer", linear, x, given_.row), config)
    assert note["reverted"] and note["after"] >= note["before"]
    start = PackedLinear.of(linear, config, config.quantize_checked(linear.weight, "layer"))
    assert torch.equal(found.dequantize(), start.dequantize())
    # Judged by the rows it was fitted to, the same fit is better: it is the held-out rows that speak.
    x[held] = x[~held][: int(held.sum())]
    assert not adaquant.calibrated_layer(Inputs("layer", linear, x, given_.row), config)[1]["reverted"]


def test_the_start_is_kept_where_no_step_is_better():
    linear, given_ = layer()
    weight, start = linear.weight.detach(), AdaQuantConfig(bits=8).quantize_checked(linear.weight, "layer")
    point = grid.Point(weight, start.scale.float(), start.zero.float(), torch.zeros(6))
    assert adaquant.fit(weight, point, given_.x, torch.arange(400), AdaQuantConfig(bits=8, lr=100.0), False) is point


def test_a_layer_without_inputs_is_quantised_without_data():
    linear, _ = layer()
    empty = Inputs("layer", linear, torch.empty(0, 16), torch.empty(0, dtype=torch.long))
    found, note = adaquant.calibrated_layer(empty, AdaQuantConfig(bits=3))
    assert note == {"before": None, "after": None, "reverted": True} and found.dequantize().any()


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("name", MODELS)
def test_models_calibrate_save_and_load(name, mode, tmp_path):
    base, seen = MODELS[name](), []
    config = AdaQuantConfig(bits=3, mode=mode, **FAST)
    model = config.calibrate(copy.deepcopy(base), rows(), lambda *counts: seen.append(counts))
    count = len(quantizable(base, config)[0])
    assert seen == [(i, count) for i in range(count + 1)]
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == count
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.mode == mode and config.bits_map is None
    start = AdaQuantConfig(bits=3, steps=1, lr=1e-9, lr_range=1e-9).calibrate(copy.deepcopy(base), rows())
    notes = model.hf_quantizer.calibration["layers"].values()
    assert sum(n["after"] < n["before"] for n in notes) == sum(not n["reverted"] for n in notes) >= 2
    if name == "llama":
        teacher = Teacher.of(base, prepare(rows(40, seed=5), 1), 10**9)  # other rows than those it was fitted to
        assert teacher.loss(model) < teacher.loss(start)
    if name != "llama":
        biases = {
            n: p for n, p in model.named_parameters() if n.endswith("bias") and "norm" not in n and "ln_" not in n
        }
        assert biases and any(not torch.equal(p, base.get_parameter(n)) for n, p in biases.items())


def test_sequential_corrects_what_went_before():
    base = llama()
    found = [
        AdaQuantConfig(bits=3, mode=m, **FAST).calibrate(copy.deepcopy(base), rows())
        for m in ("sequential", "parallel")
    ]
    a, b = ({n: m.dequantize() for n, m in model.named_modules() if isinstance(m, PackedLinear)} for model in found)
    same = [n for n in a if torch.equal(a[n], b[n])]
    assert set(list(a)[:3]) <= set(same) and len(same) < len(
        a
    )  # q, k and v of the first block have float inputs in both


def test_half_precision():
    model = AdaQuantConfig(bits=4, **FAST).calibrate(gpt2().bfloat16(), rows())
    assert logits(model).dtype == torch.bfloat16 and model.transformer.h[0].attn.c_attn.bias.dtype == torch.bfloat16
    assert len(model.hf_quantizer.calibration["reverted"]) < 4


def test_the_global_random_state_is_left_alone():
    base, data = llama(), rows()
    before = torch.get_rng_state()
    AdaQuantConfig(bits=3, steps=2).calibrate(base, data)
    assert torch.equal(before, torch.get_rng_state())


# --- widths ---------------------------------------------------------------------------------------------------------


def test_bits_are_chosen_saved_and_loaded(tmp_path):
    base = llama()
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight *= 1e-3  # what it does hardly matters
    config = AdaQuantConfig(average_bits=3.5, choices=(2, 4, 8), **FAST)
    model = config.calibrate(base, rows())
    found = model.config.quantization_config.bits_map
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert found == {n: m.config.bits for n, m in layers.items()}
    assert found["model.layers.1.mlp.down_proj"] == 2 and max(found.values()) > 2
    sizes = {n: m.in_features * m.out_features for n, m in layers.items()}
    assert sum(found[n] * sizes[n] for n in found) <= 3.5 * sum(sizes.values())
    costs = model.hf_quantizer.calibration["costs"]
    assert costs["model.layers.0.mlp.up_proj"]["8"] == 0 < costs["model.layers.0.mlp.up_proj"]["2"]
    assert costs["model.layers.0.mlp.up_proj"]["4"] < costs["model.layers.0.mlp.up_proj"]["2"]
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config.quantization_config.bits_map == found and torch.equal(logits(again), logits(model))
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["average_bits"] == 3.5


def test_measuring_leaves_the_model_as_it_was():
    from hfgen.kit.allocation import sensitivities

    base = llama()
    before, teacher = logits(base), Teacher.of(base, prepare(rows(), 1), 10**9)
    seen = []
    costs = sensitivities(base, AdaQuantConfig(), teacher, (2, 8), lambda *counts: seen.append(counts))
    assert torch.equal(logits(base), before) and not any(isinstance(m, PackedLinear) for m in base.modules())
    assert len(costs) == 14 and all(set(c) == {2, 8} and c[8] == 0 for c in costs.values()) and seen[-1] == (13, 14)


# --- tuning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"), [("opt", "biases"), ("gpt2", "biases"), ("llama", "norms"), ("opt", "norms")]
)
def test_tuning(name, what):
    base = MODELS[name]()
    plain = AdaQuantConfig(bits=2, **FAST).calibrate(copy.deepcopy(base), rows())
    model = AdaQuantConfig(bits=2, tune=what, **FAST).calibrate(copy.deepcopy(base), rows())
    tuned = model.hf_quantizer.calibration["tuned"]
    assert not tuned["reverted"] and tuned["after"] < tuned["before"]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), plain.get_parameter(n).detach())}
    assert changed == set(tuned["parameters"])
    assert all(n.endswith("bias") for n in changed) == (what == "biases")
    assert all(p.grad is None for p in model.parameters())


def test_tuning_that_harms_is_put_back(monkeypatch):
    monkeypatch.setattr(tuning, "LR", 3.0)
    base = opt()
    plain = AdaQuantConfig(bits=4, **FAST).calibrate(copy.deepcopy(base), rows())
    model = AdaQuantConfig(bits=4, tune="biases", **FAST).calibrate(copy.deepcopy(base), rows())
    assert model.hf_quantizer.calibration["tuned"]["reverted"] and torch.equal(logits(model), logits(plain))


# --- interrupted runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"mode": "parallel"}, {"average_bits": 3.0, "choices": (2, 3, 8), "tune": "norms"}]
)
def test_an_interrupted_run_goes_on_to_the_same_end(options, tmp_path, caplog):
    base, config = llama(), AdaQuantConfig(bits=3, **{**FAST, **options})
    whole = config.calibrate(copy.deepcopy(base), rows())
    measured = 28 if "average_bits" in options else 0
    for stop in (3, 9):

        def progress(done, total, stop=stop):
            if done == measured + stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING, "hfgen"):
            config.calibrate(copy.deepcopy(base), rows(), progress, partial=tmp_path / "layers")
        assert f"{stop} layers lie in" in caplog.text and "half quantised: load it again" in caplog.text
    seen = []
    again = config.calibrate(copy.deepcopy(base), rows(), lambda *c: seen.append(c), partial=tmp_path / "layers")
    assert again.hf_quantizer.calibration.pop("reused") == 9
    whole.hf_quantizer.calibration.pop("reused")
    assert again.hf_quantizer.calibration == whole.hf_quantizer.calibration
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    for change in ({"rows": rows(seed=1)}, {"model": spread(copy.deepcopy(base), seed=1)}):
        with pytest.raises(ValueError, match=f"interrupted run with another {next(iter(change))}"):
            config.calibrate(
                change.get("model", copy.deepcopy(base)), change.get("rows", rows()), partial=tmp_path / "layers"
            )


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "AdaQuantConfig.steps is 0; give an integer of at least 1"),
        ({"lr": 0.0}, "AdaQuantConfig.lr is 0.0; give a finite number above 0"),
        ({"mode": "paralel"}, "AdaQuantConfig.mode is 'paralel'; did you mean 'parallel'"),
        ({"tune": "bias"}, "AdaQuantConfig.tune is 'bias'; did you mean 'biases'"),
        ({"choices": (3, 7)}, "AdaQuantConfig.choices is 7; give one of 2, 3, 4, 5, 6, 8"),
        ({"choices": 3}, "AdaQuantConfig.choices is 3; give the widths to choose from"),
        ({"average_bits": -1.0}, "AdaQuantConfig.average_bits is -1.0; give a finite number above 0"),
        ({"seed": True}, "AdaQuantConfig.seed is True"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises((ValueError, TypeError), match=words):
        AdaQuantConfig(**fields)


def test_bad_calibrations(tmp_path):
    with pytest.raises(
        ValueError, match="hold 48 tokens .padding not counted., at least 64 are needed; give more rows"
    ):
        AdaQuantConfig().calibrate(llama(), rows(4))
    with pytest.raises(ValueError, match="calibration row 0 has text; give dicts with input_ids"):
        AdaQuantConfig().calibrate(llama(), [{"text": "a"}])
    with pytest.raises(
        ValueError, match="average_bits is 1.5, but .* take at least 2 bits a weight; give that or more"
    ):
        AdaQuantConfig(average_bits=1.5).calibrate(llama(), rows(), partial=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="average_bits is 3.0 and bits_map is given; leave one of them out"):
        AdaQuantConfig(average_bits=3.0, bits_map={"model.layers.0.mlp.up_proj": 2}).calibrate(llama(), rows())
    with pytest.raises(
        ValueError, match="AdaQuantConfig.tune is 'biases', but LlamaForCausalLM has none; give 'norms'"
    ):
        AdaQuantConfig(tune="biases").calibrate(llama(), rows())
    broken = llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match="the weight of model.layers.1.mlp.up_proj holds NaN"):
        AdaQuantConfig(steps=1).calibrate(broken, rows())


def test_a_float_checkpoint_is_refused_in_words(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hfgen quantize MODEL --method adaquant --calib FILE .*config.calibrate"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=AdaQuantConfig())


# --- evidence -------------------------------------------------------------------------------------------------------


def gaps(**changes):
    base = {"float": 0.0, "rtn": 0.04, "range": 0.03, "adaquant": 0.01, "qat_kl": 0.02, "qat_ce": 0.08} | changes
    noise = (1e-4, -1e-4, 2e-4, -2e-4, 0.0)
    return {arm: {"gap": [value + (i + 1) * n for n in noise]} for i, (arm, value) in enumerate(base.items())}


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (gaps(), "reproduced"),
        (gaps(qat_kl=0.005), "partly"),
        (gaps(adaquant=0.2), "not reproduced"),
        (gaps(rtn=-0.01), "void"),
        (gaps(qat_kl=0.05), "void"),  # fine-tuning that learnt nothing is no baseline
    ],
)
def test_verdict_on_the_gap(samples, expected):
    (found,) = evidence.judge(samples, evidence.SETTINGS)
    assert found.verdict == expected


@pytest.mark.parametrize(
    ("program", "fitted", "uniform", "expected"),
    [
        (0.04, 0.01, 0.4, "reproduced"),
        (0.04, 0.03, 0.4, "partly"),
        (0.12, 0.01, 0.4, "partly"),  # 0.3 of uniform's
        (0.12, 0.03, 0.4, "not reproduced"),
        (1e-4, 1e-4, 0.002, "void"),  # planting did nothing
    ],
)
def test_verdict_on_the_program(program, fitted, uniform, expected):
    kl = {"uniform": uniform, "program": program, "uniform_fitted": 0.02, "program_fitted": fitted}
    spread_ = (1, 1.1, 0.9, 1.05, 0.95)
    samples = {arm: {"kl_plain": [0.002] * 5, "kl_planted": [v * f for f in spread_]} for arm, v in kl.items()}
    (found,) = evidence_program.judge(samples, evidence_program.SETTINGS)
    assert found.verdict == expected


def test_rates_are_what_the_tuning_chose():
    table = json.loads(evidence.TUNING_FILE.read_text())
    assert table["chosen"] == evidence.SETTINGS.rates and tuple(table["grid"]) == evidence.GRID
    assert len(table["rows"]) == len(evidence.TUNED) * evidence.EXPERIMENT.tries
    for arm, rate in table["chosen"].items():
        rows_ = [row for row in table["rows"] if row["arm"] == arm]
        assert best_rate(rows_, ("merit",)) == rate and {row["rate"] for row in rows_} == set(evidence.GRID)


@pytest.mark.parametrize("module", [evidence, evidence_program], ids=["gap", "program"])
def test_the_experiments_run(module):
    experiment = module.EXPERIMENT
    keys = {metric.key for metric in experiment.metrics}
    for arm in experiment.arms:
        found = experiment.run(arm.id, 100, experiment.smoke_settings, lambda done, total: None)
        assert keys <= set(found) and all(isinstance(v, float) for v in found.values()), arm
        if arm.id == "float":
            zeros = {"gap", "kl", "seen", "kl_planted", "kl_plain"} & keys
            assert all(abs(found[k]) < 1e-9 for k in zeros)
        elif module is evidence_program:
            assert found["bits_planted"] <= 4 and found["bits_plain"] <= 4
