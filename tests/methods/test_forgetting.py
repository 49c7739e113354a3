"""Forgetting: scores, interval and test against brute force; what is found in runs; precision, hosts, refusals."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

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
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.callbacks import ForgettingCallback
from hfgen.kit import monitor
from hfgen.kit.monitor import collated, rank_batches
from hfgen_plugins.callbacks.forgetting.forgetting import drop_draws, interval, read_rows, row_scores, sign_test

ROWS = [{"input_ids": [(5 * i + j * j) % 24 for j in range(6 + i % 5)]} for i in range(24)]
for number, one in enumerate(ROWS):
    one["labels"] = [t if j >= 2 or number % 2 else -100 for j, t in enumerate(one["input_ids"])]


def tiny(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=24,
                    bos_token_id=None, eos_token_id=None, pad_token_id=None, **options)
    )  # fmt: skip


def build(folder, *callbacks, model=None, rows=ROWS[:8], collator=collated, **options):
    given = {
        "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "lr_scheduler_type": "constant", **options,
    }  # fmt: skip
    return Trainer(
        model or tiny(), TrainingArguments(str(folder), **given), train_dataset=rows, eval_dataset=rows,
        data_collator=collator, callbacks=list(callbacks),
    )  # fmt: skip


# --- formulas -------------------------------------------------------------------------------------------------------


def test_scores_of_a_language_model_equal_float64_brute_force():
    """Padded and masked rows in batches of three; each row alone, unpadded, position by position."""
    model = tiny().double().eval()
    with torch.no_grad():
        found = row_scores(model, ROWS[:7], 3, "cpu")
        for row, (right, count, loss) in zip(ROWS, found.tolist(), strict=False):
            logits = model(torch.tensor([row["input_ids"]])).logits[0]
            expected = [0, 0, 0.0]
            for here, label in zip(logits[:-1], row["labels"][1:], strict=True):
                if label != -100:
                    p = (here.exp() / here.exp().sum())[label]
                    expected = [expected[0] + int(here.argmax() == label), expected[1] + 1, expected[2] - math.log(p)]
            assert [right, count] == expected[:2] and loss == pytest.approx(expected[2], abs=1e-6)


def test_scores_of_a_classifier():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=24)
    config.num_labels = 3
    model = BertForSequenceClassification(config).eval()
    rows = [{"input_ids": row["input_ids"], "labels": i % 3, "idx": i} for i, row in enumerate(ROWS[:5])]
    with torch.no_grad():
        found = row_scores(model, rows, 2, "cpu")
        for row, (right, count, loss) in zip(rows, found.tolist(), strict=True):
            output = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
            assert count == 1 and right == float(output.logits.argmax() == row["labels"])
            assert loss == pytest.approx(float(output.loss), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 8), st.integers(0, 8))
def test_sign_test_equals_counting_all_coins(worse, better):
    coins = list(itertools.product((0, 1), repeat=worse + better)) if worse + better <= 10 else None
    if coins is not None:
        assert sign_test(worse, better) == sum(sum(c) >= worse for c in coins) / len(coins)
    assert sign_test(0, better) == 1 and sign_test(30, 0) == 2.0**-30


def test_bootstrap_equals_brute_force_and_covers():
    rng = np.random.default_rng(0)
    labels = rng.integers(1, 5, 9).astype(float)
    then, now = labels - rng.integers(0, 2, 9), np.floor(labels / 2)
    draws = drop_draws(then, now, labels, seed=3)
    taken = np.random.default_rng(3).integers(9, size=(1000, 9))
    for draw, rows in zip(draws[:50], taken[:50], strict=True):
        expected = sum(then[i] - now[i] for i in rows) / sum(labels[i] for i in rows)
        assert draw == pytest.approx(expected, abs=1e-12)
    ordered = sorted(draws.tolist())
    low, high = interval(draws, 0.9)
    assert low == pytest.approx(ordered[49] * 0.05 + ordered[50] * 0.95, abs=1e-9) and high > low
    # 200 samples of 100 rows with a true drop of 0.2: the 95 % interval misses it about ten times
    missed = 0
    for _ in range(200):
        first = rng.random(100) < 0.7
        second = np.where(rng.random(100) < 2 / 7, False, first)
        ends = interval(drop_draws(first * 1.0, second * 1.0, np.ones(100), 1), 0.95)
        missed += not ends[0] <= 0.2 <= ends[1]
    assert missed <= 24


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 23), st.integers(1, 5), st.integers(1, 4))
def test_every_row_is_counted_once_over_processes(count, size, world):
    class Ranks:
        is_available = is_initialized = staticmethod(lambda: True)
        get_world_size = staticmethod(lambda: world)

    batches = []
    original = monitor.dist
    try:
        for rank in range(world):
            monitor.dist = type("D", (Ranks,), {"get_rank": staticmethod(lambda rank=rank: rank)})
            batches.append(list(rank_batches(count, size)))
    finally:
        monitor.dist = original
    assert len({len(own) for own in batches}) == 1 and all(numbers for own in batches for numbers, _ in own)
    counted = [i for own in batches for numbers, counting in own for i in numbers[:counting]]
    assert sorted(counted) == list(range(count))


# --- in runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A model that knows rows 0 to 15."""
    trainer = build(
        tmp_path_factory.mktemp("learnt"), rows=ROWS[:16], max_steps=150, eval_strategy="no", learning_rate=2e-2,
        per_device_train_batch_size=16,
    )  # fmt: skip
    trainer.train()
    return trainer.model.state_dict()


