"""Rounding against torch's own casts, sharpness against float64 maximisers, the simulation in stock runs, refusals."""

import copy
import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from scipy.optimize import minimize
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.callbacks import LowMantissaCallback, loss_sharpness, round_mantissa, simulate_mantissa
from hfgen.kit.examples import ROWS, tiny_run
from hfgen.testing.runs import all_weights
from hfgen_plugins.callbacks.low_mantissa import evidence
from hfgen_plugins.callbacks.low_mantissa.low_mantissa import _Forward

FORMATS = {  # torch's own dtypes: mantissa bits, exponent bits
    torch.bfloat16: (7, None), torch.float16: (10, 5), torch.float8_e5m2: (2, 5), torch.float8_e4m3fn: (3, 4)
}  # fmt: skip


def every(dtype):
    """All 65536 numbers of a 16-bit dtype, as float32."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()


def float32_sample():
    """Random bits, and what lies at and beside every midpoint between two numbers of the 8-bit and 16-bit formats."""
    drawn = torch.randint(-(2**31), 2**31 - 1, (1_000_000,), generator=torch.Generator().manual_seed(0))
    bits = drawn.to(torch.int32)
    top = torch.arange(2**16, dtype=torch.int64)[:, None] << 16  # sign, exponent, 7 bits, and what follows
    low = torch.tensor([0, 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1, 2**12, 2**12 - 1, 2**13, 3 * 2**12])
    near = (top + low).flatten().to(torch.int32)
    return torch.cat([bits, near]).view(torch.float32)


def assert_same_bits(found, expected):
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    integer = torch.int32 if found.dtype == torch.float32 else torch.int16
    assert torch.equal(found[~nan].view(integer), expected[~nan].view(integer))


# --- rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("values", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounding_is_torchs_cast_bit_for_bit(values, dtype):
    """Every float16 and bfloat16, and a dense sample of float32: subnormals, ties, -0, infinities, NaN, overflow."""
    x = float32_sample() if values is torch.float32 else every(values)
    bits, exponent = FORMATS[dtype]
    assert_same_bits(round_mantissa(x, bits, exponent), x.to(dtype).float())
    if values is not torch.float32 and not (values is torch.float16 and dtype is torch.bfloat16):
        assert_same_bits(round_mantissa(x.to(values), bits, exponent), x.to(dtype).to(values))  # keeps its dtype


def test_what_overflow_gives():
    x = torch.tensor([448.0, 464.0, 465.0, 1e9, math.inf, -math.inf, math.nan])
    assert round_mantissa(x, 3, 4)[:6].tolist() == [448, 448, 448, 448, 448, -448]
    assert round_mantissa(x, 3, 4)[6].isnan()
    x = torch.tensor([57344.0, 61439.0, 61440.0, -1e9, math.inf])
    assert round_mantissa(x, 2, 5).tolist() == [57344, 57344, math.inf, -math.inf, math.inf]
    assert round_mantissa(x, 2, 5, "truncate").tolist() == [57344, 57344, 57344, -57344, math.inf]
    assert round_mantissa(torch.tensor([3.4e38]), 7).isinf() and round_mantissa(torch.tensor([3.4e38]), 7, 8).isinf()
    assert round_mantissa(torch.tensor([3.4e38]), 7, None, "truncate").item() == 255 * 2.0**120


def by_hand(x, bits, exponent, rounding):
    """One finite number in Python's float64 and integers: nearest multiple of the unit in the last place."""
    if x == 0:
        return x
    bias = 2 ** (exponent - 1) - 1
    place = max(math.frexp(x)[1] - 1, 1 - bias) - bits
    scaled = x / 2.0**place if place > -1000 else x * 2.0**-place
    found = (math.trunc(scaled) if rounding == "truncate" else round(scaled)) * 2.0**place  # round: ties to even
    largest = (2 - 2.0**-bits) * 2.0**bias if exponent > 4 else (2 - 2.0 ** (1 - bits)) * 2.0 ** (bias + 1)
    if abs(found) > largest:
        found = math.copysign(largest if rounding == "truncate" or exponent == 4 else math.inf, x)
    return math.copysign(found, x)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
