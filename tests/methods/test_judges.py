"""Judges and paraphrasers: oracle values, hostile input, and the contract of the kit's helpers."""

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfgen.catalog import CatalogError
from hfgen.judges import ExactJudge, NumericJudge
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
