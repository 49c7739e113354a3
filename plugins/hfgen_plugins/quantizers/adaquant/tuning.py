"""The last stage of AdaQuant (arXiv:2006.10518, section 5): biases, here norms too, trained towards the float model.

Batch norm, whose statistics the paper estimates again, is in no transformer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hfgen.kit.calibration import held_out
from hfgen.kit.teacher import Teacher

EPOCHS, LR = 10, 1e-3  # the paper's epochs; Adam's own rate


def trained(model: nn.Module, what: str) -> dict[str, nn.Parameter]:
    """The parameters of "biases" (every bias there is) or "norms" (the weights of norms as well).

    Raises:
        ValueError: there are none.
    """
    found = {}
    for path, module in model.named_modules():
        norm = what == "norms" and "norm" in type(module).__name__.lower()
        for leaf, p in module.named_parameters(recurse=False):
            if p.ndim == 1 and p.is_floating_point() and (leaf == "bias" or (norm and leaf == "weight")):
                found[f"{path}.{leaf}"] = p
    if not found:
        raise ValueError(f"AdaQuantConfig.tune is {what!r}, but {type(model).__name__} has none; give 'norms' or None")
    return found


def tune(model: Any, teacher: Teacher, what: str, seed: int) -> dict[str, Any]:
    """Adam on KL(teacher || model); put back where the held-out quarter of the sequences says that it was better before.

    Returns:
        {"parameters": names, "before", "after": divergence on the held-out sequences (nats each), "reverted"}.
    """
    params = trained(model, what)
    masters = {name: p.detach().float().clone() for name, p in params.items()}  # half precision would lose the steps
    kept = {name: p.detach().clone() for name, p in params.items()}
    flags = {p: p.requires_grad for p in model.parameters()}
    counts = torch.tensor([logp.shape[0] for logp in teacher.logp])
    judges = held_out(torch.arange(int(counts.sum()))).split(counts.tolist())
    for p in flags:
        p.requires_grad_(any(p is q for q in params.values()))

    def divergence() -> float:
        with torch.no_grad():
            sums = [teacher.kl(model, at)[mask].sum() for at, mask in enumerate(judges)]
        return float(sum(sums)) / max(1, int(torch.cat(judges).sum()))

    try:
        before = divergence()
        _descend(model, teacher, judges, params, masters, seed)
        after = divergence()
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
            p.grad = None
    if not after < before:
        for name, p in params.items():
            p.data.copy_(kept[name])
    return {"parameters": list(params), "before": before, "after": after, "reverted": not after < before}


def _descend(
    model: Any,
    teacher: Teacher,
    judges: tuple[Tensor, ...],
    params: dict[str, nn.Parameter],
    masters: dict[str, Tensor],
    seed: int,
) -> None:
    adam = torch.optim.Adam(list(masters.values()), lr=LR)
    steps = EPOCHS * len(judges)
    fall = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 1 / steps, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for at in torch.randperm(len(judges), generator=generator).tolist():
            own = ~judges[at]
            if not own.any():
                continue
            (teacher.kl(model, at)[own].sum() / teacher.logp[at][own].shape[:-1].numel()).backward()
            for name, p in params.items():
                masters[name].grad = None if p.grad is None else p.grad.float()
                p.grad = None
            adam.step()
            fall.step()
            for name, p in params.items():
                p.data.copy_(masters[name])
