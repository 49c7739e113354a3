"""Gradual pruning: schedule and masks against brute force, zeros that stay, resume, plain checkpoints, adapters, refusals."""

import dataclasses
import json
import logging
import traceback
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hfgen.adapters import IncreLoraConfig, IntrinsicConfig, LoLDUConfig, SaraConfig, SomaConfig, SVFitConfig
from hfgen.callbacks import GradualPruningCallback
from hfgen.evidence.tuning import at_edge, best_rate
from hfgen.kit.examples import ROWS
from hfgen_plugins.callbacks.gradual_pruning import evidence, gradual_pruning
from hfgen_plugins.callbacks.gradual_pruning.magnitude import extended, outside_pattern, select, sparsity_at

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def llama(dtype=torch.float32, layers=2):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, vocab_size=32,
                    **NO_TOKENS)
    ).to(dtype)  # fmt: skip


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, **NO_TOKENS))


def build(folder, *callbacks, model=None, **options):
    given = {
        "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "logging_steps": 1,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "save_only_model": False,
        **options,
    }  # fmt: skip
    return Trainer(
        model or llama(), TrainingArguments(str(folder), **given), train_dataset=ROWS[:16], eval_dataset=ROWS[16:],
        callbacks=list(callbacks),
    )  # fmt: skip


def zeros(model, layers):
    return {name: int((model.get_submodule(name).weight == 0).sum()) for name in layers}


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_the_schedule_of_the_sheet():
    found = {t: sparsity_at(t, 10, 30, 4, 0.8) for t in (9, 10, 13, 14, 17, 18, 22, 26, 29, 30, 99)}
    wanted = {
        9: 0,
        10: 0,
        13: 0,
        14: 0.3904,
        17: 0.3904,
        18: 0.6272,
        22: 0.7488,
        26: 0.7936,
        29: 0.7936,
        30: 0.8,
        99: 0.8,
    }
    assert found == pytest.approx(wanted, abs=1e-12)
    assert [sparsity_at(t, 5, 5, 1, 0.5) for t in (4, 5, 6)] == [0, 0.5, 0.5]
    assert sparsity_at(3, 2, 9, 4, 0.9, initial=0.2) == pytest.approx(0.2)  # from the first update on
    assert sparsity_at(8, 2, 9, 4, 0.8) == pytest.approx(0.8 - 0.8 * (3 / 7) ** 3)  # the last interval is shorter


@given(
    st.integers(0, 50),
    st.integers(0, 60),
    st.integers(1, 70),
    st.floats(0.01, 0.99),
    st.floats(0, 1),
    st.floats(0.5, 5),
)
@settings(max_examples=60, deadline=None)
def test_the_schedule_only_rises_to_its_end(begin, length, frequency, final, part, exponent):
    initial = part * final * 0.99
    steps = [
        sparsity_at(t, begin, begin + length, frequency, final, initial, exponent) for t in range(begin + length + 5)
    ]
    assert steps == sorted(steps) and steps[begin + length :] == [final] * 5
    assert steps[:begin] == [0.0] * begin
    assert len(set(steps)) <= length // frequency + 3


# --- masks against brute force ------------------------------------------------------------------------------------------


def brute(weights, pruned, barred, count):
    """Sort everything in float64 by (already pruned, |w|, tensor, index)."""
    entries = [
        (not p, abs(w), i, j)
        for i, (ws, ps, bs) in enumerate(zip(weights, pruned, barred, strict=True))
        for j, (w, p, b) in enumerate(
            zip(ws.double().flatten().tolist(), ps.flatten().tolist(), bs.flatten().tolist(), strict=True)
        )
        if p or not b
    ]
    masks = [torch.zeros(w.numel(), dtype=torch.bool) for w in weights]
    for _, _, i, j in sorted(entries)[: max(count, sum(int(p.sum()) for p in pruned))]:
        masks[i][j] = True
    return [m.view(w.shape) for m, w in zip(masks, weights, strict=True)]


