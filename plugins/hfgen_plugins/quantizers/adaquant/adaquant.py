"""AdaQuant, arXiv:2006.10518. Layer by layer, with the inputs x that a few sequences give it (section 3),

    min over W, b, s, z of  || x Q(W; s, z)^T + b - (x W0^T + b0) ||^2,   Q = s (clamp(round(W / s) + z, 0, 2^b - 1) - z).

W itself is free: the straight-through gradient lets a weight leave its rounding cell.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfgen.kit import checks
from hfgen.kit.allocation import allocate, sensitivities
from hfgen.kit.calibration import Inputs, held_out, prepare, walk
from hfgen.kit.finished import Finished, digest, fingerprint
from hfgen.kit.packing import CHUNK, WIDTHS, Quantized, unpack
from hfgen.kit.quantizer import PackedConfig, PackedLinear, PackedQuantizer, adopt, quantizable
from hfgen.kit.teacher import Teacher

from .grid import Point, output_error, packed_point, searched
from .tuning import trained, tune

logger = logging.getLogger("hfgen")

LEAST = 64  # tokens to calibrate with
SLICE = 1024  # tokens of one look at it
LOOK = 10  # steps between two looks at the whole objective
BIAS_LR = 0.1  # relative to the output's error at the start


@torch.no_grad()
def mean_error(weight: Tensor, point: Point, bits: int, x: Tensor, chosen: Tensor) -> float:
    """`output_error` over the tokens `chosen` of x, a few at a time: what was cached is not copied."""
    parts = [len(part) * float(output_error(weight, point, bits, x[part].float())) for part in chosen.split(SLICE)]
    return sum(parts) / len(chosen)


def fit(weight: Tensor, start: Point, x: Tensor, train: Tensor, config: AdaQuantConfig, bias: bool) -> Point:
    """The best point that Adam meets on the tokens `train` of x (tokens, n), looked at every `LOOK` steps.

    The start if none is better. Learning rates are relative (the paper's are absolute, for two CNNs) and fall to zero.
    """
    median, error = float(start.scale.median()), mean_error(weight, start, config.bits, x, train)
    rho, w, z, shift = (
        t.clone().requires_grad_() for t in (torch.ones_like(start.scale), start.rows, start.zero, start.shift)
    )
    rates = {w: config.lr * median, rho: config.lr_range, z: config.lr_range * 2**config.bits}
    if bias:
        rates[shift] = BIAS_LR * (error / len(weight)) ** 0.5
    adam = torch.optim.Adam([{"params": [p], "lr": lr} for p, lr in rates.items()])
    fall = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 1 / config.steps, config.steps)
    generator, best, least = torch.Generator().manual_seed(config.seed), start, error
    for step in range(1, config.steps + 1):
        batch = train[torch.randperm(len(train), generator=generator)[: config.batch_size].to(x.device)]
        adam.zero_grad()
        output_error(weight, Point(w, start.scale * rho, z, shift), config.bits, x[batch].float()).backward()
        adam.step()
        fall.step()
        if step % LOOK == 0 or step == config.steps:
            point = Point(w.detach(), (start.scale * rho).detach(), z.detach(), shift.detach())
            if (found := mean_error(weight, point, config.bits, x, train)) < least:
                best, least = Point(*(t.clone() for t in point)), found
    return best


@dataclass(kw_only=True, repr=False)
class AdaQuantConfig(PackedConfig):
    """Configuration of AdaQuant. Bytes: bits / 8 a weight, 3 a scale with its zero point.

    Args:
        steps: Adam steps of a layer.
        lr: Of the weights, relative to the median scale of their layer.
        lr_range: Of scales (relative to their start) and zero points (relative to the number of codes).
        batch_size: Tokens of a step.
        tokens: Tokens whose inputs are kept of each layer, a quarter of the sequences for judging only.
        mode: "sequential" (a layer's inputs come through the quantised layers before it) or "parallel" (float inputs).
        average_bits: Choose each layer's width by integer programming, so many bits a weight on average; the result is
            `bits_map`.
        choices: The widths it chooses from.
        tune: Afterwards train "biases" (those there are) or "norms" (their weights, too) by the divergence from the float
            model; None = no. This needs a backward pass through the whole model.
        seed: Of the batches.

    Other arguments: see `hfgen.kit.quantizer.PackedConfig`.
    """

    steps: int = 100
    lr: float = 0.05
    lr_range: float = 0.01
    batch_size: int = 512
    tokens: int = 4096
    mode: str = "sequential"
    average_bits: float | None = None
    choices: tuple[int, ...] = (2, 3, 4, 8)
    tune: str | None = None
    seed: int = 0

    method: ClassVar[str] = "adaquant"
    quantizer_cls: ClassVar = PackedQuantizer

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "tokens"):
            checks.integer("AdaQuantConfig", name, getattr(self, name), 1)
        checks.integer("AdaQuantConfig", "seed", self.seed, 0)
        for name in ("lr", "lr_range"):
            checks.number("AdaQuantConfig", name, getattr(self, name), 0.0)
        checks.one_of("AdaQuantConfig", "mode", self.mode, ("sequential", "parallel"))
        checks.one_of("AdaQuantConfig", "tune", self.tune, ("biases", "norms", None))
        if self.average_bits is not None:
            checks.number("AdaQuantConfig", "average_bits", self.average_bits, 0.0)
        if not isinstance(self.choices, (list, tuple)) or not self.choices:
            raise TypeError(f"AdaQuantConfig.choices is {self.choices!r}; give the widths to choose from")
        for bits in self.choices:
            checks.one_of("AdaQuantConfig", "choices", bits, WIDTHS)
        self.choices = tuple(sorted(set(self.choices)))
        super().__post_init__()

    @property
    def has_zeros(self) -> bool:
        return True

    @property
    def calibrated(self) -> bool:
        return True

    def quantize_weight(self, weight: Tensor) -> Quantized:
        """Without data (a merge, the start of `fit`): affine codes, each group's range of least error in W."""
        rows = weight.float().reshape(-1, self.group_size or weight.shape[1])
        blocks = rows.split(max(1, CHUNK // rows.shape[1]))
        scale, zero = (torch.cat(parts) for parts in zip(*(searched(b, self.bits) for b in blocks), strict=True))
        return packed_point(Point(rows, scale, zero, rows.new_zeros(0)), self.bits, weight.shape)

    def calibrate(
        self,
        model: Any,
        rows: list[dict[str, Any]],
        progress: Callable[[int, int], None] | None = None,
        partial: Path | None = None,
    ) -> Any:
        """See `PackedConfig.calibrate`. The model is changed in place, layer by layer.

        The account is `model.hf_quantizer.calibration`: {"layers": {name: {"before", "after" (squared error of the output
        on held-out tokens), "reverted"}}, "reverted": names, "costs": of the bit allocation, "tuned": of the tuning,
        "reused": layers taken over from an interrupted run}.

        Args:
            partial: A folder for what is done; given again after an interruption (with the same model, freshly loaded,
                rows and settings), layers found there are taken over. The caller removes it.

        Raises:
            ValueError: too few tokens, a budget that no choice of widths fits, or nothing to tune.
        """
        return _Calibration(self, model.eval(), rows, progress or (lambda done, total: None), partial).run()


# --- the whole model --------------------------------------------------------------------------------------------------


class _Calibration:
    """One run of `AdaQuantConfig.calibrate`."""

    def __init__(
        self,
        config: AdaQuantConfig,
        model: Any,
        rows: list[dict[str, Any]],
        progress: Callable[[int, int], None],
        partial: Path | None,
    ) -> None:
        if config.average_bits is not None and config.bits_map is not None:
            raise ValueError(
                f"AdaQuantConfig.average_bits is {config.average_bits} and bits_map is given; leave one of them out"
            )
        self.config, self.model, self.progress = dataclasses.replace(config), model, progress
        self.batches = prepare(rows, LEAST, next(model.parameters()).device)
        self.names = list(quantizable(model, self.config)[0])
        self.sizes = {name: model.get_submodule(name).weight.numel() for name in self.names}
        if config.tune is not None:  # refusals now rather than after all else
            trained(model, config.tune)
        if config.average_bits is not None:
            allocate({n: dict.fromkeys(config.choices, 0.0) for n in self.names}, self.sizes, config.average_bits)
        settings = {k: v for k, v in config.to_dict().items() if k != "hfgen"}
        identity = {"settings": settings, "rows": digest(rows), "model": fingerprint(model)}
        self.done = None if partial is None else Finished.open(partial, identity)
        self.notes: dict[str, Any] = dict(self.done.notes) if self.done else {}
        self.reused = len(self.done.layers) if self.done else 0
        first = len(self.names) * sum(bits != 8 for bits in config.choices) if config.average_bits is not None else 0
        self.before, self.total = first, first + len(self.names)  # measurements, then layers

    def run(self) -> Any:
        config, teacher = self.config, None
        if config.average_bits is not None or config.tune is not None:
            teacher = Teacher.of(self.model, self.batches, config.tokens)
        if teacher is not None and config.average_bits is not None:
            self._choose_bits(teacher, config.average_bits)
        try:
            walk(
                self.model, self.names, self.batches, self._visit, tokens=config.tokens,
                sequential=config.mode == "sequential",
                progress=lambda done, _: self.progress(self.before + done, self.total),
            )  # fmt: skip
        except BaseException:
            kept = (
                "nothing is kept" if self.done is None else f"{len(self.done.layers)} layers lie in {self.done.folder}"
            )
            logger.warning("adaquant stopped; %s. The model in memory is half quantised: load it again", kept)
            raise
        layers: dict[str, PackedLinear] = {name: self.model.get_submodule(name) for name in self.names}
        model = adopt(self.model, config, layers)
        tuned = None if teacher is None or config.tune is None else tune(model, teacher, config.tune, config.seed)
        found = {name: self.notes[name] for name in self.names}
        reverted = [name for name, note in found.items() if note["reverted"]]
        model.hf_quantizer.calibration = {
            "layers": found, "reverted": reverted, "costs": self.notes.get("costs"), "tuned": tuned,
            "reused": self.reused,
        }  # fmt: skip
        logger.info("adaquant: %d layers calibrated, %d kept as they began", len(found), len(reverted))
        return model

    def _choose_bits(self, teacher: Teacher, average_bits: float) -> None:
        """Fill `bits_map` (section 4); the measured costs are kept for an interrupted run."""
        if "costs" not in self.notes:
            costs = sensitivities(
                self.model, self.config, teacher, self.config.choices, lambda done, _: self.progress(done, self.total)
            )
            self.notes["costs"] = {name: {str(b): c for b, c in widths.items()} for name, widths in costs.items()}
            if self.done is not None:
                self.done.note("costs", self.notes["costs"])
        costs = {name: {int(b): c for b, c in widths.items()} for name, widths in self.notes["costs"].items()}
        self.config.bits_map = allocate(costs, self.sizes, average_bits)

    def _visit(self, given: Inputs) -> PackedLinear:
        own: Any = self.config.for_layer(given.name)
        if self.done is not None and given.name in self.done.layers:
            tensors = self.done.load(given.name)
            codes = unpack(tensors["weight"], own.bits, given.x.shape[1])
            quantized = Quantized(codes, tensors["weight_scale"], zero=tensors["weight_zero"])
            layer = PackedLinear.of(given.module, own, quantized)
            if "bias" in tensors:
                layer.bias = nn.Parameter(tensors["bias"])
            return layer
        layer, note = calibrated_layer(given, own)
        self.notes[given.name] = note
        if self.done is not None:
            self.done.add(given.name, {k: v.detach() for k, v in layer.state_dict().items()}, note)
        return layer


def calibrated_layer(given: Inputs, config: AdaQuantConfig) -> tuple[PackedLinear, dict[str, Any]]:
    """One layer, optimised; as it began (range search, no data) where held-out tokens say that this is better."""
    module: Any = given.module
    weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
    weight = weight.float().contiguous()
    found = config.quantize_checked(weight, given.name)
    layer = PackedLinear.of(module, config, found)
    held = held_out(given.row).to(given.x.device)
    train, judges = (~held).nonzero().flatten(), held.nonzero().flatten()
    note: dict[str, Any] = {"before": None, "after": None, "reverted": True}
    if not len(train) or not len(judges):
        return layer, note  # the rows never reach it, or hardly
    rows, zero = weight.view(-1, config.group_size or weight.shape[1]), found.zero
    assert zero is not None
    start = Point(rows, found.scale.float().view(-1, 1), zero.float().view(-1, 1), weight.new_zeros(len(weight)))
    point = fit(weight, start, given.x, train, config, module.bias is not None)
    before, after = (mean_error(weight, p, config.bits, given.x, judges) for p in (start, point))
    note = {"before": before, "after": after, "reverted": not after < before}
    if not note["reverted"]:
        layer.hold(packed_point(point, config.bits, weight.shape))
        if module.bias is not None:
            bias = (module.bias.detach().float() + point.shift).to(module.bias.dtype)
            layer.bias = nn.Parameter(bias, requires_grad=module.bias.requires_grad)
    return layer, note
