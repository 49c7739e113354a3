"""`hfgen check`: the conformance kit over installed methods, one line for each and a sentence for each fault."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hfgen import __version__, catalog
from hfgen.card import KINDS

POLL = 0.1  # seconds between two looks at the kit's report
# One thread and no hub, as the kit's own tests: checks compare to the bit. No plugin or option of the user's own pytest.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_ADDOPTS": "",
    "PYTEST_PLUGINS": "",
}


def check(
    name: Annotated[
        str | None, typer.Argument(help="A method or a distribution; all that is installed if left out.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every outcome to this file.")] = None,
    badge: Annotated[Path | None, typer.Option(help="Write a badge (shields.io endpoint) to this file.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which one check counts as hanging.")] = 300.0,
) -> None:
    """Run the conformance kit on installed methods. Exit code 0: all passed, 1: a fault, 2: the command is wrong."""
    if importlib.util.find_spec("pytest") is None:
        raise catalog.CatalogError("`hfgen check` runs on pytest, which is not installed: pip install pytest")
    for file in (json_file, badge):
        if file is not None and not file.absolute().parent.is_dir():
            raise catalog.CatalogError(f"{file} cannot be written: there is no folder {file.absolute().parent}")
    from rich.console import Console

    console = Console(highlight=False)
    chosen = select(name)
    with console.status("checking") as status:
        rows = run_kit([p for p in chosen if p.status == "ok"], timeout, lambda row: status.update(_progress(row)))
    report = summarise(chosen, rows)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if badge is not None:
        badge.write_text(json.dumps(make_badge(report)) + "\n", encoding="utf-8")
    print_report(report, console)
    if not report["passed"]:
        raise SystemExit(1)


def _progress(row: dict[str, Any]) -> str:
    return f"{row['name']}: {row['check']}"


# --- what is checked ------------------------------------------------------------------------------------------------


def select(name: str | None) -> list[catalog.Plugin]:
    """The methods of that name, and those that the distribution of that name offers; all if None.

    Raises:
        CatalogError: nothing has the name (with did-you-mean), or what has it is blocked.
    """
    plugins = catalog.plugins()
    if name is None:
        return plugins
    keys = _offered(name)
    chosen = [p for p in plugins if p.name == name or (p.kind, p.name) in keys]
    if not chosen:
        catalog.find(name)  # raises, with did-you-mean
    if all(p.status == "blocked" for p in chosen):
        raise catalog.CatalogError(f"{name!r} is blocked: {chosen[0].reason}")
    return chosen


def _offered(name: str) -> set[tuple[str, str]]:
    """(kind, method) of everything the distribution of that name offers; empty if none is called so.

    Raises:
        CatalogError: its entry points are in groups that hfgen does not read.
    """
    try:
        found = importlib.metadata.distribution(name).entry_points
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return set()
    groups = [(ep.group.removeprefix("hfgen."), ep.name) for ep in found if ep.group.startswith("hfgen.")]
    for kind, method in groups:
        if kind not in KINDS:
            raise catalog.CatalogError(
                f"{name} offers {method!r} in group 'hfgen.{kind}', which is none; groups are hfgen.<kind> with one of "
                + ", ".join(KINDS)
            )
    return set(groups)


# --- running the kit ------------------------------------------------------------------------------------------------


def run_kit(
    plugins: list[catalog.Plugin], timeout: float, progress: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Outcome of every check of these methods, as `hfgen.testing.plugin.Report` writes them.

    The kit runs in a process of its own. A check that ends that process or hangs is a failed check, and a new process
    goes on with the next one.

    Raises:
        CatalogError: the process ends without having run a check.
    """
    from hfgen.testing.plugin import read

    if not plugins:
        return []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = folder / "report.jsonl"
        (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        while True:
            code, hung = _run_once(plugins, folder, report, timeout, progress)
            rows = read(report)
            done = [row for row in rows if row["outcome"] != "started"]
            if not rows or rows[-1]["outcome"] != "started":
                if code in (0, 1, 5):  # 5: there was nothing left
                    return done
                log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip()
                raise catalog.CatalogError(f"the kit did not run (pytest ended with {code}): {log[-1500:]}")
            how = f"hung: nothing came of it in {timeout:g} s" if hung else f"ended the process ({_signal(code)})"
            row = {**rows[-1], "outcome": "failed", "seconds": timeout if hung else 0.0, "message": f"the check {how}"}
            with report.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _run_once(
    plugins: list[catalog.Plugin],
    folder: Path,
    report: Path,
    timeout: float,
    progress: Callable[[dict[str, Any]], None],
) -> tuple[int, bool]:
    """One pytest process over what `report` lacks; its exit code, and whether it was killed for hanging."""
    from hfgen.testing.plugin import read

    command = [
        sys.executable, "-P", "-m", "pytest", "-c", str(folder / "pytest.ini"), "--rootdir", str(folder),
        "--noconftest", "--assert=plain", "-p", "no:cacheprovider", "-p", "hfgen.testing.plugin", "-W", "ignore",
        "--tb=short", "-q", "--hfgen-report", str(report), "--pyargs", "hfgen.testing.test_conformance",
    ]  # fmt: skip
    command += [f"--hfgen-plugin={p.kind}/{p.name}" for p in plugins]
    paths = [str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        try:
            return _watch(process, lambda: read(report), timeout, progress)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that the check started
                process.wait()


def _watch(
    process: subprocess.Popen[bytes],
    rows: Callable[[], list[dict[str, Any]]],
    timeout: float,
    progress: Callable[[dict[str, Any]], None],
) -> tuple[int, bool]:
    seen, since = 0, time.monotonic()
    while True:
        try:
            return process.wait(POLL), False
        except subprocess.TimeoutExpired:
            found = rows()
        if len(found) > seen:
            seen, since = len(found), time.monotonic()
            progress(found[-1])
        running = bool(found) and found[-1]["outcome"] == "started"
        if running and time.monotonic() - since > timeout:
            return -signal.SIGKILL, True


def _signal(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# --- what came out --------------------------------------------------------------------------------------------------


def summarise(plugins: list[catalog.Plugin], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The report as plain data: every method with its health and its checks."""
    methods = []
    for p in plugins:
        checks = [
            {key: row[key] for key in ("check", "outcome", "seconds", "message")}
            for row in rows
            if (row["kind"], row["name"]) == (p.kind, p.name)
        ]
        outcome = "passed" if checks and all(c["outcome"] == "passed" for c in checks) else "failed"
        status = {"ok": outcome, "broken": "quarantined"}.get(p.status, p.status)
        methods.append(
            {
                "name": p.name, "kind": p.kind, "distribution": p.distribution, "version": p.version, "file": p.file,
                "status": status, "reason": p.reason, "checks": checks,
            }
        )  # fmt: skip
    passed = all(m["status"] in ("passed", "blocked") for m in methods)
    return {"format": 1, "hfgen": __version__, "python": sys.version.split()[0], "passed": passed, "methods": methods}


def make_badge(report: dict[str, Any]) -> dict[str, Any]:
    """The badge in the schema of https://shields.io/badges/endpoint-badge."""
    checks = [c for m in report["methods"] for c in m["checks"]]
    failed = sum(c["outcome"] != "passed" for c in checks)
    broken = sum(m["status"] == "quarantined" for m in report["methods"])
    faults = [f"{failed} of {len(checks)} checks failed"] * bool(failed) + [f"{broken} quarantined"] * bool(broken)
    message = f"{len(checks)} checks passed" if report["passed"] else ", ".join(faults)
    colour = "brightgreen" if report["passed"] else "red"
    return {"schemaVersion": 1, "label": "hfgen check", "message": message, "color": colour}


def print_report(report: dict[str, Any], console: Any) -> None:
    """One line for each method; below a failed one each sentence, with the checks that said it."""
    from rich.markup import escape
    from rich.padding import Padding

    colours = {"passed": "green", "blocked": "yellow"}
    for m in report["methods"]:
        failed = [c for c in m["checks"] if c["outcome"] != "passed"]
        seconds = sum(c["seconds"] for c in m["checks"])
        of = {
            "passed": f"{len(m['checks'])} checks in {seconds:.1f} s",
            "failed": f"{len(failed)} of {len(m['checks'])} checks in {seconds:.1f} s",
        }.get(m["status"], escape(m["reason"]))
        colour = colours.get(m["status"], "red")
        where = f"{m['kind']}, {m['distribution']} {m['version']}"
        console.print(f"[bold]{m['name']}[/bold] ({where}): [{colour}]{m['status']}[/{colour}]: {of}", soft_wrap=True)
        said: dict[str, list[str]] = {}
        for c in failed:
            said.setdefault(c["message"], []).append(c["check"])
        for message, checks in said.items():
            console.print(Padding.indent(f"[red]{escape(', '.join(checks))}[/red]: {escape(message)}", 2))
    count = len(report["methods"])
    bad = sum(m["status"] in ("failed", "quarantined") for m in report["methods"])
    methods = "1 method" if count == 1 else f"{count} methods"
    console.print(f"[red]{bad} of {methods} at fault[/red]" if bad else f"[green]no fault in {methods}[/green]")
