"""Fewer mantissa bits in a run's GEMMs, simulated, and how sharp the loss is in the logits (Lee et al. 2024)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from hfgen.kit import checks
from hfgen.kit.examples import tiny_run
from hfgen.kit.measures import Probe, probe_rows
from hfgen.kit.monitor import Event, MonitorCallback, still_training, summed

ROUNDINGS = ("nearest-even", "truncate")
_BLOCK = 64  # rows of logits at a time: the copies stay small beside the model's


# --- rounding -------------------------------------------------------------------------------------------------------


def round_mantissa(x: Tensor, bits: int, exponent: int | None = None, rounding: str = "nearest-even") -> Tensor:
    """`x` rounded to a float with `bits` mantissa bits, in the shape and dtype of `x`; bit for bit what torch's casts give.

    ``bits=7`` is bfloat16, ``(10, 5)`` float16, ``(2, 5)`` float8_e5m2 and ``(3, 4)`` float8_e4m3fn, subnormals, -0,
    infinities and NaN included. Too large a number becomes infinite with 5 and more exponent bits (IEEE 754); with 4, whose
    format has no infinities, it stops at the largest one and so does infinity (torch casts so from 2.12 on, to NaN before).
    Truncation goes towards 0: no finite number becomes infinite. A float16 `x` may overflow where the format does not.

    Args:
        x: float32, bfloat16 or float16.
        bits: Mantissa bits without the leading one, 1 to 23.
        exponent: Exponent bits, 4 to 8; None: 8, float32's own range.
        rounding: ``"nearest-even"`` (ties to even) or ``"truncate"``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range.
    """
    _check_format("round_mantissa", "bits", bits, exponent, rounding)
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"round_mantissa.x is {found}; give a tensor of float32, bfloat16 or float16")
    value, drop = x.detach().float(), 23 - bits
    word = value.view(torch.int32)
    if drop and rounding == "nearest-even":  # half a unit, less one bit where the last kept bit is even
        word = word + ((word >> drop & 1) + ((1 << drop - 1) - 1))
    found = (word & -(1 << drop)).view(torch.float32)
    if exponent is not None and exponent < 8:
        found = _in_range(value, found, bits, exponent, rounding)
    return torch.where(value.isnan(), value, found).to(x.dtype)


def _in_range(value: Tensor, found: Tensor, bits: int, exponent: int, rounding: str) -> Tensor:
    """`found`, which is `value` rounded over float32's exponents, in the range of fewer of them."""
    bias = 2 ** (exponent - 1) - 1
    smallest, step = 2.0 ** (1 - bias), 2.0 ** (1 - bias - bits)  # normal number; distance of subnormal ones
    fixed = (value / step).trunc() if rounding == "truncate" else (value / step).round()  # torch rounds ties to even
    found = torch.where(value.abs() < smallest, fixed * step, found)
    # IEEE keeps the last exponent for infinities and NaN; E4M3 only its last code, for NaN
    largest = (2 - 2.0**-bits) * 2.0**bias if exponent > 4 else (2 - 2.0 ** (1 - bits)) * 2.0 ** (bias + 1)
    if exponent == 4:
        return found.clamp(-largest, largest)
    beyond = torch.full_like(value, largest if rounding == "truncate" else math.inf).copysign(value)
    return torch.where((found.abs() > largest) & value.isfinite(), beyond, found)


def _check_format(owner: str, field: str, bits: Any, exponent: Any, rounding: Any) -> None:
    checks.integer(owner, field, bits, low=1)
    if bits > 23:
        raise ValueError(f"{owner}.{field} is {bits}; float32 has 23 mantissa bits: give 1 to 23")
    checks.one_of(owner, "exponent", exponent, (None, 4, 5, 6, 7, 8))
    checks.one_of(owner, "rounding", rounding, ROUNDINGS)


class _Round(torch.autograd.Function):
    """round_mantissa with the gradient of the identity (straight through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *form: Any) -> Tensor:
        return round_mantissa(x, *form)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None, None


class _RoundGradient(torch.autograd.Function):
    """The identity whose gradient is rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *form: Any) -> Tensor:
        ctx.form = form
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return round_mantissa(grads[0], *ctx.form), None, None, None


# --- simulation -----------------------------------------------------------------------------------------------------


