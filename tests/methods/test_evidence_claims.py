"""Every installed claim: its experiment, its settings, its ledger and its verdict belong together."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest

from hfgen import catalog
from hfgen.evidence import adaptation, find_experiment, interval, ledger_file, read_ledger, settings_sha256
from hfgen.evidence.experiment import finite, samples_of
from hfgen.evidence.ledger import MIN_SEEDS, plain
from hfgen.evidence.tuning import at_edge, best_rate
from hfgen_plugins.adapters.loldu import evidence as loldu
from hfgen_plugins.adapters.svfit import evidence as svfit
from hfgen_plugins.quantizers.easyquant import evidence as easyquant

CARDS = [p.card for p in catalog.plugins() if p.card is not None and p.card.claims and p.distribution == "hfgen"]
CLAIMS = [(card, claim) for card in CARDS for claim in card.claims if claim.experiment]
each_claim = pytest.mark.parametrize(("card", "claim"), CLAIMS, ids=lambda x: getattr(x, "name", None) or x.id)
ADAPTERS = pytest.mark.parametrize("module", [svfit, loldu], ids=["svfit", "loldu"])


@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.name)
def test_every_method_has_a_claim_with_a_verdict(card):
    files = [ledger_file(card, claim) for claim in card.claims]
    assert any(f is not None and f.is_file() and read_ledger(f)["verdicts"] for f in files)


@each_claim
def test_ledger_belongs_to_the_settings_in_the_code(card, claim):
    experiment, ledger = find_experiment(card.name, claim.id), read_ledger(ledger_file(card, claim))
    assert (experiment.method, experiment.claim) == (ledger["method"], ledger["claim"]) == (card.name, claim.id)
    assert ledger["settings_sha256"] == settings_sha256(dataclasses.asdict(experiment.settings))
    assert ledger["settings_sha256"] == settings_sha256(ledger["settings"])
    assert ledger["smoke"] is False and re.fullmatch(r"[0-9a-f]{40}", ledger["settings_commit"])
    assert len(set(ledger["seeds"])) >= MIN_SEEDS and not set(ledger["seeds"]) & set(experiment.tuning_seeds)
    assert ledger["budget"]["steps"] == experiment.steps and ledger["budget"]["tries"] == experiment.tries
    assert ledger["paper"] == claim.paper_value
    assert {a.id for a in experiment.arms} == set(samples_of(ledger))


@each_claim
def test_verdict_and_intervals_follow_from_the_samples(card, claim):
    experiment, ledger = find_experiment(card.name, claim.id), read_ledger(ledger_file(card, claim))
    assert plain(experiment.judge(samples_of(ledger), experiment.settings)) == ledger["verdicts"]
    for arm in ledger["arms"]:
        for found in arm["metrics"].values():
            assert len(found["values"]) == len(ledger["seeds"])
            assert {"values": found["values"], **finite(dataclasses.asdict(interval(found["values"])))} == found


def test_experiments_import_no_torch():
    modules = sorted({claim.experiment.partition(":")[0] for _, claim in CLAIMS})
    code = f"import sys, {', '.join(modules)}; print(sorted({{'torch', 'transformers', 'scipy', 'PIL'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- svfit and loldu --------------------------------------------------------------------------------------------------


@ADAPTERS
def test_rates_are_what_the_tuning_chose(module):
    """From the committed table, by the stated rule, on seeds apart, with equal tries and none at the grid's edge."""
    table, settings = json.loads(module.TUNING_FILE.read_text()), dataclasses.asdict(module.SETTINGS)
    assert settings.pop("rates") == table["chosen"] and json.loads(json.dumps(settings)) == table["settings"]
    assert table["criterion"] == adaptation.CRITERION and table["seeds"] == list(adaptation.TUNING_SEEDS)
    assert table["grid"] == list(adaptation.GRID) and at_edge(table["chosen"], table["grid"]) == []
    for arm in (a.id for a in module.ARMS):
        runs = [r for r in table["runs"] if r["arm"] == arm]
        assert {(r["rate"], r["seed"]) for r in runs} == {(g, s) for g in table["grid"] for s in table["seeds"]}
        assert len(runs) == module.EXPERIMENT.tries and best_rate(runs, ("accuracy",)) == table["chosen"][arm]


