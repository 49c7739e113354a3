"""Overfitting: the test against brute force and against its promise, the finding in runs, the kit's evaluation mode."""

import itertools
import json
import logging
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.callbacks import OverfitGapCallback
from hfgen.kit.monitor import MonitorCallback, _of_dataset
from hfgen_plugins.callbacks.overfit_gap.overfit_gap import _null, noise, p_value, rise_statistic, thinned

ROWS = [{"input_ids": (ids := [(5 * i + j * j) % 24 for j in range(12)]), "labels": ids} for i in range(16)]
NOISE = [
    {"input_ids": (ids := torch.randint(24, (12,), generator=torch.Generator().manual_seed(i)).tolist()), "labels": ids}
    for i in range(24)
]


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=24,
                    bos_token_id=None, eos_token_id=None, pad_token_id=None)
    )  # fmt: skip


def build(folder, *callbacks, eval_dataset=None, model=None, rows=ROWS[:8], **options):
    given = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "lr_scheduler_type": "constant", **options,
    }  # fmt: skip
    return Trainer(
        model or tiny(), TrainingArguments(str(folder), **given), train_dataset=rows,
        eval_dataset=eval_dataset or ROWS[8:], callbacks=list(callbacks),
    )  # fmt: skip


# --- the test -------------------------------------------------------------------------------------------------------

CURVES = st.lists(st.floats(-5, 5), min_size=4, max_size=12)


@settings(max_examples=60, deadline=None)
@given(CURVES)
def test_statistic_equals_float64_brute_force(y):
    n = len(y)
    sigma = math.sqrt(statistics.fmean((y[i - 1] - 2 * y[i] + y[i + 1]) ** 2 for i in range(1, n - 1)) / 6)
    assert float(noise(np.array(y))) == pytest.approx(sigma, abs=1e-9)
    if sigma > 1e-3:
        contrasts = [
            (statistics.fmean(y[b:]) - statistics.fmean(y[a:b])) / (sigma * math.sqrt(1 / (n - b) + 1 / (b - a)))
            for a, b in itertools.combinations(range(n), 2)
        ]
        assert float(rise_statistic(np.array(y))) == pytest.approx(max(contrasts), rel=1e-6, abs=1e-6)
        assert p_value(y) == (1 + sum(draw >= max(contrasts) - 1e-12 for draw in _null(n).tolist())) / 1000


def test_without_noise_the_sign_decides():
    assert rise_statistic(np.arange(6.0)) == np.inf and rise_statistic(-np.arange(6.0)) == -np.inf
    assert p_value([3.0, 2.0, 1.0, 2.0, 3.0]) > p_value([0.0, 1.0, 2.0, 3.0, 4.0]) == 0.001


def test_thinning():
    assert thinned(np.arange(7.0), 4).tolist() == [1.5, 3.5, 5.5] and thinned(np.arange(4.0), 4).tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert len(thinned(np.arange(1000.0))) <= 32


