"""Writes a report as ``report.json`` and as one self-contained ``report.html``: no script, nothing from elsewhere."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

from hfgen.pages import CHART_STYLE, COLOURS, inline_svg, page

from .experiment import finite

_MARKERS = "soD^vP"
_WORDS = {
    "reproduced": "The paper's claim holds here.",
    "partly": "A part of the paper's claim holds here.",
    "not reproduced": "The paper's claim does not hold here.",
    "void": "This comparison says nothing about the claim.",
    "untested": "Not decided.",
}


def write_report(report: dict[str, Any], out: Path) -> tuple[Path, Path]:
    """Writes `report` (see `run_experiment`) to ``out/report.json`` and ``out/report.html``; gives both paths.

    Numbers that JSON cannot hold (an interval without ends) become null.
    """
    out.mkdir(parents=True, exist_ok=True)
    data, page = out / "report.json", out / "report.html"
    data.write_text(json.dumps(finite(report), indent=1) + "\n", encoding="utf-8")
    page.write_text(render(report), encoding="utf-8")
    return data, page


def show(unit: str, found: dict[str, Any]) -> tuple[str, str]:
    """(mean, interval) of a metric as text, e.g. ("0.94", "0.88 to 1.00"), cut at 0 and, for shares, at 1.

    The interval is "" where it says nothing; the files keep the uncut numbers.
    """
    mean, low, high = found["mean"], max(found["low"], 0.0), found["high"]
    if unit == "count":
        return f"{mean:,.0f}", ""
    if unit == "s" and mean == 0:
        return "-", ""  # nothing was trained
    digits, end = {"s": (1, " s"), "number": (3, "")}.get(unit, (2, ""))
    ends = "one seed"
    if math.isfinite(high):
        ends = f"{low:.{digits}f} to {min(high, 1.0) if unit == 'share' else high:.{digits}f}"
    return f"{mean:.{digits}f}{end}", ends


def sentence(check: dict[str, Any]) -> str:
    """One check in plain words, with its interval."""
    said, mean, ends, bound = figures(check)
    return f"{check['statement']}: {said} ({mean}, interval {ends}, bound {bound})"


def figures(check: dict[str, Any]) -> tuple[str, str, str, str]:
    """(outcome, mean, interval, bound) of a check as text: two digits of its half width, 2 to 4 decimals."""
    said = {"holds": "yes", "fails": "no", "open": "not decided by these seeds"}[check["outcome"]]
    found = check["interval"]
    half = found["high"] - found["mean"]
    digits = min(4, max(2, 1 - math.floor(math.log10(half)))) if 0 < half < math.inf else 2
    mean, low, high, bound = (
        f"{round(x, digits) + 0.0:+.{digits}f}" for x in (found["mean"], found["low"], found["high"], check["bound"])
    )  # + 0.0: no minus sign before a zero
    return said, mean, f"{low} to {high}" if math.isfinite(found["low"]) else "one seed", bound


def render(report: dict[str, Any]) -> str:
    """The whole page as HTML text."""
    e = html.escape
    banner = '<p class="banner">Smoke run: too short to decide anything; no verdict.</p>' if report["smoke"] else ""
    notes = "".join(f"<li>{e(note)}</li>" for note in report["notes"])
    packages = ", ".join(f"{k} {v}" for k, v in report["environment"]["packages"].items())
    body = f"""<h1>{e(report["title"])}</h1>
