"""best_of_n: the estimator against enumeration, curves and advice on known truths, the sampler on the tiny model."""

import itertools
import math
import sys
import time
import types
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.modeling_outputs import ModelOutput

from hfgen import sandbox
from hfgen.decoding import (
    BestOfNSampler,
    best_of_n,
    best_of_n_curves,
    best_of_n_kl,
    expected_best_of_n,
    plot_best_of_n,
)
from hfgen_plugins.decoding.best_of_n import sampler as sampling
from hfgen_plugins.decoding.best_of_n.curves import _advise
from hfgen_plugins.decoding.best_of_n.estimator import best_of_n_weights

D = sandbox.tasks.D
PROMPTS = list(D.prompts[:6])
PAPER_N = [2**k for k in range(13)] + [6144, 8192, 12500]


# --- the estimator -------------------------------------------------------------------------------------------------


def enumerated(proxy, gold, n):
    """Exact mean over all subsets of n samples of the gold of the best by proxy, ties shared."""
    total = Fraction(0)
    subsets = list(itertools.combinations(range(len(proxy)), n))
    for subset in subsets:
        best = max(proxy[i] for i in subset)
        winners = [gold[i] for i in subset if proxy[i] == best]
        total += sum(map(Fraction, winners), Fraction(0)) / len(winners)
    return float(total / len(subsets))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_estimator_equals_enumeration(data):
    samples = data.draw(st.integers(1, 9))
    few = st.integers(-2, 2).map(float)  # ties are the rule
    proxy = data.draw(st.lists(st.one_of(few, st.floats(-3, 3)), min_size=samples, max_size=samples))
    gold = data.draw(st.lists(st.floats(-10, 10), min_size=samples, max_size=samples))
    found = expected_best_of_n([proxy], [gold], range(1, samples + 1))[0]
    exact = [enumerated(proxy, gold, n) for n in range(1, samples + 1)]
    assert np.abs(found - exact).max() <= 1e-12