@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3), st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), st.booleans(), st.floats(0, 1),
    st.floats(0, 0.6),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_masks_are_the_smallest_and_ties_go_by_index(shapes, seed, dtype, few_values, share, before):
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    weights = [((w * 2).round() / 2 if few_values else w).to(dtype) for w in weights]
    if seed % 2:
        weights[0] = weights[0].double()  # of one among others
    pruned = [torch.rand(shape, generator=random) < before for shape in shapes]
    barred = [(torch.rand(shape, generator=random) < 0.2) & ~p for shape, p in zip(shapes, pruned, strict=True)]
    free = sum(int((~b).sum()) for b in barred)
    count = round(share * free)
    found = extended(weights, pruned, barred, count)
    for got, want in zip(found, brute(weights, pruned, barred, count), strict=True):
        assert torch.equal(got, want)
    assert sum(int(m.sum()) for m in found) == max(count, sum(int(p.sum()) for p in pruned))
    assert all(bool((m | ~p).all()) for m, p in zip(found, pruned, strict=True))  # masks only grow


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_pattern_keeps_n_of_m(rows, groups, kept, seed, few_values):
    of = kept + 1 + seed % 3
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * of, generator=random)
    weight = weight.round() if few_values else weight
    pruned = torch.zeros(weight.shape, dtype=torch.bool)
    pruned.view(-1, of)[:, seed % of] = True  # one of each group, whatever its size
    keeps = outside_pattern(weight, pruned, kept, of)
    assert bool((keeps.view(-1, of).sum(1) == kept).all()) and not bool((keeps & pruned).any())
    for row, gone, stays in zip(weight.view(-1, of), pruned.view(-1, of), keeps.view(-1, of), strict=True):
        order = sorted(range(of), key=lambda j: (not gone[j], float(row[j].abs()), j))
        assert {j for j in range(of) if stays[j]} == set(order[of - kept :])
    half = extended([weight], [pruned], [keeps], weight.numel() * (of - kept) // of)[0]
    assert torch.equal(half, ~keeps)


def test_weights_that_are_not_finite_are_refused():
    weight = torch.full((3, 3), torch.nan)
    none = torch.zeros(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="not finite.*resume from a checkpoint"):
        extended([weight], [none], [none], 4)


# --- which layers -------------------------------------------------------------------------------------------------------


def test_layers_without_heads_and_embeddings():
    found, left_out = select(llama())
    assert len(found) == 14 and set(left_out) == {"model.embed_tokens", "lm_head"}
    assert "head" in left_out["lm_head"] and "Embedding" in left_out["model.embed_tokens"]
    found, left_out = select(gpt2())
    assert len(found) == 4 and "embedding's too" in left_out["lm_head"]  # tied
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    found, left_out = select(BertForSequenceClassification(config))
    assert "bert.pooler.dense" in found and "head" in left_out["classifier"]


def test_layers_by_name_end_and_expression():
    model = llama()
    assert set(select(model, ["q_proj", "model.layers.1.mlp.up_proj"])[0]) == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    }  # fmt: skip
    found, left_out = select(model, r"model\.layers\.0\..*|lm_head")
    assert (
        len(found) == 8 and "lm_head" in found and left_out["model.layers.1.mlp.up_proj"] == "modules does not name it"
    )
    model.model.layers[0].requires_grad_(False)
    assert "frozen" in select(model)[1]["model.layers.0.mlp.up_proj"]
    assert len(select(model, ["up_proj"])[0]) == 1
    with pytest.raises(ValueError, match=r"modules has 'layers.0.mlp.up_proj'.*frozen"):
        select(model, ["layers.0.mlp.up_proj"])
    with pytest.raises(ValueError, match="modules has 'upproj'.*no layer"):
        select(model, ["q_proj", "upproj"])
    odd = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3), nn.Conv1d(4, 4, 2))
    found, left_out = select(odd, of=4)
    assert set(found) == {"1"} and "groups of 4" in left_out["0"] and "Conv1d" in left_out["2"]
    assert set(select(odd, ["0", "2"])[0]) == {"0", "2"}


