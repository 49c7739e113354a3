"""evopress: the search itself without a model, what it measures, and bits, depth and sparsity on tiny models."""

import dataclasses
import itertools
import json
import logging
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hfgen.kit.levels import Levels, shared_copy
from hfgen.quantizers import AdaQuantConfig, EasyQuantConfig, NupesConfig
from hfgen.searches import (
    Schedule,
    additive_bits,
    drop_layers,
    evopress,
    evopress_depth,
    evopress_sparsity,
    prune_layers,
)
from hfgen_plugins.searches.evopress import evidence, evolution
from hfgen_plugins.searches.evopress.evolution import evolve, offspring
from hfgen_plugins.searches.evopress.fitness import Fitness
from hfgen_plugins.searches.evopress.problems import Depth, Sparsity, bits_space, ranks

RTN = {"n_sigma": None, "optimizer": "none"}
SMALL = {"generations": 3, "offspring": 6, "survivors": (2, 1), "tokens": (40, 100)}
LLAMA = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def tiny(blocks=6, cls=LlamaForCausalLM, config=LlamaConfig, seed=0, **more):
    """A random model whose blocks matter."""
    torch.manual_seed(seed)
    return cls(config(**LLAMA, num_hidden_layers=blocks, initializer_range=0.15, **more)).eval()


def sequences(count=12, length=9, seed=0, vocabulary=40):
    rng = random.Random(seed)
    return [{"input_ids": [rng.randrange(vocabulary) for _ in range(length)]} for _ in range(count)]


# --- the search, without a model ----------------------------------------------------------------------------------------


def separable(n, seed):
    """Costs c_i with fitness sum c_i 4^-b_i."""
    rng = random.Random(seed)
    c = [10 ** rng.uniform(-2, 2) for _ in range(n)]
    return c, lambda states, tokens, name: [value(c, s) for s in states]


def value(c, state):
    return math.fsum(ci * 4.0**-b for ci, b in zip(c, state, strict=True))


def best_by_dp(c, sizes, menu, budget):
    """The least fitness within the budget, by dynamic programming over what is spent."""
    best = {0: 0.0}
    for ci, size in zip(c, sizes, strict=True):
        new = {}
        for spent, cost in best.items():
            for b in menu:
                at = spent + size * b
                if at <= budget:
                    new[at] = min(new.get(at, math.inf), cost + ci * 4.0**-b)
        best = new
    return min(best.values())


@pytest.mark.parametrize("average", [3, 3.5])
@pytest.mark.parametrize("seed", range(3))
def test_the_search_comes_within_two_percent_of_the_optimum(seed, average):
    c, score = separable(40, seed)
    space = bits_space({str(i): 7 for i in range(40)}, (2, 3, 4, 5, 6), average)
    run = evolve(space, score, evolution.PRESETS["quantization"], seed=seed)
    best = best_by_dp(c, [7] * 40, (2, 3, 4, 5, 6), int(average * 280))
    assert space.cost(run.state, range(40)) == average * 280
    assert best * (1 - 1e-12) <= value(c, run.state) <= 1.02 * best < value(c, run.start)
    first = 0 if average == 3 else 64 * 2048  # no uniform state to start from
    assert run.tokens == first + 150 * (128 * 2048 + 16 * 16384 + 5 * 131072)  # the card's 1.8e8


def test_layers_of_different_sizes_trade_under_the_rule_none():
    c, score = separable(20, 5)
    sizes = [1 + i % 4 for i in range(20)]
    space = bits_space(dict(enumerate(sizes)), (2, 3, 4, 5, 6), 3, "none")
    run = evolve(space, score, Schedule(200, 32, (4, 1), (1, 1)), seed=0)
    best = best_by_dp(c, sizes, (2, 3, 4, 5, 6), 3 * sum(sizes))
    assert best * (1 - 1e-12) <= value(c, run.state) <= 1.02 * best
    by_size = evolve(bits_space(dict(enumerate(sizes)), (2, 3, 4, 5, 6), 3), score, Schedule(200, 32, (4, 1), (1, 1)))
    assert value(c, run.state) < value(c, by_size.state)


