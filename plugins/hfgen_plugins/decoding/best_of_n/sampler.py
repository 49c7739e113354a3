"""The best of n sampled answers by a reward: a `custom_generate` callable, and a sampler that keeps all n.

With a seed, answer j to a prompt depends on the seed, the prompt's tokens and j alone: not on the batch, the order of
prompts, the rank or torch's global generator, which is left as it was. (Padding changes logits by rounding errors, so
two batch sizes can differ where two tokens are that close.) Equal prompts in one call get different answers.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_TRL_NAMES = {"prompts", "completions", "completion_ids"}  # how trl calls a reward function
_VLLM_NAMES = {"max_new_tokens": "max_tokens"} | {
    name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
}


# --- model.generate(custom_generate=best_of_n, reward=..., n=...) ------------------------------------------------


def best_of_n(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    reward: Callable[..., Any] | torch.nn.Module | None = None,
    n: int = 4,
    n_candidates: int = 1,
    processing_class: PreTrainedTokenizerBase | None = None,
    reward_processing_class: PreTrainedTokenizerBase | None = None,
    reward_kwargs: Mapping[str, Sequence[Any]] | None = None,
    seed: int | None = None,
    **model_kwargs: Any,
) -> torch.LongTensor:
    """What `model.generate(**inputs, do_sample=True, custom_generate=best_of_n, reward=..., n=...)` runs.

    All B * n answers are generated at once. The reward sees prompts as text without padding and leading BOS, with a
    chat's markup. For chats scored by a reward model with a template of its own use `BestOfNSampler`, which gives the
    messages themselves.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: From `generate`;
            input_ids (B, T), padded on the left.
        reward: As for `BestOfNSampler`.
        n: Answers sampled per prompt.
        n_candidates: How many of them are returned per prompt, best first.
        processing_class: The tokenizer (`tokenizer=` is not handed on by transformers).
        reward_processing_class: Of a reward model; None loads its own.
        reward_kwargs: Columns for the reward function, B values each.
        seed: Of the answers; None samples with torch's global generator, as `generate` does.

    Returns:
        (B * n_candidates, T + new tokens) token ids, padded on the right after an answer's end.

    Raises:
        TypeError: no tokenizer, or a reward of the wrong kind.
        ValueError: an n that is no count, greedy or beam search, or rewards that decide nothing.
    """
    import torch

    _check_count("n", n)
    _check_count("n_candidates", n_candidates, n)
    if not hasattr(processing_class, "decode"):
        raise TypeError(
            f"processing_class is {processing_class!r}; pass the tokenizer, model.generate(..., processing_class=...)"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"model is {type(model).__name__}, an encoder-decoder; best_of_n needs a causal model")
    _check_sampling(generation_config, n)
    prompts = _unpadded(input_ids, model_kwargs.get("attention_mask"))
    _reward_form(reward)
    columns = _repeated(reward_kwargs or {}, len(prompts), n)
    cache = model_kwargs.get("past_key_values")
    if n > 1 and cache is not None and cache.get_seq_length() > 0:
        cache.batch_repeat_interleave(n)
    rows, model_kwargs = model._expand_inputs_for_generation(input_ids=input_ids, expand_size=n, **model_kwargs)
    row_seeds = None if seed is None else [_digest(s, j) for s in prompt_seeds(seed, prompts) for j in range(n)]
    ids = _sample_rows(
        model, rows, logits_processor, stopping_criteria, generation_config, row_seeds=row_seeds, **model_kwargs
    )
    assert processing_class is not None
    answers = [
        _answer(processing_class, prompts[i // n], new, _eos_ids(generation_config))
        for i, new in enumerate(ids[:, input_ids.shape[1] :].tolist())
    ]
    texts = [text for text in (_text(processing_class, p) for p in prompts) for _ in range(n)]
    rewards, _ = score(reward, texts, answers, columns, reward_processing_class)
    order = _best_first(rewards.reshape(-1, n))[:, :n_candidates] + n * np.arange(len(prompts))[:, None]
    return ids[torch.from_numpy(order.reshape(-1)).to(ids.device)]


def _sample_rows(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    row_seeds: Sequence[int] | None = None,
    **model_kwargs: Any,
) -> torch.LongTensor:
    """transformers' sampling loop over (R, T) rows, each with a generator of its own when `row_seeds` is given."""
    from transformers import LogitsProcessorList

    config = copy.copy(generation_config)
    config.return_dict_in_generate = False
    if row_seeds is not None:
        config.do_sample = False  # the last processor leaves one token: argmax takes it, no global generator is used
        logits_processor = LogitsProcessorList([*logits_processor, _seeded(row_seeds)])
    return model._sample(
        input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria, generation_config=config,
        **model_kwargs,
    )  # fmt: skip


