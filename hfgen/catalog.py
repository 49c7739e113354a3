"""The catalogue: finds cards by entry point, loads late, quarantines what is broken, says did-you-mean.

Entry points of group `hfgen.<kind>` name a `MethodCard`. Listing reads cards only; a method's own code is imported when
its name is asked for, and registered with its host at that moment. A string from a checkpoint or a command line is only
ever compared with installed entry-point names, never imported as a module path.

Switches (environment): `HFGEN_PLUGINS=a,dist:b` restricts to the named methods (`*` keeps all, and a `dist:name` entry
chooses between two distributions that offer one name), `HFGEN_BLOCK=c,dist:d` blocks.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from hfgen.card import KINDS, MethodCard

logger = logging.getLogger("hfgen")

# How a loaded target gets into its host's slot. Kinds that are used directly (trainers, judges) need none.
_REGISTRARS = {"adapters": "hfgen.hosts.peft:register", "quantizers": "hfgen.hosts.transformers:register"}


class CatalogError(ValueError):
    """A method cannot be given: unknown, blocked, quarantined, in collision, or its code does not load."""


class _StillImporting(Exception):
    """The plugin's module is being imported by this very thread, so its target does not exist yet."""


@dataclass(frozen=True)
class Plugin:
    """One installed entry point and its health.

    Args:
        name: Entry-point name, equal to the card's.
        kind: Entry-point group without `hfgen.`.
        value: `"module:attribute"` of the card.
        distribution: Name of the distribution that installed it.
        version: Its version.
        status: `"ok"`, `"blocked"` or `"broken"`.
        reason: Why it is not `"ok"`; empty otherwise.
        card: The card when it could be read.
        file: File of the module that holds the card, None when it cannot be found.
    """

    name: str
    kind: str
    value: str
    distribution: str
    version: str
    status: str = "ok"
    reason: str = ""
    card: MethodCard | None = None
    file: str | None = None

    @property
    def provenance(self) -> str:
        return f"{self.distribution} {self.version}, {self.file or self.value}"


_entries: dict[tuple[str, str], list[EntryPoint]] | None = None
_plugins: dict[tuple[str, str], Plugin] = {}
_targets: dict[tuple[str, str], Any] = {}
_in_progress = threading.local()


def refresh() -> None:
    """Forget what was found, so that a package installed in this process or a changed switch is seen."""
    global _entries
    _entries = None
    _plugins.clear()
    _targets.clear()


def _scan() -> dict[tuple[str, str], list[EntryPoint]]:
    """Entry points by (kind, name); a second distribution with one name makes a list longer than one."""
    global _entries
    if _entries is None:
        found: dict[tuple[str, str], list[EntryPoint]] = {}
        every = entry_points()
        for kind in KINDS:
            for ep in every.select(group=f"hfgen.{kind}"):
                found.setdefault((kind, ep.name), []).append(ep)
        _entries = found
    return _entries


def _distribution(ep: EntryPoint) -> tuple[str, str]:
    return (ep.dist.name, ep.dist.version) if ep.dist is not None else ("unknown", "?")


def distribution(kind: str, name: str) -> tuple[str, str] | None:
    """Name and version of the distribution that offers a method, without importing anything of it; None if none does."""
    candidates = _scan().get((kind, name))
    return _distribution(candidates[0]) if candidates else None


def _same_distribution(a: str, b: str) -> bool:
    return re.sub(r"[-_.]+", "-", a).lower() == re.sub(r"[-_.]+", "-", b).lower()


def _switch(variable: str) -> list[tuple[str | None, str]]:
    """`HFGEN_PLUGINS` or `HFGEN_BLOCK` as (distribution or None, name) pairs."""
    pairs: list[tuple[str | None, str]] = []
    for item in os.environ.get(variable, "").split(","):
        dist, colon, name = item.strip().rpartition(":")
        if name:
            pairs.append((dist if colon else None, name))
    return pairs


def unmatched_switches() -> list[str]:
    """Items of `HFGEN_PLUGINS` and `HFGEN_BLOCK` that name nothing installed (`hfgen env` shows them)."""
    every = [ep for candidates in _scan().values() for ep in candidates]
    return [
        f"{variable}={f'{dist}:' if dist else ''}{name}"
        for variable in ("HFGEN_PLUGINS", "HFGEN_BLOCK")
        for dist, name in _switch(variable)
        if not any(_listed(ep, [(dist, name)]) for ep in every)
    ]


def _listed(ep: EntryPoint, pairs: list[tuple[str | None, str]]) -> bool:
    dist = _distribution(ep)[0]
    return any(name in ("*", ep.name) and (d is None or _same_distribution(d, dist)) for d, name in pairs)