class Simulation:
    """What `simulate_mantissa` gives: until `remove`, or the end of a ``with``, the layers multiply rounded numbers.

    Attributes:
        layers: Names of the layers that are simulated.
        skipped: The other linear layers by name, each with the reason.
    """

    def __init__(self, form: tuple[int, int | None, str], gradients: bool) -> None:
        self.layers: list[str] = []
        self.skipped: dict[str, str] = {}
        self.form, self.gradients = form, gradients
        self.alive: Callable[[], bool] | None = None  # of a callback's run
        self._modules: list[nn.Module] = []
        self._counts: Tensor | None = None

    def remove(self) -> None:
        """Gives every layer its own forward back."""
        for module in self._modules:
            module.__dict__.pop("forward", None)
        self._modules = []

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    @contextmanager
    def counting(self, device: Any = "cpu") -> Iterator[Tensor]:
        """Sums over activations and weights rounded within, float64 (2, 4).

        The columns: numbers, changed ones, finite ones that are not 0, the sum of their relative errors.
        """
        self._counts = torch.zeros(2, 4, dtype=torch.float64, device=device)
        try:
            yield self._counts
        finally:
            self._counts = None

    def round(self, x: Tensor, kind: int) -> Tensor:
        """`x` rounded, and counted as activations (kind 0) or weights (1)."""
        found: Tensor = _Round.apply(x, *self.form)  # type: ignore[no-untyped-call]
        if self._counts is not None:
            before = x.detach().float()
            error = found.detach().float().sub(before).div_(before).abs_()  # NaN for 0, NaN and infinities
            known = error.isfinite()
            sums = (error > 0).sum(), known.sum(), error.masked_fill_(~known, 0.0).sum(dtype=torch.float64)
            self._counts[kind] += torch.stack([known.new_tensor(x.numel(), dtype=torch.int64), *sums])
        return found

    def _take(self, layers: dict[str, nn.Module]) -> None:
        self.layers, self._modules = list(layers), list(layers.values())
        for module in self._modules:
            module.__dict__["forward"] = _Forward(module, self)


class _Forward:
    """The simulated forward of one layer. An object and not a closure: a deep copy of the model copies it with it."""

    def __init__(self, module: Any, simulation: Simulation) -> None:
        self.module, self.simulation = module, simulation

    def __call__(self, x: Tensor) -> Tensor:
        module, simulation = self.module, self.simulation
        if simulation.alive is not None and not simulation.alive():
            simulation.remove()
            plain: Tensor = module.forward(x)
            return plain
        x, weight = simulation.round(x, 0), simulation.round(module.weight, 1)
        weight = weight.t() if isinstance(module, Conv1D) else weight
        if not simulation.gradients:
            return nn.functional.linear(x, weight, module.bias)
        y: Tensor = _RoundGradient.apply(nn.functional.linear(x, weight), *simulation.form)  # type: ignore[no-untyped-call]
        return y if module.bias is None else y + module.bias.to(y.dtype)  # the bias enters no GEMM


def simulate_mantissa(
    model: nn.Module,
    bits: int,
    exponent: int | None = None,
    rounding: str = "nearest-even",
    gradients: bool = False,
    head: bool = False,
) -> Simulation:
    """Rounds what enters the GEMMs of nn.Linear and transformers' Conv1D: weights and activations, straight through.

    The backward GEMMs multiply the same rounded numbers, and with `gradients` rounded gradients. Products are summed in
    the precision of the model; its weights, its gradients and what is saved stay what they are, under the same keys.

    Args:
        model: Of any dtype but float64, adapters and device placement included.
        bits, exponent, rounding: See `round_mantissa`. No scaling: what leaves a small exponent's range is lost.
        gradients: Also round the gradient of each output before the two backward GEMMs.
        head: Also the language-model head, which FP8 recipes leave alone, as does this by default. A trainer that
            multiplies by its weight itself (trl's fused loss) is not seen.

    Returns:
        A handle with ``remove()``, also a context manager, that names the layers and those skipped: packed ones and
        others that multiply by no ``weight`` of their own forward.

    Raises:
        TypeError, ValueError: a wrong argument, a simulated model, or one without such layers.
    """
    owner = "simulate_mantissa"
    _check_format(owner, "bits", bits, exponent, rounding)
    checks.boolean(owner, "gradients", gradients)
    checks.boolean(owner, "head", head)
    simulation, layers = Simulation((bits, exponent, rounding), gradients), {}
    get_head = getattr(model, "get_output_embeddings", None)
    heads = {id(m) for m in (get_head().modules() if not head and get_head and get_head() is not None else ())}
    for name, module in model.named_modules():
        own = module.__dict__.get("forward")
        if isinstance(own, _Forward):
            if own.simulation.alive is None or own.simulation.alive():
                raise ValueError(f"{owner}: {name} is simulated already; remove() that simulation first")
            own.simulation.remove()  # of a run that failed
            own = None
        if any(module.children()) or not (hasattr(module, "in_features") or isinstance(module, Conv1D)):
            continue
        if id(module) in heads:
            simulation.skipped[name] = "the head"
        elif type(module).forward not in (nn.Linear.forward, Conv1D.forward) or own is not None:
            simulation.skipped[name] = f"{type(module).__name__} has a forward of its own (packed or offloaded)"
        elif isinstance(module, NonDynamicallyQuantizableLinear):
            simulation.skipped[name] = "nn.MultiheadAttention multiplies by its weight without calling it"
        else:
            layers[name] = module
    if not layers:
        raise ValueError(
            f"{owner}: {type(model).__name__} has no nn.Linear or Conv1D to simulate; give a model that is not quantised "
            f"(skipped: {simulation.skipped or 'none'})"
        )
    simulation._take(layers)
    return simulation


