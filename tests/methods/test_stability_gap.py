"""The stability gap: every metric against brute force over the whole table, both schedules, what it refuses."""

import itertools

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.callbacks import StabilityGapCallback
from hfgen_plugins.callbacks.stability_gap.stability_gap import HORIZON, RECOVERED, Track, summary

ACCURACIES = st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=1, max_size=40)


# --- formulas -----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(ACCURACIES, st.integers(2, 12))
def test_windows_equal_brute_force(values, window):
    track = Track([window, 1000], start=0, end=10**9)
    for step, value in enumerate(values):
        track.add(step, value)
    for width in (window, 1000):
        pairs = [(a, b) for i, a in enumerate(values) for b in values[i + 1 : i + width]]
        assert track.forgetting[str(width)] == pytest.approx(max([0.0, *(a - b for a, b in pairs)]), abs=1e-6)
        assert track.plasticity[str(width)] == pytest.approx(max([0.0, *(b - a for a, b in pairs)]), abs=1e-6)
        assert all(len(queue) <= width for queue in (track.highs[str(width)], track.lows[str(width)]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_summary_equals_brute_force_over_the_whole_table(data):
    """Three tasks; the definitions of the paper written out over A[task][step]."""
    ends = list(itertools.accumulate(data.draw(st.lists(st.integers(3, 60), min_size=3, max_size=3))))
    every = data.draw(st.integers(1, 3))
    edges = [0, *ends]
    steps = sorted({*range(0, ends[-1] + 1, every), *ends})
    table = {n: [data.draw(st.integers(0, 10)) / 10 for _ in range(3)] for n in steps}
    tracks = [Track([5], edges[i], ends[i], beta=4) for i in range(3)]
    for n in steps:
        for i, track in enumerate(tracks):
            if n >= edges[i]:
                track.add(n, table[n][i])
        k = next(i for i in range(3) if n <= ends[i])
        found = summary(tracks[: k + 1])
        of = [[(m, table[m][i]) for m in steps if edges[i] <= m <= n] for i in range(k + 1)]
        minima = [min(v for m, v in of[i] if m > ends[i]) for i in range(k)]
        assert found["wc_acc"] == pytest.approx((table[n][k] + sum(minima)) / (k + 1), abs=1e-6)
        assert found["acc"] == pytest.approx(sum(table[n][: k + 1]) / (k + 1), abs=1e-6)
        firsts = [[v for _, v in of[i]][:4] for i in range(k + 1)]
        assert found["lca"] == pytest.approx(sum(sum(f) / len(f) for f in firsts) / (k + 1), abs=1e-6)
        rises = [b - a for p, (_, a) in enumerate(of[k]) for _, b in of[k][p + 1 : p + 5]]
        assert found["wp_5"] == pytest.approx(max([0.0, *rises]), abs=1e-6)
        if not k:
            assert not {"min_acc", "wf_5", "forgetting", "depth"} & set(found)  # not 0: there is nothing to forget
            continue
        at_end = [table[ends[i]][i] for i in range(k)]
        falls = [[a - b for p, (_, a) in enumerate(of[i]) for _, b in of[i][p + 1 : p + 5]] for i in range(k)]
        assert found["min_acc"] == pytest.approx(sum(minima) / k, abs=1e-6)
        assert found["wf_5"] == pytest.approx(sum(max([0.0, *f]) for f in falls) / k, abs=1e-6)
        assert found["forgetting"] == pytest.approx(sum(at_end[i] - table[n][i] for i in range(k)) / k, abs=1e-6)
        depth = max(at_end[i] - v for i in range(k) for m, v in of[i] if ends[i] < m <= ends[i] + HORIZON)
        assert found["depth"] == pytest.approx(max(0.0, depth), abs=1e-6)
        back = []
        for i in range(k):
            after = [(m, v) for m, v in of[i] if m > ends[i]]
            low = next((m for m, v in after if v < RECOVERED * at_end[i]), None)
            up = [m for m, v in after if low is not None and m > low and v >= RECOVERED * at_end[i]]
            back += [up[0] - ends[i]] if up else []
        assert found.get("recovery") == (pytest.approx(sum(back) / len(back), abs=1e-6) if back else None)


# --- in runs ------------------------------------------------------------------------------------------------------


class Classes(nn.Module):
    """A linear classifier of 16 features into 4 classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(16, 4)

    def forward(self, features, labels=None):
        logits = self.layer(features)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def task(classes, rows=64):
    generator = torch.Generator().manual_seed(classes[0])
    centres = torch.randn(4, 16, generator=torch.Generator().manual_seed(7))
    centres[2:] = centres[:2] + 0.6 * centres[2:]  # each class of the second task lies near one of the first
    labels = [classes[i % 2] for i in range(rows)]
    noise = torch.randn(rows, 16, generator=generator) * 0.8
    return [{"features": (centres[k] + e).tolist(), "labels": k} for k, e in zip(labels, noise, strict=True)]


FIRST, SECOND = task((0, 1)), task((2, 3))
SETS = {"first": FIRST, "second": SECOND}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer_of(folder, callback, attach=False, data=None, **arguments):
    given = {
        "max_steps": 32, "logging_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "per_device_train_batch_size": 8, "learning_rate": 0.5, "optim": "sgd",
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "max_grad_norm": 0.0, **arguments,
    }  # fmt: skip
    trainer = Trainer(
        Classes(), TrainingArguments(str(folder), **given), train_dataset=data or FIRST + FIRST + SECOND + SECOND,
        eval_dataset=SETS, compute_metrics=accuracy, callbacks=[callback],
    )  # fmt: skip
    if attach:
        callback.attach(trainer)
    return trainer


def gap(**options):
    return StabilityGapCallback(**{"tasks": ["first", "second"], "ends": [16], **options})


def test_it_rides_on_the_users_evaluations(tmp_path, caplog):
    callback = gap(windows=[3])
    trainer = trainer_of(tmp_path, callback, eval_strategy="steps", eval_steps=4)
    trainer.train()
    assert [row["step"] for row in callback.history] == list(range(4, 33, 4))
    assert [row["task"] for row in callback.history] == [1] * 4 + [2] * 4
    host = [row["eval_first_accuracy"] for row in trainer.state.log_history if "eval_first_accuracy" in row]
    assert [row["accuracy/first"] for row in callback.history] == host
    assert "min_acc" not in callback.history[3]
    assert callback.history[-1]["min_acc"] == min(host[4:])
    assert callback.history[-1]["forgetting"] == pytest.approx(host[3] - host[-1])
    found = callback.findings[0]
    assert found["kind"] == "stability_gap" and found["confidence"] > 0.95 and found["step"] == 16
    assert "accuracy on the earlier task 'first' fell" in caplog.text and callback.fired == 4


def test_its_own_evaluations_agree_with_the_users_and_see_more(tmp_path):
    riding, own = gap(), gap(every=4)
    trainer_of(tmp_path, riding, eval_strategy="steps", eval_steps=4).train()
    trainer = trainer_of(tmp_path, own, attach=True)
    trainer.train()
    assert [row["step"] for row in own.history] == list(range(0, 33, 4))
    keys = ("accuracy/first", "accuracy/second")
    for row, wanted in zip(own.history[1:], riding.history, strict=True):
        assert {k: row.get(k) for k in keys} == pytest.approx({k: wanted.get(k) for k in keys})
    assert sum("hfgen/stability_gap/acc" in row for row in trainer.state.log_history) == 9
    odd = gap(every=5)  # ends of tasks are evaluated whatever the interval
    trainer_of(tmp_path, odd, attach=True).train()
    assert [row["step"] for row in odd.history] == [0, 5, 10, 15, 16, 20, 25, 30, 32]
    assert odd.history[4]["accuracy/first"] == own.history[4]["accuracy/first"]


def test_joint_training_has_no_gap(tmp_path):
    callback = gap(windows=[10])
    mixed = [row for pair in zip(FIRST, SECOND, strict=True) for row in pair] * 2
    trainer_of(tmp_path, callback, data=mixed, eval_strategy="steps", eval_steps=2, learning_rate=0.1).train()
    assert callback.findings == [] and callback.history[-1]["forgetting"] <= 0.05
    assert callback.history[-1]["acc"] > 0.9  # it has learnt


def test_auto_holds_its_share(tmp_path, monkeypatch):
    """A clock that only the test moves: 10 ms a step and 4 ms an evaluation of a task."""
    from hfgen_plugins.callbacks.stability_gap import stability_gap as module

    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    plain = module.Probe.accuracy

    def evaluation(self, model):
        now[0] += 0.004
        return plain(self, model)

    monkeypatch.setattr(module.Probe, "accuracy", evaluation)

    class Step(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            now[0] += 0.010

    callback = gap(every="auto", ends=[200])
    trainer = trainer_of(tmp_path, callback, attach=True, max_steps=500, logging_steps=500)
    trainer.add_callback(Step())
    trainer.train()
    steps = [row["step"] for row in callback.history]
    assert {0, 200, 500} <= set(steps)
    assert callback._spent <= 0.1 * now[0] + 2 * 0.004
    in_gap, later = sum(200 < n <= 300 for n in steps), sum(350 < n <= 450 for n in steps)
    assert in_gap > later >= 4  # 10 % in the first 100 steps of a task, 5 % elsewhere
    assert any(row.get("hfgen/stability_gap/step") == 500 for row in trainer.state.log_history)


def test_a_resumed_run_ends_with_the_same_state(tmp_path):
    whole, cut, rest = (gap(every=3, windows=[4]) for _ in range(3))
    options = {"save_strategy": "steps", "save_steps": 20, "attach": True}
    trainer_of(tmp_path / "a", whole, **options).train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 20

    trainer = trainer_of(tmp_path / "b", cut, **options)
    trainer.add_callback(Stop())
    trainer.train()
    trainer_of(tmp_path / "b", rest, **options).train(resume_from_checkpoint=True)
    extra = [row for row in rest.history if row["step"] == 20]  # the stopped run looked at its last step
    assert [row["step"] for row in rest.history if row not in extra] == [row["step"] for row in whole.history]
    assert rest._tracks[0].lowest == whole._tracks[0].lowest and rest.findings[0]["kind"] == "stability_gap"


def test_in_sfttrainer_both_ways(tmp_path):
    rows = [Dataset.from_list([{"prompt": f"{letter}{i}=", "completion": "jihg"} for i in range(4)]) for letter in "RD"]
    seen = {}
    for every in (None, 1):
        args = SFTConfig(
            str(tmp_path), per_device_train_batch_size=4, max_steps=2, use_cpu=True, bf16=False, logging_steps=1,
            gradient_checkpointing=True, report_to="none", disable_tqdm=True, save_strategy="no", eval_strategy="steps",
            eval_steps=1, learning_rate=0.0,
        )  # fmt: skip
        callback = gap(tasks=["R", "D"], ends=[1], metric="mean_token_accuracy", every=every)
        trainer = SFTTrainer(
            sandbox.load_model(), args, train_dataset=rows[0], eval_dataset={"R": rows[0], "D": rows[1]},
            callbacks=[callback], processing_class=sandbox.load_tokenizer(),
        )  # fmt: skip
        callback.attach(trainer)
        trainer.train()
        seen[every] = callback.history
    assert [row["step"] for row in seen[1]] == [0, 1, 2] and [row["step"] for row in seen[None]] == [1, 2]
    for row, wanted in zip(seen[1][1:], seen[None], strict=True):
        assert {k: row[k] for k in ("acc", "wc_acc")} == pytest.approx({k: wanted[k] for k in ("acc", "wc_acc")})


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_missing_sets_and_metrics_are_refused(tmp_path):
    with pytest.raises(ValueError, match="every is 4 and no trainer with a dictionary of evaluation sets is attached"):
        trainer_of(tmp_path, gap(every=4)).train()
    with pytest.raises(ValueError, match="tasks has 'third', but eval_dataset has first, second"):
        trainer_of(tmp_path, gap(tasks=["first", "third"], every=4), attach=True).train()
    with pytest.raises(ValueError, match="metric is 'f1', and the evaluation of 'first' has accuracy, "):
        trainer_of(tmp_path, gap(metric="f1"), eval_strategy="steps", eval_steps=4).train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": ["a"]}, r"StabilityGapCallback.tasks is \['a'\]; give the names of two tasks or more"),
        ({"tasks": "ab"}, "StabilityGapCallback.tasks is 'ab'"),
        ({"ends": [5, 5]}, "StabilityGapCallback.ends is 5; give an integer of at least 6"),
        (
            {"ends": []},
            "StabilityGapCallback.ends has 0 steps for 2 tasks; give the last step of every task but the last",
        ),
        ({"every": "always"}, "StabilityGapCallback.every is 'always'"),
        ({"every": 0}, "StabilityGapCallback.every is 0"),
        ({"metric": "loss"}, "StabilityGapCallback.metric is 'loss'; give the name of an accuracy"),
        ({"windows": [1]}, "StabilityGapCallback.windows is 1; give an integer of at least 2"),
        ({"fall": 0}, "StabilityGapCallback.fall is 0"),
        ({"samples": 0}, "StabilityGapCallback.samples is 0"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        gap(**options)
