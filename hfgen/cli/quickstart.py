"""`hfgen quickstart`: the main job on the embedded model, from nothing to a verdict in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfgen.cli.evidence import run_claim
from hfgen.evidence import find_experiment

METHOD = "s3ft"  # the method whose first claim is the main job; everything else comes from its card


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")] = Path("hfgen-quickstart"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds per arm.")] = 3,
    fast: Annotated[bool, typer.Option("--fast", help="A smoke run of seconds: few steps, no verdict.")] = False,
) -> None:
    """Fine-tune the shipped tiny model with SFT and with S3FT, see what each learns and forgets, get the verdict."""
    run_claim(find_experiment(METHOD), seeds, out, fast)
