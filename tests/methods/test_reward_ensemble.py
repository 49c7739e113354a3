"""Reward ensembles: losses and aggregation against plain arithmetic, members as if alone, saving, streaming, GRPO."""

import copy
import dataclasses
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

from hfgen import sandbox
from hfgen.testing.runs import all_weights, assert_same_step_however_cut
from hfgen.trainers import (
    EnsembleReward,
    EnsembleRewardConfig,
    EnsembleRewardModel,
    EnsembleRewardTrainer,
    flip_labels,
)
from hfgen_plugins.trainers.reward_ensemble import evidence, modeling, plot
from hfgen_plugins.trainers.reward_ensemble.data import EnsembleCollator, MemberOrders
from hfgen_plugins.trainers.reward_ensemble.modeling import EnsembleRewardModelConfig
from hfgen_plugins.trainers.reward_ensemble.scoring import (
    aggregate,
    preference_loss,
    score_penalty,
    stack_scores,
    standardize,
    variance,
)
from hfgen_plugins.trainers.reward_ensemble.trainer import sandbox_pairs

BACKENDS = ("separate", "lora", "heads")
GOLDEN = Path(__file__).parents[1] / "fixtures" / "reward_ensemble-1"
QUIET = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def tokenizer():
    return sandbox.load_tokenizer()


def adapters(backend):
    return {"adapter_r": 4} if backend == "lora" else {}


def config(folder, **options):
    small = {"num_members": 3, "max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no",
             "logging_steps": 1, "learning_rate": 1e-3, **adapters(options.get("backend"))}  # fmt: skip
    return EnsembleRewardConfig(str(folder), **{**QUIET, **small, **options})


def pairs(count=16, start=0, **columns):
    return Dataset.from_list([{**row, **columns} for row in sandbox_pairs(count, start)])


def trainer(folder, model=None, extra=None, data=None, **options):
    return EnsembleRewardTrainer(
        sandbox.load_model() if model is None else model,
        args=config(folder, **options),
        train_dataset=pairs() if data is None else data,
        processing_class=sandbox.load_tokenizer(),
        **(extra or {}),
    )


def ensemble(backend="separate", members=3, moved=True, **options):
    model = EnsembleRewardModel.from_base(
        sandbox.load_model(), num_members=members, backend=backend, **adapters(backend), **options
    )
    model.config.pad_token_id = sandbox.load_tokenizer().pad_token_id
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if moved and ("lora_B" in name or backend == "separate"):
            weight.data += 0.05 * torch.randn_like(weight)
    return model.eval()


def batch(side="right"):
    return sandbox.load_tokenizer()(["D17=", "Rabcdef=", "R"], return_tensors="pt", padding=True, padding_side=side)


# --- arithmetic ---------------------------------------------------------------------------------------------------

matrices = st.integers(1, 5).flatmap(
    lambda k: st.lists(st.lists(st.floats(-50, 50), min_size=k, max_size=k), min_size=1, max_size=4)
)


@given(matrices, st.floats(0, 2), st.booleans())
@settings(max_examples=60, deadline=None)
def test_aggregations_are_numpys(rows, weight, unbiased):
    scores, plain = torch.tensor(rows, dtype=torch.float64), np.array(rows)
    members = plain.shape[1]
    spread = plain.var(1, ddof=int(unbiased)) if members > 1 else np.zeros(len(plain))
    mean, lowest = plain.mean(1), plain.min(1)
    np.testing.assert_allclose(aggregate(scores, "mean"), mean, atol=1e-12)
    np.testing.assert_allclose(aggregate(scores, "wco"), lowest, atol=0)
    np.testing.assert_allclose(variance(scores, unbiased), spread, atol=1e-10)
    if members > 1:
        np.testing.assert_allclose(aggregate(scores, "uwo", weight, unbiased), mean - weight * spread, atol=1e-9)
        assert torch.equal(aggregate(scores, "uwo", 0.0), aggregate(scores, "mean"))
    assert bool((aggregate(scores, "wco") <= aggregate(scores, "mean") + 1e-12).all())