# --- sharpness ------------------------------------------------------------------------------------------------------


def loss_sharpness(logits: Tensor, labels: Tensor, epsilon: float = 1e-3, ignore_index: int = -100) -> Tensor:
    """phi = 100 (max_{z' in C} f(z') - f(z)) / (1 + f(z)), C the box |z'_j - z_j| <= epsilon (|z_j| + 1) around the logits.

    f is the mean cross-entropy over valid tokens. It rises in every logit but the target's and falls in that one, so its
    maximum lies in a known corner of the box: closed form, no L-BFGS (ours; form of phi: Keskar et al. 2017, taken to the
    logits by Lee et al. 2024). A class with an infinite logit is left as it is.

    Args:
        logits: (..., classes); computed in float32 at least.
        labels: (...), int64; nothing is shifted.
        epsilon: Relative size of the box, above 0.
        ignore_index: Label of tokens that do not count.

    Returns:
        Scalar in percent, float32 or float64.

    Raises:
        TypeError, ValueError: shapes do not fit, no label is valid, or `epsilon` is not above 0.
    """
    checks.number("loss_sharpness", "epsilon", epsilon, low=0.0)
    if logits.shape[:-1] != labels.shape or labels.is_floating_point():
        raise ValueError(
            f"loss_sharpness.labels is {labels.dtype} of shape {tuple(labels.shape)} for logits of shape "
            f"{tuple(logits.shape)}; give class numbers of shape {tuple(logits.shape[:-1])}"
        )
    valid = labels != ignore_index
    if not valid.any():
        raise ValueError(f"loss_sharpness.labels holds only {ignore_index}; give at least one label")
    loss, rise = _loss_and_rise(logits[valid], labels[valid], epsilon)
    return 100 * rise.mean() / (1 + loss.mean())


