"""`hfgen quickstart`: the main job on the embedded model, from nothing to a verdict in minutes."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hfgen import catalog
from hfgen.evidence import Experiment, JobError, run_experiment, write_report
from hfgen.evidence.report import sentence, show

METHOD = "s3ft"  # the method whose first claim is the main job; everything else comes from its card
SMOKE_SEEDS = 1000


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")] = Path("hfgen-quickstart"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds per arm.")] = 3,
    fast: Annotated[bool, typer.Option("--fast", help="A smoke run of seconds: few steps, no verdict.")] = False,
) -> None:
    """Fine-tune the shipped tiny model with SFT and with S3FT, see what each learns and forgets, get the verdict."""
    from rich.console import Console

    console, start = Console(), time.monotonic()
    experiment = find_experiment(METHOD)
    console.print(f"[bold]{experiment.title}[/bold]\n{experiment.statement}\n")
    first = SMOKE_SEEDS if fast else 0  # a smoke run never looks at the reported seeds
    if fast:
        seeds = min(seeds, 2)
        console.print("[yellow]Smoke run: too short to decide anything; there will be no verdict.[/yellow]\n")
    out.mkdir(parents=True, exist_ok=True)
    log = out / "runs.log"
    log.write_text("", encoding="utf-8")
    try:
        report = run_experiment(experiment, range(first, first + seeds), smoke=fast, log=log)
    except JobError as exc:
        print(f"hfgen: {exc}\nhfgen: what the runs printed is in {log}", file=sys.stderr)
        raise SystemExit(1) from None
    files = write_report(report, out)
    print_report(report, console)
    console.print("\nwritten: " + ", ".join(map(str, files)), style="dim", soft_wrap=True)
    console.print(f"took {time.monotonic() - start:.0f} s", style="dim")


def find_experiment(method: str) -> Experiment:
    """The experiment of the first claim on the method's card that has one.

    Raises:
        CatalogError: no such method, or no claim of it can be run.
    """
    card = catalog.get_card(method)
    target = next((claim.experiment for claim in card.claims if claim.experiment), None)
    if target is None:
        raise catalog.CatalogError(
            f"method {method!r} has no claim with an experiment; `hfgen show {method}` lists them"
        )
    module, _, attribute = target.partition(":")
    experiment: Experiment = getattr(importlib.import_module(module), attribute)
    return experiment


def print_report(report: dict[str, Any], console: Any) -> None:
    """The table and the verdicts of a report, for a terminal."""
    from rich.table import Table

    metrics = [metric for metric in report["metrics"] if not metric["detail"]]
    table = Table(title=f"mean over {len(report['seeds'])} seeds, below it the 95 % interval", title_justify="left")
    table.add_column("")
    for metric in metrics:
        table.add_column(metric["label"], justify="right")
    for arm in report["arms"]:
        cells = ("\n".join(show(metric["unit"], arm["metrics"][metric["key"]])) for metric in metrics)
        table.add_row(arm["label"], *cells, end_section=True)
    console.print(table)
    colours = {"reproduced": "green", "partly": "yellow"}
    labels = {arm["id"]: arm["label"] for arm in report["arms"]}
    for verdict in report["verdicts"]:
        colour = colours.get(verdict["verdict"], "red")
        console.print(
            f"\n[bold]{labels[verdict['arm']]}: [{colour}]{verdict['verdict']}[/{colour}][/bold]", highlight=False
        )
        console.print(f"  {verdict['reason']}", highlight=False, markup=False)
        for check in verdict["checks"]:
            console.print(f"  - {sentence(check)}", highlight=False, markup=False, soft_wrap=True)
