"""Softmax collapse: its counts against float64 brute force, the finding, the hosts it works with, what it refuses."""

import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.callbacks import SoftmaxCollapseCallback
from hfgen.kit.measures import Probe, _evenly, share_above
from hfgen.kit.monitor import Event
from hfgen_plugins.callbacks.softmax_collapse.softmax_collapse import collapse_counts

TINY = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 24,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ROWS = [[(5 * i + j * j) % 24 for j in range(12)] for i in range(16)]
DATA = [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in ROWS]


def tiny(scale=1.0, kind=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    model = kind(LlamaConfig(**{**TINY, **options}))
    if scale != 1.0:
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
    return model


def run(folder, callback, model=None, data=DATA, options=None, **arguments):
    given = {
        "max_steps": 4, "logging_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "per_device_train_batch_size": 4, "learning_rate": 1e-3, **arguments,
    }  # fmt: skip
    trainer = Trainer(
        tiny() if model is None else model,
        TrainingArguments(str(folder), **given),
        train_dataset=data,
        callbacks=[callback],
        **(options or {}),
    )
    trainer.train()
    return trainer


# --- formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "share"), [("float32", 2 / 3), ("float64", 1 / 3)])
def test_the_fixture_of_the_sheet(dtype, share):
    """Gaps of 15, 17.5 and 100 nats: float32 loses what is more than ln 2^24 = 16.6 below, float64 more than 36.7."""
    logits = torch.tensor([[15.0, 0.0], [17.5, 0.0], [100.0, 0.0]], dtype=getattr(torch, dtype))
    count, collapsed, zero, scale = collapse_counts(logits, torch.zeros(3, dtype=torch.int64)).tolist()
    assert (count, collapsed / count, zero / count) == (3, share, share)
    assert scale == 132.5


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11), ("float32", 24), ("float64", 53)])
def test_collapse_begins_at_half_a_unit_in_the_last_place(dtype, bits):
    for gap, collapsed in ((bits * math.log(2) - 0.1, 0), (bits * math.log(2) + 0.1, 1)):
        logits = torch.tensor([[0.0, -gap]], dtype=getattr(torch, dtype))
        assert collapse_counts(logits, torch.tensor([0]))[1] == collapsed


def test_a_wrong_answer_collapses_without_zero_loss():
    logits = torch.tensor([[100.0, 0.0]])
    assert collapse_counts(logits, torch.tensor([1])).tolist()[1:3] == [1, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-60, 60), min_size=4, max_size=4), min_size=1, max_size=6), st.integers(0, 3))
def test_counts_equal_float64_brute_force(rows, target):
    """By hand: S and the loss row by row in Python's float64."""
    logits = torch.tensor(rows, dtype=torch.float64)
    targets = torch.full((len(rows),), target)
    exps = [[math.exp(z - max(row)) for z in row] for row in rows]
    sums = [math.fsum(e) for e in exps]
    losses = [row[target] - max(row) - math.log(s) for row, s in zip(rows, sums, strict=True)]
    found = collapse_counts(logits, targets).tolist()
    # a tail at the very edge of rounding may fall either way with the order of summing
    edge = sum(0 < abs(s - 1) < 1e-15 for s in sums)
    assert found[0] == len(rows) and abs(found[1] - sum(s == 1 for s in sums)) <= edge
    assert abs(found[2] - sum(v == 0 for v in losses)) <= edge
    assert found[3] == pytest.approx(sum(max(map(abs, row)) for row in rows), rel=1e-6)
    s = [[z + 1 if z >= 0 else 1 / (1 - z) for z in row] for row in rows]
    expected = sum(v[target] / sum(v) == 1 for v in s)
    assert collapse_counts(logits, targets, "stablemax")[1] == expected


def test_stablemax_does_not_collapse_where_softmax_does():
    logits, targets = torch.tensor([[100.0, 0.0], [1e9, -1e9]]), torch.tensor([0, 0])
    assert collapse_counts(logits, targets)[1] == 2
    assert collapse_counts(logits, targets, "stablemax")[1:3].tolist() == [1, 1]  # 1e9 / (1e9 + 1e-9)


