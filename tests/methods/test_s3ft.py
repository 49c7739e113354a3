"""S3FT: the order of its sources, their cost, M0 left as it was, killed builds and runs that go on bit-equal."""

import dataclasses
import json
import random
import shutil
import sys
import traceback
import types

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.kit import generation, sandboxing
from hfgen.trainers import S3FTConfig, S3FTTrainer, build_s3ft_dataset

D, oracle = sandbox.tasks.D, sandbox.tasks.oracle_paraphraser
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def model():
    return sandbox.load_model()


@pytest.fixture
def tokenizer():
    return sandbox.load_tokenizer()


def config(folder, **options):
    small = {
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
        "s3ft_max_new_tokens": 24, "s3ft_batch_size": 4, "save_strategy": "no", "max_steps": 2, "logging_steps": 1,
    }  # fmt: skip
    return S3FTConfig(str(folder), **{**small, **options})


def rows(count=10, **columns):
    return Dataset.from_list([{**r, **columns} for r in D.rows(D.prompts[:count])])


def build(folder, model, tokenizer, dataset=None, judge=D.judge, paraphraser=oracle, **options):
    dataset = rows() if dataset is None else dataset
    return build_s3ft_dataset(model, dataset, judge, paraphraser, tokenizer, config(folder, **options))


def counted(monkeypatch, model):
    """The sizes of the batches `model` generates from here on."""
    sizes, original = [], model.generate

    def generate(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "generate", generate)
    return sizes


# --- the algorithm ------------------------------------------------------------------------------------------------


class Rewriter:
    def prompt(self, prompt, gold):
        return f"again {prompt}"


def scripted(monkeypatch, tokenizer, answers):
    """The model answers from a table of prompt -> (text, finished); what it is asked is listed."""
    asked = []

    def generate(model, tok, prompts, **options):
        texts = [tok.decode(p, skip_special_tokens=True) for p in prompts]
        asked.extend(texts)
        return [generation.Generation(*answers[t]) for t in texts]

    monkeypatch.setattr(generation, "generate", generate)
    return asked


def test_order_of_the_sources(monkeypatch, tmp_path, model, tokenizer):
    """own answer if right, else own rewriting if right, else gold; cut off or empty is wrong; nothing is dropped."""
    table = {
        "a": ("ok a", True),
        "b": ("bad", True), "again b": ("ok b", True),
        "c": ("bad", True), "again c": ("bad", True),
        "d": ("ok but cut off", False), "again d": ("ok d", True),
        "e": ("  ", True), "again e": ("ok but cut off", False),
    }  # fmt: skip
    asked = scripted(monkeypatch, tokenizer, table)
    dataset = Dataset.from_dict(
        {"prompt": list("abcde"), "completion": [f"gold {x}" for x in "abcde"], "id": list("vwxyz")}
    )
    seen = []

    def judge(prompt, answer, gold):
        seen.append((prompt, answer, gold))
        return 0.75 if answer.startswith("ok") else 0.25

    built = build(tmp_path, model, tokenizer, dataset, judge, Rewriter(), s3ft_batch_size=2)
    assert built["source"] == ["self", "paraphrase", "gold", "paraphrase", "gold"]
    assert built["completion"] == ["ok a", "ok b", "gold c", "ok d", "gold e"]
    assert built["judge_score"] == [0.75, 0.75, None, 0.75, None]
    assert built["gold"] == [f"gold {x}" for x in "abcde"] and built["sample_id"] == list("vwxyz")
    assert built["prompt"] == list("abcde")
    assert sorted(asked) == sorted(table)  # N + N_fail questions, each asked once
    assert len(seen) == 6 and all(not a.endswith("cut off") and a.strip() for _, a, _ in seen)
    assert ("b", "bad", "gold b") in seen


def test_paraphrases_are_judged_and_a_callable_costs_no_generation(monkeypatch, tmp_path, model, tokenizer):
    sizes = counted(monkeypatch, model)
    right = build(tmp_path / "1", model, tokenizer)
    assert 0 < right["source"].count("self") < 10 and right["source"].count("gold") == 0
    for row in right:
        assert D.judge(row["prompt"], row["completion"]) and row["gold"] == D.gold(row["prompt"])
    wrong = build(tmp_path / "2", model, tokenizer, paraphraser=lambda prompt, gold: "1+1+1")
    assert wrong["source"] == ["gold" if s == "paraphrase" else s for s in right["source"]]
    assert all(r["completion"] == r["gold"] for r in wrong if r["source"] == "gold")
    assert build(tmp_path / "3", model, tokenizer, paraphraser="none")["completion"] == wrong["completion"]
    assert sum(sizes) == 3 * 10


