"""Calibration: every formula against float64 brute force, the test's promise, runs, masks, hosts, refusals."""

import json
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
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.callbacks import CalibrationCallback
from hfgen.kit.monitor import collated
from hfgen_plugins.callbacks.calibration import calibration
from hfgen_plugins.callbacks.calibration.calibration import (
    ece,
    of_mass,
    of_width,
    p_value,
    predictions,
    read,
    table,
    temperature,
)

ROWS = [{"input_ids": [(5 * i + j * j) % 24 for j in range(6 + i % 5)]} for i in range(24)]
for number, one in enumerate(ROWS):
    one["labels"] = [t if j >= 2 or number % 2 else -100 for j, t in enumerate(one["input_ids"])]


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=24,
                    bos_token_id=None, eos_token_id=None, pad_token_id=None)
    )  # fmt: skip


def bert(cls, labels=3):
    torch.manual_seed(0)
    config = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=24)
    config.num_labels = labels
    return cls(config)


def build(folder, *callbacks, model=None, rows=ROWS[:8], eval_dataset=None, **options):
    given = {
        "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "lr_scheduler_type": "constant", **options,
    }  # fmt: skip
    return Trainer(
        model or tiny(), TrainingArguments(str(folder), **given), train_dataset=rows,
        eval_dataset=eval_dataset or ROWS[8:], data_collator=collated, callbacks=list(callbacks),
    )  # fmt: skip


def samples(n, classes, seed, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator)
    return logits, torch.randint(classes, (n,), generator=generator)


# --- formulas -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(2, 6), st.integers(0, 99), st.integers(1, 20))
def test_scores_and_both_errors_equal_float64_brute_force(n, classes, seed, bins):
    logits, labels = samples(n, classes, seed)
    found = predictions(logits, labels).numpy()
    expected = []
    for z, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        p = [math.exp(v) / sum(map(math.exp, z)) for v in z]
        brier = sum((q - (k == label)) ** 2 for k, q in enumerate(p))
        expected.append([max(p), float(p.index(max(p)) == label), -math.log(p[label]), brier])
    assert np.abs(found - np.array(expected)).max() <= 1e-6
    confidence, right = found[:, 0], found[:, 1]
    error = 0.0
    for k in range(bins):
        members = [i for i in range(n) if k / bins < confidence[i] <= (k + 1) / bins]
        if members:
            error += abs(sum(right[members]) - sum(confidence[members])) / n
    assert ece(table(confidence, right, of_width(confidence, bins))) == pytest.approx(error, abs=1e-9)
    order = sorted(range(n), key=lambda i: (confidence[i], right[i]))
    error, start = 0.0, 0
    for k in range(bins):
        size = n // bins + (k < n % bins)
        members, start = order[start : start + size], start + size
        error += abs(sum(right[members]) - sum(confidence[members])) / n
    assert ece(table(confidence, right, of_mass(confidence, right, bins))) == pytest.approx(error, abs=1e-9)


def test_the_error_of_known_cases():
    sure = np.full(10, 0.9)
    right = np.array([1.0] * 9 + [0.0])
    assert ece(table(sure, right, of_width(sure, 15))) == pytest.approx(0.0, abs=1e-12)
    assert ece(table(sure, 1 - right, of_width(sure, 15))) == pytest.approx(0.8, abs=1e-12)
    assert of_width(np.array([0.0, 1e-9, 0.5, 0.51, 1.0]), 2).tolist() == [0, 0, 0, 1, 1]


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 40), st.integers(2, 6), st.integers(0, 99), st.sampled_from([0.3, 1.0, 4.0]))
def test_the_temperature_is_the_best_one(n, classes, seed, scale):
    """Against a fine grid in float64, and it makes the derivative zero unless it stands at an end."""
    logits, labels = samples(n, classes, seed, scale)
    labels[: n // 2] = logits[: n // 2].argmax(-1)
    found = temperature(logits, labels)

    def nll(heat):
        return float(-(logits.double() / heat).log_softmax(-1).gather(-1, labels[:, None]).mean())

    assert 0.05 * (1 - 1e-8) <= found <= 20 * (1 + 1e-8)
    assert nll(found) <= min(nll(heat) for heat in np.geomspace(0.05, 20, 400)) + 1e-6
    if 0.051 < found < 19.9:
        z, b = logits.double(), 1 / found
        slope = ((b * z).softmax(-1) * z).sum(-1) - z.gather(-1, labels[:, None])[:, 0]
        assert abs(float(slope.mean())) <= 1e-5


def test_the_temperature_undoes_a_scaling():
    logits, _ = samples(20000, 4, 1, 1.5)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(2))[:, 0]
    assert temperature(logits, labels) == pytest.approx(1.0, abs=0.03)
    assert temperature(5 * logits, labels) == pytest.approx(5 * temperature(logits, labels), rel=1e-4)
    assert temperature(logits, logits.argmax(-1)) == pytest.approx(0.05, rel=1e-6)


