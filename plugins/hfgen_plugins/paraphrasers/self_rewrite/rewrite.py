"""The rewriting instruction, in the form of the prompt it is made from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_TEMPLATE = (
    "Rewrite the following answer in your own words; keep every fact, number and the final answer.\n"
    "Question: {question}\nAnswer: {answer}"
)


@dataclass(frozen=True)
class SelfRewrite:
    """`.prompt(prompt, gold)` gives what the model answers with its paraphrase of `gold`.

    Args:
        template: Instruction with the fields `{question}` (may be left out) and `{answer}`.
        cue: What follows the instruction in a plain-text prompt, which has no turn to say that an answer is due.

    Raises:
        TypeError: a field is not text.
        ValueError: the template has no `{answer}`.
    """

    template: str = _TEMPLATE
    cue: str = "\nRewritten answer: "

    def __post_init__(self) -> None:
        for name in ("template", "cue"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"SelfRewrite.{name} is {getattr(self, name)!r}; give text")
        if "{answer}" not in self.template:
            raise ValueError(f"SelfRewrite.template is {self.template!r}; put {{answer}} where the gold answer goes")

    def prompt(self, prompt: str | list[dict[str, Any]], gold: str) -> str | list[dict[str, Any]]:
        """Text for a text prompt; one user message for a list of messages."""
        if isinstance(prompt, str):
            return self._fill(prompt, gold) + self.cue
        turns = [m for m in prompt if m["role"] != "system"]
        if len(turns) == 1:
            question = turns[0]["content"]
        else:
            question = "\n".join(f"{m['role']}: {m['content']}" for m in turns)
        return [{"role": "user", "content": self._fill(question, gold)}]

    def _fill(self, question: str, answer: str) -> str:
        # one pass, so that braces inside a question or an answer stay as they are
        values = {"question": question, "answer": answer}
        return re.sub(r"\{(question|answer)\}", lambda m: values[m[1]], self.template)