FORMS = st.tuples(st.integers(1, 23), st.sampled_from([4, 5, 6, 7, 8]), st.sampled_from(["nearest-even", "truncate"]))


@settings(max_examples=200, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=8), FORMS)
def test_any_format_equals_arithmetic_by_hand(values, form):
    found = round_mantissa(torch.tensor(values), *form).tolist()
    expected = [by_hand(x, *form) for x in values]
    assert found == expected
    assert [math.copysign(1, v) for v in found] == [math.copysign(1, v) for v in values]


@settings(max_examples=200, deadline=None)
@given(st.lists(FLOATS, min_size=2, max_size=16), FORMS)
def test_rounding_is_idempotent_monotone_and_within_half_a_unit(values, form):
    x = torch.tensor(values).sort().values
    r = round_mantissa(x, *form)
    assert torch.equal(round_mantissa(r, *form), r)
    assert bool((r[1:] >= r[:-1]).all())
    bits, exponent, rounding = form
    bias = 2 ** (exponent - 1) - 1
    for value, rounded in zip(x.double().tolist(), r.double().tolist(), strict=True):
        if math.isfinite(rounded) and abs(value) < 2.0**bias:  # within the range
            unit = 2.0 ** (max(math.frexp(value)[1] - 1, 1 - bias) - bits)
            assert abs(value - rounded) <= (unit / 2 if rounding == "nearest-even" else unit)


def test_any_layout_and_no_gradient_of_its_own():
    x = torch.randn(6, 8)[:, ::2].t()
    assert torch.equal(round_mantissa(x, 7), x.bfloat16().float())
    assert round_mantissa(torch.empty(0, 3), 2).shape == (0, 3)
    assert torch.equal(round_mantissa(x, 23), x) and not round_mantissa(nn.Parameter(x), 3).requires_grad


# --- sharpness ------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    st.integers(2, 5),
    st.integers(1, 3),
    st.sampled_from([5e-4, 1e-3, 0.05, 0.5]),
    st.floats(0.1, 8),
    st.integers(0, 99),
)
def test_sharpness_equals_the_maximisers(classes, tokens, epsilon, scale, seed):
    """Every corner of the box by brute force, and scipy's L-BFGS-B inside it, in float64."""
    rng = np.random.default_rng(seed)
    z, y = rng.normal(size=(tokens, classes)) * scale, rng.integers(classes, size=tokens)

    def f(flat):
        z = flat.reshape(tokens, classes)
        return float(np.mean(np.log(np.exp(z).sum(-1)) - z[np.arange(tokens), y]))

    def slope(flat):
        z = flat.reshape(tokens, classes)
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        p[np.arange(tokens), y] -= 1
        return -p.ravel() / tokens

    reach = epsilon * (np.abs(z) + 1)
    signs = np.array(np.meshgrid(*[[-1, 1]] * classes)).reshape(classes, -1).T
    worst = sum(max(f_one(z[t] + s * reach[t], y[t]) for s in signs) for t in range(tokens)) / tokens
    bounds = list(zip((z - reach).ravel(), (z + reach).ravel(), strict=True))
    # a million times the loss: along logits with next to no slope the solver would stop too soon
    options = {"maxiter": 10_000, "maxfun": 100_000, "ftol": 0.0, "gtol": 1e-12}
    climbed = -1e-6 * minimize(
        lambda v: -1e6 * f(v), z.ravel(), jac=lambda v: 1e6 * slope(v), method="L-BFGS-B", bounds=bounds, options=options
    ).fun  # fmt: skip
    found = loss_sharpness(torch.tensor(z), torch.tensor(y), epsilon).item()
    assert found == pytest.approx(100 * (worst - f(z)) / (1 + f(z)), rel=1e-6)
    assert climbed == pytest.approx(worst, abs=1e-6)


def f_one(z, y):
    return float(np.log(np.exp(z).sum()) - z[y])


