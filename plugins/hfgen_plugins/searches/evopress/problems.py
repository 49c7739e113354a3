"""The three things that can be searched over, as spaces of states: bits of layers, kept sublayers, sparsity of layers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfgen.kit import checks
from hfgen.kit.levels import shared_copy

from .evolution import Space

logger = logging.getLogger("hfgen")

LEVELS = 8  # steps that a layer's sparsity may lie above or below the average
SUBLAYERS = {  # what a block calls its attention and its feed-forward part
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn"),
}


# --- bits -----------------------------------------------------------------------------------------------------------


def bits_space(sizes: Mapping[str, int], bits: Sequence[int], average_bits: float, group_rule: str = "size") -> Space:
    """Widths of layers, at most `average_bits` per weight (codes; scales come on top, the same for every width).

    Raises:
        TypeError, ValueError: an average outside the widths, an unknown rule.
    """
    checks.number("evopress", "average_bits", average_bits, 0.0)
    checks.one_of("evopress", "group_rule", group_rule, ("size", "none"))
    menu, weights, n = tuple(sorted(bits)), tuple(sizes.values()), len(sizes)
    if not menu[0] <= average_bits <= menu[-1]:
        raise ValueError(
            f"evopress.average_bits is {average_bits}; the levels allow {menu[0]} to {menu[-1]}, give a number in between "
            "or other levels"
        )
    groups: dict[int, list[int]] = {}
    for i, size in enumerate(weights):
        groups.setdefault(size, []).append(i)
    return Space(
        menus=(menu,) * n,
        sizes=weights,
        groups=tuple(map(tuple, groups.values())) if group_rule == "size" else (),
        accounts=((tuple(range(n)), math.floor(average_bits * sum(weights) * (1 + 1e-12))),),
        uniform=(int(average_bits),) * n if average_bits in menu else None,
        rule=group_rule,
    )


# --- depth ----------------------------------------------------------------------------------------------------------


def blocks_of(model: Any) -> tuple[str, nn.ModuleList]:
    """Path and list of the model's blocks. Raises ValueError where there is not just one list of that length."""
    count = model.config.get_text_config().num_hidden_layers
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        names = ", ".join(n for n, _ in found) or "none"
        raise ValueError(f"{type(model).__name__} has no one list of {count} blocks (found: {names}); search its bits")
    return found[0]


def sublayers_of(model: Any) -> dict[str, list[str]]:
    """Names of the blocks' attentions and feed-forward parts, by kind."""
    path, blocks = blocks_of(model)
    found = {}
    for kind, names in SUBLAYERS.items():
        leaf = next((n for n in names if all(isinstance(getattr(b, n, None), nn.Module) for b in blocks)), None)
        if leaf is None:
            raise ValueError(f"the blocks of {type(model).__name__} have no {' or '.join(names)}; drop whole blocks")
        found[kind] = [f"{path}.{i}.{leaf}" for i in range(len(blocks))]
    return found


def depth_space(units: Sequence[Sequence[str]], drop: Sequence[int]) -> Space:
    """Units kept (1) or dropped (0), `drop` of each kind.

    Raises:
        TypeError, ValueError: a number that is not between 0 and the units of its kind; nothing to drop.
    """
    groups, first = [], 0
    for names, count in zip(units, drop, strict=True):
        checks.integer("evopress", "drop", count, 0)
        if count >= len(names):
            raise ValueError(f"evopress.drop is {count} of {len(names)}; one at least has to stay")
        groups.append(tuple(range(first, first + len(names))))
        first += len(names)
    if not sum(drop):
        raise ValueError("evopress.drop is 0, so there is nothing to search; give how many to drop")
    accounts = tuple((group, len(group) - count) for group, count in zip(groups, drop, strict=True))
    return Space(((0, 1),) * first, (1,) * first, tuple(groups), accounts)