menus = st.sampled_from([(2, 3, 4), (2, 3, 4, 5, 6), (2, 4, 8), (3, 4, 5, 6, 8)])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([16, 64, 96]), min_size=2, max_size=12),
    menu=menus,
    share=st.floats(0, 1),
    rule=st.sampled_from(["size", "none"]),
    seed=st.integers(0, 10**6),
)
def test_every_candidate_keeps_the_budget(sizes, menu, share, rule, seed):
    average = menu[0] + share * (menu[-1] - menu[0])
    space = bits_space({str(i): s for i, s in enumerate(sizes)}, menu, average, rule)
    rng, every = random.Random(seed), range(len(sizes))
    state = space.point(rng)
    assert space.fits(state)
    for _ in range(30):
        child = space.mutate(state, rng)
        if child is None:
            continue
        assert space.fits(child) and space.cost(child, every) <= average * sum(sizes) * (1 + 1e-9)
        steps = [menu.index(b) - menu.index(a) for a, b in zip(state, child, strict=True)]
        if rule == "size":
            assert space.cost(child, every) == space.cost(state, every) and sum(map(abs, steps)) <= 6
            for size in set(sizes):  # exactly, within every group
                group = [i for i in every if sizes[i] == size]
                assert space.cost(child, group) == space.cost(state, group)
        else:
            assert sum(map(abs, steps)) <= evolution.MOST_CHANGES
        state = child


def test_flips_are_the_lesser_of_two_draws():
    """min(U(1, 3), U(1, 3)): 1, 2, 3 flips with 5/9, 3/9, 1/9; seen by layers raised, of so many that none meet."""
    space, rng = bits_space({str(i): 1 for i in range(400)}, (2, 3, 4), 3), random.Random(0)
    parent = (3,) * 400
    raised = [sum(b > a for a, b in zip(parent, space.mutate(parent, rng), strict=True)) for _ in range(900)]
    shares = [raised.count(n) / 900 for n in (1, 2, 3)]
    assert shares == pytest.approx([5 / 9, 3 / 9, 1 / 9], abs=0.05) and sum(shares) == 1


def test_stages_measure_all_on_one_minibatch_and_the_parent_in_the_last_only():
    calls = []

    def score(states, tokens, name):
        calls.append((list(states), tokens, name))
        return [random.Random(f"{name} {s}").random() for s in states]  # noise: new for every minibatch

    space = bits_space({str(i): 1 for i in range(20)}, (2, 3, 4), 3)
    run = evolve(space, score, Schedule(6, 10, (4, 2, 1), (5, 50, 500)), seed=1)
    assert [(len(s), t) for s, t, _ in calls] == [(10, 5), (4, 50), (3, 500)] * 6
    assert len({name for *_, name in calls}) == 18
    parent = run.start
    for generation, row in enumerate(run.history):
        first, second, (last, _tokens, name) = calls[3 * generation : 3 * generation + 3]
        assert last[0] == parent and parent not in first[0] + second[0]
        assert len(set(first[0])) == 10 and set(last[1:]) <= set(second[0]) <= set(first[0])
        scores = {s: random.Random(f"{name} {s}").random() for s in last}
        winner = min(scores, key=scores.get)
        assert row == {
            "generation": generation + 1, "fitness": scores[winner], "parent": scores[parent],
            "accepted": winner != parent, "tokens": (generation + 1) * (50 + 200 + 1500),
        }  # fmt: skip
        parent = winner
    assert run.state == parent and run.tokens == 6 * 1750


def test_nan_loses_and_an_equal_child_does_not_replace_its_parent():
    space = bits_space({str(i): 1 for i in range(6)}, (2, 3, 4), 3)
    start = (3,) * 6
    for score in (lambda s, t, n: [1.0] * len(s), lambda s, t, n: [2.0 if x == start else math.nan for x in s]):
        run = evolve(space, score, Schedule(3, 4, (2, 1), (1, 1)))
        assert run.state == start and not any(row["accepted"] for row in run.history)


