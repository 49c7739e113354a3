"""The kit of callbacks: state in files, hooks that do not outlive a run, gradients scaled or out of sight, sample indices."""

import json
import logging
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.kit.monitor import SampleTracker, gradient_norm, undisturbed
from tests.fixtures.mutants.callbacks import Counter, options


def trained(folder, callback, *others, resume=None, **changes):
    given = options(str(folder))
    for name, value in {"save_strategy": "steps", "save_steps": 2, **changes}.items():
        setattr(given["args"], name, value)
    trainer = Trainer(**given, callbacks=[callback, *others])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise RuntimeError("no")


# --- state ----------------------------------------------------------------------------------------------------------


def test_the_state_file(tmp_path):
    callback = Counter()
    trainer = trained(tmp_path, callback)
    found = json.loads((tmp_path / "checkpoint-4" / "hfgen_counter.json").read_text())
    assert found["format"] == 1 and found["step"] == 4 and found["tensors"] == ["weights"]
    assert found["fired"] == 3 and [row["step"] for row in found["history"]] == [0, 2, 4]
    assert (tmp_path / "checkpoint-4" / "hfgen_counter.safetensors").is_file()
    stored = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]["Counter"]
    assert stored["args"] == {"every": 2} and stored["attributes"]["_saved"]["history"] == found["history"]
    assert not list(tmp_path.rglob("*.part")) and trainer.state.global_step == 4


def test_resumed_from_another_folder(tmp_path):
    """The host does not tell a callback where it resumes from; a moved checkpoint needs args.resume_from_checkpoint."""
    trained(tmp_path / "a", Counter())
    (tmp_path / "a" / "checkpoint-2").rename(tmp_path / "moved")
    callback = Counter()
    moved = str(tmp_path / "moved")
    trained(tmp_path / "b", callback, resume=moved, resume_from_checkpoint=moved)
    assert [row["step"] for row in callback.history] == [0, 2, 4] and callback.fired == 3


def test_tensors_that_cannot_be_found_are_not_lost_in_silence(tmp_path):
    trained(tmp_path / "a", Counter())
    with pytest.raises(ValueError, match=r"state of counter has tensors.*set args.resume_from_checkpoint"):
        trained(tmp_path / "b", Counter(), resume=str(tmp_path / "a" / "checkpoint-2"))


def test_the_tensors_of_another_run_are_refused(tmp_path):
    trained(tmp_path / "a", Counter())
    trained(tmp_path / "b", Counter())
    with pytest.raises(ValueError, match="belongs to another run; resume with args.resume_from_checkpoint"):
        trained(tmp_path / "b", Counter(), resume=str(tmp_path / "a" / "checkpoint-2"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "hfgen_counter.safetensors").write_bytes(b"\x80\x04pickle"), "cannot be read"),
        (lambda f: (f / "hfgen_counter.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "hfgen_counter.json").write_text("{"), "is damaged"),
        (lambda f: (f / "hfgen_counter.json").write_text('{"name": "x"}'), "is not the state of counter"),
    ],
)
def test_damaged_state(tmp_path, damage, words):
    trained(tmp_path, Counter())
    damage(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=words):
        trained(tmp_path, Counter(), resume=str(tmp_path / "checkpoint-2"))


def test_a_newer_format_is_refused(tmp_path):
    trained(tmp_path, Counter())
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match="format 9; this hfgen reads up to 1"):
        trained(tmp_path, Counter(), resume=str(tmp_path / "checkpoint-2"))


def test_the_golden_state_of_format_1_is_taken_back(tmp_path):
    """What hfgen 0.1 wrote (tests/fixtures/golden/monitor-1), in a checkpoint whose trainer_state.json has no copy."""
    trained(tmp_path, Counter())
    checkpoint = tmp_path / "checkpoint-4"
    for file in (Path(__file__).parents[1] / "fixtures" / "golden" / "monitor-1").iterdir():
        shutil.copy(file, checkpoint / file.name)
    host = json.loads((checkpoint / "trainer_state.json").read_text())
    del host["stateful_callbacks"]["Counter"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(host))
    callback = Counter()
    trained(tmp_path, callback, resume=str(checkpoint), max_steps=6)
    assert [row["step"] for row in callback.history] == [0, 2, 4, 6] and callback.fired == 4


def test_two_of_one_class_are_refused(tmp_path):
    with pytest.raises(ValueError, match="callbacks holds Counter 2 times"):
        trained(tmp_path, Counter(), Counter())


def test_a_second_run_starts_anew(tmp_path):
    callback = Counter()
    trainer = trained(tmp_path, callback)
    first = [dict(row) for row in callback.history]
    trainer.train()
    assert len(callback.history) == len(first) and callback.fired == 3


# --- hooks ----------------------------------------------------------------------------------------------------------


def test_after_an_error_the_hook_is_dead_and_leaves_at_the_next_forward(tmp_path):
    callback = Counter()
    given = options(str(tmp_path))
    trainer = Trainer(**given, callbacks=[callback, Fails()])
    with pytest.raises(RuntimeError, match="no"):
        trainer.train()
    seen = callback.forwards
    trainer.model.train()
    trainer.model(torch.tensor([[1, 2]]))
    assert callback.forwards == seen and not trainer.model._forward_hooks


def test_an_error_in_the_look_or_in_the_hook_takes_the_hooks_off(tmp_path):
    class BadLook(Counter):
        def look(self, event):
            raise ValueError("bad look")

    class BadHook(Counter):
        def _seen(self, *call):
            raise ValueError("bad hook")

    for cls, words in ((BadLook, "bad look"), (BadHook, "bad hook")):
        given = options(str(tmp_path))
        with pytest.raises(ValueError, match=words):
            Trainer(**given, callbacks=[cls()]).train()
        assert not given["model"]._forward_hooks


