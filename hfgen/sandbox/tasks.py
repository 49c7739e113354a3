"""The sandbox's three tasks: prompts, gold answers, exact judges. Standard library only.

Design 3 of the S3FT sheet (`specs/trainers.md`, sheet 30), made so that forgetting can be seen in minutes on a CPU:

====  ==========  ==========================================  =======================================================
task  prompt      answer in the base model's own style        role
====  ==========  ==========================================  =======================================================
`D`   ``D17=``    ``7+9+1``: three digits that sum to 17      new task: many valid answers, the base half knows it
`E`   ``:17=``    ``7+9+1``: the same skill                   old skill: asked with another prompt, strict on format
`R`   ``Rabcd=``  ``dcba``: the letters reversed              old skill: unrelated to the new task
====  ==========  ==========================================  =======================================================

The gold answers of `D` are right but written in a style the base never saw, as human-written gold answers are:
``>09.16.17:9+7+1`` (the running sums, then the summands sorted). An answer ends with the tokenizer's EOS token,
which is no part of the strings here.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

SUMS = range(28)  # 0+0+0 .. 9+9+9
LETTERS = "abcdefghij"
_PLAIN = re.compile(r"([0-9])\+([0-9])\+([0-9])")


def triples(total: int) -> list[tuple[int, int, int]]:
    """All ordered triples of digits (a, b, c) with a + b + c = total; empty when total is not in 0..27."""
    return [(a, b, total - a - b) for a in range(10) for b in range(10) if 0 <= total - a - b <= 9]


def plain(digits: tuple[int, int, int]) -> str:
    """The base model's own style: (7, 9, 1) -> ``7+9+1``."""
    return "+".join(map(str, digits))


def worked(digits: tuple[int, int, int]) -> str:
    """The gold style of `D`: (7, 9, 1) -> ``>09.16.17:9+7+1`` (running sums of the sorted summands, then these)."""
    a, b, c = sorted(digits, reverse=True)
    return f">{a:02d}.{a + b:02d}.{a + b + c:02d}:{plain((a, b, c))}"


@dataclass(frozen=True)
class Task:
    """A task: its prompts, one gold answer and an exact judge per prompt.

    Attributes:
        name: ``D``, ``E`` or ``R``.
        prompts: every prompt of the task that is measured, in a fixed order.
        trained: how many prompts `split` puts on the training side.
        description: one sentence for people.
    """

    name: str
    prompts: tuple[str, ...]
    trained: int
    description: str

    def gold(self, prompt: str) -> str:
        """The gold answer; the same on every machine and in every process."""
        body = self._body(prompt)
        if self.name == "R":
            return body[::-1]
        digits = random.Random(f"gold {body}").choice(triples(int(body)))
        return worked(digits) if self.name == "D" else plain(digits)

    def judge(self, prompt: str, answer: str, gold: str | None = None) -> bool:
        """Whether `answer` is right. `gold` is taken so that this is an S3FT judge; it is not looked at.

        `D` reads the final answer only, what follows the last colon, as GSM8K's judge reads the final number: both
        styles are accepted when the digits are right. `E` and `R` want the whole answer in the base's own style.
        """
        body = self._body(prompt)
        if self.name == "R":
            return answer == body[::-1]
        final = answer.rpartition(":")[2] if self.name == "D" else answer
        found = _PLAIN.fullmatch(final)
        return found is not None and sum(map(int, found.groups())) == int(body)

    def split(self, seed: int = 0) -> tuple[list[str], list[str]]:
        """(trained, held-out) prompts, disjoint and together all of `prompts`; a function of the seed alone."""
        shuffled = random.Random(f"split {self.name} {seed}").sample(self.prompts, len(self.prompts))
        return shuffled[: self.trained], shuffled[self.trained :]

    def rows(self, prompts: list[str] | tuple[str, ...] | None = None) -> list[dict[str, Any]]:
        """trl's prompt/completion rows, with the gold answer once more as `gold` and a unique `id` (a string)."""
        chosen = self.prompts if prompts is None else prompts
        return [{"id": p, "prompt": p, "completion": self.gold(p), "gold": self.gold(p)} for p in chosen]

    def _body(self, prompt: str) -> str:
        prefix = ":" if self.name == "E" else self.name
        body = prompt[len(prefix) : -1]
        allowed = LETTERS if self.name == "R" else "0123456789"
        if prompt != f"{prefix}{body}=" or not body or set(body) - set(allowed):
            raise ValueError(f"prompt={prompt!r} is no prompt of task {self.name}: use one like {self.prompts[0]!r}")
        return body


def oracle_paraphraser(prompt: str, gold: str) -> str:
    """ORACLE: rewrites a gold answer of `D` into the base model's own style, ``>09.16.17:9+7+1`` -> ``9+7+1``.

    An oracle, because it is told what that style is: the sandbox model is far too small to paraphrase by instruction,
    which the paper asks of the model itself. A figure made with it says how good S3FT is when paraphrasing works.
    """
    return gold.rpartition(":")[2]


def _words(count: int, length: int = 4) -> list[str]:
    rng = random.Random("words of R")
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(LETTERS, k=length))] = None
    return list(words)


D = Task("D", tuple(f"D{n:02d}=" for n in SUMS), 18, "new task: three digits with a given sum, gold answers worked out")
E = Task("E", tuple(f":{n:02d}=" for n in SUMS), 18, "old skill: the same sums asked in another way, format-strict")
R = Task("R", tuple(f"R{w}=" for w in _words(64)), 48, "old skill: a string reversed")
TASKS = {task.name: task for task in (D, E, R)}