def test_a_calibrated_model_seldom_alarms_and_an_overconfident_one_always():
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(300):
        confidence = rng.uniform(0.3, 1, 200)
        right = (rng.random(200) < confidence).astype(float)
        groups = of_width(confidence, 15)
        alarms += p_value(confidence, groups, ece(table(confidence, right, groups))) <= 0.05
        assert p_value(confidence, groups, ece(table(confidence, np.zeros(200), groups))) == 0.001
    assert alarms <= 28  # 15 expected; 28 has a chance of 0.1 %


# --- what is read ---------------------------------------------------------------------------------------------------


class Loader:
    def __init__(self, rows):
        self.dataset, self.collate_fn = rows, collated


def test_tokens_are_read_with_their_masks_and_shift():
    model = tiny().eval()
    with torch.no_grad():
        seen, kept, labels = read(model, Loader(ROWS), 24, 5, "cpu")
        expected = []
        for row in ROWS:
            logits = model(torch.tensor([row["input_ids"]])).logits[0]
            for here, label in zip(logits[:-1], row["labels"][1:], strict=True):
                if label != -100:
                    expected.append(predictions(here[None], torch.tensor([label]))[0])
    torch.testing.assert_close(seen, torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert kept.shape == (len(expected), 24) and len(labels) == len(expected)


def test_token_classifiers_are_not_shifted_and_classifiers_have_one_label():
    with torch.no_grad():
        model = bert(BertForTokenClassification).eval()
        rows = [{"input_ids": r["input_ids"], "labels": [-100, *[t % 3 for t in r["input_ids"][1:]]]} for r in ROWS[:5]]
        seen, _, labels = read(model, Loader(rows), 9, 2, "cpu")
        assert labels.tolist() == [label for row in rows for label in row["labels"][1:]]
        logits = torch.cat([model(torch.tensor([r["input_ids"]])).logits[0, 1:] for r in rows])
        torch.testing.assert_close(seen, predictions(logits, labels), rtol=1e-5, atol=1e-6)
        model = bert(BertForSequenceClassification).eval()
        rows = [{"input_ids": r["input_ids"], "labels": i % 3} for i, r in enumerate(ROWS)]
        seen, _, labels = read(model, Loader(rows), 7, 2, "cpu")
        taken = np.linspace(0, 23, 7).round().astype(int)
        assert labels.tolist() == [i % 3 for i in taken]
        logits = torch.cat([model(torch.tensor([rows[i]["input_ids"]])).logits for i in taken])
        torch.testing.assert_close(seen, predictions(logits, labels), rtol=1e-5, atol=1e-6)


def test_a_large_vocabulary_is_sampled(monkeypatch):
    monkeypatch.setattr(calibration, "_KEPT", 24 * 24 * 2)  # two positions of each row
    with torch.no_grad():
        seen, kept, labels = read(tiny().eval(), Loader(ROWS), 24, 5, "cpu")
    assert len(labels) == len(kept) <= 48 < len(seen)


# --- in runs --------------------------------------------------------------------------------------------------------


def test_labels_learnt_by_heart_make_an_overconfident_model(tmp_path, caplog):
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(24, (6,), generator=generator).tolist(), "labels": i % 3} for i in range(96)]
    callback = CalibrationCallback(rows=64)
    sets = {"seen": rows[:24], "new": rows[24:]}
    build(
        tmp_path, callback, model=bert(BertForSequenceClassification), rows=rows[:24], eval_dataset=sets, max_steps=120,
        eval_steps=40, learning_rate=3e-2, per_device_train_batch_size=24, save_strategy="steps", save_steps=120,
    ).train()  # fmt: skip
    last = callback.history[-1]
    assert last["new/ece"] >= 0.3 and last["new/temperature"] > 2 and last["new/confidence"] > last["new/accuracy"]
    assert last["new/ece_mended"] < last["new/ece"] / 2 and last["new/nll_mended"] < last["new/nll"]
    assert last["new/temperature_labels"] == 64
    found = {f["kind"]: f for f in callback.findings}["overconfident/new"]
    first = next(row["step"] for row in callback.history if row["new/ece"] >= 0.1)
    assert found["step"] == first and found["confidence"] >= 0.99 and "overconfident on 'new'" in found["sentence"]
    assert caplog.text.count("overconfident on 'new'") == 1 and "overconfident/seen" not in callback.tables
    tables = callback.tables["new"]
    for kind, bins in (("width", 15), ("mass", 15)):
        rows_of = np.array(tables[kind])
        assert rows_of[:, 0].sum() == 64 and len(rows_of) <= bins
        assert ece(rows_of) == pytest.approx(last["new/ece" if kind == "width" else "new/ece_mass"], abs=1e-12)
    saved = json.loads((tmp_path / "checkpoint-120" / "hfgen_calibration.json").read_text())
    assert saved["state"]["tables"]["new"] == tables