@pytest.mark.parametrize("n", [6, 12, 40])
def test_size_and_power_of_the_test(n):
    """At most alpha where the mean never rises (flat, straight down, decaying); nearly always where it does."""
    rng, steps = np.random.default_rng(1), np.arange(n)
    for mean in (np.zeros(n), -0.5 * steps, 5 * np.exp(-steps / 3)):
        alarms = sum(p_value((mean + rng.standard_normal(n)).tolist()) <= 0.05 for _ in range(400))
        assert alarms <= 35  # 20 expected at most; 35 has a chance of 0.1 %
    rising = np.abs(steps - n // 2) * 40.0 / n
    found = sum(p_value((rising + rng.standard_normal(n)).tolist()) <= 0.05 for _ in range(100))
    assert found >= (90 if n > 6 else 15)  # of six evaluations, three of which rise, little can be said


# --- in runs --------------------------------------------------------------------------------------------------------


def test_random_rows_learnt_by_heart_are_found(tmp_path, caplog):
    callback = OverfitGapCallback()
    trainer = build(
        tmp_path, callback, rows=NOISE[:8], eval_dataset=NOISE[8:], max_steps=60, eval_steps=3, logging_steps=3,
        learning_rate=2e-2, save_strategy="steps", save_steps=60,
    )  # fmt: skip
    trainer.train()
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    lowest = min(evaluations, key=lambda row: row["eval_loss"])
    (found,) = callback.findings
    assert found["kind"] == "overfit" and found["step"] == lowest["step"] < found["noticed"] < 60
    assert found["confidence"] >= 0.99 and "The model overfits" in found["sentence"]
    assert f"the checkpoint of step {lowest['step']}" in found["advice"] and found["level"] == "WARNING"
    assert caplog.text.count("The model overfits") == 1
    stored = json.loads((tmp_path / "checkpoint-60" / "trainer_state.json").read_text())
    copy = stored["stateful_callbacks"]["OverfitGapCallback"]["attributes"]["_saved"]["findings"]
    assert (
        copy == json.loads((tmp_path / "checkpoint-60" / "hfgen_overfit_gap.json").read_text())["findings"] == [found]
    )
    # the history, against the host's own log
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    for row, evaluation in zip(callback.history, evaluations, strict=True):
        so_far = [e["eval_loss"] for e in evaluations if e["step"] <= row["step"]]
        assert row["train_loss"] == losses[row["step"]]
        assert row["gap"] == pytest.approx(evaluation["eval_loss"] - losses[row["step"]], abs=1e-12)
        assert row["rise"] == pytest.approx(so_far[-1] / min(so_far) - 1, abs=1e-12)
    logged = [row["hfgen/overfit_gap/step"] for row in trainer.state.log_history if "hfgen/overfit_gap/rise" in row]
    assert logged == [row["step"] for row in callback.history]


def test_a_healthy_run_and_a_run_that_falls_apart_are_no_overfitting(tmp_path):
    callback = OverfitGapCallback(min_evaluations=4)
    build(tmp_path, callback, rows=ROWS, eval_dataset=ROWS, max_steps=20).train()
    assert callback.fired == 17 and not callback.findings
    # the training loss rises as well: not overfitting
    curve = [(i, 1 + abs(i - 5) / 5, 1 + abs(i - 5) / 9) for i in range(12)]
    callback._judge(curve, "", "")
    assert not callback.findings
    callback._judge([(s, v, 1 - s / 20) for s, v, _ in curve], "", "")
    assert [f["kind"] for f in callback.findings] == ["overfit"] and callback.findings[0]["step"] == 5
    wavering = OverfitGapCallback(min_evaluations=4)  # as much of itself, but too little in nats
    wavering._judge([(s, v / 100, 1 - s / 20) for s, v, _ in curve], "", "")
    assert not wavering.findings


def test_training_loss_is_weighted_by_steps_and_evaluation_is_in_the_middle(tmp_path):
    callback = OverfitGapCallback()
    trainer = build(tmp_path, callback, max_steps=12, logging_steps=2, eval_steps=5, gradient_accumulation_steps=2)
    trainer.train()
    loss = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    assert [row["step"] for row in callback.history] == [5, 10, 12]  # the host evaluates at the end
    assert callback.history[0]["train_loss"] == pytest.approx((loss[2] + loss[4]) / 2)
    assert callback.history[1]["train_loss"] == pytest.approx((loss[6] + loss[8] + loss[10]) / 3)


def test_several_evaluation_sets(tmp_path):
    callback = OverfitGapCallback(min_evaluations=4)
    sets = {"seen": ROWS[:8], "runtime": ROWS[8:]}  # a name like one of the host's metrics
    trainer = build(tmp_path, callback, eval_dataset=sets)
    trainer.train()
    for row in callback.history:
        evaluation = {k: v for r in trainer.state.log_history if r["step"] == row["step"] for k, v in r.items()}
        for name in sets:
            expected = evaluation[f"eval_{name}_loss"] - row[f"{name}/train_loss"]
            assert row[f"{name}/gap"] == pytest.approx(expected, abs=1e-12)
    assert len(callback.history) == 6 and set(callback.curves) == set(sets)
    logged = {key for row in trainer.state.log_history for key in row if key.startswith("hfgen/")}
    assert {"hfgen/overfit_gap/seen/gap", "hfgen/overfit_gap/runtime/p_value"} <= logged


def test_a_loss_that_is_no_number_is_a_finding(tmp_path, caplog):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.lm_head.weight.data.fill_(math.nan)

    callback = OverfitGapCallback()
    build(tmp_path, Breaks(), callback, logging_nan_inf_filter=False).train()
    assert [(f["kind"], f["step"], f["confidence"]) for f in callback.findings] == [("diverged", 3, 1.0)]
    json.dumps(callback.state(), allow_nan=False)


def test_in_sfttrainer_with_its_fused_head_and_peft(tmp_path):
    rows = [{"prompt": p, "completion": sandbox.tasks.R.gold(p)} for p in sandbox.tasks.R.prompts[:8]]
    from datasets import Dataset

    args = SFTConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none",
        logging_steps=1, eval_strategy="steps", eval_steps=1, gradient_checkpointing=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    callback = OverfitGapCallback(min_evaluations=4)
    trainer = SFTTrainer(
        sandbox.load_model(), args, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows),
        processing_class=sandbox.load_tokenizer(), peft_config=LoraConfig(task_type="CAUSAL_LM"), callbacks=[callback],
    )  # fmt: skip
    callback.attach(trainer)
    trainer.train()
    assert callback.fired == 1 and len(callback.history) == 4
    assert sum("hfgen/overfit_gap/gap" in row for row in trainer.state.log_history) == 4