def test_losses_in_float64():
    chosen, rejected = np.array([[1.0, -2.0], [0.5, 3.0]]), np.array([[0.0, 1.0], [2.0, -1.0]])
    margin = np.array([[0.3], [0.0]])
    expected = np.log1p(np.exp(-(chosen - rejected - margin))).mean(0)
    got = preference_loss(*map(torch.from_numpy, (chosen, rejected, margin)))
    np.testing.assert_allclose(got, expected, rtol=1e-14)
    np.testing.assert_allclose(
        score_penalty(torch.from_numpy(chosen), torch.from_numpy(rejected)),
        [(1 + 0 + 0.25 + 4) / 4, (4 + 1 + 9 + 1) / 4],
    )


def test_one_member_with_the_lowest_offset_decides_an_unnormalised_minimum():
    scores = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores[:, 1] -= 20
    assert torch.equal(aggregate(scores, "wco"), scores[:, 1])
    level = standardize(scores, scores.mean(0), scores.std(0))
    assert 5 < int((level.argmin(1) == 1).sum()) < 30


@each_backend
def test_the_trainers_loss_is_that_of_stock_members(tmp_path, backend):
    """Float64: -log sigma(r+ - r- - m) + l2 (r+^2 + r-^2) / 2 + centring, of K stock models; value mean, gradient sum."""
    made = trainer(
        tmp_path, ensemble(backend).double(), data=pairs(margin=0.25), backend=backend, score_l2=0.1,
        center_rewards_coefficient=0.01,
    )  # fmt: skip
    made.model.train()
    rows = next(iter(made.get_train_dataloader()))
    loss = made.compute_loss(made.model, rows)
    expected = []
    for k in range(3):
        ids, mask = ((rows[n][k] if backend != "heads" else rows[n]) for n in ("input_ids", "attention_mask"))
        scores = made.model.member(k)(ids, attention_mask=mask).logits[:, 0].detach().numpy()
        good, bad = np.split(scores, 2)
        terms = np.log1p(np.exp(-(good - bad - 0.25))) + 0.05 * (good**2 + bad**2) + 0.01 * (good + bad) ** 2
        expected.append(terms.mean())
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(np.mean(expected), rel=1e-12)
    loss.backward()
    head = made.model.heads[1].weight
    step = torch.randn_like(head)
    with torch.no_grad():
        moved = []
        for sign in (1, -1):
            head += sign * 1e-5 * step
            moved.append(made.compute_loss(made.model, rows).item())
            head -= sign * 1e-5 * step
    slope = (moved[0] - moved[1]) / 2e-5 * (1 if backend == "heads" else 3)
    assert float((head.grad * step).sum()) == pytest.approx(slope, rel=1e-6)


def test_separate_members_are_what_stock_reward_trainers_make(tmp_path):
    """K = 2 with clipping that bites: each member ends where trl's RewardTrainer ends on that member's order."""
    options = {"max_steps": 3, "max_grad_norm": 0.05, "train_sampling_strategy": "sequential"}
    made = trainer(tmp_path, backend="separate", num_members=2, score_l2=0.0, **options)
    starts = [copy.deepcopy(made.model.member(k)) for k in range(2)]
    orders = made.train_dataset.orders
    assert orders[0].tolist() == list(range(16)) and sorted(orders[1].tolist()) == list(range(16))
    assert orders[1].tolist() != orders[0].tolist()
    made.train()
    for k, start in enumerate(starts):
        stock = RewardTrainer(
            start, train_dataset=pairs().select(orders[k].tolist()), processing_class=sandbox.load_tokenizer(),
            args=RewardConfig(str(tmp_path / "stock"), **QUIET, **options, per_device_train_batch_size=4,
                              learning_rate=1e-3, save_strategy="no"),
        )  # fmt: skip
        before = all_weights(stock)
        stock.train()
        alone, ours = all_weights(stock), torch.cat([p.flatten() for p in made.model.member(k).parameters()])
        assert float((alone - ours).norm() / (alone - before).norm()) < 1e-3
    assert not torch.equal(made.model.heads[0].weight, made.model.heads[1].weight)


