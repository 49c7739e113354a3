"""`hfgen new`: a distribution of one's own with one small method that works and passes its checks as generated."""

from __future__ import annotations

import difflib
import importlib.util
import keyword
import sys
import time
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from hfgen import __version__, catalog

TEMPLATES = Path(__file__).parents[1] / "templates"
SHARED = "shared"  # files that every kind gets
RESERVED = {"tests", "test", "src", "setup", "conftest"}


def new(
    kind: Annotated[str, typer.Argument(help="adapter, callback, quantizer or trainer.")],
    name: Annotated[str, typer.Argument(help="The method's name: a lower-case identifier nobody uses.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist, or be empty.")],
) -> None:
    """Write a distribution that adds one method: it installs, stands in `hfgen ls`, and passes `hfgen check`."""
    files = create(kind, name, out)
    print(f"wrote {len(files)} files to {out}; next:\n")
    print(f"  pip install -e {out}\n  hfgen show {name}\n  hfgen check {name}")


def create(kind: str, name: str, out: Path) -> list[Path]:
    """What the command does: the files it wrote.

    Raises:
        CatalogError: the kind has no template, the name cannot be used, or the folder is not empty.
    """
    check_kind(kind)
    check_name(kind, name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise catalog.CatalogError(f"--out is {out}, which exists and is not an empty folder; nothing is overwritten")
    values = {
        "name": name,
        "Name": "".join(part.capitalize() for part in name.split("_")),
        "kind": kind,
        "hfgen": ".".join(__version__.split(".")[:2]),
        "year": str(time.localtime().tm_year),
    }
    texts = {
        target(path.relative_to(TEMPLATES / folder), name): Template(path.read_text(encoding="utf-8")).substitute(
            values
        )
        for folder in (SHARED, kind)
        for path in sorted((TEMPLATES / folder).rglob("*.tmpl"))
    }
    for relative, text in texts.items():
        file = out / relative
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return [out / relative for relative in texts]


def target(template: Path, name: str) -> Path:
    """Where a template goes, without its suffix: `NAME` in its path is the method's name, `dot-` at the start a dot."""
    parts = [part.replace("NAME", name) for part in template.with_suffix("").parts]
    return Path(*(f".{part.removeprefix('dot-')}" if part.startswith("dot-") else part for part in parts))


def kinds() -> list[str]:
    """Kinds that have a template."""
    return sorted(path.name for path in TEMPLATES.iterdir() if path.is_dir() and path.name != SHARED)


def check_kind(kind: str) -> None:
    """Raise CatalogError unless there is a template for `kind`."""
    if kind not in kinds():
        close = difflib.get_close_matches(kind, kinds(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"give one of {', '.join(kinds())}"
        raise catalog.CatalogError(f"kind is {kind!r}, which has no template; {hint}")


def check_name(kind: str, name: str) -> None:
    """Raise CatalogError unless a new method, and the module that holds it, can be called `name`."""

    def refuse(why: str, fix: str = "choose another name") -> None:
        raise catalog.CatalogError(f"name is {name!r}, {why}; {fix}")

    if not (name.isascii() and name.isidentifier() and name == name.lower()) or name.endswith("_"):
        refuse(
            "which is no name of a method", "give a lower-case identifier that does not end in '_', such as 'rowscale'"
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        refuse("which is a keyword of Python")
    if name in RESERVED:
        refuse("which tools take for something else")
    for plugin in catalog.plugins():
        if plugin.name == name:
            refuse(f"which {plugin.distribution} {plugin.version} offers already ({plugin.kind})")
    if name in sys.stdlib_module_names:
        refuse("which is a module of Python's standard library")
    if importlib.util.find_spec(name) is not None:
        refuse("which is a module that is installed here")
    if kind == "adapter":
        _check_adapter(name, refuse)
    elif kind == "quantizer":
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

        if name in AUTO_QUANTIZATION_CONFIG_MAPPING:
            refuse("which transformers has a quantizer for")


def _check_adapter(name: str, refuse: object) -> None:
    from peft.utils.peft_types import PeftType

    assert callable(refuse)
    if "_" in name:  # peft finds an adapter's tensors by the prefix `<name>_`, which 'a_' in 'a_b_' would confuse
        refuse("and peft tells adapters apart by what stands before the first '_'", f"try {name.replace('_', '')!r}")
    if name.upper() in PeftType.__members__:
        refuse("which peft has an adapter for")
