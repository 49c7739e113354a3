"""How good a compressed copy of the sandbox's model still is, rows to calibrate it with, and outliers to plant in it.

Importing this module imports torch only when something is computed.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from . import load_tokenizer, tasks

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("all", "calibrate", "held out")


def examples(seed: int, count: int, part: str = "all") -> list[tuple[str, str]]:
    """(prompt, answer in the model's own style): `count` sums ``:17=`` and as many reversals ``Rabcd=``.

    Every example belongs for good to one of "calibrate" and "held out"; "all" draws from both.
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; give one of {', '.join(map(repr, PARTS))}")
    rng = random.Random(f"examples {seed}")
    triples = [t for total in tasks.SUMS for t in tasks.triples(total) if _belongs(tasks.plain(t), part)]
    if not 0 < count <= len(triples):
        raise ValueError(f"count is {count!r}; give 1 to {len(triples)}, the sums there are")
    words: list[str] = []
    while len(words) < count:
        word = "".join(rng.choices(tasks.LETTERS, k=4))
        words += [word] if _belongs(word, part) else []
    sums = [(f":{sum(t):02d}=", tasks.plain(t)) for t in rng.sample(triples, count)]
    return sums + [(f"R{word}=", word[::-1]) for word in words]


def _belongs(answer: str, part: str) -> bool:
    return part == "all" or (random.Random(answer).random() < 0.5) == (part == "calibrate")


def rows(seed: int, count: int) -> list[dict[str, list[int]]]:
    """`count` sequences to calibrate with: {"input_ids": prompt, answer and EOS}, half sums and half reversals."""
    tokenizer = load_tokenizer()
    pairs = examples(seed, -(-count // 2), "calibrate")
    mixed = [pair for two in zip(pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :], strict=True) for pair in two]
    return [{"input_ids": tokenizer(p + a + tokenizer.eos_token)["input_ids"]} for p, a in mixed[:count]]


def answers_nll(model: Any, seed: int, count: int, part: str = "all") -> float:
    """Negative log likelihood (nats per token, EOS included) of the answers of `examples(seed, count, part)`.

    Each token is predicted from the prompt and the true beginning.
    """
    total, tokens = 0.0, 0
    for ids, start in _batches(seed, count, part):
        logp = _log_probabilities(model, ids, start)
        total -= float(logp.gather(-1, ids[:, start:, None]).sum())
        tokens += ids[:, start:].numel()
    return total / tokens


def answers_kl(model: Any, base: Any, seed: int, count: int, part: str = "held out") -> float:
    """KL(base || model) of the next-token distributions at those tokens, nats per token."""
    total, tokens = 0.0, 0
    for ids, start in _batches(seed, count, part):
        want, found = _log_probabilities(base, ids, start), _log_probabilities(model, ids, start)
        total += float((want.exp() * (want - found)).sum())
        tokens += ids[:, start:].numel()
    return total / tokens


def _batches(seed: int, count: int, part: str) -> Iterator[tuple[Tensor, int]]:
    """(token ids, where the answers begin), one batch per task: its rows are equally long."""
    tokenizer, pairs = load_tokenizer(), examples(seed, count, part)
    for some in (pairs[:count], pairs[count:]):
        ids = tokenizer([p + a + tokenizer.eos_token for p, a in some], return_tensors="pt")["input_ids"]
        yield ids, 1 + len(some[0][0])  # BOS and the prompt


def _log_probabilities(model: Any, ids: Tensor, start: int) -> Tensor:
    import torch

    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits[:, start - 1 : -1].double().log_softmax(-1)
    return found


def plant(model: Any, channels: int, factor: float, seed: int, blocks: Collection[int] | None = None) -> None:
    """Makes `channels` input channels of q, k, v, gate and up `factor` times as large, in place.

    The gain of the norm before them is divided, so the model computes the same (for a power of two nothing is rounded).

    Args:
        model: A Llama, or a model built like one.
        blocks: The decoder blocks it is done in; None = all.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            groups = {
                layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
                layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
            }
            for norm, linears in groups.items():
                chosen = torch.randperm(norm.weight.numel(), generator=generator)[:channels]
                if blocks is None or i in blocks:
                    norm.weight[chosen] /= factor
                    for linear in linears:
                        linear.weight[:, chosen] *= factor