def test_sharpness_reduces_over_valid_tokens_and_computes_in_float32():
    torch.manual_seed(0)
    z, y = torch.randn(2, 5, 7) * 3, torch.randint(7, (2, 5))
    masked = y.clone()
    masked[0, :3] = -100
    kept = torch.cat([z[0, 3:], z[1]]), torch.cat([y[0, 3:], y[1]])
    assert loss_sharpness(z, masked) == loss_sharpness(*kept)
    assert loss_sharpness(z, masked.where(masked >= 0, 99), ignore_index=99) == loss_sharpness(*kept)
    low = loss_sharpness(z.bfloat16(), y)
    assert low.dtype == torch.float32 and low == loss_sharpness(z.bfloat16().float(), y)
    assert low == pytest.approx(loss_sharpness(z.bfloat16().double(), y).item(), rel=1e-5)
    without = torch.cat([z, torch.full((2, 5, 1), -math.inf)], -1)  # a class that cannot be
    assert loss_sharpness(without, y) == pytest.approx(loss_sharpness(z, y).item(), rel=1e-6)


# --- simulation -----------------------------------------------------------------------------------------------------


def tiny(kind=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    return tiny_run("unused", **options)["model"]


def test_forward_and_backward_multiply_rounded_numbers():
    """By hand, with and without rounded gradients; the bias sees the gradient as it is."""
    torch.manual_seed(0)
    layer, x, upstream = nn.Linear(5, 3), torch.randn(4, 5, requires_grad=True), torch.randn(4, 3)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    xq, wq = round_mantissa(x, 2), round_mantissa(layer.weight, 2)
    for gradients in (False, True):
        x.grad = layer.weight.grad = layer.bias.grad = None
        with simulate_mantissa(layer, 2, gradients=gradients):
            y = layer(x)
        y.backward(upstream)
        g = round_mantissa(upstream, 2) if gradients else upstream
        torch.testing.assert_close(y, xq @ wq.t() + layer.bias)
        torch.testing.assert_close(x.grad, g @ wq)
        torch.testing.assert_close(layer.weight.grad, g.t() @ xq)
        torch.testing.assert_close(layer.bias.grad, upstream.sum(0))
    assert layer.state_dict().keys() == before.keys() and "forward" not in layer.__dict__
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_all_bits_leave_a_model_exactly_as_it_is():
    model, ids = tiny(), torch.tensor([row["input_ids"] for row in ROWS[:4]])
    plain = model(ids, labels=ids)
    plain.loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with simulate_mantissa(model, 23, head=True) as simulation:
        found = model(ids, labels=ids)
        found.loss.backward()
    assert torch.equal(found.logits, plain.logits) and "lm_head" in simulation.layers
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_conv1d_and_which_layers_are_taken():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)).eval()
    ids = torch.arange(8)[None]
    plain = model(ids).logits
    with simulate_mantissa(model, 23) as simulation:
        torch.testing.assert_close(model(ids).logits, plain)
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert simulation.layers == [f"transformer.h.0.{name}" for name in names]
    assert simulation.skipped == {"lm_head": "the head"}
    with simulate_mantissa(model, 1):
        assert not torch.allclose(model(ids).logits, plain)
    assert torch.equal(model(ids).logits, plain)


class Packed(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_packed_layers_are_listed_and_a_model_of_them_only_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), Packed(4, 4), nn.MultiheadAttention(4, 2))
    simulation = simulate_mantissa(model, 3)
    assert simulation.layers == ["0"] and list(simulation.skipped) == ["1", "2.out_proj"]
    assert "Packed has a forward of its own" in simulation.skipped["1"]
    with pytest.raises(ValueError, match=r"0 is simulated already; remove\(\) that simulation first"):
        simulate_mantissa(model, 2)
    whole = nn.Sequential(nn.Linear(4, 4), model)
    with pytest.raises(ValueError, match="1.0 is simulated already"):
        simulate_mantissa(whole, 2)
    assert simulated(whole) == ["1.0"]  # the first layer was left alone
    simulation.remove()
    with pytest.raises(
        ValueError, match="Sequential has no nn.Linear or Conv1D to simulate.*not quantised.*'0': 'Packed"
    ):
        simulate_mantissa(nn.Sequential(Packed(4, 4)), 3)


def test_a_quantised_model_trains_adapters_simulated_on_top(tmp_path):
    from hfgen.quantizers import EasyQuantConfig

    model = sandbox.load_model(quantization_config=EasyQuantConfig(bits=4))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with simulate_mantissa(model, 3) as simulation:
        assert simulation.layers and all(".lora_" in name for name in simulation.layers)
        assert any("q_proj.base_layer" in name for name in simulation.skipped)