def test_at_most_two_generations_per_row(monkeypatch, tmp_path, model, tokenizer):
    sizes = counted(monkeypatch, model)
    built = build(tmp_path, model, tokenizer, paraphraser="self")
    failed = 10 - built["source"].count("self")
    assert sum(sizes) == 10 + failed and 0 < failed < 10


def test_an_answer_that_does_not_end_is_wrong(tmp_path, model, tokenizer):
    built = build(tmp_path, model, tokenizer, judge=lambda **_: True, paraphraser="none", s3ft_max_new_tokens=3)
    assert built["source"] == ["gold"] * 10


def test_every_eos_of_the_model_ends_an_answer(tmp_path, model, tokenizer):
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("+")]
    built = build(tmp_path, model, tokenizer, judge=lambda prompt, answer, gold: len(answer) == 1)
    assert built["source"].count("self") >= 9 and all(c.isdigit() for c in built["completion"] if len(c) == 1)


def test_the_judge_gets_reference_and_columns(tmp_path, model, tokenizer):
    seen = []

    def judge(prompt, answer, gold, **columns):
        seen.append((gold, columns))
        return False

    built = build(tmp_path, model, tokenizer, rows(1, tests="t", gold="reference"), judge)
    assert seen[0] == ("reference", {"tests": "t"}) and built["gold"] == [D.gold(D.prompts[0])]


def chat(tokenizer):
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    user = [{"role": "user", "content": p} for p in D.prompts[:10]]
    golds = [{"role": "assistant", "content": D.gold(p)} for p in D.prompts[:10]]
    return user, golds, lambda prompt, answer, gold: D.judge(prompt[-1]["content"], answer)


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_conversations_give_the_same_data(tmp_path, model, tokenizer, form):
    plain = build(tmp_path / "plain", model, tokenizer)
    user, golds, judge = chat(tokenizer)
    if form == "messages":
        dataset = Dataset.from_dict({"messages": [list(pair) for pair in zip(user, golds, strict=True)]})
    else:
        dataset = Dataset.from_dict({"prompt": [[u] for u in user], "completion": [[g] for g in golds]})
    built = build(tmp_path / "chat", model, tokenizer, dataset, judge)
    assert [c[0]["content"] for c in built["completion"]] == plain["completion"] and built["source"] == plain["source"]
    assert built["prompt"] == [[u] for u in user] and built["sample_id"] == list(range(10))
    assert built["logp_target"] == plain["logp_target"] and built["logp_gold"] == plain["logp_gold"]


def test_where_a_target_comes_from_is_told(monkeypatch, tmp_path, model, tokenizer):
    table = {
        "a": ("ok a", True), "b": ("bad", True), "again b": ("ok b", True), "c": ("cut off", False),
        "again c": ("bad", True), "d": ("  ", True), "again d": ("ok d", True),
    }  # fmt: skip
    scripted(monkeypatch, tokenizer, table)
    dataset = Dataset.from_dict({"prompt": list("abcd"), "completion": ["gold"] * 4})

    def judge(prompt, answer, gold):
        return 0.75 if answer.startswith("ok") else 0.25

    built = build(tmp_path, model, tokenizer, dataset, judge, Rewriter(), s3ft_batch_size=2)
    assert built["source"] == ["self", "paraphrase", "gold", "paraphrase"] and built["attempts"] == [1, 2, 2, 2]
    assert built["own_answer"] == ["ok a", "bad", "cut off", "  "] and built["own_score"] == [0.75, 0.25, None, None]
    assert set(built["judge"]) == {f"{__name__}.{judge.__qualname__}"}
    part = tmp_path / "_s3ft_data" / "part-0.jsonl"  # as the first version wrote it
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    for line in lines:
        line["rows"] = [
            {k: r[k] for k in ("source", "text", "score", "logp_gold", "logp_target")} for r in line["rows"]
        ]
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    old = build(tmp_path, model, tokenizer, dataset, judge, Rewriter(), s3ft_batch_size=2)
    assert old["completion"] == built["completion"] and old["attempts"] == [None] * 4 and old.features == built.features


class Together:
    """A judge of several at a time."""

    def __init__(self, verdicts=None):
        self.sizes, self.verdicts = [], verdicts

    def __call__(self, prompt, answer, gold, **columns):
        if answer == "bad":
            raise KeyError("tests")
        return D.judge(prompt, answer)

    def __repr__(self):
        return "together"

    def many(self, calls):
        self.sizes.append(len(calls))
        return [self(*c[:3], **c[3]) for c in calls] if self.verdicts is None else self.verdicts


