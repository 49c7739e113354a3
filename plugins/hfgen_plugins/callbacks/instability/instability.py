"""Signs that a run is about to diverge, and their extrapolation."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hfgen.kit import checks
from hfgen.kit.examples import tiny_run
from hfgen.kit.measures import Probe, probe_rows, share_above
from hfgen.kit.monitor import Event, MonitorCallback, loss_scale, summed

ATTENTION = "hfgen_instability"  # the name of the measuring attention function at the host
_BLOCK = 2**22  # attention logits held at a time, 16 MiB
_LOSSES = 40  # logged losses that are kept
_EARLY, _AT_ONCE = 10, 2.0  # logged losses, and nats above the first of them
_FOLLOW = (  # what a diverging run brings along
    "loss_spike", "output_logits", "attention_logits", "blow_up", "adam_eps", "overconfident", "softmax_collapse", "overfit"
)  # fmt: skip
_LESS = "Lower the learning rate or warm it up for longer"


class Attention:
    """The largest attention logit of every layer that is called while `watch` is on; device scalars, no transfer."""

    def __init__(self) -> None:
        self.layers: dict[int, Tensor] = {}
        self.rows: Tensor | None = None  # (rows, length), which tokens are no padding

    def take(self, module: nn.Module, query: Tensor, key: Tensor, allowed: Tensor | None, scale: float) -> None:
        """query (rows, heads, q, d), key (rows, kv heads, k, d), allowed broadcastable to (rows, 1, q, k) or None."""
        largest = largest_logit(query, key, allowed, scale, self.rows)
        before = self.layers.get(id(module))
        self.layers[id(module)] = largest if before is None else torch.maximum(before, largest)


_WATCHING: ContextVar[Attention] = ContextVar("hfgen_instability")


def largest_logit(query: Tensor, key: Tensor, allowed: Tensor | None, scale: float, rows: Tensor | None) -> Tensor:
    """max of scale * q . k over pairs that attend, float32 scalar; no more than `_BLOCK` products are held.

    Args:
        query, key: (rows, heads, q, d) and (rows, kv heads, k, d), after rotation.
        allowed: True where a query sees a key, broadcastable to (rows, 1, q, k), or None.
        scale: 1 / sqrt(d) in most models.
        rows: (rows, q), True for queries that count, or None.
    """
    key = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
    size = max(1, _BLOCK // (query.shape[0] * query.shape[1] * key.shape[2]))
    found = query.new_tensor(-math.inf, dtype=torch.float32)
    for start in range(0, query.shape[2], size):
        part = slice(start, start + size)
        products = query[:, :, part].float() @ key.transpose(2, 3) * scale
        if allowed is not None:
            products = products.masked_fill(~allowed[:, :, part], -math.inf)
        if rows is not None and rows.shape[1] == query.shape[2]:
            products = products.masked_fill(~rows[:, None, part, None], -math.inf)
        found = torch.maximum(found, products.amax())
    return found


def _measuring(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The host's attention, after its largest logit was taken."""
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    allowed = attention_mask
    if allowed is None and causal and query.shape[2] > 1:
        allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    elif allowed is not None and allowed.dtype != torch.bool:
        allowed = allowed > torch.finfo(allowed.dtype).min / 2
    scale = kwargs.get("scaling")
    _WATCHING.get().take(module, query, key, allowed, query.shape[-1] ** -0.5 if scale is None else scale)
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    eager = sys.modules[type(module).__module__].eager_attention_forward  # what sdpa cannot do
    added = None
    if allowed is not None:
        added = torch.zeros_like(allowed, dtype=query.dtype).masked_fill(~allowed, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, added, **kwargs)


