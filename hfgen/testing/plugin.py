"""pytest plugin (entry point `pytest11`): two options, and the report that `hfgen check` reads while it runs."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pytest

LONGEST = 600  # characters of a message in the report


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("hfgen")
    group.addoption(
        "--hfgen-plugin",
        action="append",
        default=[],
        metavar="[KIND/]NAME",
        help="run hfgen's conformance kit on this method only (repeatable); default: every installed one",
    )
    group.addoption(
        "--hfgen-report",
        metavar="FILE",
        help="append each check's outcome to FILE as a line of JSON; checks that FILE has already are not run again",
    )


def pytest_configure(config: Any) -> None:
    """A wrong name is a line and not a traceback; the report is written only where it is asked for."""
    names = config.getoption("--hfgen-plugin")
    if names:
        from hfgen import catalog

        try:
            for name in names:
                catalog.find(*split(name))
        except catalog.CatalogError as exc:
            raise pytest.UsageError(f"--hfgen-plugin {name}: {exc}") from None
    if config.getoption("--hfgen-report"):
        config.pluginmanager.register(Report(Path(config.getoption("--hfgen-report"))))


def split(text: str) -> tuple[str, str | None]:
    """The name, and the kind where one is given, of `[KIND/]NAME`."""
    kind, _, name = text.rpartition("/")
    return name, kind or None


class Report:
    """Appends a line when a check starts and one when it ends: a start without an end is a check that took the process.

    Lines: {"kind", "name", "check", "outcome": "started" | "passed" | "failed", "seconds", "message"}.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        done = {(row["kind"], row["name"], row["check"]) for row in read(self.path) if row["outcome"] != "started"}
        items[:] = [item for item in items if tuple(_of(item).values()) not in done]

    def pytest_runtest_setup(self, item: Any) -> None:
        self._append({**_of(item), "outcome": "started"})

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.when == "call":
            failed = call.excinfo is not None
            message = words(call.excinfo.value) if failed else ""
            outcome = "failed" if failed else "passed"
            self._append({**_of(item), "outcome": outcome, "seconds": round(call.duration, 3), "message": message})

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _of(item: Any) -> dict[str, str]:
    parameters = item.callspec.params
    return {"kind": parameters["card"].kind, "name": parameters["card"].name, "check": parameters["check"]}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a report so far; a line cut off by a crash ends it."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def words(exc: BaseException) -> str:
    """What a failed check says: the assertion's own sentence, or the error with the line that raised it."""
    text = str(exc).strip()
    frame = traceback.extract_tb(exc.__traceback__)[-1]
    where = f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"
    if isinstance(exc, AssertionError):
        text = text or f"{frame.line} ({where})"
    else:
        text = f"{type(exc).__name__}: {text} ({where})"
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
