"""The data of S3FT, which are all of the method: (x, gold) -> (x, own answer | own rewriting of gold | gold).

    yhat = M0(x)                     right, says the judge?  -> target yhat, source "self"
    ytil = M0(PARAPHRASE(x, gold))   right, says the judge?  -> target ytil, source "paraphrase"
    otherwise                                                -> target gold, source "gold"

M0 is the model before any step. Every row keeps its place: |D'| = |D| (but for the ablation `drop_failures`). Rows are
worked through in fixed blocks of `s3ft_batch_size`, so padding, and with it every rounding, is the same for any number
of processes and after a kill.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from datasets import Dataset, Features, Value
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hfgen.kit import generation, judging

from .config import S3FTConfig
from .vllm import Engine
from .vllm import module as engine_module

logger = logging.get_logger(__name__)

COLUMNS = ("prompt", "completion", "source", "judge_score", "gold", "sample_id", "logp_gold", "logp_target")
# Where a target comes from in more detail; data that an older version built lack these.
PROVENANCE = {"judge": "string", "attempts": "int64", "own_answer": "string", "own_score": "float64"}
_FORMAT = 1  # of the files in the cache folder
_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # trl renders a row's chat with these


def build_s3ft_dataset(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset,
    judge: str | judging.Judge | None = None,
    paraphraser: str | judging.Paraphraser | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: S3FTConfig | None = None,
) -> Dataset:
    """The S3FT data of `dataset` under `model`, which is left exactly as it was.

    Call it in every process of a distributed run; all return the same data. Finished blocks lie in
    `args.s3ft_cache_dir` and are not built again.

    Args:
        model: M0. Of a PeftModel the base model, with adapters disabled.
        dataset: Rows with `prompt` and `completion` (text, or lists of messages), or `messages` that end in an
            assistant message; the completion is the gold answer. Optional `gold`: what the judge compares with, if not
            the completion. Optional `id`, unique. Other columns go to the judge (and a callable paraphraser) by name.
        judge: Installed judge's name or `judge(prompt, answer, gold, **columns) -> bool | float`; None: `args.judge`.
        paraphraser: Name, `paraphraser(prompt, gold, **columns) -> str`, or an object with `.prompt(prompt, gold)` that
            gives what M0 answers; `"none"`: no such step; None: `args.paraphraser`.
        processing_class: The tokenizer; None loads the model's own.
        args: Settings; None takes S3FTConfig's defaults.

    Returns:
        A Dataset of the same length and order with the columns prompt, completion, source ("self", "paraphrase",
        "gold"), judge_score (of the target; null for gold), gold (text of the gold completion), sample_id, logp_gold
        and logp_target: log p(completion | prompt) under M0, end-of-sequence token included, summed over tokens (nats);
        their means over rows are the diagnostic of the paper's Table 1. Also judge (the qualified name of what judged),
        attempts (answers and rewritings made for the row), own_answer (M0's first own answer, kept where it was not
        chosen too) and own_score (its verdict; null if it was empty or did not end, which no judge sees): null in rows
        that an older version built. Also tools and chat_template_kwargs, if given.

    Raises:
        TypeError: the dataset, a row, the judge's verdict or a paraphrase has the wrong type.
        ValueError: empty data, a missing judge or column, a judge that raised (the row is named), repeated ids, a
            cache folder that holds another run's data, `drop_failures` that leaves no row, or `s3ft_vllm` without vLLM.
    """
    args = args if args is not None else S3FTConfig()
    builder = _Builder(
        model,
        processing_class if processing_class is not None else load_tokenizer(model),
        *_helpers(judge, paraphraser, args),
        args,
    )
    rows = read_rows(dataset)
    blocks = [rows[i : i + args.s3ft_batch_size] for i in range(0, len(rows), args.s3ft_batch_size)]
    cache = _Cache(Path(args.s3ft_cache_dir or Path(args.output_dir) / "_s3ft_data"), builder.header(rows))
    done = cache.open()
    todo = [b for b in range(len(blocks)) if b not in done]
    mine = todo[PartialState().process_index :: PartialState().num_processes]
    if mine:
        with generation.frozen(model) as base:
            if args.s3ft_vllm:
                builder = replace(
                    builder, engine=Engine(base, builder.tokenizer, cast(dict[str, Any], args.s3ft_vllm_args or {}))
                )
            for b in tqdm(mine, "S3FT data", disable=args.disable_tqdm or not PartialState().is_main_process):
                cache.append(b, builder.block(base, blocks[b]))
    records = cache.close(map(len, blocks))
    counts = Counter(r["source"] for r in records)
    logger.info("S3FT targets: %s", ", ".join(f"{counts[s]} {s}" for s in ("self", "paraphrase", "gold")))
    kept = [(r, c) for r, c in zip(rows, records, strict=True) if not (args.drop_failures and c["source"] == "gold")]
    if not kept:
        raise ValueError(
            f"drop_failures is true and the judge found no right answer in {len(rows)} rows, so none is left; check the "
            "judge, or leave drop_failures out"
        )
    return _assemble([r for r, _ in kept], [c for _, c in kept], judging.name(builder.judge))


def _helpers(judge: Any, paraphraser: Any, args: S3FTConfig) -> tuple[judging.Judge, judging.Paraphraser | None]:
    """The judge and the paraphraser that `args` and its ablations leave."""
    judge_args, paraphraser_args = cast("list[dict[str, Any] | None]", [args.judge_args, args.paraphraser_args])
    found = judging.resolve_judge(args.judge if judge is None else judge, judge_args)
    rewriter = judging.resolve_paraphraser(args.paraphraser if paraphraser is None else paraphraser, paraphraser_args)
    if args.string_judge:
        found = judging.resolve_judge("exact", {"ignore_case": False})
    return found, None if args.no_paraphrase else rewriter


def load_tokenizer(model: PreTrainedModel | PeftModel) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model.config._name_or_path)


# --- rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row as read. `gold` is the completion's text; `reference` what the judge compares with."""

    id: Any
    prompt: Any
    completion: Any
    gold: str
    reference: Any
    columns: dict[str, Any]

    def with_text(self, text: str) -> Any:
        """A completion like the row's own, with another text."""
        if isinstance(self.completion, str):
            return text
        return [{"role": self.completion[0]["role"], "content": text}]


