"""Soup: averages against float64, the promise on the gate, saved checkpoints, the model left alone, refusals."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.adapters import LoLDUConfig, SaraConfig
from hfgen.callbacks import SoupCallback
from hfgen.kit.monitor import collated
from hfgen_plugins.callbacks.soup.soup import gate_loss, mix, refuse, swapped, trained

ROWS = [{"input_ids": [(5 * i + j * j) % 24 for j in range(6 + i % 5)]} for i in range(24)]
for one in ROWS:
    one["labels"] = one["input_ids"]


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=24,
                    bos_token_id=None, eos_token_id=None, pad_token_id=None)
    ).to(dtype)  # fmt: skip


class Keep(TrainerCallback):
    """The weights at every evaluation, in float64."""

    def __init__(self):
        self.members = []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.members.append({n: p.detach().double().clone() for n, p in model.named_parameters() if p.requires_grad})


def build(folder, *callbacks, model=None, eval_dataset=None, **options):
    given = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 2e-2, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "lr_scheduler_type": "constant", **options,
    }  # fmt: skip
    return Trainer(
        model or tiny(), TrainingArguments(str(folder), **given), train_dataset=ROWS[:16],
        eval_dataset=eval_dataset or ROWS[12:], data_collator=collated, callbacks=list(callbacks),
    )  # fmt: skip


class Loader:
    dataset, collate_fn = ROWS[12:], staticmethod(collated)


def loss_of(weights, model=None):
    """The gate loss of weights, by the host's own loss, row by row."""
    model = (model or tiny()).double().eval()
    total = count = 0.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in weights:
                p.copy_(weights[name])
        for row in ROWS[12:]:
            total += float(model(**collated([row])).loss) * (len(row["input_ids"]) - 1)
            count += len(row["input_ids"]) - 1
    return total / count


# --- averages -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.floats(0.05, 1.0), st.integers(0, 99))
def test_running_averages_equal_float64_brute_force(n, decay, seed):
    generator = torch.Generator().manual_seed(seed)
    members = [{"w": torch.randn(7, generator=generator)} for _ in range(n)]
    uniform = ema = members[0]
    for count, member in enumerate(members[1:], 1):
        uniform, ema = mix(uniform, member, 1 / (count + 1)), mix(ema, member, 1 - decay)
    mean = sum(m["w"].double() for m in members) / n
    assert float((uniform["w"].double() - mean).abs().max()) <= 1e-6
    weights = [decay ** (n - 1)] + [(1 - decay) * decay ** (n - 1 - i) for i in range(1, n)]
    expected = sum(w * m["w"].double() for w, m in zip(weights, members, strict=True))
    assert float((ema["w"].double() - expected).abs().max()) <= 1e-6
    assert torch.equal(mix(members[0], members[0], 1 / 3)["w"], members[0]["w"])


def test_the_gate_loss_and_the_swap(tmp_path):
    model = tiny().eval()
    with torch.no_grad():
        assert gate_loss(model, Loader, 99, 5, "cpu") == pytest.approx(loss_of({}), abs=1e-6)
    half = tiny(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in half.named_parameters()}
    other = {n: t + 1 for n, t in trained(half).items()}
    assert all(t.dtype == torch.float32 for t in other.values())
    with pytest.raises(KeyError), swapped(half, other):  # noqa: PT012
        assert all(torch.equal(p, (before[n].float() + 1).bfloat16()) for n, p in half.named_parameters())
        raise KeyError
    assert all(torch.equal(p, before[n]) for n, p in half.named_parameters())


def test_the_swap_reaches_an_adapter_that_writes_its_values_into_the_base():
    """SaRA writes when the version of its values has changed: the gate must see the soup, and then the member again."""
    targets = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "density": 0.3}
    model, known = (get_peft_model(tiny(), SaraConfig(**targets)).eval() for _ in range(2))
    soup = {n: t + torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in trained(model).items()}
    known.load_state_dict(soup, strict=False)
    with torch.no_grad():
        own = gate_loss(model, Loader, 99, 5, "cpu")
        with swapped(model, soup):
            inside = gate_loss(model, Loader, 99, 5, "cpu")
        expected = gate_loss(known, Loader, 99, 5, "cpu")
        assert inside == expected and abs(expected - own) > 1e-4
        assert gate_loss(model, Loader, 99, 5, "cpu") == own