def test_weights_are_the_exact_ones_also_where_binomials_overflow():
    for samples, n in ((1, 1), (7, 1), (7, 7), (60, 13), (12600, 6300), (12600, 12500)):
        weights = best_of_n_weights(samples, n)
        whole = math.comb(samples, n)
        ranks = sorted({n, samples, (n + samples) // 2, max(n, samples - 3)})
        for i in ranks:
            exact = Fraction(math.comb(i - 1, n - 1), whole)
            assert abs(weights[i - 1] - float(exact)) <= 1e-12 * max(float(exact), 1e-300), (samples, n, i)
        assert abs(weights.sum() - 1) < 1e-12 and not weights[: n - 1].any()


def test_ends_series_and_order():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(4, 30)), rng.normal(size=(4, 30))
    found = expected_best_of_n(proxy, gold, [1, 30])
    assert np.allclose(found[:, 0], gold.mean(1)) and np.array_equal(found[:, 1], gold[range(4), proxy.argmax(1)])
    both = expected_best_of_n(proxy, np.stack([gold, proxy]))
    assert both.shape == (2, 4, 6) and np.array_equal(both[0], expected_best_of_n(proxy, gold))
    assert (np.diff(both[1], axis=1) > 0).all()  # the proxy itself can only rise
    shuffled = rng.permutation(30)
    assert np.allclose(expected_best_of_n(proxy[:, shuffled], gold[:, shuffled]), both[0], atol=1e-14)
    assert np.array_equal(expected_best_of_n(proxy, gold, [8, 2, 8]), expected_best_of_n(proxy, gold, [2, 8]))


def test_unbiased_for_fresh_samples():
    """Uniform proxy: the best of n has mean n/(n+1), whatever N it was estimated from."""
    proxy = np.random.default_rng(1).random((4000, 12))
    found = expected_best_of_n(proxy, proxy, [1, 3, 12])
    for column, n in zip(found.T, (1, 3, 12), strict=True):
        assert abs(column.mean() - n / (n + 1)) < 4 * column.std() / math.sqrt(4000)


def test_many_rows_and_all_n_are_the_same_as_few():
    """Blocks of rows and of n do not show."""
    rng = np.random.default_rng(2)
    proxy, gold = rng.integers(0, 40, (900, 3000)) / 7, rng.normal(size=(900, 3000))
    found = expected_best_of_n(proxy, gold, [1, 700, 3000])
    part = expected_best_of_n(proxy[699:701], gold[699:701], range(1, 3001))
    assert np.allclose(found[699:701], part[:, [0, 699, 2999]], atol=1e-12)


def test_speed_at_the_papers_size():
    """The bar: N = 12,600 for 1,000 prompts and 16 n's in under 2 s; a fifth of it here, so that a busy machine passes."""
    rng = np.random.default_rng(3)
    proxy = rng.normal(size=(200, 12600))
    gold = proxy + rng.normal(size=proxy.shape)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        expected_best_of_n(proxy, gold, PAPER_N)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.4, seconds


def test_kl():
    assert best_of_n_kl(1) == 0
    assert np.allclose(best_of_n_kl([2, 4096]), [math.log(2) - 0.5, math.log(4096) - 4095 / 4096])
    # an upper bound: with two equally likely answers best-of-n tends to the better one, at KL log 2
    p = 1 - 0.5**20
    exact = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    assert exact < math.log(2) + 1e-9 < best_of_n_kl(20)
    with pytest.raises(ValueError, match="whole numbers from 1 on"):
        best_of_n_kl([0, 1])


@pytest.mark.parametrize(
    ("proxy", "gold", "n", "error", "words"),
    [
        ([1.0, 2.0], [1.0, 2.0], None, ValueError, "proxy has shape"),
        ([[1.0, 2.0]], [[1.0, 2.0, 3.0]], None, ValueError, "scores"),
        ([[1.0, math.nan]], [[1.0, 2.0]], None, ValueError, "proxy has nan"),
        ([[1.0, 2.0]], [[1.0, math.inf]], None, ValueError, "scores has inf"),
        ([[1.0, 2.0]], [[1.0, 2.0]], [3], ValueError, "n has 3; .* 1 to 2"),
        ([[1.0, 2.0]], [[1.0, 2.0]], [], ValueError, "n has no value"),
        ([[1.0, 2.0]], [[1.0, 2.0]], [1.5], TypeError, "n has 1.5"),
        ([[]], [[]], None, ValueError, "proxy has shape"),
    ],
)
def test_bad_scores(proxy, gold, n, error, words):
    with pytest.raises(error, match=words) as caught:
        expected_best_of_n(proxy, gold, n)
    assert caught.traceback[-1].path.name == "estimator.py"


# --- curves and advice ---------------------------------------------------------------------------------------------


def made(prompts=40, samples=300, seed=0, harm=3.0, spread=1.2):
    """Proxy, gold, members: 3 % of the samples are outliers that gold dislikes and members overrate, each differently."""
    rng = np.random.default_rng(seed)
    base, odd = rng.normal(size=(prompts, samples)), rng.random((prompts, samples)) < 0.03
    wrong = odd[..., None] * harm * (0.6 + spread * rng.normal(size=(prompts, samples, 5)))
    members = 0.6 * base[..., None] + 0.5 * rng.normal(size=(prompts, samples, 5)) + wrong
    return members.mean(-1), base - harm * odd, members


def test_a_turn_is_found_in_gold_and_in_disagreement():
    proxy, gold, members = made()
    found = best_of_n_curves(proxy, gold, members)
    assert found.n == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300] and list(found.curves) == [
        "proxy", "gold", "stand_in", "disagreement"
    ]  # fmt: skip
    mean = found.curves["gold"].mean
    assert found.advice.signal == "gold" and found.advice.turns_down and found.advice.n == found.n[mean.argmax()]
    assert 1 < found.advice.n < 64 and found.advice.drop[2] < 0 and f"Stop at n = {found.advice.n}" in found.advice.text
    proxy, _, members = made(prompts=150)
    alone = best_of_n_curves(proxy, members=members)
    assert alone.advice.signal == "stand_in" and alone.advice.turns_down and alone.advice.n < 64
    assert alone.curves["disagreement"].mean[-1] > 3 * alone.curves["disagreement"].mean[0]
    assert best_of_n_curves(proxy).advice is None
    proxy, gold, members = made(spread=0.0)  # an error that all members share: gold shows it, disagreement cannot
    assert best_of_n_curves(proxy, gold).advice.turns_down
    assert best_of_n_curves(proxy, members=members).advice.turns_down is False


