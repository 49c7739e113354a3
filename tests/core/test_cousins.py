"""Adapters against their cousins: the arms get what they need and equal budgets, the verdict follows from the samples."""

import dataclasses
import importlib
import json
import math

import pytest
import torch

from hfgen import catalog, sandbox
from hfgen.card import Claim
from hfgen.evidence import cousins, ledger, settings_sha256
from hfgen.evidence.experiment import _report, finite, samples_of

METHODS = ("soma", "sara", "increlora", "intrinsic")
MODULES = {m: importlib.import_module(f"hfgen_plugins.adapters.{m}.evidence") for m in METHODS}
each_method = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


# --- the runs ---------------------------------------------------------------------------------------------------------


@each_method
def test_every_arm_runs_and_the_budgets_are_equal(module, monkeypatch):
    monkeypatch.setattr(cousins, "TEST_WORDS", 8)
    experiment, settings = module.EXPERIMENT, module.EXPERIMENT.smoke_settings
    settings = dataclasses.replace(settings, steps=6, batch_size=8, source_steps=1)
    found = {a.id: cousins.run_arm(a.id, 1000, settings, lambda *_: None) for a in experiment.arms}
    assert all(set(r) == {m.key for m in experiment.metrics} for r in found.values())
    assert all(0 <= r[f"{t}_{k}"] <= 1 for r in found.values() for t in cousins.TASKS for k in ("new", "kept"))
    for task in cousins.TASKS:
        own = found[settings.method][f"{task}_numbers"]
        assert found[cousins.BASE][f"{task}_numbers"] == 0 < own
        for arm in settings.equal:
            ratio = found[arm][f"{task}_numbers"] / own
            assert 1 / settings.tolerance <= ratio <= settings.tolerance, (task, arm, ratio)
    assert found[cousins.BASE]["language_new"] == 0 and found[cousins.BASE]["language_kept"] == 1


@pytest.mark.parametrize(("task", "modules", "full"), [("images", 12, 66432), ("language", 14, 131072)])
def test_targets_are_the_linear_layers_of_the_blocks(task, modules, full):
    """12: q, k, v, o and two of the MLP in two blocks; 14: three of the MLP. The head and the embeddings stay."""
    make = {"images": lambda: cousins._vit(64, 2), "language": sandbox.load_model}[task]
    whole = cousins.adapted({"config": None}, task, 1, make())
    assert cousins.trained_numbers(whole) == full
    model = cousins.adapted({"config": "LoraConfig", "options": {"r": 1}}, task, 1, make())
    assert len([n for n, p in model.named_parameters() if "lora_A" in n and p.requires_grad]) == modules
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]


def test_shares_are_steps_and_options_go_by_task():
    spec = {"config": "AdaLoraConfig", "options": {"init_r": 3, "target_r": 2}, "images": {"init_r": 4},
            "shares": {"total_step": 1.0, "tinit": 0.1, "tfinal": 0.3, "deltaT": 0.001}}  # fmt: skip
    config = cousins.adapted(spec, "images", 200, cousins._vit(16, 1)).peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal, config.deltaT, config.init_r) == (200, 20, 60, 1, 4)


def test_components_whose_gate_is_zero_do_not_count():
    model = torch.nn.ModuleDict(
        {
            "layer": torch.nn.ModuleDict({f"lora_{x}": torch.nn.ParameterDict() for x in "ABE"}),
            "bias": torch.nn.Linear(1, 1),
        }
    )
    for part, shape in (("A", (4, 6)), ("B", (5, 4)), ("E", (4, 1))):
        model["layer"][f"lora_{part}"]["default"] = torch.nn.Parameter(torch.ones(shape))
    model["bias"].requires_grad_(False)
    assert cousins.trained_numbers(model) == 4 * (6 + 5 + 1)
    model["layer"]["lora_E"]["default"].data[1:] = 0
    assert cousins.trained_numbers(model) == 6 + 5 + 1


