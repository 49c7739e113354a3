"""Runs the kit over the catalogue: one test per (method, check)."""

from __future__ import annotations

from typing import Any

import pytest

from hfgen import catalog
from hfgen.testing import adapters, quantizers, trainers

_KINDS: dict[str, dict[str, Any]] = {
    "adapters": adapters.CHECKS,
    "quantizers": quantizers.CHECKS,
    "trainers": trainers.CHECKS,
}


def pytest_generate_tests(metafunc: Any) -> None:
    names = metafunc.config.getoption("--hfgen-plugin")
    cards = [catalog.get_card(name) for name in names] or catalog.list_cards()
    cases = [
        pytest.param(card, check, id=f"{card.name}-{check}") for card in cards for check in _KINDS.get(card.kind, ())
    ]
    metafunc.parametrize(("card", "check"), cases)


def test_conformance(card: Any, check: str) -> None:
    target = catalog.load(card.name, card.kind)
    if card.kind == "adapters":
        adapters.CHECKS[check](adapters.AdapterCase(target))
    elif card.kind == "quantizers":
        quantizers.CHECKS[check](quantizers.QuantizerCase(target))
    else:
        trainers.CHECKS[check](trainers.TrainerCase(target, card))
