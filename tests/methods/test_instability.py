"""Instability: attention logits, log Z and gradients against float64 brute force, the prediction, the findings."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.callbacks import InstabilityCallback
from hfgen_plugins.callbacks.instability.instability import (
    chance_of_crossing,
    crossing,
    deviation,
    largest_logit,
    watch,
)

SHAPE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 24, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ROWS = [[(5 * i + j * j) % 24 for j in range(12 - i % 3)] for i in range(16)]
DATA = [{"input_ids": ids, "labels": ids} for ids in ROWS]


def tiny(kind=LlamaForCausalLM, config=LlamaConfig, attention="sdpa", **options):
    torch.manual_seed(0)
    return kind(config(**{**SHAPE, **options}, attn_implementation=attention))


def collate(rows):
    length = max(len(row["input_ids"]) for row in rows)
    fill = [length - len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * n for row, n in zip(rows, fill, strict=True)]),
        "attention_mask": torch.tensor([[1] * (length - n) + [0] * n for n in fill]),
        "labels": torch.tensor([row["labels"] + [-100] * n for row, n in zip(rows, fill, strict=True)]),
    }


def run(folder, callback, model=None, others=(), **arguments):
    given = {
        "max_steps": 6, "logging_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "per_device_train_batch_size": 4, "learning_rate": 1e-3, **arguments,
    }  # fmt: skip
    trainer = Trainer(
        tiny() if model is None else model, TrainingArguments(str(folder), **given), train_dataset=DATA,
        data_collator=collate, callbacks=[callback, *others],
    )  # fmt: skip
    trainer.train()
    return trainer


# --- formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2**22, 40])
def test_the_largest_logit_equals_float64_brute_force(block, monkeypatch):
    monkeypatch.setattr("hfgen_plugins.callbacks.instability.instability._BLOCK", block)
    torch.manual_seed(0)
    query, key = torch.randn(3, 4, 7, 5), torch.randn(3, 2, 7, 5)
    allowed = (torch.rand(3, 1, 7, 7) > 0.4) | torch.eye(7, dtype=torch.bool)
    rows = torch.rand(3, 7) > 0.3
    expected = max(
        sum(float(a) * float(b) for a, b in zip(query[r, h, i].double(), key[r, h // 2, j].double(), strict=True)) * 0.3
        for r in range(3) for h in range(4) for i in range(7) for j in range(7) if allowed[r, 0, i, j] and rows[r, i]
    )  # fmt: skip
    assert float(largest_logit(query, key, allowed, 0.3, rows)) == pytest.approx(expected, rel=1e-6)


def rotated(query, key, model, length):
    position = torch.arange(length)[None]
    cos, sin = model.model.rotary_emb(query, position)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return apply_rotary_pos_emb(query, key, cos, sin)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_models_logits_are_those_of_its_projections(attention):
    """By hand from the projections of both layers, causal, whatever the implementation; it is put back afterwards."""
    model, ids, seen = tiny(attention=attention).eval(), torch.tensor([ROWS[0], ROWS[3]]), []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda m, a, k: seen.append((m, k["hidden_states"])), with_kwargs=True
        )
    with torch.no_grad():
        plain = model(ids).logits
        seen.clear()
        with watch(model) as found:
            watched = model(ids).logits
        for (module, hidden), value in zip(seen, found.layers.values(), strict=True):
            query = module.q_proj(hidden).view(2, 12, 4, 4).transpose(1, 2)
            key = module.k_proj(hidden).view(2, 12, 2, 4).transpose(1, 2)
            query, key = (t.double() for t in rotated(query, key, model, 12))
            products = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 2
            assert float(value) == pytest.approx(float(products[..., torch.ones(12, 12).tril().bool()].max()), rel=1e-6)
    torch.testing.assert_close(watched, plain, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 4}),  # normalised queries and keys
        (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 4, "attn_logit_softcapping": 5.0, "sliding_window": 4}),
        (BertForSequenceClassification, BertConfig, {"pad_token_id": 0}),
    ],
)
def test_other_architectures_compute_the_same_while_they_are_watched(kind, config, options):
    attention = "eager" if kind is Gemma2ForCausalLM else "sdpa"
    model = tiny(kind, config, attention, **options).eval()
    batch = {k: v for k, v in collate(DATA[:3]).items() if k != "labels"}
    with torch.no_grad():
        plain = model(**batch).logits
        with watch(model) as found:
            watched = model(**batch).logits
    valid = batch["attention_mask"].bool() if plain.dim() == 3 else slice(None)
    torch.testing.assert_close(watched[valid], plain[valid], rtol=1e-3, atol=1e-5)
    assert len(found.layers) == 2 and all(math.isfinite(v) for v in found.layers.values())


def test_metrics_of_a_look_equal_brute_force(tmp_path):
    model = tiny()
    expected = []
    with torch.no_grad():
        for ids in ROWS:
            expected += list(model.eval()(torch.tensor([ids])).logits[0, :-1].double())
    callback = InstabilityCallback(every=6, rows=16, tokens=10_000)

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.rms = [float(p.grad.double().square().mean().sqrt()) for p in model.parameters()]

    grads = Gradients()
    run(tmp_path, callback, model=model, others=[grads])
    first, last = callback.history
    assert first["log_z"] == pytest.approx(np.mean([float(z.exp().sum().log()) for z in expected]), rel=1e-6)
    assert first["logit_mean"] == pytest.approx(np.mean([float(z.mean()) for z in expected]), rel=1e-5, abs=1e-7)
    assert "grad_rms_min" not in first  # there was no step before
    assert last["grad_rms_min"] == pytest.approx(min(grads.rms), rel=1e-5) and last["eps_share"] == 0.0


def test_padding_does_not_count():
    """A padding token with a huge embedding attends, but its logits are not the model's."""
    model = tiny().eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(50)
    found = []
    for rows in ([ROWS[0]], [ROWS[0], ROWS[0] + [1] * 6]):
        batch = collate([{"input_ids": ids, "labels": ids} for ids in rows])
        if len(rows) > 1:
            batch["attention_mask"][1, 12:] = 0
        with torch.no_grad(), watch(model) as attention:
            attention.rows = batch["attention_mask"].bool()
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
        found.append(float(next(iter(attention.layers.values()))))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-0.3, 0.5), min_size=4, max_size=10), st.floats(0.001, 0.02), st.integers(1, 500))