def _seeded(seeds: Sequence[int]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A logits processor, to come last: samples by inversion, one uniform number per row and step, and leaves that token.

    (rows, vocabulary) scores -> the same, -inf everywhere but 0 at the sampled token. Numbers come from the CPU, so the
    device does not change them.
    """
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        steps = scores.to(wide).softmax(-1).cumsum(-1)
        uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])[:, None]
        total = steps[:, -1:]
        target = torch.minimum(uniform.to(steps) * total, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(steps, target, right=True)  # the first whose cumulative probability is larger
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)

    return process


def prompt_seeds(seed: int, prompts: Sequence[Sequence[int]]) -> list[int]:
    """One seed per token list: of `seed`, the tokens, and how many equal prompts came before."""
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in map(tuple, prompts):
        seeds.append(_digest(seed, prompt, seen[prompt]))
        seen[prompt] += 1
    return seeds


def _digest(*values: Any) -> int:
    return int(hashlib.sha256(json.dumps(values).encode()).hexdigest()[:15], 16)


# --- the sampler ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BestOfNSamples:
    """All answers to B prompts, scored.

    Args:
        prompts: The prompts as given; token ids as text.
        answers: n texts per prompt, in the order they were sampled.
        answer_ids: Their token ids, without EOS.
        rewards: (B, n) float64; NaN where the reward gave None.
        chosen: (B,) index of the best answer, the first of equals.
        finished: (B, n) bool: the model ended the answer itself within the token limit.
        members: (B, n, K) scores of the members where the reward is an ensemble model, else None.
    """

    prompts: list[Any]
    answers: list[list[str]]
    answer_ids: list[list[list[int]]]
    rewards: NDArray[np.float64]
    chosen: NDArray[np.intp]
    finished: NDArray[np.bool_]
    members: NDArray[np.float64] | None = None

    @property
    def best(self) -> list[str]:
        """The best answer to each prompt."""
        return [answers[i] for answers, i in zip(self.answers, self.chosen, strict=True)]

    def top(self, k: int) -> list[list[str]]:
        """The k best answers to each prompt, best first (`n_candidates` of trl's former sampler)."""
        _check_count("k", k, self.rewards.shape[1])
        return [[a[i] for i in row[:k]] for a, row in zip(self.answers, _best_first(self.rewards), strict=True)]

    def score_with(
        self,
        reward: Any,
        reward_processing_class: PreTrainedTokenizerBase | None = None,
        batch_size: int = 64,
        **columns: Sequence[Any],
    ) -> NDArray[np.float64]:
        """(B, n) scores of the same answers by another reward, e.g. a gold one; arguments as of `BestOfNSampler`."""
        n = self.rewards.shape[1]
        answers = [
            Answer(text, ids, bool(finished))
            for row in zip(self.answers, self.answer_ids, self.finished, strict=True)
            for text, ids, finished in zip(*row, strict=True)
        ]
        prompts = [p for p in self.prompts for _ in range(n)]
        repeated = _repeated(columns, len(self.prompts), n)
        return score(reward, prompts, answers, repeated, reward_processing_class, batch_size)[0].reshape(-1, n)

    def rows(self, **scores: NDArray[np.float64]) -> list[dict[str, Any]]:
        """One dict per answer: prompt_id, prompt, answer, proxy, finished, chosen and, of an ensemble, members.

        These are the columns `hfgen bon` reads; answers without a reward are left out. `scores`, (B, n) each, are
        further columns: `rows(gold=samples.score_with(judge))`.

        Raises:
            ValueError: `scores` of another shape, or with NaN for an answer that has a reward.
        """
        kept = ~np.isnan(self.rewards)
        for name, values in scores.items():
            if np.shape(values) != self.rewards.shape or np.isnan(values[kept]).any():
                raise ValueError(f"{name} has shape {np.shape(values)} or NaN; give {self.rewards.shape} finite scores")
        rows = []
        for i, j in np.argwhere(kept).tolist():
            row = {
                "prompt_id": i, "prompt": self.prompts[i], "answer": self.answers[i][j],
                "proxy": float(self.rewards[i, j]), "finished": bool(self.finished[i, j]),
                "chosen": bool(j == self.chosen[i]), **{k: float(v[i, j]) for k, v in scores.items()},
            }  # fmt: skip
            rows.append(row if self.members is None else row | {"members": self.members[i, j].tolist()})
        return rows

    def save(self, path: str | Path, **scores: NDArray[np.float64]) -> None:
        """Write `rows(**scores)` as JSON lines, UTF-8."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows(**scores))
        Path(path).write_text("".join(lines), encoding="utf-8")


class BestOfNSampler:
    """Samples n answers per prompt, scores them, says which is best. The successor of trl's class of that name.

    There `queries_to_scores` was the third argument as `reward` is here, `sample_size` is now `n`, `length_sampler` is
    `max_new_tokens`, and `n_candidates` is `samples.top(k)`.

    Args:
        model: A causal model or a PeftModel of one (adapters stay on); with `use_vllm` a folder, a hub id or a vllm.LLM.
        processing_class: Its tokenizer.
        reward: One of
            - a function of trl's form, `reward(prompts=, completions=, completion_ids=, **columns) -> R floats or None`,
              e.g. an `EnsembleReward`; it gets those arguments that it names, or all with `**kwargs`. Where it has a
              method `member_scores(prompts, completions) -> (R, K)`, as that has, it is called too, for the members;
            - a function of one argument, `reward(texts) -> R floats`, each text being prompt + answer;
            - a sequence classification model with one label, or any module whose output has `.logits` (R, 1), and
              `.member_logits` (R, K) if it is an ensemble. It reads prompt + answer without added special tokens, as in
              trl's GRPO; where it was trained with an EOS after answers, a function that adds it scores better.
        n: Answers per prompt.
        seed: Of the answers; see the module's text.
        batch_size: Answers generated, and scored by a model, at a time.
        reward_processing_class: Tokenizer of a reward model; None loads its own.
        generation_config: All settings of sampling; `do_sample` must be true. None: what follows.
        use_vllm: Generate with vLLM, which must be installed.
        **generation_kwargs: Fields of a GenerationConfig: temperature (1.0), top_p (1.0), top_k (0: all),
            max_new_tokens (256), ... With vLLM also min_p and repetition_penalty, and no others.

    Raises:
        TypeError: no tokenizer, no model, a reward of the wrong kind, or an unknown setting.
        ValueError: a count below 1, greedy or beam search, no EOS token, or vLLM is asked for and missing.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Any,
        processing_class: PreTrainedTokenizerBase,
        reward: Callable[..., Any] | torch.nn.Module,
        n: int = 4,
        *,
        seed: int = 0,
        batch_size: int = 64,
        reward_processing_class: PreTrainedTokenizerBase | None = None,
        generation_config: GenerationConfig | None = None,
        use_vllm: bool = False,
        **generation_kwargs: Any,
    ) -> None:
        _check_count("n", n)
        _check_count("batch_size", batch_size)
        if not hasattr(processing_class, "decode"):
            raise TypeError(f"processing_class is {type(processing_class).__name__}; pass the model's tokenizer")
        _reward_form(reward)
        self.model: Any = model
        self.processing_class, self.reward = processing_class, reward
        self.n, self.seed, self.batch_size, self.use_vllm = n, seed, batch_size, use_vllm
        self.reward_processing_class = reward_processing_class
        self.settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 256, **generation_kwargs}
        if use_vllm:
            self.model = _vllm_engine(model, self.settings, generation_config)
        self.generation_config = self._config(generation_config, generation_kwargs)

    def _config(self, given: GenerationConfig | None, changes: Mapping[str, Any]) -> GenerationConfig:
        from transformers import GenerationConfig

        if given is not None and changes:
            raise ValueError(f"generation_config and {sorted(changes)} are both given; put the latter into the former")
        unknown = set(changes) - set(GenerationConfig().to_dict())
        if unknown:
            raise TypeError(f"{sorted(unknown)[0]!r} is no option of BestOfNSampler, nor a field of a GenerationConfig")
        if not self.use_vllm and not callable(getattr(self.model, "generate", None)):
            raise TypeError(f"model is {type(self.model).__name__}; pass a causal model, or use_vllm=True for a name")
        config = copy.deepcopy(given) if given is not None else GenerationConfig(**{"do_sample": True, **self.settings})
        _check_sampling(config, self.n)
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        if config.eos_token_id is None:
            config.eos_token_id = sorted({*_listed(own), *_listed(self.processing_class.eos_token_id)})
        if not config.eos_token_id and config.eos_token_id != 0:
            raise ValueError("the tokenizer has no eos_token, so an answer's end cannot be seen; set it")
        if config.pad_token_id is None:
            pad = self.processing_class.pad_token_id
            config.pad_token_id = pad if pad is not None else _listed(config.eos_token_id)[0]
        return config

    def generate(self, prompts: Sequence[Any], **columns: Sequence[Any]) -> BestOfNSamples:
        """Sample, score, choose.

        Args:
            prompts: B prompts: texts, lists of messages (the chat template is applied), or token ids.
            **columns: B values each, for a reward function of trl's form (`gold=[...]`).

        Raises:
            TypeError: a prompt of another kind; the reward does not return numbers.
            ValueError: no prompts, a prompt without tokens, columns of another length, as many rewards as there are not
                answers, or a prompt none of whose answers got a reward.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"prompts is {prompts!r}; give a list with at least one prompt")
        given = [p if isinstance(p, str) or _is_chat(p) else _token_list(p) for p in prompts]
        ids = [self._encode(p) for p in given]
        repeated = _repeated(columns, len(ids), self.n)
        seeds = prompt_seeds(self.seed, ids)
        new = (self._vllm if self.use_vllm else self._transformers)(ids, seeds)
        eos = _eos_ids(self.generation_config)
        answers = [_answer(self.processing_class, ids[i // self.n], tokens, eos) for i, tokens in enumerate(new)]
        shown = [p if isinstance(p, str) or _is_chat(p) else _text(self.processing_class, p) for p in given]
        rewards, members = score(
            self.reward, [p for p in shown for _ in range(self.n)], answers, repeated, self.reward_processing_class,
            self.batch_size,
        )  # fmt: skip
        shape = (len(ids), self.n)
        rewards = rewards.reshape(shape)
        groups = [answers[i : i + self.n] for i in range(0, len(answers), self.n)]
        return BestOfNSamples(
            prompts=shown,
            answers=[[a.text for a in group] for group in groups],
            answer_ids=[[a.ids for a in group] for group in groups],
            rewards=rewards,
            chosen=_best_first(rewards)[:, 0],
            finished=np.array([a.finished for a in answers]).reshape(shape),
            members=None if members is None else members.reshape(*shape, -1),
        )

    def _encode(self, prompt: Any) -> list[int]:
        tokenizer = self.processing_class
        if isinstance(prompt, str):
            ids = list(tokenizer(text=prompt)["input_ids"])
            eos = tokenizer.eos_token_id  # some tokenizers put it after every text: nothing would follow
            if ids and ids[-1] == eos and not prompt.endswith(tokenizer.eos_token):
                ids = ids[:-1]
        elif _is_chat(prompt):
            ids = list(
                tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
                    "input_ids"
                ]
            )
        else:
            ids = prompt
        if not ids:
            raise ValueError(f"prompt {prompt!r} has no tokens; give it text")
        return ids

    def _transformers(self, ids: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        """New tokens of the B * n answers, generated `batch_size` at a time."""
        import torch

        rows = [(prompt, _digest(s, j)) for prompt, s in zip(ids, seeds, strict=True) for j in range(self.n)]
        pad, found = self.generation_config.pad_token_id, []
        with _evaluating(self.model), torch.no_grad():
            for first in range(0, len(rows), self.batch_size):
                batch = rows[first : first + self.batch_size]
                width = max(len(p) for p, _ in batch)
                padded = [[pad] * (width - len(p)) + list(p) for p, _ in batch]
                mask = [[0] * (width - len(p)) + [1] * len(p) for p, _ in batch]
                output = self.model.generate(
                    input_ids=torch.tensor(padded, device=self.model.device),
                    attention_mask=torch.tensor(mask, device=self.model.device),
                    generation_config=self.generation_config,
                    custom_generate=_sample_rows,
                    row_seeds=[s for _, s in batch],
                )
                found += output[:, width:].tolist()
        return found

    def _vllm(self, ids: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        from vllm import SamplingParams

        settings = {_VLLM_NAMES[name]: value for name, value in self.settings.items()}
        stop = _eos_ids(self.generation_config)
        params = [SamplingParams(n=self.n, seed=s, stop_token_ids=stop, **settings) for s in seeds]
        found = self.model.generate(
            [{"prompt_token_ids": list(p)} for p in ids], sampling_params=params, use_tqdm=False
        )
        # The token that ended an answer is not in token_ids of every version, so it is put there.
        return [
            [*output.token_ids, *([stop[0]] if output.finish_reason == "stop" else [])]
            for request in found
            for output in sorted(request.outputs, key=lambda o: o.index)
        ]


def _vllm_engine(model: Any, settings: Mapping[str, Any], generation_config: Any) -> Any:
    """The vllm.LLM: `model` itself, or made of a folder or hub id."""
    if generation_config is not None:
        raise ValueError("generation_config is given with use_vllm; give temperature, top_p, top_k, max_new_tokens")
    other = sorted(set(settings) - set(_VLLM_NAMES))
    if other:
        raise TypeError(f"{other[0]!r} is not handed on to vLLM; with use_vllm give {', '.join(_VLLM_NAMES)} only")
    try:
        from vllm import LLM
    except ImportError as exc:
        raise ValueError(
            f"use_vllm is true, but vLLM does not import ({exc}); install vllm, or leave use_vllm out"
        ) from exc
    if isinstance(model, str | Path):
        return LLM(model=str(model))
    if not isinstance(model, LLM):
        raise TypeError(f"model is {type(model).__name__}; with use_vllm give a folder, a hub id or a vllm.LLM")
    return model


# --- rewards -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One sampled answer: its text, its tokens without EOS, and whether it ended itself."""

    text: str
    ids: list[int]
    finished: bool