def test_a_copy_made_meanwhile_computes_with_its_own_weights():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with simulate_mantissa(layer, 23):
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            layer.weight.zero_()
        assert float(twin(x).sub(twin.bias).abs().max().detach()) > 0
    assert "forward" in twin.__dict__  # still simulated: copies are the owner's


def test_bfloat16_and_autocast():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4).bfloat16(), torch.randn(3, 8).bfloat16()
    plain = layer(x)
    with simulate_mantissa(layer, 7, gradients=True) as simulation, simulation.counting() as counts:
        found = layer(x)
        found.sum().backward()
    assert found.dtype == torch.bfloat16 and counts.tolist() == [
        [24.0, 0.0, 24.0, 0.0],
        [32.0, 0.0, 32.0, 0.0],
    ]  # nothing to round
    torch.testing.assert_close(found, plain, rtol=0.01, atol=0.01)
    with simulate_mantissa(layer, 2) as simulation, simulation.counting() as counts:
        layer(x)
    for exact, found in zip((x.float(), layer.weight.detach().float()), counts.tolist(), strict=True):
        rounded, size = round_mantissa(exact, 2), exact.numel()
        error = ((rounded - exact) / exact).abs().double().sum()
        assert found == pytest.approx([size, float((exact != rounded).sum()), size, float(error)])
    layer = layer.float()
    with simulate_mantissa(layer, 3, gradients=True), torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16


# --- in runs --------------------------------------------------------------------------------------------------------


def simulated(model):
    return [name for name, module in model.named_modules() if isinstance(module.__dict__.get("forward"), _Forward)]


def run(folder, callback, extra=(), **arguments):
    options = {"save_strategy": "no", **arguments}
    given = tiny_run(str(folder), **options)
    trainer = Trainer(**given, callbacks=[*([callback] if callback else []), *extra])
    trainer.train()
    return trainer


class Spy(TrainerCallback):
    def __init__(self, error_at=None):
        self.seen, self.error_at = [], error_at

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(len(simulated(model)))
        if state.global_step == self.error_at:
            raise RuntimeError("the test fails this run")


def test_a_run_is_simulated_while_it_lasts_and_only_watched_without_bits(tmp_path):
    spy, callback = Spy(), LowMantissaCallback(mantissa_bits=2, every=2)
    low = run(tmp_path, callback, [spy])
    assert spy.seen == [7] * 6 and simulated(low.model) == []
    assert [row["step"] for row in callback.history] == [0, 2, 4, 6] and callback.fired == 4
    for row in callback.history:
        assert row["sharpness"] > 0 and 0.5 < row["activations_changed"] <= 1 == row["weights_changed"]
        assert 0.02 < row["activations_error"] < 0.1 and 0.02 < row["weights_error"] < 0.1
        assert row["tokens"] == 16 * 15
    watching = LowMantissaCallback(every=2)
    watched, plain = run(tmp_path, watching), run(tmp_path, None)
    assert torch.equal(all_weights(watched), all_weights(plain))
    assert not torch.equal(all_weights(low), all_weights(plain))
    assert set(watching.history[0]) == {"step", "tokens", "sharpness", "loss"} and watching.fired == 4
    logged = [row["hfgen/low_mantissa/sharpness"] for row in low.state.log_history if "hfgen/low_mantissa/step" in row]
    assert logged == [row["sharpness"] for row in callback.history]


