"""What callbacks do where the host is not the plain one: FSDP 1 refused in words, steps that fp16's scaler skips."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, TrainerCallback

from hfgen.callbacks import (
    CalibrationCallback,
    DataDietCallback,
    ForgettingCallback,
    GrokkingCallback,
    HyperfitCallback,
    InstabilityCallback,
    LearningCurveCallback,
    LowMantissaCallback,
    OverfitGapCallback,
    SoftmaxCollapseCallback,
    SoupCallback,
    StabilityGapCallback,
)
from hfgen.kit.examples import ROWS, tiny_run, token_accuracy
from hfgen.kit.monitor import Event, spread_rows

FORWARD = {
    "softmax_collapse": lambda: SoftmaxCollapseCallback(),
    "instability": lambda: InstabilityCallback(),
    "grokking": lambda: GrokkingCallback(test="a"),
    "stability_gap": lambda: StabilityGapCallback(["a", "b"], ends=[2], every=1),
    "calibration": lambda: CalibrationCallback(rows=4),
    "forgetting": lambda: ForgettingCallback({"skill": ROWS[16:]}),
    "data_diet": lambda: DataDietCallback(share=1.0, rows=2),
    "low_mantissa": lambda: LowMantissaCallback(),
    "hyperfit": lambda: HyperfitCallback(
        held_out=ROWS[16:], every=1, sequences=2, length=6, context=3, new_tokens=2, window=2, stop_loss=None
    ),
}
RIDE = {  # on the user's evaluations alone: nothing is forwarded
    "grokking": lambda: GrokkingCallback(test="a", train="b"),
    "stability_gap": lambda: StabilityGapCallback(["a", "b"], ends=[2]),
    "overfit_gap": lambda: OverfitGapCallback(),
    "learning_curve": lambda: LearningCurveCallback(dataset="a"),
}


def trainer(folder, callback, **changes):
    given = tiny_run(str(folder), evaluate_every=1, save_strategy="no", **changes) | token_accuracy()
    found = Trainer(**given | {"eval_dataset": {"a": ROWS[:4], "b": ROWS[16:20]}}, callbacks=[callback])
    callback.attach(found)
    return found


# --- rows of evaluation sets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "count"), [(1, 256), (32, 256), (256, 33), (2000, 32)])
def test_long_rows_are_enough_sooner(length, count):
    """Of 256 rows as many are read as hold 8192 labels, at least 32; evenly spread, with both ends."""
    labels = torch.full((300, length), 1)
    labels[:, length // 2 : length // 2 + (length > 9)] = -100  # one is no label
    loader = SimpleNamespace(dataset=labels, collate_fn=lambda rows: {"labels": torch.stack(rows)})
    found = spread_rows("X", loader, 256, 8)
    assert len(found) == count and found[0] == 0 and found[-1] == 299 and found == sorted(set(found))
    steps = {b - a for a, b in itertools.pairwise(found)}
    assert max(steps) - min(steps) <= 1
    with pytest.raises(ValueError, match="the evaluation set is a list_iterator, a stream; X needs one with a length"):
        spread_rows("X", SimpleNamespace(dataset=iter([])), 256, 8)


# --- FSDP 1 ---------------------------------------------------------------------------------------------------------


class FullyShardedDataParallel(nn.Module):  # by its name, as torch's own
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("name", FORWARD)
def test_what_forwards_the_model_refuses_fsdp_1(name, tmp_path, monkeypatch):
    """Said by accelerate before training; that FSDP 2 works is tested on two ranks in tests/distributed."""
    callback = FORWARD[name]()
    run = trainer(tmp_path, callback, max_steps=2)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", SimpleNamespace(fsdp_version=1))
    kind = f"{type(callback).__name__} forwards it itself, which is not possible"
    with pytest.raises(ValueError, match=f"the model is wrapped by FSDP 1, and {kind}.*use fsdp_version: 2"):
        run.train()
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", SimpleNamespace(fsdp_version=2))
    run.train()  # not refused


@pytest.mark.parametrize("name", FORWARD)
def test_a_wrapped_model_is_refused_too(name):
    event = Event(
        SimpleNamespace(eval_strategy="steps"), None, None, FullyShardedDataParallel(nn.Linear(2, 2)), *[None] * 4
    )
    words = {"grokking": "or give train= the name", "stability_gap": "or every=None"}.get(name, "version")
    with pytest.raises(ValueError, match=f"wrapped by FSDP 1.*{words}"):
        FORWARD[name]().begin(event)


def test_soup_refuses_sharded_weights():
    with pytest.raises(ValueError, match=r"the weights are sharded \(FSDP or DeepSpeed\)"):
        SoupCallback().begin(
            Event(
                SimpleNamespace(eval_strategy="steps"),
                None,
                None,
                FullyShardedDataParallel(nn.Linear(2, 2)),
                *[None] * 4,
            )
        )


@pytest.mark.parametrize("name", RIDE)
def test_what_only_reads_evaluations_runs_under_fsdp_1(name, tmp_path, monkeypatch):
    callback = RIDE[name]()
    run = trainer(tmp_path, callback, max_steps=3)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", SimpleNamespace(fsdp_version=1))
    run.train()
    assert run.state.global_step == 3


# --- fp16 ------------------------------------------------------------------------------------------------------------


def scaled(run, scale):
    """The run under fp16 autocast and torch's own gradient scaler, which accelerate gives to accelerators only.

    From here on every object is the host's: accelerate wraps forward and optimizer, scales, unscales where it clips, and
    skips the step where a gradient is not finite (a fused AdamW, the default, skips by itself and does not say so).
    """
    run.accelerator.native_amp, run.accelerator.state._mixed_precision = True, "fp16"
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=float(scale), growth_interval=10**6)
    return run


class Skipped(TrainerCallback):
    """Which steps the scaler skipped, and how far each moved the weights."""

    def __init__(self):
        self.steps, self.moved, self.before = [], [], None

    def attach(self, trainer):
        self.trainer = trainer

    def _weights(self, model):
        return torch.cat([p.detach().flatten().clone() for p in model.parameters()])

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = self._weights(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.moved.append(float((self._weights(model) - self.before).norm()))
        if self.trainer.accelerator.optimizer_step_was_skipped:
            self.steps.append(state.global_step)


EVERY = FORWARD | RIDE | {
    "softmax_collapse": lambda: SoftmaxCollapseCallback(every=1),
    "instability": lambda: InstabilityCallback(every=1),
    "soup": lambda: SoupCallback("uniform", rows=4, gate="a"),
    "overfit_gap": lambda: OverfitGapCallback(min_evaluations=4),
}  # fmt: skip


@pytest.mark.parametrize(("name", "clip"), [("instability", 0.0), *((name, 1.0) for name in EVERY)])
def test_fp16_with_a_scaler_measures_what_float32_does(name, clip, tmp_path):
    """No step is skipped; what is measured differs by the rounding of float16 activations only."""
    rows = {}
    for kind in ("float32", "fp16"):
        callback, skipped = EVERY[name](), Skipped()
        run = trainer(tmp_path / kind, callback, max_steps=5, max_grad_norm=clip, lr_scheduler_type="constant")
        skipped.attach(run)
        run.add_callback(skipped)
        (scaled(run, 2**10) if kind == "fp16" else run).train()
        assert skipped.steps == [] and min(skipped.moved) > 0
        rows[kind] = callback.history
    exact = {"p_value", "sure", "exponent", "scale", "limit", "gain_left", "low", "high", "predicted"}
    for one, other in zip(rows["float32"], rows["fp16"], strict=True):
        assert set(one) == set(other)
        for key in set(one) - {k for k in one if k.rpartition("/")[2] in exact}:
            assert other[key] == pytest.approx(one[key], rel=0.03, abs=0.05), key


@pytest.mark.parametrize("name", EVERY)
def test_steps_that_the_scaler_skips(name, tmp_path):
    """The first gradients overflow: the scaler halves its scale and leaves the weights; every number stays finite."""
    callback, skipped = EVERY[name](), Skipped()
    run = scaled(trainer(tmp_path, callback, max_steps=8, max_grad_norm=0.0, optim="adamw_torch"), 2**22)
    skipped.attach(run)
    run.add_callback(skipped)
    run.train()
    assert skipped.steps and skipped.steps == [i + 1 for i, moved in enumerate(skipped.moved) if moved == 0]
    assert len(skipped.steps) < 8
    values = [(key, value) for row in callback.history for key, value in row.items()]
    assert values and all(math.isfinite(value) for _, value in values)
    if name == "instability":  # a step that was skipped has no gradient
        with_gradient = {row["step"] for row in callback.history if "grad_rms_min" in row}
        assert with_gradient == set(range(1, 9)) - set(skipped.steps)
    if name == "soup":
        assert callback.members == 8 and all(bool(t.isfinite().all()) for t in callback.soup.values())