class Depth:
    """Puts choices of blocks or sublayers into a model: blocks leave its list, a dropped sublayer adds nothing."""

    def __init__(self, model: Any) -> None:
        self.path, self.blocks = blocks_of(model)
        self.model, self.lists = model, _per_block(model)
        self.parts: dict[str, nn.Module] = {}
        self.held: dict[str, bool] = {}

    def assign(self, plan: Mapping[str, int]) -> int:
        """{name: kept}. Returns how many units changed."""
        changed = {name: bool(kept) for name, kept in plan.items() if bool(kept) != self.held.get(name, True)}
        whole = False
        for name, kept in changed.items():
            whole = whole or name.rpartition(".")[0] == self.path
            if name.rpartition(".")[0] != self.path:
                block, _, leaf = name.removeprefix(self.path + ".").partition(".")
                part = self.parts.setdefault(name, getattr(self.blocks[int(block)], leaf))
                setattr(self.blocks[int(block)], leaf, part if kept else Nothing(leaf in SUBLAYERS["attention"]))
        self.held |= changed
        if whole:
            kept_blocks = [i for i in range(len(self.blocks)) if self.held.get(f"{self.path}.{i}", True)]
            _keep(self.model, self.path, self.blocks, kept_blocks, self.lists)
        return len(changed)