def test_no_turn_is_claimed_where_there_is_none():
    shown = 0
    for seed in range(40):  # gold is noise, unrelated to the proxy: its curve is flat, its peak is luck
        rng = np.random.default_rng(seed)
        advice = best_of_n_curves(rng.normal(size=(40, 64)), rng.normal(size=(40, 64)), resamples=300).advice
        shown += bool(advice.turns_down)
    assert shown <= 6  # 2.5 % each if the interval were exact
    rising = best_of_n_curves(*made(harm=0.0)[:2]).advice
    assert rising.turns_down is False and rising.n == 300 and "No turn is shown" in rising.text


def test_a_peak_that_is_luck_does_not_count():
    """Thirty independent columns of noise: the highest of them is far above the last one on the data that chose it."""
    shown = 0
    for seed in range(60):
        values = np.random.default_rng(seed).normal(size=(40, 30))
        shown += bool(_advise("gold", values, list(range(1, 31)), np.arange(40), 300, seed).turns_down)
    assert shown <= 6


def test_intervals_cover_and_groups_widen_them():
    covered, truth = 0, 8 / 9  # uniform proxy, n = 8
    for seed in range(120):
        curve = best_of_n_curves(np.random.default_rng(seed).random((50, 16)), n=[8], resamples=400).curves["proxy"]
        covered += curve.low[0] <= truth <= curve.high[0]
    assert 104 <= covered <= 120  # 95 % of 120 is 114, standard deviation 2.4
    rng = np.random.default_rng(0)
    shift = np.repeat(rng.normal(size=8), 10)[:, None]  # what a seed adds is common to its prompts
    proxy = rng.normal(size=(80, 16)) + shift
    widths = []
    for groups in (None, np.repeat(list("abcdefgh"), 10)):
        found = best_of_n_curves(proxy, n=[4], groups=groups)
        widths.append(found.curves["proxy"].high[0] - found.curves["proxy"].low[0])
    assert found.units == 8 and widths[1] > 1.8 * widths[0]


def test_prompts_of_different_size_are_each_used_whole():
    rng = np.random.default_rng(0)
    proxy = [rng.normal(size=k) for k in (5, 9, 5, 7)]
    gold = [rng.normal(size=len(p)) for p in proxy]
    found = best_of_n_curves(proxy, gold)
    assert found.n == [1, 2, 4, 5] and found.samples == (5, 9)
    own = np.mean([expected_best_of_n([p], [g], found.n)[0] for p, g in zip(proxy, gold, strict=True)], axis=0)
    assert np.allclose(found.curves["gold"].mean, own) and found.advice.turns_down is None
    assert "too few" in found.advice.text


def test_same_seed_same_curves_and_json():
    import json

    proxy, gold, members = made(10, 50)
    first, again = (best_of_n_curves(proxy, gold, members, seed=3).to_dict() for _ in range(2))
    assert first == again == json.loads(json.dumps(first))
    assert set(first) >= {"n", "kl_upper_bound", "curves", "advice"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"proxy": [[1.0], [1.0, 2.0]]}, "prompt 0 has 1 samples"),
        ({"proxy": []}, "proxy has 0 prompts"),
        ({"gold": [[1.0, 2.0]]}, "gold has 1 prompts; give 2"),
        ({"gold": [[1.0, 2.0], [1.0]]}, r"gold of prompt 1 has shape \(1,\); give \(2,\)"),
        ({"gold": [[1.0, 2.0], [1.0, math.nan]]}, "gold of prompt 1 has a score that is not finite"),
        ({"members": np.ones((2, 2, 1))}, "2 or more"),
        ({"members": np.ones((2, 2, 3))}, "member 0 gives every sample one score"),
        ({"members": np.ones((2, 2))}, r"shape \(2,\); give \(2, members\)"),
        ({"n": [3]}, "n has 3; .* 1 to 2"),
        ({"groups": [1]}, "groups has 1 labels; give 2"),
        ({"resamples": 10}, "resamples is 10"),
        ({"penalty": -1}, "penalty -1"),
    ],
)
def test_bad_arguments_of_curves(change, words):
    with pytest.raises(ValueError, match=words):
        best_of_n_curves(**{"proxy": [[1.0, 2.0], [2.0, 1.0]]} | change)