@each_backend
def test_checkpointing_changes_no_gradient(tmp_path, backend):
    found = []
    for on in (False, True):
        made = trainer(tmp_path, ensemble(backend), backend=backend)
        made.model.train()
        if on:
            made.model.gradient_checkpointing_enable()
        rows = made.data_collator([made.train_dataset[i] for i in range(4)])
        made.compute_loss(made.model, rows).backward()
        found.append(torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None]))
    assert torch.allclose(*found, atol=1e-7) and float(found[0].norm()) > 0


@each_backend
def test_the_same_rows_make_the_same_step(backend):
    def build(folder, **options):
        torch.manual_seed(0)
        return trainer(folder, backend=backend, score_l2=0.1, **options)

    assert_same_step_however_cut(build)


@pytest.mark.parametrize("backend", ["separate", "heads"])
def test_a_resumed_run_ends_bit_equal(tmp_path, backend):
    options = {"backend": backend, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer(tmp_path, **options)
    whole.train()
    again = trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4 and torch.equal(all_weights(whole), all_weights(again))


def test_a_second_ensemble_goes_on_with_the_first(tmp_path):
    first = ensemble("lora")
    made = trainer(tmp_path, first, backend="lora", aggregation="wco", normalize=False)
    assert made.ensemble is first and first.config.aggregation == "wco"
    with pytest.raises(ValueError, match="model is an ensemble with num_members 3; give args of the same"):
        trainer(tmp_path, first, backend="lora", num_members=2)


# --- rows ---------------------------------------------------------------------------------------------------------


def test_flips_follow_from_content():
    data = Dataset.from_list([{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(200)])
    flipped = flip_labels(data, 0.25, seed=3)
    at = [a["chosen"] != b["chosen"] for a, b in zip(data, flipped, strict=True)]
    assert 30 < sum(at) < 70
    for old, new, f in zip(data, flipped, at, strict=True):
        assert (new["chosen"], new["rejected"]) == (
            (old["rejected"], old["chosen"]) if f else (old["chosen"], old["rejected"])
        )
    order = np.random.default_rng(0).permutation(200).tolist()
    assert flip_labels(data.select(order), 0.25, seed=3).to_list() == flipped.select(order).to_list()
    assert flip_labels(data, 0.25, seed=4).to_list() != flipped.to_list()
    assert flip_labels(data, 0.0) is data and flip_labels(data, 1.0)["chosen"] == data["rejected"]


def test_all_members_see_the_same_flips(tmp_path):
    made = trainer(tmp_path, label_noise=0.5)
    seen = [{json.dumps(made.train_dataset[i]["members"][k]["chosen_ids"]) for i in range(16)} for k in range(3)]
    clean = {
        json.dumps(made.processing_class(r["prompt"] + r["chosen"] + made.processing_class.eos_token)["input_ids"])
        for r in pairs()
    }
    assert seen[0] == seen[1] == seen[2] and 0 < len(seen[0] & clean) < 16


def test_batches_of_orders():
    data = Dataset.from_list(
        [{"chosen_ids": [i] * (i + 1), "rejected_ids": [i + 10], "margin": float(i)} for i in range(4)]
    )
    orders = MemberOrders(data, 3, seed=0)
    assert orders.orders.shape == (3, 4) and all(sorted(o) == [0, 1, 2, 3] for o in orders.orders.tolist())
    made = EnsembleCollator(pad_token_id=99)([orders[1], orders[3]])
    ids = made["input_ids"]
    assert ids.shape == (3, 4, 4) and made["margin"].shape == (2, 3)
    for k, order in enumerate(orders.orders.tolist()):
        for p, row in enumerate((order[1], order[3])):
            assert [t for t in ids[k, p].tolist() if t != 99] == [row] * (row + 1)
            assert [t for t in ids[k, 2 + p].tolist() if t != 99] == [row + 10]
            assert made["margin"][p, k] == row
    assert torch.equal(made["attention_mask"] == 1, ids != 99)
    drawn = MemberOrders(data, 3, seed=0, bootstrap=True).orders
    assert any(len(set(o)) < 4 for o in drawn.tolist())


# --- the model ----------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("side", ["left", "right"])
def test_members_are_stock_models_and_survive_a_folder(tmp_path, backend, side):
    model, rows = ensemble(backend), batch("right")
    if side == "left":  # position ids make up for the padding
        rows = batch("left")
        rows["position_ids"] = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if backend == "lora":
            rows["position_ids"] = rows["position_ids"].repeat(3, 1)
    with torch.no_grad():
        out = model(**rows)
        for k in range(3):
            stock = model.member(k)
            assert isinstance(stock, LlamaForSequenceClassification)
            assert torch.allclose(stock(**batch()).logits[:, 0], out.member_logits[:, k], atol=1e-5)
    assert out.logits.shape == (3, 1) and out.member_logits.shape == (3, 3) and out.variance.shape == (3,)
    assert torch.allclose(out.variance, out.member_logits.var(1, correction=0))
    assert len({round(v, 4) for v in out.member_logits[0].tolist()}) == 3
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert all(n.endswith((".safetensors", ".json")) for n in names) and len(names) > 3
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(again, EnsembleRewardModel)
    with torch.no_grad():
        assert torch.allclose(again(**rows).member_logits, out.member_logits, atol=1e-6)
        model.member(1).save_pretrained(tmp_path / "one")
        one = LlamaForSequenceClassification.from_pretrained(tmp_path / "one")
        assert torch.allclose(one(**batch()).logits[:, 0], out.member_logits[:, 1], atol=1e-5)


def test_streamed_members_are_read_one_at_a_time(tmp_path, monkeypatch):
    model, rows = ensemble("separate"), batch()
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    folders = [tmp_path / f"member-{k}" for k in range(3)]
    for k, folder in enumerate(folders):
        model.member(k).save_pretrained(folder)
    alive, most, before = weakref.WeakSet(), [], modeling._last_hidden

    def watched(backbone, *args, **kwargs):
        alive.add(backbone)
        most.append(len(alive))
        return before(backbone, *args, **kwargs)

    monkeypatch.setattr(modeling, "_last_hidden", watched)
    for streamed in (
        EnsembleRewardModel.load_streamed(tmp_path),
        EnsembleRewardModel.from_members(folders, streamed=True),
    ):
        assert not list(streamed.parameters())
        with torch.no_grad():
            assert torch.allclose(streamed(**rows).member_logits, model(**rows).member_logits, atol=1e-6)
            most.clear()
            alive.clear()
            assert streamed.member_scores([rows, rows, rows]).shape == (9, 3)
        assert len(most) == 9 and max(most) == 1
        with pytest.raises(ValueError, match="a streamed ensemble holds no weights to save"):
            streamed.save_pretrained(tmp_path / "x")
    whole = EnsembleRewardModel.from_members(folders)
    with torch.no_grad():
        assert torch.allclose(whole(**rows).member_logits, model(**rows).member_logits, atol=1e-6)


def test_no_vocabulary_logits_and_k_forwards_at_most():
    for backend, passes in (("separate", 3), ("lora", 1), ("heads", 1)):
        model, calls = ensemble(backend), []
        for b in model.backbones:
            b.register_forward_hook(
                lambda module, args, out, calls=calls: calls.append(tuple(out.last_hidden_state.shape))
            )
        model(**batch())
        assert len(calls) == passes and all(shape[-1] == 64 for shape in calls)


def test_weights_of_five_members_at_a_real_width():
    """Counted on the meta device: heads <= 1.3x, lora (r = 8, all linear layers) <= 1.2x one reward model."""
    base = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000
    )
    with torch.device("meta"):
        one = sum(p.numel() for p in LlamaForSequenceClassification(base).parameters())
        sizes = {
            b: sum(p.numel() for p in EnsembleRewardModel(EnsembleRewardModelConfig(base, 5, b)).parameters())
            for b in BACKENDS
        }
    assert sizes["heads"] / one < 1.001 and sizes["lora"] / one < 1.2
    assert sizes["separate"] == pytest.approx(5 * one, rel=0.01)


def test_calibration_and_what_is_refused_without(tmp_path):
    model = ensemble("separate")
    for how in ("wco", "uwo"):
        with pytest.raises(
            ValueError, match=f"aggregation '{how}' compares members, and this ensemble has no calibration"
        ):
            model.combine(torch.zeros(2, 3), how)
    scores = 4 * torch.randn(40, 3) + torch.tensor([0.0, -20.0, 3.0])
    model.calibrate(scores)
    plain = scores.double().numpy()
    np.testing.assert_allclose(model.config.calibration_mean, plain.mean(0), rtol=1e-6)
    np.testing.assert_allclose(model.config.calibration_std, plain.std(0, ddof=1), rtol=1e-6)
    level = (plain - plain.mean(0)) / plain.std(0, ddof=1)
    reward, spread = model.combine(scores.double(), "uwo", 0.7)
    np.testing.assert_allclose(reward, level.mean(1) - 0.7 * level.var(1), atol=1e-6)
    np.testing.assert_allclose(spread, level.var(1), atol=1e-6)
    np.testing.assert_allclose(model.combine(scores.double(), "wco")[0], level.min(1), atol=1e-6)
    model.save_pretrained(tmp_path)
    again = EnsembleRewardModel.from_pretrained(tmp_path, aggregation="wco")
    assert again.config.calibration_mean == model.config.calibration_mean
    with torch.no_grad():
        out = again(**batch())
    assert torch.allclose(out.logits[:, 0], again.combine(out.member_logits, "wco")[0])
    raw = EnsembleRewardModel.from_pretrained(tmp_path, normalize=False, aggregation="wco")
    assert torch.equal(raw.combine(scores)[0], scores.amin(1))


@each_backend
def test_training_ends_calibrated_and_saved(tmp_path, backend, tokenizer):
    held_out = pairs(9, start=40)
    made = trainer(
        tmp_path, backend=backend, aggregation="uwo", extra={"calibration_dataset": held_out, "eval_dataset": held_out},
        max_steps=4,
    )  # fmt: skip
    made.train()
    measured = made.evaluate()
    assert measured["eval_ensemble/std"] > 0 and 0 <= measured["eval_ensemble/accuracy"] <= 1
    logged = [row for row in made.state.log_history if "ensemble/score_l2" in row]
    assert len(logged) == 4 and logged[0]["loss"] == pytest.approx(
        logged[0]["ensemble/preference_loss"] + 1e-3 * logged[0]["ensemble/score_l2"], rel=1e-4
    )
    made.save_model()
    made.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "## Reward ensemble" in card and f"backend `{backend}`" in card and "2310.02743" in card
    assert ("disagree less" in card) == (backend == "heads")
    reward = EnsembleReward(tmp_path)
    texts = [(r["prompt"], r[c]) for c in ("chosen", "rejected") for r in held_out]
    scores = reward.member_scores(*map(list, zip(*texts, strict=True)))
    np.testing.assert_allclose(made.ensemble.config.calibration_mean, scores.double().mean(0), atol=1e-5)
    np.testing.assert_allclose(made.ensemble.config.calibration_std, scores.double().std(0), rtol=1e-4)


# --- as a reward --------------------------------------------------------------------------------------------------


def saved(tmp_path, tokenizer, **options):
    model = ensemble("heads", **options)
    model.calibrate(torch.randn(20, 3))
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


@pytest.mark.parametrize(("cls", "args"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_a_step_of_rl(tmp_path, tokenizer, cls, args):
    reward = EnsembleReward(saved(tmp_path, tokenizer), aggregation="wco", batch_size=3)
    made = cls(
        sandbox.load_model(), reward_funcs=reward, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [f"D{i:02d}=" for i in range(8)]}),
        args=args(str(tmp_path / "rl"), **QUIET, max_steps=2, per_device_train_batch_size=4, num_generations=4,
                  max_completion_length=8, logging_steps=1, save_strategy="no"),
    )  # fmt: skip
    made.train()
    row = made.state.log_history[0]
    assert row["rewards/ensemble_reward/mean"] == pytest.approx(row["reward"])
    assert row["ensemble_reward/std"] > 0 and row["ensemble_reward/undefined"] == 0
    assert not any(p.requires_grad for p in reward.model.parameters()) and not reward.model.training
    assert "ensemble_reward_std" in made._logs["extra"]


def test_texts_are_read_as_in_training(tmp_path, tokenizer):
    reward = EnsembleReward(ensemble("separate"), tokenizer, batch_size=2)
    made = trainer(tmp_path, backend="heads")
    for text, ids in zip(pairs(), made.train_dataset, strict=True):
        assert reward.encode(text["prompt"], text["chosen"]) == ids["chosen_ids"]
    prompts, answers = ["D17=", "Rabc=", "D05="], ["7+9+1", "cba" + tokenizer.eos_token, "5"]
    got = reward(prompts, answers)
    for p, a, r in zip(prompts, answers, got, strict=True):  # one by one, without padding, by the stock members
        ids = torch.tensor([reward.encode(p, a)])
        with torch.no_grad():
            alone = np.mean([reward.model.member(k)(ids).logits.item() for k in range(3)])
        assert r == pytest.approx(alone, abs=1e-5)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ eos_token }}"
    chat = reward(
        [[{"role": "user", "content": p}] for p in prompts],
        [[{"role": "assistant", "content": a}] for a in ("7+9+1", "cba", "5")],
    )
    assert len(chat) == 3