def test_a_judge_of_several_gets_a_block_at_a_time(monkeypatch, tmp_path, model, tokenizer):
    one, judge = build(tmp_path / "1", model, tokenizer), Together()
    several = build(tmp_path / "2", model, tokenizer, judge=judge)
    assert several.remove_columns("judge").to_list() == one.remove_columns("judge").to_list()
    assert judge.sizes[0] == 4 and sum(judge.sizes) <= 20
    scripted(monkeypatch, tokenizer, {p: ("bad" if p == D.prompts[5] else "1+1+1", True) for p in D.prompts})
    with pytest.raises(ValueError, match=rf"raised KeyError: 'tests' on row '{D.prompts[5]}'"):
        build(tmp_path / "3", model, tokenizer, judge=judge)
    with pytest.raises(ValueError, match=r"together gave 1 verdicts on 4 answers; give as many"):
        build(tmp_path / "4", model, tokenizer, judge=Together([True]))
    with pytest.raises(TypeError, match=r"together returned 'yes' on row"):
        build(tmp_path / "5", model, tokenizer, judge=Together(["yes"] * 4))


def test_code_is_judged_by_its_tests(monkeypatch, tmp_path, model, tokenizer):
    """The whole way: the model's code runs in the sandbox; where there is none, the build refuses before it starts."""
    answers = {"a": "def f(n): return n * n", "b": "def f(n): return n", "c": "import os; os._exit(0)"}
    scripted(monkeypatch, tokenizer, {k: (v, True) for k, v in answers.items()})
    dataset = Dataset.from_dict(
        {"prompt": list("abc"), "completion": ["gold"] * 3, "tests": [["assert f(3) == 9"]] * 3}
    )
    with pytest.raises(ValueError, match="allow_code_execution is False"):
        build(tmp_path, model, tokenizer, dataset, judge="code")
    given = config(tmp_path, judge="code", judge_args='{"allow_code_execution": true, "wall_seconds": 30}')
    try:
        built = build_s3ft_dataset(model, dataset, None, "none", tokenizer, given)
    except sandboxing.SandboxError as exc:
        assert "cannot be run safely here" in str(exc) and not (tmp_path / "_s3ft_data").exists()
    else:
        assert built["source"] == ["self", "gold", "gold"] and built["own_score"] == [1, 0, 0]
        assert set(built["judge"]) == {"hfgen_plugins.judges.code.judge.CodeJudge"}


# --- ablations ----------------------------------------------------------------------------------------------------


def test_without_paraphrase(tmp_path, model, tokenizer):
    named = build(tmp_path / "1", model, tokenizer, paraphraser="none")
    assert build(tmp_path / "2", model, tokenizer, no_paraphrase=True).to_list() == named.to_list()
    assert build(tmp_path / "1", model, tokenizer, no_paraphrase=True).to_list() == named.to_list()  # the same data


def test_failures_can_be_dropped(monkeypatch, tmp_path, model, tokenizer):
    """On the data of a run that keeps them: they are not built again."""
    whole = build(tmp_path, model, tokenizer, paraphraser="none")
    sizes = counted(monkeypatch, model)
    dropped = build(tmp_path, model, tokenizer, paraphraser="none", drop_failures=True)
    assert dropped.to_list() == [r for r in whole if r["source"] == "self"] and 0 < len(dropped) < 10 and sizes == []
    with pytest.raises(ValueError, match="drop_failures is true and the judge found no right answer in 10 rows"):
        build(tmp_path / "none", model, tokenizer, judge=lambda prompt, answer, gold: False, drop_failures=True)
    run = trainer(tmp_path / "run", drop_failures=True, no_paraphrase=True)
    run.train()
    log = run.state.log_history[0]
    assert log["s3ft/frac_dropped"] == pytest.approx(1 - len(dropped) / 10) and log["s3ft/frac_gold"] == 0


def test_a_judge_of_strings(tmp_path, model, tokenizer):
    """What the model phrases differently counts as wrong: S3FT is then almost SFT."""
    built = build(tmp_path, model, tokenizer, string_judge=True)
    assert built["source"] == ["gold"] * 10 and set(built["judge"]) == {"hfgen_plugins.judges.exact.judge.ExactJudge"}
    same = [{**r, "gold": built["own_answer"][i]} for i, r in enumerate(rows())]
    assert (
        build(tmp_path / "2", model, tokenizer, Dataset.from_list(same), string_judge=True)["source"] == ["self"] * 10
    )


# --- vLLM ---------------------------------------------------------------------------------------------------------


class FakeVLLM:
    """vLLM's interface as we use it, by transformers: what is asked and with which weights is real."""

    __version__ = "0.0"

    def __init__(self):
        self.options, self.settings = [], []

    def SamplingParams(self, **options):
        self.settings.append(options)
        return types.SimpleNamespace(**options)

    def LLM(self, model, **options):
        self.options.append(options)
        loaded = LlamaForCausalLM.from_pretrained(model)

        def generate(prompts, sampling_params, use_tqdm):
            outputs = []
            for prompt, wanted in zip(prompts, sampling_params, strict=True):
                ids = torch.tensor([prompt["prompt_token_ids"]])
                new = loaded.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                    max_new_tokens=wanted.max_tokens, eos_token_id=wanted.stop_token_ids,
                )[0, ids.shape[1] :].tolist()  # fmt: skip
                reason = "stop" if new[-1] in wanted.stop_token_ids else "length"
                outputs.append(
                    types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=new, finish_reason=reason)])
                )
            return outputs

        return types.SimpleNamespace(generate=generate)