# --- runs --------------------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """What the run looks like from outside at every event; comes before the callback in the list."""

    def __init__(self, callback):
        self.callback, self.steps, self.masks, self.evaluated, self.gradients = callback, [], [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        pruned = self.callback.pruned()
        self.gradients += [float((model.get_submodule(n).weight.grad * m).abs().max()) for n, m in pruned.items()]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append((state.global_step, zeros(model, self.callback.pruned())))
        self.masks.append({n: m.clone() for n, m in self.callback.pruned().items()})
        for name, mask in self.masks[-1].items():
            weight = model.get_submodule(name).weight
            assert torch.equal(weight == 0, mask) and not bool(torch.signbit(weight[mask]).any())

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.evaluated.append((state.global_step, zeros(model, self.callback.pruned())))


SCHEDULE = {"begin_step": 2, "end_step": 9, "frequency": 3}


@pytest.mark.parametrize("options", [{}, {"optim": "adafactor"}, {"optim": "sgd", "max_grad_norm": 0.0}, {"bf16": True},
                                     {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}], ids=str)  # fmt: skip
def test_exactly_so_many_zeros_after_every_optimizer_step(tmp_path, options):
    callback = GradualPruningCallback(0.8, **SCHEDULE)
    watch = Watch(callback)
    build(tmp_path, watch, callback, eval_strategy="steps", eval_steps=4, **options).train()
    sizes = {name: mask.numel() for name, mask in callback.pruned().items()}
    for step, found in watch.steps:
        share = sparsity_at(step, 2, 9, 3, 0.8)
        assert found == {name: round(share * size) for name, size in sizes.items()}, step
    assert [step for step, _ in watch.steps] == list(range(1, 13))
    assert [found for step, found in watch.steps if step in (4, 8, 12)] == [found for _, found in watch.evaluated]
    for before, after in zip(watch.masks, watch.masks[1:], strict=False):
        assert all(bool((after[name] | ~before[name]).all()) for name in before)
    assert max(watch.gradients) == 0  # gone before they are clipped
    assert callback.fired == 3  # steps 5, 8, 9


def test_one_threshold_for_all_layers_and_the_log(tmp_path):
    callback = GradualPruningCallback(0.6, scope="global", **SCHEDULE)
    watch = Watch(callback)
    trainer = build(tmp_path, watch, callback)
    trainer.train()
    total = sum(mask.numel() for mask in callback.pruned().values())
    for step, found in watch.steps:
        assert sum(found.values()) == round(sparsity_at(step, 2, 9, 3, 0.6) * total)
    shares = {n: float(m.double().mean()) for n, m in callback.pruned().items()}
    assert len(set(shares.values())) > 1
    rows = [row for row in trainer.state.log_history if "hfgen/gradual_pruning/sparsity" in row]
    assert [row["hfgen/gradual_pruning/step"] for row in rows] == [2, 5, 8, 9, 12]
    last = {k.removeprefix("hfgen/gradual_pruning/"): v for k, v in rows[-1].items()}
    assert last["sparsity"] == pytest.approx(0.6, abs=1 / total) and last["scheduled"] == 0.6
    assert last["zeros"] == round(0.6 * total) and last["sparsest_layer"] == max(shares.values())
    assert not callback.findings


@pytest.mark.parametrize(("make", "scope"), [(llama, "per_layer"), (gpt2, "global")])
def test_two_of_four_inputs_stay(tmp_path, make, scope):
    callback = GradualPruningCallback(pattern="2:4", scope=scope, **SCHEDULE)
    watch = Watch(callback)
    model = make()
    build(tmp_path, watch, callback, model=model).train()
    for step, found in watch.steps:
        if scope == "per_layer":
            share = sparsity_at(step, 2, 9, 3, 0.5)
            assert found == {n: round(share * m.numel()) for n, m in callback.pruned().items()}
    for name in callback.pruned():
        weight = model.get_submodule(name).weight
        rows = weight.T if make is gpt2 else weight  # GPT-2's are (inputs, outputs)
        assert bool(((rows.reshape(-1, 4) == 0).sum(1) == 2).all())


def test_a_bfloat16_model(tmp_path):
    callback = GradualPruningCallback(0.7, **SCHEDULE)
    watch = Watch(callback)
    build(tmp_path, watch, callback, model=llama(torch.bfloat16), learning_rate=1e-3).train()
    assert {name: round(0.7 * m.numel()) for name, m in callback.pruned().items()} == watch.steps[-1][1]


def test_the_schedule_of_a_run_that_names_none(tmp_path):
    for options, steps, warmup, wanted in (
        ({}, 600, 0, (100, 400, 15)), ({}, 600, 200, (200, 440, 12)), ({"begin_step": 0}, 100, 0, (0, 60, 3)),
        ({"end_step": 5}, 60, 0, (5, 5, 1)), ({"frequency": 7}, 60, 0, (10, 40, 7)), ({}, 1, 0, (0, 0, 1)),
    ):  # fmt: skip
        callback = GradualPruningCallback(0.5, **options)
        args = TrainingArguments(str(tmp_path), max_steps=steps, warmup_steps=warmup, use_cpu=True, report_to="none")
        state = type("State", (), {"max_steps": steps})
        event = gradual_pruning.Event(args, state, None, None, None, None, None, None)
        assert gradual_pruning._schedule(callback, event, None) == wanted


def test_all_at_once_and_before_the_first_step(tmp_path):
    late = GradualPruningCallback(0.5, begin_step=12, end_step=12)
    dense, model = llama(), llama()
    build(tmp_path, model=dense).train()
    build(tmp_path, late, model=model).train()
    for name, mask in late.pruned().items():
        weight = dense.get_submodule(name).weight
        assert torch.equal(torch.where(mask, 0.0, weight), model.get_submodule(name).weight)
        assert bool(weight[mask].abs().max() <= weight[~mask].abs().min())
    first = GradualPruningCallback(0.5, begin_step=0, end_step=0)
    start, model = llama(), llama()
    build(tmp_path, first, model=model, load_best_model_at_end=True, eval_strategy="steps", eval_steps=4,
          save_strategy="steps", save_steps=4).train()  # fmt: skip
    for name, mask in first.pruned().items():
        size = start.get_submodule(name).weight.abs()
        assert bool(size[mask].max() <= size[~mask].min()) and torch.equal(model.get_submodule(name).weight == 0, mask)
    assert first.history[0]["step"] == 0 and first.history[0]["sparsity"] == first.history[-1]["sparsity"] == 0.5


# --- checkpoints -------------------------------------------------------------------------------------------------------


def test_every_checkpoint_is_a_plain_one_with_zeros(tmp_path):
    callback = GradualPruningCallback(0.8, **SCHEDULE)
    trainer = build(tmp_path / "run", callback, save_strategy="steps", save_steps=1, max_steps=10)
    llama().save_pretrained(tmp_path / "dense")
    trainer.train()
    dense = tmp_path / "dense" / "model.safetensors"
    for step in range(1, 11):
        file = tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors"
        tensors = load_file(file)
        assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
            n: (t.shape, t.dtype) for n, t in load_file(dense).items()
        }
        share = sparsity_at(step, 2, 9, 3, 0.8)
        for name, mask in callback.pruned().items():
            assert int((tensors[f"{name}.weight"] == 0).sum()) == round(share * mask.numel())
        assert file.stat().st_size == dense.stat().st_size  # zeros are stored as any other number
    trainer.model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    for (name, p), q in zip(trainer.model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q) and "_orig" not in name
    assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())