def check_dataset(dataset: Any) -> None:
    """Raise unless it is a Dataset with rows and the columns S3FT reads."""
    if not isinstance(dataset, Dataset):
        raise TypeError(f"train_dataset is {type(dataset).__name__}; S3FT needs a datasets.Dataset (with a length)")
    if len(dataset) == 0:
        raise ValueError("train_dataset is empty; give at least one row")
    columns = set(dataset.column_names)
    if not ({"prompt", "completion"} <= columns or "messages" in columns) or {"image", "images"} & columns:
        raise ValueError(
            f"train_dataset has the columns {sorted(columns)}; S3FT needs prompt and completion, or messages, and no "
            "images"
        )


def read_rows(dataset: Dataset) -> list[Row]:
    """The rows of a prompt-completion or `messages` dataset, checked."""
    check_dataset(dataset)
    rows = [_read_row(index, values) for index, values in enumerate(dataset)]
    repeated = [i for i, n in Counter(r.id for r in rows).items() if n > 1]
    if repeated:
        raise ValueError(
            f"column id of train_dataset repeats {repeated[0]!r}; give every row an id of its own, or none"
        )
    return rows


def _read_row(index: int, values: dict[str, Any]) -> Row:
    row_id = values.pop("id", None)
    row_id = index if row_id is None else row_id
    if not isinstance(row_id, int | str):
        raise TypeError(f"row {index} of train_dataset has the id {row_id!r}; give a text or a whole number, or no id")
    messages = values.pop("messages", None)
    prompt, completion = values.pop("prompt", None), values.pop("completion", None)
    gold: Any
    if prompt is None and isinstance(messages, list):
        prompt, completion = messages[:-1], messages[-1:]
    if isinstance(prompt, str) and isinstance(completion, str):
        gold = completion
    elif isinstance(prompt, list) and isinstance(completion, list) and prompt and len(completion) == 1:
        gold = completion[0].get("content") if completion[0].get("role") == "assistant" else None
    else:
        gold = None
    if not isinstance(gold, str):
        raise TypeError(
            f"row {row_id!r} of train_dataset has prompt {prompt!r:.60} and completion {completion!r:.60}; give two "
            "texts, or a list of messages and a list of one assistant message whose content is text"
        )
    reference = values.pop("gold", None)
    return Row(row_id, prompt, completion, gold, gold if reference is None else reference, values)


