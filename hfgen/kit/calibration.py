"""Calibration data, and the inputs of one layer at a time: what layer-wise quantizers are fed with.

A decoder is walked block by block: only the hidden states of the rows before the current block are held, so what this
takes beside the model does not grow with the number of layers. There is no padding: only rows of equal length share a
batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfgen.kit.quantizer import return_freed_memory as return_freed_memory

COLUMNS = "input_ids, text, messages, or prompt and completion"
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SEED = 0  # of the choice of tokens
BATCH = 2048  # tokens of a forward pass (or one row)
MAIN = ("input_ids", "pixel_values", "input_features", "input_values")  # a model's main input
IMAGES = 8  # rows of a batch where tokens cannot be counted before the model has run


# --- rows -----------------------------------------------------------------------------------------------------------


def read_rows(
    path: str | Path, tokenizer: Any = None, limit: int | None = None, max_length: int = 2048
) -> list[dict[str, list[int]]]:
    """The first `limit` rows of a .jsonl, .json or .parquet file as [{"input_ids": [...]}], read by `datasets`.

    Args:
        path: Its columns are named as trl names them: `text`, `messages`, or `prompt` and `completion`; or `input_ids`.
        tokenizer: Turns text into ids; `messages` need its chat template. Not needed for `input_ids`.
        limit: None = all rows.
        max_length: Longer rows are cut.

    Raises:
        ValueError: no such file, another kind of file, other columns, or text without a tokenizer.
    """
    from datasets import load_dataset

    path = Path(path)
    if not path.is_file() or path.suffix not in READERS:
        raise ValueError(f"calibration file is {str(path)!r}; give an existing {', '.join(READERS)} file")
    try:
        data = load_dataset(READERS[path.suffix], data_files=str(path), split="train", streaming=True)
        rows = list(data if limit is None else data.take(limit))
    except Exception as exc:  # whatever the reader raises: its classes are its own
        raise ValueError(f"calibration file {path} cannot be read as {path.suffix}: {exc}") from exc
    if not rows:
        raise ValueError(f"calibration file {path} has no rows; give one with rows of {COLUMNS}")
    return [{"input_ids": _ids(row, tokenizer, path)[:max_length]} for row in rows]


def _ids(row: Mapping[str, Any], tokenizer: Any, path: Path) -> list[int]:
    have = {name for name, value in row.items() if value is not None}
    if "input_ids" in have:
        mask = row.get("attention_mask") or [1] * len(row["input_ids"])
        return [int(i) for i, on in zip(row["input_ids"], mask, strict=True) if on]
    if "text" in have:
        value: Any = row["text"]
    elif "messages" in have:
        value = row["messages"]
    elif {"prompt", "completion"} <= have:
        value = row["prompt"] + row["completion"]
    else:
        raise ValueError(f"calibration file {path} has the columns {', '.join(sorted(row))}; wanted: {COLUMNS}")
    if tokenizer is None:
        raise ValueError(f"calibration file {path} holds text; give the model's tokenizer, or a column input_ids")
    if isinstance(value, str):
        return list(tokenizer(value, verbose=False)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"calibration file {path} holds messages, but the tokenizer has no chat template; give text")
    return list(tokenizer.apply_chat_template(value, tokenize=True, return_dict=False))


def prepare(rows: Iterable[Mapping[str, Any]], least: int, device: Any = None) -> list[dict[str, Tensor]]:
    """Rows as batches without padding: input_ids (B, L), rows of one length together, in the order of the first of each.

    Rows may have another main input of a model (pixel_values) instead. A row's attention_mask says what of it is padding;
    a row with further fields is a batch of its own.

    Raises:
        ValueError: a row without a main input, or fewer than `least` tokens in all (where there are tokens).
    """
    batches: list[dict[str, Tensor]] = []
    equal: dict[tuple[str, torch.Size], list[Tensor]] = {}
    for at, row in enumerate(rows):
        name = next((n for n in MAIN if n in row), None) if isinstance(row, Mapping) else None
        if name is None:
            have = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f"calibration row {at} has {have}; give dicts with input_ids (read_rows makes them)")
        value, mask = torch.as_tensor(row[name]), row.get("attention_mask")
        if name == "input_ids":
            value = value.flatten().long()
            value = value if mask is None else value[torch.as_tensor(mask).flatten().bool()]
        others = {k: torch.as_tensor(v)[None] for k, v in row.items() if k not in (name, "attention_mask")}
        if others:
            batches.append({name: value[None]} | others)
        elif value.numel():
            equal.setdefault((name, value.shape), []).append(value)
    for (name, shape), found in equal.items():
        size = max(1, BATCH // shape[0]) if name == "input_ids" else IMAGES
        batches += [{name: part} for part in torch.stack(found).split(size)]
    count = sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
    if count < least and all("input_ids" in batch for batch in batches):
        raise ValueError(
            f"the calibration rows hold {count} tokens (padding not counted), at least {least} are needed; give more rows"
        )
    return [{k: v.to(device) for k, v in batch.items()} for batch in batches]


def main_input(batch: Mapping[str, Tensor]) -> Tensor:
    """Of a batch from `prepare`; its first dimension counts the sequences."""
    return batch[next(name for name in MAIN if name in batch)]


def held_out(row: Tensor) -> Tensor:
    """Mask of the tokens to judge by, for `Inputs.row` (tokens): a quarter of the rows; of fewer than 4, the tail."""
    rows = row.unique()
    if len(rows) < 4:
        return torch.arange(len(row)) >= len(row) - len(row) // 4
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))[: len(rows) // 4]
    return torch.isin(row, rows[chosen])


# --- one layer's inputs at a time -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What one layer is given: `x` (tokens, n) in the model's dtype, `row` (tokens) = which sequence each is of.

    No tokens at all where the rows never reach the layer.
    """

    name: str
    module: nn.Module
    x: Tensor
    row: Tensor


