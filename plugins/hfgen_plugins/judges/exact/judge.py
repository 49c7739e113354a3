"""Exact match after normalisation."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, fields
from typing import Any

from hfgen.kit import checks


@dataclass(frozen=True)
class ExactJudge:
    """`judge(prompt, answer, gold, **columns) -> bool`: equal texts.

    Args:
        ignore_case: Compare case-folded.
        ignore_space: Compare with every run of white space as one space and none at the ends.
        ignore_punctuation: Drop Unicode punctuation first.

    Raises:
        TypeError: an option is not a bool; when called, the answer or the gold is not text.
    """

    ignore_case: bool = True
    ignore_space: bool = True
    ignore_punctuation: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            checks.boolean("ExactJudge", field.name, getattr(self, field.name))

    def __call__(self, prompt: Any, answer: str, gold: str, **columns: Any) -> bool:
        return self.normalise(answer) == self.normalise(gold)

    def normalise(self, text: str) -> str:
        if not isinstance(text, str):
            raise TypeError(f"judge exact compares texts, not {text!r}; give answers and gold as strings")
        text = unicodedata.normalize("NFC", text)
        if self.ignore_punctuation:
            text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
        if self.ignore_case:
            text = text.casefold()
        return " ".join(text.split()) if self.ignore_space else text