def test_what_it_refuses(tmp_path):
    with pytest.raises(ValueError, match="args.eval_strategy is 'no'; OverfitGapCallback reads evaluations"):
        build(tmp_path, OverfitGapCallback(), eval_strategy="no").train()
    with pytest.raises(ValueError, match="args.logging_strategy is 'no', which hides the training loss"):
        build(tmp_path, OverfitGapCallback(), logging_strategy="no").train()
    unlabelled = [{"input_ids": row["input_ids"]} for row in ROWS]
    with pytest.raises(ValueError, match="no loss; OverfitGapCallback needs evaluation rows with labels"):
        build(tmp_path, OverfitGapCallback(), eval_dataset=unlabelled).train()
    for options in ({"alpha": 0.0}, {"alpha": 1.5}, {"min_rise": -0.1}, {"min_evaluations": 3}):
        with pytest.raises(ValueError, match=f"OverfitGapCallback.{next(iter(options))} is"):
            OverfitGapCallback(**options)


# --- the kit's evaluation mode and findings -------------------------------------------------------------------------


class Rides(MonitorCallback):
    name, cost, witness = "rides", "nothing at all", "an evaluation of the run"

    def look(self, event):
        self.fire()
        return {"mean": float(sum(p.double().sum() for p in event.model.parameters()))}

    def evaluated(self, event, dataset, metrics):
        if event.state.global_step == 3:
            self.finding("third", 2, 0.5, "It is the third step.", level=logging.INFO)
        return {"loss": metrics["loss"]}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


@pytest.mark.parametrize("sets", [None, {"a": ROWS[:4], "b": ROWS[4:]}])
@pytest.mark.parametrize("eval_on_start", [False, True])
def test_resumed_the_log_is_the_same(tmp_path, sets, eval_on_start):
    runs = []
    options = {"eval_dataset": sets, "save_strategy": "steps", "save_steps": 4, "max_steps": 7, "eval_steps": 3}
    for name, stop in (("whole", ()), ("cut", (Stop(),)), ("cut", ())):
        callback = Rides(None)
        trainer = build(tmp_path / name, callback, *stop, eval_on_start=eval_on_start, **options)
        trainer.train(resume_from_checkpoint=name == "cut" and not stop)
        trainer.evaluate()  # after the run: no part of it
        rows = [{k: v for k, v in r.items() if k.startswith("hfgen")} for r in trainer.state.log_history]
        runs.append((callback.history, callback.findings, callback.fired, [r for r in rows if r]))
    whole, _, again = runs
    if not eval_on_start:
        assert whole == again
    else:  # the host itself evaluates a resumed run once more, at step 4
        kept = [row for row in again[0] if row["step"] != 4]
        assert whole[0] == kept and whole[1] == again[1]
    assert [row["step"] for row in whole[0]] == [0, 3, 6, 7]  # the host evaluates at the end
    keys = {"a/loss", "b/loss"} if sets else {"loss"}
    assert set(whole[0][1]) == {"step", "mean"} | keys and whole[2] == 4
    assert whole[1] == [
        {"kind": "third", "step": 2, "confidence": 0.5, "sentence": "It is the third step.", "advice": "",
         "level": "INFO", "noticed": 3}
    ]  # fmt: skip


def test_a_finding_is_said_once_and_checked(caplog):
    callback = Rides(None)
    with caplog.at_level(logging.INFO):
        assert callback.finding("x", 4, 0.987, "Something is wrong.", "Mend it.")
        assert not callback.finding("x", 9, 0.1, "Something else.")
    assert [r.getMessage() for r in caplog.records] == [
        "rides: Something is wrong. (since step 4, 99% sure) Mend it."
    ] and caplog.records[0].levelno == logging.WARNING
    with pytest.raises(ValueError, match=r"Rides.finding: confidence is 1.2; give a number from 0 to 1"):
        callback.finding("y", 0, 1.2, "No.")
    assert len(callback.findings) == 1


def test_the_sets_name_comes_from_the_hosts_metrics():
    assert _of_dataset({"eval_loss": 1.0, "eval_runtime": 2.0}) == ("", {"loss": 1.0, "runtime": 2.0})
    found = _of_dataset({"eval_a_loss": 1.0, "eval_a_my_runtime": 3.0, "eval_a_runtime": 2.0, "epoch": 1})
    assert found == ("a", {"loss": 1.0, "my_runtime": 3.0, "runtime": 2.0})
    assert _of_dataset({}) == ("", {})