def known(state):
    model = tiny()
    model.load_state_dict(state)
    return model


def test_what_is_overwritten_is_found_and_what_is_kept_is_not(tmp_path, learnt, caplog):
    """Training on other answers to the first eight rows; the others stand for a skill that is rehearsed."""
    wrong = [{**row, "labels": [(t + 7) % 24 if t >= 0 else t for t in row["labels"]]} for row in ROWS[:8]]
    callback = ForgettingCallback({"lost": ROWS[:8], "kept": ROWS[8:16]})
    trainer = build(
        tmp_path, callback, model=known(learnt), rows=wrong + ROWS[8:16], max_steps=60, eval_steps=10,
        per_device_train_batch_size=16, save_strategy="steps", save_steps=60,
    )  # fmt: skip
    trainer.train()
    assert [row["step"] for row in callback.history] == [0, 10, 20, 30, 40, 50, 60]
    first, last = callback.history[0], callback.history[-1]
    assert first["lost/accuracy"] > 0.8 and first["lost/drop"] == first["worst_drop"] == 0 == first["lost/loss_rise"]
    assert last["lost/drop"] == pytest.approx(first["lost/accuracy"] - last["lost/accuracy"], abs=1e-12)
    assert last["lost/loss_rise"] == pytest.approx(last["lost/loss"] - first["lost/loss"], abs=1e-9)
    assert last["worst_drop"] == last["lost/drop"] > 0.4 > 0.1 > last["kept/drop"]
    assert last["mean_drop"] == pytest.approx((last["lost/drop"] + last["kept/drop"]) / 2, abs=1e-12)
    for key in ("lost/drop", "kept/drop", "mean_drop", "worst_drop"):
        assert last[f"{key}_low"] <= last[key] <= last[f"{key}_high"]
    assert last["worst_drop_low"] <= last["lost/drop_low"]
    with monitor.undisturbed(trainer.model):
        now = row_scores(trainer.model, callback.skills["lost"], 8, "cpu").numpy()[:, 0]
    then = np.array(callback.start["lost"])[:, 0]
    assert (last["lost/worse"], last["lost/better"]) == ((now < then).sum(), (now > then).sum())
    (found,) = callback.findings
    first_seen = next(row["step"] for row in callback.history if row["lost/drop"] >= 0.05)
    assert (found["kind"], found["step"]) == ("forgetting/lost", first_seen) and found["confidence"] >= 0.995
    assert f"The model forgets 'lost': its accuracy there was {first['lost/accuracy']:.1%} before" in found["sentence"]
    assert caplog.text.count("The model forgets") == 1 and callback.fired == 6
    json.dumps(callback.state(), allow_nan=False)


def test_several_evaluation_sets_and_accumulation_make_one_look_per_step(tmp_path):
    callback = ForgettingCallback({"a": ROWS[:4]})
    trainer = build(tmp_path, callback, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer.eval_dataset = {"x": ROWS[:3], "y": ROWS[3:6]}
    trainer.train()
    assert [row["step"] for row in callback.history] == [0, 2, 4]
    assert callback.history[0]["a/loss"] == pytest.approx(math.log(24), abs=0.3)


def test_a_denser_schedule_is_held_to_its_share(tmp_path):
    """8 rows a step; 24 rows read are 8 trained on: a look at every step takes 100 %, at every tenth 10 %."""
    with pytest.raises(
        ValueError, match=r"every is 3: reading 24 rows that often takes about 33% .* give at least 10,"
    ):
        build(tmp_path, ForgettingCallback({"a": ROWS}, every=3), eval_strategy="no").train()
    callback = ForgettingCallback({"a": ROWS}, every=10)
    build(tmp_path, callback, eval_strategy="no").train()
    assert [row["step"] for row in callback.history] == [0, 4]
    callback = ForgettingCallback({"a": ROWS}, every=3, share=0.4)
    build(tmp_path, callback, eval_strategy="no").train()
    assert [row["step"] for row in callback.history] == [0, 3, 4]


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_precision_and_checkpointing_change_little(tmp_path, options):
    plain, other = ForgettingCallback({"a": ROWS[:8]}), ForgettingCallback({"a": ROWS[:8]})
    build(tmp_path, plain).train()
    build(tmp_path, other, **options).train()
    for row, wanted in zip(other.history, plain.history, strict=True):
        assert row["a/loss"] == pytest.approx(wanted["a/loss"], rel=0.02)


def test_in_sfttrainer_with_its_fused_head_and_peft(tmp_path):
    """The trainer's own rows (prompt masked) as a skill: the loss is that of the host's evaluation."""
    rows = [{"prompt": p, "completion": sandbox.tasks.R.gold(p)} for p in sandbox.tasks.R.prompts[:8]]
    args = SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none",
        logging_steps=1, eval_strategy="steps", eval_steps=1, gradient_checkpointing=True, disable_tqdm=True,
        save_strategy="no", learning_rate=1e-2, average_tokens_across_devices=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        sandbox.load_model(), args, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows),
        processing_class=sandbox.load_tokenizer(), peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )  # fmt: skip
    callback = ForgettingCallback({"own": trainer.eval_dataset})
    trainer.add_callback(callback)
    trainer.train()
    evaluations = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    accuracies = [row["eval_mean_token_accuracy"] for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["own/loss"] for row in callback.history[1:]] == pytest.approx(evaluations, abs=1e-5)
    assert [row["own/accuracy"] for row in callback.history[1:]] == pytest.approx(accuracies, abs=1e-6)


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_rows_are_read_and_checked(tmp_path):
    row = {"text": "x", "input_ids": torch.tensor([1, 2, 3]), "completion_mask": [0, 1, 1], "score": None}
    assert read_rows("skills['a']", [row], 5) == [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    assert read_rows("skills['a']", [{"input_ids": [1], "label": 2}], 5) == [{"input_ids": [1], "labels": 2}]
    assert len(read_rows("skills['a']", Dataset.from_list(ROWS), 3)) == 3
    with pytest.raises(ValueError, match=r"skills\['a'\] has a row with \['text'\]; give numeric inputs and labels"):
        ForgettingCallback({"a": [{"text": "no"}]})
    with pytest.raises(TypeError, match=r"skills\['a'\] has a row 'no'; give mappings"):
        ForgettingCallback({"a": ["no"]})
    with pytest.raises(ValueError, match=r"skills\['a'\] has no rows"):
        ForgettingCallback({"a": []})
    masked = [{"input_ids": [1, 2], "labels": [1, -100]}]
    with pytest.raises(ValueError, match=r"skills\['a'\] has no labels other than -100"):
        build(tmp_path, ForgettingCallback({"a": masked})).train()
    with pytest.raises(
        ValueError, match=r"eval_strategy is 'no'; ForgettingCallback reads evaluations.*or give every="
    ):
        build(tmp_path, ForgettingCallback({"a": ROWS}), eval_strategy="no").train()
    regression = [{"input_ids": [1, 2], "labels": 0.5}]
    with pytest.raises(ValueError, match="labels that are no integers; give class or token labels"):
        build(tmp_path, ForgettingCallback({"a": regression})).train()
    with pytest.raises(ValueError, match=r"gives logits of shape \(1, 2, 24\) for labels of shape \(1,\)"):
        build(tmp_path, ForgettingCallback({"a": [{"input_ids": [1, 2], "labels": 1}]})).train()


def test_large_rows_are_not_put_into_trainer_state(tmp_path, monkeypatch):
    monkeypatch.setattr("hfgen_plugins.callbacks.forgetting.forgetting._SAVED", 10)
    callback = ForgettingCallback({"a": ROWS})
    assert callback.arguments()["skills"] == {"a": None}
    with pytest.raises(
        ValueError, match=r"skills \['a'\] were too large .* restore_callback_states_from_checkpoint=False"
    ):
        build(tmp_path, ForgettingCallback(**callback.arguments())).train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"skills": ROWS}, r"ForgettingCallback.skills is .*give \{name: rows\}"),
        ({"skills": {}}, r"give \{name: rows\} of one skill"),
        ({"rows": 0}, "ForgettingCallback.rows is 0"),
        ({"every": 0}, "ForgettingCallback.every is 0"),
        ({"min_drop": 0.0}, "ForgettingCallback.min_drop is 0.0"),
        ({"alpha": 2.0}, "ForgettingCallback.alpha is 2.0"),
        ({"batch_size": 0}, "ForgettingCallback.batch_size is 0"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        ForgettingCallback(**{"skills": {"a": ROWS}, **options})


# --- two processes: this and its neighbours -------------------------------------------------------------------------

WORKER = """
import json, os, sys
from contextlib import nullcontext
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from hfgen import callbacks as C
from hfgen.kit.monitor import collated
from tests.distributed.fsdp_cpu_shim import fsdp2

mode, folder = sys.argv[1:]
ROWS = [{"input_ids": (ids := [(5 * i + j * j) % 24 for j in range(6 + i % 5)]), "labels": ids} for i in range(23)]
MAKE = {
    "overfit_gap": lambda: C.OverfitGapCallback(min_evaluations=4),
    "forgetting": lambda: C.ForgettingCallback({"a": ROWS[:7], "b": ROWS[9:10]}),
    "calibration": lambda: C.CalibrationCallback(),
    "data_diet": lambda: C.DataDietCallback(every=2, share=1.0),
    "grand": lambda: C.DataDietCallback(every=2, share=1.0, grand=True),
    "soup": lambda: C.SoupCallback("greedy"),
}

def history(callback):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=24,
                    bos_token_id=None, eos_token_id=None, pad_token_id=None)
    )
    args = TrainingArguments(
        f"{folder}/{mode}", max_steps=6, per_device_train_batch_size=8 if mode == "one" else 4, eval_steps=1,
        per_device_eval_batch_size=3, learning_rate=1e-2, logging_steps=1, eval_strategy="steps", use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", ddp_timeout=60, train_sampling_strategy="sequential",
    )
    trainer = Trainer(
        model, args, train_dataset=ROWS[:16], eval_dataset=ROWS, data_collator=collated, callbacks=[callback]
    )
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return callback.history

with fsdp2() if mode == "fsdp2" else nullcontext():
    found = {name: history(make()) for name, make in MAKE.items()}
with open(f"{folder}/{mode}-{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump(found, file)
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    """DDP and FSDP2, batches that do not come out even; what needs whole weights is refused in words under FSDP2."""
    (tmp_path / "worker.py").write_text(WORKER)
    root = str(Path(__file__).parents[2])
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": root}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = {}
    for mode, start in (("one", []), ("ddp", launch), ("fsdp2", launch)):
        command = [sys.executable, *start, str(tmp_path / "worker.py"), mode, str(tmp_path)]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        found[mode] = [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"{mode}-*.json"))]
    (one,) = found["one"]
    for mode in ("ddp", "fsdp2"):
        first, second = found[mode]
        assert first == second
        for name, rows in first.items():
            if mode == "fsdp2" and name in ("grand", "soup"):
                assert "the weights are sharded" in rows
                continue
            # the host's own eval_loss is a mean of batch means, which depends on how rows are cut
            close = 0.05 if name == "overfit_gap" else 1e-6
            assert len(rows) == len(one[name]) >= 4
            for row, wanted in zip(rows, one[name], strict=True):
                assert row == pytest.approx(wanted, abs=close)