def test_an_average_that_is_no_level_starts_from_the_best_random_point():
    seen = []

    def score(states, tokens, name):
        seen.append((list(states), tokens, name))
        return [value(c, s) for s in states]

    c, _ = separable(10, 0)
    space = bits_space({str(i): 1 for i in range(10)}, (2, 4, 8), 3)
    assert space.uniform is None
    run = evolve(space, score, Schedule(0, 4, (1,), (9,), initially_generated=20, initial_tokens=7))
    ((points, tokens, _name),) = seen
    assert tokens == 7 and len(set(points)) == 20 and all(space.fits(p) for p in points)
    assert run.start == run.state == min(points, key=lambda p: value(c, p))


def test_the_search_ends_where_the_budget_has_one_state():
    space = bits_space({"a": 1, "b": 1}, (2, 3, 4), 4)
    run = evolve(space, lambda s, t, n: [0.0] * len(s), Schedule(5, 4, (1,), (1,)))
    assert (run.state, run.generation, run.stopped) == ((4, 4), 0, "no other state keeps the budget")
    assert offspring(space, (4, 4), 4, random.Random(0)) == []


def test_a_run_is_a_function_of_its_seed():
    _, score = separable(12, 1)
    space = bits_space({str(i): 1 for i in range(12)}, (2, 3, 4), 3)
    plan = Schedule(8, 4, (2, 1), (1, 1))
    a, b, other = (evolve(space, score, plan, seed=seed) for seed in (3, 3, 4))
    assert a == b and a.history != other.history


class Stop(Exception):
    pass


@pytest.mark.parametrize("average", [3, 3.4])
def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path, average):
    _, score = separable(12, 1)
    space, file = bits_space({str(i): 1 for i in range(12)}, (2, 3, 4), average), tmp_path / "run" / "state.json"
    plan, calls = Schedule(9, 6, (2, 1), (3, 5)), []

    def counted(states, tokens, name):
        calls.append(name)
        return score(states, tokens, name)

    def stop(run):
        if run.generation == 4:
            raise Stop

    whole = evolve(space, score, plan, seed=2)
    with pytest.raises(Stop):
        evolve(space, counted, plan, seed=2, file=file, identity={"rows": 1}, progress=stop)
    before = len(calls)
    assert evolve(space, counted, plan, seed=2, file=file, identity={"rows": 1}) == whole
    assert len(set(calls)) == len(calls) > before  # nothing is measured twice
    assert evolve(space, counted, plan, seed=2, file=file, identity={"rows": 1}) == whole  # a finished one is read

    for words, change in (
        ("differs in rows", {"identity": {"rows": 2}}),
        ("differs in seed", {"seed": 3}),
        ("differs in schedule", {"schedule": Schedule(10, 6, (2, 1), (3, 5))}),
    ):
        arguments = {"schedule": plan, "seed": 2, "identity": {"rows": 1}} | change
        with pytest.raises(ValueError, match=words):
            evolve(space, score, file=file, **arguments)
    data = json.loads(file.read_text())
    for words, text in (
        ("no state of a search", "{"),
        ("no state of a search", json.dumps({"format": 1})),
        ("has format 2", json.dumps(data | {"format": 2})),
        ("does not allow", json.dumps(data | {"run": data["run"] | {"state": [4] * 12}})),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            evolve(space, score, plan, seed=2, file=file, identity={"rows": 1})


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("survivors has 1 stages, tokens 2", (1, 1, (1,), (1, 1))),
        ("never grow and end with 1", (1, 4, (1, 2), (1, 1))),
        ("never grow and end with 1", (1, 4, (2,), (1,))),
        ("generations is -1", (-1, 4, (1,), (1,))),
        ("tokens is 0", (1, 4, (1,), (0,))),
    ],
)
def test_bad_schedules(words, arguments):
    with pytest.raises(ValueError, match=words):
        Schedule(*arguments)