def _loss_and_rise(logits: Tensor, labels: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """f and max f - f of each token (n,); logits (n, classes), labels (n,)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    at, logp = labels[:, None], z.log_softmax(-1)
    move = (epsilon * (z.abs() + 1)).masked_fill(z.isinf(), 0.0)
    own = move.gather(-1, at)
    move = move.scatter(-1, at, -own)
    # log sum_j p_j exp(move_j) - move_y, without taking the difference of two nearly equal losses
    rise = (logp.exp() * move.expm1()).sum(-1).log1p() + own[:, 0]
    return -logp.gather(-1, at)[:, 0], rise


class LowMantissaCallback(MonitorCallback):
    """Trains with fewer mantissa bits in the GEMMs, or as it is, and watches how sharp the loss is.

    Metrics, under ``hfgen/low_mantissa/``, over the same `tokens` valid targets of `rows` training rows at every look, in
    evaluation mode: ``sharpness`` (see `loss_sharpness`), ``loss`` and ``tokens``; with `mantissa_bits` also
    ``activations_changed`` and ``weights_changed`` (share of the numbers entering GEMMs in that look that rounding
    changed), ``activations_error`` and ``weights_error`` (its relative error, mean over the numbers
    that are not 0). A figure that is not finite is left out. The paper's sharpness rises before the loss diverges; what
    we measured of that is this card's claim. It makes no findings.

    The simulation lasts as long as `train()`: evaluations inside it, and looks, see the numbers a machine of that
    precision would give; the model that is saved, or evaluated afterwards, is plain. State: `history` only.

    Args:
        mantissa_bits: Of the simulation, 1 to 23; None: nothing is simulated and the run is left exactly as it is.
        exponent, rounding, gradients, head: See `simulate_mantissa`; only with `mantissa_bits`.
        epsilon: Of the sharpness.
        every: Optimizer steps between looks; None: at the user's evaluations.
        rows: Training rows to look at. None: twice those of an optimizer step on one rank, at most 256.
        tokens: Valid targets of them, evenly spaced.
        trainer: See `MonitorCallback`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range, or needs `mantissa_bits`; in `train()`: a streamed
            training set, one without class labels, or a model without layers to simulate.
    """

    name = "low_mantissa"
    cost = (
        "one look costs about 0.5 steps when nothing is simulated, and 1.2 plain steps when what is rounded is counted as "
        "well: about 1 % at a look every 100 steps; simulating makes a step 1.2 to 1.5 times as long (on a CPU) and "
        "keeps a rounded copy of each layer's weight and input until its backward"
    )
    witness = "a look at a token, with mantissa_bits at one for which rounding changed a number,"
    observes = False  # only mantissa_bits=None leaves the weights as they would be

    def __init__(
        self,
        mantissa_bits: int | None = None,
        exponent: int | None = None,
        rounding: str = "nearest-even",
        gradients: bool = False,
        head: bool = False,
        epsilon: float = 1e-3,
        every: int | None = 100,
        rows: int | None = None,
        tokens: int = 256,
        trainer: Any = None,
    ) -> None:
        owner = type(self).__name__
        options = {"exponent": exponent, "rounding": rounding, "gradients": gradients, "head": head}
        if mantissa_bits is not None:
            _check_format(owner, "mantissa_bits", mantissa_bits, exponent, rounding)
        elif odd := [k for k, v in options.items() if v not in (None, "nearest-even", False)]:
            raise ValueError(
                f"{owner}.{odd[0]} is {options[odd[0]]!r} but mantissa_bits is None; set mantissa_bits too"
            )
        checks.boolean(owner, "gradients", gradients)
        checks.boolean(owner, "head", head)
        checks.number(owner, "epsilon", epsilon, low=0.0)
        if rows is not None:
            checks.integer(owner, "rows", rows, low=1)
        checks.integer(owner, "tokens", tokens, low=1)
        super().__init__(every, trainer)
        self.mantissa_bits, self.exponent, self.rounding, self.gradients = mantissa_bits, exponent, rounding, gradients
        self.head, self.epsilon, self.rows, self.tokens = head, epsilon, rows, tokens
        self.simulation: Simulation | None = None
        self._probe: Probe

    def arguments(self) -> dict[str, Any]:
        fields = ("mantissa_bits", "exponent", "rounding", "gradients", "head", "epsilon", "rows", "tokens")
        return super().arguments() | {field: getattr(self, field) for field in fields}

    def begin(self, event: Event) -> None:
        self.needs_evaluations(event, ", or give every=")
        self.needs_forward(event)
        self._probe = Probe(type(self).__name__, event, self.rows or probe_rows(event.args), self.tokens)
        if self.mantissa_bits is None:
            return
        if event.args.n_gpu > 1:
            raise ValueError(
                f"args.n_gpu is {event.args.n_gpu}: nn.DataParallel copies layers without their simulation; start the run "
                "with accelerate launch, or show it one GPU"
            )
        self.simulation = simulate_mantissa(
            event.model, self.mantissa_bits, self.exponent, self.rounding, self.gradients, self.head
        )
        self._hooks.append(self.simulation)  # goes with them
        self.simulation.alive = still_training()
        log, skipped = logging.getLogger(f"hfgen.{self.name}"), self.simulation.skipped
        if left := {name: why for name, why in skipped.items() if why != "the head"}:
            log.warning(f"{self.name}: {len(left)} layers are not simulated: {left}")
        log.info(f"{self.name}: {self.mantissa_bits} mantissa bits in {len(self.simulation.layers)} layers")

    def look(self, event: Event) -> dict[str, float]:
        device, simulation = event.args.device, self.simulation
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        with nullcontext(sums.new_zeros(2, 4)) if simulation is None else simulation.counting(device) as counts:
            for logits, labels, _ in self._probe.forward(event.model):
                for part, wanted in zip(logits.split(_BLOCK), labels.split(_BLOCK), strict=True):
                    found = torch.stack(_loss_and_rise(part, wanted, self.epsilon)).double()
                    sums += torch.cat([found.sum(-1), sums.new_tensor([len(wanted)])])
        loss, rise, tokens, *rest = summed(torch.cat([sums, counts.flatten()])).tolist()
        row = {"tokens": int(tokens)}
        if tokens:
            row |= {"sharpness": 100 * rise / (tokens + loss), "loss": loss / tokens}
        for kind, (numbers, changed, known, error) in (("activations", rest[:4]), ("weights", rest[4:])):
            if numbers:
                row |= {f"{kind}_changed": changed / numbers, f"{kind}_error": error / max(known, 1.0)}
        if tokens and (simulation is None or rest[1] + rest[5]):
            self.fire()
        return {key: value for key, value in row.items() if math.isfinite(value)}


def example(folder: str) -> dict[str, Any]:
    """Keyword arguments of a tiny Trainer run with three mantissa bits (for the conformance kit)."""
    return tiny_run(folder) | {"callbacks": [LowMantissaCallback(mantissa_bits=3, gradients=True, every=2)]}
