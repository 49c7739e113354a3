"""Finding, loading, quarantine, switches and collisions, on made-up distributions."""

import sys

import pytest

from hfgen import catalog
from hfgen.card import Claim, MethodCard, Paper
from tests.fixtures import dists


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder on sys.path whose distributions the catalogue sees; modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    for variable in ("HFGEN_PLUGINS", "HFGEN_BLOCK"):
        monkeypatch.delenv(variable, raising=False)
    catalog.refresh()
    yield tmp_path
    catalog.refresh()
    for name in set(sys.modules) - before:
        if name.startswith("stranger"):
            del sys.modules[name]


def status(name):
    catalog.refresh()
    return {p.name: p for p in catalog.plugins()}[name]


def test_first_party_cards():
    names = {(c.kind, c.name) for c in catalog.list_cards()}
    assert {("adapters", "svfit"), ("adapters", "loldu"), ("trainers", "s3ft"), ("judges", "exact")} <= names
    assert [c.name for c in catalog.list_cards("adapters")] == [
        "increlora",
        "intrinsic",
        "loldu",
        "sara",
        "soma",
        "svfit",
    ]
    assert catalog.get_card("svfit").paper == Paper(
        "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
        "arXiv:2409.05926",
        2024,
    )


def test_card_is_frozen_json_and_checked():
    card = catalog.get_card("loldu")
    with pytest.raises(AttributeError):
        card.name = "x"
    assert card.to_dict()["paper"]["year"] == 2024
    good = {"name": "a", "kind": "adapters", "summary": "s", "target": "m:a", "exports": ()}
    MethodCard(**good, claims=(Claim("c", "s"),))
    for change, error, word in (
        ({"name": "Not Good"}, ValueError, "name"),
        ({"name": "bad_"}, ValueError, "name"),
        ({"kind": "adapter"}, ValueError, "kind"),
        ({"target": "m.a"}, ValueError, "target"),
        ({"exports": ["a"]}, TypeError, "exports"),
        ({"summary": None}, TypeError, "summary"),
    ):
        with pytest.raises(error, match=f"MethodCard.{word}"):
            MethodCard(**(good | change))


def test_load_registers_once():
    assert catalog.load("svfit") is catalog.load("svfit", kind="adapters")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert PEFT_TYPE_TO_CONFIG_MAPPING["SVFIT"] is catalog.load("svfit")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: catalog.load("svfitt"), catalog.CatalogError, "did you mean 'svfit'"),
        (lambda: catalog.load("SVFIT"), catalog.CatalogError, "did you mean 'svfit'"),
        (lambda: catalog.load("zzz"), catalog.CatalogError, "installed are: .*svfit"),
        (lambda: catalog.load(3), TypeError, "a method's name is a string"),
        (lambda: catalog.list_cards("adapter"), catalog.CatalogError, "did you mean 'adapters'"),
        (lambda: catalog.load("os.path:join"), catalog.CatalogError, "no installed method"),
    ],
)
def test_wrong_names(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert caught.traceback[-1].path.name == "catalog.py"


def test_shelf():
    import hfgen.adapters as shelf

    assert shelf.SVFitConfig is catalog.load("svfit")
    assert {"SVFitConfig", "LoLDUConfig"} <= set(dir(shelf))
    with pytest.raises(ValueError, match="did you mean 'SVFitConfig'"):
        from hfgen.adapters import SVFitConfg  # noqa: F401
    assert not hasattr(shelf, "something_else_entirely")


def test_stranger_is_on_the_shelf_and_registers(installed):
    dists.make_adapter(installed, "stranger-a", "strangera")
    catalog.refresh()
    from hfgen.adapters import Thing

    assert Thing(r=2).peft_type.value == "STRANGERA"
    assert Thing(r=2).hfgen["install"] == "pip install 'stranger-a>=1.0'"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        ({"card": "raise RuntimeError('boom')"}, "RuntimeError: boom"),
        ({"card": "import sys; sys.exit(3)"}, "SystemExit: 3"),
        ({"card": "CARD = 3"}, "int, not a MethodCard"),
        ({"card": "x = 1"}, "no attribute 'CARD'"),
        ({"card": dists.CARD.format(name="other", kind="adapters", module="stranger_b")}, "card says name 'other'"),
        ({"card": dists.CARD.format(name="strangerb", kind="trainers", module="x")}, "card says kind 'trainers'"),
    ],
)
def test_a_broken_card_is_quarantined_with_the_reason(installed, make, words):
    dists.make(installed, "stranger-b", "strangerb", **make)
    plugin = status("strangerb")
    assert plugin.status == "broken" and words in plugin.reason and plugin.distribution == "stranger-b"
    with pytest.raises(catalog.CatalogError, match="quarantined"):
        catalog.load("strangerb")
    assert catalog.load("svfit").__name__ == "SVFitConfig"  # nothing else changes
    assert "strangerb" not in [c.name for c in catalog.list_cards()]


