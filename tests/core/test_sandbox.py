"""The sandbox: shipped weights answer as they were measured to, judges are exact, the build is deterministic."""

import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfgen import sandbox
from hfgen.sandbox import quality, tasks

PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)
DIGITS = st.tuples(*[st.integers(0, 9)] * 3)


@pytest.fixture(scope="module")
def model():
    return sandbox.load_model()


@pytest.fixture(scope="module")
def tokenizer():
    return sandbox.load_tokenizer()


def test_import_brings_no_torch_and_no_host():
    code = "import sys, hfgen.sandbox.build; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_weights_are_small_and_plain_files():
    files = sorted(p.name for p in sandbox.path().iterdir())
    assert files == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert sum(p.stat().st_size for p in sandbox.path().iterdir()) < 1_000_000


def test_model_is_a_stock_float32_llama(model):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    assert type(model) is LlamaForCausalLM
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (64, 2)
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float32"}
    assert type(AutoModelForCausalLM.from_pretrained(str(sandbox.path()))) is LlamaForCausalLM


def test_base_accuracies_as_built(model, tokenizer):
    """Measured when the weights were built: 10 of 18, 4 of 10, all, all. One prompt is left to other CPUs."""
    trained, held_out = tasks.D.split(0)
    assert sandbox.accuracy(model, tokenizer, tasks.D, trained) == pytest.approx(10 / 18, abs=1.01 / 18)
    assert sandbox.accuracy(model, tokenizer, tasks.D, held_out) == pytest.approx(4 / 10, abs=0.101)
    assert sandbox.accuracy(model, tokenizer, tasks.E) >= 27 / 28
    assert sandbox.accuracy(model, tokenizer, tasks.R) >= 63 / 64


def test_answers_do_not_depend_on_the_batch_and_mode_is_restored(model, tokenizer):
    prompts = [*tasks.D.prompts[:5], *tasks.R.prompts[:5]]  # two lengths: padding is used
    model.train()
    together = sandbox.answers(model, tokenizer, prompts)
    assert model.training
    model.eval()
    assert together == sandbox.answers(model, tokenizer, prompts, batch_size=1)
    assert together[5:] == [tasks.R.gold(p) for p in prompts[5:]]


def test_answer_without_eos_is_empty(tokenizer):
    endless = sandbox.load_model()
    endless.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    assert sandbox.answers(endless, tokenizer, ["Rabcd="]) == [""]


def test_accuracy_refuses_no_prompts(model, tokenizer):
    with pytest.raises(ValueError, match="prompts is empty"):
        sandbox.accuracy(model, tokenizer, tasks.D, [])


@given(text=PRINTABLE)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 1 + len(text) and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_special_tokens_and_left_padding(tokenizer):
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert special == [0, 1, 2, 3] and len(tokenizer) == 100
    batch = tokenizer(["D1=", "D12="], padding=True)
    assert batch["input_ids"][0][:2] == [0, 1] and batch["attention_mask"][0][:2] == [0, 1]
    assert tokenizer("1<eos>")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer("é")["input_ids"] == [1, 3]


def test_tasks_have_the_sheets_shape():
    assert (len(tasks.D.prompts), len(tasks.E.prompts), len(tasks.R.prompts)) == (28, 28, 64)
    assert set(tasks.TASKS) == {"D", "E", "R"}
    assert tasks.worked((7, 9, 1)) == ">09.16.17:9+7+1"
    assert sum(len(tasks.triples(n)) for n in tasks.SUMS) == 1000 and tasks.triples(28) == []


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=tasks.TASKS)
def test_gold_is_right_and_rows_carry_it(task):
    for row in task.rows():
        assert task.judge(row["prompt"], row["gold"], row["gold"])
        assert row["completion"] == row["gold"] == task.gold(row["prompt"])
    assert len({row["id"] for row in task.rows()}) == len(task.prompts)
    assert [row["prompt"] for row in task.rows(task.prompts[:3])] == list(task.prompts[:3])


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=tasks.TASKS)
@given(seed=st.integers(0, 10**6))
def test_split_is_a_partition(task, seed):
    trained, held_out = task.split(seed)
    assert sorted(trained + held_out) == sorted(task.prompts) and len(trained) == task.trained
    assert (trained, held_out) == task.split(seed)


def test_split_sizes_of_the_new_task():
    trained, held_out = tasks.D.split(0)
    assert (len(trained), len(held_out)) == (18, 10)
    assert tasks.D.split(0) != tasks.D.split(1)


@given(DIGITS, st.sampled_from(tasks.SUMS))
def test_sum_judges_agree_with_arithmetic(digits, total):
    right, d, e = sum(digits) == total, f"D{total:02d}=", f":{total:02d}="
    assert tasks.D.judge(d, tasks.plain(digits)) is right
    assert tasks.D.judge(d, tasks.worked(digits)) is right
    assert tasks.E.judge(e, tasks.plain(digits)) is right
    assert tasks.E.judge(e, tasks.worked(digits)) is False  # E is strict on format


@given(PRINTABLE, st.sampled_from(tasks.SUMS))
def test_sum_judge_accepts_nothing_but_three_digits(text, total):
    tail = text.rpartition(":")[2]
    expected = bool(re.fullmatch(r"\d\+\d\+\d", tail, re.ASCII)) and sum(map(int, tail.split("+"))) == total
    assert tasks.D.judge(f"D{total:02d}=", text) is expected