def test_the_prediction_equals_least_squares_in_float64(noise, rate, ahead):
    steps = [100 * i for i in range(len(noise))]
    values = [math.exp(rate * s + e) for s, e in zip(steps, noise, strict=True)]
    design = np.stack([np.ones(len(steps)), steps], 1)
    (start, slope), rest, *_ = np.linalg.lstsq(design, np.log(values), rcond=None)
    until = steps[-1] + ahead
    found = chance_of_crossing(steps, values, 1e4, until)
    if slope <= 0:
        assert found == 0.0
        return
    from scipy.stats import t

    variance = max(float(rest[0]) / (len(steps) - 2), 1e-12)
    at = np.array([1.0, until])
    error = math.sqrt(variance * (1 + at @ np.linalg.inv(design.T @ design) @ at))
    assert found == pytest.approx(t.cdf((start + slope * until - math.log(1e4)) / error, len(steps) - 2), abs=1e-6)
    assert crossing(steps, values, 1e4) == pytest.approx((math.log(1e4) - start) / slope, rel=1e-6)


def test_the_prediction_of_an_exact_exponential():
    steps = list(range(0, 600, 100))
    values = [math.exp(0.01 * s) for s in steps]
    assert crossing(steps, values, 1e4) == pytest.approx(math.log(1e4) / 0.01)
    assert chance_of_crossing(steps, values, 1e4, 930) > 0.99 and chance_of_crossing(steps, values, 1e4, 910) < 0.01
    assert (
        chance_of_crossing(steps[:3], values[:3], 1e4, 1e9) == 0.0 == chance_of_crossing(steps, values[::-1], 1e4, 1e9)
    )


