"""Every check of cards fails on a distribution with just that fault, and says so in words; the other checks pass."""

import re
import sys

import pytest

from hfgen import catalog
from hfgen.testing import cards, cases
from tests.fixtures import dists

GOOD = """
from hfgen.card import Claim, MethodCard
CARD = MethodCard(name="stranger", kind="judges", summary="Always right.", target="stranger_c_impl:Thing",
                  exports=("Thing", "Options"), example="stranger_c_impl:example",
                  claims=(Claim("a", "s.", "stranger_c_impl:Thing"), Claim("b", "s.")))
def __getattr__(name):
    if name in CARD.exports:
        import stranger_c_impl
        return getattr(stranger_c_impl, name)
    raise AttributeError(name)
"""
IMPL = """
from dataclasses import dataclass, field
class Thing:
    def __call__(self, prompt, answer, gold): return True
@dataclass
class Options:
    '''Options.

    Args:
        strict: Whether anything is wrong.
    '''
    strict: bool = False
    loud: bool = field(default=False, metadata={"help": "Says so."})
def example(): return {}
"""
# check -> ((old, new) in the card's module, (old, new) in the method's, words)
MUTANTS = {
    "card_light": (("\nCARD", "\nimport safetensors\nCARD"), None, "imports safetensors"),
    "card_lazy": (("\nCARD", "\nimport stranger_c_impl\nCARD"), None, "imports stranger_c_impl; give its names lazily"),
    "card_words": (("Always right.", "always right"), None, "summary is 'always right'; write one sentence"),
    "card_target": (
        None,
        ("    def __call__(self, prompt, answer, gold): return True", "    pass\nThing = 3"),
        "is int, which",
    ),
    "card_exports": (
        ('"Options")', '"Options", "Nothing")'),
        None,
        "exports names 'Nothing', which stranger_c does not give",
    ),
    "card_help": (None, ("        strict: Whether", "        lax: Whether"), "no help for strict of Options"),
    "card_references": (('Thing")', 'Thingy")'), None, "'stranger_c_impl:Thingy' is not there"),
}


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Installs the distribution with changed text, gives its plugin, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(card, impl):
        texts = []
        for text, change in ((GOOD, card), (IMPL, impl)):
            assert change is None or text.count(change[0]) == 1, change
            texts.append(text if change is None else text.replace(*change))
        dists.make(tmp_path, "stranger-c", "stranger", "judges", card=texts[0], impl=texts[1])
        catalog.refresh()
        return catalog.find("stranger")

    cards._loaded_by_reading.cache_clear()
    yield install
    for name in ("stranger_c", "stranger_c_impl"):
        sys.modules.pop(name, None)
    cards._loaded_by_reading.cache_clear()
    catalog.refresh()


def test_every_check_has_a_mutant():
    assert set(MUTANTS) == set(cards.CHECKS)


def test_a_good_card_passes_all(stranger):
    plugin = stranger(None, None)
    found = cases(plugin.card)
    assert [name for name, _ in found] == list(cards.CHECKS)  # judges have no checks of their own
    for _, check in found:
        check()


@pytest.mark.parametrize("check", cards.CHECKS)
def test_the_check_finds_its_mutant_card(check, stranger):
    card, impl, words = MUTANTS[check]
    case = cards.CardCase(stranger(card, impl))
    with pytest.raises(AssertionError, match=re.escape(words)):
        cards.CHECKS[check](case)


@pytest.mark.parametrize(
    ("check", "card", "impl", "words"),
    [
        ("card_words", ('"Options")', '"Options", "")'), None, "exports has ['']"),
        (
            "card_target",
            None,
            ("class Thing:", "raise ImportError('needs foo')\nclass Thing:"),
            "does not load: .*needs foo",
        ),
        ("card_exports", ('exports=("Thing", "Options"), ', "exports=(), "), None, "exports is empty"),
        ("card_references", ('Claim("b"', 'Claim("a"'), None, "claims share an id"),
        ("card_references", ("_impl:example", "_impl:missing"), None, "stranger_c_impl:missing' is not there"),
    ],
)
def test_other_faults_a_check_finds(check, card, impl, words, stranger):
    case = cards.CardCase(stranger(card, impl))
    with pytest.raises(AssertionError, match=words.replace("['']", r"\[''\]")):
        cards.CHECKS[check](case)


def test_a_name_of_another_method_is_found(stranger):
    plugin = stranger(('"Options")', '"ExactJudge")'), ("class Options", "class ExactJudge"))
    with pytest.raises(AssertionError, match="import ExactJudge` gives hfgen_plugins.judges.exact.judge's"):
        cards.CHECKS["card_exports"](cards.CardCase(plugin))


def test_a_taken_name_is_found_whichever_the_shelf_asks_first(tmp_path, monkeypatch):
    """The shelf asks cards first whose name occurs in the attribute: 'ex' before 'exact'."""
    monkeypatch.syspath_prepend(str(tmp_path))
    card = (
        GOOD.replace('name="stranger"', 'name="ex"')
        .replace('"Options")', '"ExactJudge")')
        .replace("stranger_c", "thief")
    )
    dists.make(tmp_path, "thief", "ex", "judges", card=card, impl=IMPL.replace("class Options", "class ExactJudge"))
    catalog.refresh()
    try:
        with pytest.raises(AssertionError, match="ExactJudge.*choose another name"):
            cards.CHECKS["card_exports"](cards.CardCase(catalog.find("ex")))
    finally:
        for name in ("thief", "thief_impl"):
            sys.modules.pop(name, None)
        catalog.refresh()


def test_kinds_have_their_own_checks():
    for kind, some in {
        "adapters": "merge",
        "quantizers": "reload",
        "trainers": "resume",
        "callbacks": "witness",
    }.items():
        names = [name for name, _ in cases(catalog.list_cards(kind)[0])]
        assert names[: len(cards.CHECKS)] == list(cards.CHECKS) and some in names and len(set(names)) == len(names)
