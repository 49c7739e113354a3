"""`hfgen env`: a block to paste into an issue."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from typing import Annotated

import typer

from hfgen import __version__, catalog

_SWITCHES = ("HFGEN_AUTOLOAD", "HFGEN_PLUGINS", "HFGEN_BLOCK", "TORCH_DEVICE_BACKEND_AUTOLOAD", "HF_HUB_OFFLINE")
_OPTIONAL = ("bitsandbytes", "diffusers", "deepspeed", "vllm")
# The versions the whole test run passes with (constraints.txt); the ranges of pyproject.toml are wider.
_TESTED = {
    "torch": "2.13",
    "transformers": "5.23",
    "peft": "0.21",
    "trl": "1.16",
    "accelerate": "1.15",
    "datasets": "5.2",
}


def env(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Print versions, whether they are supported, and every plugin with its health."""
    report = {
        "hfgen": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "hosts": _hosts(),
        "switches": {k: os.environ[k] for k in _SWITCHES if k in os.environ},
        "switches_naming_nothing": catalog.unmatched_switches(),
        "pickup": "on" if _hook_installed() else "off",
        "plugins": [_health(p) for p in catalog.plugins()],
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for key in ("hfgen", "python", "platform", "pickup", "switches", "switches_naming_nothing"):
        print(f"{key}: {report[key]}")
    for host in _hosts():
        print(f"{host['name']}: {host['version']} ({host['verdict']}; wants {host['wants']})")
    for p in catalog.plugins():
        h = _health(p)
        print(f"{h['kind']} {h['name']}: {h['health']} ({h['distribution']} {h['version']}, {h['file']})")


def _hook_installed() -> bool:
    return any(getattr(f, "__module__", "") == "_hfgen_autoload" for f in sys.meta_path)


def _hosts() -> list[dict[str, str]]:
    """Each host with its version, our range, and supported / untested / broken."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    rows = []
    requirements = [Requirement(r) for r in importlib.metadata.requires("hfgen") or []]
    wants = {r.name: r.specifier for r in requirements if r.marker is None and r.name in _TESTED}
    for name in (*_TESTED, *_OPTIONAL):
        specifier = str(wants.get(name, "any"))
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in wants:
                rows.append(
                    {"name": name, "version": "missing", "wants": specifier, "verdict": "broken: not installed"}
                )
            continue
        if name in wants and not wants[name].contains(Version(version).public, prereleases=True):
            verdict = "broken: outside the supported range"
        elif name in _TESTED and not version.startswith(_TESTED[name] + "."):
            verdict = f"untested: the test run uses {_TESTED[name]}"
        else:
            verdict = "supported"
        rows.append({"name": name, "version": version, "wants": specifier, "verdict": verdict})
    return rows


def _health(plugin: catalog.Plugin) -> dict[str, object]:
    """Health without importing the method: its card reads, and the module its target names is there."""
    health = plugin.status if plugin.status == "ok" else f"{plugin.status}: {plugin.reason}"
    if plugin.status == "ok" and plugin.card is not None:
        module = plugin.card.target.partition(":")[0]
        try:
            if importlib.util.find_spec(module) is None:
                health = f"broken: no module {module}"
        except ImportError as exc:
            health = f"broken: {exc}"
    return {
        "name": plugin.name,
        "kind": plugin.kind,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "file": plugin.file,
        "health": health,
    }