@pytest.mark.parametrize(
    ("average", "words"), [(1.9, "levels allow 2 to 4"), (4.1, "levels allow 2 to 4"), (math.nan, "finite number")]
)
def test_infeasible_budgets(average, words):
    with pytest.raises(ValueError, match=words):
        bits_space({"a": 1}, (2, 3, 4), average)
    with pytest.raises(ValueError, match=r"group_rule is 'sizes'; did you mean 'size'"):
        bits_space({"a": 1}, (2, 3, 4), 3, "sizes")


# --- what is measured ---------------------------------------------------------------------------------------------------


def fitness(teacher, student, rows, **options):
    return Fitness(teacher, student, lambda plan: 0, [], rows, **options)


def mixed(seed=0):
    """Rows of several lengths."""
    rng = random.Random(seed)
    return [{"input_ids": [rng.randrange(40) for _ in range(rng.randint(1, 14))]} for _ in range(30)]


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.01, 1), name=st.text(max_size=5), seed=st.integers(0, 9))
def test_a_minibatch_has_exactly_so_many_tokens(share, name, seed):
    measure = fitness(MODEL, MODEL, mixed(seed), seed=seed)
    tokens = max(1, int(share * measure.tokens))
    rows = measure.minibatch(tokens, name)
    assert sum(map(len, rows)) == tokens
    whole = [list(map(int, r)) for r in measure.rows]
    assert all(list(map(int, row)) in whole for row in rows[:-1])
    again = measure.minibatch(tokens, name)
    assert len(rows) == len(again) and all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))


MODEL = tiny(1)


@pytest.mark.parametrize("at_once", [1, 20, 10**6])
@pytest.mark.parametrize("topk", [None, 5, 40])
def test_kl_is_the_divergence_of_what_is_predicted(at_once, topk):
    teacher, student = tiny(2, seed=1), tiny(2, seed=2)
    measure = fitness(teacher, student, mixed(), topk=topk)
    measure.at_once = at_once
    total, count = 0.0, 0
    with torch.no_grad():
        for row in measure.minibatch(120, "here"):
            p, q = (m(row[None]).logits[0, :-1].double() for m in (teacher, student))
            if topk is not None:
                kept = p.topk(topk).indices
                p, q = p.gather(-1, kept), q.gather(-1, kept)
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            total, count = total + float((p.exp() * (p - q)).sum()), count + len(row) - 1
    assert measure.of([{}], 120, "here") == pytest.approx([total / count], rel=1e-5)
    assert fitness(teacher, shared_copy(teacher), mixed()).of([{}], 120, "here") == [0.0]


def test_perplexity_is_that_of_the_next_tokens():
    model = tiny(2, seed=1)
    measure = fitness(model, model, mixed(), kind="perplexity")
    with torch.no_grad():
        losses = [model(r[None], labels=r[None]).loss * (len(r) - 1) for r in measure.minibatch(90, "x") if len(r) > 1]
    count = sum(len(r) - 1 for r in measure.minibatch(90, "x"))
    assert measure.of([{}], 90, "x") == pytest.approx([math.exp(sum(losses) / count)], rel=1e-5)


