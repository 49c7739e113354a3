"""The searches people call: over bits, depth and sparsity. They leave the model they are given as it is."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hfgen.kit import checks
from hfgen.kit.allocation import allocate
from hfgen.kit.levels import Levels, fingerprint, shared_copy

from .evolution import Progress, Schedule, Space, State, evolve, schedule_of
from .fitness import Fitness
from .problems import (
    Depth,
    Sparsity,
    bits_space,
    blocks_of,
    depth_space,
    drop_layers,
    prunable,
    prune_layers,
    sublayers_of,
)

Rows = Sequence[Mapping[str, Any]]
Report = Callable[[Progress, int], None]


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        plan: {module: bits}, {block or sublayer: kept} or {module: sparsity}.
        start: The plan that the search started from: the uniform one where the budget has one.
        uniform: Whether `start` is uniform.
        fitness: Of `start` and `found` on one common minibatch.
        unit: What that is: "KL, nats per token" or "perplexity".
        measured_on: "held_out" or "rows": the rows that the search saw, on which what it found looks better than it is.
        history: Per generation: `generation`, `fitness` of the winner and `parent`'s on the same minibatch, `accepted`,
            `tokens` forwarded so far.
        tokens: Tokens forwarded by candidates; the model itself runs once more over every minibatch.
        swapped: Units changed in the model between candidates, by this process.
        seconds: Of this process: an interrupted run's earlier parts are not counted.
        stopped: Why the search ended early; empty otherwise.
        notes: What a reader must know, e.g. that no candidate ever beat the start.
        export: `export(model)` gives the model with the plan applied, for `save_pretrained`.
    """

    plan: dict[str, Any]
    start: dict[str, Any]
    uniform: bool
    fitness: dict[str, float]
    unit: str
    measured_on: str
    history: list[dict[str, Any]]
    tokens: int
    swapped: int
    seconds: float
    stopped: str
    notes: tuple[str, ...]
    export: Callable[[Any], Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without `export`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "export"}


def evopress(
    model: Any,
    levels: Levels,
    rows: Rows,
    average_bits: float,
    *,
    preset: str = "quantization",
    group_rule: str = "size",
    fitness: str = "kl",
    kl_topk: int | None = None,
    held_out: Rows | None = None,
    seed: int = 0,
    folder: Path | None = None,
    progress: Report | None = None,
    **schedule: Any,
) -> SearchResult:
    """The widths of a model's layers that diverge least from it, {module: bits}, at an average of so many bits.

    Args:
        model: A causal language model in float, in memory.
        levels: Its level database, `Levels.build(model, quantizer_config)`.
        rows: Calibration data: dicts with input_ids (and attention_mask).
        average_bits: Bits of codes per weight over all layers of `levels`.
        preset: "quantization" (the paper's), "sparsity", "depth" or "super-fast".
        group_rule: "size": only layers of equal size trade bits, the budget is held exactly. "none": all do, up to it.
        fitness: "kl" to the model, or "perplexity".
        kl_topk: KL over the model's k likeliest tokens; None: over all.
        held_out: Rows on which start and found plan are compared at the end; None: on `rows`.
        seed: The run is a function of it and the other arguments.
        folder: Where the state is kept: an interrupted run goes on from it and ends the same.
        progress: `progress(run, generations)` after each generation.
        schedule: Fields of `Schedule` that replace the preset's: generations, offspring, survivors, tokens,
            initially_generated, initial_tokens.

    Raises:
        TypeError, ValueError: a budget the levels do not allow, too few tokens, a bad option, a state of another run.
    """
    plan = schedule_of(preset, schedule)
    space = bits_space(levels.sizes, levels.bits, average_bits, group_rule)
    levels.check(model)
    student = shared_copy(model).eval()
    measure = _fitness(model, student, functools.partial(levels.assign, student), list(levels.sizes), rows, fitness,
                       kl_topk, seed)  # fmt: skip
    run = _Run(space, measure, plan, seed, folder, progress, {"levels": levels.identity()}, held_out)
    return run.result(lambda p: p, levels.export)


def evopress_depth(
    model: Any,
    rows: Rows,
    drop: int | list[int] | tuple[int, ...],
    *,
    preset: str = "depth",
    fitness: str = "kl",
    kl_topk: int | None = None,
    held_out: Rows | None = None,
    seed: int = 0,
    folder: Path | None = None,
    progress: Report | None = None,
    **schedule: Any,
) -> SearchResult:
    """Which blocks of a model to drop: {block: kept}. `drop_layers(model, plan)` is the smaller model.

    Args:
        drop: How many blocks; or (attentions, feed-forward parts), which are then dropped apart from each other.

    Other arguments: see `evopress`. Generations, where none are given: k (n - k) / 1.5 for k of n, over both kinds.
    """
    if isinstance(drop, (list, tuple)):
        kinds, counts = list(sublayers_of(model).values()), list(drop)
        if len(counts) != len(kinds):
            raise ValueError(f"evopress.drop is {drop!r}; give a number of blocks, or (attentions, feed-forward parts)")
    else:
        path, blocks = blocks_of(model)
        kinds, counts = [[f"{path}.{i}" for i in range(len(blocks))]], [drop]
    space = depth_space(kinds, counts)
    generations = sum(math.ceil(k * (len(names) - k) / 1.5) for k, names in zip(counts, kinds, strict=True))
    plan = schedule_of(preset, schedule, generations)
    student = shared_copy(model).eval()
    names = [name for kind in kinds for name in kind]
    measure = _fitness(model, student, Depth(student).assign, names, rows, fitness, kl_topk, seed)
    run = _Run(space, measure, plan, seed, folder, progress, {"model": _hash(model)}, held_out)
    return run.result(lambda p: {name: bool(kept) for name, kept in p.items()}, drop_layers)


