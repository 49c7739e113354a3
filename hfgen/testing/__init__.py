"""The conformance kit: one check per behaviour a kind promises. A card is tested because it exists.

`hfgen check NAME` and `pytest --pyargs hfgen.testing --hfgen-plugin NAME` run it over one installed method, without the
name over all; `cases` gives the same checks to a test file of one's own. Importing this package imports no host.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfgen.card import MethodCard

# Kinds with checks of their own: the case class in hfgen.testing.<kind>, and whether it takes the card too.
_CASES = {
    "adapters": ("AdapterCase", False),
    "quantizers": ("QuantizerCase", False),
    "callbacks": ("CallbackCase", True),
    "trainers": ("TrainerCase", True),
}


def cases(card: MethodCard) -> list[tuple[str, Callable[[], None]]]:
    """The checks of one installed method as (name, callable): those of every card, then those of its kind.

    A callable loads the method, so that a method that does not load fails its checks and not the collection. It raises
    AssertionError in words, or whatever the method raises.

    Raises:
        CatalogError: no healthy method of the card's name and kind is installed.
    """
    from hfgen import catalog
    from hfgen.testing import cards

    plugin = catalog.find(card.name, card.kind)
    found: list[tuple[str, Callable[[], None]]] = [
        (name, functools.partial(check, cards.CardCase(plugin))) for name, check in cards.CHECKS.items()
    ]
    if card.kind in _CASES:
        checks = importlib.import_module(f"hfgen.testing.{card.kind}").CHECKS
        found += [(name, functools.partial(_run, check, card)) for name, check in checks.items()]
    return found


def _run(check: Callable[[Any], None], card: MethodCard) -> None:
    """Load the method, wrap it in the case of its kind, and check that."""
    from hfgen import catalog

    name, takes_card = _CASES[card.kind]
    case = getattr(importlib.import_module(f"hfgen.testing.{card.kind}"), name)
    target = catalog.load(card.name, card.kind)
    check(case(target, card) if takes_card else case(target))
