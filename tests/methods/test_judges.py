"""Judges and paraphrasers: oracle values, hostile input, and the contract of the kit's helpers."""

import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from hfgen import sandbox
from hfgen.catalog import CatalogError
from hfgen.judges import ExactJudge, F1Judge, LLMJudge, NumericJudge, token_f1
from hfgen.kit import judging
from hfgen.paraphrasers import SelfRewrite
from hfgen_plugins.judges.numeric import final_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 42.", 42),
        ("8 x 3 = 24\n#### 24", 24),
        ("#### 1,234,567", 1234567),
        ("#### 18 because 7 were left", 7),  # the last number of what follows the mark
        ("so \\boxed{5} and then 7 more words", 5),
        ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
        ("\\boxed{\\text{about } 12}", 12),
        ("\\boxed 9", 9),
        ("she pays $5", 5),
        ("she pays -$5.50", Fraction(-11, 2)),
        ("\\$1,000.00", 1000),
        ("it is 3/4", Fraction(3, 4)),
        ("-.5", Fraction(-1, 2)),
        ("1.5e3", 1500),
        ("2E-2", Fraction(1, 50)),
        ("7-3", 3),
        ("= \u22123", -3),
        ("about 50%", 50),
        ("1/0", None),
        ("10**10**10", 10),  # read, not evaluated
        ("no number", None),
        ("", None),
        ("1e999999999", None),
        ("9" * 100_000, None),
    ],
)
def test_final_number(text, expected):
    assert final_number(text) == expected


@given(st.text(alphabet="0123456789.,+-/eE$#{}\\boxedfrac*() \n", max_size=300))
def test_final_number_never_fails(text):
    value = final_number(text)
    assert value is None or isinstance(value, Fraction)


@given(st.integers(-(10**12), 10**12))
def test_written_forms_of_a_number_agree(n):
    for form in (f"{n}", f"{n:,}", f"{n}.0", f"answer: {n} apples", f"work 1+1\n#### {n:,}", f"\\boxed{{{n}}}"):
        assert final_number(form) == n, form


def test_hostile_text_is_read_in_no_time():
    started = time.process_time()
    for text in ("1," * 200_000, "9" * 400_000, "\\boxed{" * 100_000, "1e" * 200_000, "$-" * 200_000, "1/" * 200_000):
        final_number(text)
    assert time.process_time() - started < 2


def test_numeric_judge():
    judge = NumericJudge()
    assert judge("q", "so it is $1,000.", "#### 1000") is True
    assert judge("q", "1001", "1000") is False
    assert judge("q", "no idea", "1000") is False
    assert judge("q", "0.5", 0.5, other=1) is True
    assert NumericJudge(tolerance=0.01)("q", "1005", "1000") is True
    with pytest.raises(ValueError, match="gold answer 'unknown' holds no number"):
        judge("q", "5", "unknown")
    with pytest.raises(TypeError, match="tolerance is '1'"):
        NumericJudge(tolerance="1")
    with pytest.raises(ValueError, match="tolerance is -1"):
        NumericJudge(tolerance=-1)


def test_exact_judge():
    assert ExactJudge()("q", " The  CAT ", "the cat") is True
    assert ExactJudge()("q", "the cat.", "the cat") is False
    assert ExactJudge(ignore_punctuation=True)("q", "the cat.", "the cat") is True
    assert ExactJudge(ignore_case=False)("q", "The", "the") is False
    assert ExactJudge(ignore_space=False)("q", "a ", "a") is False
    assert ExactJudge()("q", "caf\u00e9", "cafe\u0301") is True
    with pytest.raises(TypeError, match="compares texts"):
        ExactJudge()("q", "5", 5)
    with pytest.raises(TypeError, match="ignore_case is 'yes'"):
        ExactJudge(ignore_case="yes")