def test_vllm_gives_the_same_data(monkeypatch, tmp_path, model, tokenizer):
    fake = FakeVLLM()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    plain = build(tmp_path / "1", model, tokenizer, paraphraser="self")
    sizes = counted(monkeypatch, model)
    options = {"s3ft_vllm": True, "s3ft_vllm_args": '{"max_model_len": 256}'}
    built = build(tmp_path / "2", model, tokenizer, paraphraser="self", **options)
    own = ["completion", "source", "own_answer", "attempts"]
    assert built.select_columns(own).to_list() == plain.select_columns(own).to_list() and sizes == []
    assert built["logp_target"] == pytest.approx(plain["logp_target"], abs=1e-4)
    assert fake.options == [{"max_model_len": 256, "dtype": "float32", "seed": 0, "gpu_memory_utilization": 0.5}]
    assert fake.settings[0] == {"temperature": 0.0, "max_tokens": 24, "stop_token_ids": [tokenizer.eos_token_id]}
    build(tmp_path / "3", model, tokenizer, paraphraser="none", num_candidates=2, **options)
    assert {"temperature", "top_p", "seed"} <= fake.settings[-1].keys() and fake.settings[-1]["temperature"] == 0.7
    for folder, wrong in (("1", options), ("2", {})):  # data of the one are not the other's
        with pytest.raises(ValueError, match="another run, which differs in vllm"):
            build(tmp_path / folder, model, tokenizer, paraphraser="self", **wrong)
    wrapped = get_peft_model(sandbox.load_model(), LoraConfig(**LORA))
    with pytest.raises(ValueError, match="s3ft_vllm is true and model has an adapter; pass the plain model"):
        build(tmp_path / "4", wrapped, tokenizer, **options)


def test_vllm_that_is_missing_is_named(monkeypatch, tmp_path, model, tokenizer):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"s3ft_vllm is true, but vLLM does not import .*; pip install vllm, or leave"):
        build(tmp_path, model, tokenizer, s3ft_vllm=True)
    assert not (tmp_path / "_s3ft_data").exists()


# --- the kit: log-probabilities, sampling, purity -----------------------------------------------------------------


def test_log_probabilities_are_sums_in_nats(monkeypatch, tmp_path, model, tokenizer):
    monkeypatch.setattr(generation, "_SCORE_BUDGET", 40 * 100 * 3)  # so that a block is scored in several batches
    for row in build(tmp_path, model, tokenizer):
        for text, value in ((row["completion"], row["logp_target"]), (row["gold"], row["logp_gold"])):
            ids = tokenizer(row["prompt"] + text + tokenizer.eos_token, return_tensors="pt")["input_ids"]
            start = len(tokenizer(row["prompt"])["input_ids"])
            logits = model.double()(ids).logits[0]
            picked = logits.log_softmax(-1)[range(start - 1, ids.shape[1] - 1), ids[0, start:]]
            model.float()
            assert len(picked) == len(text) + 1  # its characters and EOS
            assert value == pytest.approx(picked.sum().item(), abs=1e-3)


def test_sampling_follows_the_nucleus_and_only_its_own_seed():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -6.0]])
    kept = torch.softmax(scores / 0.7, -1)[0, :3]
    expected = (kept / kept.sum()).numpy()  # .76, .18, .04: top_p .97 keeps these three of the five
    draws = [generation._SeededTopP([s], 0.7, 0.97)(None, scores).argmax().item() for s in range(4000)]
    shares = np.bincount(draws, minlength=5) / 4000
    assert shares[3:].sum() == 0 and np.abs(shares[:3] - expected).max() < 4 * np.sqrt(0.25 / 4000)
    alone = generation._SeededTopP([7], 0.7, 0.9)
    among = generation._SeededTopP([3, 7], 0.7, 0.9)
    for _ in range(3):
        assert torch.equal(alone(None, scores)[0], among(None, scores.repeat(2, 1))[1])