AttentionInterface.register(ATTENTION, _measuring)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def watch(model: nn.Module) -> Iterator[Attention]:
    """Within it the model's attention is measured, whatever its implementation; its configuration is put back."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        _collect(getattr(module, "config", None), configs)
    before = {key: config._attn_implementation for key, config in configs.items()}
    attention = Attention()
    token = _WATCHING.set(attention)
    try:
        for config in configs.values():
            config._attn_implementation = ATTENTION
        yield attention
    finally:
        for key, config in configs.items():  # outer ones first: they hand theirs down
            config._attn_implementation = before[key]
        _WATCHING.reset(token)


def _collect(config: Any, found: dict[int, Any]) -> None:
    if hasattr(config, "_attn_implementation_internal") and id(config) not in found:
        found[id(config)] = config
        for name in config.sub_configs:
            _collect(getattr(config, name, None), found)


def chance_of_crossing(steps: Sequence[int], values: Sequence[float], level: float, until: float) -> float:
    """Probability that a positive quantity which grows by a constant factor per step is at least `level` at `until`.

    Least squares of log values over steps; Student's t predictive distribution with n - 2 degrees of freedom. 0 with
    fewer than 4 points or a falling line.
    """
    from scipy.special import stdtr

    if len(steps) < 4:
        return 0.0
    x, y = np.asarray(steps, float), np.log(np.maximum(values, 1e-30))
    off, spread = x - x.mean(), ((x - x.mean()) ** 2).sum()
    slope = float((off * y).sum() / spread)
    if slope <= 0:
        return 0.0
    left = y - y.mean() - slope * off
    variance = max(float((left**2).sum()) / (len(x) - 2), 1e-12)
    error = math.sqrt(variance * (1 + 1 / len(x) + (until - x.mean()) ** 2 / spread))
    ahead = float(y.mean()) + slope * (until - float(x.mean())) - math.log(level)
    return float(stdtr(len(x) - 2, ahead / error))


def crossing(steps: Sequence[int], values: Sequence[float], level: float) -> float:
    """The step at which the same line reaches `level`; infinite where it does not rise."""
    slope, start = np.polyfit(np.asarray(steps, float), np.log(np.maximum(values, 1e-30)), 1)
    return (math.log(level) - float(start)) / float(slope) if slope > 0 else math.inf


def deviation(losses: Sequence[float]) -> float:
    """How many robust deviations the last loss lies above the median of those before.

    The deviation is 1.4826 times the median absolute deviation, at least 1 % of the median and a tenth of a nat: the
    noise of a loss near 0, as of a run that has learnt, makes no spike.
    """
    *before, last = losses
    middle = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(loss - middle) for loss in before)
    return (last - middle) / max(spread, 0.01 * abs(middle), 0.1)


class InstabilityCallback(MonitorCallback):
    """Watches what grows before a run diverges, and says where it leads.

    Metrics, under ``hfgen/instability/``, on the same training rows at every look: ``attn_logit_max`` (largest q . k /
    sqrt(d) of all layers, heads and pairs that attend, after rotation and norms, exact) and ``attn_layer`` (which);
    ``log_z`` (mean logsumexp of the output logits) and ``logit_mean``; of the gradient of the step before, as the
    optimizer sees it: ``grad_rms_min`` (smallest sqrt(mean g^2) of a tensor that is not all 0) and, with Adam,
    ``eps_share`` (share of parameters whose tensor's is below 10 eps). Source: Wortsman et al. 2023, sections 3.1-3.4.

    Findings: ``attention_logits`` (above `warn`), ``blow_up`` (they will pass `alarm` before the run ends, and no later
    than as many steps ahead as have been seen), ``output_logits`` (log Z has moved by more than `drift`), ``adam_eps``
    (half the parameters), ``loss_spike`` (a logged loss more than `spike` robust deviations above the last 20) and
    ``divergence`` (the last 20 logged losses lie above the first, by more than `worse` unless a
    nat had been gained before; or one of the first 10 lies 2 nats above it). Confidence: 1 for what is measured exactly; of
    blow_up the predictive probability; of a spike 1 - 1 / deviations^2 (Chebyshev); of divergence the probability that
    losses above the first are the majority (uniform prior), at once 1 - exp(-rise), a score.

    Args:
        warn, alarm: Attention logits.
        drift: Nats of log Z from the first look.
        spike: Robust deviations.
        worse: Nats of the logged loss.
        confidence: How sure a predicted blow-up must be.
        window: Looks the prediction is fitted to, 4 or more.
        every: Optimizer steps between looks.
        rows: Training rows to look at. None: those of an optimizer step on one rank, at most 128.
        tokens: Valid targets of them, for the output logits.
        trainer: See `MonitorCallback`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range; in `train()`: a streamed training set, or one
            without class labels, or FSDP 1.
    """

    name = "instability"
    cost = (
        "one look forwards the rows of one step and repeats the products of queries and keys, and reads the gradient once: "
        "under 1 % of the time at a look every 100 steps; 16 MiB of attention logits at a time"
    )
    witness = "a look at output logits"

    def __init__(
        self,
        warn: float = 1e3,
        alarm: float = 1e4,
        drift: float = 20.0,
        spike: float = 6.0,
        worse: float = 0.3,
        confidence: float = 0.95,
        window: int = 10,
        every: int = 100,
        rows: int | None = None,
        tokens: int = 256,
        trainer: Any = None,
    ) -> None:
        owner = type(self).__name__
        for field, value in (("warn", warn), ("drift", drift), ("spike", spike), ("worse", worse)):
            checks.number(owner, field, value, low=0.0)
        checks.number(owner, "alarm", alarm, low=warn)
        checks.number(owner, "confidence", confidence, low=0.0, high=1.0)
        checks.integer(owner, "window", window, low=4)
        if rows is not None:
            checks.integer(owner, "rows", rows, low=1)
        checks.integer(owner, "tokens", tokens, low=1)
        super().__init__(every, trainer)
        self.warn, self.alarm, self.drift, self.spike, self.confidence = warn, alarm, drift, spike, confidence
        self.worse, self.window, self.rows, self.tokens = worse, window, rows, tokens
        self._probe: Probe
        self._rms: Tensor | None = None
        self._sizes: list[int] = []
        self._losses: list[float] = []
        self._above: int | None = None  # the step from which on all logged losses count as lost
        self._gained = False  # whether a logged loss was a nat below the first

    def arguments(self) -> dict[str, Any]:
        fields = ("warn", "alarm", "drift", "spike", "worse", "confidence", "window", "rows", "tokens")
        return super().arguments() | {field: getattr(self, field) for field in fields}

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "above": self._above, "gained": self._gained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses, self._above = list(state["losses"]), state.get("above")
        self._gained = state.get("gained", False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rms, self._losses, self._above, self._gained = None, [], None, False
        super().on_train_begin(args, state, control, **kwargs)

    def begin(self, event: Event) -> None:
        self.needs_forward(event)
        rows = self.rows or max(1, probe_rows(event.args) // 2)
        self._probe = Probe(type(self).__name__, event, rows, self.tokens)

    # --- what is measured -------------------------------------------------------------------------------------------

    def look(self, event: Event) -> dict[str, float]:
        sums = torch.zeros(3, dtype=torch.float64, device=event.args.device)
        with watch(event.model) as attention:
            passes = self._probe.forward(event.model, before=lambda inputs: _mark(attention, inputs))
            for logits, _, _ in passes:
                z = logits.float().logsumexp(-1).double().sum() if len(logits) else sums[0] * 0
                sums += torch.stack([z, logits.double().mean(-1).sum(), z.new_tensor(len(logits))])
        log_z, mean, count = summed(sums).tolist()
        found = {"log_z": log_z / count, "logit_mean": mean / count} if count else {}
        if count:
            self.fire()
        found |= _largest(attention) | self._gradient(event)
        found = {key: value for key, value in found.items() if math.isfinite(value)}
        self.judge(event.state, found)
        return found

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        if (step % self.every and step < state.max_steps) or getattr(args, "deepspeed", None):
            return
        grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None and p.grad.numel()]
        if not grads:
            return
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
        whole = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms])
        self._sizes = [g.numel() for g in grads]
        self._rms = whole / loss_scale(kwargs["optimizer"])

    def _gradient(self, event: Event) -> dict[str, float]:
        if self._rms is None:
            return {}
        sizes = np.array(self._sizes, float)
        rms, self._rms = self._rms.double().cpu().numpy() / np.sqrt(sizes), None
        if not (rms > 0).any() or not np.isfinite(rms).all():  # a step that fp16's scaler skips has no gradient
            return {}
        found = {"grad_rms_min": float(rms[rms > 0].min())}
        group = event.optimizer.param_groups[0]
        if "betas" in group and "eps" in group:
            low = (rms > 0) & (rms < 10 * group["eps"])  # all 0: not used, or the first step of an adapter
            found["eps_share"] = float(sizes[low].sum() / sizes.sum())
        return found

    # --- what it means ----------------------------------------------------------------------------------------------

    def judge(self, state: Any, found: dict[str, Any]) -> None:
        """Makes the findings of a row of `history` measured at ``state.global_step``: of a log, with any thresholds."""
        step = state.global_step
        if (largest := found.get("attn_logit_max", 0.0)) > self.warn:
            far = "runs that pass 10,000 have been seen to diverge" if largest <= self.alarm else "expect divergence"
            self.finding(
                "attention_logits", step, 1.0,
                f"Attention logits have grown to {largest:.3g} in layer {found['attn_layer']:.0f}; {far}.",
                f"{_LESS}, or use a model with normalised queries and keys.",
            )  # fmt: skip
        if "attn_logit_max" in found:
            self._predict(state, found["attn_logit_max"])
        first = next((row["log_z"] for row in self.history if "log_z" in row), None)
        if first is not None and abs(found.get("log_z", first) - first) > self.drift:
            self.finding(
                "output_logits", step, 1.0,
                f"Output logits diverge: log Z has moved from {first:.3g} to {found['log_z']:.3g}.",
                f"{_LESS}, or add a z-loss, 1e-4 * (log Z)^2 per token.",
            )  # fmt: skip
        if found.get("eps_share", 0.0) >= 0.5:
            self.finding(
                "adam_eps", step, 1.0,
                f"Gradients are as small as Adam's eps for {found['eps_share']:.0%} of the parameters: updates shrink.",
                "Set adam_epsilon to 1e-15, or stop: the loss may have nothing left to teach.",
            )  # fmt: skip

    def _predict(self, state: Any, largest: float) -> None:
        rows = [(row["step"], row["attn_logit_max"]) for row in self.history if "attn_logit_max" in row]
        steps, values = zip(*[*rows, (state.global_step, largest)][-self.window :], strict=True)
        if largest >= self.alarm:
            return
        until = min(state.max_steps, 2 * steps[-1] - steps[0])
        sure = chance_of_crossing(steps, values, self.alarm, until)
        if sure >= self.confidence:
            at, seen = crossing(steps, values, self.alarm), steps[-1] - steps[0]
            self.finding(
                "blow_up", state.global_step, sure,
                f"Attention logits grow by a constant factor ({values[0]:.3g} to {values[-1]:.3g} in {seen} steps), to "
                f"pass {self.alarm:g} about step {at:.0f}.",
                f"{_LESS}, before that step.",
            )  # fmt: skip

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._take_loss(state.global_step, float(logs["loss"]))
        super().on_log(args, state, control, logs=logs, **kwargs)

    def _take_loss(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            self.finding(
                "divergence", step, 1.0, f"The training loss is {loss} at step {step}.", f"{_LESS}, or clip gradients."
            )
            return
        first, recent = (self._losses or [loss])[0], [*self._losses[-20:], loss]
        self._losses = [first, *self._losses[1:][-_LOSSES:], loss] if self._losses else [loss]
        if len(recent) > 10 and (far := deviation(recent)) > self.spike:
            self.finding(
                "loss_spike", step, 1 - far**-2,
                f"Loss spike: the training loss jumped to {loss:.3g} at step {step}, from about "
                f"{statistics.median(recent[:-1]):.3g}.",
                f"{_LESS}, lower max_grad_norm, or look at the rows of this step.", explains=("overconfident",),
            )  # fmt: skip
        if len(self._losses) <= _EARLY and loss > first + _AT_ONCE:
            self.finding(
                "divergence", step, 1 - math.exp(first - loss),
                f"The run diverges at once: the training loss rose from {first:.3g} to {loss:.3g} within its first "
                f"{len(self._losses)} logged values.",
                f"The learning rate is too high. {_LESS}.", explains=_FOLLOW,
            )  # fmt: skip
        self._gained = self._gained or loss < first - 1
        level, last = first + self.worse * (not self._gained), self._losses[-20:]
        self._above = None if loss <= level else step if self._above is None else self._above
        if len(self._losses) > 20 and self._above is not None and all(value > level for value in last):
            self.finding(
                "divergence", self._above, share_above(len(last), len(last), 0.5),
                f"The run diverges: the last {len(last)} logged losses ({statistics.median(last):.3g}) lie above the first "
                f"({first:.3g}).",
                f"The learning rate is too high. {_LESS}.",
                explains=_FOLLOW,
            )  # fmt: skip


def _mark(attention: Attention, inputs: dict[str, Any]) -> None:
    mask = inputs.get("attention_mask")
    attention.rows = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _largest(attention: Attention) -> dict[str, float]:
    """The largest logit of all layers and ranks, and which layer has it."""
    if not attention.layers:
        return {}
    layers = torch.stack(list(attention.layers.values()))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(layers, torch.distributed.ReduceOp.MAX)
    values = layers.tolist()
    return {"attn_logit_max": max(values), "attn_layer": values.index(max(values))}


def example(folder: str) -> dict[str, Any]:
    """Keyword arguments of a tiny Trainer run that is looked at (for the conformance kit)."""
    return tiny_run(folder, layers=2) | {"callbacks": [InstabilityCallback(every=2)]}