# --- f1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("The Normans", "normans", 1),
        ("in the 10th and 11th centuries", "10th and 11th centuries", 8 / 9),  # 4 of 5 and of 4 words
        ("Denmark, Iceland", "Denmark, Iceland and Norway", 2 * 2 / (2 + 4)),
        ("yes yes yes", "yes", 2 * 1 / (3 + 1)),  # each word counts as often as both have it
        ("a cat", "an cat", 1),
        ("anthem", "them", 0),  # "an" is an article only as a word
        ("U.S.", "us", 1),
        ("", "", 1),
        ("the", "", 1),  # nothing is left of either
        ("", "word", 0),
        ("word", "...", 0),
        ("one", "two", 0),
    ],
)
def test_token_f1(answer, gold, expected):
    assert token_f1(answer, gold) == pytest.approx(expected, abs=1e-15)


_TEXTS = st.lists(st.sampled_from(["a", "the", "cat", "Dog", "dog.", "!", "7"]), max_size=8).map(" ".join)


@given(_TEXTS, _TEXTS)
def test_token_f1_is_symmetric_and_bounded(one, other):
    value = token_f1(one, other)
    assert value == token_f1(other, one) and 0 <= value <= 1 and token_f1(one, one.upper()) == 1


def test_f1_judge():
    assert F1Judge()("q", "the cat sat here", "the cat sat there") is False
    assert F1Judge(threshold=0.6)("q", "the cat sat here", "the cat sat there", other=1) is True
    assert F1Judge(threshold=None)("q", "cat sat here", "cat sat there") == pytest.approx(2 / 3)
    assert F1Judge()("q", "Paris", ["Rome", "paris."]) is True
    with pytest.raises(ValueError, match="list of gold answers is empty"):
        F1Judge()("q", "Paris", [])
    for answer, gold in ((None, "a"), ("a", 5), ("a", ["b", None])):
        with pytest.raises(TypeError, match="judge f1 compares texts, not"):
            F1Judge()("q", answer, gold)
    for wrong, error in ((0, ValueError), (1.5, ValueError), ("0.5", TypeError), (True, TypeError)):
        with pytest.raises(error, match="F1Judge.threshold is"):
            F1Judge(threshold=wrong)


# --- llm ----------------------------------------------------------------------------------------------------------


class Scripted(LlamaForCausalLM):
    """A model that writes what `reply` makes of the text so far, one character a step."""

    def say(self, tokenizer, reply):
        self.tokenizer, self.reply, self.batches = tokenizer, reply, []
        return self

    def forward(self, input_ids=None, **options):
        output = super().forward(input_ids=input_ids, **options)
        if input_ids.shape[1] > 1:  # prompts; afterwards one token a step
            texts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
            self.batches.append(len(texts))
            self.step, self.plans = 0, [self.plan(self.reply(t)) for t in texts]
        wanted = torch.tensor([p[min(self.step, len(p) - 1)] for p in self.plans])
        output.logits = torch.nn.functional.one_hot(wanted, self.config.vocab_size).float()[:, None]
        self.step += 1
        return output

    def plan(self, text):
        ended, ids = text.endswith("#"), self.tokenizer(text.rstrip("#"), add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id] if not ended else ids * 9  # "#": does not end


def scripted(reply, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    tokenizer = sandbox.load_tokenizer()
    model = Scripted(config).eval().say(tokenizer, reply)
    return LLMJudge(model, tokenizer, **{"template": "{question}|{gold}|{answer}", "cue": "|", **options})


def test_llm_judge_reads_yes_and_no():
    asked = []

    def reply(text):
        asked.append(text)
        _, gold, answer, _ = text.split("|")
        return "Yes." if gold in answer else "no"

    judge = scripted(reply, batch_size=2)
    assert judge("2+2?", "it is four", "four") is True and judge("2+2?", "it is five", "four", column=1) is False
    assert asked == ["2+2?|four|it is four|", "2+2?|four|it is five|"]
    calls = [("q", f"{n}", str(n % 2), {}, n) for n in range(5)]
    assert judging.scores(judge, calls) == [1, 1, 0, 0, 0]
    assert judge.model.batches == [1, 1, 2, 2, 1] and judge.judged == 7 and judge.unparsable == 0
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "{gold}"}]
    assert judge(chat, "{answer} x", "x") is True and asked[-1].endswith("user: {gold}|x|{answer} x|")  # filled in once
    assert not judge.model.training and judge.model.generation_config.max_new_tokens is None


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("yes", True), ("YES!", True), (" yes ", True), ("No.", False), ("yes, but", None), ("yes no", None), ("", None),
        ("yes#", None), ("maybe", None), ("yess", None), ("not", None), ("It is the same: yes", None), ("1", None),
    ],
)  # fmt: skip
def test_llm_judge_takes_nothing_but_yes_for_yes(reply, verdict):
    judge = scripted(lambda text: reply)
    assert judge("q", "a", "g") is (verdict is True)
    assert judge.judged == 1 and judge.unparsable == (verdict is None)


