"""Judging code by its tests, in the sandbox of `hfgen.kit.sandboxing`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from hfgen.kit import checks, sandboxing

_FENCE = re.compile(r"^[ \t]*```[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
_LONGEST = 1 << 18  # characters of one answer's code, and of one row's tests


def extract_code(answer: str) -> str:
    """The Python code of an answer: its first block fenced as python, else its first fenced block, else all of it."""
    blocks = list(_FENCE.finditer(answer))
    python = [b for b in blocks if b["language"].lower() in ("python", "py", "python3")]
    return (python or blocks)[0]["code"] if blocks else answer


def _workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, 2 * cores)  # each waits for the kernel part of the time


@dataclass(frozen=True)
class CodeJudge:
    """`judge(prompt, answer, gold, **columns) -> bool`: the code in the answer passes the tests in the row's columns.

    Columns: the one called `tests`; if there are any, `test_imports` and `test_setup_code` (MBPP), which run before the
    tests; `entry_point` (HumanEval) with tests that define `check`, which is called with it. `gold` is not looked at.

    Args:
        allow_code_execution: Must be True: what a model wrote is executed, in a sandbox.
        tests: The column of the tests: a text or a list of texts, Python with asserts.
        wall_seconds: Time of one judgement.
        cpu_seconds: Processor time of the answer.
        memory_mb: Address space of the answer in MiB; its tests may use as much again.
        processes: Processes and threads the answer may have, itself included; each has memory_mb.
        allow_network: Leave the answer in the host's network (for tests that need one; a danger).
        workers: Judgements at a time, where a caller has several.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of range, or allow_code_execution is not True;
            when called, the row has no tests, or they hold no assert.
        hfgen.kit.sandboxing.SandboxError: a part of the sandbox cannot be had here. It is tried out when it is made.
    """

    allow_code_execution: bool = False
    tests: str = "tests"
    wall_seconds: float = 10.0
    cpu_seconds: int = 5
    memory_mb: int = 512
    processes: int = 1
    allow_network: bool = False
    workers: int = field(default_factory=_workers, repr=False)  # does not change a verdict

    def __post_init__(self) -> None:
        checks.boolean("CodeJudge", "allow_code_execution", self.allow_code_execution)
        if not self.allow_code_execution:
            raise ValueError(
                "CodeJudge.allow_code_execution is False; judge code executes what a model wrote, in a sandbox: give "
                "allow_code_execution=True if that is meant"
            )
        if not isinstance(self.tests, str) or not self.tests:
            raise TypeError(f"CodeJudge.tests is {self.tests!r}; give the name of the column of tests")
        for name, low in (("cpu_seconds", 1), ("memory_mb", 64), ("processes", 1), ("workers", 1)):
            checks.integer("CodeJudge", name, getattr(self, name), low=low)
        checks.number("CodeJudge", "wall_seconds", self.wall_seconds, low=0.0, high=3600.0)
        checks.boolean("CodeJudge", "allow_network", self.allow_network)
        sandboxing.verify(self.limits)

    @property
    def limits(self) -> sandboxing.Limits:
        return sandboxing.Limits(
            cpu_seconds=self.cpu_seconds, wall_seconds=self.wall_seconds, memory_mb=self.memory_mb,
            processes=self.processes, allow_network=self.allow_network,
        )  # fmt: skip

    def __call__(self, prompt: Any, answer: str, gold: Any, **columns: Any) -> bool:
        return self.explain(prompt, answer, gold, **columns).passed

    def explain(self, prompt: Any, answer: str, gold: Any, **columns: Any) -> sandboxing.Outcome:
        """The verdict with its reason."""
        if not isinstance(answer, str):
            raise TypeError(f"judge code reads an answer's text, not {answer!r}; give answers as strings")
        tests, code = self._program(columns), extract_code(answer)
        if len(code) > _LONGEST:
            return sandboxing.Outcome(False, f"{len(code)} characters of code; {_LONGEST} are allowed")
        return sandboxing.run(code, tests, self.limits)

    def many(self, calls: Sequence[tuple[Any, str, Any, Mapping[str, Any]]]) -> list[bool]:
        """Verdicts of several (prompt, answer, gold, columns), `workers` at a time, in their order."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda c: self(c[0], c[1], c[2], **c[3]), calls))

    def _program(self, columns: Mapping[str, Any]) -> str:
        """The tests of a row as one text."""
        tests = self._lines(columns, self.tests)
        if not "".join(tests).strip():
            raise ValueError(
                f"column {self.tests!r} is missing or empty; judge code needs tests in every row (option tests names "
                f"the column; the row has {', '.join(sorted(columns)) or 'no columns'})"
            )
        before = [*self._lines(columns, "test_imports"), *self._lines(columns, "test_setup_code")]
        entry = columns.get("entry_point")
        if isinstance(entry, str) and entry.isidentifier() and re.search(r"^def check\(", "\n".join(tests), re.M):
            tests = [*tests, f"check({entry})"]
        program = "\n".join([*before, *tests])
        if len(program) > _LONGEST:
            raise ValueError(f"column {self.tests!r} holds {len(program)} characters; {_LONGEST} are allowed")
        return program

    def _lines(self, columns: Mapping[str, Any], name: str) -> list[str]:
        value = columns.get(name)
        texts = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"column {name!r} holds {value!r:.60}; give a text or a list of texts")
        return list(texts)