# --- in runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["greedy", "uniform", "ema"])
def test_never_worse_than_the_best_member_and_loads_as_a_plain_checkpoint(tmp_path, method):
    """A rate high enough to overshoot. Everything is repeated in float64 from the members themselves."""
    keep, callback = Keep(), SoupCallback(method)
    trainer = build(tmp_path, keep, callback, max_steps=10, learning_rate=0.1)
    trainer.train()
    losses = [loss_of(member) for member in keep.members]
    assert [row["member_loss"] for row in callback.history] == pytest.approx(losses, abs=1e-5)
    soup, count, best = keep.members[0], 1, losses[0]
    for step, (member, loss) in enumerate(zip(keep.members[1:], losses[1:], strict=True), 1):
        weight = 0.2 if method == "ema" else 1 / (count + 1)
        mixed = {n: t + weight * (member[n] - t) for n, t in soup.items()}
        options = [(loss_of(mixed), mixed, count + 1)]
        if method == "greedy":
            options += [(loss_of(soup), soup, count), (loss, member, 1)]
        soup_loss, soup, count = min(options, key=lambda option: option[0])
        best = min(best, loss)
        row = callback.history[step]
        assert row["members"] == count and row["soup_loss"] == pytest.approx(soup_loss, abs=1e-5)
        assert row["best_member_loss"] == pytest.approx(best, abs=1e-5)
        assert row["saved_loss"] == min(row["soup_loss"], row["best_member_loss"])
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "soup")
    found = loss_of({}, saved)
    assert found == pytest.approx(callback.history[-1]["saved_loss"], abs=1e-5) and found <= min(losses) + 1e-5
    assert sorted(p.name for p in (tmp_path / "soup").glob("*.safetensors")) == ["model.safetensors"]
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[n].double(), t) for n, t in keep.members[-1].items())