def test_plot(tmp_path):
    proxy, gold, members = made(10, 100)
    found = best_of_n_curves(proxy, gold, members)
    figure = plot_best_of_n(found, tmp_path / "a.svg")
    axes = figure.axes[0]
    assert {t.get_text() for t in axes.get_legend().get_texts()} >= {"proxy", "gold"}
    line = axes.get_lines()[1]
    assert np.allclose(line.get_xdata(), found.kl)
    gain = found.curves["gold"].mean - found.curves["gold"].mean[0]
    assert np.allclose(line.get_ydata(), gain / found.curves["gold"].sd)
    assert (tmp_path / "a.svg").stat().st_size > 5000


# --- the sampler ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return sandbox.load_model(), sandbox.load_tokenizer()


def right(prompts, completions, **columns):
    return [float(D.judge(p, c)) for p, c in zip(prompts, completions, strict=True)]


def sampler(tiny, reward=right, **options):
    return BestOfNSampler(*tiny, reward, **{"n": 8, "max_new_tokens": 20, "batch_size": 48} | options)


def generate(tiny, prompts=PROMPTS, **options):
    batch = tiny[1](prompts, return_tensors="pt", padding=True, padding_side="left")
    base = {"do_sample": True, "max_new_tokens": 20, "custom_generate": best_of_n, "reward": right, "n": 8,
            "processing_class": tiny[1], "pad_token_id": tiny[1].pad_token_id, "seed": 0}  # fmt: skip
    width = batch["input_ids"].shape[1]
    return tiny[1].batch_decode(tiny[0].generate(**batch, **base | options)[:, width:], skip_special_tokens=True)


MIXED = ["D05=", "Rabcd=", ":17=", "D11="]


def test_answers_do_not_depend_on_batches_order_or_the_global_generator(tiny):
    zeros = lambda texts: [0.0] * len(texts)  # noqa: E731
    first = sampler(tiny, zeros).generate(MIXED)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert sampler(tiny, zeros, batch_size=3).generate(MIXED).answers == first.answers
    assert sampler(tiny, zeros).generate(MIXED[::-1]).answers[::-1] == first.answers
    assert torch.equal(torch.get_rng_state(), state)
    assert sampler(tiny, zeros, seed=1).generate(MIXED).answers != first.answers
    twice = sampler(tiny, zeros).generate([MIXED[0], MIXED[0]]).answers
    assert twice[0] == first.answers[0] and twice[1] != twice[0]
    more = sampler(tiny, zeros, n=11).generate(MIXED).answers
    assert [row[:8] for row in more] == first.answers  # a larger n begins with the same answers


def test_the_sampled_distribution_is_the_models(tiny):
    """One token, 4,000 draws: frequencies of softmax(logits / T) cut to top_k, and left padding changes nothing."""
    model, tokenizer = tiny
    with torch.no_grad():
        logits = model(**tokenizer(["D05="], return_tensors="pt")).logits[0, -1]
    draws = sampler(tiny, lambda texts: [0.0] * len(texts), n=4000, max_new_tokens=1, temperature=1.3, top_k=5,
                    batch_size=4000)  # fmt: skip
    tokens = [ids[0] for ids in draws.generate(["D05="]).answer_ids[0]]
    top = (logits / 1.3).topk(5)
    expected = dict(zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True))
    assert set(tokens) <= set(expected)
    for token, p in expected.items():
        assert abs(tokens.count(token) / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000) + 1e-9


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 2), (1 - 2**-53, 3), (0.49, 2), (0.5, 3)])
def test_a_token_without_probability_is_never_sampled(uniform, token, monkeypatch):
    process = sampling._seeded([0])
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: torch.tensor([uniform], dtype=torch.float64))
    scores = process(None, torch.tensor([[-math.inf, -math.inf, 0.0, 0.0, -math.inf]]))
    assert scores.argmax().item() == token and torch.isfinite(scores).sum() == 1


