"""Conformance of cards: what every method promises, whatever its kind.

A check takes a `CardCase` and raises AssertionError in words. Each is shown to fail on a mutant in hfgen's own tests.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hfgen import catalog
from hfgen.card import MethodCard

CHECKS: dict[str, Callable[[CardCase], None]] = {}
_HOSTS = {"torch", "transformers", "peft", "trl", "accelerate", "datasets", "diffusers", "bitsandbytes", "safetensors"}
# What a kind's target must be a subclass of; targets of other kinds are called.
_BASES = {
    "adapters": "peft:PeftConfig",
    "quantizers": "transformers.utils.quantization_config:QuantizationConfigMixin",
    "callbacks": "transformers:TrainerCallback",
    "trainers": "transformers:Trainer",
    "optimizers": "torch.optim:Optimizer",
}


def check(function: Callable[[CardCase], None]) -> Callable[[CardCase], None]:
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


@dataclass
class CardCase:
    """An installed method under test, as the catalogue found it."""

    plugin: catalog.Plugin

    @property
    def card(self) -> MethodCard:
        assert self.plugin.card is not None, f"the card cannot be read: {self.plugin.reason}"
        return self.plugin.card

    @property
    def package(self) -> str:
        """The module that holds the card, and the public names."""
        return self.plugin.value.partition(":")[0]


_READ = """
import importlib, json, sys
before = set(sys.modules)
module, _, attribute = sys.argv[1].partition(":")
package = importlib.import_module(module)
getattr(package, attribute), dir(package)
print("\\n" + json.dumps(sorted(set(sys.modules) - before)))
"""


@functools.lru_cache
def _loaded_by_reading(value: str) -> tuple[str, ...]:
    """Modules that a new process has after it read the card at "module:attribute"."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-P", "-c", _READ, value]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"a new process cannot read the card: {done.stderr[-400:]}"
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def resolve(value: str) -> Any:
    """What "module:attribute" names. Raises AssertionError in words."""
    module, colon, attribute = value.partition(":")
    assert colon, f"{value!r} is not 'module:attribute'"
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as exc:
        raise AssertionError(f"{value!r} is not there: {exc}") from exc


@check
def check_card_light(case: CardCase) -> None:
    """A process that reads the card (as `hfgen ls` does) has neither torch nor a host library."""
    hosts = sorted({name.partition(".")[0] for name in _loaded_by_reading(case.plugin.value)} & _HOSTS)
    assert not hosts, f"reading the card imports {', '.join(hosts)}; import them in the module that the target names"


@check
def check_card_lazy(case: CardCase) -> None:
    """Reading the card does not import the method."""
    module = case.card.target.partition(":")[0]
    loaded = module != case.package and module in _loaded_by_reading(case.plugin.value)
    assert not loaded, (
        f"reading the card imports {module}; give its names lazily (lazy_loader.attach or a module's __getattr__)"
    )


@check
def check_card_words(case: CardCase) -> None:
    """The summary is one line that ends in a full stop, no list has an empty entry, and the card is JSON."""
    card = case.card
    assert re.fullmatch(r"\S.*\S\.", card.summary), f"summary is {card.summary!r}; write one sentence on one line"
    for field in ("exports", "needs", "conflicts", "deviations"):
        odd = [entry for entry in getattr(card, field) if not isinstance(entry, str) or not entry.strip()]
        assert not odd, f"{field} has {odd}; give non-empty strings"
    try:
        json.dumps(card.to_dict())
    except TypeError as exc:
        raise AssertionError(f"the card is not JSON: {exc}") from exc


@check
def check_card_target(case: CardCase) -> None:
    """The target loads, registers with its host, and is of its kind."""
    card = case.card
    try:
        target = catalog.load(card.name, card.kind)
    except catalog.CatalogError as exc:
        raise AssertionError(f"the target does not load: {exc}") from exc
    if card.kind in _BASES:
        base = resolve(_BASES[card.kind])
        fine = isinstance(target, type) and issubclass(target, base)
        assert fine, f"{card.target} is no {base.__name__}, which a target of kind {card.kind} must be"
    else:
        assert callable(target), f"{card.target} is {type(target).__name__}, which cannot be called"


@check
def check_card_exports(case: CardCase) -> None:
    """Every exported name can be imported from the shelf, and is this method's and not another's."""
    kind, package = case.card.kind, importlib.import_module(case.package)
    assert case.card.exports, f"exports is empty: nothing of the method can be imported from hfgen.{kind}"
    shelf = importlib.import_module(f"hfgen.{kind}").__getattr__ if _has_shelf(kind) else catalog.shelf(kind)[0]
    for name in case.card.exports:
        try:
            mine = getattr(package, name)
        except (AttributeError, ImportError) as exc:
            raise AssertionError(f"exports names {name!r}, which {case.package} does not give: {exc}") from exc
        try:
            found = shelf(name)
        except (AttributeError, catalog.CatalogError) as exc:
            raise AssertionError(f"`from hfgen.{kind} import {name}` fails: {exc}") from exc
        assert found is mine, f"`from hfgen.{kind} import {name}` gives {found.__module__}'s; choose another name"
        others = [c.name for c in catalog.list_cards(kind) if c.name != case.card.name and name in c.exports]
        clear = not others or case.plugin.distribution == "hfgen"  # a stranger gives way to hfgen, never the reverse
        assert clear, f"{name} is exported by {', '.join(others)} too; choose another name"


def _has_shelf(kind: str) -> bool:
    return importlib.util.find_spec(f"hfgen.{kind}") is not None


@check
def check_card_help(case: CardCase) -> None:
    """Every option of an exported dataclass has a help text, or a line in the docstring of the class that adds it."""
    package = importlib.import_module(case.package)
    for name in case.card.exports:
        exported = getattr(package, name, None)
        if isinstance(exported, type) and dataclasses.is_dataclass(exported):
            silent = [f.name for f in dataclasses.fields(exported) if not _explained(exported, f)]
            assert not silent, f"no help for {', '.join(silent)} of {name}; field(metadata={{'help': ...}}) or Args:"


def _explained(owner: type, field: dataclasses.Field[Any]) -> bool:
    if field.metadata.get("help"):
        return True
    adds = [c for c in owner.__mro__ if field.name in inspect.get_annotations(c)]
    if not adds or any(c.__module__.partition(".")[0] in _HOSTS for c in adds):
        return True  # the host's own
    docs = [c.__doc__ or "" for c in adds if not (c.__doc__ or "").startswith(f"{c.__name__}(")]  # dataclass's own text
    return any(re.search(rf"^\s*{field.name}\b[^\n]*:", doc, re.M) for doc in docs)


@check
def check_card_references(case: CardCase) -> None:
    """The example and every claim's experiment are there, and no two claims have one id."""
    card = case.card
    ids = [claim.id for claim in card.claims]
    assert len(set(ids)) == len(ids), f"claims share an id: {ids}"
    if card.example is not None:
        assert callable(resolve(card.example)), f"example {card.example!r} cannot be called"
    for claim in card.claims:
        if claim.experiment is not None:
            resolve(claim.experiment)