def test_rewards_that_are_not_finite(tokenizer, monkeypatch):
    reward, logged = EnsembleReward(ensemble("heads"), tokenizer), {}
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, float("nan"), 2.0]])
    monkeypatch.setattr(reward, "member_scores", lambda *_: scores)
    assert reward(["a", "b"], ["c", "d"], log_metric=logged.__setitem__, trainer_state=None) == [2.0, None]
    assert logged["ensemble_reward/undefined"] == 0.5 and logged["ensemble_reward/member_mean"] == 2.0
    scores[0] = float("nan")
    with pytest.raises(ValueError, match="no finite reward for any of 2 completions"):
        reward(["a", "b"], ["c", "d"])


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_members": 0}, ValueError, "num_members is 0"),
        ({"num_members": 2.5}, TypeError, "num_members is 2.5"),
        ({"backend": "head"}, ValueError, "backend is 'head'; did you mean 'heads'"),
        ({"aggregation": "min"}, ValueError, "aggregation is 'min'"),
        ({"aggregation": "uwo", "num_members": 1}, ValueError, "'uwo' with num_members 1, which has no variance"),
        ({"uwo_lambda": -1.0}, ValueError, "uwo_lambda is -1.0"),
        ({"label_noise": 1.5}, ValueError, "label_noise is 1.5"),
        ({"label_noise": -0.1}, ValueError, "label_noise is -0.1"),
        ({"score_l2": "x"}, TypeError, "score_l2 is 'x'"),
        ({"packing": True}, ValueError, "packing is True; a reward is read at the end of each answer"),
        ({"bootstrap": True, "backend": "heads"}, ValueError, "bootstrap is true with backend 'heads'"),
        ({"adapter_targets": 3, "backend": "lora"}, TypeError, "adapter_targets is 3"),
        ({"adapter_targets": ["q_proj"]}, ValueError, "with backend 'separate', which has no adapters"),
        ({"normalize": "no"}, TypeError, "normalize is 'no'"),
    ],
)
def test_wrong_settings(tmp_path, options, error, message):
    with pytest.raises(error, match=message) as caught:
        config(tmp_path, **options)
    assert "hfgen" in str(caught.traceback[-1].path)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"data": Dataset.from_dict({"text": ["a"]})}, ValueError, r"has the columns \['text'\]; give chosen and rejected"),
        ({"data": pairs(4, seq_lengths=[3, 4])}, ValueError, "has the column seq_lengths, as packed rows have"),
        ({"data": pairs(0)}, ValueError, "train_dataset is empty"),
        ({"data": pairs(4).to_iterable_dataset()}, TypeError, "train_dataset is IterableDataset"),
        ({"max_length": 2}, ValueError, r"every pair is longer than max_length \(2\)"),
        ({"aggregation": "wco"}, ValueError, "must be standardised first; give calibration_dataset"),
        ({"extra": {"eval_dataset": [1]}}, TypeError, "eval_dataset is list"),
        ({"extra": {"peft_config": LoraConfig()}}, ValueError, "adapters for every member are args.backend='lora'"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model is Linear"),
        ({"model": get_peft_model(sandbox.load_model(), LoraConfig())}, ValueError, "a PeftModel"),
        ({"backend": "lora", "adapter_targets": ["query"]}, ValueError, r"adapter_targets is \['query'\]"),
    ],
)  # fmt: skip
def test_wrong_input(tmp_path, given, error, message):
    with pytest.raises(error, match=message) as caught:
        trainer(tmp_path, **given)
    assert "hfgen" in str(caught.traceback[-1].path)


