"""Which width each layer gets: a multiple-choice knapsack, solved exactly.

    min  sum over layers of cost[layer][bits]     with one width a layer  and  sum of size * bits <= average_bits * weights

(Hubara et al., arXiv:2006.10518, section 4; they bound the savings from below, which is the same set.) The solver is
HiGHS, through `scipy.optimize.milp`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from hfgen.kit import checks

if TYPE_CHECKING:
    from hfgen.kit.quantizer import PackedConfig
    from hfgen.kit.teacher import Teacher

BASE = 8  # bits of all other layers while one is measured
FLOOR = 1e-6  # least cost of a width: a loss that falls by quantising is noise (the paper's clamp)
LARGEST = 1e5  # cost as the solver sees it; it stops at gaps of 1e-6
ROUNDS = 4


def allocate(costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], average_bits: float) -> dict[str, int]:
    """The widths of least total cost within the budget: {layer: bits}.

    Args:
        costs: For every layer the cost of each width it may have; below 1e-6 it counts as 1e-6.
        sizes: Weights of each layer.
        average_bits: Bits a weight over all of these layers, of codes (scales and zeros are not counted).

    Raises:
        ValueError: names differ, a cost is not finite, a layer has no width, or no choice fits the budget.
        TypeError: average_bits is no number.
    """
    _check(costs, sizes, average_bits)
    weights = sum(sizes.values())
    least = sum(min(costs[name]) * sizes[name] for name in costs)
    budget = math.floor(average_bits * weights * (1 + 1e-12))  # 4.35 * 100 comes out a hair below 435
    if least > budget:
        raise ValueError(
            f"average_bits is {average_bits}, but with the widths offered the layers take at least {least / weights:.4g} "
            "bits a weight; give that or more, or offer a smaller width"
        )
    menu = {name: {bits: max(float(cost), FLOOR) for bits, cost in widths.items()} for name, widths in costs.items()}
    found = _solve(menu, sizes, budget)
    for _ in range(ROUNDS):  # what no better choice can contain goes, and the solver's absolute tolerance gets finer
        spare = sum(menu[name][bits] - min(menu[name].values()) for name, bits in found.items()) * (1 + 1e-9)
        smaller = {name: {b: c for b, c in w.items() if c - min(w.values()) <= spare} for name, w in menu.items()}
        if smaller == menu:
            break
        menu = smaller
        found = min(found, _solve(menu, sizes, budget), key=lambda f: math.fsum(menu[n][b] for n, b in f.items()))
    return found


def _check(costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], average_bits: float) -> None:
    checks.number("allocate", "average_bits", average_bits, 0.0)
    if not costs or set(costs) != set(sizes):
        odd = ", ".join(sorted(set(costs) ^ set(sizes))[:5])
        raise ValueError(f"costs has {len(costs)} layers and sizes {len(sizes)} ({odd or 'none'}); give both the same")
    for name, widths in costs.items():
        if not widths or sizes[name] < 1:
            raise ValueError(
                f"layer {name!r} has {len(widths)} widths and {sizes[name]} weights; leave it out of costs"
            )
        for bits, cost in widths.items():
            if not math.isfinite(cost):
                raise ValueError(f"the cost of {name!r} at {bits} bits is {cost}; leave that width out")


def _solve(menu: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """One run of the solver; costs relative to each layer's least, so only differences count."""
    pairs = [(name, bits) for name, widths in menu.items() for bits in widths]
    extra = np.array([menu[name][bits] - min(menu[name].values()) for name, bits in pairs])
    unit = math.gcd(*sizes.values())
    taken = np.array([bits * (sizes[name] // unit) for name, bits in pairs], dtype=float)
    one = np.array([[float(name == row) for name, _ in pairs] for row in menu])
    solved = milp(
        extra * (LARGEST / (extra.max() or 1.0)),
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(taken[None], -np.inf, budget // unit)],
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise RuntimeError(f"HiGHS found no allocation of {len(menu)} layers: {solved.message}")
    found = {name: bits for (name, bits), x in zip(pairs, solved.x, strict=True) if x > 0.5}
    spent = sum(bits * sizes[name] for name, bits in found.items())
    if set(found) != set(menu) or spent > budget:
        raise RuntimeError(f"HiGHS gave {len(found)} of {len(menu)} layers a width, {spent} bits of {budget}")
    return found


def sensitivities(
    model: Any,
    config: PackedConfig,
    teacher: Teacher,
    choices: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[int, float]]:
    """What each width costs in each layer: the loss with all layers at 8 bit and that one at the width, above all at 8.

    The loss is `teacher`'s divergence; weights are quantised by `config.quantize_weight`. While it runs, the model is held
    in float and in 8 bit; then it is as before.

    Args:
        progress: Called with (measurements done, measurements in all).
    """
    from transformers.pytorch_utils import Conv1D

    from hfgen.kit.quantizer import PackedLinear, quantizable

    layers: dict[str, Any] = quantizable(model, dataclasses.replace(config, bits_map=None))[0]
    wanted = [(name, bits) for name in layers for bits in choices if bits != BASE]

    def packed(name: str, bits: int) -> PackedLinear:
        own, module = dataclasses.replace(config, bits=bits, bits_map=None).for_layer(name), layers[name]
        weight = module.weight.detach()
        found = own.quantize_checked(weight.T if isinstance(module, Conv1D) else weight, name)
        return PackedLinear.of(module, own, found)

    costs: dict[str, dict[int, float]] = {name: dict.fromkeys(set(choices) & {BASE}, 0.0) for name in layers}
    try:
        for name in layers:
            model.set_submodule(name, packed(name, BASE))
        base = teacher.loss(model)
        for done, (name, bits) in enumerate(wanted):
            progress(done, len(wanted))
            at_base = model.get_submodule(name)
            model.set_submodule(name, packed(name, bits))
            costs[name][bits] = teacher.loss(model) - base
            model.set_submodule(name, at_base)
    finally:
        for name, module in layers.items():
            model.set_submodule(name, module)
    return costs
