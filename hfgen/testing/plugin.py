"""pytest plugin (entry point `pytest11`): options only, so that it costs a foreign test run nothing."""

from __future__ import annotations

from typing import Any


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("hfgen")
    group.addoption(
        "--hfgen-plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="run hfgen's conformance kit on this method only (repeatable); default: every installed one",
    )
