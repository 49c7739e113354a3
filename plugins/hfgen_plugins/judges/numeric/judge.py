"""The final number of a text, read by a regular expression and kept as a fraction. Nothing is ever evaluated."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from hfgen.kit import checks

_TAIL = 4000  # characters of a text that are looked at, from its end: bounds the time on hostile input
_LONGEST, _LARGEST_EXPONENT = 64, 400  # so that "10**10**10" or "1e999999999" costs nothing

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    # a sign only where it cannot be a minus between two terms ("7-3" ends in 3, not in -3)
    r"(?P<sign>(?<![\w)\]}])[-+\u2212])?(?:\\?[$\u20ac\u00a3]\s?)?"
    rf"(?:\\[dt]?frac\s?\{{(?P<top>[-+]?\d+)\}}\s?\{{(?P<bottom>\d+)\}}"
    rf"|(?P<value>{_DECIMAL})(?:[eE](?P<exponent>[-+]?\d+)|\s?/\s?(?P<over>{_DECIMAL})(?!\s?/))?)",
    re.ASCII,
)


def final_number(text: str) -> Fraction | None:
    """The number a text ends in, exactly, or None.

    What follows the last `####` counts, else what the last `\\boxed{}` holds, else the whole text; of that, the last
    number: `1,000`, `$5`, `-3`, `.5`, `3/4`, `\\frac{3}{4}`, `1.5e3`. Per cent signs and units are ignored.
    """
    tail = text[-_TAIL:]
    if "####" in tail:
        tail = tail.rpartition("####")[2]
    elif "\\boxed" in tail:
        tail = _braced(tail.rpartition("\\boxed")[2])
    numbers = list(_NUMBER.finditer(tail))
    return _fraction(numbers[-1]) if numbers else None


def _braced(text: str) -> str:
    """The content of the braces `text` starts with, nested ones included; all of it when they never close."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:i] if i else text  # "\\boxed 5" has no braces
    return text


def _fraction(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _LONGEST or abs(int(match["exponent"] or 0)) > _LARGEST_EXPONENT:
        return None
    try:
        if match["top"]:
            value = Fraction(int(match["top"]), int(match["bottom"]))
        else:
            value = Fraction(match["value"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
            value /= Fraction((match["over"] or "1").replace(",", ""))
    except ZeroDivisionError:
        return None
    return -value if (match["sign"] or "").startswith(("-", "\u2212")) else value


@dataclass(frozen=True)
class NumericJudge:
    """`judge(prompt, answer, gold, **columns) -> bool`: the final numbers are equal.

    `gold` may be text or a number. An answer without a number is wrong.

    Args:
        tolerance: Largest relative difference that still counts as equal; 0 compares exactly.

    Raises:
        TypeError: `tolerance` is not a number.
        ValueError: `tolerance` is negative or not finite; when called, the gold answer holds no number.
    """

    tolerance: float = 0.0

    def __post_init__(self) -> None:
        checks.number("NumericJudge", "tolerance", self.tolerance)
        if self.tolerance < 0:
            raise ValueError(f"NumericJudge.tolerance is {self.tolerance}; give 0 or more")

    def __call__(self, prompt: Any, answer: str, gold: str | float, **columns: Any) -> bool:
        expected = final_number(str(gold))
        if expected is None:
            raise ValueError(
                f"the gold answer {str(gold)[:80]!r} holds no number; judge numeric needs one in every row"
            )
        given = final_number(answer)
        return given is not None and abs(given - expected) <= Fraction(self.tolerance) * abs(expected)
