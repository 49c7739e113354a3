"""EvoPress, arXiv:2410.14649: an elitist (1 + lambda) search over states of one budget. No torch here.

A state gives every unit (a layer, a block) a level: its bits, kept or dropped, an offset of its sparsity. Each generation
mutates the parent without touching the budget, and picks the next parent in stages: every stage measures what is left on
a fresh minibatch, the same for all, with more tokens than the one before. The parent is measured again, in the last
stage only; no score is ever compared with one from another minibatch.

All chance comes from generators seeded by (seed, generation, purpose), so a run is a function of its arguments, and what
is needed to go on after an interruption is the parent and the number of the generation.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hfgen.kit import checks

FORMAT = 1  # of the state file
TRIES = 20  # mutations drawn for each offspring that is wanted, before fewer are taken
MOST_FLIPS = 3  # a child has min(U(1, 3), U(1, 3)) flips
MOST_CHANGES, LEAST_FILL = 10, 0.8  # of a child under the rule "none": steps in all; cost added over cost removed

State = tuple[int, ...]
Score = Callable[[Sequence[State], int, str], list[float]]
"""(states, tokens, name of the minibatch) -> a score of each, less is better."""


@dataclass(frozen=True)
class Schedule:
    """How much is tried.

    Args:
        generations: Number of generations.
        offspring: Children of a generation.
        survivors: How many each stage keeps; the last keeps 1.
        tokens: Tokens of each stage's minibatch, exactly.
        initially_generated: Random points the start is chosen from, where the budget has no uniform state.
        initial_tokens: Tokens of the minibatch that chooses it.

    Raises:
        TypeError, ValueError: a field has a wrong type or value.
    """

    generations: int
    offspring: int
    survivors: tuple[int, ...]
    tokens: tuple[int, ...]
    initially_generated: int = 64
    initial_tokens: int = 2048

    def __post_init__(self) -> None:
        checks.integer("Schedule", "generations", self.generations, 0)
        for name in ("offspring", "initially_generated", "initial_tokens"):
            checks.integer("Schedule", name, getattr(self, name), 1)
        for name in ("survivors", "tokens"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not value:
                raise TypeError(f"Schedule.{name} is {value!r}; give one whole number per stage")
            object.__setattr__(self, name, tuple(value))
            for v in value:
                checks.integer("Schedule", name, v, 1)
        if len(self.survivors) != len(self.tokens):
            raise ValueError(
                f"Schedule.survivors has {len(self.survivors)} stages, tokens {len(self.tokens)}; give as many of both"
            )
        if self.survivors[-1] != 1 or list(self.survivors) != sorted(self.survivors, reverse=True):
            raise ValueError(f"Schedule.survivors is {self.survivors}; give numbers that never grow and end with 1")

    @property
    def largest(self) -> int:
        """The most tokens one minibatch can need."""
        return max(*self.tokens, self.initial_tokens)


PRESETS = {
    "quantization": Schedule(150, 128, (16, 4, 1), (2048, 16384, 131072)),
    "sparsity": Schedule(400, 64, (8, 2, 1), (2048, 16384, 65536)),
    "depth": Schedule(0, 32, (2, 1), (2048, 32768)),  # generations: k (n - k) / 1.5, see `evopress_depth`
    "super-fast": Schedule(400, 16, (1, 1), (512, 8192)),
}


def schedule_of(preset: str, options: dict[str, Any], generations: int = 0) -> Schedule:
    """The schedule of that name, with fields replaced by `options`; `generations` stands in where it names none.

    Raises:
        TypeError: an option that is no field.
        ValueError: an unknown preset.
    """
    checks.one_of("evopress", "preset", preset, tuple(PRESETS))
    fields = asdict(PRESETS[preset])
    checks.known_options("evopress", options, fields)
    fields["generations"] = fields["generations"] or generations
    return Schedule(**(fields | options))


@dataclass(frozen=True)
class Space:
    """The states that a budget allows. A unit at level l costs size * l.

    Args:
        menus: Levels of each unit, ascending.
        sizes: Cost of one level, of each unit.
        groups: Units that may trade levels: of equal size, so that a trade costs nothing.
        accounts: (units, budget): what these cost together must not exceed the budget.
        uniform: The state to start from; None: one of the random points.
        rule: "size": a flip lowers one unit of a group and raises another by as much. "none": units are raised at random,
            then others lowered until the budget holds; for one account only.
    """

    menus: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    accounts: tuple[tuple[tuple[int, ...], int], ...]
    uniform: State | None = None
    rule: str = "size"

    def cost(self, state: Sequence[int], units: Iterable[int]) -> int:
        """What the units cost together."""
        return sum(self.sizes[i] * state[i] for i in units)

    def fits(self, state: Sequence[int]) -> bool:
        """Whether every level is on its menu and every account within its budget."""
        known = all(level in menu for level, menu in zip(state, self.menus, strict=True))
        return known and all(self.cost(state, units) <= budget for units, budget in self.accounts)

    def step(self, state: Sequence[int], unit: int, up: int) -> int | None:
        """The next level of a unit up (1) or down (-1); None at the end of its menu."""
        menu = self.menus[unit]
        at = menu.index(state[unit]) + up
        return menu[at] if 0 <= at < len(menu) else None

    def point(self, rng: random.Random) -> State:
        """A state as full as can be: all units at the level above the budget's average, random ones lowered one step at
        a time until the budget holds, then raised where that fits."""
        state = [0] * len(self.menus)
        for units, budget in self.accounts:
            average = budget / sum(self.sizes[i] for i in units)
            for i in units:
                state[i] = next((level for level in self.menus[i] if level >= average), self.menus[i][-1])
            self._lower(state, units, budget, rng)
            for i in rng.sample(units, len(units)):
                level = self.step(state, i, 1)
                if level is not None and self.cost(state, units) + self.sizes[i] * (level - state[i]) <= budget:
                    state[i] = level
        return tuple(state)

    def mutate(self, state: State, rng: random.Random) -> State | None:
        """A child of the same budget; None where the draw gives none."""
        flips = min(rng.randint(1, MOST_FLIPS), rng.randint(1, MOST_FLIPS))
        new = list(state)
        if self.rule == "none":
            return self._freely(new, flips, rng)
        for _ in range(flips):
            (group,) = rng.choices(self.groups, weights=[len(g) for g in self.groups])
            down = [i for i in group if self.step(new, i, -1) is not None]
            if not down:
                continue
            i = rng.choice(down)
            low = self.step(new, i, -1)
            assert low is not None
            partners = {j: level for j in group if j != i and (level := self.step(new, j, 1)) is not None}
            equal = [j for j, level in partners.items() if level - new[j] == new[i] - low]
            if equal:
                j = rng.choice(equal)
                new[i], new[j] = low, partners[j]
        return tuple(new)

    def _freely(self, new: list[int], flips: int, rng: random.Random) -> State | None:
        old, ((units, budget),) = tuple(new), self.accounts
        for _ in range(flips):
            up = [i for i in units if self.step(new, i, 1) is not None]
            if up:
                i = rng.choice(up)
                new[i] = self.step(new, i, 1) or 0
        self._lower(new, units, budget, rng)
        steps = sum(abs(m.index(a) - m.index(b)) for m, a, b in zip(self.menus, old, new, strict=True))
        gains = [s * (b - a) for s, a, b in zip(self.sizes, old, new, strict=True)]
        added, removed = sum(g for g in gains if g > 0), -sum(g for g in gains if g < 0)
        return None if steps > MOST_CHANGES or added < LEAST_FILL * removed else tuple(new)

    def _lower(self, state: list[int], units: tuple[int, ...], budget: int, rng: random.Random) -> None:
        while self.cost(state, units) > budget:
            i = rng.choice([i for i in units if self.step(state, i, -1) is not None])
            level = self.step(state, i, -1)
            assert level is not None
            state[i] = level


@dataclass
class Progress:
    """What a run has reached; also what its state file holds.

    Attributes:
        generation: Generations done.
        state: The best state so far, the parent of the next generation.
        start: The first parent.
        tokens: Tokens forwarded by candidates.
        history: Per generation: `generation`, `fitness` of the winner and `parent`'s on the same minibatch, `accepted`
            (whether a child won), `tokens` so far. Minibatches differ from one generation to the next.
        stopped: Why the run ended before the last generation; empty otherwise.
    """

    generation: int = 0
    state: State = ()
    start: State = ()
    tokens: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""


def evolve(
    space: Space,
    score: Score,
    schedule: Schedule,
    *,
    seed: int = 0,
    file: Path | None = None,
    identity: dict[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Run the search.

    Args:
        space: The states.
        score: See `Score`; NaN counts as infinite.
        schedule: How much is tried.
        seed: Of all chance.
        file: Where the state is written after each generation, and read at the start.
        identity: What fixes the scores, as JSON: a file of a run with another one is refused.
        progress: Called after each generation.

    Raises:
        ValueError: `file` belongs to another run or is damaged.
    """
    same = json.loads(
        json.dumps({"space": asdict(space), "schedule": asdict(schedule), "seed": seed, **(identity or {})})
    )
    run = _read(file, same, space)
    if not run.state:
        run.state = run.start = _start(space, score, schedule, seed, run)
        _write(file, same, run)
    while run.generation < schedule.generations:
        rng = random.Random(f"evopress {seed} offspring {run.generation}")
        children = offspring(space, run.state, schedule.offspring, rng)
        if not children:
            run.stopped = "no other state keeps the budget"
            break
        winner, best, parent = _select(run, children, score, schedule)
        accepted = winner != run.state
        run.generation, run.state = run.generation + 1, winner
        row = {"generation": run.generation, "fitness": best, "parent": parent, "accepted": accepted}
        run.history.append({**row, "tokens": run.tokens})
        _write(file, same, run)
        if progress is not None:
            progress(run)
    return run


