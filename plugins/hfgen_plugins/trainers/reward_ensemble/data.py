"""Rows of a reward ensemble: label noise that all members share, each member's own order, and the batch of K orders."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.utils import pad

TEXT, IDS = ("chosen", "rejected"), ("chosen_ids", "rejected_ids")
PACKED = {"seq_lengths", "position_ids"}  # columns of rows that hold several samples


def check_dataset(name: str, dataset: Any) -> None:
    """Raise unless it is a Dataset of preference pairs, one pair in a row."""
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} is {type(dataset).__name__}; give a datasets.Dataset (members take it in several orders)"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; give at least one pair")
    columns = set(dataset.column_names)
    if not (columns >= set(TEXT) or columns >= set(IDS)):
        raise ValueError(
            f"{name} has the columns {sorted(columns)}; give chosen and rejected (and prompt, margin, if there are any)"
        )
    if columns & PACKED:
        raise ValueError(
            f"{name} has the column {sorted(columns & PACKED)[0]}, as packed rows have; a reward is read at the end of "
            "each answer, give one answer in a row"
        )


def flip_labels(dataset: Dataset, rate: float, seed: int = 0) -> Dataset:
    """`dataset` with chosen and rejected exchanged in a share `rate` of its rows.

    Whether a row is flipped follows from `seed` and what stands in it, so all members of an ensemble, every order of
    the rows and every number of processes see the same flips.

    Raises:
        TypeError, ValueError: not a dataset of pairs.
    """
    check_dataset("dataset", dataset)
    pair = IDS if set(IDS) <= set(dataset.column_names) else TEXT

    def flip(row: dict[str, Any]) -> dict[str, Any]:
        first, second = pair
        flipped = _uniform([seed, row.get("prompt"), row[first], row[second]]) < rate
        return {first: row[second], second: row[first]} if flipped else {first: row[first], second: row[second]}

    return dataset.map(flip, desc="Flipping labels") if rate else dataset


def _uniform(content: list[Any]) -> float:
    """A number in [0, 1) that is a function of JSON content."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class MemberOrders(torch.utils.data.Dataset):
    """Row i holds K rows of `dataset`: number `order[i]` for each member's order, a permutation (or bootstrap draw).

    Member 0 has the dataset's own order, so K = 1 is a plain reward model; the sampler shuffles on top of all of them.
    """

    def __init__(self, dataset: Dataset, members: int, seed: int, bootstrap: bool = False) -> None:
        self.dataset, size = dataset, len(dataset)
        self.orders = torch.arange(size).repeat(members, 1)
        for k in range(members):
            generator = torch.Generator().manual_seed(seed + k)
            if bootstrap:
                self.orders[k] = torch.randint(size, (size,), generator=generator)
            elif k:
                self.orders[k] = torch.randperm(size, generator=generator)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"members": [self.dataset[i] for i in self.orders[:, index].tolist()]}


@dataclass
class EnsembleCollator(DataCollatorForPreference):
    """trl's collator, and K of its batches stacked for rows of `MemberOrders`.

    Gives input_ids and attention_mask of shape (2P, T), chosen first, and margin (P,); of K orders (K, 2P, T), (P, K).
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if "members" not in examples[0]:
            return super().torch_call(examples)
        rows = [row for member in zip(*(e["members"] for e in examples), strict=True) for row in member]
        members, pairs = len(examples[0]["members"]), len(examples)
        batch: dict[str, Tensor] = {}
        padding = {"padding_side": "right", "pad_to_multiple_of": self.pad_to_multiple_of}
        for name, value in (("input_ids", self.pad_token_id), ("attention_mask", 0)):
            ids = [torch.tensor(row[column]) for column in IDS for row in rows]  # chosen of all members, then rejected
            whole = pad(
                ids if name == "input_ids" else [torch.ones_like(i) for i in ids], padding_value=value, **padding
            )
            batch[name] = whole.view(2, members, pairs, -1).transpose(0, 1).reshape(members, 2 * pairs, -1)
        if "margin" in rows[0]:
            batch["margin"] = torch.tensor([row["margin"] for row in rows], dtype=torch.float).view(members, pairs).T
        return batch
