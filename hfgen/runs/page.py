"""The page of `hfgen report`: findings in sentences first, then curves, then the runs side by side."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from hfgen.pages import CHART_STYLE, COLOURS, inline_svg, page

from .read import Finding, Run

POINTS = 400  # of a curve on the page; of each stretch beyond that the lowest and the highest value are kept
PANELS = 24
_NAMES = {"loss": "training loss", "grad_norm": "gradient norm", "learning_rate": "learning rate"}
_LEFT_OUT = ("runtime", "samples_per_second", "steps_per_second", "/step", "total_flos", "num_input_tokens_seen")


def render(runs: Sequence[Run]) -> str:
    """The whole page about one or several runs as HTML text: no script, no address, about 100 kB."""
    names = ", ".join(run.name for run in runs)
    title = f"Run {names}" if len(runs) == 1 else f"{len(runs)} runs: {names}"
    shown = _panels(runs)
    left = [key for key in _keys(runs) if key not in shown]
    body = f"<h1>{html.escape(title)}</h1><p class='lead'>{html.escape(_lead(runs))}</p>"
    body += "".join(_section(run, several=len(runs) > 1) for run in runs)
    if shown:
        caption = f"<figcaption>{html.escape(_caption(runs))}</figcaption>"
        body += f"<h2>Curves</h2><figure>{_charts(runs, shown)}{caption}</figure>"
    if left:
        body += f"<p class='small'>Logged, not drawn: {html.escape(', '.join(left))}.</p>"
    body += f"<h2>{'Figures' if len(runs) == 1 else 'Side by side'}</h2>{_table(runs)}"
    return page(title, body, _CSS)


def _lead(runs: Sequence[Run]) -> str:
    found = sum(len(run.findings) for run in runs)
    if not any(run.rows for run in runs):
        return "No log was found."
    if not found:
        return "No finding. That says what the monitors of these runs looked for; it is no proof that all is well."
    return f"{found} finding{'s' if found > 1 else ''}, the surest first, what follows from others last."


def _caption(runs: Sequence[Run]) -> str:
    marks = " Dashed lines mark the steps of findings." if any(run.findings for run in runs) else ""
    return f"Over optimizer steps.{marks}"


def _section(run: Run, several: bool) -> str:
    e = html.escape
    parts = [f"<h2>{e(run.name)}</h2>"] if several else []
    end = f" of {run.max_steps:,}" if run.max_steps else ""
    if run.rows or run.step:
        state = "finished" if run.finished else "did not finish, as far as its files say,"
        parts.append(f"<p>The run {state} at step {run.step:,}{end}.</p>")
    parts += [f"<p class='problem'>{e(problem)}</p>" for problem in run.problems]
    parts += [_card(finding, run.max_steps) for finding in run.findings]
    return "".join(parts)


def _card(finding: Finding, max_steps: int) -> str:
    e = html.escape
    place = f"since step {finding.step:,}" + (f", {finding.step / max_steps:.0%} of the run" if max_steps else "")
    place += f"; noticed at step {finding.noticed:,}" if finding.noticed > finding.step else ""
    kind = "finding" if finding.trouble else "finding fine"
    advice = f"<p><b>Try next:</b> {e(finding.advice)}</p>" if finding.advice else ""
    return (
        f"<section class='{kind}'><h3>{e(finding.kind.replace('_', ' '))}</h3><p>{e(finding.sentence)}</p>{advice}"
        f"<p class='small'>{e(place)}; how sure: {sure(finding.confidence)}; said by {e(finding.source)}</p></section>"
    )


def sure(confidence: float) -> str:
    """A confidence in words of at most two digits: what is not certain is not called 100 %."""
    return ">99%" if 0.995 <= confidence < 1 else f"{confidence:.0%}"


def _keys(runs: Sequence[Run]) -> list[str]:
    seen = {key: None for run in runs for key in run.keys() if not key.endswith(_LEFT_OUT)}  # noqa: SIM118
    return list(seen)


def _panels(runs: Sequence[Run]) -> list[str]:
    """The keys that are drawn, in order: loss, evaluation, the host's other numbers, the callbacks'."""

    def order(key: str) -> tuple[int, int]:
        groups = (key == "loss", key.startswith("eval_") and key.endswith("loss"), key.startswith("eval_"))
        return next((i for i, yes in enumerate(groups) if yes), 4 if key.startswith("hfgen/") else 3), keys.index(key)

    keys = _keys(runs)
    drawn = [key for key in keys if any(len(run.curve(key)[0]) > 1 for run in runs)]
    return sorted(drawn, key=order)[:PANELS]


def _thin(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """At most about POINTS points, with the extremes of what is left out."""
    if len(steps) <= POINTS:
        return steps, values
    size = -(-2 * len(steps) // POINTS)
    kept: set[int] = {0, len(steps) - 1}
    for start in range(0, len(steps), size):
        part = range(start, min(start + size, len(steps)))
        kept |= {min(part, key=values.__getitem__), max(part, key=values.__getitem__)}
    index = sorted(kept)
    return [steps[i] for i in index], [values[i] for i in index]


def _charts(runs: Sequence[Run], keys: list[str]) -> str:
    """One figure per number, side by side where there is room, and whose line is whose."""
    import matplotlib
    from matplotlib.figure import Figure

    found = []
    with matplotlib.rc_context(CHART_STYLE):
        for key in keys:
            figure = Figure(figsize=(4.9, 2.7), layout="constrained")
            _panel(figure.subplots(), runs, key)
            found.append(inline_svg(figure, _NAMES.get(key, key)))
    legend = "".join(f"<span>{_dot(i)}{html.escape(run.name)}</span>" for i, run in enumerate(runs) if len(runs) > 1)
    return f"<div class='legend'>{legend}</div><div class='charts'>{''.join(found)}</div>"


def _panel(panel: Any, runs: Sequence[Run], key: str) -> None:
    for i, run in enumerate(runs):
        steps, values = _thin(*run.curve(key))
        panel.plot(steps, values, color=_colour(i), lw=1.5, marker="." if len(steps) < 30 else None)
        for step in {finding.step for finding in run.findings}:
            panel.axvline(step, color=_colour(i), lw=0.9, ls=(0, (4, 3)), alpha=0.6)
    panel.set_title(_NAMES.get(key, key), loc="left", fontsize=10, fontweight="bold")
    panel.grid(color="#e5e7eb", lw=0.8)
    panel.set_axisbelow(True)
    panel.locator_params(axis="x", integer=True, nbins=6)


def _colour(i: int) -> str:
    return COLOURS[1:][i % (len(COLOURS) - 1)]


def _dot(i: int) -> str:
    return f'<span class="dot" style="background:{_colour(i)}"></span>'


def _table(runs: Sequence[Run]) -> str:
    """Last and best value of the losses and evaluation metrics; runs are columns."""
    e = html.escape
    head = "".join(f'<th scope="col">{_dot(i)}{e(run.name)}</th>' for i, run in enumerate(runs))
    keys = [key for key in _keys(runs) if key == "loss" or key.startswith("eval_")]
    rows = [("steps", [f"{r.step:,}" for r in runs])]
    rows += [("minutes of training", [_figure(r.totals.get("train_runtime", 0) / 60 or None) for r in runs])]
    for key in keys:
        cells = []
        for run in runs:
            steps, values = run.curve(key)
            if not values:
                cells.append("-")
                continue
            best = min if "loss" in key else max
            at = values.index(best(values))
            cells.append(
                f"{_figure(values[-1])}<small>{best.__name__} {_figure(values[at])} at step {steps[at]:,}</small>"
            )
        rows.append((e(_NAMES.get(key, key)), cells))
    lines = "".join(f"<tr><th scope='row'>{n}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>" for n, cells in rows)
    return f"<div class='scroll'><table><thead><tr><th></th>{head}</tr></thead><tbody>{lines}</tbody></table></div>"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


_CSS = """
.finding{border:1px solid var(--line);border-left:6px solid #b91c1c;border-radius:8px;padding:.9rem 1.1rem;margin:0 0 1rem}
.fine{border-left-color:#15803d}.finding p{margin:.3rem 0}
.problem{background:#fef3c7;border:1px solid #f59e0b;border-radius:8px;padding:.6rem .9rem;overflow-wrap:anywhere}
.charts{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr))}
.legend span{margin-right:1.2rem;white-space:nowrap}
@media(max-width:40rem){th:first-child{white-space:normal}th,td{padding:.4rem .3rem}}
h1,h2,.lead{overflow-wrap:anywhere}
"""
