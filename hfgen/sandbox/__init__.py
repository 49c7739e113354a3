"""The embedded default: a tiny Llama with its weights and tokenizer in the package, tasks, exact judges, no network.

``load_model()`` and ``load_tokenizer()`` give stock transformers objects; ``tasks`` has prompts, gold answers, judges.
Importing this package imports neither torch nor transformers. ``python -m hfgen.sandbox.build --out DIR`` makes the
weights again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tasks

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["accuracy", "answers", "load_model", "load_tokenizer", "path", "tasks"]


def path() -> Path:
    """The folder with config.json, model.safetensors and the tokenizer: what ``from_pretrained`` takes as a model."""
    return Path(__file__).parent / "weights"


def load_model(**from_pretrained_kwargs: Any) -> LlamaForCausalLM:
    """The base model: LlamaForCausalLM, d=64, 2 layers, float32, in eval mode; keywords go to ``from_pretrained``."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(str(path()), **from_pretrained_kwargs)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: one token per character of printable ASCII, BOS put first, padding on the left."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(path()))


def answers(model: Any, tokenizer: Any, prompts: list[str] | tuple[str, ...], batch_size: int = 128) -> list[str]:
    """Greedy answers of `model` to `prompts` (batched, padded on the left), one string each.

    An answer cut off before its EOS token comes back as "", which every judge refuses: what did not end is wrong even
    if its digits match. The model's training mode is put back afterwards.
    """
    import torch

    training, found = model.training, []
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            batch = tokenizer(
                list(prompts[start : start + batch_size]), return_tensors="pt", padding=True, padding_side="left"
            ).to(model.device)
            with torch.no_grad():
                ids = model.generate(**batch, do_sample=False, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
            for row in ids[:, batch["input_ids"].shape[1] :]:
                ended = bool((row == tokenizer.eos_token_id).any())
                found.append(tokenizer.decode(row, skip_special_tokens=True) if ended else "")
    finally:
        model.train(training)
    return found


def accuracy(model: Any, tokenizer: Any, task: tasks.Task, prompts: list[str] | tuple[str, ...] | None = None) -> float:
    """The share of `prompts` (all of the task's when None) that `model` answers rightly, greedily; in [0, 1]."""
    chosen = list(task.prompts if prompts is None else prompts)
    if not chosen:
        raise ValueError("prompts is empty: give at least one prompt, or None for all of the task's")
    return sum(map(task.judge, chosen, answers(model, tokenizer, chosen))) / len(chosen)