class Plain(nn.Module):
    """A model without save_pretrained, as the Trainer takes it too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(24, 24)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.table(input_ids)
        if labels is None:
            return SimpleNamespace(logits=logits)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_any_module_is_saved_as_the_trainer_saves_it(tmp_path):
    callback = SoupCallback("uniform")
    build(tmp_path, callback, model=Plain(), max_steps=2).train()
    saved = load_file(tmp_path / "soup" / "model.safetensors")
    chosen = callback.best if callback.best_loss < callback.soup_loss else callback.soup
    assert torch.equal(saved["table.weight"], chosen["table.weight"])


def test_a_soup_worse_than_its_best_member_gives_way_to_it(tmp_path):
    callback = SoupCallback("uniform")
    build(tmp_path, callback, max_steps=12, learning_rate=0.3).train()
    last = callback.history[-1]
    assert last["soup_loss"] > last["best_member_loss"] == last["saved_loss"]
    found = loss_of({}, LlamaForCausalLM.from_pretrained(tmp_path / "soup"))
    assert found == pytest.approx(last["best_member_loss"], abs=1e-5)


def test_several_sets_the_gate_and_bfloat16(tmp_path):
    sets = {"a": ROWS[:4], "b": ROWS[12:]}
    first, named = SoupCallback(), SoupCallback(gate="b")
    build(tmp_path / "1", first, eval_dataset=sets, max_steps=2).train()
    build(tmp_path / "2", named, eval_dataset=sets, max_steps=2, gradient_accumulation_steps=2).train()
    assert {k.split("/")[0] for row in first.history for k in row} == {"step", "a"}
    assert {k.split("/")[0] for row in named.history for k in row} == {"step", "b"}
    half = SoupCallback("uniform")
    model = tiny(torch.bfloat16)
    build(tmp_path / "3", half, model=model, bf16=True, max_steps=3).train()
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "3" / "soup")
    assert saved.dtype == torch.bfloat16 and half.soup["lm_head.weight"].dtype == torch.float32


def test_in_sfttrainer_with_a_lora_adapter(tmp_path):
    rows = Dataset.from_list(
        [{"prompt": p, "completion": sandbox.tasks.R.gold(p)} for p in sandbox.tasks.R.prompts[:8]]
    )
    args = SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none",
        logging_steps=1, eval_strategy="steps", eval_steps=1, gradient_checkpointing=True, disable_tqdm=True,
        save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    keep, callback = Keep(), SoupCallback("uniform")
    trainer = SFTTrainer(
        sandbox.load_model(), args, train_dataset=rows, eval_dataset=rows, processing_class=sandbox.load_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM"), callbacks=[keep, callback],
    )  # fmt: skip
    trainer.train()
    assert set(callback.soup) == set(keep.members[0]) and all("lora" in name for name in callback.soup)
    host = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["member_loss"] for row in callback.history] == pytest.approx(host, abs=1e-5)
    callback.best_loss = math.inf  # the soup itself
    callback.save(trainer.model, tmp_path / "mean")
    model = PeftModel.from_pretrained(sandbox.load_model(), tmp_path / "mean")
    loaded = dict(model.named_parameters())
    for name, tensor in callback.soup.items():
        mean = sum(member[name] for member in keep.members) / 3
        assert float((loaded[name].double() - mean).abs().max()) <= 1e-6 and torch.equal(loaded[name], tensor)
    assert (tmp_path / "soup" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "soup" / "tokenizer.json").is_file()


def test_a_member_without_a_finite_loss_is_left_out(tmp_path, caplog):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.lm_head.weight.data.fill_(math.nan)

    callback = SoupCallback()
    build(tmp_path, Breaks(), callback, max_steps=4).train()
    assert [row["step"] for row in callback.history] == [1, 2]
    assert "the member of step 3 has no finite loss and is left out" in caplog.text
    assert all(bool(t.isfinite().all()) for t in callback.soup.values())


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_what_cannot_be_averaged_is_refused(tmp_path):
    targets = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match="adapters of type ADALORA cannot be averaged: its ranks change"):
        refuse(get_peft_model(tiny(), AdaLoraConfig(total_step=9, **targets)), None)
    refuse(get_peft_model(tiny(), IA3Config(feedforward_modules=[], **targets)), None)
    with pytest.raises(ValueError, match="the weights are sharded"):
        refuse(tiny(), "ds.json")
    with pytest.raises(ValueError, match="1 is a BatchNorm that is trained"):
        refuse(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), None)
    with pytest.raises(ValueError, match="no parameter is trained"):
        refuse(tiny().requires_grad_(False), None)
    with pytest.raises(ValueError, match="args.eval_strategy is 'no'; SoupCallback reads evaluations"):
        build(tmp_path, SoupCallback(), eval_strategy="no").train()
    with pytest.raises(ValueError, match="there is no member yet"):
        SoupCallback().save(tiny(), tmp_path / "x")
    callback = SoupCallback()
    masked = [{"input_ids": [1, 2, 3], "labels": [1, -100, -100]}] * 4
    with pytest.raises(ValueError, match="the 4 gate rows have no labels other than -100"):
        build(tmp_path, callback, eval_dataset=masked).train()


class Moves(TrainerCallback):
    """Turns the indices of an adapter round at step 2."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, buffer in model.named_buffers():
            if state.global_step == 2 and "loldu_perm" in name:
                buffer.copy_(buffer.flip(-1))


def test_adapters_with_indices_are_averaged_until_these_move(tmp_path):
    targets = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "r": 4}
    callback = SoupCallback("uniform")
    build(tmp_path, callback, model=get_peft_model(tiny(), LoLDUConfig(**targets)), max_steps=3).train()
    assert callback.members == 3 and len(callback.soup) == 1
    with pytest.raises(ValueError, match="a mask or an index of the adapter has changed since the soup began"):
        build(tmp_path, Moves(), SoupCallback(), model=get_peft_model(tiny(), LoLDUConfig(**targets))).train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "Greedy"}, "SoupCallback.method is 'Greedy'; did you mean 'greedy'"),
        ({"decay": 0.0}, "SoupCallback.decay is 0.0"),
        ({"rows": 0}, "SoupCallback.rows is 0"),
        ({"folder": "../x"}, r"SoupCallback.folder is '../x'; give a name of a folder within output_dir"),
        ({"folder": "/x"}, "SoupCallback.folder is '/x'"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        SoupCallback(**options)