def test_the_best_answer_is_chosen(tiny):
    samples = sampler(tiny).generate(PROMPTS)
    assert samples.rewards.shape == samples.finished.shape == (6, 8) and samples.finished.all()
    for prompt, answers, rewards, chosen, best in zip(
        PROMPTS, samples.answers, samples.rewards, samples.chosen, samples.best, strict=True
    ):
        assert rewards.tolist() == [float(D.judge(prompt, a)) for a in answers]
        assert chosen == rewards.tolist().index(max(rewards)) and best == answers[chosen]
    assert 0 < samples.rewards.mean() < 1 == samples.rewards.max(1).mean()
    top = samples.top(3)
    assert [t[0] for t in top] == samples.best and all(len(t) == 3 for t in top)
    assert generate(tiny) == samples.best  # the same seed through model.generate
    assert generate(tiny, n_candidates=3) == [a for t in top for a in t]


def test_custom_generate_without_a_seed_uses_torchs_generator(tiny):
    torch.manual_seed(0)
    first = generate(tiny, seed=None)
    torch.manual_seed(0)
    assert generate(tiny, seed=None) == first
    torch.manual_seed(1)
    assert any(generate(tiny, seed=None, reward=lambda texts: [0.0] * len(texts)) != first for _ in range(3))


def test_what_a_reward_is_called_with(tiny):
    tokenizer = tiny[1]
    calls = []

    def full(prompts, completions, completion_ids, gold):
        calls.append((prompts, completions, completion_ids, gold))
        return np.arange(len(prompts))

    samples = sampler(tiny, full, n=2).generate(["D05=", "D11="], gold=["x", "y"], other=[1, 2])
    prompts, completions, ids, gold = calls.pop()
    assert prompts == ["D05=", "D05=", "D11=", "D11="] and gold == ["x", "x", "y", "y"]
    assert [tokenizer.decode(i) for i in ids] == completions == [a for row in samples.answers for a in row]
    assert samples.chosen.tolist() == [1, 1] and samples.rewards.tolist() == [[0, 1], [2, 3]]
    texts = sampler(tiny, lambda texts: [float(len(t)) for t in texts], n=2).generate(["D05="])
    assert texts.rewards.tolist() == [[float(len("D05=" + a)) for a in texts.answers[0]]]
    generate(tiny, ["D05=", "Rabcd="], n=2, reward=full, reward_kwargs={"gold": ["x", "y"]})
    assert calls.pop()[0] == ["D05=", "D05=", "Rabcd=", "Rabcd="]  # no padding, no BOS
    ids = tokenizer("D05=")["input_ids"]
    for form in ([ids], torch.tensor([ids])):
        again = sampler(tiny, full, n=2).generate(form, gold=["x"])
        assert again.prompts == ["D05="] and again.answers == samples.answers[:1]
    scored = samples.score_with(full, gold=["x", "y"])
    assert scored.tolist() == [[0, 1], [2, 3]]


def test_chats(tiny):
    model, tokenizer = tiny
    tokenizer = sandbox.load_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )  # fmt: skip
    chat = [{"role": "user", "content": "D05="}]
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(i) for i in range(len(prompts))]

    samples = sampler((model, tokenizer), reward, n=2).generate([chat])
    assert seen[0] == (chat, [{"role": "assistant", "content": samples.answers[0][0]}])
    rendered = sampler((model, tokenizer), lambda texts: [1.0] * len(texts), n=2).generate(["u:D05=;a:"])
    with_bos = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    plain = tokenizer("u:D05=;a:")["input_ids"]
    assert (samples.answers == rendered.answers) == (with_bos == plain)
    model_reward = reward_model(tokenizer)
    scores = sampler((model, tokenizer), model_reward, n=2, reward_processing_class=tokenizer).generate([chat]).rewards
    text = tokenizer.apply_chat_template(
        [*chat, {"role": "assistant", "content": samples.answers[0][0]}], tokenize=False
    )
    assert np.allclose(scores[0, 0], one_score(model_reward, tokenizer, text), atol=1e-6)
    with pytest.raises(TypeError, match="takes texts, but prompts are messages"):
        sampler((model, tokenizer), lambda texts: [1.0]).generate([chat])


def reward_model(tokenizer, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id, attention_dropout=0.5,
    )  # fmt: skip
    for name, value in options.items():
        setattr(config, name, value)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20)
    return model.train()


