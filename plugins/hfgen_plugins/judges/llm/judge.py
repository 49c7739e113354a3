"""A language model as the judge of equivalence. Deterministic: greedy decoding, and a reply is yes, no or nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hfgen.kit import checks, generation

logger = logging.get_logger(__name__)

_TEMPLATE = (
    "Does the candidate answer say the same as the reference answer to the question? Wording does not matter; facts, "
    "numbers and the final answer do.\n"
    "Question: {question}\nReference answer: {gold}\nCandidate answer: {answer}\n"
    "Reply with one word, yes or no."
)
_REPLY = re.compile(r"\s*(?:(?P<yes>yes)|no)[.!]?\s*", re.IGNORECASE)


@dataclass
class LLMJudge:
    """`judge(prompt, answer, gold, **columns) -> bool`: the model replies yes.

    Args:
        model: A directory or hub id, or a transformers model.
        tokenizer: Its tokenizer; None loads the model's own.
        template: What is asked, with the fields `{gold}`, `{answer}` and (may be left out) `{question}`.
        cue: What follows it where the tokenizer has no chat template.
        max_new_tokens: Longest reply; one that does not end in time is no reply.
        batch_size: Questions at a time, where a caller has several.
        model_kwargs: For `from_pretrained` of a model by name, e.g. {"dtype": "bfloat16"}.
        judged: How many replies there were; no argument.
        unparsable: How many of them were neither yes nor no; no argument.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of range; when called, a text is none.
    """

    model: str | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)
    template: str = _TEMPLATE
    cue: str = "\nReply: "
    max_new_tokens: int = 8
    batch_size: int = 16
    model_kwargs: dict[str, Any] | None = field(default=None, repr=False)
    judged: int = field(default=0, init=False)
    unparsable: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name in ("template", "cue"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"LLMJudge.{name} is {getattr(self, name)!r}; give text")
        if "{gold}" not in self.template or "{answer}" not in self.template:
            raise ValueError(f"LLMJudge.template is {self.template!r}; put {{gold}} and {{answer}} where they go")
        for name in ("max_new_tokens", "batch_size"):
            checks.integer("LLMJudge", name, getattr(self, name), low=1)
        if not isinstance(self.model_kwargs, dict | None):
            raise TypeError(f"LLMJudge.model_kwargs is {self.model_kwargs!r}; give options as a dictionary")
        if isinstance(self.model, str):
            loaded = AutoModelForCausalLM.from_pretrained(self.model, **self.model_kwargs or {})
            self.model = loaded if hasattr(loaded, "hf_device_map") else loaded.to(PartialState().device)
        elif self.model_kwargs:
            raise ValueError(f"LLMJudge.model_kwargs is {self.model_kwargs}, but the model is made already")
        generation.base_model(self.model)
        if self.tokenizer is None:
            self.tokenizer = AutoTokenizer.from_pretrained(self.model.config._name_or_path)
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the judge's tokenizer has no eos_token, so a reply's end cannot be seen; set it")

    @cached_property
    def digest(self) -> str:
        """Of the weights: with the settings, what the verdicts depend on."""
        return generation.fingerprint(self._model)

    def __repr__(self) -> str:
        return (
            f"LLMJudge(weights={self.digest[:16]}, template={self.template!r}, cue={self.cue!r}, "
            f"max_new_tokens={self.max_new_tokens})"
        )

    @property
    def _model(self) -> PreTrainedModel:
        assert isinstance(self.model, PreTrainedModel)
        return self.model

    def __call__(self, prompt: Any, answer: str, gold: str, **columns: Any) -> bool:
        return self.many([(prompt, answer, gold, columns)])[0]

    def many(self, calls: Sequence[tuple[Any, str, Any, Mapping[str, Any]]]) -> list[bool]:
        """Verdicts of several (prompt, answer, gold, columns), `batch_size` at a time, in their order."""
        asked = [self._ask(prompt, answer, gold) for prompt, answer, gold, _ in calls]
        replies: list[generation.Generation] = []
        assert self.tokenizer is not None
        own = self._model.generation_config.eos_token_id
        eos = sorted(
            {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own] if own is not None else [])}
        )
        with generation.frozen(self._model) as model:
            for i in range(0, len(asked), self.batch_size):
                batch = asked[i : i + self.batch_size]
                replies += generation.generate(
                    model, self.tokenizer, batch, max_new_tokens=self.max_new_tokens, eos_ids=eos
                )
        return [self._read(reply) for reply in replies]

    def _ask(self, prompt: Any, answer: Any, gold: Any) -> list[int]:
        """Token ids of one question to the judge."""
        for name, text in (("answer", answer), ("gold", gold)):
            if not isinstance(text, str):
                raise TypeError(f"judge llm reads texts, but the {name} is {text!r:.60}; give a string")
        question = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        values = {"question": question, "answer": answer, "gold": gold}
        # one pass, so that braces inside a text stay as they are
        text = re.sub(r"\{(question|answer|gold)\}", lambda m: values[m[1]], self.template)
        assert self.tokenizer is not None
        if self.tokenizer.chat_template is None:
            return self.tokenizer(text + self.cue)["input_ids"]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=True, return_dict=True, add_generation_prompt=True
        )["input_ids"]

    def _read(self, reply: generation.Generation) -> bool:
        self.judged += 1
        match = _REPLY.fullmatch(reply.text) if reply.finished else None
        if match is None:
            self.unparsable += 1
            logger.warning_once(
                f"judge llm replied {reply.text!r:.60} and not yes or no: such replies count as not equivalent "
                "(LLMJudge.unparsable has their number)"
            )
        return match is not None and match["yes"] is not None