def test_wrong_args_and_tokenizers(tmp_path, tokenizer):
    with pytest.raises(TypeError, match="args is RewardConfig; pass an EnsembleRewardConfig"):
        EnsembleRewardTrainer(sandbox.load_model(), args=RewardConfig(str(tmp_path), **QUIET), train_dataset=pairs(4))
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="set tokenizer.pad_token to another token"):
        EnsembleRewardTrainer(
            sandbox.load_model(), args=config(tmp_path), train_dataset=pairs(4), processing_class=tokenizer
        )
    with pytest.raises(ValueError, match="set pad_token to another token, as in training"):
        EnsembleReward(ensemble("heads"), tokenizer)


def test_members_that_do_not_fit(tmp_path, tokenizer):
    model = ensemble("separate")
    folders = [tmp_path / "a", tmp_path / "b"]
    for k, folder in enumerate(folders):
        model.member(k).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    assert EnsembleRewardModel.from_members(folders).config.num_members == 2
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folders[1])
    for streamed in (False, True):
        with pytest.raises(ValueError, match="have different vocabularies; they must read the same tokens"):
            EnsembleRewardModel.from_members(folders, streamed=streamed)
    small = LlamaForSequenceClassification(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=50,
            num_labels=1,
        )
    )
    with pytest.raises(ValueError, match="has vocab_size 50, member .* give members of one architecture"):
        EnsembleRewardModel.from_members([model.member(0), small])
    for members, error, message in (
        ([], ValueError, "members is empty"),
        ([sandbox.load_model()], TypeError, "a member is LlamaForCausalLM"),
    ):
        with pytest.raises(error, match=message):
            EnsembleRewardModel.from_members(members)
    with pytest.raises(TypeError, match="streamed members are loaded when they score"):
        EnsembleRewardModel.from_members([model.member(0)], streamed=True)