def evopress_sparsity(
    model: Any,
    rows: Rows,
    sparsity: float,
    *,
    step: float = 0.05,
    preset: str = "sparsity",
    fitness: str = "kl",
    kl_topk: int | None = None,
    held_out: Rows | None = None,
    seed: int = 0,
    folder: Path | None = None,
    progress: Report | None = None,
    **schedule: Any,
) -> SearchResult:
    """How sparse each linear layer of a model's blocks should be, {module: share of zeros}, at one total of zeros.

    Args:
        sparsity: Share of zeros in every layer at the start, and in all together throughout.
        step: Weights that one level adds to a layer's zeros, as a share of the smallest layer.

    Other arguments: see `evopress`. `prune_layers(model, plan)` is the plain model with zeros.
    """
    student = shared_copy(model).eval()
    found = Sparsity(student, sparsity, step)
    plan = schedule_of(preset, schedule)
    measure = _fitness(model, student, found.assign, list(found.menus), rows, fitness, kl_topk, seed)
    identity = {"sparsity": sparsity, "step": step, "model": _hash(model)}
    run = _Run(found.space(), measure, plan, seed, folder, progress, identity, held_out)
    return run.result(found.shares, prune_layers)


def additive_bits(
    model: Any, levels: Levels, rows: Rows, average_bits: float, tokens: int, seed: int = 0
) -> dict[str, int]:
    """The baseline to beat, {module: bits}: the integer program on the KL of one layer at a time, the others in float.

    It is exact if the layers' divergences add up. Costs layers * widths * `tokens`; EvoPress pays where they do not.
    """
    student = shared_copy(model).eval()
    names = list(levels.sizes)
    measure = _fitness(model, student, functools.partial(levels.assign, student), names, rows, "kl", None, seed)
    plain: dict[str, int | None] = dict.fromkeys(names)
    pairs = [(name, bits) for name in names for bits in levels.bits]
    values = measure.of([plain | {name: bits} for name, bits in pairs], tokens, "one at a time")
    costs: dict[str, dict[int, float]] = {name: {} for name in names}
    for (name, bits), value in zip(pairs, values, strict=True):
        costs[name][bits] = value
    return allocate(costs, levels.sizes, average_bits)


@dataclass(frozen=True)
class _Run:
    """One search, ready to start."""

    space: Space
    measure: Fitness
    schedule: Schedule
    seed: int
    folder: Path | None
    progress: Report | None
    identity: dict[str, Any]
    held_out: Rows | None

    def result(
        self, named: Callable[[dict[str, int]], dict[str, Any]], export: Callable[[Any, dict[str, Any]], Any]
    ) -> SearchResult:
        began, measure, report = time.monotonic(), self.measure, self.progress
        measure.need(max(self.schedule.tokens) if self.space.uniform is not None else self.schedule.largest)
        final = measure if self.held_out is None else self._held_out(self.held_out)
        swapped = 0

        def assign(plan: Mapping[str, Any]) -> int:
            nonlocal swapped
            swapped += (count := original(plan))
            return count

        original, measure.assign = measure.assign, assign
        run = evolve(
            self.space,
            measure,
            self.schedule,
            seed=self.seed,
            file=None if self.folder is None else self.folder / "state.json",
            identity={**self.identity, **measure.identity(), "names": measure.names},
            progress=None if report is None else lambda run: report(run, self.schedule.generations),
        )
        tokens = min(final.tokens, self.schedule.tokens[-1]) if self.held_out is None else final.tokens
        start, found = final([run.start, run.state], tokens, "at the end")
        return SearchResult(
            plan=named(self._plan(run.state)),
            start=named(self._plan(run.start)),
            uniform=run.start == self.space.uniform,
            fitness={"start": start, "found": found},
            unit="perplexity" if measure.kind == "perplexity" else "KL, nats per token",
            measured_on="rows" if self.held_out is None else "held_out",
            history=run.history,
            tokens=run.tokens,
            swapped=swapped,
            seconds=time.monotonic() - began,
            stopped=run.stopped,
            notes=tuple(_notes(run, start, found)),
            export=lambda model: export(model, named(self._plan(run.state))),
        )

    def _plan(self, state: State) -> dict[str, int]:
        return dict(zip(self.measure.names, state, strict=True))

    def _held_out(self, rows: Rows) -> Fitness:
        m = self.measure
        return Fitness(m.teacher, m.student, m.assign, m.names, rows, m.kind, m.topk, m.seed)


def _notes(run: Progress, start: float, found: float) -> Iterable[str]:
    if run.stopped:
        yield f"the search ended after {run.generation} generations: {run.stopped}"
    if run.history and not any(row["accepted"] for row in run.history):
        yield f"no candidate of {run.generation} generations beat the start: the plan found is the start's"
    elif found > start:
        yield "at the end the plan found is worse than the start: minibatches are too small, or rows unlike these"


def _fitness(
    model: Any, student: Any, assign: Any, names: list[str], rows: Rows, kind: str, topk: int | None, seed: int
) -> Fitness:
    checks.integer("evopress", "seed", seed)
    return Fitness(shared_copy(model).eval(), student, assign, names, rows, kind, topk, seed)


def _hash(model: Any) -> str:
    """Of the model's linear layers: what tells a state file's model from another."""
    return fingerprint(prunable(model))