class Nothing(nn.Module):
    """A sublayer that adds 0 to the residual stream."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.attention else zeros


def drop_layers(model: Any, plan: Mapping[str, Any]) -> Any:
    """A model without the dropped blocks, on the tensors of `model`: a plain, smaller one for `save_pretrained`.

    A block that loses both its sublayers is removed. No plain architecture has a block with one of them: there the linear
    layers of the dropped sublayer are set to zero, which computes the same and saves nothing, with a warning.

    Args:
        plan: {name of a block, or of a sublayer: kept}; what it does not name is kept.

    Raises:
        ValueError: a name that is no block or sublayer of the model, or no block is left.
    """
    path, blocks = blocks_of(model)
    dropped = {name for name, kept in plan.items() if not kept}
    known = {f"{path}.{i}": {f"{path}.{i}"} for i in range(len(blocks))}
    if not set(plan) <= set(known):
        for names in zip(*sublayers_of(model).values(), strict=True):
            known[names[0].rpartition(".")[0]] = set(names)
    odd = sorted(set(plan) - set(known).union(*known.values()))
    if odd:
        raise ValueError(
            f"the plan names {odd[0]!r}, which is no block or sublayer of {type(model).__name__}: see {path}"
        )
    gone = {block for block, names in known.items() if block in dropped or names <= dropped}
    kept = [i for i in range(len(blocks)) if f"{path}.{i}" not in gone]
    if not kept:
        raise ValueError(f"the plan drops all {len(blocks)} blocks of {type(model).__name__}; keep one at least")
    new = shared_copy(model)
    zeroed = sorted(name for name in dropped if name not in known and name.rpartition(".")[0] not in gone)
    for name in zeroed:
        _zero(new.get_submodule(name), name)
    if zeroed:
        logger.warning(
            "drop_layers: %d sublayers are set to zero, which saves no bytes; %d whole blocks are removed",
            len(zeroed), len(gone),
        )  # fmt: skip
    _keep(new, path, new.get_submodule(path), kept, _per_block(new))
    for index, block in enumerate(new.get_submodule(path)):
        for module in block.modules():  # the key-value cache counts blocks by it
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
    return new


def _zero(part: nn.Module, name: str) -> None:
    """Set its linear layers to zero, in tensors of their own."""
    found = [m for m in part.modules() if isinstance(m, (nn.Linear, Conv1D))]
    if not found:
        raise ValueError(f"{name} has no linear layer that could be set to zero; drop whole blocks")
    for linear in found:
        for leaf, tensor in list(linear.named_parameters()):
            setattr(linear, leaf, nn.Parameter(torch.zeros_like(tensor), tensor.requires_grad))


def _per_block(model: Any) -> dict[str, list[Any]]:
    """The lists of the config with one entry per block, such as layer_types."""
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    return {k: list(v) for k, v in vars(config).items() if isinstance(v, list) and len(v) == count and "layer" in k}


def _keep(model: Any, path: str, blocks: nn.ModuleList, kept: list[int], lists: dict[str, list[Any]]) -> None:
    config = model.config.get_text_config()
    model.set_submodule(path, nn.ModuleList([blocks[i] for i in kept]))
    for key, value in lists.items():
        setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)


# --- sparsity -------------------------------------------------------------------------------------------------------


class Sparsity:
    """Magnitude-pruned levels of the linear layers in a model's blocks.

    Level l of a layer has round(sparsity * n) + l * step zeros, the smallest weights: the step is one number of weights
    for all layers, so +1 in one and -1 in another leave the number of zeros as it is. All levels together take one byte a
    weight: at which level it goes.
    """

    def __init__(self, model: Any, sparsity: float, step: float) -> None:
        checks.number("evopress", "sparsity", sparsity, 0.0)
        checks.number("evopress", "step", step, 0.0, 1.0)
        if sparsity >= 1:
            raise ValueError(f"evopress.sparsity is {sparsity}; give a share between 0 and 1")
        self.layers = prunable(model)
        self.step = max(1, round(step * min(m.weight.numel() for m in self.layers.values())))
        self.zeros = {name: round(sparsity * m.weight.numel()) for name, m in self.layers.items()}
        self.weights = {name: m.weight for name, m in self.layers.items()}
        self.menus: dict[str, tuple[int, ...]] = {}
        self.leaves: dict[str, Tensor] = {}
        self.held: dict[str, int] = {}
        for name, weight in self.weights.items():
            lowest = -min(LEVELS, self.zeros[name] // self.step)
            highest = min(LEVELS, (weight.numel() - self.zeros[name]) // self.step)
            self.menus[name] = tuple(range(lowest, highest + 1))
            counts = torch.tensor([self.zeros[name] + level * self.step for level in self.menus[name]])
            rank = ranks(weight.detach()).cpu()
            leaves = torch.searchsorted(counts, rank, right=True).to(torch.uint8)  # index of the level at which it goes
            self.leaves[name] = leaves.to(weight.device)

    def space(self) -> Space:
        n = len(self.layers)
        every = tuple(range(n))
        return Space(tuple(self.menus.values()), (1,) * n, (every,), ((every, 0),), (0,) * n)

    def assign(self, plan: Mapping[str, int]) -> int:
        """{name: level}. Returns how many layers changed."""
        changed = {name: level for name, level in plan.items() if self.held.get(name) != level}
        for name, level in changed.items():
            weight, at = self.weights[name], level - self.menus[name][0]
            self.layers[name].weight = nn.Parameter(weight.detach().masked_fill(self.leaves[name] <= at, 0), False)
        self.held |= changed
        return len(changed)

    def shares(self, plan: Mapping[str, int]) -> dict[str, float]:
        """{name: share of zeros}."""
        return {n: (self.zeros[n] + level * self.step) / self.weights[n].numel() for n, level in plan.items()}


def prunable(model: Any) -> dict[str, nn.Module]:
    """The linear layers of the model's blocks."""
    path, blocks = blocks_of(model)
    found = {f"{path}.{n}": m for n, m in blocks.named_modules() if type(m) in (nn.Linear, Conv1D)}
    if not found:
        raise ValueError(f"the blocks of {type(model).__name__} have no Linear or Conv1D layer to prune")
    return found


def ranks(weight: Tensor) -> Tensor:
    """Rank of each entry by magnitude, 0 = smallest; equal ones in the order in which they stand."""
    order = weight.abs().flatten().argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).view(weight.shape)


def prune_layers(model: Any, plan: Mapping[str, float]) -> Any:
    """A model whose layers have that share of zeros, the smallest weights, on the other tensors of `model`: a plain one.

    Args:
        plan: {module: share in [0, 1]}.

    Raises:
        ValueError: a name that is no linear layer of the model's blocks, or a share outside [0, 1].
    """
    new = shared_copy(model)
    layers = prunable(new)
    for name, share in plan.items():
        if name not in layers:
            raise ValueError(
                f"the plan names {name!r}, which is no linear layer of the blocks of {type(model).__name__}"
            )
        if not 0 <= share <= 1:
            raise ValueError(f"the plan gives {name} a sparsity of {share!r}; give a share between 0 and 1")
        weight = layers[name].weight
        pruned = weight.detach().masked_fill(ranks(weight.detach()) < round(share * weight.numel()), 0)
        layers[name].weight = nn.Parameter(pruned, weight.requires_grad)
    return new
