"""The stop rule, the schedule and the monitor of hyperfitting."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hfgen.kit import checks
from hfgen.kit.examples import ROWS, tiny_run
from hfgen.kit.monitor import Event, MonitorCallback

_LOG = logging.getLogger("hfgen.hyperfit")
QUOTE = 8  # tokens in a row that count as quoted from the training set
_MOST_ROWS = 10_000  # training rows up to which quotations are looked for
_RATES = {"paper": (1e-6, 20, 0.0), "repo": (5e-6, 30, 0.01)}  # learning rate, epochs, weight decay


def hyperfit_args(variant: str = "paper") -> dict[str, Any]:
    """Keyword arguments for TrainingArguments or SFTConfig: constant rate, no warm-up, no clipping, batch 8, all epochs.

    For 2000 rows of exactly 256 tokens, full fine-tuning, loss on all tokens, no dropout.

    Args:
        variant: ``paper`` (Adam, learning rate 1e-6, no weight decay, 20 epochs; these from memory, not read there) or
            ``repo``, the authors' code (AdamW, 5e-6, weight decay 0.01, 30 epochs).

    Raises:
        ValueError: an unknown variant.
    """
    checks.one_of("hyperfit_args", "variant", variant, tuple(_RATES))
    rate, epochs, decay = _RATES[variant]
    return {
        "learning_rate": rate,
        "num_train_epochs": epochs,
        "weight_decay": decay,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8,
        "dataloader_drop_last": True,
        "load_best_model_at_end": False,
    }


class HyperfitCallback(MonitorCallback):
    """Stops when the training loss is near zero, and watches the greedy text of the model on the way there.

    Validation loss is expected to rise: do not stop on it. Metrics, under ``hfgen/hyperfit/``, on `sequences` held-out
    rows: ``val_loss`` (nats per token), ``entropy`` (nats) and ``top1`` (probability) of the next token; and on greedy
    continuations of their first `context` tokens by `new_tokens`: ``ttr`` (different tokens / tokens in the last
    `window`), ``seq_rep_4`` (share of 4-grams already seen in the same continuation), ``self_bleu`` (how alike the
    continuations are), ``greedy_entropy`` (nats), and for up to 10,000 training rows ``quoted`` (share of 8-grams that
    stand in them) and ``longest_quote`` (tokens). Source: Carlsson et al. 2025, section 3, and the authors' validation
    code; seq_rep_4 from Welleck et al. 2020, self-BLEU from Zhu et al. 2018.

    Args:
        stop_loss: Training stops when a logged training loss (the mean since the last log) is below it; None: never.
        held_out: Rows the model is not trained on: a dataset with ``input_ids``, or a list of token lists. The first
            `sequences` rows of at least `length` tokens are taken. None: the eval_dataset of the attached trainer.
        every: Optimizer steps between looks.
        sequences: How many held-out rows.
        length: Tokens of each that are read.
        context: Tokens a continuation starts from.
        new_tokens: Tokens each continuation has.
        window: Last tokens of it that ``ttr`` counts.
        batch_size: Rows in one forward.
        trainer: See `MonitorCallback`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range.
    """

    name = "hyperfit"
    cost = (
        "one look reads sequences x (length + context) tokens and writes new_tokens of them one by one: about 0.4 % of "
        "the tokens of 150 steps at batch 8 x 256, measured under 2 % of the time (recipes/bench/callbacks.py)"
    )
    witness = "a training loss below stop_loss"

    def __init__(
        self,
        stop_loss: float | None = 0.01,
        held_out: Any = None,
        every: int = 150,
        sequences: int = 8,
        length: int = 256,
        context: int = 32,
        new_tokens: int = 128,
        window: int = 96,
        batch_size: int = 8,
        trainer: Any = None,
    ) -> None:
        if stop_loss is not None:
            checks.number("HyperfitCallback", "stop_loss", stop_loss, low=0.0)
        for field, value, low in (
            ("sequences", sequences, 1), ("length", length, 2), ("context", context, 1), ("new_tokens", new_tokens, 1),
            ("window", window, 1), ("batch_size", batch_size, 1),
        ):  # fmt: skip
            checks.integer("HyperfitCallback", field, value, low=low)
        for field, value, most in (("context", context, length), ("window", window, new_tokens)):
            if value > most:
                raise ValueError(
                    f"HyperfitCallback.{field} is {value}; give at most {most}, the value of "
                    f"{'length' if field == 'context' else 'new_tokens'}"
                )
        super().__init__(every, trainer)
        self.stop_loss, self.sequences, self.length, self.context = stop_loss, sequences, length, context
        self.new_tokens, self.window, self.batch_size = new_tokens, window, batch_size
        self.held_out = None if held_out is None else _rows(held_out, sequences, length)
        self._quotes: np.ndarray | None = None

    def arguments(self) -> dict[str, Any]:
        fields = ("stop_loss", "held_out", "sequences", "length", "context", "new_tokens", "window", "batch_size")
        return super().arguments() | {field: getattr(self, field) for field in fields}

    def begin(self, event: Event) -> None:
        self.needs_forward(event)
        if event.args.load_best_model_at_end:
            raise ValueError(
                "args.load_best_model_at_end is True; set it to False: the best validation loss comes before hyperfitting"
            )
        if self.stop_loss is not None and event.args.logging_strategy == "no":
            raise ValueError(
                "args.logging_strategy is 'no', which hides the training loss; set 'steps', or "
                "HyperfitCallback(stop_loss=None)"
            )
        if departures := _departures(event.args, event.model):
            _LOG.warning("hyperfit: the recipe is departed from: " + "; ".join(departures))
        if self.held_out is None:
            dataset = getattr(self.trainer, "eval_dataset", None)
            if dataset is None:
                raise ValueError(
                    "HyperfitCallback.held_out is None and no trainer with an eval_dataset is attached; give held_out="
                )
            self.held_out = _rows(dataset, self.sequences, self.length)
        self._quotes = _training_quotes(event.train_dataloader)

    def look(self, event: Event) -> dict[str, float]:
        if self.stop_loss is None:
            self.fire()  # nothing to wait for: the looks are what it is there for
        model = event.model
        ids = torch.tensor(self.held_out, device=event.args.device)
        parts = [_predictions(model, ids[i : i + self.batch_size]) for i in range(0, len(ids), self.batch_size)]
        val_loss, entropy, top1 = torch.cat(parts, 1).mean(1).tolist()
        texts, sharp = [], []
        for start in range(0, len(ids), self.batch_size):
            text, uncertain = _continue(model, ids[start : start + self.batch_size, : self.context], self.new_tokens)
            texts.append(text.cpu())
            sharp.append(uncertain.cpu())
        text = torch.cat(texts)
        found = {
            "val_loss": val_loss,
            "entropy": entropy,
            "top1": top1,
            "ttr": type_token_ratio(text[:, -self.window :]),
            "seq_rep_4": repeated_ngrams(text, 4),
            "self_bleu": self_bleu(text),
            "greedy_entropy": float(torch.cat(sharp).mean()),
        }
        if self._quotes is not None and self.new_tokens >= QUOTE:
            known = np.isin(_ngram_hashes(text.numpy(), QUOTE), self._quotes)
            found |= {"quoted": float(known.mean()), "longest_quote": longest_quote(known)}
        return found

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.stop_loss is not None and logs and logs.get("loss", self.stop_loss) < self.stop_loss:
            self.fire()
            control.should_training_stop = True
            self.look_now(args, state, control, **kwargs)  # there will be no further step
        super().on_log(args, state, control, logs=logs, **kwargs)


def type_token_ratio(tokens: Tensor) -> float:
    """Different tokens / tokens of each row of `tokens` (rows, window), averaged over rows; in (0, 1]."""
    return sum(len(set(row)) for row in tokens.tolist()) / tokens.numel()


def repeated_ngrams(tokens: Tensor, n: int) -> float:
    """seq-rep-n: 1 - different n-grams / n-grams of each row of `tokens` (rows, length), averaged; 0 if length < n."""
    if tokens.shape[1] < n:
        return 0.0
    grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in tokens.tolist()]
    return 1 - sum(len(set(row)) / len(row) for row in grams) / len(grams)


def self_bleu(tokens: Tensor, n: int = 4) -> float:
    """BLEU of each row of `tokens` (rows, length) against all others, 1- to n-grams, averaged; in [0, 1], 0 for one row.

    All rows have one length, so there is no brevity penalty; without smoothing, a row that shares no n-gram counts 0.
    """
    rows, scores = tokens.tolist(), []
    counts = [[Counter(zip(*(row[i:] for i in range(k)), strict=False)) for row in rows] for k in range(1, n + 1)]
    for i in range(len(rows)):
        shared = []
        for of_k in counts:
            most: Counter[Any] = Counter()
            for other in of_k[:i] + of_k[i + 1 :]:
                most |= other
            shared.append((of_k[i] & most).total() / max(1, of_k[i].total()))
        scores.append(math.exp(sum(map(math.log, shared)) / n) if all(shared) else 0.0)
    return sum(scores) / len(scores)


def longest_quote(known: np.ndarray) -> int:
    """Tokens of the longest stretch all of whose 8-grams are known; `known` (rows, 8-grams) bool; 0 without any."""
    longest = 0
    for row in known:
        ends = np.flatnonzero(np.diff(np.concatenate(([0], row.astype(np.int8), [0]))))
        longest = max([longest, *(ends[1::2] - ends[::2]).tolist()])
    return longest + QUOTE - 1 if longest else 0


def _predictions(model: nn.Module, ids: Tensor) -> Tensor:
    """Loss, entropy and top-1 probability of the next token, (3, rows * (length - 1)), float32, from ids (rows, length)."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    found = []
    for row, targets in zip(
        logits[:, :-1], ids[:, 1:], strict=True
    ):  # row by row: float32 of one row of logits at a time
        log_p = row.float().log_softmax(-1)
        found.append(torch.stack((-log_p.gather(-1, targets[:, None])[:, 0], _entropy(log_p), log_p.amax(-1).exp())))
    return torch.cat(found, 1)


