"""The arrows of the house: recipes -> shelves -> catalogue -> (entry point) plugins -> kit -> hosts; and one line per method."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOSTS = {"torch", "transformers", "peft", "trl", "accelerate", "datasets", "diffusers", "bitsandbytes", "safetensors"}
CORE = sorted((ROOT / "hfgen").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins" / "hfgen_plugins").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def imports(path, top_level_only=False):
    """Absolute names of the modules a file imports."""
    package = path.relative_to(ROOT / "plugins" if path in PLUGINS else ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = (base + (node.module or "")).strip(".")
            yield module
            yield from (f"{module}.{a.name}" for a in node.names)


def test_there_is_something_to_check():
    assert len(CORE) > 15 and len(PLUGINS) > 8 and RECIPES


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_imports_no_plugin(path):
    assert not [name for name in imports(path) if name.split(".")[0] == "hfgen_plugins"]


def test_the_core_names_no_method():
    """No first-party method's name stands in the core as a string (but for the one the quickstart is about)."""
    methods = {
        n
        for group, table in PROJECT["entry-points"].items()
        if group in ("hfgen.adapters", "hfgen.trainers", "hfgen.quantizers", "hfgen.callbacks")
        for n in table
    }
    for path in CORE:
        strings = {
            n.value
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        named = strings & methods
        assert named <= ({"s3ft"} if path.name == "quickstart.py" else set()), (path, named)


def test_kit_and_hosts_know_no_command_and_no_evidence():
    for path in CORE:
        if path.parent.name in ("kit", "hosts"):
            assert not [
                n
                for n in imports(path)
                if n.startswith(("hfgen.cli", "hfgen.evidence", "hfgen.testing", "hfgen.sandbox"))
            ], path


def test_a_family_imports_no_other_family_and_no_shelf():
    shelves = {f"hfgen.{p.stem}" for p in (ROOT / "hfgen").glob("*.pyi")}
    for path in PLUGINS:
        family, method = path.relative_to(ROOT / "plugins" / "hfgen_plugins").parts[:2]
        for name in imports(path):
            assert name not in shelves and not name.startswith("hfgen.cli"), (path, name)
            if name.startswith("hfgen_plugins."):
                assert name.split(".")[1:3] == [family, method] or len(name.split(".")) < 3, (path, name)


def test_recipes_use_shelves():
    for path in RECIPES:
        kit = () if path.parent.name == "bench" else ("hfgen.kit",)  # a bench measures the kit, too
        assert not [n for n in imports(path) if n.startswith(("hfgen_plugins", "hfgen.hosts", *kit))], path


def test_cards_shelves_and_core_entry_import_no_host():
    light = [p for p in PLUGINS if p.name == "__init__.py"] + [
        ROOT / "hfgen" / n for n in ("__init__.py", "card.py", "catalog.py")
    ]
    light += [p.with_suffix(".py") for p in (ROOT / "hfgen").glob("*.pyi")] + list(
        (ROOT / "hfgen" / "cli").glob("*.py")
    )
    for path in light:
        assert not [n for n in imports(path, top_level_only=True) if n.split(".")[0] in HOSTS], path


def test_every_folder_has_its_line_stub_and_card():
    entry_points = {
        value: (group, name)
        for group, table in PROJECT["entry-points"].items()
        if group.startswith("hfgen.")
        for name, value in table.items()
    }
    folders = {p.parent for p in PLUGINS if p.name == "__init__.py"}
    for folder in folders:
        family, method = folder.relative_to(ROOT / "plugins" / "hfgen_plugins").parts
        value = f"hfgen_plugins.{family}.{method}:CARD"
        assert value in entry_points and entry_points[value][0] == f"hfgen.{family}", folder
        exports = re.findall(r"exports=\(([^)]*)\)", (folder / "__init__.py").read_text())[0]
        stub = (ROOT / "hfgen" / f"{family}.pyi").read_text()
        for name in re.findall(r'"(\w+)"', exports):
            assert f"{name} as {name}" in stub, f"hfgen/{family}.pyi lacks {name}"
    assert len(folders) == len(entry_points)


def test_no_family_is_empty():
    families = {
        p.name for p in (ROOT / "plugins" / "hfgen_plugins").iterdir() if p.is_dir() and p.name != "__pycache__"
    }
    assert (
        families
        == {p.stem for p in (ROOT / "hfgen").glob("*.pyi")}
        == {g.removeprefix("hfgen.") for g in PROJECT["entry-points"] if g.startswith("hfgen.")}
    )


@pytest.mark.parametrize(
    ("method", "most"),
    [("svfit", 150), ("loldu", 150), ("soma", 200), ("sara", 200), ("increlora", 200), ("intrinsic", 200)],
)
def test_an_adapter_is_few_lines_of_code(method, most):
    total = 0
    for path in (ROOT / "plugins" / "hfgen_plugins" / "adapters" / method).glob("*.py"):
        if path.name != "evidence.py":
            tree = ast.parse(path.read_text())
            prose = set()
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.Expr)
                    and isinstance(node.value, ast.Constant)
                    and isinstance(node.value.value, str)
                ):
                    prose |= set(range(node.lineno, node.end_lineno + 1))
            lines = path.read_text().splitlines()
            total += sum(
                1
                for i, line in enumerate(lines, 1)
                if line.strip() and not line.strip().startswith("#") and i not in prose
            )
    assert total <= most, total
