"""What the checks of trainers and of callbacks do with a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def all_weights(trainer: Any) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])


def assert_same_step_however_cut(build: Callable[..., Any]) -> None:
    """`build(folder, **arguments)` gives a Trainer on 8 rows or more: 8x1, 4x2 and 2x4 of them make the same SGD step."""
    steps = []
    for size, parts in ((8, 1), (4, 2), (2, 4)):
        with tempfile.TemporaryDirectory() as folder:
            trainer = build(
                folder, per_device_train_batch_size=size, gradient_accumulation_steps=parts, max_steps=1, optim="sgd",
                learning_rate=0.1, warmup_steps=0, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no",
                train_sampling_strategy="sequential",
            )  # fmt: skip
            before = all_weights(trainer)
            trainer.train()
            steps.append(all_weights(trainer) - before)
    assert float(steps[0].norm()) > 0, "the step is zero"
    for step in steps[1:]:
        far = float((step - steps[0]).norm() / steps[0].norm())
        assert far <= 1e-5, f"cutting the batch changes the step by {far:.2e} of its norm"