def test_masked_tokens_are_not_counted_and_bad_rows_are_named():
    padded = [{"input_ids": [1, 2, 3, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}]
    assert fitness(MODEL, MODEL, padded).tokens == 3
    for words, rows, options in (
        ("calibration row 0 has text", [{"text": "a"}], {}),
        ("fitness is 'kld'; did you mean 'kl'", sequences(), {"kind": "kld"}),
        ("kl_topk is 10, which only fitness='kl' reads", sequences(), {"kind": "perplexity", "topk": 10}),
    ):
        with pytest.raises(ValueError, match=words):
            fitness(MODEL, MODEL, rows, **options)
    with pytest.raises(ValueError, match="no row of the minibatch has two tokens"):
        fitness(MODEL, MODEL, [{"input_ids": [1]}] * 3).of([{}], 3, "x")


def test_too_few_tokens_are_named_before_anything_runs():
    model = tiny(1)
    levels = Levels.build(model, EasyQuantConfig(**RTN), (2, 3, 4))
    with pytest.raises(
        ValueError, match=r"hold 108 tokens .* a minibatch takes 131072; give more rows, or smaller tokens"
    ):
        evopress(model, levels, sequences(), 3)
    with pytest.raises(ValueError, match=r"hold 108 tokens .* a minibatch takes 2048"):
        evopress(model, levels, sequences(), 3.5, **SMALL | {"tokens": (10, 20)})
    assert levels.swaps == 0


# --- bits -----------------------------------------------------------------------------------------------------------


def test_bits_are_found_swapped_and_exported_and_the_model_stays_as_it_was(tmp_path):
    model = tiny(2)
    modules, before = list(model.modules()), {k: v.clone() for k, v in model.state_dict().items()}
    levels = Levels.build(model, EasyQuantConfig(**RTN), (2, 3, 4, 5, 6))
    seen = []
    found = evopress(model, levels, sequences(), 4, progress=lambda run, n: seen.append((run.generation, n)), **SMALL)
    assert seen == [(1, 3), (2, 3), (3, 3)] and len(found.history) == 3
    assert levels.average(found.plan) == 4 and found.uniform and set(found.start.values()) == {4}
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    json.dumps(found.to_dict())

    made = found.export(model)
    made.save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "plain")
    config = EasyQuantConfig(**RTN, bits_map=found.plan)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    wanted = made(ids).logits
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config),
    ):
        assert {n: loaded.get_submodule(n).config.bits for n in found.plan} == found.plan
        assert torch.equal(loaded(ids).logits, wanted)


@pytest.mark.parametrize("config_cls", [EasyQuantConfig, NupesConfig, AdaQuantConfig])
def test_every_quantizer_takes_the_map(config_cls, tmp_path):
    model = tiny(2)
    model.save_pretrained(tmp_path / "plain")
    levels = Levels.build(model, EasyQuantConfig(**RTN), (2, 3, 4, 5, 6))
    plan = evopress(model, levels, sequences(), 4, **SMALL | {"generations": 2}).plan
    assert len(set(plan.values())) > 1
    config = config_cls(bits_map=plan)
    if config.calibrated:
        loaded = config.calibrate(model, sequences())
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    assert {n: loaded.get_submodule(n).config.bits for n in plan} == plan
    loaded.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_only_layers_that_differ_between_candidates_are_swapped(monkeypatch):
    model = tiny(2)
    levels = Levels.build(model, EasyQuantConfig(**RTN), (2, 3, 4))
    plans, wanted = [], 0
    original = Levels.assign

    def watched(self, student, plan):
        plans.append(dict(plan))
        return original(self, student, plan)

    monkeypatch.setattr(Levels, "assign", watched)
    found = evopress(model, levels, sequences(), 3, **SMALL)
    wanted = len(plans[0]) + sum(sum(a[n] != b[n] for n in a) for a, b in itertools.pairwise(plans))
    assert found.swapped == levels.swaps == wanted
    assert wanted < 0.4 * len(plans) * len(plans[0])  # a reload of all would be len(plans) * layers


def test_an_interrupted_search_over_bits_ends_the_same(tmp_path):
    model = tiny(2)
    levels = Levels.build(model, EasyQuantConfig(**RTN), (2, 3, 4))

    def stop(run, generations):
        if run.generation == 2:
            raise Stop

    whole = evopress(model, levels, sequences(), 3, **SMALL)
    with pytest.raises(Stop):
        evopress(model, levels, sequences(), 3, folder=tmp_path, progress=stop, **SMALL)
    resumed = evopress(model, levels, sequences(), 3, folder=tmp_path, **SMALL)
    assert (resumed.plan, resumed.history, resumed.fitness) == (whole.plan, whole.history, whole.fitness)
    for words, change in (
        ("differs in rows", {"rows": sequences(seed=1)}),
        ("differs in fitness", {"fitness": "perplexity"}),
        ("differs in schedule, space", {"average_bits": 3.5, "initial_tokens": 50}),
        ("differs in levels", {"levels": Levels.build(model, EasyQuantConfig(), (2, 3, 4))}),
    ):
        arguments = {"levels": levels, "rows": sequences(), "average_bits": 3} | SMALL | change
        with pytest.raises(ValueError, match=words):
            evopress(model, folder=tmp_path, **arguments)