def test_more_candidates_are_tried_in_order_and_do_not_depend_on_the_block(monkeypatch, tmp_path, model, tokenizer):
    def judge(prompt, answer, gold):
        return D.judge(prompt, answer) and answer[0] in "0123"

    greedy = build(tmp_path / "1", model, tokenizer, judge=judge, paraphraser="none")
    state = torch.get_rng_state()
    several = build(tmp_path / "2", model, tokenizer, judge=judge, paraphraser="none", num_candidates=4)
    assert torch.equal(state, torch.get_rng_state())
    assert several["source"].count("self") > greedy["source"].count("self")
    assert [c for c, s in zip(several["completion"], greedy["source"], strict=True) if s == "self"] == [
        c for c, s in zip(greedy["completion"], greedy["source"], strict=True) if s == "self"
    ]
    other = build(
        tmp_path / "3", model, tokenizer, judge=judge, paraphraser="none", num_candidates=4, s3ft_batch_size=3
    )
    assert other["completion"] == several["completion"]
    reseeded = build(tmp_path / "4", model, tokenizer, judge=judge, paraphraser="none", num_candidates=4, s3ft_seed=1)
    assert reseeded["completion"] != several["completion"]


def snapshot(model):
    return {
        "weights": generation.fingerprint(model),
        "all": {n: t.clone() for n, t in model.state_dict().items()},
        "flags": [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()],
        "grads": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "settings": (id(model.generation_config), model.generation_config.to_dict(), model.config.to_dict()),
        "rng": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "grad": torch.is_grad_enabled(),
    }


def same(before, after):
    tensors, others = before.pop("all"), after.pop("all")
    return before == after and all(torch.equal(t, others[n]) for n, t in tensors.items())


@pytest.mark.parametrize("kind", ["plain", "peft", "add_adapter"])
@pytest.mark.parametrize("fails", [False, True])
def test_m0_is_left_as_it_was(tmp_path, model, tokenizer, kind, fails):
    """Train mode of single modules, checkpointing, requires_grad, generation config, weights and random state."""
    reference = build(tmp_path / "base", sandbox.load_model(), tokenizer)
    if kind == "peft":  # a random adapter: with it the answers are others
        model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False, lora_dropout=0.5))
    elif kind == "add_adapter":
        model.add_adapter(LoraConfig(**LORA, init_lora_weights=False))
    model.gradient_checkpointing_enable()
    model.train()
    next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp")).eval()
    next(p for n, p in model.named_parameters() if p.requires_grad).requires_grad_(False)
    model.generation_config.update(repetition_penalty=5.0)  # M0 answers greedily all the same
    before = snapshot(model)

    def watch(module, *_):
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()

    generation.base_model(model).register_forward_pre_hook(watch)
    if fails:
        with pytest.raises(ValueError, match="on row 'D00='"):
            build(tmp_path / "fails", model, tokenizer, judge=lambda prompt, answer, gold: 1 / 0)
    else:
        built = build(tmp_path / "works", model, tokenizer)
        assert built.to_list() == reference.to_list()
    assert same(before, snapshot(model))


def test_fingerprint_knows_the_base_model_under_an_adapter(model):
    plain = generation.fingerprint(model)
    wrapped = get_peft_model(sandbox.load_model(), LoraConfig(**LORA, modules_to_save=["lm_head"]))
    assert generation.fingerprint(wrapped) == plain
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert generation.fingerprint(model) != plain


def test_adapters_that_change_the_base_are_refused(tmp_path, model, tokenizer):
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa', which changes the base weights.*peft_config="):
        build(tmp_path, get_peft_model(model, LoraConfig(**LORA, init_lora_weights="pissa")), tokenizer)
    merged = get_peft_model(sandbox.load_model(), LoraConfig(**LORA))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged adapter"):
        build(tmp_path, merged, tokenizer)


# --- determinism and resumption -----------------------------------------------------------------------------------


def test_a_killed_build_goes_on_where_it_stopped(monkeypatch, tmp_path, model, tokenizer):
    calls = []

    def dies(prompt, answer, gold):
        calls.append(prompt)
        if prompt == D.prompts[8]:
            raise KeyboardInterrupt
        return D.judge(prompt, answer)

    dies.__module__, dies.__qualname__ = "test", "judge"

    def judge(prompt, answer, gold):
        return D.judge(prompt, answer)

    judge.__module__, judge.__qualname__ = "test", "judge"
    whole = build(tmp_path / "whole", model, tokenizer, judge=judge)
    assert build(tmp_path / "again", model, tokenizer, judge=judge).to_list() == whole.to_list()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", model, tokenizer, judge=dies)
    part = tmp_path / "killed" / "_s3ft_data" / "part-0.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    assert len(lines) == 2
    part.write_text(lines[0] + lines[1][:-20])  # killed in the middle of writing
    (part.parent / "part-1.jsonl").write_text('{"block": 2, "ro')  # of a process that this run has not
    sizes = counted(monkeypatch, model)
    assert build(tmp_path / "killed", model, tokenizer, judge=judge).to_list() == whole.to_list()
    assert sizes == [4, 2]
    assert build(tmp_path / "killed", model, tokenizer, judge=judge).to_list() == whole.to_list()
    assert sizes == [4, 2]  # read, not built


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"s3ft_max_new_tokens": 20}, "s3ft_max_new_tokens"),
        ({"paraphraser": "none"}, "paraphraser"),
        ({"judge": "exact"}, "judge"),
        ({"dataset": rows(9)}, "dataset"),
        ({"model": LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                                num_attention_heads=1))}, "model"),
    ],
)  # fmt: skip
def test_another_runs_data_are_refused(tmp_path, model, tokenizer, options, named):
    build(tmp_path, model, tokenizer)
    with pytest.raises(ValueError, match=rf"another run, which differs in {named}.*; give another s3ft_cache_dir"):
        build(**{"folder": tmp_path, "model": model, "tokenizer": tokenizer, **options})


