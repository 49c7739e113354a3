"""Which weights are pruned: the cubic schedule, masks of smallest magnitude, n:m patterns, and the layers of a model."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfgen.kit.sparse import kth_smallest

OWNER = "GradualPruningCallback"
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


# --- mathematics ------------------------------------------------------------------------------------------------------


def sparsity_at(
    step: int, begin: int, end: int, frequency: int, final: float, initial: float = 0.0, exponent: float = 3.0
) -> float:
    """The sparsity in effect after optimizer step `step`, eq. 1 of the paper.

    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_n - t_0))^3 at t = t_0, t_0 + dt, ... and at t_n; constant between two of
    these and from t_n on; 0 before t_0. With begin == end it is s_f from there.
    """
    if step < begin:
        return 0.0
    if step >= end:
        return final
    done = (step - begin) // frequency * frequency / (end - begin)
    return float(final + (initial - final) * (1 - done) ** exponent)


def extended(weights: Sequence[Tensor], pruned: Sequence[Tensor], barred: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks with `count` True in all of them together: those of `pruned`, then the smallest |w| that are not barred.

    Of equal ones the first tensor's come first, and in it those of lower index. Masks only grow: with `count` of them or
    more already, they stay as they are.

    Args:
        weights: Of any shapes and floating dtypes; compared in float32 or wider.
        pruned, barred: bool, of the same shapes: what is True now, and what must not become so.

    Raises:
        ValueError: weights are not finite, or too many are barred.
    """
    more = count - sum(int(mask.sum()) for mask in pruned)
    if more <= 0:
        return list(pruned)

    wide = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32  # what compares exactly

    @functools.lru_cache(maxsize=1)  # made once where there is one, and one at a time in memory where there are many
    def size(i: int) -> Tensor:
        return weights[i].detach().to(wide).abs().masked_fill(pruned[i] | barred[i], math.inf)

    threshold = kth_smallest(lambda: (size(i) for i in range(len(weights))), more)
    if not math.isfinite(threshold):
        raise ValueError(
            f"{OWNER} cannot choose {more} more weights: some are not finite (nan or inf), so the run has diverged, or "
            "the masks it goes on with do not fit the pattern; resume from a checkpoint of the same settings"
        )
    found = [(size(i) < threshold).contiguous() for i in range(len(weights))]
    left = more - sum(int(mask.sum()) for mask in found)
    for i, mask in enumerate(found):
        ties = (size(i) == threshold).flatten().nonzero().flatten()[:left]
        mask.view(-1)[ties] = True
        mask |= pruned[i]
        left -= len(ties)
    return found


def outside_pattern(weight: Tensor, pruned: Tensor, kept: int, of: int) -> Tensor:
    """True where an n:m pattern keeps the weight: the n = `kept` largest of each m = `of` consecutive inputs.

    Args:
        weight: (outputs, inputs), m divides the inputs.
        pruned: bool, same shape; those count as the smallest. Of equal ones that of lower index is the smaller.
    """
    size = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).abs().masked_fill(pruned, -1.0)
    order = size.reshape(len(size), -1, of).argsort(dim=-1, stable=True)
    keeps = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    return keeps.scatter_(-1, order[..., of - kept :], True).view(weight.shape)


# --- what is pruned ---------------------------------------------------------------------------------------------------


def _named(name: str, modules: str | Sequence[str]) -> list[str]:
    """The entries of `modules` that name a layer: a regular expression for the whole name, or names and their ends."""
    if isinstance(modules, str):
        return [modules] if re.fullmatch(modules, name) else []
    return [key for key in modules if name == key or name.endswith(f".{key}")]


def _head(model: nn.Module) -> tuple[int | None, str]:
    """id of the output embeddings, and what the names of the model's body begin with."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    body = getattr(model, "base_model", model)
    return None if head is None else id(head), "" if body is model else f"{model.base_model_prefix}."


def select(
    model: nn.Module, modules: str | Sequence[str] | None = None, of: int | None = None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """({name: layer} to prune, {name: why} of the layers and matrices left out).

    Args:
        modules: Names, ends of names or a regular expression; None: Linear and Conv1D layers but heads and embeddings.
        of: m of an n:m pattern, which must divide a layer's inputs.

    Raises:
        ValueError: an entry of `modules` names no layer that can be pruned, or there is none at all.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head, body = _head(model)
    found: dict[str, nn.Module] = {}
    left_out: dict[str, str] = {}
    hits: dict[str, list[str]] = {key: [] for key in ([modules] if isinstance(modules, str) else modules or [])}
    owners: dict[int, str] = {}

    def why(name: str, module: nn.Module, weight: Tensor) -> str | None:
        kinds = (nn.Linear, Conv1D) if modules is None else (nn.Linear, Conv1D, *_CONV)
        if not isinstance(module, kinds):
            return f"its class is {type(module).__name__}"
        if not weight.is_floating_point():
            return "it is quantised"
        if id(weight) in embeddings:
            return "its weight is an embedding's too"
        if id(weight) in owners:
            return f"its weight is that of {owners[id(weight)]}"
        if not weight.requires_grad:
            return "it is frozen (requires_grad is False)"
        if modules is None and (id(module) == head or not name.startswith(body)):
            return "it is an output head"
        if of is not None and (isinstance(module, _CONV) or inputs_last(module, weight).shape[1] % of):
            return f"its inputs do not come in groups of {of}"
        return None

    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim < 2:
            continue
        keys = [] if modules is None else _named(name, modules)
        reason = "modules does not name it" if modules is not None and not keys else why(name, module, weight)
        for key in keys:
            hits[key].append(reason or "")
        if reason is None:
            found[name] = module
        else:
            left_out[name] = reason
        owners.setdefault(id(weight), name)
    matrices = {n: p for n, p in model.named_parameters() if p.ndim > 1 and id(p) not in owners}
    left_out |= dict.fromkeys(matrices, "it is no layer's weight")
    for key, reasons in hits.items():
        if "" not in reasons:
            what = f"a layer that cannot be pruned: {reasons[0]}" if reasons else "no layer with a weight matrix"
            raise ValueError(f"{OWNER}.modules has {key!r}, which names {what}; give names of trained Linear layers")
    if not found:
        told = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
        raise ValueError(f"{OWNER} found no layer to prune ({told}); give their names as modules=")
    return found, left_out


def inputs_last(module: nn.Module, tensor: Tensor) -> Tensor:
    """A weight (or mask) of a linear layer as (outputs, inputs)."""
    return tensor.T if isinstance(module, Conv1D) else tensor
