"""Grokking: the state machine against a plain reading, delay and area against brute force, the runs it rides on."""

import itertools
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.callbacks import GrokkingCallback
from hfgen.kit.measures import greater
from hfgen_plugins.callbacks.grokking.grokking import STATES, read

RULE = {"chance": 0.1, "fit": 0.99, "near": 0.2, "rise": 0.05, "high": 0.9}
P = 13


def states(points):
    return [read(points[: i + 1], **RULE).state for i in range(len(points))]


def test_the_states_of_a_run_that_groks():
    points = [(0, 0.1, 0.1), (10, 0.8, 0.12), (50, 1.0, 0.1), (100, 1.0, 0.12), (200, 1.0, 0.16), (400, 1.0, 0.6),
              (800, 1.0, 0.95), (900, 1.0, 0.97)]  # fmt: skip
    assert states(points) == [
        "learning", "learning", "memorised", "memorised", "grokking", "grokking", "grokked", "grokked"
    ]  # fmt: skip
    found = read(points, **RULE)
    assert (found.fit, found.memorised, found.general, found.delay) == (50, 50, 800, 16.0)


def test_the_states_of_other_runs():
    assert states([(10, 0.5, 0.4), (20, 0.995, 0.93)]) == ["learning", "generalised"]
    assert states([(10, 1.0, 0.7), (20, 1.0, 0.72)]) == ["fitted", "fitted"]
    assert states([(10, 1.0, 0.15), (20, 1.0, 0.16), (30, 1.0, 0.14)]) == ["memorised"] * 3
    ahead = read([(5, 0.5, 0.95), (10, 1.0, 0.95)], **RULE)
    assert (ahead.state, ahead.delay) == ("generalised", 1.0)
    assert read([(5, 0.5, 0.95)], **RULE).delay is None
    assert read([(0, 1.0, 0.1), (7, 1.0, 1.0)], **RULE).delay == 7.0  # a step of 0 counts as 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_area_and_first_steps_equal_brute_force(rows):
    step, points = 0, []
    for more, train, test in rows:
        points.append((step, train, test))
        step += more
    found = read(points, **RULE)
    later = [p for p in points if p[0] > 0]
    pieces = [  # the line between two evaluations, integrated in closed form
        ((a[1] - a[2]) + (b[1] - b[2])) * (math.log(b[0]) - math.log(a[0])) / 2 for a, b in itertools.pairwise(later)
    ]
    assert found.area == pytest.approx(math.fsum(pieces), abs=1e-6)
    assert found.fit == next((s for s, train, _ in points if train >= 0.99), None)
    assert found.general == next((s for s, _, test in points if test >= 0.1 + 0.9 * 0.9), None)


def test_two_proportions_equal_the_normal_integral():
    for a, b, n in ((0.3, 0.2, 100), (0.2, 0.2, 50), (0.1, 0.4, 30), (0.0, 0.0, 10)):
        pooled = (a + b) / 2
        z = (a - b) / math.sqrt(max(2 * pooled * (1 - pooled), 1 / n) / n)
        width = (z + 12) / 200_000
        grid = [-12 + (i + 0.5) * width for i in range(200_000)]
        expected = math.fsum(math.exp(-x * x / 2) for x in grid) * width / math.sqrt(2 * math.pi)
        assert greater(a, b, n) == pytest.approx(expected, abs=1e-6)


# --- in runs ------------------------------------------------------------------------------------------------------