def test_wrong_calls_of_model_and_reward(tmp_path, tokenizer):
    model = ensemble("separate")
    three = torch.zeros(3, 2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="members on different answers have no common reward"):
        model(three)
    with pytest.raises(ValueError, match="every member must score the same answers"):
        stack_scores([torch.zeros(3), torch.zeros(2)])
    with pytest.raises(ValueError, match="share one pass"):
        ensemble("heads")(three, aggregate=False)
    with pytest.raises(ValueError, match="uwo of 1 member has no variance"):
        aggregate(torch.zeros(2, 1), "uwo")
    for scores in (torch.zeros(3), torch.zeros(1, 3), torch.zeros(4, 2)):
        with pytest.raises(ValueError, match="calibration scores have the shape"):
            model.calibrate(scores)
    with pytest.raises(ValueError, match="member 0 gives scores with standard deviation 0.0"):
        model.calibrate(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="member is 3; give 0 to 2"):
        model.member(3)
    with pytest.raises(ValueError, match="ensemble_format is 9, this hfgen reads 1; upgrade"):
        EnsembleRewardModelConfig(AutoConfig.from_pretrained(sandbox.path()), ensemble_format=9)
    ensemble("heads").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="backend is 'heads', whose members share one backbone"):
        EnsembleRewardModel.load_streamed(tmp_path)
    reward = EnsembleReward(model, tokenizer)
    with pytest.raises(ValueError, match="there are 2 prompts and 1 completions"):
        reward(["a", "b"], ["c"])
    with pytest.raises(TypeError, match="a prompt is str and its completion list"):
        reward(["a"], [[]])
    for wrong, error, message in (
        ({"aggregation": "wco"}, ValueError, "has no calibration"),
        ({"aggregation": "best"}, ValueError, "aggregation is 'best'"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"name": ""}, TypeError, "name is ''"),
        ({"streamed": True}, ValueError, "the model is loaded already"),
    ):
        with pytest.raises(error, match=message):
            EnsembleReward(model, tokenizer, **wrong)
    with pytest.raises(ValueError, match="processing_class is missing"):
        EnsembleReward(model)
    with pytest.raises(TypeError, match="model is LlamaForCausalLM"):
        EnsembleReward(
            LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
                )
            ),
            tokenizer,
        )