def test_robust_deviations():
    losses = [2.0, 3.0, 1.0, 2.5, 1.5]
    assert deviation([*losses, 6.0]) == pytest.approx(4.0 / (1.4826 * 0.5))
    assert deviation([2.0] * 5 + [3.0]) == pytest.approx(10.0)  # at least a tenth of a nat
    assert deviation([20.0] * 5 + [30.0]) == pytest.approx(50.0)  # at least 1 % of the median


# --- in runs ------------------------------------------------------------------------------------------------------


def test_a_healthy_run_has_no_findings(tmp_path):
    callback = InstabilityCallback(every=2)
    trainer = run(tmp_path, callback)
    assert callback.findings == [] and [row["step"] for row in callback.history] == [0, 2, 4, 6]
    assert set(callback.history[-1]) == {
        "step", "log_z", "logit_mean", "attn_logit_max", "attn_layer", "grad_rms_min", "eps_share"
    }  # fmt: skip
    assert sum("hfgen/instability/log_z" in row for row in trainer.state.log_history) == 4


class Grow(TrainerCallback):
    """Multiplies the queries of layer 1, and the head if asked, after every step."""

    def __init__(self, factor, head=1.0):
        self.factor, self.head = factor, head

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight.mul_(self.factor)
            model.lm_head.weight.mul_(self.head)


def test_a_blow_up_is_predicted_before_it_comes(tmp_path, caplog):
    callback = InstabilityCallback(every=2, warn=1e2)
    run(tmp_path, callback, others=[Grow(1.6)], max_steps=40, learning_rate=0.0)
    found = {f["kind"]: f for f in callback.findings}
    passed = next(row["step"] for row in callback.history if row["attn_logit_max"] >= 1e4)
    assert found["blow_up"]["step"] < passed and found["blow_up"]["confidence"] >= 0.95
    said = int(found["blow_up"]["sentence"].rsplit("step ", 1)[1].rstrip("."))
    assert abs(said - passed) <= 2 and "Attention logits grow" in caplog.text
    assert "in layer 1" in found["attention_logits"]["sentence"]


def test_diverging_output_logits(tmp_path):
    callback = InstabilityCallback(every=2)
    run(tmp_path, callback, others=[Grow(1.0, head=4.0)], learning_rate=0.0)
    found = {f["kind"]: f for f in callback.findings}
    assert set(found) == {"output_logits", "divergence"}  # the loss of such logits is high as well
    assert "log Z has moved from" in found["output_logits"]["sentence"]
    assert "output_logits" in found["divergence"]["explains"]


def test_gradients_below_adams_eps(tmp_path):
    callback = InstabilityCallback(every=2)
    run(tmp_path, callback, adam_epsilon=1.0)
    assert [f["kind"] for f in callback.findings] == ["adam_eps"] and callback.history[-1]["eps_share"] == 1.0
    without = InstabilityCallback(every=2)
    run(tmp_path, without, optim="sgd")
    assert "eps_share" not in without.history[-1] and without.findings == []


def test_spikes_and_divergence_of_the_loss():
    spiky = InstabilityCallback()
    for step in range(30):
        spiky._take_loss(step, 2.0 - 0.01 * step + (5.0 if step == 20 else 0.0))
    (found,) = spiky.findings
    assert (found["kind"], found["step"]) == ("loss_spike", 20) and found["confidence"] > 0.99
    high = InstabilityCallback()
    for step in range(40):
        high._take_loss(step, 3.0 + 0.05 * step)
    assert [f["kind"] for f in high.findings] == ["divergence"] and high.findings[0]["confidence"] > 0.99
    first = high.findings[0]["step"]
    assert first == next(
        s for s in range(40) if 3.0 + 0.05 * s > 3.0 + 0.3
    )  # the first of those in a row, not the last
    lost = InstabilityCallback()  # it had gained a nat: any loss above the first counts
    for step in range(60):
        lost._take_loss(step, 3.0 - 0.1 * step if step < 20 else 3.01)
    assert [(f["kind"], f["step"]) for f in lost.findings if f["kind"] == "divergence"] == [("divergence", 20)]
    at_once = InstabilityCallback()
    for step, loss in enumerate((2.3, 3.0, 5.0, 9.0)):
        at_once._take_loss(step, loss)
    (found,) = at_once.findings
    assert (found["kind"], found["step"]) == ("divergence", 2)
    assert found["confidence"] == pytest.approx(1 - math.exp(-2.7)) and "diverges at once" in found["sentence"]
    gone = InstabilityCallback()
    gone._take_loss(5, math.nan)
    assert gone.findings[0]["kind"] == "divergence" and "nan at step 5" in gone.findings[0]["sentence"]


