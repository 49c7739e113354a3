"""`hfgen search`: the bits, the depth or the sparsity of each layer that cost a model least at one budget."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfgen import catalog
from hfgen.cli.quantize import find_model, parse_fields

if TYPE_CHECKING:
    from hfgen.searches import SearchResult

GOALS = ("--average-bits", "--drop", "--sparsity")


def search(
    name: Annotated[str, typer.Argument(help="The search; `hfgen ls searches` lists them.")],
    model: Annotated[str, typer.Argument(help="A folder of a causal language model in float, or a hub id.")],
    calib: Annotated[Path, typer.Option(help="Calibration rows, .jsonl or .parquet: text, messages or input_ids.")],
    out: Annotated[
        Path, typer.Option(help="The plan to write (.json); an interrupted run goes on with the same command.")
    ],
    average_bits: Annotated[float | None, typer.Option(help="Search bits: their average over all weights.")] = None,
    drop: Annotated[
        str | None, typer.Option(help="Search depth: how many blocks to drop, or ATTENTIONS,MLPS apart: 4,2.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Search sparsity: the share of zeros over all layers.")] = None,
    quantizer: Annotated[
        str | None, typer.Option(help="With --average-bits: a data-free one of `hfgen ls quantizers`.")
    ] = None,
    quantizer_args: Annotated[str | None, typer.Option(help="Fields of its config, as JSON.")] = None,
    levels: Annotated[
        str | None, typer.Option(help="With --average-bits: the widths a layer may get; 2,3,4,5,6.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="How much is tried: see the search's documentation.")] = None,
    generations: Annotated[int | None, typer.Option(help="Instead of the preset's.")] = None,
    args: Annotated[str, typer.Option(help='Other arguments of the search, as JSON: {"tokens": [512, 4096]}.')] = "{}",
    held_out: Annotated[Path | None, typer.Option(help="Rows to compare start and found plan on at the end.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the compressed model to this new folder, too.")] = None,
    limit: Annotated[int | None, typer.Option(help="Calibration rows to read; all if left out.")] = None,
    max_length: Annotated[int, typer.Option(help="Longer rows are cut.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of all chance.")] = 0,
) -> None:
    """Search the compression of each layer that diverges least from the model at one budget."""
    from rich.console import Console

    options = {"preset": preset, "generations": generations}
    try:
        given = parse_fields(args) | {k: v for k, v in options.items() if v is not None} | {"seed": seed}
        goal = read_goal(average_bits, drop, sparsity, quantizer, quantizer_args, levels)
        run(name, model, goal, calib, held_out, out, save, limit, max_length, given, Console())
    except (ValueError, TypeError) as exc:
        print(f"hfgen: {exc}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"hfgen: interrupted; the same command goes on from {partial(out)}", file=sys.stderr)
        raise SystemExit(130) from None


def read_goal(
    average_bits: float | None,
    drop: str | None,
    sparsity: float | None,
    quantizer: str | None,
    quantizer_args: str | None,
    levels: str | None,
) -> tuple[str, dict[str, Any]]:
    """What is searched ("bits", "depth" or "sparsity") and its options. Raises ValueError unless just one is."""
    given = [flag for flag, value in zip(GOALS, (average_bits, drop, sparsity), strict=True) if value is not None]
    if len(given) != 1:
        raise ValueError(f"{' and '.join(given) or 'no budget'} given; give one of {', '.join(GOALS)}")
    for flag, value in (("--quantizer", quantizer), ("--quantizer-args", quantizer_args), ("--levels", levels)):
        if average_bits is None and value is not None:  # an option that would be ignored is an error
            raise ValueError(f"{flag} is {value!r}, which only --average-bits reads; leave it out")
    if drop is not None:
        numbers = whole_numbers(drop, "--drop")
        return "depth", {"drop": numbers[0] if len(numbers) == 1 else numbers}
    if sparsity is not None:
        return "sparsity", {"sparsity": sparsity}
    if quantizer is None:
        raise ValueError(
            "--quantizer is missing; name the one whose codes are searched over, see `hfgen ls quantizers`"
        )
    try:
        fields = parse_fields(quantizer_args or "{}")
    except ValueError as exc:
        raise ValueError(str(exc).replace("--args", "--quantizer-args").replace("--bits", "--levels")) from None
    return "bits", {"average_bits": average_bits, "quantizer": quantizer, "fields": fields,
                    "levels": whole_numbers(levels or "2,3,4,5,6", "--levels")}  # fmt: skip


def whole_numbers(text: str, option: str) -> list[int]:
    """`"2,3"` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}; give whole numbers with commas between them, such as 2,3,4") from None


def partial(out: Path) -> Path:
    """Where an unfinished run keeps its state and its packed levels."""
    return out.with_name(out.name + ".partial")