def score(
    reward: Any,
    prompts: Sequence[Any],
    answers: Sequence[Answer],
    columns: Mapping[str, Sequence[Any]],
    processing_class: PreTrainedTokenizerBase | None = None,
    batch_size: int = 64,
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """((R,) rewards, (R, K) member scores or None) of R answers; None becomes NaN, infinities are refused."""
    form = _reward_form(reward)
    completions: list[Any] = [
        [{"role": "assistant", "content": a.text}] if _is_chat(p) else a.text
        for p, a in zip(prompts, answers, strict=True)
    ]
    members = None
    if form == "model":
        values, members = _model_scores(reward, prompts, completions, processing_class, batch_size)
    elif form == "texts":
        if any(map(_is_chat, prompts)):
            raise TypeError(f"reward {_name(reward)} takes texts, but prompts are messages; name prompts, completions")
        values = reward([p + c for p, c in zip(prompts, completions, strict=True)])
    else:
        every = {"prompts": list(prompts), "completions": completions, "completion_ids": [a.ids for a in answers]}
        every |= {name: list(values) for name, values in columns.items()}
        parameters = inspect.signature(reward).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            every = {k: v for k, v in every.items() if k in parameters}
        values = reward(**every)
        if hasattr(reward, "member_scores"):  # an ensemble; the aggregate does not tell its members' scores
            members = np.asarray(reward.member_scores(list(prompts), completions), dtype=np.float64)
    return _numbers(reward, values, len(answers)), members


def _reward_form(reward: Any) -> str:
    """`"model"`, `"trl"` or `"texts"`.

    Raises:
        TypeError: none of them.
    """
    import torch

    if isinstance(reward, torch.nn.Module):
        return "model"
    if callable(reward) and not isinstance(reward, type) and not inspect.iscoroutinefunction(reward):
        parameters = inspect.signature(reward).parameters
        needed = [
            p for p in parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]  # fmt: skip
        if _TRL_NAMES & set(parameters) or (not needed and any(p.kind is p.VAR_KEYWORD for p in parameters.values())):
            return "trl"
        if len(needed) == 1 and needed[0].kind is not needed[0].KEYWORD_ONLY:
            return "texts"
    raise TypeError(
        f"reward is {_name(reward)}; pass a function(prompts, completions, **kwargs) or function(texts) that returns "
        "numbers, or a sequence classification model with one label"
    )


def _model_scores(
    model: Any, prompts: Sequence[Any], completions: Sequence[Any], tokenizer: Any, batch_size: int
) -> tuple[list[float], NDArray[np.float64] | None]:
    """Scores of a reward model as trl computes them: text without added special tokens, padded on the right."""
    import torch

    tokenizer = _reward_tokenizer(model, tokenizer)
    texts = [
        tokenizer.apply_chat_template(p + c, tokenize=False) if _is_chat(p) else p + c
        for p, c in zip(prompts, completions, strict=True)
    ]
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    values: list[float] = []
    members: list[Any] = []
    with _evaluating(model), torch.no_grad():
        for first in range(0, len(texts), batch_size):
            batch = tokenizer(
                text=texts[first : first + batch_size], return_tensors="pt", padding=True, padding_side="right",
                add_special_tokens=False,
            )  # fmt: skip
            output = model(**{k: v.to(device) for k, v in batch.items() if k in ("input_ids", "attention_mask")})
            logits = output.logits
            if logits.ndim != 2 or logits.shape[1] != 1:
                raise ValueError(f"reward model gives logits of shape {tuple(logits.shape)}; it needs num_labels=1")
            values += logits[:, 0].double().tolist()
            if getattr(output, "member_logits", None) is not None:
                members.append(output.member_logits.double().cpu().numpy())
    return values, np.concatenate(members) if members else None


def _reward_tokenizer(model: Any, tokenizer: Any) -> Any:
    """The reward model's tokenizer, whose padding the model must know: it reads the score at the last other token."""
    if tokenizer is None:
        from transformers import AutoTokenizer

        path = getattr(getattr(model, "config", None), "_name_or_path", "")
        if not path:
            raise ValueError("the reward model does not say where it is from; pass reward_processing_class")
        tokenizer = AutoTokenizer.from_pretrained(path)
    known = getattr(getattr(model, "config", None), "pad_token_id", tokenizer.pad_token_id)
    if tokenizer.pad_token_id is None or known != tokenizer.pad_token_id:
        raise ValueError(
            f"the reward model's pad_token_id is {known} and its tokenizer's {tokenizer.pad_token_id}; set both to one "
            "token, or scores are read at the wrong place"
        )
    return tokenizer


def _numbers(reward: Any, values: Any, count: int) -> NDArray[np.float64]:
    """(R,) float64 of what a reward returned."""
    try:
        values = values.detach().cpu().tolist() if _is_tensor(values) else list(values)
        found = np.array([np.nan if v is None else float(v) for v in values])
    except (TypeError, ValueError):
        raise TypeError(
            f"reward {_name(reward)} returned {values!r:.80}; return one number (or None) per answer"
        ) from None
    if len(found) != count:
        raise ValueError(
            f"reward {_name(reward)} returned {len(found)} rewards for {count} answers; return one for each"
        )
    if np.isinf(found).any():
        raise ValueError(
            f"reward {_name(reward)} returned an infinite reward; return finite numbers, or None for no score"
        )
    return found


def _best_first(rewards: NDArray[np.float64]) -> NDArray[np.intp]:
    """(B, n) indices by falling reward, equals in their order, NaN last.

    Raises:
        ValueError: a prompt whose rewards are all NaN.
    """
    empty = np.isnan(rewards).all(1)
    if empty.any():
        raise ValueError(f"no answer to prompt {int(empty.argmax())} got a reward (None or NaN); there is no best one")
    return np.argsort(-rewards, axis=1, kind="stable")


# --- small things --------------------------------------------------------------------------------------------------


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode for every module (dropout off, KV cache on under gradient checkpointing); put back afterwards."""
    modules = list(model.modules())
    training = [m.training for m in modules]
    try:
        model.eval()
        yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag


def _check_count(name: str, value: Any, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1 or (most and value > most):
        raise ValueError(f"{name} is {value!r}; give a whole number from 1 {f'to {most}' if most else 'on'}")


def _check_sampling(config: GenerationConfig, n: int) -> None:
    if n > 1 and not config.do_sample:
        raise ValueError(f"do_sample is {config.do_sample}, so all {n} answers would be equal; pass do_sample=True")
    for name in ("num_beams", "num_return_sequences"):
        if (getattr(config, name, None) or 1) != 1:
            raise ValueError(f"{name} is {getattr(config, name)}; leave it 1, n says how many answers are sampled")


def _repeated(columns: Mapping[str, Sequence[Any]], prompts: int, n: int) -> dict[str, list[Any]]:
    for name, values in columns.items():
        if isinstance(values, str) or len(values) != prompts:
            raise ValueError(f"column {name!r} has {len(values)} values; give {prompts}, one per prompt")
    return {name: [v for v in values for _ in range(n)] for name, values in columns.items()}


def _answer(tokenizer: Any, prompt: Sequence[int], new: Sequence[int], eos: Sequence[int]) -> Answer:
    """What follows the decoded prompt, so that a leading space which a tokenizer drops at a text's start is kept."""
    end = next((i for i, token in enumerate(new) if token in eos), None)
    ids = list(new[:end])
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = tokenizer.decode(list(prompt), **options), tokenizer.decode([*prompt, *ids], **options)
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids, **options)
    return Answer(text, ids, end is not None)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    """A prompt as text: without a leading BOS, with a chat's markup."""
    start = int(tokenizer.bos_token_id is not None and list(ids[:1]) == [tokenizer.bos_token_id])
    return tokenizer.decode(list(ids[start:]), clean_up_tokenization_spaces=False)


def _unpadded(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    rows = input_ids.tolist()
    if mask is None:
        return rows
    return [[t for t, m in zip(row, kept, strict=True) if m] for row, kept in zip(rows, mask.tolist(), strict=True)]


def _eos_ids(config: GenerationConfig) -> list[int]:
    return _listed(config.eos_token_id)


def _listed(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach")


def _token_list(prompt: Any) -> list[int]:
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(ids, list | tuple) or not all(isinstance(t, int) and not isinstance(t, bool) for t in ids):
        raise TypeError(f"prompt {prompt!r:.60} is no text, no list of messages and no list of token ids")
    return list(ids)


def _name(reward: Any) -> str:
    return getattr(reward, "__name__", None) or type(reward).__name__