def test_confidence_equals_the_integral():
    """P(share > t) under a uniform prior: the Beta density summed in float64."""
    for hits, count, threshold in ((9, 10, 0.5), (3, 4, 0.7), (0, 5, 0.1), (120, 256, 0.5)):
        grid = [(i + 0.5) / 40_000 for i in range(40_000)]
        log = math.lgamma(count + 2) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
        density = [math.exp(log + hits * math.log(p) + (count - hits) * math.log1p(-p)) for p in grid]
        expected = math.fsum(d for d, p in zip(density, grid, strict=True) if p > threshold) / 40_000
        assert share_above(hits, count, threshold) == pytest.approx(expected, abs=1e-6)


def test_evenly_spaced_targets():
    masks = [torch.tensor([[False, True, True], [True, True, False]]), torch.tensor([[True, True, True]])]
    everything = _evenly(masks, 100)
    assert sum(len(w[0]) for w in everything) == 7
    assert all(bool(mask[where].all()) for mask, where in zip(masks, everything, strict=True))
    three = _evenly(masks, 3)
    assert [list(map(int, w[1])) for w in three] == [[1, 1], [2]]  # the first, the middle and the last valid
    assert all(len(i) == 0 for w in _evenly([torch.zeros(2, 3, dtype=torch.bool)], 4) for i in w)


# --- in runs ------------------------------------------------------------------------------------------------------


def event_of(model, data=DATA, size=4, **changes):
    args = TrainingArguments("unused", use_cpu=True, per_device_train_batch_size=size)
    trainer = Trainer(model, args, train_dataset=data, **changes)
    return Event(args, None, None, trainer.model, None, None, trainer.get_train_dataloader(), None)


def test_the_probe_gives_the_models_own_logits_of_valid_next_tokens():
    model = tiny().eval()
    probe = Probe("Test", event_of(model), rows=6, tokens=1000)
    with torch.no_grad():
        found = [(logits, targets) for logits, targets, _ in probe.forward(model)]
        by_row = {tuple(ids): model(torch.tensor([ids])).logits[0] for ids in ROWS}
    assert [len(targets) for _, targets in found] == [4 * 9, 2 * 9]  # 12 tokens, three of them a prompt
    for (
        (logits, targets),
        (inputs, _),
    ) in zip(found, (part for part, _ in probe._parts), strict=True):
        start = 0
        for ids in inputs["input_ids"].tolist():
            torch.testing.assert_close(logits[start : start + 9], by_row[tuple(ids)][2:11], rtol=1e-5, atol=1e-6)
            assert targets[start : start + 9].tolist() == ids[3:]
            start += 9
    assert not model.lm_head._forward_pre_hooks


def test_ranks_share_the_probe():
    event = event_of(tiny(), size=2)
    parts = []
    for rank in range(2):
        event.args.__dict__.update(distributed_state=None)
        args = _Rank(event.args, rank, 2)
        probe = Probe("Test", Event(**{**event.__dict__, "args": args}), rows=6, tokens=1000)
        parts.append([(part[0]["input_ids"].tolist(), len(where[0])) for part, where in probe._parts])
    whole = Probe("Test", Event(**{**event.__dict__, "args": _Rank(event.args, 0, 1)}), rows=6, tokens=1000)
    expected = [(part[0]["input_ids"].tolist(), len(where[0])) for part, where in whole._parts]
    assert parts[0] == [expected[0], expected[2]]
    assert parts[1] == [expected[1], (expected[0][0], 0)]  # the last one counts nothing


class _Rank:
    def __init__(self, args, rank, ranks):
        self.process_index, self.world_size, self.device = rank, ranks, torch.device("cpu")
        self.per_device_train_batch_size = args.per_device_train_batch_size


def certain(model):
    """Rows whose next tokens are what the model predicts."""
    with torch.no_grad():
        best = model.eval()(torch.tensor(ROWS)).logits.argmax(-1)
    return [{"input_ids": ids, "labels": [-100, *row[:-1]]} for ids, row in zip(ROWS, best.tolist(), strict=True)]