def run(
    name: str,
    model: str,
    goal: tuple[str, dict[str, Any]],
    calib: Path,
    held_out: Path | None,
    out: Path,
    save: Path | None,
    limit: int | None,
    max_length: int,
    options: dict[str, Any],
    console: Any,
) -> SearchResult:
    """What the command does, with its errors as exceptions."""
    kind, wanted = goal
    function = find_search(name, kind)
    config_cls = catalog.load(wanted.pop("quantizer"), "quantizers") if kind == "bits" else None
    if out.suffix != ".json" or out.exists():
        raise ValueError(f"out is {str(out)!r}; give the name of a .json file that does not exist yet")
    if save is not None and save.exists():
        raise ValueError(f"save is {str(save)!r}, which exists; give another name or remove it")
    folder, began = find_model(model), time.monotonic()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfgen.kit.calibration import read_rows
    from hfgen.kit.streaming import quiet_host

    tokenizer = tokenizer_of(folder, AutoTokenizer)
    options["held_out"] = None if held_out is None else read_rows(held_out, tokenizer, None, max_length)
    rows = read_rows(calib, tokenizer, limit, max_length)
    with quiet_host():
        loaded = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", local_files_only=True).eval()
    work, positional = partial(out), [rows]
    with progress_bar(console) as bar:
        if config_cls is not None:
            positional = [
                open_levels(work, loaded, config_cls(**wanted.pop("fields")), wanted.pop("levels"), bar),
                rows,
            ]
        task = bar.add_task(name, total=None)

        def show(run: Any, generations: int) -> None:
            best = run.history[-1]["fitness"]
            bar.update(task, completed=run.generation, total=generations, description=f"{name}, best {best:.4g}")

        found = function(loaded, *positional, **wanted, **options, folder=work, progress=show)
    if save is not None:
        found.export(loaded).save_pretrained(save)
        if tokenizer is not None:
            tokenizer.save_pretrained(save)
    write(out, found)
    shutil.rmtree(work)
    print_report(found, kind, model, out, save, time.monotonic() - began, console)
    return found


def find_search(name: str, kind: str) -> Any:
    """The function of that search: the card's target for bits, else its export NAME_depth or NAME_sparsity."""
    plugin = catalog.find(name, "searches")
    target = catalog.load(name, "searches")
    if kind == "bits":
        return target
    assert plugin.card is not None
    if f"{name}_{kind}" not in plugin.card.exports:
        raise ValueError(f"search {name!r} exports no {name}_{kind}, so it does not search {kind}; give --average-bits")
    return getattr(importlib.import_module(plugin.value.partition(":")[0]), f"{name}_{kind}")


def tokenizer_of(folder: Path, auto: Any) -> Any:
    """The model's tokenizer; None where the folder has none (rows of input_ids need none)."""
    try:
        return auto.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None


def open_levels(work: Path, model: Any, config: Any, widths: list[int], bar: Any) -> Any:
    from hfgen.kit.levels import Levels

    task = bar.add_task("packing", total=None)
    return Levels.open(
        work / "levels", model, config, widths, lambda done, total: bar.update(task, completed=done, total=total)
    )


def progress_bar(console: Any) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)


def write(out: Path, found: SearchResult) -> None:
    """The plan, and beside it the report."""
    out.parent.mkdir(parents=True, exist_ok=True)
    report_of(out).write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")
    new = out.with_name(out.name + ".new")
    new.write_text(json.dumps(found.plan, indent=1), encoding="utf-8")
    os.replace(new, out)


def report_of(out: Path) -> Path:
    return out.with_suffix(".report.json")


def print_report(
    found: SearchResult, kind: str, model: str, out: Path, save: Path | None, seconds: float, console: Any
) -> None:
    """The table at the end, and what to do next."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    start = "uniform" if found.uniform else "start"
    where = "held-out rows" if found.measured_on == "held_out" else "the rows that the search saw"
    accepted = sum(row["accepted"] for row in found.history)
    rows = [
        (found.unit, f"{found.fitness['start']:.5g} {start}, {found.fitness['found']:.5g} found, on {where}"),
        ("generations", f"{len(found.history)}, {accepted} of them with a better plan"),
        ("tokens forwarded", f"{found.tokens:,}"),
        ("units changed", f"{found.swapped:,}"),
        ("seconds", f"{seconds:.1f}"),
        ("plan", str(out)),
        ("report", str(report_of(out))),
    ]
    rows += [("model", str(save))] if save is not None else []
    rows += [("note", note) for note in found.notes]
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    if kind == "bits" and save is None:
        words = f"hfgen quantize {shlex.quote(model)} --method METHOD --out DIR --bits-map {shlex.quote(str(out))}"
        console.print("\nnext:", words, soft_wrap=True, highlight=False, markup=False)
