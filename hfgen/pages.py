"""What the pages hfgen writes have in common: one self-contained HTML file, no script, nothing from elsewhere."""

from __future__ import annotations

import html
import io
import re
from typing import Any

COLOURS = ("#6b7280", "#c2410c", "#0f766e", "#4338ca", "#a16207", "#be185d")
CHART_STYLE = {
    "svg.fonttype": "path", "svg.hashsalt": "hfgen", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def page(title: str, body: str, css: str = "") -> str:
    """A whole page; `body` is HTML, `title` is text."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{CSS}{css}</style></head><body><main>
{body}</main></body></html>
"""


def inline_svg(figure: Any, label: str) -> str:
    """A matplotlib figure as an <svg> element that names no address; `label` is read to those who cannot see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])  # HTML needs none
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


CSS = """
:root{--ink:#111827;--soft:#4b5563;--line:#e5e7eb}
*{box-sizing:border-box}body{margin:0;background:#f9fafb;color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
main{max-width:62rem;margin:2rem auto;padding:2rem 2.5rem;background:#fff}
main{border:1px solid var(--line);border-radius:12px}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .5rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
h3{margin:0;font-size:1.05rem}
.lead{color:var(--soft);margin:0 0 1.2rem}.small,figcaption{color:var(--soft);font-size:.85rem}
figure{margin:0}figure svg{width:100%;height:auto}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.5rem .7rem;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child{text-align:left;white-space:nowrap}thead th{font-size:.82rem;color:var(--soft);vertical-align:bottom}
td,td small{white-space:nowrap}td small{display:block;color:var(--soft);font-size:.75rem}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.5em}
pre{background:#f3f4f6;padding:1rem;border-radius:8px;overflow-x:auto;font-size:.8rem}
@media(max-width:40rem){main{margin:0;padding:1.2rem;border:0;border-radius:0}}
@media print{body{background:#fff}main{border:0;margin:0}}
"""