def made(own, lora=(0.8, 0.81, 0.82), head=(0.5, 0.5, 0.5), fewer=16):
    return {
        "head": {"accuracy": list(head), "parameters": [0.0] * 3},
        "lora": {"accuracy": list(lora), "parameters": [16.0 * fewer] * 3},
        "svfit": {"accuracy": list(own), "parameters": [16.0] * 3},
    }


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (made([0.8, 0.81, 0.82]), "reproduced"),
        (made([0.791, 0.801, 0.811]), "reproduced"),  # .009 below LoRA: within the margin of .01
        (made([0.78, 0.79, 0.80]), "not reproduced"),
        (made([0.8, 0.81, 0.82], fewer=15), "void"),  # not the sizes that the claim is about
        (made([0.9, 0.9, 0.9], head=(0.8, 0.81, 0.82)), "void"),  # LoRA is the head
        (made([0.9, 0.9, 0.9], head=(0.5, 0.9, 0.5)), "void"),  # above it in the mean, not by the interval
    ],
)
def test_adaptation_verdict(samples, expected):
    (found,) = adaptation.judge(samples, svfit.SETTINGS)
    assert (found.arm, found.verdict) == ("svfit", expected)


def test_letters_are_the_same_for_the_same_seed_and_differ_by_turn():
    x, y = adaptation.letters("lo", 200, 0, "s")
    adaptation.letters.cache_clear()
    again, _ = adaptation.letters("lo", 200, 0, "s")
    turned, same = adaptation.letters("lo", 200, 90, "s")
    assert x.shape == (200, 1, 16, 16) and x.equal(again) and y.equal(same) and set(y.tolist()) == {0, 1}
    assert not x.equal(turned) and float(x.min()) < -1 and float(x.max()) > 0.5
    # but for noise and slant, a turned "l" is the upright one turned by a quarter; unturned it is another image
    mean, other = x[y == 0].mean(0)[0], turned[y == 0].mean(0)[0]
    assert 3 * float((mean.rot90(1) - other).square().mean()) < float((mean - other).square().mean())


@ADAPTERS
def test_adaptation_runs(module):
    """The cut-down run: what is trained is what the claim counts; nothing trains in the head arm but the head."""
    settings = module.EXPERIMENT.smoke_settings
    found = {a.id: adaptation.run_arm(a.id, 1000, settings, lambda *_: None) for a in module.ARMS}
    rank, own = settings.lora_rank, settings.method
    # q and v of one layer, 64 x 64
    assert [found[a]["parameters"] for a in ("head", "lora", own)] == [0, 2 * rank * 128, 2 * 64]
    assert found["lora"]["parameters"] / found[own]["parameters"] == settings.fewer
    assert len({r["source"] for r in found.values()}) == 1 and found["head"]["kept"] == found["head"]["source"]
    assert all(
        set(r) == {m.key for m in adaptation.METRICS} and all(map(math.isfinite, r.values())) for r in found.values()
    )


# --- easyquant --------------------------------------------------------------------------------------------------------


def quantised(**logs):
    """Samples from log perplexities; float has 0."""
    logs = {"float": [0.0] * 3, "rtn": [0.5, 0.6, 0.7], "rtn_groups": [0.3, 0.4, 0.5], **logs}
    return {arm: {key: [math.exp(v) for v in values] for key in easyquant.MODELS} for arm, values in logs.items()}


@pytest.mark.parametrize(
    ("samples", "expected", "outcomes"),
    [
        (quantised(easyquant=[0.1, 0.2, 0.3]), "reproduced", ["holds"] * 4),
        (quantised(easyquant=[0.4, 0.5, 0.6]), "partly", ["holds", "holds", "fails", "fails"]),
        (quantised(easyquant=[0.7, 0.8, 0.9]), "not reproduced", ["fails"] * 4),
        (quantised(easyquant=[0.1] * 3, rtn=[0.0, 0.1, -0.1]), "void", None),
    ],
)
def test_easyquant_verdict(samples, expected, outcomes):
    (found,) = easyquant.judge(samples, easyquant.SETTINGS)
    assert found.verdict == expected
    assert outcomes is None or [c.outcome for c in found.checks] == outcomes


def test_easyquant_runs_and_the_larger_budget_is_larger():
    settings = easyquant.EXPERIMENT.smoke_settings
    found = {a.id: easyquant.run_arm(a.id, 1000, settings, lambda *_: None) for a in easyquant.ARMS}
    for model, bits in settings.bits.items():
        stored = {arm: r[f"bits_{model}"] for arm, r in found.items()}
        assert stored["float"] == 32 and bits < stored["rtn"] < stored["easyquant"] <= stored["rtn_groups"]
        # the widest power of two that stores at least as many: twice as wide would store fewer
        assert bits + 16 / (2 * settings.groups[model]) < stored["easyquant"]
    # planting changes no function: float has the same perplexity on both models
    assert found["float"]["planted"] == pytest.approx(found["float"]["sandbox"], rel=1e-5)
    assert found["rtn"]["planted"] > 2 * found["float"]["planted"]
