"""Runs the kit over the catalogue: one test per (method, check)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hfgen import catalog
from hfgen.testing import cases
from hfgen.testing.plugin import split


def pytest_generate_tests(metafunc: Any) -> None:
    names = metafunc.config.getoption("--hfgen-plugin")
    cards = [catalog.get_card(*split(name)) for name in names] or catalog.list_cards()
    found = [pytest.param(card, check, run, id=f"{card.name}-{check}") for card in cards for check, run in cases(card)]
    metafunc.parametrize(("card", "check", "run"), found)


def test_conformance(card: Any, check: str, run: Callable[[], None]) -> None:
    run()