def test_the_losses_survive_a_resume(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 4

    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole, rest = InstabilityCallback(every=2), InstabilityCallback(every=2)
    run(tmp_path / "a", whole, **options)
    run(tmp_path / "b", InstabilityCallback(every=2), others=[Stop()], **options)
    trainer = Trainer(
        tiny(), TrainingArguments(str(tmp_path / "b"), logging_steps=1, use_cpu=True, report_to="none", disable_tqdm=True,
                                  per_device_train_batch_size=4, learning_rate=1e-3, **options),
        train_dataset=DATA, data_collator=collate, callbacks=[rest],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    assert rest.history == whole.history and rest._losses == whole._losses and len(rest._losses) == 8


@pytest.mark.parametrize("lora", [False, True])
def test_sfttrainer_with_its_fused_head_checkpointing_and_peft(tmp_path, lora):
    rows = Dataset.from_list([{"prompt": f"R{'abcdefgh'[i:]}=", "completion": "jihgfedc"[: 8 - i]} for i in range(8)])
    args = SFTConfig(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, use_cpu=True, bf16=False, logging_steps=1,
        gradient_checkpointing=True, report_to="none", disable_tqdm=True, save_strategy="no", eval_strategy="steps",
        eval_steps=1,
    )  # fmt: skip
    callback = InstabilityCallback(every=1)
    model = sandbox.load_model()
    before = model.config._attn_implementation
    SFTTrainer(
        model, args, train_dataset=rows, eval_dataset=rows, callbacks=[callback],
        processing_class=sandbox.load_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None,
    ).train()  # fmt: skip
    assert [row["step"] for row in callback.history] == [0, 1, 2] and model.config._attn_implementation == before
    assert all(row["attn_logit_max"] > 0 and math.isfinite(row["log_z"]) for row in callback.history)
    assert "grad_rms_min" in callback.history[1]  # the adapter's B; its A has no gradient at the first step
    if lora:
        assert callback.history[1]["eps_share"] == 0.0


@pytest.mark.parametrize(
    "arguments", [{"bf16": True}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}]
)
def test_precision_and_accumulation(tmp_path, arguments):
    found, plain = InstabilityCallback(every=2, rows=8), InstabilityCallback(every=2, rows=8)
    run(tmp_path, found, **arguments)
    run(tmp_path, plain)
    for row, wanted in zip(found.history, plain.history, strict=True):
        assert row["log_z"] == pytest.approx(wanted["log_z"], rel=0.01)
        assert row["attn_logit_max"] == pytest.approx(wanted["attn_logit_max"], rel=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warn": 0}, "InstabilityCallback.warn is 0"),
        ({"alarm": 10.0}, "InstabilityCallback.alarm is 10.0; give a finite number above 1000"),
        ({"drift": "far"}, "InstabilityCallback.drift is 'far'"),
        ({"spike": -1.0}, "InstabilityCallback.spike is -1.0"),
        ({"confidence": 2}, "InstabilityCallback.confidence is 2"),
        ({"window": 3}, "InstabilityCallback.window is 3; give an integer of at least 4"),
        ({"rows": 0}, "InstabilityCallback.rows is 0"),
        ({"every": 0}, "InstabilityCallback.every is 0"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        InstabilityCallback(**options)