def test_adalora_gets_its_update_call():
    """Its rank pattern is decided and the masked components are gone: peft does so only when it is called."""
    settings = cousins.Settings(
        method="ada", claims=(), equal=(), tolerance=1.0, steps=12, batch_size=4, source_steps=1, rates={"images/ada": 1e-2},
        arms={"ada": {"label": "AdaLoRA", "config": "AdaLoraConfig", "options": {"init_r": 3, "target_r": 2},
                      "shares": {"total_step": 1.0, "tinit": 0.1, "tfinal": 0.3, "deltaT": 0.1}}},
    )  # fmt: skip
    rows = cousins._turned(cousins._digits(1000)[1])
    model, numbers, _ = cousins._adapt("ada", "images", 1000, settings, cousins._vit(64, 2), rows, None)
    ranks = [sum(kept) for kept in model.peft_config["default"].rank_pattern.values()]
    assert len(ranks) == 12 and sum(ranks) == 24  # 12 modules of rank 2 on average
    gates = [int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n]
    assert gates == ranks and 24 * 129 <= numbers <= 24 * 193


def test_data_are_apart():
    old, new, test = cousins._digits(3)
    assert (len(old), len(new), len(test)) == (800, 500, 497)
    seen = {row["pixel_values"].numpy().tobytes() for row in (*old, *new)}
    assert sum(row["pixel_values"].numpy().tobytes() in seen for row in test) == 0
    upright, turned = test[0]["pixel_values"], cousins._turned(test)[0]["pixel_values"]
    assert turned.shape == (1, 8, 8) and turned[0, 7, 0] == upright[0, 0, 0] and not turned.equal(upright)
    words = cousins._words(3)
    assert len(words) == len(set(words)) == 628 and words == cousins._words(3) != cousins._words(4)
    assert cousins._sorted("cab") == "abc"


# --- the verdict ------------------------------------------------------------------------------------------------------

SETTINGS = cousins.Settings(
    method="own", arms={"cousin": {"label": "Cousin"}, "own": {"label": "Own"}}, equal=("cousin",), tolerance=1.1,
    claims=(("cousin", "new", -0.02), ("cousin", "kept", 0.0)),
)  # fmt: skip


def made(new=0.8, kept=0.6, learnt=(0.7, 0.8, 0.9), numbers=100.0):
    """Samples in which the cousin's accuracies are `learnt` and .5 and the own arm's differ from it by a constant."""

    def arm(new, kept, numbers):
        return {
            f"{t}_{k}": list(v)
            for t in cousins.TASKS
            for k, v in (("new", new), ("kept", kept), ("numbers", [numbers] * 3))
        }

    own = [x + new - 0.8 for x in (0.7, 0.8, 0.9)]
    return {
        "base": arm([0.1] * 3, [1.0] * 3, 0.0), "cousin": arm(learnt, [0.5] * 3, 100.0), "own": arm(own, [kept] * 3, numbers),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("samples", "expected", "outcomes"),
    [
        (made(), "reproduced", ["holds"] * 4),
        (made(new=0.785), "reproduced", ["holds"] * 4),  # .015 less: within the margin
        (made(new=0.77), "partly", ["fails", "fails", "holds", "holds"]),
        (made(new=0.7, kept=0.4), "not reproduced", ["fails"] * 4),
        (made(learnt=(0.1, 0.8, 0.1)), "void", None),  # above the base in the mean, not by the interval
        (made(numbers=112.0), "void", None),
        (made(numbers=89.0), "void", None),
    ],
)
def test_verdict(samples, expected, outcomes):
    (found,) = cousins.judge(samples, SETTINGS)
    assert (found.arm, found.verdict) == ("own", expected)
    assert outcomes is None or [c.outcome for c in found.checks] == outcomes
    assert found.checks[0].statement == "digits, turned: new task learnt, minus Cousin's"


@each_method
def test_claims_name_arms(module):
    settings = module.SETTINGS
    assert settings.method in settings.arms and all(arm in settings.arms for arm in settings.equal)
    for cousin, key, bound in settings.claims:
        assert cousin in settings.arms and cousin != settings.method and key in ("new", "kept") and -0.05 <= bound <= 0
    assert module.EXPERIMENT.claim == cousins.CLAIM and module.EXPERIMENT.method == settings.method


# --- the rates --------------------------------------------------------------------------------------------------------