def test_llm_judge_of_the_sandbox_says_nothing_that_counts(tmp_path):
    """A real model by path: it adds numbers, so no reply is a verdict, and each is counted."""
    judge = judging.resolve_judge("llm", {"model": str(sandbox.path()), "model_kwargs": {"dtype": "float32"}})
    verdicts = judging.scores(judge, [(p, "1", "1", {}, p) for p in sandbox.tasks.D.prompts[:3]])
    assert verdicts == [0, 0, 0] and judge.judged == judge.unparsable == 3
    described = judging.describe(judge)
    assert judging.describe(judge) == described  # counters do not show
    again = LLMJudge(sandbox.load_model())
    assert again.tokenizer.vocab_size == 100 and judging.describe(again) == described
    with torch.no_grad():
        again.model.lm_head.weight[0, 0] += 1
    other = LLMJudge(again.model, template="{gold}{answer}")
    assert judging.describe(other) != described and f"weights={judge.digest[:16]}" not in judging.describe(other)


def test_llm_judge_uses_a_chat_template():
    judge = scripted(lambda text: "yes")
    judge.tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
    seen = []
    judge.model.reply = lambda text: seen.append(text) or "yes"
    assert judge("q", "a", "g") and seen == ["<user>q|g|a>>"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"template": "same?"}, ValueError, "LLMJudge.template is 'same\\?'; put {gold} and {answer}"),
        ({"template": 5}, TypeError, "LLMJudge.template is 5"),
        ({"cue": None}, TypeError, "LLMJudge.cue is None"),
        ({"max_new_tokens": 0}, ValueError, "LLMJudge.max_new_tokens is 0"),
        ({"batch_size": 1.5}, TypeError, "LLMJudge.batch_size is 1.5"),
        ({"model_kwargs": [1]}, TypeError, "LLMJudge.model_kwargs is \\[1\\]"),
        ({"model_kwargs": {"dtype": "auto"}}, ValueError, "model_kwargs is .*, but the model is made already"),
    ],
)
def test_llm_judge_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        scripted(str, **options)


def test_llm_judge_wrong_input():
    with pytest.raises(TypeError, match="model is Linear; pass a transformers model that generates"):
        LLMJudge(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="'llm' does not take"):
        judging.resolve_judge("llm", {"modell": "x"})
    judge = scripted(str)
    for name, answer, gold in (("answer", None, "g"), ("gold", "a", 5)):
        with pytest.raises(TypeError, match=f"judge llm reads texts, but the {name} is"):
            judge("q", answer, gold)
    judge.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the judge's tokenizer has no eos_token"):
        LLMJudge(judge.model, judge.tokenizer)


# --- the kit ------------------------------------------------------------------------------------------------------