def test_the_hook_stays_on_where_another_thread_of_the_run_forwards(tmp_path):
    """As autograd does on CUDA, which recomputes checkpointed layers in a thread that the loop has not called."""

    class Forwards(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            before = callback.forwards
            worker = threading.Thread(target=lambda: model(torch.tensor([[1, 2]])))
            worker.start()
            worker.join()
            gained.append(callback.forwards - before)

    callback, gained = Counter(), []
    given = options(str(tmp_path))
    Trainer(**given, callbacks=[callback, Forwards()]).train()
    assert gained and set(gained) == {1} and not given["model"]._forward_hooks


def test_undisturbed():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    noise = torch.random.get_rng_state()
    with pytest.raises(KeyError), undisturbed(model):  # noqa: PT012
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        torch.rand(3)
        raise KeyError
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert torch.equal(noise, torch.random.get_rng_state()) and torch.is_grad_enabled()


def test_metrics_reach_a_tracker_through_the_trainer(tmp_path):
    heard = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.extend(k for k in logs if k.startswith("hfgen/"))

    given = options(str(tmp_path))
    callback = Counter()
    trainer = Trainer(**given, callbacks=[Tracker(), callback])  # the tracker comes first, as those of report_to do
    trainer.train()
    assert not heard
    given = options(str(tmp_path))
    callback = Counter()
    trainer = Trainer(**given, callbacks=[Tracker(), callback])
    callback.attach(trainer)
    trainer.train()
    assert heard.count("hfgen/counter/weight") == 3


# --- gradients ------------------------------------------------------------------------------------------------------


def event(model, **changes):
    given = {"args": SimpleNamespace(deepspeed=None, max_grad_norm=0.0), "model": model, "optimizer": None, **changes}
    return SimpleNamespace(**given)


def test_gradient_norm():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="no parameter has a gradient; call gradient_norm in on_pre_optimizer_step"):
        gradient_norm(event(model))
    model(torch.randn(4, 3)).square().sum().backward()
    true = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm()
    assert float(gradient_norm(event(model))) == pytest.approx(float(true), rel=1e-6)
    for p in model.parameters():
        p.grad *= 65536
    scaled = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 65536.0))
    assert float(gradient_norm(event(model, optimizer=scaled))) == pytest.approx(float(true), rel=1e-6)
    with pytest.raises(ValueError, match=r"args.deepspeed is set.*get_global_grad_norm"):
        gradient_norm(event(model, args=SimpleNamespace(deepspeed="ds.json", max_grad_norm=0.0)))

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    with pytest.raises(ValueError, match="use fsdp_version: 2"):
        gradient_norm(event(FullyShardedDataParallel(model)))


# --- sample index ---------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_substep_end(self, *args, **kwargs):
        self.seen.append(self.tracker.current.tolist())

    on_step_end = on_substep_end


def test_the_index_reaches_the_step_in_trainer(tmp_path):
    given = options(str(tmp_path))
    rows = given["train_dataset"]
    given["train_dataset"] = Dataset.from_list(rows)
    given["args"].gradient_accumulation_steps = 2
    watch = Watch()
    trainer = Trainer(**given, eval_dataset=Dataset.from_list(rows[:4]), callbacks=[watch])
    watch.tracker = SampleTracker(trainer)
    inputs = []
    trainer.model.model.register_forward_pre_hook(
        lambda m, a, k: inputs.append(k["input_ids"].tolist()), with_kwargs=True
    )
    trainer.train()
    assert len(watch.seen) == 8 and sorted(i for batch in watch.seen for i in batch) == list(range(16))
    assert inputs == [[rows[i]["input_ids"] for i in batch] for batch in watch.seen]
    trainer.evaluate()  # rows without an index


def test_the_index_reaches_the_step_in_sfttrainer(tmp_path):
    rows = [{"prompt": p, "completion": sandbox.tasks.R.gold(p)} for p in sandbox.tasks.R.prompts[:8]]
    args = SFTConfig(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    watch = Watch()
    trainer = SFTTrainer(
        sandbox.load_model(), args, train_dataset=Dataset.from_list(rows), processing_class=sandbox.load_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM"), callbacks=[watch],
    )  # fmt: skip
    watch.tracker = SampleTracker(trainer)
    trainer.train()
    assert sorted(i for batch in watch.seen for i in batch) == list(range(8))


def test_streams_and_packing_are_refused(tmp_path):
    given = options(str(tmp_path))
    with pytest.raises(ValueError, match="train_dataset is a list; a per-sample index needs a datasets.Dataset"):
        SampleTracker(Trainer(**given))
    data = Dataset.from_list(given["train_dataset"])
    stream = Trainer(given["model"], given["args"], train_dataset=data.to_iterable_dataset())
    with pytest.raises(ValueError, match="train_dataset is a IterableDataset"):
        SampleTracker(stream)
    packed = Trainer(given["model"], given["args"], train_dataset=data)
    packed.args.packing = True
    with pytest.raises(ValueError, match="args.packing is True"):
        SampleTracker(packed)


def test_a_flat_witness_is_said_on_the_log(tmp_path, caplog):
    class Flat(Counter):
        def fire(self):
            pass

    with caplog.at_level(logging.WARNING):
        trained(tmp_path, Flat())
    assert "counter: the run ended at step 4 and a look at the weights never happened" in caplog.text