def _entropy(log_p: Tensor) -> Tensor:
    """-sum p log p over the last dimension, nats; p = 0 adds nothing."""
    return torch.special.entr(log_p.exp()).sum(-1)


class _Watch(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing; keeps the entropy of every step (rows,)."""

    def __init__(self) -> None:
        self.entropies: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.entropies.append(_entropy(scores.float().log_softmax(-1)))
        return scores


def _continue(model: Any, context: Tensor, new_tokens: int) -> tuple[Tensor, Tensor]:
    """Greedy continuation (rows, new_tokens) of context (rows, length), and the entropy of each step (rows, new_tokens).

    The end-of-text token is held back so that all continuations have one length.
    """
    watch = _Watch()
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new_tokens, min_new_tokens=new_tokens, use_cache=True,
        repetition_penalty=1.0, no_repeat_ngram_size=0, pad_token_id=0,
    )  # fmt: skip
    text = model.generate(
        input_ids=context, attention_mask=torch.ones_like(context), generation_config=config,
        logits_processor=LogitsProcessorList([watch]),
    )  # fmt: skip
    return text[:, context.shape[1] :], torch.stack(watch.entropies, 1)


def _rows(held_out: Any, sequences: int, length: int) -> list[list[int]]:
    """The first `sequences` rows of at least `length` tokens, cut to it: plain lists, so that they can be saved."""
    found: list[list[int]] = []
    for row in held_out:
        ids = row.get("input_ids") if isinstance(row, Mapping) else row
        ids = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids
        if isinstance(ids, str) or not isinstance(ids, Sequence) or not all(isinstance(token, int) for token in ids):
            raise TypeError(
                f"HyperfitCallback.held_out has a row that is not tokens ({str(row)[:80]}); tokenise it (column "
                "'input_ids', or lists of token ids), or leave it None and attach the trainer, whose eval_dataset is"
            )
        if len(ids) >= length:
            found.append(list(ids[:length]))
        if len(found) == sequences:
            return found
    raise ValueError(
        f"HyperfitCallback.held_out has {len(found)} rows of at least length={length} tokens; give {sequences} of them, "
        "or a smaller sequences or length"
    )


def _training_quotes(dataloader: Any) -> np.ndarray | None:
    """Sorted hashes of all 8-grams of the training rows, or None (said once) where they cannot be read cheaply."""
    dataset = getattr(dataloader, "dataset", None)
    try:
        rows = len(dataset)  # type: ignore[arg-type]
        if rows > _MOST_ROWS:
            _LOG.info(f"hyperfit: {rows} training rows are too many to look for quotations; 'quoted' is left out")
            return None
        ids = [np.asarray(dataset[i]["input_ids"]) for i in range(rows)]  # type: ignore[index]
        hashes = [_ngram_hashes(row[None], QUOTE)[0] for row in ids if len(row) >= QUOTE]
    except (TypeError, KeyError, IndexError, ValueError):
        _LOG.info("hyperfit: the training set has no rows with input_ids to read; 'quoted' is left out")
        return None
    return np.unique(np.concatenate(hashes)) if hashes else None


def _ngram_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """64-bit polynomial hashes of the n-grams of tokens (rows, length): (rows, length - n + 1), uint64."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64) + np.uint64(1), n, axis=1)
    powers = np.array([pow(0x9E3779B97F4A7C15, i, 2**64) for i in range(n)], dtype=np.uint64)
    return (windows * powers).sum(-1, dtype=np.uint64)  # wraps around modulo 2**64


def _departures(args: Any, model: nn.Module) -> list[str]:
    """What in this run is not the recipe, in words."""
    config: Any = getattr(model, "config", None)
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    dropouts += [v for k, v in values.items() if k.endswith(("dropout", "pdrop")) and isinstance(v, float)]
    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    found = {
        f"lr_scheduler_type is {scheduler!r}, not 'constant': a falling rate may never reach near-zero loss": (
            scheduler != "constant"
        ),
        f"warmup_steps is {args.warmup_steps}, not 0": bool(args.warmup_steps),
        "dropout is on": any(dropouts),
        "packed rows are trained on": bool(getattr(args, "packing", False)),
        "an adapter is trained, not the whole model": hasattr(model, "peft_config"),
    }
    return [text for text, departs in found.items() if departs]


def example(folder: str) -> dict[str, Any]:
    """Keyword arguments of a tiny Trainer run in which the callback looks and stops (for the conformance kit)."""
    monitor = HyperfitCallback(
        stop_loss=None, held_out=ROWS[16:], every=2, sequences=4, length=12, context=4, new_tokens=8, window=6
    )
    arguments = {**hyperfit_args(), "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    return tiny_run(folder, **arguments) | {"callbacks": [monitor]}