Visit = Callable[[Inputs], nn.Module]


def walk(
    model: Any,
    names: Iterable[str],
    rows: Sequence[Mapping[str, Tensor]],
    visit: Visit,
    *,
    tokens: int = 4096,
    sequential: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Replace the layers `names` of `model`, in the order in which they run, by what `visit` makes of their inputs.

    Args:
        model: In eval mode. It is changed in place: a replaced layer is let go of at once.
        rows: From `prepare`.
        visit: Called once for every layer. Layers with one and the same input (q, k, v) are visited with one tensor.
        tokens: At most so many rows of `x`: a fixed random choice of positions where there are more.
        sequential: Inputs come through the layers already replaced; else from the float model.
        progress: Called with (layers done, layers in all).
    """
    base = getattr(model, "base_model", model)
    prefix = next((f"{n}." for n, m in model.named_modules() if m is base and n), "")
    names = list(names)
    if any(not name.startswith(prefix) for name in names):
        base, prefix = model, ""
    inside = [name.removeprefix(prefix) for name in names]
    with without_cache(base), torch.no_grad():
        _Walk(base, prefix, inside, rows, visit, tokens, sequential, progress or (lambda done, total: None)).run()


@contextlib.contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """Without a key-value cache, whose memory would grow with the layers."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    kept = [(c, c.use_cache) for c in configs if getattr(c, "use_cache", None) is not None]
    try:
        for config, _ in kept:
            config.use_cache = False
        yield
    finally:
        for config, value in kept:
            config.use_cache = value


class _Stop(Exception):
    """Ends a forward pass that has given what was wanted."""


@dataclass
class _Walk:
    base: Any
    prefix: str
    names: list[str]
    rows: Sequence[Mapping[str, Tensor]]
    visit: Visit
    tokens: int
    sequential: bool
    progress: Callable[[int, int], None]
    finished: int = 0
    keep: list[Tensor | None] = field(init=False)
    lengths: list[int] = field(init=False)
    origin: list[Tensor] = field(init=False)
    later: dict[str, nn.Module] = field(default_factory=dict)  # replacements that the float inputs of others wait for

    def __post_init__(self) -> None:
        counts = [main_input(row).shape[0] for row in self.rows]
        self.lengths = _lengths(self.base, self.names, self.rows)
        self.keep = _positions(self.lengths, self.tokens)
        starts = torch.tensor([0, *counts]).cumsum(0)
        self.origin = [
            torch.arange(at, at + b).repeat_interleave(n // b)
            for b, n, at in zip(counts, self.lengths, starts.tolist(), strict=False)
        ]

    def run(self) -> None:
        self.progress(0, len(self.names))
        groups, blocks = _trace(self.base, self.names, self.rows)
        of_block = {name: at for at, (path, _) in enumerate(blocks) for g in groups for name in g if _in(name, path)}
        first = min((i for i, g in enumerate(groups) if g[0] in of_block), default=len(groups))
        outside = [i for i, g in enumerate(groups) if g[0] not in of_block]
        # With float inputs every pass through the whole model comes before a block is replaced.
        before = [i for i in outside if i < first or not self.sequential]
        for i in before:
            self._group(groups[i], self._forwards())
        if blocks:
            self._blocks(blocks, [[g for g in groups if of_block.get(g[0]) == at] for at in range(len(blocks))])
        for i in outside[len(before) :]:
            self._group(groups[i], self._forwards())
        self._replace()

    def _forwards(self) -> Iterator[Callable[[], Any]]:
        return (lambda row=row: self.base(**row) for row in self.rows)  # type: ignore[misc]

    def _blocks(self, blocks: list[tuple[str, nn.Module]], groups: list[list[list[str]]]) -> None:
        """Block by block: each group's inputs, then the rows through the block."""
        found = _block_arguments(self.base, [b for _, b in blocks], self.rows)
        given = [found[main_input(row).shape] for row in self.rows]
        hidden = [_first_input(self.base, blocks[0][1], row) for row in self.rows]
        last = max(at for at, inside in enumerate(groups) if inside)
        for at, (_, block) in enumerate(blocks[: last + 1]):
            for group in groups[at]:
                self._group(group, (g[at].bind(block, h) for g, h in zip(given, hidden, strict=True)))
            for i, arguments in enumerate(given if at < last else ()):
                hidden[i] = _hidden_of(arguments[at].bind(block, hidden[i])())
            self._replace()
            return_freed_memory()

    def _group(self, group: list[str], calls: Iterator[Callable[[], Any]]) -> None:
        x, row = self._inputs(self.base.get_submodule(group[0]), calls)
        for name in group:
            module = self.base.get_submodule(name)
            with torch.enable_grad():
                self.later[name] = self.visit(Inputs(self.prefix + name, module, x, row))
            del module
            self.finished += 1
            if self.sequential:
                self._replace()
            self.progress(self.finished, len(self.names))

    def _replace(self) -> None:
        for name, module in self.later.items():
            self.base.set_submodule(name, module)
        self.later.clear()

    def _inputs(self, module: nn.Module, calls: Iterator[Callable[[], Any]]) -> tuple[Tensor, Tensor]:
        """Inputs of one layer over all rows; each pass ends at the layer. One buffer, filled row by row."""
        limit = min(self.tokens, sum(self.lengths))
        x, row, filled, at = torch.empty(0), torch.empty(limit, dtype=torch.long), 0, 0

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal x, filled
            given = _input_of(args, kwargs).detach()
            given = given.reshape(-1, given.shape[-1])
            keep, origin = self.keep[at], self.origin[at]
            if len(given) != self.lengths[at]:  # other positions (a router's choice): a share of them
                keep = torch.linspace(0, len(given) - 1, -(-len(given) * limit // sum(self.lengths))).long()
                origin = origin[:1].expand(len(given))
            if keep is not None:
                given, origin = given[keep.to(given.device)], origin[keep]
            given, origin = given[: limit - filled], origin[: limit - filled]
            if not filled:
                x = given.new_empty(limit, given.shape[1])
            x[filled : filled + len(given)] = given
            row[filled : filled + len(given)] = origin
            filled += len(given)
            raise _Stop

        handle = module.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
        try:
            for at, call in enumerate(calls):  # noqa: B007 (`look` reads it)
                with contextlib.suppress(_Stop):
                    call()
        finally:
            handle.remove()
        if not filled:
            weight = next(module.parameters())
            x = weight.new_empty(0, int(getattr(module, "in_features", weight.shape[0])))  # Conv1D stores (n, m)
        return x[:filled], row[:filled]


def _in(name: str, path: str) -> bool:
    return name.startswith(path + ".")


def _positions(lengths: list[int], tokens: int) -> list[Tensor | None]:
    """Per row the positions to keep, ascending; None = all."""
    total = sum(lengths)
    if total <= tokens:
        return [None] * len(lengths)
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(SEED))[:tokens].sort().values
    ends = torch.tensor([0, *lengths]).cumsum(0)
    cuts = torch.searchsorted(chosen, ends)
    return [chosen[a:b] - start for a, b, start in zip(cuts[:-1], cuts[1:], ends[:-1], strict=True)]


def _lengths(base: Any, names: list[str], rows: Sequence[Mapping[str, Tensor]]) -> list[int]:
    """Positions of each batch: its tokens; where there are none, what the first of the layers sees."""
    seen: dict[torch.Size, int] = {}
    at = torch.Size()

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[at] = _input_of(args, kwargs).shape[:-1].numel()
        raise _Stop

    for row in rows:
        at = main_input(row).shape
        if "input_ids" in row or at in seen:
            continue
        handles = [base.get_submodule(n).register_forward_pre_hook(look, with_kwargs=True) for n in names]
        try:
            with contextlib.suppress(_Stop):
                base(**row)
        finally:
            for handle in handles:
                handle.remove()
    return [row["input_ids"].numel() if "input_ids" in row else seen[main_input(row).shape] for row in rows]


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def _hidden_of(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


@dataclass(frozen=True)
class _Given:
    """What a block was called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool  # hidden states were given as the keyword hidden_states

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Given, Any]:
        if args:
            return cls(args[1:], dict(kwargs), False), args[0]
        return cls((), {k: v for k, v in kwargs.items() if k != "hidden_states"}, True), kwargs.get("hidden_states")

    def bind(self, block: nn.Module, hidden: Tensor) -> Callable[[], Any]:
        if self.by_name:
            return lambda: block(hidden_states=hidden, **self.kwargs)
        return lambda: block(hidden, *self.args, **self.kwargs)


def _trace(
    base: Any, names: list[str], rows: Sequence[Mapping[str, Tensor]]
) -> tuple[list[list[str]], list[tuple[str, nn.Module]]]:
    """Layers by common input in the order in which they run, and the blocks (none = walk without them)."""
    order: list[list[str]] = []
    seen: set[str] = set()
    previous: list[Any] = [None]

    def watch(name: str) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _input_of(args, kwargs)
            if name not in seen:
                same = x is previous[0] and bool(order)
                order[-1].append(name) if same else order.append([name])
                seen.add(name)
            previous[0] = x

        return look

    handles = [
        base.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True, prepend=True)
        for name in names
    ]
    try:
        base(**rows[0])
    finally:
        for handle in handles:
            handle.remove()
    order += [[name] for name in names if name not in seen]
    blocks = _find_blocks(base, names)
    grouped = [{next((p for p, _ in blocks if _in(n, p)), "") for n in group} for group in order]
    if any(len(paths) > 1 for paths in grouped) or not _chained(base, [b for _, b in blocks], rows):
        blocks = []
    return order, blocks


def _find_blocks(base: nn.Module, names: list[str]) -> list[tuple[str, nn.Module]]:
    """The children of the one outermost ModuleList with layers in it; none where there are several lists."""
    lists = [
        path
        for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and any(_in(name, path) for name in names)
    ]
    outer = [path for path in lists if not any(_in(path, other) for other in lists)]
    if len(outer) != 1:
        return []
    return [(f"{outer[0]}.{leaf}", block) for leaf, block in base.get_submodule(outer[0]).named_children()]


def _run_blocks(base: Any, blocks: list[nn.Module], row: Mapping[str, Tensor]) -> tuple[list[_Given], bool]:
    """A whole pass: what each block was called with, and whether each was given just what the one before gave."""
    given: list[_Given] = []
    links: list[bool] = []
    output: list[Any] = [None]

    def before(at: int) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found, hidden = _Given.of(args, kwargs)
            links.append(at == len(given) and isinstance(hidden, Tensor) and (at == 0 or hidden is output[0]))
            given.append(found)

        return look

    def after(_: nn.Module, args: Any, out: Any) -> None:
        output[0] = _hidden_of(out)

    handles = [b.register_forward_pre_hook(before(at), with_kwargs=True) for at, b in enumerate(blocks)]
    handles += [b.register_forward_hook(after) for b in blocks]
    try:
        base(**row)
    finally:
        for handle in handles:
            handle.remove()
    return given, all(links) and len(given) == len(blocks)


def _chained(base: Any, blocks: list[nn.Module], rows: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether the blocks are a chain, and what else they are given depends on a batch's shape only, not on its tokens."""
    if not blocks or any(len(row) > 1 for row in rows):
        return False
    ((name, value),) = rows[0].items()
    generator = torch.Generator().manual_seed(SEED)
    if value.is_floating_point():
        other = torch.randn(value.shape, generator=generator).to(value)
    else:
        low, high = min(int(main_input(r).min()) for r in rows), max(int(main_input(r).max()) for r in rows)
        other = torch.randint(low, high + 1, value.shape, generator=generator).to(value)
    (a, chain), (b, _) = _run_blocks(base, blocks, rows[0]), _run_blocks(base, blocks, {name: other})
    return chain and all(_equal((x.args, x.kwargs), (y.args, y.kwargs)) for x, y in zip(a, b, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return bool(a is b or a == b)


def _block_arguments(
    base: Any, blocks: list[nn.Module], rows: Sequence[Mapping[str, Tensor]]
) -> dict[torch.Size, list[_Given]]:
    """Shape of a batch -> what each block is called with for such batches (masks, positions); blocks share the tensors."""
    found: dict[torch.Size, list[_Given]] = {}
    for row in rows:
        if main_input(row).shape not in found:
            found[main_input(row).shape] = _run_blocks(base, blocks, row)[0]
    return found


def _first_input(base: Any, block: nn.Module, row: Mapping[str, Tensor]) -> Tensor:
    """The hidden states (B, L, d) that enter the first block."""
    caught: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(_Given.of(args, kwargs)[1].detach())
        raise _Stop

    handle = block.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with contextlib.suppress(_Stop):
            base(**row)
    finally:
        handle.remove()
    return caught[0]