def test_a_build_that_finished_nothing_binds_nobody(tmp_path, model, tokenizer):
    with pytest.raises(ValueError, match="raised ZeroDivisionError"):
        build(tmp_path, model, tokenizer, judge=lambda prompt, answer, gold: 1 / 0)
    assert len(build(tmp_path, model, tokenizer, s3ft_max_new_tokens=23)) == 10


def test_broken_cache_files_are_refused(tmp_path, model, tokenizer):
    folder = tmp_path / "_s3ft_data"
    whole = build(tmp_path, model, tokenizer)
    part, manifest = folder / "part-0.jsonl", folder / "manifest.json"
    text, header = part.read_text(), json.loads(manifest.read_text())
    part.write_text("no JSON\n" + text)
    with pytest.raises(ValueError, match=r"part-0.jsonl, line 1 is corrupt"):
        build(tmp_path, model, tokenizer)
    first, rest = text.split("\n", 1)
    part.write_text(json.dumps({**json.loads(first), "rows": []}) + "\n" + rest)
    with pytest.raises(ValueError, match="lacks block 0, or part of it"):
        build(tmp_path, model, tokenizer)
    part.write_text(text)
    for content, message in (
        ("{", "is not JSON"), (json.dumps({**header, "format": 2}), "has not format 1"), ("[]", "has not format 1"),
    ):  # fmt: skip
        manifest.write_text(content)
        with pytest.raises(ValueError, match=message):
            build(tmp_path, model, tokenizer)
    manifest.unlink()
    with pytest.raises(ValueError, match=r"without manifest.json; delete it"):
        build(tmp_path, model, tokenizer)
    shutil.rmtree(folder)
    assert build(tmp_path, model, tokenizer).to_list() == whole.to_list()


# --- the trainer --------------------------------------------------------------------------------------------------


def trainer(folder, model=None, tokenizer=None, dataset=None, cls=S3FTTrainer, extra=None, **options):
    extra = {"judge": D.judge, "paraphraser": oracle, **(extra or {})}
    return cls(
        model if model is not None else sandbox.load_model(),
        args=config(folder, **options),
        train_dataset=rows() if dataset is None else dataset,
        processing_class=tokenizer if tokenizer is not None else sandbox.load_tokenizer(),
        **extra,
    )