def test_resolve_judge():
    assert judging.resolve_judge("numeric", {"tolerance": 0.5}) == NumericJudge(tolerance=0.5)
    own = ExactJudge()
    assert judging.resolve_judge(own) is own
    with pytest.raises(ValueError, match="judge is missing; pass judge='exact'"):
        judging.resolve_judge(None)
    with pytest.raises(CatalogError, match="did you mean 'numeric'"):
        judging.resolve_judge("numerik")
    with pytest.raises(TypeError, match="'numeric' does not take"):
        judging.resolve_judge("numeric", {"tolerence": 1})
    with pytest.raises(ValueError, match="options go with a name"):
        judging.resolve_judge(own, {"ignore_case": False})
    for wrong in (5, ExactJudge):
        with pytest.raises(TypeError, match="judge is"):
            judging.resolve_judge(wrong)


def test_resolve_paraphraser():
    assert judging.resolve_paraphraser(None) is None and judging.resolve_paraphraser("none") is None
    assert judging.resolve_paraphraser("self") == SelfRewrite()
    assert isinstance(SelfRewrite(), judging.PromptRewriter) and not callable(SelfRewrite())
    with pytest.raises(CatalogError, match="no installed method is called 'oracle'"):
        judging.resolve_paraphraser("oracle")
    with pytest.raises(ValueError, match="options go with a name"):
        judging.resolve_paraphraser("none", {"template": "{answer}"})
    with pytest.raises(TypeError, match="paraphraser is 5"):
        judging.resolve_paraphraser(5)


@pytest.mark.parametrize(("verdict", "expected"), [(True, 1.0), (np.False_, 0.0), (0.25, 0.25), (np.float32(1), 1.0)])
def test_score(verdict, expected):
    assert judging.score(lambda prompt, answer, gold: verdict, "q", "a", "g", {}, 0) == expected


def test_score_errors_name_the_row():
    def raises(prompt, answer, gold):
        raise KeyError("tests")

    with pytest.raises(ValueError, match=r"raises raised KeyError: 'tests' on row 'r7'") as caught:
        judging.score(raises, "q", "a", "g", {}, "r7")
    assert isinstance(caught.value.__cause__, KeyError)
    for verdict in (None, "yes", [True]):
        with pytest.raises(TypeError, match=r"on row 3; a judge returns a bool or a float"):
            judging.score(lambda prompt, answer, gold, v=verdict: v, "q", "a", "g", {}, 3)
    with pytest.raises(ValueError, match="NaN on row 3"):
        judging.score(lambda *a, **k: float("nan"), "q", "a", "g", {}, 3)


def test_a_judge_gets_the_columns_it_names():
    columns = {"tests": "t", "other": "o"}
    assert judging.score(lambda prompt, answer, gold, tests: tests == "t", 1, 2, 3, columns, 0) == 1
    assert judging.score(lambda prompt, answer, gold, **all: all == columns, 1, 2, 3, columns, 0) == 1
    assert judging.score(lambda prompt, answer, gold: True, 1, 2, 3, {"gold": 1}, 0) == 1


def test_describe_tells_options_and_owners_apart():
    assert judging.describe(ExactJudge()) != judging.describe(ExactJudge(ignore_case=False))
    assert judging.describe(test_score) == f"{__name__}.test_score"
    assert "0x" not in judging.describe(object()) and judging.describe(None) == "None"
    one, other = (judging.describe(ExactJudge(ignore_case=flag).normalise) for flag in (True, False))
    assert one != other


def test_self_rewrite_keeps_the_form_of_the_prompt():
    rewrite = SelfRewrite()
    text = rewrite.prompt("What is {answer}?", "It is {question}: 4.")
    assert "Question: What is {answer}?\nAnswer: It is {question}: 4." in text and text.endswith(rewrite.cue)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    (message,) = rewrite.prompt(turns, "4")
    assert message["role"] == "user" and message["content"].endswith("Question: 2+2?\nAnswer: 4")
    long = [*turns, {"role": "assistant", "content": "4"}, {"role": "user", "content": "sure?"}]
    assert "user: 2+2?\nassistant: 4\nuser: sure?" in rewrite.prompt(long, "yes")[0]["content"]
    with pytest.raises(ValueError, match="put {answer} where"):
        SelfRewrite(template="Rewrite this")
    with pytest.raises(TypeError, match="cue is 5"):
        SelfRewrite(cue=5)