def offspring(space: Space, parent: State, count: int, rng: random.Random) -> list[State]:
    """Up to `count` distinct children of a parent, itself not among them."""
    found: dict[State, None] = {}
    for _ in range(TRIES * count):
        child = space.mutate(parent, rng)
        if child is not None and child != parent:
            found[child] = None
        if len(found) == count:
            break
    return list(found)


def _start(space: Space, score: Score, schedule: Schedule, seed: int, run: Progress) -> State:
    if space.uniform is not None:
        return space.uniform
    rng = random.Random(f"evopress {seed} start")
    points: dict[State, None] = {}
    for _ in range(TRIES * schedule.initially_generated):
        points[space.point(rng)] = None
        if len(points) == schedule.initially_generated:
            break
    pool = list(points)
    if len(pool) == 1:
        return pool[0]
    return _best(pool, _scores(run, score, pool, schedule.initial_tokens, "start"), 1)[0]


def _select(run: Progress, pool: list[State], score: Score, schedule: Schedule) -> tuple[State, float, float]:
    """The winner, its score and the parent's; a stage that would keep all is not measured."""
    for stage, (keep, tokens) in enumerate(zip(schedule.survivors[:-1], schedule.tokens[:-1], strict=True)):
        if keep < len(pool):
            pool = _best(pool, _scores(run, score, pool, tokens, f"{run.generation} {stage}"), keep)
    pool = [run.state, *pool]  # first, so that a child has to be better, not as good
    found = _scores(run, score, pool, schedule.tokens[-1], f"{run.generation} last")
    winner = _best(pool, found, 1)[0]
    return winner, found[pool.index(winner)], found[0]