def weights(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


@pytest.mark.parametrize("form", ["text", "chat"])
def test_prompts_carry_no_loss_and_every_target_ends_in_eos(tmp_path, tokenizer, form):
    dataset, extra = rows(), {"paraphraser": lambda prompt, gold: oracle(prompt, gold) if "3" in gold else "no"}
    if form == "chat":
        user, golds, extra["judge"] = chat(tokenizer)
        dataset = Dataset.from_dict({"prompt": [[u] for u in user], "completion": [[g] for g in golds]})
    run = trainer(tmp_path, tokenizer=tokenizer, dataset=dataset, extra=extra)
    assert set(run.s3ft_dataset["source"]) == {"self", "paraphrase", "gold"}
    for row, built in zip(run.train_dataset, run.s3ft_dataset, strict=True):
        prompt, target = built["prompt"], built["completion"]
        if form == "chat":
            prompt, target = prompt[0]["content"], target[0]["content"]
        prompt_ids = tokenizer(prompt)["input_ids"]
        target_ids = tokenizer(target, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert row["input_ids"] == prompt_ids + target_ids
        assert row["labels"] == [-100] * len(prompt_ids) + target_ids


def test_trains_exactly_as_sft_on_the_built_data(tmp_path):
    ours = trainer(tmp_path / "a", extra={"peft_config": LoraConfig(**LORA)}, max_steps=3, learning_rate=1e-2)
    ours.train()
    shared = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "max_steps": 3,
              "save_strategy": "no", "learning_rate": 1e-2}  # fmt: skip
    theirs = SFTTrainer(
        sandbox.load_model(), args=SFTConfig(str(tmp_path / "b"), **shared), processing_class=sandbox.load_tokenizer(),
        train_dataset=ours.s3ft_dataset.select_columns(["prompt", "completion"]), peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    theirs.train()
    assert equal(weights(ours), weights(theirs))
    reused = trainer(tmp_path / "c", dataset=ours.s3ft_dataset, max_steps=3, learning_rate=1e-2,
                     extra={"judge": None, "peft_config": LoraConfig(**LORA)})  # fmt: skip
    reused.train()
    assert equal(weights(ours), weights(reused)) and not (tmp_path / "c" / "_s3ft_data").exists()


def test_accumulation_gives_the_same_step(tmp_path):
    found = []
    for batch, steps in ((8, 1), (2, 4)):
        run = trainer(tmp_path / str(batch), dataset=rows(8), max_steps=1, per_device_train_batch_size=batch,
                      gradient_accumulation_steps=steps, optim="sgd", learning_rate=0.5)  # fmt: skip
        assert run.loss_is_scaled_for_ga is True
        run.train()
        found.append(torch.cat([w.flatten() for w in weights(run).values()]))
    assert torch.allclose(*found, atol=1e-6)


def test_sources_are_logged_once_when_training_starts(tmp_path):
    run = trainer(tmp_path)
    run.train()
    first, *others = run.state.log_history
    sources = run.s3ft_dataset["source"]
    assert first["step"] == 0 and first["s3ft/frac_self"] == sources.count("self") / 10
    assert first["s3ft/frac_paraphrase"] == sources.count("paraphrase") / 10 and first["s3ft/frac_gold"] == 0
    gain = np.mean(np.array(run.s3ft_dataset["logp_target"]) - np.array(run.s3ft_dataset["logp_gold"]))
    assert first["s3ft/logp_gain"] == pytest.approx(gain) and gain > 5
    assert not any(k.startswith("s3ft/") for log in others for k in log)
    card = run.create_model_card() or (tmp_path / "README.md").read_text()
    assert "trained with S3FT" in card and "papers/2502.08130" in card and "- s3ft" in card


def test_a_run_resumes_bit_equal_and_reads_its_data(monkeypatch, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    extra = {"peft_config": LoraConfig(**LORA, lora_dropout=0.1)}
    straight = trainer(tmp_path, extra=extra, **options)
    straight.train()
    shutil.rmtree(tmp_path / "checkpoint-6")  # as if killed after step 3
    model = sandbox.load_model()
    sizes = counted(monkeypatch, model)
    resumed = trainer(tmp_path, model, extra=extra, **options)
    resumed.train(resume_from_checkpoint=True)
    assert sizes == [] and resumed.state.global_step == 6
    assert equal(weights(straight), weights(resumed))
    logs = [
        [{k: v for k, v in log.items() if "train_" not in k and k != "num_tokens"} for log in r.state.log_history]
        for r in (straight, resumed)
    ]
    assert logs[0] == logs[1]  # trl itself starts num_tokens at 0 again


def test_model_by_path_and_everything_from_the_config(tmp_path):
    options = {"judge": "exact", "judge_args": '{"ignore_case": false}', "paraphraser": "self", "max_steps": 1}
    run = S3FTTrainer(
        str(sandbox.path()),
        args=config(tmp_path, model_init_kwargs={"dtype": "float32"}, **options),
        train_dataset=rows(4),
        peft_config=LoraConfig(**LORA, init_lora_weights="pissa"),
    )
    run.train()
    assert run.args.model_init_kwargs == {"dtype": "float32"}
    manifest = json.loads((tmp_path / "_s3ft_data" / "manifest.json").read_text())
    assert manifest["judge"].endswith("ExactJudge(ignore_case=False, ignore_space=True, ignore_punctuation=False)")
    assert manifest["model"] == generation.fingerprint(sandbox.load_model())  # built before the adapter was put on


def test_packing_and_padding_free_keep_the_labels(tmp_path):
    plain = trainer(tmp_path / "1")
    packed = trainer(tmp_path / "2", packing=True, packing_strategy="wrapped", max_length=64)
    trained = [sum((l != -100) for row in run.train_dataset for l in row["labels"]) for run in (plain, packed)]
    assert trained[0] == trained[1] and len(packed.train_dataset) < len(plain.train_dataset)


# --- wrong input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"s3ft_max_new_tokens": 0}, ValueError, "s3ft_max_new_tokens is 0"),
        ({"s3ft_batch_size": "4"}, TypeError, "s3ft_batch_size is '4'"),
        ({"num_candidates": True}, TypeError, "num_candidates is True"),
        ({"paraphrase_attempts": 1.5}, TypeError, "paraphrase_attempts is 1.5"),
        ({"s3ft_seed": -1}, ValueError, "s3ft_seed is -1"),
        ({"judge_threshold": "high"}, TypeError, "judge_threshold is 'high'"),
        ({"judge_threshold": float("nan")}, ValueError, "judge_threshold is nan"),
        ({"judge": print}, TypeError, r"give a name here, an object to S3FTTrainer\(judge=\)"),
        ({"s3ft_cache_dir": 5}, TypeError, "s3ft_cache_dir is 5"),
        ({"judge_args": "tolerance"}, TypeError, "judge_args is 'tolerance'"),
        ({"s3ft_vllm": "yes"}, TypeError, "s3ft_vllm is 'yes'"),
        ({"s3ft_vllm": True, "s3ft_vllm_args": 5}, TypeError, "s3ft_vllm_args is 5; give options as a JSON object"),
        ({"s3ft_vllm_args": {"seed": 1}}, ValueError, "s3ft_vllm_args is .*, but s3ft_vllm is false; set it"),
        ({"no_paraphrase": 1}, TypeError, "no_paraphrase is 1"),
        ({"drop_failures": "no"}, TypeError, "drop_failures is 'no'"),
        ({"string_judge": None}, TypeError, "string_judge is None"),
        ({"no_paraphrase": True, "paraphrase_attempts": 2}, ValueError, "paraphrase_attempts is 2 and no_paraphrase"),
        ({"completion_only_loss": False}, ValueError, "completion_only_loss is False"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, ValueError, "skip_prepare_dataset"),
    ],
)
def test_wrong_settings(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"judge": None}, ValueError, "judge is missing; pass judge="),
        ({"judge": lambda prompt, answer, gold: None}, TypeError, "returned None on row 'D00='"),
        ({"judge_args": {"tolerance": 1}}, ValueError, "options go with a name"),
        ({"paraphraser": lambda prompt, gold: None}, TypeError, "returned None on row .*; return text"),
        ({"paraphraser": lambda prompt, gold: 1 / 0}, ValueError, "paraphraser .* raised ZeroDivisionError"),
        ({"paraphrase_attempts": 2}, ValueError, "paraphrase_attempts is 2, which only a model can use"),
        ({"dataset": rows(0)}, ValueError, "train_dataset is empty"),
        ({"dataset": [{"prompt": "a", "completion": "b"}]}, TypeError, "train_dataset is list"),
        ({"dataset": rows().to_iterable_dataset()}, TypeError, "train_dataset is IterableDataset"),
        ({"dataset": Dataset.from_dict({"text": ["a"]})}, ValueError, r"has the columns \['text'\]; S3FT needs"),
        ({"dataset": Dataset.from_dict({"prompt": ["a"], "completion": [None]})}, TypeError, "completion None"),
        ({"dataset": Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}]]})}, TypeError, "row 0"),
        ({"dataset": Dataset.from_list([*D.rows(D.prompts[:2]), *D.rows(D.prompts[:1])])}, ValueError, "id .* repeats"),
        ({"dataset": Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "id": [1.5]})}, TypeError, "id 1.5"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model is Linear"),
        ({"tokenizer": "gpt2"}, TypeError, "processing_class is str"),
    ],
)  # fmt: skip
def test_wrong_input(tmp_path, model, tokenizer, given, error, message):
    with pytest.raises(error, match=message) as caught:
        build(**{"folder": tmp_path, "model": model, "tokenizer": tokenizer, **given})
    assert "hfgen" in str(caught.traceback[-1].path)  # our own sentence, not a host's