def _encode(tokenizer: PreTrainedTokenizerBase, row: Row, text: Any, **chat: Any) -> list[int]:
    """Token ids as trl's SFTTrainer makes them from the same row."""
    if isinstance(text, str):
        return tokenizer(text=text)["input_ids"]
    tools = row.columns.get("tools")
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    options |= row.columns.get("chat_template_kwargs") or {}
    return tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, **options, **chat)["input_ids"]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, row: Row, prompt: Any) -> list[int]:
    """Ids M0 continues: with a chat's generation prompt, without an EOS that the tokenizer puts after every text."""
    ids = _encode(tokenizer, row, prompt, **({} if isinstance(prompt, str) else {"add_generation_prompt": True}))
    if (
        isinstance(prompt, str)
        and ids
        and ids[-1] == tokenizer.eos_token_id
        and not prompt.endswith(tokenizer.eos_token)
    ):
        ids = ids[:-1]
    if not ids:
        raise ValueError(f"row {row.id!r} of train_dataset has a prompt without tokens; give it text")
    return ids


def encode_pair(tokenizer: PreTrainedTokenizerBase, row: Row, completion: Any) -> tuple[list[int], int]:
    """Ids of prompt + completion + EOS exactly as SFTTrainer trains on them, and where the completion starts."""
    prompt_ids = encode_prompt(tokenizer, row, row.prompt)
    if isinstance(completion, str) and not completion.endswith(tokenizer.eos_token):
        completion += tokenizer.eos_token
    ids = _encode(tokenizer, row, row.prompt + completion)
    start = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(prompt_ids))
    return ids, min(start, len(ids))


