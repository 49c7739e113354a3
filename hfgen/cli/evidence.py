"""`hfgen evidence`: run a claim, enter its report into the ledger, list and render the ledgers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hfgen import catalog
from hfgen.evidence import Experiment, JobError, LedgerError, run_experiment, write_report
from hfgen.evidence.ledger import current, enter, find_experiment, render, summary
from hfgen.evidence.report import sentence, show

SMOKE_SEEDS = 1000

evidence = typer.Typer(no_args_is_help=True, help="Claims as experiments: run one, see and render what came out.")


@evidence.command("run")
def run(
    name: Annotated[str, typer.Argument(help="The method; `hfgen evidence ls` lists what can be run.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds per arm.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Folder for the report; hfgen-evidence-NAME if left out.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A smoke run of seconds: few steps, no verdict.")] = False,
    claim: Annotated[str | None, typer.Option(help="Which claim; the first that can be run if left out.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
) -> None:
    """Run a method's claim over seeds: the table, the verdict, report.html and report.json."""
    run_claim(find_experiment(name, claim), seeds, out or Path(f"hfgen-evidence-{name}"), fast, workers)


@evidence.command("enter")
def enter_report(
    report: Annotated[Path, typer.Argument(help="A report.json of `hfgen evidence run`.")],
) -> None:
    """Put a report into its claim's ledger: 5 seeds or more, of settings that were committed before it ran."""
    try:
        print(f"written: {enter(json.loads(report.read_text(encoding='utf-8')))}")
    except (LedgerError, json.JSONDecodeError) as exc:
        print(f"hfgen: {exc}", file=sys.stderr)
        raise SystemExit(2) from None


@evidence.command("ls")
def ls() -> None:
    """List every claim of the installed methods with its verdict."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("method", "claim", "runnable", "arm", "verdict", "checks", "seeds"):
        table.add_column(column, overflow="fold")
    for card in catalog.list_cards():
        for claim in card.claims:
            for row in summary(current(card, claim)):
                table.add_row(card.name, claim.id, "yes" if claim.experiment else "no", *row)
    Console().print(table)


@evidence.command("render")
def render_page(
    out: Annotated[Path | None, typer.Option(help="File to write; standard output if left out.")] = None,
) -> None:
    """Write the text of EVIDENCE.md from the ledgers of all installed methods."""
    text = render(catalog.list_cards())
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")


def run_claim(experiment: Experiment, seeds: int, out: Path, fast: bool, workers: int = 2) -> None:
    """Runs `experiment`, prints it and writes its report to `out`; a failed run ends the process with code 1."""
    from rich.console import Console

    console, start = Console(), time.monotonic()
    console.print(f"[bold]{experiment.title}[/bold]\n{experiment.statement}\n")
    first = SMOKE_SEEDS if fast else 0  # a smoke run never looks at the reported seeds
    if fast:
        seeds = min(seeds, 2)
        console.print("[yellow]Smoke run: too short to decide anything; there will be no verdict.[/yellow]\n")
    out.mkdir(parents=True, exist_ok=True)
    log = out / "runs.log"
    log.write_text("", encoding="utf-8")
    try:
        report = run_experiment(experiment, range(first, first + seeds), smoke=fast, workers=workers, log=log)
    except JobError as exc:
        print(f"hfgen: {exc}\nhfgen: what the runs printed is in {log}", file=sys.stderr)
        raise SystemExit(1) from None
    files = write_report(report, out)
    print_report(report, console)
    console.print("\nwritten: " + ", ".join(map(str, files)), style="dim", soft_wrap=True)
    console.print(f"took {time.monotonic() - start:.0f} s", style="dim")


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
