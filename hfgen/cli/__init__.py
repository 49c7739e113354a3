"""The `hfgen` command: one file per command. Nothing here imports torch or a host before a command needs it."""

from __future__ import annotations

import importlib
import sys

import typer

from hfgen.catalog import CatalogError

_COMMANDS = (
    "ls", "show", "env", "quickstart", "evidence", "quantize", "search", "export", "bon", "check", "new", "recipe",
    "report",
)  # fmt: skip

app = typer.Typer(
    name="hfgen",
    help="Research methods for better-generalising fine-tuning, as plugins Hugging Face models pick up.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Console entry point: an error a user can mend is one line on stderr and exit code 2."""
    for name in _COMMANDS:  # module hfgen.cli.<name> holds <name>: a function, or a Typer with commands of its own
        command = getattr(importlib.import_module(f"hfgen.cli.{name}"), name)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    try:
        app()
    except (CatalogError, OSError) as exc:
        print(f"hfgen: {exc}", file=sys.stderr)
        raise SystemExit(2) from None
