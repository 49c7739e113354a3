"""Checks of config fields. Each raises one sentence that names the field, the value and the fix."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable
from typing import Any


def one_of(owner: str, field: str, value: Any, allowed: Collection[Any]) -> None:
    """`value` must equal one of `allowed` and have its type (True does not pass for 1)."""
    if any(type(value) is type(a) and value == a for a in allowed):
        return
    close = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1) if isinstance(value, str) else []
    hint = f"did you mean {close[0]!r}?" if close else f"give one of {', '.join(map(repr, allowed))}"
    raise ValueError(f"{owner}.{field} is {value!r}; {hint}")


def integer(owner: str, field: str, value: Any, low: int | None = None) -> None:
    """`value` must be an int (not a bool) of at least `low`."""
    need = "an integer" if low is None else f"an integer of at least {low}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}.{field} is {value!r} ({type(value).__name__}); give {need}")
    if low is not None and value < low:
        raise ValueError(f"{owner}.{field} is {value}; give {need}")


def number(owner: str, field: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """`value` must be a finite number with low < value <= high."""
    need = (
        f"a finite number above {low:g} and up to {high:g}" if low > -math.inf or high < math.inf else "a finite number"
    )
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{owner}.{field} is {value!r} ({type(value).__name__}); give {need}")
    if not (math.isfinite(value) and low < value <= high):
        raise ValueError(f"{owner}.{field} is {value}; give {need}")


def boolean(owner: str, field: str, value: Any) -> None:
    """`value` must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}.{field} is {value!r} ({type(value).__name__}); give True or False")


def names(owner: str, field: str, value: Any, optional: bool = True) -> None:
    """`value` must be a string or a collection of strings (or None)."""
    if isinstance(value, str) or (value is None and optional):
        return
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"{owner}.{field} is {value!r} ({type(value).__name__}); give a string or a list of strings")


def known_options(owner: str, given: Iterable[str], allowed: Collection[str]) -> None:
    """Every keyword must be a known option; worded as dataclasses do, which peft's loader reads."""
    for option in given:
        if option not in allowed:
            close = difflib.get_close_matches(option, allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"options are {', '.join(sorted(allowed))}"
            raise TypeError(f"{owner}() got an unexpected keyword argument {option!r}; {hint}")
