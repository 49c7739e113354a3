"""The share of training tokens whose softmax has collapsed, and what to do about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfgen.kit import checks
from hfgen.kit.examples import tiny_run
from hfgen.kit.measures import Probe, probe_rows, share_above
from hfgen.kit.monitor import Event, MonitorCallback, summed

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
_BLOCK = 64  # rows of logits at a time: the copies stay small beside the model's
ADVICE = {
    "softmax": (
        "Train with the StableMax cross-entropy, which replaces each logit x by sign(x) * log(1 + |x|) before the softmax "
        "and does not round (from scratch only: it ends the calibration of a pretrained model); or keep the logits small "
        "with weight decay or label smoothing; or stop here if the run has learnt what it should."
    ),
    "stablemax": "Compute the loss in float64, or keep the logits small with weight decay.",
}


class SoftmaxCollapseCallback(MonitorCallback):
    """Says when training tokens have collapsed: their softmax is 1 to the last bit of the loss's dtype.

    With o = z - max z and S = sum_j exp(o_j), a token has collapsed when S == 1: every other class has been rounded
    away, in float32 where it lies more than ln 2^24 = 16.6 below (36.7 in float64, 7.6 in float16, 5.5 in bfloat16).
    With the right class on top its loss is exactly 0 and its gradient on the correct logit too, so that the run goes on
    without learning from it. Metrics, under ``hfgen/softmax_collapse/``, over the same `tokens` valid targets of `rows`
    training rows at every look: ``rate`` (share with S == 1), ``zero_loss`` (share whose loss is exactly 0),
    ``logit_scale`` (mean of max |z|) and ``tokens``. With ``loss="stablemax"``, ``rate`` is the share with
    s(z_y) / sum_j s(z_j) == 1. Source: Prieto et al. 2025, section 3.

    Finding ``softmax_collapse``: the share with loss 0 exceeds `threshold` (a collapsed token with another class on top
    still teaches); confidence is the probability of that under a uniform prior, given the tokens looked at.

    Args:
        threshold: Share of tokens above which it is said.
        confidence: How sure it must be.
        on_collapse: ``"warn"``, or ``"stop"`` to end training there.
        loss: ``"softmax"``, or ``"stablemax"`` for a run trained with StableMax.
        dtype: Of the loss. None: float32 for token models (the host computes their loss so), else that of the logits.
        every: Optimizer steps between looks.
        rows: Training rows to look at. None: twice those of an optimizer step on one rank, at most 256.
        tokens: Valid targets of them, evenly spaced.
        trainer: See `MonitorCallback`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range; in `train()`: a streamed training set, or one
            without class labels, or FSDP 1.
    """

    name = "softmax_collapse"
    cost = (
        "one look forwards rows for two thirds of a step's cost at most and projects 256 tokens: under 1 % of the time at "
        "a look every 100 steps; no memory that a training step does not need as well"
    )
    witness = "a look at a training token"

    def __init__(
        self,
        threshold: float = 0.2,
        confidence: float = 0.95,
        on_collapse: str = "warn",
        loss: str = "softmax",
        dtype: str | None = None,
        every: int = 100,
        rows: int | None = None,
        tokens: int = 256,
        trainer: Any = None,
    ) -> None:
        owner = type(self).__name__
        for field, value in (("threshold", threshold), ("confidence", confidence)):
            checks.number(owner, field, value, low=0.0, high=1.0)
        checks.one_of(owner, "on_collapse", on_collapse, ("warn", "stop"))
        checks.one_of(owner, "loss", loss, ("softmax", "stablemax"))
        checks.one_of(owner, "dtype", dtype, (None, *DTYPES))
        if rows is not None:
            checks.integer(owner, "rows", rows, low=1)
        checks.integer(owner, "tokens", tokens, low=1)
        super().__init__(every, trainer)
        self.threshold, self.confidence, self.on_collapse, self.loss = threshold, confidence, on_collapse, loss
        self.dtype, self.rows, self.tokens = dtype, rows, tokens
        self._probe: Probe

    def arguments(self) -> dict[str, Any]:
        fields = ("threshold", "confidence", "on_collapse", "loss", "dtype", "rows", "tokens")
        return super().arguments() | {field: getattr(self, field) for field in fields}

    def begin(self, event: Event) -> None:
        self.needs_forward(event)
        self._probe = Probe(type(self).__name__, event, self.rows or probe_rows(event.args), self.tokens)

    def look(self, event: Event) -> dict[str, float]:
        sums = torch.zeros(4, dtype=torch.float64, device=event.args.device)
        for logits, targets, _ in self._probe.forward(event.model):
            dtype = DTYPES[self.dtype] if self.dtype else logits.dtype
            if self.dtype is None and self._probe.of_tokens:
                dtype = torch.promote_types(dtype, torch.float32)
            for part, wanted in zip(logits.split(_BLOCK), targets.split(_BLOCK), strict=True):
                sums += collapse_counts(part.to(dtype), wanted, self.loss)
        count, collapsed, zero, scale = summed(sums).tolist()
        if not count:
            return {}
        self.fire()
        found = {
            "rate": collapsed / count, "zero_loss": zero / count, "logit_scale": scale / count, "tokens": int(count)
        }  # fmt: skip
        self.judge(event.state, found)
        if self.findings and self.on_collapse == "stop":
            event.control.should_training_stop = True
        return found

    def judge(self, state: Any, row: dict[str, Any]) -> None:
        """Makes the findings of a row of `history` measured at ``state.global_step``: of a log, with any thresholds."""
        zero, count = row["zero_loss"] * row["tokens"], row["tokens"]
        sure = share_above(zero, count, self.threshold)
        if sure < self.confidence:
            return
        sentence = (
            f"Softmax collapse: {zero / count:.0%} of the training tokens looked at are predicted with a probability that "
            "is rounded to exactly 1; their loss is 0 and they no longer teach the model."
        )
        follow = ("output_logits", "adam_eps", "overfit", "overconfident", "memorised")
        self.finding("softmax_collapse", state.global_step, sure, sentence, ADVICE[self.loss], explains=follow)


def collapse_counts(logits: Tensor, targets: Tensor, loss: str = "softmax") -> Tensor:
    """(tokens, collapsed, with loss 0, sum of max |z|), float64; logits (n, classes) in the loss's dtype, targets (n,)."""
    at = targets[:, None]
    if loss == "softmax":
        off = logits - logits.amax(-1, keepdim=True)
        total = off.exp().sum(-1)
        collapsed, zero = total == 1, off.gather(-1, at)[:, 0] - total.log() == 0
    else:
        raised = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))
        own, total = raised.gather(-1, at)[:, 0], raised.sum(-1)
        collapsed, zero = own / total == 1, own.log() - total.log() == 0
    scale = logits.abs().amax(-1).double().sum()
    return torch.stack([scale.new_tensor(len(logits)), collapsed.double().sum(), zero.double().sum(), scale])


def example(folder: str) -> dict[str, Any]:
    """Keyword arguments of a tiny Trainer run in which some tokens have collapsed (for the conformance kit)."""
    run = tiny_run(folder)
    with torch.no_grad():
        run["model"].lm_head.weight.mul_(300)  # logits far apart
    return run | {"callbacks": [SoftmaxCollapseCallback(every=2)]}
