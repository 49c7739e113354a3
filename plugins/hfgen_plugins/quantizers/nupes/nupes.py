"""The config of PowerQuant and NUPES: which exponent a layer gets, and its codes. The mathematics are in `power`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hfgen.kit import calibration, checks
from hfgen.kit.finished import Finished, digest, fingerprint
from hfgen.kit.packing import Quantized
from hfgen.kit.quantizer import PackedConfig, PackedLinear, PackedQuantizer, adopt, quantizable

from . import power

logger = logging.getLogger("hfgen")

TOKENS = 4096  # of a layer's inputs that are learned from, at most
LEAST = 64  # tokens that the calibration rows must hold


@dataclass(kw_only=True, repr=False)
class NupesConfig(PackedConfig):
    """Configuration of PowerQuant and NUPES. Bytes: bits / 8 a weight, 2 a scale, 4 * 2^bits a layer.

    Args:
        exponent: "search" (one for the model, PowerQuant's; default), "per_layer" (each layer's own), a number from 0.25 to
            1 (1 = uniform), or "learned" (NUPES: codes and each layer's exponent by gradient, from data: see `calibrate`).
        rounding: "power" (the paper's: nearest in the power domain) or "value" (nearest level: never more squared error).
        p: Norm of the weights' error that a search minimises; None = 2.
        relative: "search" adds up the layers' errors relative to their norms (the paper's sum is of errors as they are,
            so large layers decide); None = False.
        steps: Adam steps a layer of "learned"; None = 500.
        lr: Its learning rate of codes, in codes, falling to 0; None = 2e-3.
        lr_exponent: The same of the logit of the exponent; None = 1e-3.
        found_exponent: The model's exponent; filled in by the search.

    Other arguments: see `hfgen.kit.quantizer.PackedConfig`.
    """

    exponent: str | float = "search"
    rounding: str = "power"
    p: float | None = None
    relative: bool | None = None
    steps: int | None = None
    lr: float | None = None
    lr_exponent: float | None = None
    found_exponent: float | None = None

    method: ClassVar[str] = "nupes"
    quantizer_cls: ClassVar = PackedQuantizer

    def __post_init__(self) -> None:
        owner = "NupesConfig"
        if isinstance(self.exponent, str):
            checks.one_of(owner, "exponent", self.exponent, ("search", "per_layer", "learned"))
        else:
            self.exponent = _exponent(owner, "exponent", self.exponent)
        checks.one_of(owner, "rounding", self.rounding, ("power", "value"))
        searched, learned = isinstance(self.exponent, str), self.exponent == "learned"
        for name, read, by, default in (
            ("p", searched, "a search of the exponent", 2.0),
            ("relative", self.exponent == "search", "exponent='search'", False),
            ("steps", learned, "exponent='learned'", 500),
            ("lr", learned, "exponent='learned'", 2e-3),
            ("lr_exponent", learned, "exponent='learned'", 1e-3),
            ("found_exponent", self.exponent in ("search", "per_layer"), "exponent='search'", None),
        ):
            value = getattr(self, name)
            if value is not None and not read:  # an option that would be ignored is an error
                raise ValueError(f"{owner}.{name} is {value!r} but only {by} reads it; leave it out")
            if read and value is None:
                setattr(self, name, default)
        for name in ("p", "lr", "lr_exponent"):
            if getattr(self, name) is not None:
                checks.number(owner, name, getattr(self, name), 0.0)
        if self.relative is not None:
            checks.boolean(owner, "relative", self.relative)
        if self.steps is not None:
            checks.integer(owner, "steps", self.steps, 1)
        if self.found_exponent is not None:
            self.found_exponent = _exponent(owner, "found_exponent", self.found_exponent)
        super().__post_init__()

    @property
    def has_table(self) -> bool:
        return True

    @property
    def calibrated(self) -> bool:
        return self.exponent == "learned"

    def before_reading(self, weights: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        """Search the model's exponent; "per_layer" tries it on each layer, too."""
        if self.exponent in ("search", "per_layer"):
            self.found_exponent = self._model_exponent(weights)

    def _model_exponent(self, weights: Callable[[], Iterator[tuple[str, Tensor]]]) -> float:
        """One exponent for all, in two passes: densities for the search, then its true error beside that of a = 1."""
        p, densities, norms = self._p, {}, {}
        for name, rows, scale in self._read(weights):
            densities[name] = power.density(rows, scale, p)
            norms[name] = power.norm(rows, p) if self.relative else 1.0
        widths = {name: (self.bits_map or {}).get(name, self.bits) for name in densities}

        def total(a: float) -> float:
            return math.fsum(
                power.cost(d, a, widths[n], self.rounding, p) ** (1 / p) / norms[n] for n, d in densities.items()
            )

        true: dict[float, list[float]] = {1.0: [], power.model_exponent(total): []}
        for n, rows, scale in self._read(weights):
            for a, errors in true.items():
                errors.append(power.error(rows, scale, a, widths[n], self.rounding, p) ** (1 / p) / norms[n])
        return min(true, key=lambda a: math.fsum(true[a]))

    def _read(self, weights: Callable[[], Iterator[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, rows, scale) of the weights; what does not fit the model is left for the loader to name."""
        for name, weight in weights():
            if not torch.isfinite(weight).all():
                raise ValueError(f"the weight of {name} holds NaN or Inf; mend the model first, or leave the layer out")
            if weight.ndim == 2 and weight.shape[1] % (self.group_size or weight.shape[1]) == 0:
                rows = self._rows(weight)
                yield name, rows, power.scales(rows)

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.detach().float().reshape(-1, self.group_size or weight.shape[1])

    @property
    def _p(self) -> float:
        return 2.0 if self.p is None else self.p

    def _layer_exponent(self, weight: Tensor) -> float:
        """The exponent of this weight; where no model was read before, the weight is the model."""
        if not isinstance(self.exponent, str):
            return self.exponent
        if self.exponent == "search":
            return self.found_exponent or self._model_exponent(lambda: iter([("this layer", weight)]))
        rows = self._rows(weight)
        scale, p = power.scales(rows), self._p
        found = power.density(rows, scale, p)
        own = power.layer_exponent(lambda a: power.cost(found, a, self.bits, self.rounding, p))
        tried = dict.fromkeys((1.0, self.found_exponent or 1.0, own))
        return min(tried, key=lambda a: power.error(rows, scale, a, self.bits, self.rounding, p))

    def quantize_weight(self, weight: Tensor) -> Quantized:
        """Codes into the table of the layer's exponent. (A learned layer that a merge has changed: without data.)"""
        a, rows = self._layer_exponent(weight), self._rows(weight)
        scale = power.scales(rows)
        codes = torch.cat([power.encode(part, s, a, self.bits, self.rounding) for part, s in power.blocks(rows, scale)])
        return Quantized(
            codes.view(weight.shape), scale.view(weight.shape[0], -1), table=power.table(a, self.bits).to(weight.device)
        )

    def calibrate(
        self,
        model: Any,
        rows: list[dict[str, Any]],
        progress: Callable[[int, int], None] | None = None,
        partial: Path | None = None,
    ) -> Any:
        """Learn codes and exponents layer by layer, from inputs that come through the layers already quantised.

        A layer that is no better than data-free on held-out rows stays data-free, with a warning. The account is
        `model.hf_quantizer.calibration`: each layer's exponent and |x (w - w')|^2 on held-out rows before and after. For
        the rest see `PackedConfig.calibrate`; the model is changed in place.

        Args:
            partial: A folder for what is done; given again after an interruption (with the same model, freshly loaded,
                rows and settings), layers found there are taken over. The caller removes it.

        Raises:
            ValueError: rows without input_ids, fewer than `LEAST` tokens, or a `partial` of another run.
        """
        if not self.calibrated:
            return super().calibrate(model, rows, progress)
        names = list(quantizable(model, self)[0])
        batches = calibration.prepare(rows, LEAST, next(model.parameters()).device)
        done = None if partial is None else Finished.open(partial, self._identity(model, rows))
        reused = len(done.layers) if done else 0
        layers: dict[str, PackedLinear] = {}
        notes: dict[str, dict[str, Any]] = {}

        def visit(given: calibration.Inputs) -> PackedLinear:
            own, name = cast(NupesConfig, self.for_layer(given.name)), given.name
            if done is not None and name in done.layers:
                packed, notes[name] = Quantized(**done.load(name)), done.notes[name]
            else:
                packed, notes[name] = own._learned(given)
                if done is not None:
                    done.add(name, {k: v for k, v in packed._asdict().items() if v is not None}, notes[name])
            layers[name] = PackedLinear.of(given.module, own, packed)
            return layers[name]

        calibration.walk(model.eval(), names, batches, visit, tokens=TOKENS, progress=progress)
        model = adopt(model, self, layers)
        reverted = [name for name in names if notes[name]["reverted"]]
        model.hf_quantizer.calibration = {"layers": notes, "reverted": reverted, "reused": reused}
        if reverted:
            logger.warning(
                "nupes: %d of %d layers learnt nothing that held-out rows confirm; they stay data-free: %s",
                len(reverted), len(names), ", ".join(reverted),
            )  # fmt: skip
        return model

    def _identity(self, model: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What must be the same for an interrupted run to go on."""
        settings = {k: v for k, v in self.to_dict().items() if k != "hfgen"}
        return {"settings": settings, "rows": digest(rows), "model": fingerprint(model)}

    def _learned(self, given: calibration.Inputs) -> tuple[Quantized, dict[str, Any]]:
        module: Any = given.module
        weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach()
        start = self.quantize_checked(weight, given.name)
        rows, held = self._rows(weight), calibration.held_out(given.row).to(given.x.device)
        assert self.steps is not None and self.lr is not None and self.lr_exponent is not None
        found = power.learn(
            weight.float(), start.scale.view(len(rows), 1), start.codes.view(rows.shape), self._layer_exponent(weight),
            self.bits, (given.x[~held], given.x[held]), self.steps, self.lr, self.lr_exponent,
        )  # fmt: skip
        made = power.table(found.a, self.bits).to(weight.device)
        note = {"exponent": found.a, "before": found.before, "after": found.after}
        packed = Quantized(found.codes.view(weight.shape), start.scale, table=made)
        return packed, note | {"reverted": not found.after < found.before}


def _exponent(owner: str, field: str, value: Any) -> float:
    """A number from `power.LOWEST` to 1. Raises TypeError or ValueError."""
    checks.number(owner, field, value, 0.0, 1.0)
    if value < power.LOWEST:
        raise ValueError(
            f"{owner}.{field} is {value}; give a number from {power.LOWEST} to 1: below, most levels lie next to 0"
        )
    return float(value)
