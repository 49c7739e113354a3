"""IncreLoRA against its cousins: AdaLoRA, which starts with more rank and prunes, and LoRA, at one final budget.

The learning rates in `SETTINGS` were chosen, and written to ``tuning.json`` beside this file, by

    python -m hfgen_plugins.adapters.increlora.evidence tune
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hfgen.evidence import Experiment, cousins, tuning

SETTINGS = cousins.Settings(
    method="increlora",
    arms={
        "lora": {"label": "LoRA", "config": "LoraConfig", "options": {"r": 2, "lora_alpha": 16}},
        # init_r = 1.5 target_r as in peft's defaults; pruned from a tenth of the steps to three tenths before the end
        "adalora": {
            "label": "AdaLoRA", "config": "AdaLoraConfig", "options": {"init_r": 3, "target_r": 2, "lora_alpha": 16},
            "shares": {"total_step": 1.0, "tinit": 0.1, "tfinal": 0.3, "deltaT": 0.03},
        },
        "increlora": {"label": "IncreLoRA", "config": "increlora", "options": {"target_r": 2, "lora_alpha": 16}},
    },
    claims=(("lora", "new", 0.0), ("lora", "kept", -0.02), ("adalora", "new", 0.0), ("adalora", "kept", -0.02)),
    equal=("lora", "adalora"),
    tolerance=1.35,
    rates={
        "images/lora": 1e-2, "images/adalora": 1e-2, "images/increlora": 3e-2,
        "language/lora": 1e-2, "language/adalora": 3e-2, "language/increlora": 3e-2,
    },
)  # fmt: skip
TUNING_FILE = Path(__file__).with_name("tuning.json")

EXPERIMENT = Experiment(
    title="IncreLoRA against LoRA and AdaLoRA: what is learnt, what is kept",
    statement=(
        "Tested claim: with the same sum of ranks at the end IncreLoRA learns the new task at least as well as LoRA and as "
        "AdaLoRA, and keeps at most 0.02 less of the old one, on both tasks."
    ),
    **cousins.parts(
        SETTINGS,
        (
            "The budget is the sum of ranks at the end, 2 per module, as in both papers; layers differ in size, so trained "
            "numbers differ by where the ranks went (void above a factor of 1.35). Before that IncreLoRA also trains its "
            "reserve, and AdaLoRA starts with rank 3 per module.",
            "IncreLoRA's schedule is its own default (from rank 1, the budget spent in half of the steps); AdaLoRA gets "
            "peft's update call after each step, prunes between a tenth and seven tenths of the steps, and has its own "
            "orthogonality term. alpha is 16 in all three.",
        ),
    ),
)


def tune(workers: int = 2) -> dict[str, Any]:
    """The table of ``tuning.json``."""
    return cousins.tune(dataclasses.replace(SETTINGS, rates={}), workers=workers)


if __name__ == "__main__":
    tuning.main(tune, TUNING_FILE)