def _scores(run: Progress, score: Score, pool: list[State], tokens: int, name: str) -> list[float]:
    run.tokens += tokens * len(pool)
    return [math.inf if math.isnan(value) else value for value in score(pool, tokens, name)]


def _best(pool: list[State], scores: list[float], keep: int) -> list[State]:
    return [pool[i] for i in sorted(range(len(pool)), key=lambda i: (scores[i], i))[:keep]]


def _read(file: Path | None, same: dict[str, Any], space: Space) -> Progress:
    """The run in the file, or a new one."""
    if file is None or not file.is_file():
        return Progress()
    fix = "remove it to begin anew, or write somewhere else"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        known, identity = data["format"] == FORMAT, data["identity"]
        run = Progress(**data["run"])
        run.state, run.start = tuple(run.state), tuple(run.start)
        fits = space.fits(run.state) and space.fits(run.start) and len(run.history) == run.generation
    except (ValueError, KeyError, TypeError) as exc:
        raise ValueError(f"{file} is no state of a search ({type(exc).__name__}: {exc}); {fix}") from None
    if not known:
        raise ValueError(f"{file} has format {data['format']!r}, this evopress reads {FORMAT}; {fix}")
    other = sorted(key for key in same.keys() | identity.keys() if same.get(key) != identity.get(key))
    if other:
        raise ValueError(f"{file} is of a search that differs in {', '.join(other)}; {fix}")
    if not fits:
        raise ValueError(f"{file} holds a state that the budget does not allow: it is damaged; {fix}")
    return run


def _write(file: Path | None, same: dict[str, Any], run: Progress) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(file.name + ".new")
        new.write_text(json.dumps({"format": FORMAT, "identity": same, "run": asdict(run)}), encoding="utf-8")
        os.replace(new, file)  # a kill leaves the old state or the new one
