"""`hfgen report`: one HTML page about one or several runs, from the files the Trainer and the callbacks left."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="The output_dir of a run, or several to compare.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Curves, findings in plain sentences with when and how sure, and the next knob to try."""
    from hfgen.runs import read_run, render, sure

    try:
        read = [read_run(folder) for folder in runs]
    except ValueError as exc:
        print(f"hfgen: {exc}", file=sys.stderr)
        raise SystemExit(2) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(read), encoding="utf-8")
    for run in read:
        for problem in run.problems:
            print(f"{run.name}: {problem}", file=sys.stderr)
        for finding in run.findings[:3]:
            print(f"{run.name}: step {finding.step}: {finding.sentence} ({sure(finding.confidence)} sure)")
        if not run.findings:
            print(f"{run.name}: no finding")
    print(f"wrote {out}")
