"""Tiny worlds to learn, drawn without end from a seed: clouds of points, Markov chains, modular addition; and models.

A world gives rows and knows its own truth: any number of fresh rows can be drawn, so that what a run has really learnt
is measured apart from the rows its monitors see.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.modeling_outputs import SequenceClassifierOutput

CLASSES, WIDTH = 10, 16  # of clouds: classes and coordinates
TOKENS, LENGTH = 16, 12  # of chains
Batch = dict[str, Tensor]


class Rows(Dataset):  # type: ignore[type-arg]
    """Tensors of one length as a dataset of dictionaries."""

    def __init__(self, tensors: Batch) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def __getitem__(self, i: int) -> Batch:
        return {key: value[i] for key, value in self.tensors.items()}


def joined(*parts: Batch) -> Batch:
    """The rows of all parts one after the other."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def clouds(world: int, count: int, seed: int, gap: float, shift: float = 0.0) -> Batch:
    """`count` points x (count, 16) around three centres per class, and labels (count,).

    Args:
        world: Seed of the centres, which lie about `gap` apart from the origin in units of the clouds' width.
        seed: Of the points.
        shift: How far the centres have moved since the world began, in the same units.
    """
    own = torch.Generator().manual_seed(world)
    centres = torch.randn(3 * CLASSES, WIDTH, generator=own) * gap / WIDTH**0.5
    centres = centres + shift * torch.randn(3 * CLASSES, WIDTH, generator=own) / WIDTH**0.5
    rng = torch.Generator().manual_seed(seed)
    which = torch.randint(3 * CLASSES, (count,), generator=rng)
    return {"x": centres[which] + torch.randn(count, WIDTH, generator=rng) / 2, "labels": which % CLASSES}


def chains(world: int, count: int, seed: int, gap: float, shift: float = 0.0) -> Batch:
    """`count` sequences of a Markov chain of 16 tokens, 12 long; `gap` is how sharp its transitions are (in nats)."""
    own = torch.Generator().manual_seed(world)
    table = torch.randn(TOKENS, TOKENS, generator=own) * gap + shift * torch.randn(TOKENS, TOKENS, generator=own)
    steps = table.softmax(-1)
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(TOKENS, (count, 1), generator=rng)
    for _ in range(LENGTH - 1):
        ids = torch.cat([ids, torch.multinomial(steps[ids[:, -1]], 1, generator=rng)], 1)
    return {"input_ids": ids, "labels": ids.clone()}


def additions(modulus: int) -> Batch:
    """All of (a + b) mod `modulus`: x (modulus^2, 2 modulus) one-hot, labels (modulus^2,)."""
    a, b = torch.meshgrid(torch.arange(modulus), torch.arange(modulus), indexing="ij")
    hot = nn.functional.one_hot
    x = torch.cat([hot(a.flatten(), modulus), hot(b.flatten(), modulus)], 1).float()
    return {"x": x, "labels": (a + b).flatten() % modulus}


class Perceptron(nn.Module):
    """A multilayer perceptron as the Trainer likes it: loss and logits by name; with `power` of squares, without biases."""

    def __init__(self, inputs: int, width: int, layers: int, classes: int, dropout: float, power: bool = False) -> None:
        super().__init__()
        sizes = [inputs, *[width] * layers]
        self.layers = nn.ModuleList(nn.Linear(a, b, not power) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(width, classes, not power)
        self.dropout, self.power = nn.Dropout(dropout), power

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        for layer in self.layers:
            x = layer(x)
            x = self.dropout(x.square() if self.power else x.relu())
        logits = self.head(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def make_model(config: Mapping[str, Any]) -> nn.Module:
    """The untrained model of a run; the caller has seeded torch."""
    if config["world"] == "chains":
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=config["width"], intermediate_size=2 * config["width"], num_attention_heads=2,
                num_hidden_layers=config["layers"], vocab_size=TOKENS, attention_dropout=config["dropout"],
                bos_token_id=None, eos_token_id=None, pad_token_id=None,
            )
        )  # fmt: skip
    if config["world"] == "additions":
        modulus = config["modulus"]
        model = Perceptron(2 * modulus, config["width"], 1, modulus, 0.0, power=True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(config["gain"])
        return model
    return Perceptron(WIDTH, config["width"], config["layers"], CLASSES, config["dropout"])


def draw(config: Mapping[str, Any], world: int, count: int, seed: int, shift: float = 0.0) -> Batch:
    """`count` rows of the run's kind of world."""
    make = chains if config["world"] == "chains" else clouds
    return make(world, count, seed, config["gap"], shift)


def judged(model: nn.Module, rows: Batch) -> tuple[Tensor, Tensor]:
    """Loss in nats (labels,) and whether the answer is right (labels,) of every label; evaluation mode, no gradient."""
    was = model.training
    model.eval()
    with torch.no_grad():
        logits = model(**{key: value for key, value in rows.items() if key != "labels"}).logits.float()
    model.train(was)
    labels = rows["labels"]
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels
