"""The run that a callback's card may give the conformance kit as its example: a tiny Llama on 16 made-up rows."""

from __future__ import annotations

from typing import Any

import torch

ROWS = [{"input_ids": (ids := [(7 * i + j * j) % 32 for j in range(16)]), "labels": ids} for i in range(24)]
"""16 rows to train on and 8 others, of 16 tokens below 32."""


def tiny_run(folder: str, evaluate_every: int | None = None, layers: int = 1, **arguments: Any) -> dict[str, Any]:
    """Keyword arguments of a stock Trainer, without callbacks: 6 CPU steps of 8 rows, each logged; seconds.

    Args:
        folder: Of the checkpoints.
        evaluate_every: Evaluates on 8 rows every so many steps; None: never, and there are no such rows.
        layers: Of the model.
        **arguments: Of TrainingArguments, in place of the defaults.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, vocab_size=32,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    evaluation = {} if evaluate_every is None else {"eval_strategy": "steps", "eval_steps": evaluate_every}
    defaults = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    run = {
        "model": LlamaForCausalLM(config),
        "args": TrainingArguments(folder, **{**defaults, **quiet, **evaluation, **arguments}),
        "train_dataset": ROWS[:16],
    }
    return run if evaluate_every is None else run | {"eval_dataset": ROWS[16:]}


def token_accuracy() -> dict[str, Any]:
    """Keyword arguments of a Trainer that make its evaluations give the accuracy of the next token."""
    return {
        "compute_metrics": lambda p: {"accuracy": float((p.predictions[:, :-1] == p.label_ids[:, 1:]).mean())},
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    }