@pytest.mark.parametrize(
    ("extra", "options", "error", "message"),
    [
        ({"formatting_func": str}, {}, ValueError, "formatting_func is given"),
        ({"judge": None}, {}, ValueError, "judge is missing"),
        ({}, {"eos_token": "<nope>"}, ValueError, "eos_token is '<nope>'"),
        ({}, {"chat_template_path": "gpt2"}, ValueError, "chat_template_path is 'gpt2'"),
        ({}, {"dataset": rows(0)}, ValueError, "train_dataset is empty"),
    ],
)
def test_wrong_trainer_input(tmp_path, extra, options, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path, extra=extra, **options)


def test_args_of_another_trainer_are_refused(tmp_path):
    with pytest.raises(TypeError, match="args is SFTConfig; pass an S3FTConfig"):
        S3FTTrainer("x", args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=rows(), judge="exact")


_JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(allow_nan=True), st.text(max_size=4),
    st.lists(st.integers(-1, 1), max_size=2), st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.sampled_from(["exact", "numeric", "self", "none", "{}", '{"a": 1}', "[1]"]),
)  # fmt: skip
_OWN = sorted({f.name for f in dataclasses.fields(S3FTConfig)} - {f.name for f in dataclasses.fields(SFTConfig)})


@given(options=st.dictionaries(st.sampled_from([*_OWN, "completion_only_loss"]), _JUNK, min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_random_configs_work_or_are_refused_by_us(options):
    try:
        made = S3FTConfig("out", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", **options)
    except (ValueError, TypeError) as exc:
        frame = traceback.extract_tb(exc.__traceback__)[-1].filename
        assert "/hfgen/" in frame or "/hfgen_plugins/" in frame, (options, exc, frame)
    else:
        assert made.s3ft_max_new_tokens >= 1 and made.completion_only_loss is True
