"""Token F1 after SQuAD's normalisation: lower case, no ASCII punctuation, no articles, words split at white space."""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hfgen.kit import checks

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def words(text: str) -> list[str]:
    """The normalised words of a text.

    Raises:
        TypeError: not text.
    """
    if not isinstance(text, str):
        raise TypeError(f"judge f1 compares texts, not {text!r}; give answers and gold as strings")
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def token_f1(answer: str, gold: str) -> float:
    """2PR / (P + R) in [0, 1] over the multisets of words; where one has none, 1 if both have none and else 0."""
    given, expected = words(answer), words(gold)
    if not given or not expected:
        return float(given == expected)
    shared = sum((Counter(given) & Counter(expected)).values())
    return 2 * shared / (len(given) + len(expected))


@dataclass(frozen=True)
class F1Judge:
    """`judge(prompt, answer, gold, **columns)`: the best token F1 with the gold answer, or with one of a list of them.

    Args:
        threshold: An F1 from here on is right, and the judge gives a bool. None gives the F1 itself, a float in [0, 1].

    Raises:
        TypeError: `threshold` is no number; when called, an answer or gold is not text.
        ValueError: `threshold` is not above 0 and up to 1; when called, the list of gold answers is empty.
    """

    threshold: float | None = 0.8

    def __post_init__(self) -> None:
        if self.threshold is not None:
            checks.number("F1Judge", "threshold", self.threshold, low=0.0, high=1.0)

    def __call__(self, prompt: Any, answer: str, gold: str | list[str], **columns: Any) -> bool | float:
        golds = gold if isinstance(gold, list | tuple) else [gold]
        if not golds:
            raise ValueError("the list of gold answers is empty; judge f1 needs one in every row")
        best = max(token_f1(answer, g) for g in golds)
        return best if self.threshold is None else best >= self.threshold
