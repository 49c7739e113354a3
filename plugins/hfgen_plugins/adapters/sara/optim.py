"""SaRA without an adapter: an AdamW that trains only the smallest entries of a model's own parameters, for plain loops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from hfgen.kit.sparse import SparseAdamW, below, check_amount, magnitude_threshold

from .sara import DENSITY


class SaraAdamW(SparseAdamW):
    """AdamW over the entries of `model` smaller than one threshold (`hfgen.kit.sparse.SparseAdamW` says how it steps).

    Args:
        model: A module, or parameters; those with requires_grad take part (all tensors: linear, convolution, norm, bias).
        threshold, density: As in `SaraConfig`.
        **kwargs: torch.optim.AdamW's own (lr, betas, eps, weight_decay, ...).

    Raises:
        TypeError, ValueError: as `SaraConfig`; no parameter requires a gradient; FSDP or ZeRO.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Tensor],
        threshold: float | None = None,
        density: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_amount("SaraAdamW", threshold, density)
        given = model.parameters() if isinstance(model, nn.Module) else model
        tensors = [p for p in given if p.requires_grad]
        if not tensors:
            raise ValueError("SaraAdamW got no parameter with requires_grad; turn it on for those to be trained")
        self.threshold = magnitude_threshold(
            "SaraAdamW", threshold, DENSITY if density is None else density, lambda: (p.detach() for p in tensors)
        )
        super().__init__(((p, below(p.detach(), self.threshold)) for p in tensors), **kwargs)