def test_wrong_options_are_named():
    model, levels = tiny(1), None
    levels = Levels.build(model, EasyQuantConfig(**RTN), (2, 3, 4))
    for error, words, options in (
        (TypeError, "unexpected keyword argument 'token'; did you mean 'tokens'", {"token": (1, 2)}),
        (ValueError, "preset is 'quantisation'; did you mean 'quantization'", {"preset": "quantisation"}),
        (TypeError, "seed is 1.5", {"seed": 1.5}),
        (TypeError, "kl_topk is '10'", {"kl_topk": "10"}),
    ):
        with pytest.raises(error, match=words):
            evopress(model, levels, sequences(), 3, **SMALL | options)
    with pytest.raises(ValueError, match="levels are of another model: model.layers.0.self_attn.q_proj differs"):
        evopress(tiny(1, seed=9), levels, sequences(), 3, **SMALL)


def test_on_a_planted_model_both_beat_uniform_four_times_over():
    """One block of two is sensitive: search and integer program at most a quarter of uniform's held-out KL."""
    cheap = dataclasses.replace(evidence.SETTINGS, tokens=(256, 1024), integer_tokens=512, examples=100)
    found = {arm: evidence._measure("planted", arm, 100, cheap) for arm in ("float", "uniform", "evopress", "integer")}
    assert found["float"]["kl"] == 0 and all(found[arm]["bits"] <= 4 for arm in ("uniform", "evopress", "integer"))
    assert found["evopress"]["kl"] <= 0.25 * found["uniform"]["kl"]
    assert found["integer"]["kl"] <= 0.25 * found["uniform"]["kl"]
    assert found["evopress"]["bits"] == 4 and cheap.generations <= 14


def test_the_integer_program_is_the_best_of_all_where_divergences_add_up():
    """Brute force over one-layer divergences of one block's seven layers."""
    model = tiny(1)
    levels, rows = Levels.build(model, EasyQuantConfig(**RTN), (2, 3, 4)), sequences()
    plan = additive_bits(model, levels, rows, 3, 100)
    measure = Fitness(
        model, student := shared_copy(model), lambda p: levels.assign(student, p), list(levels.sizes), rows
    )
    plain = dict.fromkeys(levels.sizes)
    costs = {(n, b): measure.of([plain | {n: b}], 100, "one at a time")[0] for n in plain for b in levels.bits}
    budget, best = 3 * sum(levels.sizes.values()), math.inf
    for bits in itertools.product(levels.bits, repeat=7):
        if sum(levels.sizes[n] * b for n, b in zip(plain, bits, strict=True)) <= budget:
            best = min(best, sum(costs[n, b] for n, b in zip(plain, bits, strict=True)))
    assert sum(costs[n, b] for n, b in plan.items()) == pytest.approx(best, rel=1e-9)


def test_the_verdicts_are_computed():
    def samples(evo, integer, plain=0.05):
        kl = {"uniform": (1.0, plain), "evopress": (evo, 0.04), "integer": (integer, 0.03), "float": (0, 0)}
        return {a: {"kl_planted": [p, 1.1 * p], "kl_plain": [q, q]} for a, (p, q) in kl.items()}

    def words(*given):
        return [v.verdict for v in evidence.judge(samples(*given), evidence.SETTINGS)]

    assert words(0.1, 0.2) == ["reproduced", "reproduced"] and words(0.1, 0.3) == ["reproduced", "not reproduced"]
    assert words(0.1, 0.2, 2.0) == ["void", "void"]


