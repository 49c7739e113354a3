"""SoMA against its cousins: PiSSA, which trains the largest components, MiCA, which shares the smallest ones' side.

The learning rates in `SETTINGS` were chosen, and written to ``tuning.json`` beside this file, by

    python -m hfgen_plugins.adapters.soma.evidence tune
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hfgen.evidence import Experiment, cousins, tuning


def _lora(label: str, start: Any, **by_task: dict[str, int]) -> dict[str, Any]:
    return {
        "label": label, "config": "LoraConfig", "options": {"r": 4, "lora_alpha": 4, "init_lora_weights": start}, **by_task,
    }  # fmt: skip


SETTINGS = cousins.Settings(
    method="soma",
    arms={
        "lora": _lora("LoRA", True),
        "pissa": _lora("PiSSA", "pissa"),
        # MiCA trains A alone: rank 8 and 9 give it as many numbers as rank 4 gives the others
        "mica": _lora("MiCA", "mica", images={"r": 8, "lora_alpha": 8}, language={"r": 9, "lora_alpha": 9}),
        "soma": {"label": "SoMA", "config": "soma", "options": {"r": 4}},
    },
    claims=(("pissa", "new", -0.02), ("pissa", "kept", 0.0), ("mica", "new", -0.02), ("mica", "kept", 0.0)),
    equal=("lora", "pissa", "mica"),
    tolerance=1.03,
    rates={
        "images/lora": 1e-2, "images/pissa": 1e-2, "images/mica": 3e-2, "images/soma": 1e-2,
        "language/lora": 3e-2, "language/pissa": 1e-2, "language/mica": 3e-2, "language/soma": 3e-2,
    },
)  # fmt: skip
TUNING_FILE = Path(__file__).with_name("tuning.json")

EXPERIMENT = Experiment(
    title="SoMA against PiSSA and MiCA: what is learnt, what is kept",
    statement=(
        "Tested claim: with as many trained numbers SoMA learns the new task at most 0.02 less well than PiSSA and than "
        "MiCA, and keeps at least as much of the old one, on both tasks."
    ),
    **cousins.parts(
        SETTINGS,
        (
            "SoMA, PiSSA and LoRA have rank 4 and alpha = r. peft's MiCA trains one of its two factors, so it has rank 8 "
            "(language: 9) for as many trained numbers.",
            "SoMA brings its annealed weight decay (0.05 to 1e-5), the others have none. No block is frozen: there are "
            "two. LoRA is there for the reader; no check looks at it.",
        ),
    ),
)


def tune(workers: int = 2) -> dict[str, Any]:
    """The table of ``tuning.json``."""
    return cousins.tune(dataclasses.replace(SETTINGS, rates={}), workers=workers)


if __name__ == "__main__":
    tuning.main(tune, TUNING_FILE)