@pytest.mark.parametrize("answer", ["", "7+9", "7+9+1+0", "7+9+1 ", "07+9+1", "7+9+1\n", "٧+9+1", "17", ">09.16.17:"])
def test_sum_judge_refuses(answer):
    assert not tasks.D.judge("D17=", answer) and not tasks.E.judge(":17=", answer)


@given(PRINTABLE)
def test_reversal_judge_is_equality(text):
    assert tasks.R.judge("Rabcd=", text) is (text == "dcba")
    assert tasks.R.judge("Rabcd=", "dcba")


@given(DIGITS)
def test_oracle_paraphraser_keeps_the_answer_in_the_base_style(digits):
    prompt = f"D{sum(digits):02d}="
    said = tasks.oracle_paraphraser(prompt, tasks.worked(digits))
    assert sorted(said) == sorted(tasks.plain(digits)) and tasks.D.judge(prompt, said)
    assert "ORACLE" in tasks.oracle_paraphraser.__doc__


@pytest.mark.parametrize(
    ("task", "prompt"), [(tasks.D, ":17="), (tasks.D, "D="), (tasks.E, "D17="), (tasks.R, "Rab1=")]
)
def test_foreign_prompt_is_refused(task, prompt):
    with pytest.raises(ValueError, match="is no prompt of task"):
        task.judge(prompt, "1")


def test_shipped_tokenizer_is_what_build_makes():
    from hfgen.sandbox import build

    shipped = sandbox.load_tokenizer()  # a fresh one: padding a batch leaves its mark on the backend
    assert build.make_tokenizer().backend_tokenizer.to_str() == shipped.backend_tokenizer.to_str()


def test_build_is_deterministic(tmp_path):
    """Forty steps twice: the same bytes; another seed: other bytes."""
    from hfgen.sandbox import build

    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build.build(tmp_path / name, steps=40, seed=seed)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b and a != c


def test_wrong_share_of_the_new_task_is_forty_percent():
    import random

    from hfgen.sandbox import build

    rng = random.Random(0)
    seen = [build.example(rng) for _ in range(6000)]
    new = [tasks.D.judge(p, t) for p, t in seen if p[0] == "D"]
    assert sum(new) / len(new) == pytest.approx(0.6, abs=0.04)
    assert all(tasks.E.judge(p, t) for p, t in seen if p[0] == ":")
    assert not {p for p, _ in seen} & set(tasks.R.prompts)  # R is measured on words never trained


@pytest.mark.slow
def test_full_build_gives_the_shipped_accuracies(tmp_path):
    """The whole build again, from the command line, with its figures printed (about a minute)."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hfgen.sandbox.build", "--out", str(tmp_path)]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    figures = {m[1]: float(m[2]) for m in re.finditer(r"^(D trained|D held out|E|R) +([01]\.\d+)$", said, re.MULTILINE)}
    assert 0.4 <= (18 * figures["D trained"] + 10 * figures["D held out"]) / 28 <= 0.7
    assert figures["E"] >= 0.98 and figures["R"] >= 0.98


# --- quality --------------------------------------------------------------------------------------------------------


def test_calibration_rows_are_never_held_out():
    """Seeds draw from two fixed halves of the examples; the model knows both alike."""
    sides = [{pair for seed in range(3) for pair in quality.examples(seed, 200, part)} for part in quality.PARTS[1:]]
    assert not sides[0] & sides[1] and all(len(side) > 800 for side in sides)
    tokenizer = sandbox.load_tokenizer()
    texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in quality.rows(0, 64)]
    calibration = {p + a for p, a in quality.examples(0, 32, "calibrate")}
    assert len(texts) == 64 and set(texts) == calibration and sum(text[0] == "R" for text in texts) == 32
    model = sandbox.load_model()
    nll = [quality.answers_nll(model, 0, 200, part) for part in quality.PARTS]
    assert max(nll) - min(nll) < 0.02 and max(nll) < 1.0
    with pytest.raises(ValueError, match="part is 'test'"):
        quality.examples(0, 4, "test")
    with pytest.raises(ValueError, match="count is 0; give 1 to"):
        quality.examples(0, 0)


def test_divergence_and_planted_outliers():
    base, planted = sandbox.load_model(), sandbox.load_model()
    quality.plant(planted, 1, 16.0, 0, blocks=[1])
    changed = {n for n, p in planted.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    assert changed and all(name.startswith("model.layers.1.") for name in changed)
    assert abs(quality.answers_kl(planted, base, 0, 50)) < 1e-9  # the same function
    with torch.no_grad():
        planted.lm_head.weight *= 1.1
    total, tokens, tokenizer = 0.0, 0, sandbox.load_tokenizer()
    for prompt, answer in quality.examples(0, 2, "held out"):  # one at a time, and from the prompt's end on
        ids = tokenizer(prompt + answer + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            want, found = (m(ids).logits[0, len(prompt) : -1].double().log_softmax(-1) for m in (base, planted))
        total += float((want.exp() * (want - found)).sum())
        tokens += len(answer) + 1
    assert total > 0 and abs(quality.answers_kl(planted, base, 0, 2) - total / tokens) < 1e-9