def _choose(key: tuple[str, str], candidates: list[EntryPoint]) -> Plugin:
    """Apply the switches and the collision rule to the entry points of one name."""
    kind, name = key
    allow, block = _switch("HFGEN_PLUGINS"), _switch("HFGEN_BLOCK")
    chosen = [ep for ep in candidates if any(n == name and d and _listed(ep, [(d, n)]) for d, n in allow)]
    kept = [ep for ep in chosen or candidates if not _listed(ep, block)]
    ep = (kept or candidates)[0]
    dist, version = _distribution(ep)
    plugin = Plugin(name, kind, ep.value, dist, version)
    if not kept:
        return replace(plugin, status="blocked", reason="HFGEN_BLOCK names it")
    if allow and not _listed(ep, allow):
        return replace(plugin, status="blocked", reason=f"HFGEN_PLUGINS={os.environ['HFGEN_PLUGINS']} does not name it")
    if len(kept) > 1:
        dists = " and ".join("{} {}".format(*_distribution(e)) for e in kept)
        fix = ", or ".join(f"HFGEN_PLUGINS='*,{_distribution(e)[0]}:{name}'" for e in kept)
        reason = f"{dists} both offer the name; choose with {fix}, or uninstall one"
        return replace(plugin, status="broken", reason=reason)
    return _read_card(plugin, ep)


def _read_card(plugin: Plugin, ep: EntryPoint) -> Plugin:
    """Import the card's module (not the method's) and check that it says what the entry point says."""
    file = None
    try:
        spec = importlib.util.find_spec(ep.module)
        file = spec.origin if spec else None
        card = ep.load()
        if not isinstance(card, MethodCard):
            raise TypeError(f"{ep.value} is {type(card).__name__}, not a MethodCard")
        for field in ("name", "kind"):
            if getattr(card, field) != getattr(plugin, field):
                said, listed = getattr(card, field), getattr(plugin, field)
                raise ValueError(f"its card says {field} {said!r}, its entry point {listed!r}")
    except (Exception, SystemExit) as exc:  # whatever a plugin raises must not reach what another method does
        return replace(plugin, status="broken", reason=f"{type(exc).__name__}: {exc}", file=file)
    return replace(plugin, card=card, file=file)


def _plugin(key: tuple[str, str]) -> Plugin:
    if key not in _plugins:
        _plugins[key] = _choose(key, _scan()[key])
    return _plugins[key]


def plugins(kind: str | None = None) -> list[Plugin]:
    """Every installed method with its provenance and health, sorted by kind and name.

    Raises:
        CatalogError: `kind` is not one of `hfgen.card.KINDS`.
    """
    _check_kind(kind)
    return [_plugin(key) for key in sorted(_scan()) if kind in (None, key[0])]


def list_cards(kind: str | None = None) -> list[MethodCard]:
    """Cards of all healthy, unblocked methods, sorted by kind and name.

    Raises:
        CatalogError: `kind` is not one of `hfgen.card.KINDS`.
    """
    return [p.card for p in plugins(kind) if p.card is not None]


def get_card(name: str, kind: str | None = None) -> MethodCard:
    """The card of one method.

    Raises:
        TypeError: `name` is not a string.
        CatalogError: unknown (with did-you-mean), blocked or quarantined (with the reason), or `kind` is needed.
    """
    card = find(name, kind).card
    assert card is not None  # find() raises for anything unhealthy
    return card


def load(name: str, kind: str | None = None) -> Any:
    """Import a method's target, register it with its host, and return it. Loading twice is free.

    Raises:
        TypeError: `name` is not a string.
        CatalogError: as `get_card`, or the method's own code does not import (the cause is chained).
    """
    try:
        return _load(find(name, kind))
    except _StillImporting:
        raise CatalogError(
            f"{name!r} was asked for while its own module is being imported; ask after that import"
        ) from None


def find(name: str, kind: str | None = None) -> Plugin:
    """The healthy plugin of that name; raises like `get_card`."""
    if not isinstance(name, str):
        raise TypeError(f"a method's name is a string, not {name!r}; see `hfgen ls`")
    _check_kind(kind)
    keys = [key for key in _scan() if key[1] == name and kind in (None, key[0])]
    if not keys:
        names = sorted({key[1] for key in _scan() if kind in (None, key[0])})
        close = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"installed are: {', '.join(names) or 'none'}."
        raise CatalogError(f"no installed method is called {name!r}{f' among {kind}' if kind else ''}; {hint}")
    if len(keys) > 1:
        kinds = ", ".join(sorted(key[0] for key in keys))
        raise CatalogError(f"{name!r} exists as several kinds ({kinds}); name one with kind=")
    plugin = _plugin(keys[0])
    if plugin.status != "ok":
        verb = "is blocked" if plugin.status == "blocked" else "is quarantined"
        raise CatalogError(f"{plugin.kind} {name!r} ({plugin.provenance}) {verb}: {plugin.reason}")
    return plugin


def _check_kind(kind: str | None) -> None:
    if kind is not None and kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        raise CatalogError(
            f"kind is {kind!r}; {f'did you mean {close[0]!r}?' if close else 'one of ' + ', '.join(KINDS)}"
        )


