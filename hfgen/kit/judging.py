"""Judges and paraphrasers: how a name or a callable becomes one, and how a verdict is read.

A *judge* is `judge(prompt, answer, gold, **columns) -> bool | float`: `prompt` in the dataset's own form (text or list
of messages), `answer` and `gold` text, `columns` the row's other columns. It may have `.many(calls)` too, which gives
the verdicts of several (prompt, answer, gold, columns) at once. A *paraphraser* is either a callable
`paraphraser(prompt, gold, **columns) -> str` that returns the rewritten answer, or an object with
`.prompt(prompt, gold) -> prompt` that returns what the model itself shall answer.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hfgen import catalog

Judge = Callable[..., bool | float]


@runtime_checkable
class PromptRewriter(Protocol):
    """A paraphraser that lets the model do the work: it gives the prompt, in the form it was given one."""

    def prompt(self, prompt: Any, gold: str) -> Any: ...


Paraphraser = Callable[..., str] | PromptRewriter


def _from_catalog(name: str, kind: str, options: Mapping[str, Any]) -> Any:
    try:
        return catalog.load(name, kind=kind)(**options)
    except TypeError as exc:  # an unknown option, or one of a wrong type
        raise TypeError(f"{kind.removesuffix('s')} {name!r} does not take {dict(options)}: {exc}") from exc


def _no_options(obj: Any, options: Mapping[str, Any]) -> None:
    if options:
        raise ValueError(
            f"options {dict(options)} were given for {describe(obj)}; options go with a name, not an object"
        )


def resolve_judge(judge: str | Judge | None, options: Mapping[str, Any] | None = None) -> Judge:
    """A judge from an installed judge's name (made with `options`), or the callable itself.

    Raises:
        ValueError: no judge, an unknown name (`hfgen.catalog.CatalogError`), or options for a callable.
        TypeError: neither a name nor a callable, or options the judge does not take.
    """
    if judge is None:
        raise ValueError(
            "judge is missing; pass judge='exact', judge='numeric' or a callable(prompt, answer, gold, **columns)"
        )
    if isinstance(judge, str):
        return _from_catalog(judge, "judges", options or {})
    if not callable(judge) or isinstance(judge, type):
        raise TypeError(f"judge is {judge!r}; pass an installed judge's name or a callable (an instance, not a class)")
    _no_options(judge, options or {})
    return judge


def resolve_paraphraser(
    paraphraser: str | Paraphraser | None, options: Mapping[str, Any] | None = None
) -> Paraphraser | None:
    """A paraphraser from a name (made with `options`), or the object itself; None for `"none"` and None: no such step.

    Raises:
        ValueError: an unknown name, or options without a name.
        TypeError: neither a name, a callable nor an object with `.prompt`, or options it does not take.
    """
    if paraphraser is None or paraphraser == "none":
        _no_options(paraphraser, options or {})
        return None
    if isinstance(paraphraser, str):
        return _from_catalog(paraphraser, "paraphrasers", options or {})
    if isinstance(paraphraser, type) or not (callable(paraphraser) or isinstance(paraphraser, PromptRewriter)):
        raise TypeError(
            f"paraphraser is {paraphraser!r}; pass a name, 'none', a callable(prompt, gold, **columns) -> str "
            "or an object with .prompt(prompt, gold)"
        )
    _no_options(paraphraser, options or {})
    return paraphraser


def call(function: Callable[..., Any], what: str, row_id: Any, *values: Any, columns: Mapping[str, Any]) -> Any:
    """`function(*values, **columns)`, with the columns it names (all of them when it has `**columns`).

    Raises:
        ValueError: it raised; the message names the row and the cause is chained.
    """
    try:
        parameters = dict(inspect.signature(function).parameters)
    except ValueError:  # a builtin without a signature
        parameters = {}
    if parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        columns = {k: v for k, v in columns.items() if k in list(parameters)[len(values) :]}
    try:
        return function(*values, **columns)
    except Exception as exc:  # whatever the user's code raises must stop the build, never count as a verdict
        raise ValueError(
            f"{what} {describe(function)} raised {type(exc).__name__}: {exc} on row {row_id!r}; mend it or that row"
        ) from exc


def score(judge: Judge, prompt: Any, answer: str, gold: Any, columns: Mapping[str, Any], row_id: Any) -> float:
    """The judge's verdict as a number: True is 1.0, False 0.0, a real number itself.

    Raises:
        ValueError: the judge raised, or gave NaN.
        TypeError: it gave anything but a bool or a real number.
    """
    return _number(judge, call(judge, "judge", row_id, prompt, answer, gold, columns=columns), row_id)


def scores(judge: Judge, calls: Sequence[tuple[Any, str, Any, Mapping[str, Any], Any]]) -> list[float]:
    """`score` of several (prompt, answer, gold, columns, row id), in their order.

    A judge that has `.many(calls) -> verdicts`, over (prompt, answer, gold, columns), gets them together: it may run
    several at a time.

    Raises:
        ValueError, TypeError: as `score`, or `.many` gave another number of verdicts.
    """
    if len(calls) < 2 or not hasattr(judge, "many"):
        return [score(judge, *c) for c in calls]
    try:
        verdicts = list(judge.many([c[:4] for c in calls]))
    except Exception:
        for c in calls:  # one by one, so that the error names its row
            score(judge, *c)
        raise
    if len(verdicts) != len(calls):
        raise ValueError(f"judge {describe(judge)} gave {len(verdicts)} verdicts on {len(calls)} answers; give as many")
    return [_number(judge, verdict, c[4]) for verdict, c in zip(verdicts, calls, strict=True)]


def _number(judge: Judge, verdict: Any, row_id: Any) -> float:
    if not isinstance(verdict, bool | np.bool_ | Real):
        raise TypeError(
            f"judge {describe(judge)} returned {verdict!r} on row {row_id!r}; a judge returns a bool or a float"
        )
    if math.isnan(verdict):
        raise ValueError(f"judge {describe(judge)} returned NaN on row {row_id!r}; a judge returns a bool or a float")
    return float(verdict)


def name(obj: Any) -> str:
    """The qualified name of a function, or of an object's class."""
    named = obj if hasattr(obj, "__qualname__") else type(obj)  # a function, a bound method, a class
    return f"{named.__module__}.{named.__qualname__}"


def describe(obj: Any) -> str:
    """What identifies a judge or paraphraser across processes: its qualified name, and the options it shows."""
    if obj is None or isinstance(obj, str):
        return str(obj)
    if hasattr(obj, "__qualname__"):
        owner = getattr(obj, "__self__", None)
        of = "" if owner is None or isinstance(owner, ModuleType | type) else f" of {describe(owner)}"
        return name(obj) + of
    hidden = type(obj).__repr__ is object.__repr__
    return name(obj) if hidden else f"{name(obj)}: {re.sub(r' at 0x[0-9a-f]+', '', repr(obj))}"