@torch.no_grad()
def one_score(model, tokenizer, text):
    model.eval()
    return model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0].item()


def test_a_reward_model_scores_each_answer_as_if_alone(tiny):
    model = reward_model(tiny[1])
    options = {"n": 4, "reward_processing_class": tiny[1], "batch_size": 7}
    samples = sampler(tiny, model, **options).generate(MIXED)
    assert model.training and samples.members is None  # put back
    torch.manual_seed(0)
    size = {"vocab_size": len(tiny[1]), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "num_labels": 1}
    absolute = GPT2ForSequenceClassification(GPT2Config(**size, pad_token_id=tiny[1].pad_token_id)).eval()
    with torch.no_grad():
        for p in absolute.parameters():  # positions count from the first token: padding on the left would show
            p.mul_(20)
    scores = samples.score_with(absolute, tiny[1], batch_size=7)
    alone = [[one_score(absolute, tiny[1], p + a) for a in row] for p, row in zip(MIXED, samples.answers, strict=True)]
    assert np.allclose(scores, alone, atol=1e-4)
    alone = [[one_score(model, tiny[1], p + a) for a in row] for p, row in zip(MIXED, samples.answers, strict=True)]
    assert np.allclose(samples.rewards, alone, atol=1e-5) and np.std(alone) > 1e-3
    with pytest.raises(ValueError, match="does not say where it is from"):
        sampler(tiny, model, n=2).generate(MIXED)
    with pytest.raises(ValueError, match="pad_token_id is None and its tokenizer's"):
        sampler(tiny, reward_model(tiny[1], pad_token_id=None), **options).generate(MIXED)
    with pytest.raises(ValueError, match=r"logits of shape \(7, 3\); it needs num_labels=1"):
        sampler(tiny, reward_model(tiny[1], num_labels=3), **options).generate(MIXED)


class Ensemble(torch.nn.Module):
    """The shape of an ensemble's output, without its class."""

    def forward(self, input_ids, attention_mask):
        length = attention_mask.sum(1).float()
        members = torch.stack([length, -length, input_ids.sum(1) / 100.0], 1)
        return ModelOutput(logits=members.mean(1, keepdim=True), member_logits=members)


def test_member_scores_of_an_ensemble_reach_the_rows(tiny, tmp_path):
    samples = sampler(tiny, Ensemble(), reward_processing_class=tiny[1], n=3).generate(MIXED)
    assert samples.members.shape == (4, 3, 3) and np.allclose(samples.members.mean(-1), samples.rewards)
    lengths = [[len(p + a) for a in row] for p, row in zip(MIXED, samples.answers, strict=True)]
    assert samples.members[..., 0].tolist() == lengths
    rows = samples.rows(gold=np.arange(12.0).reshape(4, 3))
    assert [r["gold"] for r in rows] == list(range(12)) and rows[4]["members"] == samples.members[1, 1].tolist()
    assert [r["prompt_id"] for r in rows] == np.repeat(range(4), 3).tolist() and sum(r["chosen"] for r in rows) == 4
    samples.save(tmp_path / "a.jsonl")
    from hfgen.cli.bon import read

    assert len(read(tmp_path / "a.jsonl", "prompt_id", "proxy", None, None, None)["members"]) == 4
    with pytest.raises(ValueError, match=r"gold has shape \(2,\)"):
        samples.rows(gold=np.zeros(2))


class MemberScores:
    """An ensemble as a trl reward function: aggregate by call, members by method."""

    def member_scores(self, prompts, completions):
        return torch.tensor([[len(c), ord(c[-1])] for c in completions], dtype=torch.float32)

    def __call__(self, prompts, completions, *, log_metric=None, **columns):
        return self.member_scores(prompts, completions).amin(1).tolist()


def test_member_scores_of_a_callable_ensemble(tiny):
    samples = sampler(tiny, MemberScores(), n=3).generate(MIXED)
    assert samples.members.shape == (4, 3, 2) and np.array_equal(samples.members.min(-1), samples.rewards)


