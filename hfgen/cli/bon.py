"""`hfgen bon`: what best-of-n does to proxy and gold as n grows, from a file of scored samples."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfgen import catalog

if TYPE_CHECKING:
    import pyarrow as pa

    from hfgen.decoding import BestOfNCurves

FORMATS = (".jsonl", ".json", ".parquet", ".csv")


def bon(
    file: Annotated[Path, typer.Argument(help="Scored samples, one per row: JSON lines, parquet or CSV.")],
    n: Annotated[str | None, typer.Option("--n", help="Numbers of samples: 1,4,16. Powers of two if left out.")] = None,
    prompt_id: Annotated[str, typer.Option(help="Column that says which prompt a sample belongs to.")] = "prompt_id",
    proxy: Annotated[str, typer.Option(help="Column of the score that chooses.")] = "proxy",
    gold: Annotated[str | None, typer.Option(help="Column of the gold score; gold, if there, when left out.")] = None,
    members: Annotated[
        str | None,
        typer.Option(
            help="Scores of an ensemble's members: a column of lists, or the name before numbers (members_0, members_1). "
            "members, if there, when left out."
        ),
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Column whose values the intervals are over, e.g. seed; prompts if left out.")
    ] = None,
    penalty: Annotated[float, typer.Option(help="Weight of the members' variance in the stand-in for gold.")] = 0.5,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples of the 95 % intervals.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the curves here as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the figure here (.png, .svg, .pdf).")] = None,
) -> None:
    """Estimate proxy and gold of the best of n for every n, without bias, and say where to stop."""
    from rich.console import Console

    try:
        if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot is {plot}; give a file that ends in .png, .svg or .pdf")
        package = importlib.import_module(
            catalog.find("best_of_n", "decoding").value.partition(":")[0]
        )  # without torch
        columns = read(file, prompt_id, proxy, gold, members, group)
        found = package.best_of_n_curves(**columns, n=parse_n(n), penalty=penalty, resamples=resamples, seed=seed)
    except (ValueError, TypeError) as exc:
        print(f"hfgen: {exc}", file=sys.stderr)
        raise SystemExit(2) from None
    print_curves(found, Console())
    if json_out is not None:
        json_out.write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")
        print(f"written: {json_out}")
    if plot is not None:
        package.plot_best_of_n(found, plot)
        print(f"written: {plot}")


def parse_n(text: str | None) -> list[int] | None:
    """`"1,4,16"` as numbers; None stays None."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--n is {text!r}; give whole numbers with commas between them, such as 1,4,16") from None


def read(
    file: Path, prompt_id: str, proxy: str, gold: str | None, members: str | None, group: str | None
) -> dict[str, Any]:
    """The arguments proxy, gold, members and groups of `best_of_n_curves` from the columns of a file.

    Raises:
        ValueError: another kind of file, a column that is missing, is no number or has an empty cell, one sample per
            prompt, members of different number, or a prompt in two groups.
    """
    import numpy as np

    table = _table(file)
    names = table.column_names
    _want(names, prompt_id, "--prompt-id", file)
    if table[prompt_id].null_count:
        raise ValueError(f"column {prompt_id!r} of {file} has an empty cell; every sample belongs to a prompt")
    ids = np.asarray(table[prompt_id].combine_chunks().dictionary_encode().indices)
    order, sizes = np.argsort(ids, kind="stable"), np.bincount(ids)
    if not sizes.size or sizes.min() < 2:
        at = table[prompt_id][int(order[sizes[: sizes.argmin()].sum()])].as_py() if sizes.size else None
        raise ValueError(
            f"{file} has one sample for {prompt_id} {at!r}; best-of-n needs two or more of every prompt"
            if sizes.size
            else f"{file} has no samples"
        )
    ends = np.cumsum(sizes)[:-1]

    def split(values: Any) -> list[Any]:
        return np.split(values[order], ends)

    found: dict[str, Any] = {"proxy": split(_numbers(table, proxy, "--proxy", file))}
    if gold is not None or "gold" in names:
        found["gold"] = split(_numbers(table, gold or "gold", "--gold", file))
    scores = _members(table, members or "members", members is not None, file)
    if scores is not None:
        found["members"] = split(scores)
    if group is not None:
        _want(names, group, "--group", file)
        labels = split(np.asarray(table[group].combine_chunks().dictionary_encode().indices.fill_null(-1)))
        mixed = next((i for i, label in enumerate(labels) if (label != label[0]).any()), None)
        if mixed is not None:
            raise ValueError(f"a prompt of {file} has samples of several {group}; give it one {prompt_id} in each")
        found["groups"] = [int(label[0]) for label in labels]
    return found


