"""`hfgen show NAME`: the card."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from hfgen import catalog


def show(
    name: Annotated[str, typer.Argument(help="A method's name as `hfgen ls` prints it.")],
    kind: Annotated[str | None, typer.Option(help="Its kind, where a name exists as several.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Print a method's card: what it is, where it comes from, what it needs, what it claims."""
    plugin = catalog.find(name, kind)
    card = plugin.card
    assert card is not None
    if as_json:
        print(json.dumps(card.to_dict(), indent=2))
        return
    from rich.console import Console

    paper = f"{card.paper.title} ({card.paper.id}, {card.paper.year})" if card.paper else "-"
    claims = [f"{c.id}: {c.statement}" + (f" [paper: {c.paper_value}]" if c.paper_value else "") for c in card.claims]
    console = Console(highlight=False)
    console.print(f"{card.name}  ({card.kind})", style="bold")
    console.print(card.summary)
    for title, value in (
        ("import", [f"from hfgen.{card.kind} import {', '.join(card.exports)}"]),
        ("paper", [paper]),
        ("defaults", [card.defaults]),
        ("needs", card.needs),
        ("conflicts", card.conflicts),
        ("deviations", card.deviations),
        ("claims", claims),
        ("sources read", [card.sources]),
        ("installed by", [plugin.provenance]),
    ):
        for i, line in enumerate(v for v in value if v):
            console.print(f"  {title if i == 0 else '':13} {line}", markup=False)
