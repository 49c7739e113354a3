"""What a candidate is worth: its divergence from the model, or its perplexity, on minibatches of exactly T tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hfgen.kit import checks

from .evolution import State

KINDS = ("kl", "perplexity")
TOKENS = 4096  # forwarded at once, fewer where LOGITS binds
LOGITS = 2**27  # entries of the logits held at once: 0.5 GB in float32


class Fitness:
    """Measures states. Candidates are the inner loop, batches the outer: the teacher runs once a batch, and the logits of
    no more than one batch are held, however large the minibatch and the vocabulary.

    Args:
        teacher: The model itself, causal, in eval mode.
        student: What the candidates are put into.
        assign: `assign(plan)` puts {name: level} into the student.
        names: Names of a state's units.
        rows: dicts with input_ids (and attention_mask), of any lengths.
        kind: "kl": KL(teacher || student) per predicted token, nats. "perplexity": of the rows' own next tokens.
        topk: KL over the teacher's k likeliest tokens only, both sides normalised on those; None: over all.
        seed: Of the minibatches.

    Raises:
        TypeError, ValueError: an unknown kind, a bad topk, rows without input_ids.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        assign: Callable[[Mapping[str, Any]], int],
        names: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
        kind: str = "kl",
        topk: int | None = None,
        seed: int = 0,
    ) -> None:
        checks.one_of("evopress", "fitness", kind, KINDS)
        if topk is not None:
            checks.integer("evopress", "kl_topk", topk, 2)
            if kind != "kl":
                raise ValueError(f"evopress.kl_topk is {topk}, which only fitness='kl' reads; leave it out")
        self.teacher, self.student, self.assign, self.names = teacher, student, assign, list(names)
        self.rows = [row for row in map(read_row, range(len(rows)), rows) if len(row)]
        self.tokens = sum(map(len, self.rows))
        self.kind, self.topk, self.seed = kind, topk, seed
        vocabulary = int(getattr(teacher.config.get_text_config(), "vocab_size", 2**15))
        self.at_once = max(1, min(TOKENS, LOGITS // vocabulary))

    def need(self, tokens: int) -> None:
        """Raise ValueError unless a minibatch of so many tokens can be drawn."""
        if tokens > self.tokens:
            raise ValueError(
                f"the calibration rows hold {self.tokens} tokens (padding not counted), but a minibatch takes {tokens}; "
                "give more rows, or smaller tokens= and initial_tokens="
            )

    def identity(self) -> dict[str, Any]:
        """What fixes the scores beside the model, as JSON."""
        found = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            found.update(row.numpy().tobytes() + b"|")
        return {"rows": found.hexdigest(), "fitness": self.kind, "kl_topk": self.topk}

    def __call__(self, states: Sequence[State], tokens: int, name: str) -> list[float]:
        """The score of each state on the minibatch of that name, less is better."""
        return self.of([dict(zip(self.names, state, strict=True)) for state in states], tokens, name)

    @torch.no_grad()
    def of(self, plans: Sequence[Mapping[str, Any]], tokens: int, name: str) -> list[float]:
        """The same for plans {name: level}; units a plan does not name keep what they have."""
        self.need(tokens)
        totals, predicted = torch.zeros(len(plans), dtype=torch.float64), 0
        for batch in self._batches(tokens, name):
            ids, mask = batch["input_ids"], batch["attention_mask"]
            there = mask[:, 1:].bool()  # positions whose next token is in the row
            wanted = self._wanted(batch, there)
            predicted += int(there.sum())
            for i, plan in enumerate(plans):
                self.assign(plan)
                totals[i] += self._loss(self._logits(self.student, batch)[:, :-1][there], wanted, ids[:, 1:][there])
        if not predicted:
            raise ValueError(
                f"no row of the minibatch has two tokens, so nothing is predicted in {tokens}; give longer rows"
            )
        means = totals / predicted
        return [float(v) for v in (means.exp() if self.kind == "perplexity" else means)]

    def minibatch(self, tokens: int, name: str) -> list[Tensor]:
        """Rows in random order, the last one cut, so that they have exactly `tokens` tokens."""
        rows, left = [], tokens
        for i in random.Random(f"evopress {self.seed} minibatch {name}").sample(range(len(self.rows)), len(self.rows)):
            rows.append(self.rows[i][:left])
            left -= len(rows[-1])
            if not left:
                break
        return rows

    def _batches(self, tokens: int, name: str) -> Iterator[dict[str, Tensor]]:
        """The minibatch by length, padded on the right, which a causal model's earlier positions do not see."""
        rows, device = sorted(self.minibatch(tokens, name), key=len, reverse=True), self.student.device
        while rows:
            count = max(1, self.at_once // len(rows[0]))
            part, rows = rows[:count], rows[count:]
            padded = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in part])[:, None]
            yield {"input_ids": padded.to(device), "attention_mask": mask.long().to(device)}

    def _wanted(self, batch: dict[str, Tensor], there: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """The teacher's log-probabilities (P, V or k), and the k tokens they are of."""
        if self.kind == "perplexity":
            return None
        logits = self._logits(self.teacher, batch)[:, :-1][there].float()
        if self.topk is None or self.topk >= logits.shape[-1]:
            return logits.log_softmax(-1), None
        top = logits.topk(self.topk, dim=-1)
        return top.values.log_softmax(-1), top.indices

    def _loss(self, logits: Tensor, wanted: tuple[Tensor, Tensor | None] | None, labels: Tensor) -> float:
        """The sum over positions; float32, added up in float64."""
        if wanted is None:
            return float(F.cross_entropy(logits.float(), labels, reduction="none").double().sum())
        target, tokens = wanted
        found = (logits if tokens is None else logits.gather(-1, tokens)).float().log_softmax(-1)
        return float(F.kl_div(found, target, reduction="none", log_target=True).sum(-1).double().sum())

    def _logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = getattr(model(**batch, use_cache=False), "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[:2] != batch["input_ids"].shape:
            raise ValueError(f"{type(model).__name__} gives no logits per token; search on a causal language model")
        return logits


def read_row(at: int, row: Any) -> Tensor:
    """The tokens (L) of a row, padding left out. Raises ValueError where it has none."""
    if not isinstance(row, Mapping) or "input_ids" not in row:
        have = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(
            f"calibration row {at} has {have}; give dicts with input_ids (hfgen.kit.calibration.read_rows)"
        )
    ids, mask = torch.as_tensor(row["input_ids"]).flatten().long().cpu(), row.get("attention_mask")
    return ids if mask is None else ids[torch.as_tensor(mask).flatten().bool().cpu()]