# --- the algorithm ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Builder:
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    judge: judging.Judge
    paraphraser: judging.Paraphraser | None
    args: S3FTConfig
    engine: Engine | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            raise TypeError(
                f"processing_class is {type(self.tokenizer).__name__}; pass a tokenizer (processor.tokenizer)"
            )
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos_token, so an answer's end cannot be seen; set it or pass eos_token"
            )

        if self.args.paraphrase_attempts > 1 and not isinstance(self.paraphraser, judging.PromptRewriter):
            raise ValueError(
                f"paraphrase_attempts is {self.args.paraphrase_attempts}, which only a model can use; leave it 1 with "
                f"paraphraser {judging.describe(self.paraphraser)}"
            )

    @cached_property
    def eos_ids(self) -> list[int]:
        """Every token that ends an answer: the tokenizer's and those of the model's generation config."""
        own = generation.base_model(self.model).generation_config.eos_token_id
        own = [] if own is None else own if isinstance(own, list) else [own]
        return sorted({self.tokenizer.eos_token_id, *own})

    def header(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What the built data depend on. A cache folder with another header is another run's."""
        args, tokenizer = self.args, self.tokenizer
        generation.check_adapters(self.model)
        vocabulary = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.special_tokens_map]
        # what was not there in older versions is named only where it is used, so that their data stay valid
        vllm = {"vllm": [engine_module().__version__, args.s3ft_vllm_args]} if args.s3ft_vllm else {}
        return vllm | {
            "format": _FORMAT,
            "model": generation.fingerprint(self.model),
            "tokenizer": _digest(vocabulary),
            "dataset": _digest([[r.id, r.prompt, r.completion, r.reference, r.columns] for r in rows]),
            "judge": judging.describe(self.judge),
            "judge_threshold": args.judge_threshold,
            "paraphraser": judging.describe(self.paraphraser),
            "s3ft_max_new_tokens": args.s3ft_max_new_tokens,
            "s3ft_batch_size": args.s3ft_batch_size,
            "num_candidates": args.num_candidates,
            "paraphrase_attempts": args.paraphrase_attempts,
            "s3ft_seed": args.s3ft_seed,
            "eos_token_id": self.eos_ids,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "full",
        }

    def block(self, base: PreTrainedModel, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Records of one block, in its order: the three sources in turn, then the log-probabilities."""
        chosen: dict[Any, tuple[str, str, float]] = {}
        told: dict[Any, dict[str, Any]] = {r.id: {"attempts": 0} for r in rows}
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        with torch.autocast(base.device.type, dtype=half) if half is not None else nullcontext():
            for attempt in range(self.args.num_candidates):
                self.attempt(base, rows, chosen, told, "self", attempt)
            for attempt in range(self.args.paraphrase_attempts if self.paraphraser is not None else 0):
                self.attempt(base, rows, chosen, told, "paraphrase", attempt)
            targets = [chosen.get(r.id, ("gold", r.gold, None)) for r in rows]
            logps = self.logps(base, rows, targets)
        return [
            {"source": source, "text": text, "score": score, "logp_gold": gold, "logp_target": target, **told[r.id]}
            for r, (source, text, score), (gold, target) in zip(rows, targets, logps, strict=True)
        ]

    def attempt(
        self,
        base: PreTrainedModel,
        rows: Sequence[Row],
        chosen: dict[Any, Any],
        told: dict[Any, dict[str, Any]],
        source: str,
        attempt: int,
    ) -> None:
        """One answer for every row that has no target yet; those the judge accepts become targets. `told` gets origins."""
        pending = [r for r in rows if r.id not in chosen]
        if not pending:
            return
        rewriter = self.paraphraser if isinstance(self.paraphraser, judging.PromptRewriter) else None
        if source == "paraphrase" and rewriter is None:
            texts = [self.rewritten(r, self.paraphraser, r.columns, str) for r in pending]
            answers = [generation.Generation(text, finished=True) for text in texts]
        else:
            prompts = [r.prompt for r in pending]
            if source == "paraphrase" and rewriter is not None:
                prompts = [self.rewritten(r, rewriter.prompt, {}, type(r.prompt)) for r in pending]
            seeds = [int(_digest([self.args.s3ft_seed, r.id, source, attempt])[:15], 16) for r in pending]
            encoded = [encode_prompt(self.tokenizer, r, p) for r, p in zip(pending, prompts, strict=True)]
            options: dict[str, Any] = {"max_new_tokens": self.args.s3ft_max_new_tokens, "eos_ids": self.eos_ids}
            options["seeds"] = seeds if attempt else None
            if self.engine is not None:
                answers = self.engine.generate(encoded, **options)
            else:
                answers = generation.generate(base, self.tokenizer, encoded, **options)
        # cut off or empty is wrong even if the number matches
        whole = [(r, a.text) for r, a in zip(pending, answers, strict=True) if a.finished and a.text.strip()]
        scores = judging.scores(self.judge, [(r.prompt, text, r.reference, r.columns, r.id) for r, text in whole])
        for row, answer in zip(pending, answers, strict=True):
            told[row.id]["attempts"] += 1
            if source == "self" and attempt == 0:
                told[row.id] |= {"own_answer": answer.text, "own_score": None}
        for (row, text), score in zip(whole, scores, strict=True):
            if source == "self" and attempt == 0:
                told[row.id]["own_score"] = score
            if score >= self.args.judge_threshold:
                chosen[row.id] = (source, text, score)

    def rewritten(self, row: Row, paraphraser: Any, columns: dict[str, Any], form: type) -> Any:
        """What the paraphraser makes of a row: text, or a prompt in the form of the row's own."""
        made = judging.call(paraphraser, "paraphraser", row.id, row.prompt, row.gold, columns=columns)
        if not isinstance(made, form):
            raise TypeError(
                f"paraphraser {judging.describe(paraphraser)} returned {made!r:.60} on row {row.id!r}; return "
                f"{'text' if form is str else 'a list of messages'}"
            )
        return made

    def logps(self, base: PreTrainedModel, rows: Sequence[Row], targets: Sequence[Any]) -> list[tuple[float, float]]:
        """(log p(gold | x), log p(target | x)) of each row, in nats."""
        golds = [encode_pair(self.tokenizer, r, r.completion) for r in rows]
        others = [
            encode_pair(self.tokenizer, r, r.with_text(text))
            for r, (source, text, _) in zip(rows, targets, strict=True)
            if source != "gold"
        ]
        longest = self.args.max_length
        if longest is not None and any(len(ids) > longest for ids, _ in golds + others):
            logger.warning_once(f"some rows are longer than max_length={longest} tokens: SFTTrainer cuts their end off")
        values = generation.sequence_logps(base, [p[0] for p in golds + others], [p[1] for p in golds + others])
        own = iter(values[len(rows) :])
        return [(g, g if t[0] == "gold" else next(own)) for g, t in zip(values[: len(rows)], targets, strict=True)]


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def _assemble(rows: Sequence[Row], records: Sequence[dict[str, Any]], judge: str) -> Dataset:
    data = {
        "prompt": [r.prompt for r in rows],
        "completion": [
            r.completion if c["source"] == "gold" else r.with_text(c["text"])
            for r, c in zip(rows, records, strict=True)
        ],
        "source": [c["source"] for c in records],
        "judge_score": [c["score"] for c in records],
        "gold": [r.gold for r in rows],
        "sample_id": [r.id for r in rows],
        "logp_gold": [c["logp_gold"] for c in records],
        "logp_target": [c["logp_target"] for c in records],
        "judge": [judge] * len(rows),
        **{name: [c.get(name) for c in records] for name in PROVENANCE if name != "judge"},
    }
    for name in _TEMPLATE_COLUMNS:
        if name in rows[0].columns:
            data[name] = [r.columns[name] for r in rows]
    built = Dataset.from_dict(data)
    kinds = {"judge_score": "float64", **PROVENANCE}  # a column of nulls has no type of its own
    return built.cast(Features({**built.features, **{name: Value(kind) for name, kind in kinds.items()}}))


# --- the cache folder: manifest.json, and one JSON line per finished block in part-<process>.jsonl -----------------


@dataclass(frozen=True)
class _Cache:
    folder: Path
    header: dict[str, Any]

    @property
    def part(self) -> Path:
        return self.folder / f"part-{PartialState().process_index}.jsonl"

    def open(self) -> dict[int, list[dict[str, Any]]]:
        """Blocks finished earlier, after checking that they are this run's. All processes meet here."""
        manifest = self.folder / "manifest.json"
        if PartialState().is_main_process:
            if not any(path.stat().st_size for path in self.folder.glob("part-*.jsonl")):
                self.folder.mkdir(parents=True, exist_ok=True)
                partial = manifest.with_suffix(".tmp")
                partial.write_text(json.dumps(self.header, indent=1))
                os.replace(partial, manifest)
            elif not manifest.exists():
                raise ValueError(
                    f"{self.folder} holds S3FT data without manifest.json; delete it, or give s3ft_cache_dir"
                )
        PartialState().wait_for_everyone()
        self.check(manifest)
        blocks = self.read()
        PartialState().wait_for_everyone()  # nobody writes before everybody has read: all deal the same blocks
        if self.part.exists():  # a line that a kill cut short is dropped before anything is appended to it
            text = self.part.read_bytes()
            if not text.endswith(b"\n"):
                self.part.write_bytes(text[: text.rfind(b"\n") + 1])
        return blocks

    def check(self, manifest: Path) -> None:
        try:
            found = json.loads(manifest.read_text())
        except FileNotFoundError:
            raise ValueError(
                f"{self.folder} is not seen by every process; give an s3ft_cache_dir that all machines share"
            ) from None
        except ValueError as exc:
            raise ValueError(f"{manifest} is not JSON ({exc}); delete {self.folder} to build the data again") from exc
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise ValueError(
                f"{manifest} has not format {_FORMAT}; another version wrote it, give another s3ft_cache_dir"
            )
        keys = [k for k in {**self.header, **found} if found.get(k) != self.header.get(k)]
        if keys:
            raise ValueError(
                f"{self.folder} holds S3FT data of another run, which differs in {', '.join(keys)}; give another "
                "s3ft_cache_dir or output_dir, or delete that folder to build the data again"
            )

    def read(self) -> dict[int, list[dict[str, Any]]]:
        blocks: dict[int, list[dict[str, Any]]] = {}
        for path in sorted(self.folder.glob("part-*.jsonl")):
            lines = path.read_text().split("\n")
            for number, line in enumerate(lines[:-1], 1):  # what follows the last line end was cut short by a kill
                try:
                    entry = json.loads(line)
                    blocks[entry["block"]] = entry["rows"]
                except (ValueError, TypeError, KeyError) as exc:
                    raise ValueError(
                        f"{path}, line {number} is corrupt ({exc!r}); delete {self.folder} to build the data again"
                    ) from exc
        return blocks

    def append(self, block: int, rows: list[dict[str, Any]]) -> None:
        with self.part.open("a") as file:
            file.write(json.dumps({"block": block, "rows": rows}) + "\n")

    def close(self, sizes: Iterable[int]) -> list[dict[str, Any]]:
        """All records in the order of the rows, once every process has written its own."""
        PartialState().wait_for_everyone()
        found = self.read()
        wrong = [b for b, size in enumerate(sizes) if len(found.get(b, ())) != size]
        if wrong:
            raise ValueError(
                f"{self.folder} lacks block {wrong[0]}, or part of it; give an s3ft_cache_dir that all machines share, "
                "or delete that folder to build the data again"
            )
        return [record for b in sorted(found) for record in found[b]]