def _load(plugin: Plugin) -> Any:
    key = (plugin.kind, plugin.name)
    if key in _targets:
        return _targets[key]
    assert plugin.card is not None
    try:
        with busy(*key):
            target = _import_target(plugin.card.target)
            registrar = _REGISTRARS.get(plugin.kind)
            if registrar is not None:
                _import_target(registrar)(plugin.name, target)
    except _StillImporting:
        raise
    except (
        Exception,
        SystemExit,
    ) as exc:  # a plugin may raise anything; it is named, quarantined and the cause is kept
        _plugins[key] = replace(plugin, status="broken", reason=f"{type(exc).__name__}: {exc}")
        raise CatalogError(
            f"{plugin.kind} {plugin.name!r} ({plugin.provenance}) cannot be loaded: {type(exc).__name__}: {exc}"
        ) from exc
    logger.info("loaded %s %s from %s", plugin.kind, plugin.name, plugin.provenance)
    _targets[key] = target
    return target


def _import_target(value: str) -> Any:
    module_name, _, attribute = value.partition(":")
    module = importlib.import_module(module_name)
    # The import system gives a half-executed module only to the thread that is executing it; others wait.
    if getattr(module.__spec__, "_initializing", False) and not hasattr(module, attribute):
        raise _StillImporting(module_name)
    return getattr(module, attribute)


@contextmanager
def busy(kind: str, name: str) -> Iterator[None]:
    """While a method is loaded or registered by this thread, host mappings answer for its name as a plain dict would.

    (Upstream's register functions ask `name in MAPPING` first.)
    """
    names = _in_progress.__dict__.setdefault("names", [])
    names.append((kind, name))
    try:
        yield
    finally:
        names.remove((kind, name))


def lookup(kind: str, key: Any) -> bool:
    """Called by a host's mapping that misses `key`: load the plugin of that name, if one is installed and unblocked.

    Returns:
        True when the method is registered now; False when the mapping must answer as a plain dict would.

    Raises:
        CatalogError: a plugin of that name is installed but quarantined or does not import.
    """
    name = getattr(key, "value", key)
    if not isinstance(name, str):
        return False
    name = name.lower()
    if (kind, name) not in _scan() or (kind, name) in _in_progress.__dict__.get("names", ()):
        return False
    if _plugin((kind, name)).status == "blocked":
        logger.warning("%s %s was asked for but is blocked: %s", kind, name, _plugin((kind, name)).reason)
        return False
    try:
        _load(find(name, kind))
    except _StillImporting:
        return False
    return True


def register_all(kind: str) -> None:
    """Register every healthy method of a kind at once: the host was imported before the hook could reach its mapping."""
    for plugin in plugins(kind):
        if plugin.status == "ok":
            try:
                _load(plugin)
            except (CatalogError, _StillImporting) as exc:
                logger.warning("%s %s was not registered: %s", kind, plugin.name, exc)
    logger.info("registered %s with an already imported host: %s", kind, ", ".join(n for k, n in _targets if k == kind))


def shelf(kind: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of the import shelf `hfgen.<kind>`.

    `__getattr__` gives any public name a card of that kind exports, after loading (and registering) its method. hfgen's
    own cards are asked before a stranger's, which therefore cannot take a name of theirs; then cards whose name occurs
    in the attribute, so that nothing of another plugin is imported for it.
    """

    def get(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        squeezed = attribute.lower().replace("_", "")

        def order(key: tuple[str, str]) -> tuple[bool, bool, tuple[str, str]]:
            return _distribution(_scan()[key][0])[0] != "hfgen", key[1].replace("_", "") not in squeezed, key

        keys = sorted((k for k in _scan() if k[0] == kind), key=order)
        broken = []
        for key in keys:
            plugin = _plugin(key)
            if plugin.card is not None and attribute in plugin.card.exports:
                target = load(plugin.name, kind)
                return target if target.__name__ == attribute else _exported(plugin, attribute)
            if plugin.status != "ok" and key[1].replace("_", "") in squeezed:
                broken.append(f"{kind} {plugin.name!r} ({plugin.provenance}) is {plugin.status}: {plugin.reason}")
        names = directory()
        close = difflib.get_close_matches(attribute, names, n=1)
        if not close and not broken:
            raise AttributeError(f"hfgen.{kind} has no {attribute!r}; installed are: {', '.join(names) or 'none'}")
        # Not an AttributeError: `from shelf import name` would replace its text by "cannot import name".
        hints = broken or [f"did you mean {close[0]!r}?"]
        raise CatalogError("; ".join([f"hfgen.{kind} has no {attribute!r}", *hints]))

    def directory() -> list[str]:
        return sorted({name for card in list_cards(kind) for name in card.exports})

    return get, directory


def _exported(plugin: Plugin, attribute: str) -> Any:
    package: ModuleType = importlib.import_module(plugin.value.partition(":")[0])
    return getattr(package, attribute)
