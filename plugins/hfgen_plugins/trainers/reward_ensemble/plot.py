"""The curves of the claim's ledger as a picture: `python -m hfgen_plugins.trainers.reward_ensemble.plot`.

Gold of the best of n against the bound of the KL divergence, one panel for members with backbones of their own, one for
members that start from one backbone, one for the design without label noise. Bands are 95 % intervals over seeds.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .evidence import NS

HERE = Path(__file__).parent
PANELS = {
    "25 % label noise, own backbones": ("single", "mean", "wco", "uwo"),
    "25 % label noise, one backbone": ("single", "mean_one_start", "wco_one_start", "uwo_one_start", "wco_heads"),
    "no label noise, own backbones": ("single_clean", "mean_clean", "wco_clean", "uwo_clean"),
}
_STYLES = {
    "single": ("#374151", "one reward model"), "mean": ("#c2410c", "mean of 5"), "wco": ("#0f766e", "WCO of 5"),
    "uwo": ("#4338ca", "UWO of 5"), "wco_heads": ("#a16207", "WCO of 5 heads"),
}  # fmt: skip


def draw(ledger: dict[str, Any]) -> str:
    """The picture as SVG text; the same bytes for the same ledger."""
    import io

    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    arms = {arm["id"]: arm["metrics"] for arm in ledger["arms"]}
    kl = np.log(NS) - (np.array(NS) - 1) / np.array(NS)
    style = {"svg.fonttype": "path", "svg.hashsalt": "hfgen", "font.size": 9, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10.5, 3.9), layout="constrained")
        panels = figure.subplots(1, len(PANELS), sharey=True)
        for panel, (title, names) in zip(panels, PANELS.items(), strict=True):
            for name in names:
                colour, label = _STYLES[name if name in _STYLES else name.partition("_")[0]]
                mean, low, high = (
                    np.array([arms[name][f"gold_{n}"][part] for n in NS]) for part in ("mean", "low", "high")
                )
                panel.plot(kl, mean, color=colour, marker="o", ms=3, label=label)
                panel.fill_between(kl, low, high, color=colour, alpha=0.15, lw=0)
            panel.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
            panel.axhline(0, color="#9ca3af", lw=0.8)
            panel.grid(color="#e5e7eb", lw=0.8)
            panel.set_axisbelow(True)
            above = panel.secondary_xaxis("top")
            above.set_xticks(kl[[0, *range(2, len(NS) - 1)]], [str(n) for n in (NS[0], *NS[2:-1])], fontsize=7)
        panels[0].set_ylabel("gold reward of the best of n\n(standard deviations)")
        panels[1].set_xlabel("log n - (n - 1)/n, nats; above: n")
        handles, labels = panels[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)


if __name__ == "__main__":
    found = json.loads((HERE / "ledger.json").read_text(encoding="utf-8"))
    (HERE / "curves.svg").write_text(draw(found), encoding="utf-8")
    print(f"written: {HERE / 'curves.svg'}")
