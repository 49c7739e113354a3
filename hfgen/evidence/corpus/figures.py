"""Detection figures of the monitors: thresholds chosen on one half of the shipped runs, counted on the other."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import json
import lzma
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CORPUS, FIGURES, EFFECTS = (HERE / name for name in ("corpus.jsonl.xz", "detection.json", "effects.json"))
HEALTHY = "healthy"
ALLOWED = 0.01  # false alarms in the calibration half that a threshold may have
NEAR = 0.1  # of the run: how early a finding may come, and how far off its step may be, to be right
Record = dict[str, Any]


def read_corpus(path: Path = CORPUS) -> list[Record]:
    """All shipped runs in the order of the labels: label, number, attempt, step, config, log and the monitors' rows."""
    return [json.loads(text) for text in lzma.decompress(path.read_bytes()).decode().splitlines()]


def read_figures() -> dict[str, Any]:
    """The published detection figures."""
    return dict(json.loads(FIGURES.read_text(encoding="utf-8")))


def read_effects() -> dict[str, Any]:
    """The published figures of callbacks that name no trouble."""
    return dict(json.loads(EFFECTS.read_text(encoding="utf-8")))


def halves(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """(calibration, reported): of each label half the runs, by the order of the SHA-256 of label and number."""
    parts: tuple[list[Record], list[Record]] = ([], [])
    for label in dict.fromkeys(record["label"] for record in records):
        own = sorted((r for r in records if r["label"] == label), key=lambda r: _digest(f"{label} {r['number']}"))
        parts[0].extend(own[: len(own) // 2])
        parts[1].extend(own[len(own) // 2 :])
    return parts


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def share(hits: int, count: int) -> dict[str, float]:
    """A share with its exact 95 % interval (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0
    return {"hits": hits, "of": count, "low": round(low, 4), "high": round(high, 4)}


def area(points: Sequence[tuple[float, float]]) -> float:
    """Area under the ROC curve through (false, true) rates and the corners, by trapezoids."""
    curve = sorted({(0.0, 0.0), *points, (1.0, 1.0)})
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(curve))


def hit(found: Sequence[Mapping[str, Any]], kinds: Sequence[str], record: Record) -> Mapping[str, Any] | None:
    """The first finding of one of `kinds` (in any set), unless it was said long before the label set in."""
    early = record["step"] - NEAR * record["config"]["steps"]
    return next((f for f in found if f["kind"].partition("/")[0] in kinds and f["noticed"] >= early), None)


def alarm(found: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> bool:
    """Whether there is a finding of one of `kinds`."""
    return any(f["kind"].partition("/")[0] in kinds for f in found)


Replayed = Callable[..., list[dict[str, Any]]]


def detection(
    name: str, entry: Mapping[str, Any], records: Sequence[Sequence[Record]], replayed: Replayed, default: float
) -> dict[str, Any]:
    """One row of the table: ROC over both halves, the threshold of the calibration half, its figures on the other.

    Args:
        name: The monitor's.
        entry: ``label``, ``kinds`` of finding, ``argument`` that is the threshold, ``grid`` of its values, and
            perhaps ``onset``: only runs whose label sets in at their ``start``, or ``later``.
        records: The two halves; of them count those that the monitor was attached to.
        replayed: ``replayed(record, value=value)``: its findings with the threshold at `value`.
        default: The monitor's own threshold, which is kept where no other does better.
    """
    label, kinds, onset = entry["label"], entry["kinds"], entry.get("onset")
    calibration, reported = (
        [
            r for r in half
            if name in r["rows"] and (r["label"] == HEALTHY or (r["label"] == label and onset in (None, _onset(r))))
        ]
        for half in records
    )  # fmt: skip
    rates: dict[float, tuple[float, float]] = {}
    roc: list[tuple[float, float]] = []
    for value in entry["grid"]:
        found = functools.partial(replayed, value=value)
        both = [_counts(half, label, kinds, found) for half in (calibration, reported)]
        rates[value] = both[0][0] / both[0][1], both[0][2] / both[0][3]
        false, healthy, true, ill = (a + b for a, b in zip(*both, strict=True))
        roc.append((round(false / healthy, 4), round(true / ill, 4)))
    fewest = max(ALLOWED, min(false for false, _ in rates.values()))
    best = max(true for false, true in rates.values() if false <= fewest)
    equal = [value for value, (false, true) in rates.items() if false <= fewest and true == best]
    chosen = default if default in equal else equal[(len(equal) - 1) // 2]
    return {
        "monitor": name, "label": ", ".join([label, *([entry["onset"]] if "onset" in entry else [])]),
        "finding": " or ".join(kinds), "argument": entry["argument"], "threshold": chosen, "default": default,
        "auc": round(area(roc), 4), "roc": [list(p) for p in roc],
    } | reported_at(reported, label, kinds, functools.partial(replayed, value=chosen))  # fmt: skip


def _onset(record: Record) -> str:
    return "later" if record["step"] else "start"


def _counts(
    records: Sequence[Record], label: str, kinds: Sequence[str], found: Callable[[Record], Any]
) -> tuple[int, int, int, int]:
    """False alarms, healthy runs, detected runs, runs with the label."""
    healthy, ill = ([r for r in records if r["label"] == wanted] for wanted in (HEALTHY, label))
    false = sum(alarm(found(r), kinds) for r in healthy)
    return false, len(healthy), sum(hit(found(r), kinds, r) is not None for r in ill), len(ill)


def reported_at(
    reported: Sequence[Record], label: str, kinds: Sequence[str], found: Callable[[Record], list[dict[str, Any]]]
) -> dict[str, Any]:
    """False alarms and detections with their intervals, how late they came and how far off their steps are."""
    false, healthy, true, ill = _counts(reported, label, kinds, found)
    hits = [(hit(found(r), kinds, r), r) for r in reported if r["label"] == label]
    shown = [(f, r["step"], r["config"]["steps"]) for f, r in hits if f is not None]

    def middle(values: list[float]) -> float | None:
        return round(statistics.median(values), 4) if values else None

    return {
        "false_alarms": share(false, healthy), "detected": share(true, ill),
        "delay": middle([(f["noticed"] - step) / steps for f, step, steps in shown]),
        "left": middle([1 - f["noticed"] / steps for f, _, steps in shown]),
        "near": sum(abs(f["step"] - step) <= NEAR * steps for f, step, steps in shown),
    }  # fmt: skip


def make_figures(records: Sequence[Record] | None = None) -> dict[str, Any]:
    """All figures, from the shipped runs alone; about two minutes, imports torch."""
    from hfgen import catalog

    from .replay import replay
    from .train import MONITORS

    records = read_corpus() if records is None else records
    parts, rows = halves(records), []

    @functools.cache
    def found(name: str, argument: str, value: float, label: str, number: int) -> list[dict[str, Any]]:
        return replay(runs[label, number], {name: {argument: value}}, name)[name]

    runs = {(record["label"], record["number"]): record for record in records}
    for name, spec in MONITORS.items():
        parameters = inspect.signature(catalog.load(name, "callbacks").__init__).parameters
        for entry in spec["detects"]:

            def replayed(record: Record, value: float, of: tuple[str, str] = (name, entry["argument"])) -> list[Any]:
                return found(*of, value, record["label"], record["number"])

            rows.append(detection(name, entry, parts, replayed, parameters[entry["argument"]].default))
    counts = {label: sum(r["label"] == label for r in records) for label in dict.fromkeys(r["label"] for r in records)}
    return {
        "format": 1, "runs": counts, "again": sum(r["attempt"] for r in records), "rows": rows,
        "together": together(parts[1]), "curves": coverage(parts[1]),
    }  # fmt: skip


def together(reported: Sequence[Record]) -> dict[str, Any]:
    """Healthy reported runs with a warning of any kind by any monitor at its defaults, and how often each kind."""
    from .replay import replay

    kinds: dict[str, int] = {}
    hits, runs = 0, [record for record in reported if record["label"] == HEALTHY]
    for record in runs:
        found = {
            f["kind"].partition("/")[0] for made in replay(record).values() for f in made if f["level"] == "WARNING"
        }
        hits += bool(found)
        for kind in found:
            kinds[kind] = kinds.get(kind, 0) + 1
    return share(hits, len(runs)) | {"kinds": dict(sorted(kinds.items()))}


def coverage(reported: Sequence[Record]) -> dict[str, Any]:
    """How often learning_curve's interval holds the value that a healthy run of constant rate ends with.

    Returns:
        ``held``: shares by when it was predicted (``half``, ``two thirds`` of the run), and whether the ``same`` data were
        trained on throughout or ``changed`` in mid-run; ``enough``: share of runs whose rest was called not worth it.
    """
    from .replay import driven
    from .train import MONITORS

    name = next(name for name, entry in MONITORS.items() if entry.get("figure") == "coverage")
    held: dict[str, list[bool]] = {f"{at}, {data}": [] for at in ("half", "two thirds") for data in ("same", "changed")}
    enough: list[bool] = []
    for record in reported:
        config = record["config"]
        if (record["label"], config["schedule"]) != (HEALTHY, "constant") or name not in record["rows"]:
            continue
        monitor = driven(record, only=name)[name]
        enough.append(bool(monitor.findings))
        for at, part in (("half", 1 / 2), ("two thirds", 2 / 3)):
            made = [r for r in monitor.history if "predicted" in r and r["step"] <= part * config["steps"]]
            if made:
                inside = made[-1]["low"] <= monitor.history[-1]["value"] <= made[-1]["high"]
                held[f"{at}, {'changed' if config['boundary'] else 'same'}"].append(inside)
    shares = {when: share(sum(hits), len(hits)) for when, hits in held.items()}
    return {"held": shares, "enough": share(sum(enough), len(enough))}


# --- in EVIDENCE.md ---------------------------------------------------------------------------------------------------


def section() -> str:
    """What EVIDENCE.md says of the monitors: a function of ``detection.json`` and ``effects.json`` alone."""
    figures = read_figures()
    counts = ", ".join(f"{n} {label}" for label, n in figures["runs"].items())
    lines = [
        "## Monitors: false alarms and detections", "",
        f"{sum(figures['runs'].values())} labelled tiny runs ({counts}) of a stock Trainer with the monitors attached; "
        "`python -m hfgen.evidence.corpus make` makes them again. A label says what was done to the run, and the step at "
        "which it sets in is measured on rows that no monitor sees; runs whose truth denied their label were drawn again "
        f"({figures['again']} times). Thresholds were chosen on one half (at most {ALLOWED:.0%} false alarms there, then "
        "most detections; of equals the default), all counts are of the other half, with exact 95 % intervals; healthy "
        "runs that a monitor was not attached to (no earlier skill, no tasks) are not counted for it. AUC: over a grid of "
        "thresholds, both halves. Late: from the step at which the label sets in to the finding, share of the run "
        "(median); left: of the run after it; near: findings whose step is within 10 % of the run of the truth.",
        "",
        "Some rules were settled while looking at the runs made until then, so at part of the reported half too, and are "
        "not blind: the floors of 0.03 nats of a rise and of 0.1 nats of a spike, the 2 nats of a divergence at once and "
        "its window of 20 losses, the gain of 1 nat, and softmax_collapse's 0.2 (equal detections, found earlier). No "
        "monitor names label noise; at best it is seen as overfitting. Tiny runs: what holds here need not hold for yours.",
        "",
        "| monitor | finding | label | threshold | AUC | false alarms | detected | late | left | near |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in figures["rows"]:
        cells = [row["monitor"], row["finding"], row["label"], _threshold(row)]
        cells += [f"{row['auc']:.3f}", _share(row["false_alarms"]), _share(row["detected"])]
        cells += ["-" if row[key] is None else f"{row[key]:.0%}" for key in ("delay", "left")]
        lines.append(f"| {' | '.join(cells)} | {row['near']}/{row['detected']['hits']} |")
    kinds = ", ".join(f"{kind} {n}" for kind, n in figures["together"]["kinds"].items()) or "none"
    held = figures["curves"]["held"]
    lines += [
        "",
        f"- All monitors at their defaults together: {_share(figures['together'])} healthy reported runs have a warning of "
        f"any kind ({kinds}).",
        "- Learning curves: healthy reported runs at a constant rate end within learning_curve's 95 % prediction interval, "
        f"predicted at half of the run: {_share(held['half, same'])} of those with the same data throughout, "
        f"{_share(held['half, changed'])} of those whose data change in mid-run; at two thirds: "
        f"{_share(held['two thirds, same'])} and {_share(held['two thirds, changed'])}. It holds less than 95 % early in a "
        "run: tiny runs begin slowly, as no power law does, and what came before a change of data misleads. How it is made "
        f"wider was settled on the other half. {_share(figures['curves']['enough'])} were told to stop.",
        *_effects(read_effects()),
    ]
    return "\n".join(lines)


def _effects(effects: Mapping[str, Any]) -> list[str]:
    """Lines on soup and data_diet, which name no trouble: `python -m hfgen.evidence.corpus effects` makes their figures."""
    lines = []
    for label, row in effects["averages"].items():
        change = {key: f"{value:+.1%}" for key, value in row["change"].items()}
        lines.append(
            f"- soup (greedy, its defaults), {row['better']['of']} new runs drawn as those labelled {label}: worse than "
            f"its best member on the gate rows {_share(row['worse_on_gate'])}; of more than one member at the end "
            f"{_share(row['mixed'])}; on fresh rows better than the best member {_share(row['better'])}, loss changed by "
            f"{change['mean']} ({change['low']} to {change['high']})."
        )
    diet = effects["ranks"]
    scores = ", ".join(
        f"{score} {diet[score]['mean']:.3f} ({diet[score]['low']:.3f} to {diet[score]['high']:.3f})"
        for score in ("el2n", "forgetting_events")
    )
    lines.append(
        f"- data_diet (share=1.0: all rows, or nearly, at each of 16 evaluations), {diet['runs']} new runs with 20 % to "
        f"40 % of the labels drawn anew: AUROC of its scores for labels that came out wrong: {scores}; rows never learnt "
        "count as forgotten most. Means over runs with 95 % intervals. Both: `python -m hfgen.evidence.corpus effects`."
    )
    return lines


def _threshold(row: Mapping[str, Any]) -> str:
    other = "" if row["threshold"] == row["default"] else f" (default {row['default']:g})"
    return f"{row['argument']} {row['threshold']:g}{other}"


def _share(found: Mapping[str, Any]) -> str:
    return f"{found['hits']}/{found['of']} ({found['low']:.1%} to {found['high']:.1%})"