def test_a_collapsed_run_is_found_at_once_and_a_healthy_one_is_not(tmp_path, caplog):
    model = tiny(scale=3000.0)
    ill = SoftmaxCollapseCallback(every=2, rows=8)
    run(tmp_path, ill, model=model, data=certain(model), learning_rate=0.0)
    assert [row["zero_loss"] > 0.8 for row in ill.history] == [True, True, True]
    (found,) = ill.findings
    assert (found["kind"], found["step"]) == ("softmax_collapse", 0) and found["confidence"] > 0.95
    assert "StableMax" in found["advice"] and "Softmax collapse" in caplog.text
    wrong = SoftmaxCollapseCallback(every=2, rows=8)
    run(tmp_path, wrong, model=tiny(scale=3000.0), learning_rate=0.0)
    assert wrong.history[0]["rate"] > 0.8 and wrong.findings == []  # certain and mistaken: that does teach
    healthy = SoftmaxCollapseCallback(every=2, rows=8)
    trainer = run(tmp_path, healthy)
    assert healthy.findings == [] and [row["rate"] for row in healthy.history] == [0.0, 0.0, 0.0]
    assert healthy.history[0]["tokens"] == 72
    logged = [
        row["hfgen/softmax_collapse/step"] for row in trainer.state.log_history if "hfgen/softmax_collapse/rate" in row
    ]
    assert logged == [0, 2, 4]


def test_it_can_stop_the_run(tmp_path):
    model = tiny(scale=3000.0)
    callback = SoftmaxCollapseCallback(every=2, on_collapse="stop")
    assert (
        run(tmp_path, callback, model=model, data=certain(model), learning_rate=0.0).state.global_step == 1
    )  # said before the first step


class Modular(nn.Module):
    """a + b mod p from one-hot pairs, as in the paper's runs."""

    def __init__(self, p=23):
        super().__init__()
        torch.manual_seed(1)
        self.p = p
        self.layers = nn.Sequential(nn.Linear(2 * p, 100, bias=False), nn.ReLU(), nn.Linear(100, p, bias=False))

    def forward(self, pair, labels=None):
        x = nn.functional.one_hot(pair, self.p).flatten(1).float()
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_training_without_decay_collapses(tmp_path):
    """The paper's phenomenon: memorised pairs collapse in float32 and not, at that time, in float64."""
    data = [{"pair": [a, b], "labels": (a + b) % 23} for a in range(23) for b in range(23) if (a * 7 + b * 3) % 2]
    monitors = {
        kind: SoftmaxCollapseCallback(every=25, rows=264, dtype=kind, threshold=0.15) for kind in (None, "float64")
    }
    for monitor in monitors.values():
        run(
            tmp_path, monitor, model=Modular(), data=data, max_steps=100, per_device_train_batch_size=300,
            learning_rate=0.1, weight_decay=0.0, logging_steps=25, lr_scheduler_type="constant", max_grad_norm=0.0,
        )  # fmt: skip
    rates = {kind: [row["rate"] for row in monitor.history] for kind, monitor in monitors.items()}
    assert rates[None][0] == 0.0 and rates[None][-1] > 0.2 and rates["float64"][-1] == 0.0, rates
    (found,) = monitors[None].findings
    assert found["step"] in (25, 50) and monitors["float64"].findings == []