# --- depth --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_depth_found_is_that_of_brute_force(seed):
    model, rows = tiny(6, seed=seed), sequences(20, seed=seed)
    everything = {"survivors": (2, 1), "tokens": (180, 180)}  # each minibatch is all of the rows
    found = evopress_depth(model, rows, 2, seed=seed, initial_tokens=180, initially_generated=2, **everything)
    names = [f"model.layers.{i}" for i in range(6)]
    student = shared_copy(model)
    measure = Fitness(model, student, Depth(student).assign, names, rows)
    states = [tuple(int(i not in pair) for i in range(6)) for pair in itertools.combinations(range(6), 2)]
    scores = measure(states, 180, "all")
    best = states[scores.index(min(scores))]
    assert len(states) == 15 and found.plan == {n: bool(k) for n, k in zip(names, best, strict=True)}
    assert len(found.history) == math.ceil(2 * 4 / 1.5) and found.fitness["found"] == pytest.approx(
        min(scores), rel=1e-6
    )


@pytest.mark.parametrize(
    ("cls", "config", "more"),
    [
        (LlamaForCausalLM, LlamaConfig, {}),
        (
            Qwen2ForCausalLM,
            Qwen2Config,
            {
                "layer_types": ["full_attention", "sliding_attention"] * 2,
                "sliding_window": 3,
                "use_sliding_window": True,
            },
        ),
    ],
)
def test_dropped_blocks_leave_a_plain_smaller_model(cls, config, more, tmp_path):
    model = tiny(4, cls, config, **more)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = {f"model.layers.{i}": i != 1 for i in range(4)}
    small = drop_layers(model, plan)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.num_hidden_layers == len(loaded.model.layers) == 3 and model.config.num_hidden_layers == 4
    if more:
        assert loaded.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    student = shared_copy(model)
    assert Depth(student).assign(plan) == 1
    wanted = student(ids, use_cache=False).logits
    assert torch.equal(loaded(ids).logits, wanted) and torch.equal(small(ids).logits, wanted)
    new = loaded.generate(ids, do_sample=False, max_new_tokens=5, min_new_tokens=5)  # with a cache
    slow = loaded.generate(ids, do_sample=False, max_new_tokens=5, min_new_tokens=5, use_cache=False)
    assert torch.equal(new, slow)
    assert len(model.model.layers) == 4 and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(
        a.data_ptr() == b.data_ptr()
        for a, b in zip(small.model.layers[1].parameters(), model.model.layers[2].parameters(), strict=True)
    )


def test_dropped_sublayers_are_searched_apart_and_exported_as_zeros(caplog, tmp_path):
    model, rows = tiny(4), sequences()
    found = evopress_depth(model, rows, (2, 1), **SMALL, initial_tokens=50, initially_generated=6)
    by_kind = [[kept for n, kept in found.plan.items() if n.endswith(leaf)] for leaf in ("self_attn", "mlp")]
    assert [k.count(False) for k in by_kind] == [2, 1] and [len(k) for k in by_kind] == [4, 4]

    plan = {"model.layers.0.self_attn": False, "model.layers.2.self_attn": False, "model.layers.2.mlp": False}
    with caplog.at_level(logging.WARNING, "hfgen"):
        small = drop_layers(model, plan)
    assert "1 sublayers are set to zero, which saves no bytes; 1 whole blocks are removed" in caplog.text
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(loaded.model.layers) == 3
    student, ids = shared_copy(model), torch.tensor([[5, 6, 7, 8, 9]])
    depth = Depth(student)
    assert depth.assign(plan) == 3 and depth.assign(plan) == 0
    assert torch.allclose(loaded(ids).logits, student(ids, use_cache=False).logits, atol=1e-6)
    assert depth.assign(dict.fromkeys(plan, True)) == 3
    assert torch.equal(student(ids).logits, model(ids).logits)
    assert not any(bool((p == 0).all()) for p in model.parameters())