@pytest.mark.parametrize("options", [{"final_sparsity": 0.8}, {"final_sparsity": 0.8, "scope": "global"},
                                     {"pattern": "2:4"}], ids=str)  # fmt: skip
def test_resumed_at_any_step_a_run_ends_bit_equal(tmp_path, options):
    def run(folder, step=None):
        callback = GradualPruningCallback(**options, **SCHEDULE)
        start = step and str(tmp_path / "whole" / f"checkpoint-{step}")
        trainer = build(
            folder, callback, save_strategy="steps", save_steps=1, max_steps=10, resume_from_checkpoint=start
        )
        trainer.train(resume_from_checkpoint=start)
        return trainer, callback

    whole, callback = run(tmp_path / "whole")
    state = whole.optimizer.state_dict()["state"]
    for step in (1, 3, 5, 6, 8, 9):  # before the first update, between two, at one, after the last
        again, resumed = run(tmp_path / f"from-{step}", step)
        for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(p, q)
        masks = resumed.pruned()
        assert all(torch.equal(mask, masks[name]) for name, mask in callback.pruned().items())
        found = again.optimizer.state_dict()["state"]
        assert all(torch.equal(state[i]["exp_avg"], found[i]["exp_avg"]) for i in state)
        assert (resumed.history, resumed.fired) == (callback.history, callback.fired)