@pytest.mark.parametrize(
    ("impl", "words"),
    [
        ("raise ImportError('needs foo')", "ImportError: needs foo"),
        ("", "no attribute 'Thing'"),
        ("class Thing: pass", "tuner_cls"),  # lies about its kind: no adapter
    ],
)
def test_a_broken_method_is_an_error_when_named(installed, impl, words):
    dists.make(installed, "stranger-c", "strangerc", impl=impl)
    assert status("strangerc").status == "ok"  # its card reads; nothing else was imported
    with pytest.raises(catalog.CatalogError, match=words):
        catalog.load("strangerc")
    with pytest.raises(catalog.CatalogError, match="quarantined"):
        catalog.load("strangerc")
    assert catalog.load("loldu").__name__ == "LoLDUConfig"


def test_shadowing_a_peft_name_is_refused(installed):
    dists.make_adapter(installed, "stranger-lora", "lora")
    catalog.refresh()
    with pytest.raises(catalog.CatalogError, match=r"peft \S+ ships its own LORA"):
        catalog.load("lora")


def test_collision_and_choice(installed, monkeypatch):
    dists.make_adapter(installed, "stranger-d", "strangerd")
    dists.make_adapter(installed, "stranger-e", "strangerd")
    plugin = status("strangerd")
    assert plugin.status == "broken" and "both offer the name" in plugin.reason
    assert "HFGEN_PLUGINS='*,stranger-d:strangerd'" in plugin.reason
    monkeypatch.setenv("HFGEN_PLUGINS", "*,stranger_E:strangerd")
    assert status("strangerd").distribution == "stranger-e"
    assert status("svfit").status == "ok"
    monkeypatch.setenv("HFGEN_PLUGINS", "stranger-d:strangerd")
    assert status("strangerd").distribution == "stranger-d"
    assert status("svfit").status == "blocked"
    monkeypatch.delenv("HFGEN_PLUGINS")
    monkeypatch.setenv("HFGEN_BLOCK", "stranger-d:strangerd")
    assert status("strangerd").distribution == "stranger-e"


def test_switches(installed, monkeypatch):
    monkeypatch.setenv("HFGEN_PLUGINS", "svfit, nothere")
    assert status("svfit").status == "ok" and status("loldu").status == "blocked"
    assert catalog.unmatched_switches() == ["HFGEN_PLUGINS=nothere"]
    with pytest.raises(catalog.CatalogError, match="blocked: HFGEN_PLUGINS="):
        catalog.load("loldu")
    monkeypatch.delenv("HFGEN_PLUGINS")
    monkeypatch.setenv("HFGEN_BLOCK", "svfit")
    with pytest.raises(catalog.CatalogError, match="blocked: HFGEN_BLOCK names it"):
        catalog.get_card("svfit") if status("svfit") else None


def test_one_name_of_two_kinds_needs_the_kind(installed):
    dists.make(installed, "stranger-f", "svfit", kind="callbacks")
    catalog.refresh()
    with pytest.raises(catalog.CatalogError, match="several kinds"):
        catalog.load("svfit")
    assert catalog.load("svfit", kind="adapters").__name__ == "SVFitConfig"


def test_listing_imports_no_method_and_no_host(run_python):
    run_python(
        "import sys\nfrom hfgen import catalog\ncatalog.list_cards()\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'peft', 'trl', 'datasets')]\n"
        "assert not bad, bad[:5]"
    )


def test_import_hfgen_is_light(run_python):
    """Two modules beside the standard library's: the time is in recipes/bench/startup.py."""
    run_python(
        "import sys; before = set(sys.modules); import hfgen\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "assert new == {'hfgen', '_hfgen_autoload'}, new"
    )
