"""`hfgen recipe`: the training scripts that come with hfgen, listed, and copied to where you change them."""

from __future__ import annotations

import ast
import difflib
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

import hfgen
from hfgen.catalog import CatalogError

ACCELERATE = "accelerate"  # the folder of launch configs, listed and copied under this name

recipe = typer.Typer(
    no_args_is_help=True, help="Training scripts for `accelerate launch`: list them, copy one to change."
)


@recipe.command("ls")
def ls() -> None:
    """List the recipes: name, what it does, its files."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("recipe", "what it does", "files"):
        table.add_column(column, overflow="fold")
    for name, files in recipes().items():
        table.add_row(*map(Text, (name, summary(name, files), ", ".join(map(str, files)))))
    Console().print(table)


@recipe.command("cp")
def cp(
    name: Annotated[str, typer.Argument(help="A recipe, as `hfgen recipe ls` prints it.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to copy to; made if it is not there.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
) -> None:
    """Copy a recipe's script and YAML to DIR, and print the command that runs it."""
    for file in copy(name, out, force):
        print(f"wrote {file}")
    print(f"\n  {command(name, out)}")


def source() -> Path:
    """The folder of the recipes: inside the package in a wheel, beside it in a clone.

    Raises:
        CatalogError: neither is there.
    """
    package = Path(hfgen.__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / ACCELERATE).is_dir():
            return folder
    raise CatalogError(f"the recipes are neither in {package} nor beside it; reinstall hfgen")


def recipes() -> dict[str, list[Path]]:
    """Files of each recipe relative to `source()`: script and YAML of one name; the launch configs last."""
    folder = source()
    found = {path.stem: [path.relative_to(folder)] for path in sorted(folder.glob("*.py"))}
    for name, files in found.items():
        if (folder / f"{name}.yaml").is_file():
            files.append(Path(f"{name}.yaml"))
    return found | {ACCELERATE: [path.relative_to(folder) for path in sorted((folder / ACCELERATE).glob("*.yaml"))]}


def summary(name: str, files: list[Path]) -> str:
    """First line of the script's docstring, which is read, not run."""
    if name == ACCELERATE:
        return "Configs of `accelerate launch --config_file` for any recipe, on one machine with several GPUs."
    return (ast.get_docstring(ast.parse((source() / files[0]).read_text(encoding="utf-8"))) or "").partition("\n")[0]


def copy(name: str, out: Path, force: bool = False) -> list[Path]:
    """What `cp` does: the files it wrote.

    Raises:
        CatalogError: an unknown name, or a file that exists (nothing is written then) without `force`.
    """
    known = recipes()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        raise CatalogError(f"there is no recipe {name!r}; {hint}")
    for file in known[name]:
        if (out / file).exists() and not force:
            raise CatalogError(f"{out / file} exists; choose another DIR, or overwrite with --force")
    for file in known[name]:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source() / file, out / file)
    return [out / file for file in known[name]]


def command(name: str, out: Path) -> str:
    """The line that runs what was copied, for a POSIX shell."""
    if name == ACCELERATE:
        return f"accelerate launch --config_file {shlex.quote(str(out / ACCELERATE / 'ddp.yaml'))} SCRIPT --config YAML"
    script, config = (shlex.quote(str(out / f"{name}{suffix}")) for suffix in (".py", ".yaml"))
    return f"accelerate launch {script} --config {config}"