def test_looks_and_evaluations_see_the_simulated_model_and_what_is_saved_is_plain(tmp_path):
    callback = LowMantissaCallback(mantissa_bits=1, every=3, rows=100, tokens=10_000)
    given = tiny_run(str(tmp_path), evaluate_every=6, save_strategy="steps", save_steps=6)
    trainer = Trainer(**given, callbacks=[callback])
    trainer.train()
    during = next(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
    after = trainer.evaluate()["eval_loss"]
    with simulate_mantissa(trainer.model, 1):
        again = trainer.evaluate()["eval_loss"]
        ids = torch.tensor([row["input_ids"] for row in ROWS[:16]])
        with torch.no_grad():
            logits = trainer.model.eval()(ids).logits[:, :-1]
    assert during == again != after
    last = callback.history[-1]
    assert last["sharpness"] == pytest.approx(loss_sharpness(logits, ids[:, 1:]).item(), rel=1e-5)
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert saved.state_dict().keys() == tiny().state_dict().keys()
    assert all(torch.equal(value, trainer.model.state_dict()[key]) for key, value in saved.state_dict().items())


@pytest.mark.parametrize("how", ["forward", "again", "another"])
def test_a_run_that_fails_leaves_no_simulation_behind(tmp_path, how):
    callback, ids = LowMantissaCallback(mantissa_bits=2, every=2), torch.tensor([ROWS[0]["input_ids"]])
    given = tiny_run(str(tmp_path), save_strategy="no")
    plain = copy.deepcopy(given["model"])
    trainer = Trainer(**given, callbacks=[callback, Spy(error_at=2)])
    with pytest.raises(RuntimeError, match="the test fails this run"):
        trainer.train()
    model = trainer.model
    if how == "forward":  # even of a part of it
        model.model.layers[0].mlp(torch.ones(1, 16))
        assert simulated(model) == []
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)
        return
    second = callback if how == "again" else LowMantissaCallback(mantissa_bits=3, every=2)
    spy = Spy()
    Trainer(model, given["args"], train_dataset=given["train_dataset"], callbacks=[second, spy]).train()
    assert spy.seen == [7] * 6 and simulated(model) == [] and second.history[-1]["step"] == 6