<p class="lead">{e(report["statement"])}</p>{banner}
{_verdicts(report)}
<h2>At a glance</h2>
<figure>{chart(report)}<figcaption>{e(report["caption"])}</figcaption></figure>
<h2>Figures</h2>
{_table(report)}
<p class="small">Mean over seeds {e(", ".join(map(str, report["seeds"])))}; below it the {e(report["interval"])}.</p>
<h2>How to read this</h2><ul>{notes}</ul>
<details><summary>Settings, versions, machine</summary>
<pre>{e(json.dumps(report["settings"], indent=1))}</pre>
<p class="small">Settings sha256 {report["settings_sha256"]}. {e(packages)}.
Python {e(report["environment"]["python"])},
{e(report["environment"]["platform"])}, {report["environment"]["cpus"]} CPUs. Ran {report["seconds"]:.0f} s.</p>
</details>"""
    return page(report["title"], body, _CSS)


def _verdicts(report: dict[str, Any]) -> str:
    labels = {arm["id"]: arm["label"] for arm in report["arms"]}
    cards = []
    for item in report["verdicts"]:
        checks = "".join(
            f'<li class="{check["outcome"]}">{html.escape(sentence(check))}</li>' for check in item["checks"]
        )
        kind = item["verdict"].replace(" ", "-")
        cards.append(
            f'<section class="verdict {kind}"><h3>{html.escape(labels[item["arm"]])}: {item["verdict"]}</h3>'
            f"<p>{_WORDS[item['verdict']]} {html.escape(item['reason'])}.</p><ul>{checks}</ul></section>"
        )
    return f'<div class="verdicts">{"".join(cards)}</div>'


def _table(report: dict[str, Any]) -> str:
    head = "".join(
        f'<th scope="col" title="{html.escape(m["explanation"])}">{html.escape(m["label"])}</th>'
        for m in report["metrics"]
    )
    rows = []
    for arm, colour in zip(report["arms"], COLOURS, strict=False):
        cells = []
        for metric in report["metrics"]:
            mean, ends = show(metric["unit"], arm["metrics"][metric["key"]])
            cells.append(f"<td>{mean}<small>{ends}</small></td>")
        mark = f'<span class="dot" style="background:{colour}"></span>'
        rows.append(f'<tr><th scope="row">{mark}{html.escape(arm["label"])}</th>{"".join(cells)}</tr>')
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def chart(report: dict[str, Any]) -> str:
    """The chart as inline SVG: one panel per y metric over the x metric, arms with intervals, the base dashed."""
    import matplotlib
    from matplotlib.figure import Figure

    labels = {metric["key"]: metric["label"] for metric in report["metrics"]}
    x, ys = report["chart"]["x"], report["chart"]["y"]
    with matplotlib.rc_context(CHART_STYLE):
        figure = Figure(figsize=(4.7 * len(ys), 4.3), layout="constrained")
        panels = figure.subplots(1, len(ys), squeeze=False)[0]
        for panel, y in zip(panels, ys, strict=True):
            _panel(panel, report, x, y)
            panel.set_xlabel(labels[x])
            panel.set_title(labels[y], loc="left", fontsize=11, fontweight="bold")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
        return inline_svg(figure, ", ".join(labels[y] for y in ys))


def _panel(panel: Any, report: dict[str, Any], x: str, y: str) -> None:
    reference = report["arms"][0]["metrics"]
    panel.axhline(reference[y]["mean"], color=COLOURS[0], lw=1, ls=(0, (4, 3)), zorder=1)
    panel.axvline(reference[x]["mean"], color=COLOURS[0], lw=1, ls=(0, (4, 3)), zorder=1)
    for arm, colour, marker in zip(report["arms"], COLOURS, _MARKERS, strict=False):
        ax, ay = arm["metrics"][x], arm["metrics"][y]
        panel.scatter(ax["values"], ay["values"], s=18, color=colour, alpha=0.35, marker=marker, lw=0, zorder=2)
        panel.errorbar(
            ax["mean"], ay["mean"], xerr=_reach(ax), yerr=_reach(ay), fmt=marker, color=colour, ms=9, capsize=3,
            elinewidth=1.6, label=arm["label"], zorder=3, clip_on=False,
        )  # fmt: skip
    for metric in report["metrics"]:
        if metric["unit"] == "share" and metric["key"] == x:
            panel.set_xlim(-0.05, 1.05)
        if metric["unit"] == "share" and metric["key"] == y:
            panel.set_ylim(-0.05, 1.05)
    panel.grid(color="#e5e7eb", lw=0.8)
    panel.set_axisbelow(True)


def _reach(found: dict[str, Any]) -> list[list[float]]:
    """Error-bar lengths down and up, none for one seed; the axes of shares end a little outside 0 and 1."""
    if not math.isfinite(found["low"]):
        return [[0.0], [0.0]]
    return [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]


_CSS = """
.banner{background:#fef3c7;border:1px solid #f59e0b;border-radius:8px;padding:.6rem .9rem;font-weight:600}
.verdicts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(20rem,1fr))}
.verdict{border:1px solid var(--line);border-left:6px solid var(--soft);border-radius:8px;padding:.9rem 1.1rem}
.verdict p{margin:.25rem 0}.verdict ul{margin:.4rem 0 0;padding:0;list-style:none;font-size:.88rem}
.verdict li{padding-left:1.5em;text-indent:-1.5em;margin:.25rem 0}
li.holds::before{content:"\\2713\\00a0\\00a0";color:#15803d;font-weight:700}
li.fails::before{content:"\\2717\\00a0\\00a0";color:#b91c1c;font-weight:700}
li.open::before{content:"?\\00a0\\00a0";color:#a16207;font-weight:700}
.reproduced{border-left-color:#15803d}.partly{border-left-color:#d97706}.not-reproduced{border-left-color:#b91c1c}
"""