def test_sfttrainer_with_its_fused_head_peft_and_checkpointing(tmp_path):
    rows = Dataset.from_list(
        [{"prompt": f"R{'abcdefgh'[i:]}=", "completion": "jihgfedc"[: 8 - i // 2]} for i in range(8)]
    )
    seen = {}
    for name, peft_config in (
        ("whole", None),
        ("lora", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")),
    ):
        args = SFTConfig(
            str(tmp_path), per_device_train_batch_size=4, max_steps=2, use_cpu=True, bf16=False, logging_steps=1,
            gradient_checkpointing=True, report_to="none", disable_tqdm=True, save_strategy="no", learning_rate=1e-3,
            eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        callback = SoftmaxCollapseCallback(every=1, tokens=1000)
        SFTTrainer(
            sandbox.load_model(), args, train_dataset=rows, eval_dataset=rows, callbacks=[callback],
            processing_class=sandbox.load_tokenizer(), peft_config=peft_config,
        ).train()  # fmt: skip
        seen[name] = callback.history
    assert [row["step"] for row in seen["whole"]] == [0, 1, 2]
    assert seen["whole"][0] == seen["lora"][0]  # LoRA begins at the base model
    assert seen["whole"][0]["tokens"] == sum(8 - i // 2 + 1 for i in range(8))  # completions and their end tokens


@pytest.mark.parametrize(
    "arguments", [{"bf16": True}, {"gradient_accumulation_steps": 2, "torch_empty_cache_steps": 1}]
)
def test_precision_and_accumulation(tmp_path, arguments):
    callback = SoftmaxCollapseCallback(every=2, rows=8)
    run(tmp_path, callback, model=tiny(scale=40.0), learning_rate=0.0, **arguments)
    whole = SoftmaxCollapseCallback(every=2, rows=8)
    run(tmp_path, whole, model=tiny(scale=40.0), learning_rate=0.0)
    for row, wanted in zip(callback.history, whole.history, strict=True):
        assert row == pytest.approx(wanted, rel=0.02 if "bf16" in arguments else 1e-6, abs=0.02)


def test_packed_rows_without_padding(tmp_path):
    callback = SoftmaxCollapseCallback(every=2, rows=8, tokens=1000)
    run(tmp_path, callback, options={"data_collator": DataCollatorWithFlattening()})
    assert callback.history[0]["tokens"] == 8 * 9


def test_classifiers_use_the_dtype_of_their_loss(tmp_path):
    model = tiny(kind=LlamaForSequenceClassification, num_labels=3, pad_token_id=0)
    data = [{"input_ids": ids, "labels": i % 3} for i, ids in enumerate(ROWS)]
    with torch.no_grad():
        model.score.weight.mul_(40)
    with torch.no_grad():
        logits = model(torch.tensor(ROWS)).logits
    callback = SoftmaxCollapseCallback(every=2, rows=16, dtype="bfloat16")
    run(tmp_path, callback, model=model, data=data, learning_rate=0.0)
    expected = collapse_counts(logits.bfloat16(), torch.tensor([0] * 16))[1] / 16
    assert 0 < expected < 1 and callback.history[0]["rate"] == expected and callback.history[0]["tokens"] == 16


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_streams_and_batches_without_class_labels_are_refused(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(DATA))
    with pytest.raises(
        ValueError, match="SoftmaxCollapseCallback: train_dataset is a stream .*give a dataset with a length"
    ):
        run(tmp_path, SoftmaxCollapseCallback(), data=stream)

    class Regression(Modular):
        def forward(self, pair, labels=None):
            logits = self.layers(nn.functional.one_hot(pair, self.p).flatten(1).float())
            return {"loss": (logits[:, 0] - labels).square().mean(), "logits": logits}

    data = [{"pair": [1, 2], "labels": 0.5}] * 8
    with pytest.raises(ValueError, match="has as labels torch.float32 of shape .4,.; it needs class labels"):
        run(tmp_path, SoftmaxCollapseCallback(), model=Regression(), data=data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 1.5}, "SoftmaxCollapseCallback.threshold is 1.5"),
        ({"confidence": 0}, "SoftmaxCollapseCallback.confidence is 0"),
        ({"on_collapse": "halt"}, "SoftmaxCollapseCallback.on_collapse is 'halt'; give one of 'warn', 'stop'"),
        ({"loss": "stable_max"}, "did you mean 'stablemax'"),
        ({"dtype": "fp32"}, "SoftmaxCollapseCallback.dtype is 'fp32'"),
        ({"rows": 0}, "SoftmaxCollapseCallback.rows is 0"),
        ({"tokens": 2.0}, "SoftmaxCollapseCallback.tokens is 2.0"),
        ({"every": 0}, "SoftmaxCollapseCallback.every is 0"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        SoftmaxCollapseCallback(**options)