def _table(file: Path) -> pa.Table:
    import pyarrow as pa

    if file.suffix not in FORMATS:
        raise ValueError(f"FILE is {file}; give one that ends in {', '.join(FORMATS)}")
    if not file.is_file():
        raise ValueError(f"FILE is {file}, which is not there")
    try:
        if file.suffix == ".parquet":
            return importlib.import_module("pyarrow.parquet").read_table(file)
        if file.suffix == ".csv":
            return importlib.import_module("pyarrow.csv").read_csv(file)
        return importlib.import_module("pyarrow.json").read_json(file)
    except pa.ArrowInvalid as exc:
        raise ValueError(f"{file} cannot be read: {str(exc).splitlines()[0]}") from None


def _want(names: Sequence[str], name: str, option: str, file: Path) -> None:
    if name not in names:
        raise ValueError(f"{file} has no column {name!r}; it has {', '.join(names)}: name one with {option}")


def _numbers(table: pa.Table, name: str, option: str, file: Path) -> Any:
    """(rows,) float64 of a column."""
    import pyarrow as pa

    _want(table.column_names, name, option, file)
    column = table[name]
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        raise ValueError(f"column {name!r} of {file} is {column.type}, not numbers; choose another with {option}")
    _no_gap(column, name, file)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return _finite(column.to_numpy().astype("float64"), name, file)


def _members(table: pa.Table, name: str, asked: bool, file: Path) -> Any:
    """(rows, members) float64 of a column of lists, or of numbered columns; None when there is neither."""
    import numpy as np
    import pyarrow as pa

    numbered = sorted(
        (c for c in table.column_names if re.fullmatch(rf"{re.escape(name)}_\d+", c)),
        key=lambda c: int(c.rpartition("_")[2]),
    )
    if name not in table.column_names:
        if numbered:
            return np.stack([_numbers(table, c, "--members", file) for c in numbered], axis=1)
        if asked:
            _want(table.column_names, name, "--members", file)
        return None
    column = table[name].combine_chunks()
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise ValueError(
            f"column {name!r} of {file} is {column.type}, not lists of member scores; choose with --members"
        )
    _no_gap(column, name, file)
    lengths = np.unique(column.value_lengths())
    if len(lengths) != 1:
        raise ValueError(
            f"column {name!r} of {file} has lists of {lengths.min()} to {lengths.max()} scores; give equal"
        )
    values = column.flatten()
    _no_gap(values, name, file)
    return _finite(values.to_numpy().astype("float64").reshape(-1, int(lengths[0])), name, file)


def _no_gap(column: Any, name: str, file: Path) -> None:
    if column.null_count:
        raise ValueError(f"column {name!r} of {file} has {column.null_count} empty cells; leave such samples out")


def _finite(values: Any, name: str, file: Path) -> Any:
    import numpy as np

    rows = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
    if rows.size:
        raise ValueError(
            f"column {name!r} of {file} has NaN or an infinity in {rows.size} samples, first in sample {rows[0] + 1}; "
            "leave such samples out"
        )
    return values


def print_curves(found: BestOfNCurves, console: Any) -> None:
    """The table, and the advice below it."""
    from rich.table import Table

    low, high = found.samples
    samples = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    over = "prompts" if found.units == found.prompts else f"{found.units} groups"
    console.print(f"{found.prompts:,} prompts, {samples} samples each; below a mean its 95 % interval over {over}\n")
    table = Table(box=None, pad_edge=False)
    for name in ("n", "KL <= (nats)", *found.curves):
        table.add_column(name.replace("_", "-"), justify="right")
    for i, count in enumerate(found.n):
        cells = (f"{c.mean[i]:.3g}\n[dim]{c.low[i]:.3g} to {c.high[i]:.3g}[/dim]" for c in found.curves.values())
        table.add_row(f"{count:,}", f"{found.kl[i]:.2f}", *cells)
    console.print(table)
    console.print()
    if found.advice is None:
        console.print("No gold and no member scores: whether the proxy is over-optimised cannot be seen from it alone.")
    else:
        console.print(found.advice.text, highlight=False)