def test_none_is_never_chosen_and_leaves_no_row(tiny):
    samples = sampler(tiny, lambda texts: [None, -5.0, None] * (len(texts) // 3), n=3).generate(MIXED)
    assert samples.chosen.tolist() == [1] * 4 and len(samples.rows()) == 4 and np.isnan(samples.rewards).sum() == 8


def test_a_peft_model_samples_with_its_adapter_and_is_left_as_it_was(tiny):
    plain = sampler(tiny).generate(PROMPTS).answers
    model = get_peft_model(sandbox.load_model(), LoraConfig(r=4, lora_dropout=0.5, task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable()
    model.train()
    assert sampler((model, tiny[1])).generate(PROMPTS).answers == plain  # dropout is off, the adapter is zero
    assert model.training and all(m.training for m in model.modules())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=1.0)
    assert sampler((model, tiny[1])).generate(PROMPTS).answers != plain


def test_a_cache_given_to_generate_is_expanded(tiny):
    from transformers import DynamicCache

    model, tokenizer = tiny
    batch = tokenizer(["D05=", "D11="], return_tensors="pt")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(batch["input_ids"][:, :-1], past_key_values=cache)
    options = {"do_sample": True, "max_new_tokens": 20, "custom_generate": best_of_n, "reward": right, "n": 4,
               "processing_class": tokenizer, "seed": 0}  # fmt: skip
    with_cache = model.generate(**batch, past_key_values=cache, **options)
    assert torch.equal(with_cache, model.generate(**batch, **options))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"do_sample": False}, ValueError, "do_sample is False, so all 8 answers would be equal"),
        ({"n": 0}, ValueError, "n is 0"),
        ({"n_candidates": 9}, ValueError, "n_candidates is 9; give a whole number from 1 to 8"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences is 2; leave it 1"),
        ({"num_beams": 2}, ValueError, "num_beams is 2"),
        ({"processing_class": None}, TypeError, "processing_class is None; pass the tokenizer"),
        ({"reward": None}, TypeError, "reward is NoneType; pass a function"),
        ({"reward": lambda a, b: 0}, TypeError, "reward is <lambda>"),
        ({"reward": lambda texts: [1.0]}, ValueError, "returned 1 rewards for 48 answers"),
        ({"reward": lambda texts: ["x"] * 48}, TypeError, "return one number"),
        ({"reward": lambda texts: None}, TypeError, "returned None"),
        ({"reward": lambda texts: [math.inf] * 48}, ValueError, "infinite"),
        ({"reward": lambda texts: [None] * 48}, ValueError, "no answer to prompt 0 got a reward"),
        ({"reward_kwargs": {"gold": [1]}}, ValueError, "column 'gold' has 1 values; give 6"),
    ],
)
def test_bad_arguments_of_generate(tiny, options, error, words):
    with pytest.raises(error, match=words) as caught:
        generate(tiny, **options)
    assert caught.traceback[-1].path.name == "sampler.py"


