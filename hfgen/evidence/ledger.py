"""The ledger: one JSON file per claim beside the method's evidence.py, and EVIDENCE.md rendered from all of them.

A ledger is a report (see `run_experiment`) with what makes it count: the commit at which the settings were fixed, the
paper's own figure, the budget. It names no method; which claims there are the installed cards say.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from hfgen import catalog
from hfgen.card import Claim, MethodCard

from .corpus.figures import section as monitors_section
from .experiment import Experiment, finite, samples_of, settings_sha256
from .report import figures, sentence, show
from .stats import Verdict

LEDGER_FORMAT = 2
MIN_SEEDS = 5
Ledger = dict[str, Any]


class LedgerError(ValueError):
    """A report cannot be entered, or a ledger cannot be read."""


def find_experiment(method: str, claim: str | None = None) -> Experiment:
    """The experiment of a claim on the method's card; without `claim`, of the first that has one.

    Raises:
        CatalogError: no such method or claim, it has no experiment, or that does not load (the cause is chained).
    """
    card = catalog.get_card(method)
    ids = ", ".join(c.id for c in card.claims) or "none"
    if claim is not None and claim not in [c.id for c in card.claims]:
        raise catalog.CatalogError(f"method {method!r} has no claim {claim!r}; it has: {ids}")
    found = next((c for c in card.claims if c.experiment and claim in (None, c.id)), None)
    if found is None:
        which = "claim" if claim is None else f"claim {claim!r}"
        raise catalog.CatalogError(
            f"method {method!r} has no {which} with an experiment; `hfgen show {method}` lists them"
        )
    return _experiment(found)


def _experiment(claim: Claim) -> Experiment:
    module, _, attribute = str(claim.experiment).partition(":")
    try:
        experiment: Experiment = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as exc:  # a plugin may raise anything; it is named and the cause is kept
        raise catalog.CatalogError(
            f"experiment {claim.experiment} cannot be loaded: {type(exc).__name__}: {exc}"
        ) from exc
    return experiment


def ledger_file(card: MethodCard, claim: Claim) -> Path | None:
    """Where the claim's ledger is or would be: ``ledger.json`` beside the experiment for the card's first claim,
    ``ledger-<id>.json`` for others; None for a claim without an experiment."""
    if claim.experiment is None:
        return None
    _experiment(claim)
    folder = Path(str(sys.modules[claim.experiment.partition(":")[0]].__file__)).parent
    return folder / ("ledger.json" if claim.id == card.claims[0].id else f"ledger-{claim.id}.json")


def read_ledger(path: Path) -> Ledger:
    """The ledger in its present form, whichever format the file has.

    Format 1 was the bare report with ``settings_commit``: what it lacks is None.

    Raises:
        LedgerError: no JSON object, or of a format that this version does not know.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        number = found["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as exc:
        raise LedgerError(f"{path} is no ledger ({type(exc).__name__}: {exc}); enter a report to make one") from exc
    if number == 1:
        budget = {"steps": found["settings"].get("steps"), "tries": None, "seconds": found.pop("seconds")}
        return found | {"format": LEDGER_FORMAT, "paper": None, "started": None, "budget": budget}
    if number != LEDGER_FORMAT:
        raise LedgerError(f"{path} has format {number!r}, this hfgen reads 1 to {LEDGER_FORMAT}; update hfgen")
    return dict(found)


# --- entering a report ------------------------------------------------------------------------------------------------


def enter(report: dict[str, Any]) -> Path:
    """Puts a finished report (the content of ``report.json``) into its claim's ledger and gives the file.

    Raises:
        CatalogError: the report's method or claim is not installed.
        LedgerError: the report may not count: a smoke run, fewer than 5 seeds or seeds that settings were chosen on,
            other settings than the committed ones, settings committed after the run began, values missing, verdicts
            that do not follow from its samples; or the experiment's files are not in git as they are.
    """
    experiment = find_experiment(report["method"], report["claim"])
    card = catalog.get_card(report["method"])
    claim = next(c for c in card.claims if c.id == report["claim"])
    _check(report, experiment)
    commit = fixed_at(experiment, report["started"])
    budget = {"steps": experiment.steps, "tries": experiment.tries, "seconds": report["seconds"]}
    own = {"format": LEDGER_FORMAT, "settings_commit": commit, "paper": claim.paper_value, "budget": budget}
    entry = own | {key: value for key, value in report.items() if key not in ("format", "seconds", "caption")}
    path = ledger_file(card, claim)
    assert path is not None  # the claim has an experiment
    path.write_text(json.dumps(finite(entry), indent=1) + "\n", encoding="utf-8")
    return path


def _check(report: dict[str, Any], experiment: Experiment) -> None:
    """Raises `LedgerError` unless the report is whole and of the settings that stand in the experiment."""
    name = f"the report of {report['method']} {report['claim']}"
    if report["smoke"]:
        raise LedgerError(f"{name} is of a smoke run, which decides nothing; run without --fast")
    wanted = settings_sha256(dataclasses.asdict(experiment.settings))
    if not wanted == report["settings_sha256"] == settings_sha256(report["settings"]):
        raise LedgerError(
            f"{name} has settings {report['settings_sha256'][:12]}, the experiment has {wanted[:12]}; run it again"
        )
    seeds = set(report["seeds"])
    if len(seeds) < MIN_SEEDS:
        raise LedgerError(f"{name} has {len(seeds)} seeds; run {MIN_SEEDS} or more")
    if both := sorted(seeds & set(experiment.tuning_seeds)):
        raise LedgerError(f"{name} has seeds {both}, on which its settings were chosen; leave them out")
    if {len(values) for arm in samples_of(report).values() for values in arm.values()} != {len(report["seeds"])}:
        raise LedgerError(f"{name} does not have one value per seed of every metric; run it again")
    if plain(experiment.judge(samples_of(report), experiment.settings)) != finite(report["verdicts"]):
        raise LedgerError(f"{name} has verdicts that do not follow from its samples; run it again")


def plain(verdicts: list[Verdict]) -> Any:
    """Verdicts as they stand in a ledger."""
    return json.loads(json.dumps(finite([dataclasses.asdict(v) for v in verdicts])))


def fixed_at(experiment: Experiment, started: str) -> str:
    """The commit that last changed what fixes the experiment: the files of its settings, run and judge, its tuning
    (the claim's module may name it as `TUNING_FILE`; else ``tuning.json`` beside it).

    Raises:
        LedgerError: they are not in git, differ from what is committed, or were committed after `started` (ISO 8601).
    """
    modules = (type(experiment.settings).__module__, experiment.run.__module__, experiment.judge.__module__)
    claim = sys.modules[_claim_module(experiment)]
    files = [Path(str(claim.__file__))]
    files += [getattr(claim, "TUNING_FILE", files[0].with_name("tuning.json"))]
    files += [Path(str(sys.modules[m].__file__)) for m in modules]
    top = Path(_git(files[0].parent, "rev-parse", "--show-toplevel"))
    own = sorted({str(f.resolve()) for f in files if f.exists() and f.resolve().is_relative_to(top.resolve())})
    if changed := _git(top, "status", "--porcelain", "--", *own):
        raise LedgerError(f"commit the settings before the run; git says: {changed}")
    commit, date = _git(top, "log", "-1", "--format=%H %cI", "--", *own).split()
    if datetime.fromisoformat(date) > datetime.fromisoformat(started):
        raise LedgerError(f"the settings were committed at {date}, after the run began ({started}); run it again")
    return commit


def _claim_module(experiment: Experiment) -> str:
    claims = catalog.get_card(experiment.method).claims
    return str(next(c.experiment for c in claims if c.id == experiment.claim)).partition(":")[0]


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        said = getattr(exc, "stderr", "") or exc
        raise LedgerError(f"a ledger names the commit of its settings, and git cannot say it: {said}") from exc
    return done.stdout.strip()


# --- EVIDENCE.md ------------------------------------------------------------------------------------------------------

_HEAD = """# Evidence

Generated by `hfgen evidence render --out EVIDENCE.md` from the cards' claims and their ledgers (`ledger.json` beside each
`evidence.py`); a test compares the two. These are small experiments, made to be decided in minutes on a CPU: they show
whether a claim shows at that size, and rank nothing. `hfgen evidence run NAME` runs one again.

Verdicts are computed by checks that were fixed, with all settings, in the commit named. *reproduced*: all checks hold;
*partly*: some do; *not reproduced*: none does; *void*: the baseline never learnt, so the comparison says nothing;
*untested*: there is no ledger. A check holds when the whole interval is on the right side of its bound.
"""


def render(cards: Iterable[MethodCard]) -> str:
    """EVIDENCE.md: every claim of every card, those without a ledger as untested, and what monitors detect.

    A function of cards, ledgers and ``corpus/{detection,effects}.json`` alone.
    """
    cards = list(cards)
    rows, sections = ["| method | claim | arm | verdict | checks that hold | seeds |", "|---|---|---|---|---|---|"], []
    alike: dict[str, list[tuple[MethodCard, Ledger]]] = {}
    for card in cards:
        for claim in card.claims:
            ledger = current(card, claim)
            rows += [
                f"| {card.name} | {_cell(claim.statement)} | {' | '.join(map(_cell, row))} |" for row in summary(ledger)
            ]
            if not isinstance(ledger, str):
                sections.append(_section(card, claim, ledger))
                alike.setdefault(claim.id, []).append((card, ledger))
    sections = [_side_by_side(name, found) for name, found in alike.items() if len(found) > 1] + sections
    if any(card.kind == "callbacks" for card in cards):
        sections.append(monitors_section())
    return "\n".join([_HEAD, *rows, "", "\n\n".join(sections)]).rstrip("\n") + "\n"


def current(card: MethodCard, claim: Claim) -> Ledger | str:
    """The claim's ledger with ``stale``: whether its experiment's settings have changed since; or why there is none."""
    try:
        path = ledger_file(card, claim)
    except catalog.CatalogError as exc:  # what is wrong with one plugin must not hide the others' claims
        return f"untested ({exc})"
    if path is None or not path.is_file():
        return "untested"
    ledger = read_ledger(path)
    if (ledger["method"], ledger["claim"]) != (card.name, claim.id):
        raise LedgerError(f"{path} is of {ledger['method']} {ledger['claim']}, not of {card.name} {claim.id}; move it")
    wanted = settings_sha256(dataclasses.asdict(_experiment(claim).settings))
    return ledger | {"stale": ledger["settings_sha256"] != wanted}


def summary(ledger: Ledger | str) -> list[tuple[str, str, str, str]]:
    """(arm, verdict, checks that hold, seeds) of each arm that the claim is about; takes what `current` gives."""
    if isinstance(ledger, str):
        return [("", ledger, "", "")]
    labels, seeds = {a["id"]: a["label"] for a in ledger["arms"]}, str(len(ledger["seeds"]))
    found = []
    for verdict in ledger["verdicts"]:
        held = sum(check["outcome"] == "holds" for check in verdict["checks"])
        word = "untested (settings changed)" if ledger["stale"] else verdict["verdict"]
        found.append((labels[verdict["arm"]], word, f"{held} of {len(verdict['checks'])}", seeds))
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _side_by_side(claim: str, found: list[tuple[MethodCard, Ledger]]) -> str:
    """One table of a claim that several cards make under one id: every check with its figures, and the verdicts."""
    lines = [
        f"## {claim.replace('-', ' ').capitalize()}: {len(found)} methods in one table", "",
        "| method | verdict | check | mean difference | 95 % interval | bound | holds |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for card, ledger in found:
        for (label, word, _, _), verdict in zip(summary(ledger), ledger["verdicts"], strict=True):
            for check in verdict["checks"]:
                said, mean, ends, bound = figures(check)
                cells = (card.name if label.lower() == card.name else f"{card.name}, {label}", word, check["statement"])
                lines.append(f"| {' | '.join(map(_cell, cells))} | {mean} | {ends} | {bound} | {said} |")
    return "\n".join(lines)


def _section(card: MethodCard, claim: Claim, ledger: Ledger) -> str:
    """One claim: what the paper says, what came out check by check, every figure, the budget and the notes."""
    metrics = ledger["metrics"]
    lines = [f"## {card.name}: {claim.id}", "", f"{claim.statement}", ""]
    lines += [f"Paper: {ledger['paper']}." if ledger["paper"] else "Paper: no figure that we are sure of.", ""]
    lines += [ledger["statement"], ""]
    labels = {a["id"]: a["label"] for a in ledger["arms"]}
    for verdict in ledger["verdicts"]:
        lines.append(f"**{labels[verdict['arm']]}: {verdict['verdict']}** ({verdict['reason']})")
        lines += ["", *(f"- {sentence(check)}" for check in verdict["checks"]), ""]
    lines += ["| arm | " + " | ".join(_cell(m["label"]) for m in metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for arm in ledger["arms"]:
        cells = (show(m["unit"], arm["metrics"][m["key"]]) for m in metrics)
        row = " | ".join(f"{mean} ({ends})" if ends else mean for mean, ends in cells)
        lines.append(f"| {_cell(arm['label'])} | {row} |")
    budget, seeds = ledger["budget"], ", ".join(map(str, ledger["seeds"]))
    tries = {None: "tries not recorded", 0: "nothing tuned"}.get(budget["tries"])
    tries = tries or f"{budget['tries']} tries per arm on other seeds"
    lines += [
        "",
        f"Mean over seeds {seeds} ({ledger['interval']}). Budget: {budget['steps']} steps per run, {tries}, "
        f"{budget['seconds']:.0f} s in all. Settings fixed at {ledger['settings_commit'][:12]}, sha256 "
        f"{ledger['settings_sha256'][:12]}.",
        "",
        *(f"- {note}" for note in ledger["notes"]),
    ]
    return "\n".join(lines)
