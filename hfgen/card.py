"""What a method says about itself. Standard library only: reading every card must cost nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# One name in three places: entry-point group and import shelf `hfgen.<kind>`, folder `plugins/hfgen_plugins/<kind>`.
KINDS = (
    "adapters",
    "quantizers",
    "callbacks",
    "trainers",
    "optimizers",
    "losses",
    "data",
    "mergers",
    "decoding",
    "heads",
    "judges",
    "paraphrasers",
    "searches",
    "models",
    "pipelines",
)


@dataclass(frozen=True)
class Paper:
    """The publication a method comes from.

    Args:
        title: Title as printed.
        id: Identifier a reader can resolve, e.g. `"arXiv:2409.05926"`.
        year: Year of that version.
    """

    title: str
    id: str
    year: int


@dataclass(frozen=True)
class Claim:
    """One statement of the paper that an experiment can confirm or refute.

    Args:
        id: Short name, unique within the card.
        statement: The claim in one sentence.
        experiment: `"module:attribute"` of the runnable experiment, or None while there is none.
        paper_value: The paper's own figure with its source; never one quoted from memory.
    """

    id: str
    statement: str
    experiment: str | None = None
    paper_value: str | None = None


@dataclass(frozen=True)
class MethodCard:
    """Everything printed or generated about a method comes from its card.

    Args:
        name: Lower-case identifier, equal to the entry point's name.
        kind: One of `KINDS`, equal to the entry-point group without `hfgen.`.
        summary: One sentence.
        target: `"module:attribute"` of the class or function the catalogue loads.
        exports: Public names the shelf `hfgen.<kind>` offers; all live in the package that holds the card.
        paper: The publication, or None for a building block without one.
        needs: What it needs from the host (hooks, resources).
        conflicts: What it is known not to work with.
        defaults: Where the defaults come from.
        deviations: Where it differs from the paper and why.
        sources: Source code that was read for it, with its licence.
        claims: What the paper says, as runnable experiments.
        example: `"module:callable"` that gives keyword arguments of the target for a tiny run (conformance kit), or None.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: the name, kind or target is malformed.
    """

    name: str
    kind: str
    summary: str
    target: str
    exports: tuple[str, ...]
    paper: Paper | None = None
    needs: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    defaults: str = ""
    deviations: tuple[str, ...] = ()
    sources: str = "none"
    claims: tuple[Claim, ...] = ()
    example: str | None = None

    def __post_init__(self) -> None:
        for field in ("name", "kind", "summary", "target"):
            if not isinstance(getattr(self, field), str):
                raise TypeError(f"MethodCard.{field} is {getattr(self, field)!r}; give a string")
        for field in ("exports", "needs", "conflicts", "deviations", "claims"):
            if not isinstance(getattr(self, field), tuple):
                raise TypeError(f"MethodCard.{field} is {getattr(self, field)!r}; give a tuple")
        if not (self.name.isidentifier() and self.name == self.name.lower()) or self.name.endswith("_"):
            raise ValueError(f"MethodCard.name is {self.name!r}; give a lower-case identifier that does not end in '_'")
        if self.kind not in KINDS:
            raise ValueError(f"MethodCard.kind is {self.kind!r}; give one of {', '.join(KINDS)}")
        if self.target.count(":") != 1:
            raise ValueError(f"MethodCard.target is {self.target!r}; write it as 'module:attribute'")

    def to_dict(self) -> dict[str, Any]:
        """The card as JSON-serialisable data."""
        return dataclasses.asdict(self)