# --- evidence -----------------------------------------------------------------------------------------------------


def test_the_picture_in_the_readme_is_the_ledgers():
    ledger = json.loads((plot.HERE / "ledger.json").read_text())
    assert (plot.HERE / "curves.svg").read_text() == plot.draw(ledger)
    means = {arm["id"]: arm["metrics"]["final"]["mean"] for arm in ledger["arms"]}
    assert means["single"] < 0 and all(
        1.8 <= round(means[name] - means["single"], 1) <= 2.3 for name in evidence.JUDGED
    )


@pytest.fixture(scope="module")
def small():
    return dataclasses.replace(evidence.SETTINGS, members=3, epochs=8, pairs=400, answers=2048, prompts=1)


@pytest.mark.slow
def test_heads_disagree_less_off_the_distribution_than_separate_models(small, monkeypatch):
    monkeypatch.setattr(evidence, "NS", (1, 16))
    for seed in (100, 101):
        arms = ("wco", "wco_one_start", "wco_heads")
        found = {arm: evidence.run_arm(arm, seed, small, None)["variance_odd"] for arm in arms}
        assert found["wco_heads"] < found["wco_one_start"] < found["wco"], found


def test_the_verdict_needs_a_single_model_that_falls():
    def samples(**falls):
        return {
            arm: {"fall": [fall + 0.1 * s for s in range(5)], "final": [1 - fall + 0.1 * s for s in range(5)]}
            for arm, fall in falls.items()
        }

    verdicts = evidence.judge(samples(single=1.0, mean=0.1, wco=0.1, uwo=2.0), evidence.SETTINGS)
    assert [v.verdict for v in verdicts] == ["reproduced", "reproduced", "not reproduced"]
    assert {v.verdict for v in evidence.judge(samples(single=-1.0, mean=0.1, wco=0.1, uwo=0.1), evidence.SETTINGS)} == {
        "void"
    }


# --- a folder of every released format ----------------------------------------------------------------------------


@each_backend
def test_format_1_gives_what_it_gave(backend):
    folder = GOLDEN / backend
    want = json.loads((folder / "golden.json").read_text())
    with torch.no_grad():
        out = EnsembleRewardModel.from_pretrained(folder)(torch.arange(3, 11)[None])
    assert out.logits.item() == pytest.approx(want["logits"], abs=1e-5)
    assert out.member_logits[0].tolist() == pytest.approx(want["member_logits"], abs=1e-5)
    assert out.variance.item() == pytest.approx(want["variance"], abs=1e-5)