@each_method
def test_rates_are_what_the_tuning_chose(module):
    """From the committed table, by the stated rule, on seeds apart, with equal tries for every arm."""
    table, settings = json.loads(module.TUNING_FILE.read_text()), dataclasses.asdict(module.SETTINGS)
    assert settings.pop("rates") == table["chosen"] == cousins.choose(table["runs"])
    assert json.loads(json.dumps(settings)) == table["settings"] and table["criterion"] == cousins.CRITERION
    assert table["seeds"] == list(cousins.TUNING_SEEDS) and min(table["seeds"]) >= 100
    for arm in settings["arms"]:
        runs = [r for r in table["runs"] if r["arm"] == arm]
        assert {(r["rate"], r["seed"]) for r in runs} == {(g, s) for g in table["grid"] for s in table["seeds"]}
        assert len(runs) == module.EXPERIMENT.tries


def test_choose_by_task_and_by_the_new_one_alone():
    def row(arm, rate, images, language):
        return {"arm": arm, "rate": rate, "images_new": images, "language_new": language, "images_kept": 1 - rate}

    rows = [row("a", 0.1, 0.5, 0.9), row("a", 0.2, 0.6, 0.8), row("b", 0.1, 0.5, 0.5), row("b", 0.2, 0.5, 0.5)]
    assert cousins.choose(rows) == {"images/a": 0.2, "images/b": 0.1, "language/a": 0.1, "language/b": 0.1}


# --- the table of EVIDENCE.md -----------------------------------------------------------------------------------------


def entry(module, difference):
    """A ledger of made samples: the method is `difference` above every other arm but the base."""
    experiment, settings = module.EXPERIMENT, module.SETTINGS
    samples = {a.id: {m.key: [0.5, 0.6, 0.7] for m in experiment.metrics} for a in experiment.arms}
    for task in cousins.TASKS:
        samples[cousins.BASE][f"{task}_new"] = [0.1, 0.1, 0.1]
        for key in ("new", "kept"):
            samples[settings.method][f"{task}_{key}"] = [x + difference for x in (0.5, 0.6, 0.7)]
    report = _report(experiment, [0, 1, 2], False, settings, samples, cousins.judge(samples, settings), 1.0)
    own = {"format": 2, "settings_commit": "f" * 40, "paper": None, "stale": False}
    return json.loads(json.dumps(finite(report | own | {"budget": {"steps": 1, "tries": 2, "seconds": 3.0}})))


def test_one_table_of_all_methods(monkeypatch):
    found = {"soma": entry(MODULES["soma"], 0.1), "sara": entry(MODULES["sara"], -0.1)}
    cards = [
        dataclasses.replace(catalog.get_card(name), claims=(Claim(cousins.CLAIM, "It is better.", "x:y"),))
        for name in found
    ]
    monkeypatch.setattr(ledger, "current", lambda card, claim: found[card.name])
    text = ledger.render(cards)
    assert text == ledger.render(cards) and text.count("## Against cousins: 2 methods in one table") == 1
    assert (
        "| soma | reproduced | digits, turned: new task learnt, minus PiSSA's | +0.10 | +0.10 to +0.10 | -0.02 | yes |"
        in text
    )
    assert (
        "| sara | not reproduced | letters, sorted: old task kept, minus SHiRA's | -0.10 | -0.10 to -0.10 | +0.00 | no |"
        in text
    )
    table = text[text.index("## Against cousins") :].split("\n\n")[1].splitlines()
    assert len(table) == 2 + 2 * (len(MODULES["soma"].SETTINGS.claims) + len(MODULES["sara"].SETTINGS.claims))
    assert "in one table" not in ledger.render(cards[:1])  # one method alone needs none


@each_method
def test_settings_survive_json(module):
    """The hash by which a ledger names its settings is the same before and after a file."""
    settings = dataclasses.asdict(module.SETTINGS)
    assert settings_sha256(settings) == settings_sha256(json.loads(json.dumps(settings)))
    report = entry(module, 0.1)
    assert report["verdicts"] == ledger.plain(cousins.judge(samples_of(report), module.SETTINGS))
    assert all(math.isfinite(v["mean"]) for arm in report["arms"] for v in arm["metrics"].values())