def test_bad_depths_are_named(tmp_path):
    model = tiny(3)
    for words, drop in (
        ("drop is 3 of 3; one at least has to stay", 3),
        ("drop is 0, so there is nothing to search", 0),
        ("drop is -1", -1),
        (r"drop is \(1,\); give a number of blocks, or", (1,)),
    ):
        with pytest.raises(ValueError, match=words):
            evopress_depth(model, sequences(), drop)
    for words, plan in (
        ("names 'model.layers.3', which is no block or sublayer", {"model.layers.3": False}),
        ("drops all 3 blocks", {f"model.layers.{i}": False for i in range(3)}),
    ):
        with pytest.raises(ValueError, match=words):
            drop_layers(model, plan)


# --- sparsity -----------------------------------------------------------------------------------------------------------


def test_sparsity_keeps_the_number_of_zeros_in_every_candidate(tmp_path, monkeypatch):
    model, rows = tiny(2), sequences()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    totals, original = set(), Sparsity.assign

    def watched(self, plan):
        changed = original(self, plan)
        totals.add(sum(int((layer.weight == 0).sum()) for layer in self.layers.values()))
        return changed

    monkeypatch.setattr(Sparsity, "assign", watched)
    found = evopress_sparsity(model, rows, 0.5, step=0.1, **SMALL | {"generations": 6})
    sizes = {n: model.get_submodule(n).weight.numel() for n in found.plan}
    assert len(found.plan) == 14 and totals == {sum(sizes.values()) // 2}
    assert len(set(found.plan.values())) > 1 and found.fitness["found"] < found.fitness["start"]
    sparse = found.export(model)
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {n: float((loaded.get_submodule(n).weight == 0).float().mean()) for n in sizes} == pytest.approx(found.plan)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for name, size in sizes.items():
        old, new = (m.get_submodule(name).weight.abs().flatten() for m in (model, loaded))
        assert old[new == 0].max() <= old[new != 0].min() and int((new == 0).sum()) == round(found.plan[name] * size)


def test_levels_of_sparsity_are_those_of_pruning(tmp_path):
    model = tiny(2)
    student = shared_copy(model)
    levels = Sparsity(student, 0.3, 0.05)
    plan = {name: menu[i % len(menu)] for i, (name, menu) in enumerate(levels.menus.items())}
    assert levels.assign(plan) == 14 and levels.assign(plan) == 0
    pruned = prune_layers(model, levels.shares(plan))
    for name in plan:
        assert torch.equal(student.get_submodule(name).weight, pruned.get_submodule(name).weight)
    assert torch.equal(ranks(torch.tensor([[3.0, -1.0], [1.0, 0.0]])), torch.tensor([[3, 1], [2, 0]]))
    for words, plan in (
        ("names 'lm_head', which is no linear layer of the blocks", {"lm_head": 0.5}),
        ("a sparsity of 1.5; give a share", {"model.layers.0.mlp.up_proj": 1.5}),
    ):
        with pytest.raises(ValueError, match=words):
            prune_layers(model, plan)
    for words, sparsity in (("sparsity is 1", 1), ("sparsity is 0", 0), ("sparsity is nan", math.nan)):
        with pytest.raises(ValueError, match=words):
            evopress_sparsity(model, sequences(), sparsity)


def test_a_search_that_found_nothing_says_so():
    model = tiny(1)
    levels = Levels.build(model, EasyQuantConfig(**RTN), (3, 4))
    found = evopress(model, levels, sequences(), 4, **SMALL)
    assert found.stopped == "no other state keeps the budget" and found.history == [] and found.plan == found.start
    assert found.notes == ("the search ended after 0 generations: no other state keeps the budget",)
    equal = Levels.build(model, EasyQuantConfig(**RTN), (3, 4, 5))
    equal.layers = dict.fromkeys((3, 4, 5), equal.layers[4])  # no width changes anything
    found = evopress(model, equal, sequences(), 4, **SMALL)
    assert found.notes == ("no candidate of 3 generations beat the start: the plan found is the start's",)
