"""RL on one reward model and on five as an experiment: what is optimised and measured, and what was chosen how."""

import dataclasses
import json

import pytest
import torch

from hfgen.evidence import find_experiment
from hfgen.evidence.tuning import at_edge
from hfgen_plugins.trainers.reward_ensemble import evidence
from hfgen_plugins.trainers.reward_ensemble import evidence_grpo as rl

SEED = 1000  # never reported
SMOKE = rl.EXPERIMENT.smoke_settings


@pytest.fixture(scope="module")
def made():
    return rl._made(SEED, SMOKE.world)


def answers(made, count=64):
    ids, _ = rl._sample(made.base, made.tokenizer, count, 7)
    return ids, made.tokenizer.batch_decode(ids)


def test_every_arm_runs(made):
    found = {a.id: rl.run_arm(a.id, SEED, SMOKE, lambda *_: None) for a in rl.ARMS}
    assert all(set(r) == {m.key for m in rl.METRICS} for r in found.values())
    base = found.pop("base")
    assert (base["kl"], base["gain"], base["fall"], base["gold"]) == (0, 0, 0, base["peak"])
    assert all(r["kl"] > 0 and r["peak"] >= r["gold"] for r in found.values())
    assert len({r["accuracy"] for r in found.values()}) == 1  # the same members
    assert len({r["gold"] for r in found.values()}) == len(found)  # and six policies


@pytest.mark.parametrize("arm", ["grpo_single", "rloo_wco"])
def test_the_policy_learns_what_is_rewarded(made, arm):
    settings = dataclasses.replace(SMOKE, steps=25, rates={arm: 1e-2}, betas={arm: 0.0}, answers=256)
    found = rl.run_arm(arm, SEED, settings, lambda *_: None)
    assert found["gain"] > 0.5 and found["kl"] > 1


def test_rewards_are_of_the_same_members(made):
    _, texts = answers(made)
    prompts = [rl.PROMPT] * len(texts)
    raw = made.reward("mean").member_scores(prompts, texts)
    config = made.ensemble.config
    level = (raw - torch.tensor(config.calibration_mean)) / torch.tensor(config.calibration_std)
    for how, expected in (("single", level[:, 0]), ("mean", level.mean(1)), ("wco", level.min(1).values)):
        assert made.reward(how)(prompts, texts) == pytest.approx(expected.tolist(), abs=1e-5)
    backbones = made.ensemble.backbones
    assert len(backbones) == 5 and not torch.equal(backbones[0].embed.weight, backbones[1].embed.weight)
    rare, common = (backbones[1].embed.weight[s].std() for s in (slice(24, 424), slice(24)))
    assert rare > 2.5 * common  # the outliers of the design


def test_tokens_are_read_as_they_were_written(made):
    ids, texts = answers(made)
    reward, (ask, eos) = made.reward("mean"), ("?", made.tokenizer.eos_token)
    ends = made.tokenizer.convert_tokens_to_ids([ask, eos])
    assert ids.shape == (64, 8) and int(ids.max()) < rl.TOKENS == 424
    assert [reward.encode(rl.PROMPT, t) for t in texts] == [[ends[0], *row, ends[1]] for row in ids.tolist()]


def test_kl_is_that_of_the_sampled_answers(made):
    """Against stock transformers: the sum of log p - log p of the base over the answers' tokens."""
    other = type(made.base)(made.base.config).eval()
    ids, kl = rl._sample(other, made.tokenizer, 32, 3, made.base)
    whole = torch.cat([torch.tensor(made.tokenizer(rl.PROMPT)["input_ids"]).repeat(32, 1), ids], 1)
    with torch.no_grad():
        logs = [
            m(whole).logits[:, :-1, : rl.TOKENS].double().log_softmax(-1).gather(2, ids[..., None]).sum((1, 2))
            for m in (other, made.base)
        ]
    assert kl == pytest.approx(float((logs[0] - logs[1]).mean()), rel=1e-9) and kl > 0
    again, none = rl._sample(made.base, made.tokenizer, 32, 3, made.base)
    assert none == 0 and not again.equal(ids) and rl._sample(made.base, made.tokenizer, 32, 3)[0].equal(again)


def test_the_policy_starts_as_the_design_draws_answers():
    """Common tokens alike, 3 % rare ones: what the members are trained on is what the design means."""
    tokenizer, world = rl._tokenizer(), rl.SETTINGS.world
    policy = rl._policy(SEED, torch.Generator().manual_seed(SEED), world, tokenizer)
    ids, _ = rl._sample(policy, tokenizer, 4096, 1)
    assert float((ids >= rl.COMMON).double().mean()) == pytest.approx(world.design.rare_mass, abs=0.012)
    share = torch.bincount(ids[ids < rl.COMMON], minlength=rl.COMMON).double()
    assert share.max() < 2.5 * share.min()


def samples(**arms):
    """3 seeds of (gold, fall, gain); arms not given are as the one reward model's."""
    return {
        arm.id: {
            key: [value + 0.01 * seed for seed in range(3)]
            for key, value in zip(("gold", "fall", "gain"), arms.get(arm.id, (1.0, 0.5, 2.0)), strict=True)
        }
        for arm in rl.ARMS
    }


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (samples(), ["reproduced"] * 4),
        (
            samples(grpo_mean=(0.9, 0.6, 2.0), grpo_wco=(1.1, 0.6, 2.0)),
            ["not reproduced", "partly", *["reproduced"] * 2],
        ),
        (samples(rloo_wco=(0.9, 0.4, 2.0)), [*["reproduced"] * 3, "partly"]),
        (samples(rloo_single=(1.0, 0.5, -0.01)), [*["reproduced"] * 2, "void", "void"]),
    ],
)
def test_verdicts(found, expected):
    verdicts = rl.judge(found, rl.SETTINGS)
    assert [v.arm for v in verdicts] == ["grpo_mean", "grpo_wco", "rloo_mean", "rloo_wco"]
    assert [v.verdict for v in verdicts] == expected


def test_rates_and_weights_are_what_the_tuning_chose():
    """From the committed table, by the stated rule, on seeds apart, with equal tries and no rate at the grid's edge."""
    table = json.loads(rl.TUNING_FILE.read_text())
    assert rl.table(table["runs"], table["runs_betas"]) == table
    assert (rl.SETTINGS.rates, rl.SETTINGS.betas) == (table["chosen"], table["chosen_betas"])
    assert at_edge(table["chosen"], rl.RATES) == [] and rl.BETAS[-1] not in table["chosen_betas"].values()
    for arm in rl.RUNS:
        rates, betas = ([r for r in table[key] if r["arm"] == arm] for key in ("runs", "runs_betas"))
        assert {(r["rate"], r["seed"]) for r in rates} == {(g, s) for g in rl.RATES for s in (100, 101)}
        assert {(r["rate"], r["seed"]) for r in betas} == {(g, s) for g in rl.BETAS[1:] for s in (100, 101)}
        assert len(rates) + len(betas) == rl.EXPERIMENT.tries


def test_claim_is_on_the_card():
    assert find_experiment("reward_ensemble", "grpo") is rl.EXPERIMENT
    assert find_experiment("reward_ensemble") is evidence.EXPERIMENT
    assert rl.SETTINGS.world.design == evidence.SETTINGS  # the design is taken over as it is