def test_other_threads_of_a_running_training_stay_simulated(tmp_path):
    """autograd recomputes checkpointed layers in its own thread where there is a GPU: the loop is not its caller."""
    seen = []

    class Thread(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            layer = model.model.layers[0].mlp.gate_proj
            worker = threading.Thread(target=lambda: seen.append(layer(torch.full((1, 16), 1.1)).detach()))
            worker.start()
            worker.join()
            seen.append(layer(torch.full((1, 16), 1.1)).detach())
            assert len(simulated(model)) == 7

    run(tmp_path, LowMantissaCallback(mantissa_bits=1, every=4), [Thread()], max_steps=2)
    assert torch.equal(seen[0], seen[1])


def test_checkpointing_recomputes_the_same_and_accumulation_and_bf16_work(tmp_path):
    one = run(tmp_path, LowMantissaCallback(mantissa_bits=3, gradients=True, every=2))
    for kwargs in ({"use_reentrant": False}, {"use_reentrant": True}):
        two = run(
            tmp_path, LowMantissaCallback(mantissa_bits=3, gradients=True, every=2), gradient_checkpointing=True,
            gradient_checkpointing_kwargs=kwargs,
        )  # fmt: skip
        assert torch.equal(all_weights(one), all_weights(two))
    for arguments in ({"bf16": True}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        callback = LowMantissaCallback(mantissa_bits=3, every=2, rows=16)
        run(tmp_path, callback, max_steps=2, learning_rate=1e-4, **arguments)
        assert callback.history[0] == pytest.approx(one_look(tmp_path), rel=0.05)


def one_look(folder):
    callback = LowMantissaCallback(mantissa_bits=3, every=2, rows=16)
    run(folder, callback, max_steps=2, learning_rate=1e-4)
    return callback.history[0]


def test_sfttrainer_and_lora(tmp_path):
    rows = Dataset.from_list(
        [{"prompt": f"R{'abcdefgh'[i:]}=", "completion": "jihgfedc"[: 8 - i // 2]} for i in range(8)]
    )
    for peft_config in (None, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")):
        args = SFTConfig(
            str(tmp_path), per_device_train_batch_size=4, max_steps=2, use_cpu=True, bf16=False, logging_steps=1,
            gradient_checkpointing=True, report_to="none", disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        callback = LowMantissaCallback(mantissa_bits=2, every=1, tokens=1000)
        trainer = SFTTrainer(
            sandbox.load_model(), args, train_dataset=rows, processing_class=sandbox.load_tokenizer(),
            peft_config=peft_config, callbacks=[callback],
        )  # fmt: skip
        trainer.train()
        layers = callback.simulation.layers
        assert [row["step"] for row in callback.history] == [0, 1, 2] and simulated(trainer.model) == []
        assert any("lora_A" in name for name in layers) == (peft_config is not None)
        assert any(name.endswith("q_proj.base_layer") for name in layers) == (peft_config is not None)
        assert not any("lm_head" in name for name in layers)


def test_nothing_to_round_is_said(tmp_path, caplog):
    """Numbers that have few bits already: the witness stays flat."""
    callback = LowMantissaCallback(mantissa_bits=23, every=2)
    run(tmp_path, callback, max_steps=2)
    assert (
        callback.fired == 0
        and callback.history[0]["weights_changed"] == callback.history[0]["activations_changed"] == 0.0
    )
    assert "with mantissa_bits at one for which rounding changed a number, never happened" in caplog.text


def test_looks_at_the_users_evaluations(tmp_path):
    callback = LowMantissaCallback(mantissa_bits=3, every=None)
    Trainer(**tiny_run(str(tmp_path), evaluate_every=3, save_strategy="no"), callbacks=[callback]).train()
    assert [row["step"] for row in callback.history] == [0, 3, 6]
    with pytest.raises(ValueError, match="args.eval_strategy is 'no'.*or give every="):
        run(tmp_path, LowMantissaCallback(every=None))


@pytest.mark.slow
def test_two_processes_train_and_see_what_one_does(tmp_path):
    """DDP and FSDP2 (on CPU): ranks equal to the bit, and to one process up to what the order of sums makes of rounding."""
    here = Path(__file__).parents[1] / "distributed"
    script = tmp_path / "low.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(here)}
    launch, found = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], {}
    for mode, start in (("one", []), ("ddp", launch), ("fsdp2", launch)):
        command = [sys.executable, *start, str(script), mode, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        found[mode] = [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"{mode}-*.json"))]
    (one,) = found["one"]
    assert len(one) == 3 and one[-1]["loss"] < one[0]["loss"] - 0.1
    for mode in ("ddp", "fsdp2"):
        first, second = found[mode]
        assert first == second, mode
        for row, wanted in zip(first, one, strict=True):
            assert row == pytest.approx(wanted, rel=2e-3), mode


SCRIPT = """
import json, os, sys
from contextlib import nullcontext
from pathlib import Path
import torch
from fsdp_cpu_shim import fsdp2
from transformers import Trainer
from hfgen.callbacks import LowMantissaCallback
from hfgen.kit.examples import tiny_run

mode, folder = sys.argv[1], Path(sys.argv[2])
ranks = int(os.environ.get("WORLD_SIZE", 1))
callback = LowMantissaCallback(mantissa_bits=3, gradients=True, every=2, rows=16)
with fsdp2() if mode == "fsdp2" else nullcontext():
    run = tiny_run(str(folder / mode), layers=2, max_steps=4, per_device_train_batch_size=8 // ranks, save_strategy="no")
    trainer = Trainer(**run, callbacks=[callback])
    trainer.train()
(folder / f"{mode}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(callback.history))
if torch.distributed.is_initialized():
    torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads do not always end
"""


# --- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mantissa_bits": 0}, "LowMantissaCallback.mantissa_bits is 0; give an integer of at least 1"),
        ({"mantissa_bits": 24}, "LowMantissaCallback.mantissa_bits is 24; float32 has 23 mantissa bits"),
        ({"mantissa_bits": 2.0}, "LowMantissaCallback.mantissa_bits is 2.0 .float."),
        ({"mantissa_bits": 2, "exponent": 3}, "LowMantissaCallback.exponent is 3; give one of None, 4, 5"),
        ({"mantissa_bits": 2, "rounding": "truncated"}, "rounding is 'truncated'; did you mean 'truncate'"),
        ({"mantissa_bits": 2, "gradients": 1}, "LowMantissaCallback.gradients is 1 .int.; give True or False"),
        ({"mantissa_bits": 2, "head": None}, "LowMantissaCallback.head is None"),
        ({"exponent": 5}, "exponent is 5 but mantissa_bits is None; set mantissa_bits too"),
        ({"gradients": True}, "gradients is True but mantissa_bits is None"),
        ({"rounding": "truncate"}, "rounding is 'truncate' but mantissa_bits is None"),
        ({"epsilon": 0.0}, "LowMantissaCallback.epsilon is 0.0"),
        ({"rows": 0}, "LowMantissaCallback.rows is 0"),
        ({"tokens": "8"}, "LowMantissaCallback.tokens is '8'"),
        ({"every": 0}, "LowMantissaCallback.every is 0"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        LowMantissaCallback(**options)


def test_data_parallel_is_refused(tmp_path):
    given = tiny_run(str(tmp_path), save_strategy="no")
    trainer = Trainer(**given, callbacks=[LowMantissaCallback(mantissa_bits=3)])
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="args.n_gpu is 2: nn.DataParallel .*accelerate launch"):
        trainer.train()
    assert simulated(trainer.model) == []


def test_bad_tensors():
    with pytest.raises(TypeError, match=re.escape("round_mantissa.x is torch.float64; give a tensor of float32")):
        round_mantissa(torch.ones(2, dtype=torch.float64), 3)
    with pytest.raises(TypeError, match="round_mantissa.x is list"):
        round_mantissa([1.0], 3)
    with pytest.raises(ValueError, match="round_mantissa.bits is 24"):
        round_mantissa(torch.ones(2), 24)
    with pytest.raises(ValueError, match=r"loss_sharpness.labels is torch.int64 of shape \(2,\) for logits of shape"):
        loss_sharpness(torch.ones(3, 4), torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="loss_sharpness.labels holds only -100"):
        loss_sharpness(torch.ones(1, 4), torch.tensor([-100]))
    with pytest.raises(ValueError, match="loss_sharpness.epsilon is -1"):
        loss_sharpness(torch.ones(1, 4), torch.tensor([0]), -1)


# --- evidence -------------------------------------------------------------------------------------------------------


def test_generated_text_follows_its_chain_and_its_entropy_is_the_floor():
    rows, floor = evidence.text(100, evidence.SETTINGS)
    assert len(rows) == 120 * 16 and len(rows[0]["input_ids"]) == 33
    pairs = {(a, b) for row in rows for a, b in zip(row["input_ids"], row["input_ids"][1:], strict=False)}
    assert len(pairs) <= 64 * 8 and 1.0 < floor < math.log(8)
    counts = np.zeros((64, 64))
    for row in rows:
        np.add.at(counts, (row["input_ids"][:-1], row["input_ids"][1:]), 1)
    p = counts / counts.sum(-1, keepdims=True)
    plug_in = -(counts * np.log(np.where(p > 0, p, 1))).sum() / counts.sum()
    assert plug_in == pytest.approx(floor, abs=0.01)


def test_the_experiment_runs_and_its_verdicts_follow_from_the_figures():
    found = evidence.run_arm("bits3", 100, evidence.EXPERIMENT.smoke_settings, lambda done, of: None)
    assert set(found) == {metric.key for metric in evidence.METRICS} and all(map(math.isfinite, found.values()))
    assert found["diverged"] == 1.0 and found["changed"] > 0.9  # eight steps learn nothing
    full = {"sharpness_25": [0.1, 0.11, 0.12], "loss_25": [2.0, 2.1, 2.2], "diverged": [0.0, 0.2, 0.0]}
    sharper = {"sharpness_25": [0.2, 0.21, 0.22], "loss_25": [2.0, 2.1, 2.2], "diverged": [0.4, 0.6, 0.4]}
    worse = {"sharpness_25": [0.05, 0.06, 0.07], "loss_25": [3.0, 3.1, 3.2], "diverged": [0.0, 0.2, 0.0]}
    samples = {"full": full, "bits7": full, "bits3": full, "bits2": sharper, "bits1": worse}
    verdicts = {v.arm: v.verdict for v in evidence.judge(samples, evidence.SETTINGS)}
    assert verdicts == {"bits3": "partly", "bits2": "reproduced", "bits1": "not reproduced"}
    lost = {**samples, "full": {**full, "diverged": [0.6, 0.8, 0.6]}}
    assert {v.verdict for v in evidence.judge(lost, evidence.SETTINGS)} == {"void"}