def test_bad_arguments_of_the_sampler(tiny):
    for options, error, words in (
        ({"n": 1.5}, ValueError, "n is 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"reward": 3}, TypeError, "reward is int"),
        ({"temprature": 2}, TypeError, "'temprature' is no option"),
        ({"generation_config": GenerationConfig(do_sample=True)}, ValueError, "'max_new_tokens'.* are both given"),
        ({"do_sample": False}, ValueError, "do_sample is False"),
    ):
        with pytest.raises(error, match=words):
            sampler(tiny, **options)
    with pytest.raises(TypeError, match="model is str; pass a causal model"):
        BestOfNSampler("name", tiny[1], right)
    with pytest.raises(TypeError, match="processing_class is NoneType"):
        BestOfNSampler(tiny[0], None, right)
    for prompts, error, words in (
        ("D05=", ValueError, "give a list"),
        ([], ValueError, "at least one prompt"),
        ([3.5], TypeError, "prompt 3.5 is no text"),
        ([[]], ValueError, "has no tokens"),
    ):
        with pytest.raises(error, match=words):
            sampler(tiny).generate(prompts)
    with pytest.raises(ValueError, match="column 'gold' has 1 values; give 2"):
        sampler(tiny).generate(["D05=", "D11="], gold=["x"])


def test_own_generation_config(tiny):
    config = GenerationConfig(do_sample=True, max_new_tokens=3, top_k=1)
    samples = BestOfNSampler(*tiny, right, n=3, generation_config=config).generate(PROMPTS)
    assert all(len(set(row)) == 1 and len(row[0]) <= 3 for row in samples.answers)  # top_k=1 is greedy
    assert not samples.finished.any() and config.eos_token_id is None


def test_several_eos_tokens_and_a_mask_free_batch(tiny):
    model, tokenizer = tiny
    plus = tokenizer.convert_tokens_to_ids("+")
    config = GenerationConfig(do_sample=True, max_new_tokens=20, eos_token_id=[tokenizer.eos_token_id, plus], top_k=0)
    samples = BestOfNSampler(model, tokenizer, lambda texts: [1.0] * len(texts), n=4, generation_config=config)
    found = samples.generate(["D05="])
    assert found.finished.all() and not any("+" in a for a in found.answers[0])


# --- vLLM: not installed here; how it would be called -----------------------------------------------------------


def test_vllm_that_is_missing_is_said_loudly(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="use_vllm is true, but vLLM does not import"):
        BestOfNSampler("name", tiny[1], right, use_vllm=True)
    with pytest.raises(TypeError, match="'do_sample' is not handed on to vLLM"):
        BestOfNSampler("name", tiny[1], right, use_vllm=True, do_sample=True)
    with pytest.raises(ValueError, match="generation_config is given with use_vllm"):
        BestOfNSampler("name", tiny[1], right, use_vllm=True, generation_config=GenerationConfig())


def test_vllm_calls(tiny, monkeypatch):
    """The names and shapes trl 1.16 uses (trl/generation/vllm_generation.py); a stand-in answers."""
    tokenizer = tiny[1]
    calls = []

    class SamplingParams(types.SimpleNamespace):
        pass

    class LLM:
        def __init__(self, model):
            self.model = model

        def generate(self, prompts, sampling_params, use_tqdm):
            calls.append((prompts, sampling_params))
            out = []
            for row, params in zip(prompts, sampling_params, strict=True):
                ids = row["prompt_token_ids"][1:3]
                make = lambda j, ids=ids: types.SimpleNamespace(  # noqa: E731
                    index=j, token_ids=ids * (j + 1), finish_reason="length" if j else "stop"
                )
                out.append(types.SimpleNamespace(outputs=[make(j) for j in reversed(range(params.n))]))
            return out

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams))
    made_ = BestOfNSampler("folder", tokenizer, lambda texts: [float(len(t)) for t in texts], n=3, use_vllm=True,
                           max_new_tokens=9)  # fmt: skip
    samples = made_.generate(["D05=", "D05="])
    prompts, params = calls.pop()
    assert made_.model.model == "folder" and prompts[0] == {"prompt_token_ids": tokenizer("D05=")["input_ids"]}
    assert (params[0].n, params[0].max_tokens, params[0].temperature, params[0].top_k) == (3, 9, 1.0, 0)
    assert params[0].seed != params[1].seed and 0 <= params[0].seed < 2**63
    assert samples.answers == [["D0", "D0D0", "D0D0D0"]] * 2 and samples.chosen.tolist() == [2, 2]
    assert samples.finished.tolist() == [[True, False, False]] * 2
    with pytest.raises(TypeError, match="give a folder, a hub id or a vllm.LLM"):
        BestOfNSampler(tiny[0], tokenizer, right, use_vllm=True)


# --- what we lean on upstream ---------------------------------------------------------------------------------------


def test_upstream_symbols():
    import inspect

    names = inspect.signature(LlamaForCausalLM._sample).parameters
    assert {"logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"} <= set(names)
    own = set(inspect.signature(best_of_n).parameters)
    assert not {"reward", "n", "n_candidates", "processing_class", "seed"} & set(names)  # else generate keeps them
    assert {"reward", "n", "n_candidates", "processing_class", "seed"} <= own
    assert "expand_size" in inspect.signature(LlamaForCausalLM._expand_inputs_for_generation).parameters


def test_seeds_differ_by_prompt_row_and_occurrence():
    seeds = sampling.prompt_seeds(0, [[1, 2], [1, 2], [12], [1, 3]])
    assert len(set(seeds)) == 4 and seeds[:1] == sampling.prompt_seeds(0, [[1, 2]])
    assert sampling.prompt_seeds(1, [[1, 2]]) != seeds[:1] and max(seeds) < 2**63