def test_the_loss_is_the_hosts(tmp_path):
    """All evaluation rows, one label each: nll is eval_loss, accuracy the host's."""
    rows = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(ROWS)]
    callback = CalibrationCallback()
    trainer = build(
        tmp_path, callback, model=bert(BertForSequenceClassification), rows=rows[:8], eval_dataset=rows[8:],
        gradient_accumulation_steps=2, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    evaluations = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["nll"] for row in callback.history] == pytest.approx(evaluations, abs=1e-6)


def test_in_sfttrainer_with_its_fused_head_and_peft(tmp_path):
    rows = [{"prompt": p, "completion": sandbox.tasks.R.gold(p)} for p in sandbox.tasks.R.prompts[:8]]
    args = SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none",
        logging_steps=1, eval_strategy="steps", eval_steps=1, gradient_checkpointing=True, disable_tqdm=True,
        save_strategy="no", learning_rate=1e-2, remove_unused_columns=True,
    )  # fmt: skip
    callback = CalibrationCallback()
    trainer = SFTTrainer(
        sandbox.load_model(), args, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows),
        processing_class=sandbox.load_tokenizer(), peft_config=LoraConfig(task_type="CAUSAL_LM"), callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    host = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [r["nll"] for r in callback.history] == pytest.approx([r["eval_loss"] for r in host], abs=1e-5)
    accuracy = [r["eval_mean_token_accuracy"] for r in host]
    assert [r["accuracy"] for r in callback.history] == pytest.approx(accuracy, abs=1e-6)


def test_bfloat16_changes_little(tmp_path):
    plain, half = CalibrationCallback(), CalibrationCallback()
    build(tmp_path, plain).train()
    build(tmp_path, half, bf16=True).train()
    for row, wanted in zip(half.history, plain.history, strict=True):
        assert row["nll"] == pytest.approx(wanted["nll"], rel=0.02)


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_what_it_refuses(tmp_path):
    with pytest.raises(ValueError, match="args.eval_strategy is 'no'; CalibrationCallback reads evaluations"):
        build(tmp_path, CalibrationCallback(), eval_strategy="no").train()
    stream = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4).to_iterable_dataset()
    with pytest.raises(ValueError, match="a stream; CalibrationCallback needs one with a length"):
        build(tmp_path, CalibrationCallback(), eval_dataset=stream, per_device_eval_batch_size=1).train()
    with pytest.raises(ValueError, match="rows have no labels; give class or token labels"):
        build(tmp_path, CalibrationCallback(), eval_dataset=[{"input_ids": [1, 2]}] * 4).train()
    masked = [{"input_ids": [1, 2, 3], "labels": [1, -100, -100]}] * 4
    with pytest.raises(ValueError, match="the 4 evaluation rows read have no labels other than -100"):
        build(tmp_path, CalibrationCallback(), eval_dataset=masked, logging_nan_inf_filter=False).train()
    regression = [{"input_ids": [1, 2, 3], "labels": 0.5}] * 4
    with pytest.raises(ValueError, match="labels that are no integers"):
        build(
            tmp_path, CalibrationCallback(), model=bert(BertForSequenceClassification, 1), rows=regression,
            eval_dataset=regression,
        ).train()  # fmt: skip
    for options in ({"rows": 0}, {"bins": 0}, {"max_ece": 0.0}, {"alpha": 2.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"CalibrationCallback.{next(iter(options))} is"):
            CalibrationCallback(**options)