def test_a_resume_keeps_the_schedule_and_refuses_other_layers(tmp_path):
    build(tmp_path, GradualPruningCallback(0.5), save_strategy="steps", save_steps=6).train()
    longer = GradualPruningCallback(0.5)
    build(tmp_path, longer, max_steps=14).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert longer.schedule == (2, 8, 1)  # that of 12 steps
    other = build(tmp_path, GradualPruningCallback(0.5, modules=["q_proj"]))
    with pytest.raises(ValueError, match="modules is.*'q_proj'.*masks differ in"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    wider = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=24, num_hidden_layers=2,
                                         num_attention_heads=2, vocab_size=32, **NO_TOKENS))  # fmt: skip
    with pytest.raises(ValueError, match="of another size than its weight"):
        gradual_pruning._unpacked(torch.zeros(3, dtype=torch.uint8), wider.lm_head.weight, "lm_head")


def test_a_run_resumed_from_a_dense_checkpoint_catches_up(tmp_path, caplog):
    build(tmp_path, save_strategy="steps", save_steps=6).train()
    callback = GradualPruningCallback(0.8, **SCHEDULE)
    watch = Watch(callback)
    build(tmp_path, watch, callback).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert "has no state of this callback" in caplog.text
    assert [row["step"] for row in callback.history] == [6, 8, 9, 12]
    share = sparsity_at(7, 2, 9, 3, 0.8)
    assert watch.steps[0] == (7, {name: round(share * m.numel()) for name, m in callback.pruned().items()})


def test_a_run_that_failed_leaves_nothing_on_the_model(tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("on purpose")

    trainer = build(tmp_path, GradualPruningCallback(0.5, begin_step=0, end_step=4), Fail())
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    trainer.model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())
    assert not any(m._forward_hooks for m in trainer.model.modules())


# --- adapters on a pruned base -----------------------------------------------------------------------------------------

TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "svfit": lambda: SVFitConfig(r=4, **TARGETS),
    "loldu": lambda: LoLDUConfig(r=4, **TARGETS),
    "soma": lambda: SomaConfig(r=4, **TARGETS),
    "sara": lambda: SaraConfig(density=0.6, **TARGETS),
    "increlora": lambda: IncreLoraConfig(target_total_rank=6, init_warmup=1, incre_interval=1, top_h=2, **TARGETS),
    "intrinsic": lambda: IntrinsicConfig(d=64, **TARGETS),
    "lora": lambda: LoraConfig(r=4, **TARGETS),
}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A checkpoint of which 80 % of the layers' weights are zero."""
    folder = tmp_path_factory.mktemp("pruned")
    trainer = build(folder / "run", GradualPruningCallback(0.8, begin_step=1, end_step=3, frequency=1), max_steps=4)
    trainer.train()
    trainer.model.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_a_pruned_base(name, pruned, tmp_path):
    """Trains, saves, reloads; the base keeps its zeros; a merge fills them."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pruned), ADAPTERS[name]())
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = build(tmp_path, model=model, max_steps=5, weight_decay=0.0, learning_rate=2e-2)
    trainer.train()
    moved = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any(n not in start or p.shape != start[n].shape or not torch.equal(p, start[n]) for n, p in moved.items())
    ids = torch.arange(16)[None] % 32
    model.eval().save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(pruned)
    with torch.no_grad():
        wanted, plain = model(input_ids=ids).logits, base(input_ids=ids).logits
        again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.allclose(again(input_ids=ids).logits, wanted, atol=1e-6)
        assert not torch.allclose(wanted, plain, atol=1e-4)
        with again.disable_adapter():
            assert torch.allclose(again(input_ids=ids).logits, plain, atol=1e-5)
        stored, merged = load_file(pruned / "model.safetensors"), again.merge_and_unload()
    layer = "model.layers.0.self_attn.q_proj.weight"
    kept = int((stored[layer] == 0).sum())
    filled = kept - int((merged.get_submodule(layer.removesuffix(".weight")).weight == 0).sum())
    assert kept == round(0.8 * 256) and filled > 0


# --- what is said --------------------------------------------------------------------------------------------------------


def test_a_schedule_after_the_run_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hfgen.gradual_pruning"):
        callback = GradualPruningCallback(0.5, begin_step=50, end_step=60)
        build(tmp_path, callback, max_steps=3).train()
    assert callback.fired == 0 and callback.findings[0]["kind"] == "too_late"
    assert "pruning begins at step 50" in caplog.text and "a pruning of weights never happened" in caplog.text
    callback = GradualPruningCallback(0.5, begin_step=1, end_step=60, frequency=1)
    build(tmp_path, callback, max_steps=3).train()
    assert callback.fired and "is complete at step 60" in callback.findings[0]["sentence"]
    assert [found["kind"] for found in callback.findings] == ["too_late", "unfinished"]


def test_a_run_stopped_before_the_end_of_its_schedule_is_said(tmp_path):
    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = True

    callback = GradualPruningCallback(0.5, begin_step=0, end_step=10, frequency=1)
    build(tmp_path, callback, Stop(), eval_strategy="steps", eval_steps=4).train()
    (found,) = callback.findings
    assert found["step"] == 4 and "ended at a sparsity of 39.2%, before step 10 with its 50.0%" in found["sentence"]


def test_an_empty_layer_is_said(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-6)
    callback = GradualPruningCallback(0.7, scope="global", begin_step=0, end_step=0)
    build(tmp_path, callback, model=model, max_steps=2, optim="sgd", learning_rate=1e-9).train()
    assert [found["kind"] for found in callback.findings] == ["empty_layer/model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "final_sparsity is None and so is pattern; give one"),
        ({"final_sparsity": 1.0}, "final_sparsity is 1.0, which leaves nothing; give a number below 1"),
        ({"final_sparsity": 0}, "final_sparsity is 0; give a finite number above 0"),
        ({"final_sparsity": "half"}, "final_sparsity is 'half'"),
        ({"final_sparsity": 0.5, "pattern": "2:4"}, "pattern is '2:4', which gives it; leave one out"),
        ({"pattern": "4:2"}, "pattern is '4:2'; give 'n:m'"),
        ({"pattern": 24}, "pattern is 24; give 'n:m'"),
        ({"final_sparsity": 0.5, "scope": "layer"}, "scope is 'layer'; did you mean 'per_layer'"),
        ({"final_sparsity": 0.5, "begin_step": -1}, "begin_step is -1; give an integer of at least 0"),
        ({"final_sparsity": 0.5, "begin_step": 1.5}, "begin_step is 1.5"),
        ({"final_sparsity": 0.5, "frequency": 0}, "frequency is 0; give an integer of at least 1"),
        (
            {"final_sparsity": 0.5, "begin_step": 9, "end_step": 3},
            "end_step is 3, before begin_step 9; give a later step",
        ),
        (
            {"final_sparsity": 0.5, "initial_sparsity": 0.5},
            "initial_sparsity is 0.5; give a number from 0 to below 0.5",
        ),
        ({"final_sparsity": 0.5, "initial_sparsity": 0.2, "begin_step": 3, "end_step": 3}, "all at once; leave it out"),
        ({"final_sparsity": 0.5, "exponent": 0}, "exponent is 0; give a finite number above 0"),
        ({"final_sparsity": 0.5, "modules": [1]}, r"modules is \[1\].*give a string or a list of strings"),
        ({"final_sparsity": 0.5, "modules": []}, r"modules is \[\]; give names of layers, or None"),
        ({"final_sparsity": 0.5, "modules": "q_(proj"}, "modules is 'q_\\(proj', no regular expression"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        GradualPruningCallback(**options)
    last = traceback.extract_tb(caught.value.__traceback__)[-1].filename
    assert "hfgen" in Path(last).as_posix()


def test_what_a_run_refuses(tmp_path, monkeypatch):
    adapted = build(tmp_path, GradualPruningCallback(0.5), model=get_peft_model(llama(), ADAPTERS["lora"]()))
    with pytest.raises(ValueError, match="PEFT adapter.*prune the plain model first"):
        adapted.train()
    best = build(tmp_path, GradualPruningCallback(0.5), load_best_model_at_end=True, eval_strategy="steps", eval_steps=4,
                 save_strategy="steps", save_steps=4)  # fmt: skip
    with pytest.raises(ValueError, match="load_best_model_at_end is True.*set it to False"):
        best.train()
    frozen = llama()
    frozen.model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match="no layer to prune.*modules="):
        build(tmp_path, GradualPruningCallback(0.5), model=frozen).train()
    for host in ("FSDP", "DEEPSPEED"):
        monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", type("T", (), {"value": host}))
        with pytest.raises(ValueError, match=f"zeroes single entries.*{host} keeps in pieces; train with DDP"):
            gradual_pruning.refuse(llama())


# --- the claim -----------------------------------------------------------------------------------------------------------


def made(gaps, dense=(0.8, 0.81, 0.82), once=0.78):
    """Samples of three seeds in which the pruned network is `gaps` better at each sparsity."""
    sizes = (4.2, 4.0, 3.7, 3.5, 3.1)
    samples = {arm: {"accuracy": list(dense)} for arm in ("dense", *(f"small_{s}" for s in evidence.SPARSITIES))}
    samples |= {arm: {"accuracy": [a + once - 0.8 for a in dense]} for arm in ("once_90", "late_90")}
    for s, gap, size in zip(evidence.SPARSITIES, gaps, sizes, strict=True):
        samples[f"gradual_{s}"] = {"accuracy": [a + gap for a in dense], "log_nonzero": [size] * 3}
    return samples


def test_the_verdict_and_where_small_dense_wins():
    found = {v.arm: v for v in evidence.judge(made((0.01, 0.02, -0.01, 0.01, -0.03)), evidence.SETTINGS)}
    assert [found[f"gradual_{s}"].verdict for s in evidence.SPARSITIES] == [
        "reproduced", "reproduced", "not reproduced", "reproduced", "not reproduced"
    ]  # fmt: skip
    assert len(found["gradual_90"].checks) == 3
    assert evidence.crossing(made((0.01, 0.02, -0.01, 0.01, -0.03))) == pytest.approx(10**3.4)
    assert "below about 2,512 non-zeros (97.0% of all" in found["gradual_90"].reason
    assert evidence.crossing(made((0.01, 0.02, 0.01, 0.01, 0.01))) is None
    assert evidence.crossing(made((-0.01,) * 5)) == pytest.approx(10**4.2)
    partly = evidence.judge(made((0.01, -0.01, 0, 0, 0)), evidence.SETTINGS)[1]
    assert partly.verdict == "partly"
    void = evidence.judge(made((0.01,) * 5, dense=(0.1, 0.12, 0.3)), evidence.SETTINGS)
    assert {v.verdict for v in void} == {"void"}


def test_arms_have_equal_non_zeros_and_their_schedule():
    arms, cut_down = ("dense", "gradual_90", "once_90", "late_90", "small_90"), evidence.EXPERIMENT.smoke_settings
    found = {arm: evidence.run_arm(arm, 107, cut_down, lambda *_: None) for arm in arms}
    pruned = {found[arm]["nonzero"] for arm in ("gradual_90", "once_90", "late_90")}
    assert pruned == {found["small_90"]["nonzero"]} == {8970} and found["dense"]["nonzero"] == 85002
    for s in evidence.SPARSITIES:
        nonzero = 522 + sum(n - round(s / 100 * n) for n in (64 * 256, 256 * 256, 2560))
        width = evidence.small_width(s, 256)
        assert evidence.parameters(width - 1) < nonzero <= evidence.parameters(width)


def test_rates_are_what_the_tuning_chose():
    table = json.loads(Path(evidence.__file__).with_name("tuning.json").read_text())
    fixed = dataclasses.asdict(evidence.SETTINGS)
    assert fixed.pop("learning_rates") == table["chosen"] and fixed == table["settings"]
    assert (table["criterion"], table["grid"], table["seeds"]) == (
        evidence.CRITERION, list(evidence.GRID), list(evidence.TUNING_SEEDS)
    )  # fmt: skip
    assert at_edge(table["chosen"], table["grid"]) == []
    for arm in evidence.ARMS:
        runs = [r for r in table["runs"] if r["arm"] == arm.id]
        assert len(runs) == evidence.EXPERIMENT.tries and best_rate(runs, ("held_out",)) == table["chosen"][arm.id]