class Addition(nn.Module):
    """a + b mod P from one-hot pairs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(2 * P, 128, bias=False), nn.ReLU(), nn.Linear(128, P, bias=False))

    def forward(self, pair, labels=None):
        logits = self.layers(nn.functional.one_hot(pair, P).flatten(1).float())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


PAIRS = [{"pair": [a, b], "labels": (a + b) % P} for a in range(P) for b in range(P)]
TEST = [row for row in PAIRS if (3 * row["pair"][0] + 5 * row["pair"][1]) % 7 in (0, 3, 5)]
TRAIN = [row for row in PAIRS if row not in TEST]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(folder, callback, evals=None, **arguments):
    given = {
        "max_steps": 60, "logging_steps": 20, "eval_strategy": "steps", "eval_steps": 20, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": 100,
        "learning_rate": 3e-2, "lr_scheduler_type": "constant", **arguments,
    }  # fmt: skip
    trainer = Trainer(
        Addition(), TrainingArguments(str(folder), **given), train_dataset=TRAIN,
        eval_dataset=TEST if evals is None else evals, compute_metrics=accuracy, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    return trainer


def test_a_memorised_run_is_found_at_the_first_evaluation_after_it(tmp_path, caplog):
    callback = GrokkingCallback(chance=1 / P)
    trainer = run(tmp_path, callback)
    assert [row["step"] for row in callback.history] == [20, 40, 60]
    assert [STATES[row["state"]] for row in callback.history][-1] == "memorised"
    (found,) = callback.findings
    first = next(row for row in callback.history if row["state"] == 2)
    assert (found["kind"], found["step"]) == ("memorised", first["step"]) and found["confidence"] > 0.95
    assert f"but only {first['test']:.0%} of the test rows" in found["sentence"] and "Memorised" in caplog.text
    host = [row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row]
    assert [row["test"] for row in callback.history] == host


def test_own_training_rows_and_a_named_set_of_them_agree(tmp_path):
    own = GrokkingCallback(chance=1 / P, test="test", rows=1000)
    run(tmp_path, own, evals={"test": TEST, "other": TEST[:5]})
    named = GrokkingCallback(chance=1 / P, test="test", train="train_probe")
    trainer = run(tmp_path, named, evals={"train_probe": TRAIN, "test": TEST})
    assert [row | {"gap_area": 0} for row in own.history] == [
        pytest.approx(row | {"gap_area": 0}, abs=1e-6) for row in named.history
    ]
    assert own.fired == named.fired == 3
    logged = [row["hfgen/grokking/step"] for row in trainer.state.log_history if "hfgen/grokking/state" in row]
    assert logged == [20, 40, 60]
    assert [
        row["eval_train_probe_accuracy"] for row in trainer.state.log_history if "eval_train_probe_accuracy" in row
    ] == [row["train"] for row in named.history]


def test_grokking_and_grokked_are_said_from_scripted_accuracies(tmp_path):
    """The run's metrics are replaced: a curve that groks, at the host's own events."""
    curve = iter([(1.0, 0.1), (1.0, 0.11), (1.0, 0.4), (1.0, 0.97)])
    now = []

    def scripted(prediction):
        if not now:
            now.extend(next(curve))
        return {"accuracy": now.pop(0)}

    callback = GrokkingCallback(chance=0.1, test="test", train="train")
    trainer = Trainer(
        Addition(),
        TrainingArguments(
            str(tmp_path), max_steps=40, eval_strategy="steps", eval_steps=10, use_cpu=True, report_to="none",
            disable_tqdm=True, save_strategy="no", learning_rate=0.0,
        ),
        train_dataset=TRAIN, eval_dataset={"train": TRAIN, "test": TEST}, compute_metrics=scripted, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert [STATES[row["state"]] for row in callback.history] == ["memorised", "memorised", "grokking", "grokked"]
    assert [(f["kind"], f["step"], f["level"]) for f in callback.findings] == [
        ("memorised", 10, "WARNING"), ("grokking", 30, "INFO"), ("grokked", 40, "INFO")
    ]  # fmt: skip
    assert callback.history[-1]["delay"] == 4.0
    assert (
        "reached 97% at step 40, 4 times as late as the training rows were fitted (step 10)"
        in callback.findings[-1]["sentence"]
    )
    assert all(f["confidence"] > 0.95 for f in callback.findings)


def test_a_run_that_generalises_has_no_findings(tmp_path):
    callback = GrokkingCallback(chance=1 / P, test="test")
    run(tmp_path, callback, evals={"test": TRAIN})  # the rows it learns: test follows training
    assert callback.findings == [] and STATES[callback.history[-1]["state"]] == "generalised"


def test_in_sfttrainer_with_its_token_accuracy(tmp_path):
    rows = Dataset.from_list([{"prompt": f"R{'abcdefgh'[i:]}=", "completion": "jihgfedc"} for i in range(8)])
    args = SFTConfig(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, use_cpu=True, bf16=False, logging_steps=1,
        gradient_checkpointing=True, report_to="none", disable_tqdm=True, save_strategy="no", eval_strategy="steps",
        eval_steps=1, learning_rate=0.0,
    )  # fmt: skip
    callback = GrokkingCallback(metric="mean_token_accuracy", tokens=10_000)
    SFTTrainer(
        sandbox.load_model(), args, train_dataset=rows, eval_dataset=rows, callbacks=[callback],
        processing_class=sandbox.load_tokenizer(),
    ).train()  # fmt: skip
    assert [row["step"] for row in callback.history] == [1, 2]
    assert all(row["train"] == pytest.approx(row["test"], abs=1e-6) for row in callback.history)  # the same rows


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_a_missing_metric_and_a_stream_are_refused(tmp_path):
    with pytest.raises(ValueError, match="metric is 'f1', and the evaluation of 'the test rows' has accuracy, .*loss"):
        run(tmp_path, GrokkingCallback(metric="f1"))
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    stream = IterableDataset.from_generator(lambda: iter(TRAIN))
    with pytest.raises(ValueError, match=r"GrokkingCallback\(train=None\): train_dataset is a stream"):
        Trainer(Addition(), args, train_dataset=stream, callbacks=[GrokkingCallback()]).train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test": None}, "GrokkingCallback.test is None; give the name of an evaluation set"),
        ({"metric": 3}, "GrokkingCallback.metric is 3; give the name of an evaluation metric"),
        ({"train": ""}, "GrokkingCallback.train is '', the same set as test"),
        ({"chance": -0.1}, "GrokkingCallback.chance is -0.1"),
        ({"fit": 1.1}, "GrokkingCallback.fit is 1.1"),
        ({"rows": 0}, "GrokkingCallback.rows is 0"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        GrokkingCallback(**options)
