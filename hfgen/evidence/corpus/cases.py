"""What is done to each run of the corpus: settings drawn from its label and number, plain data, stdlib only."""

from __future__ import annotations

import random
from typing import Any

COUNTS = {
    "healthy": 300, "overfit": 30, "grokked": 30, "softmax collapsed": 30, "loss spike": 30, "rate too high": 30,
    "noisy labels": 30, "task switch": 30, "forgets": 30,
}  # fmt: skip
Config = dict[str, Any]


def plan() -> list[tuple[str, int]]:
    """(label, number) of every run, the labels mixed, so that a part of the plan has some of each."""
    return sorted(((label, i) for label, n in COUNTS.items() for i in range(n)), key=lambda c: (c[1] / COUNTS[c[0]], c))


def settings(label: str, number: int, attempt: int = 0) -> Config:
    """The settings of one run. A run whose ground truth denies its label is drawn again with the next `attempt`."""
    rng = random.Random(f"{label} {number} {attempt}")
    chain = label not in ("grokked", "softmax collapsed") and number % 10 == 9
    config: Config = {
        "world": "chains" if chain else "clouds", "seed": rng.randrange(10**6), "base_steps": 0, "adapter": None,
        "replay": 0.0, "boundary": 0, "shift": 0.0, "flips": 0.0, "surge": None, "gain": 1.0,
        "width": rng.choice((24, 32)) if chain else rng.choice((48, 64, 96, 128)),
        "layers": 1 if chain else rng.choice((1, 2)), "dropout": rng.choice((0.0, 0.0, 0.1)),
        "gap": round(rng.uniform(1.5, 2.5), 2) if chain else round(rng.uniform(2.0, 3.5), 2),
        "rows": 10**6, "batch": rng.choice((8, 16)) if chain else rng.choice((16, 32, 64)),
        "steps": rng.choice((80, 96)) if chain else rng.choice((160, 192, 240)),
        "lr": round(10 ** rng.uniform(-2.6, -2.1), 5), "schedule": rng.choice(("linear", "cosine", "constant")),
        "warmup": rng.choice((0, 0, 10)), "decay": rng.choice((0.0, 0.01, 0.1)),
    }  # fmt: skip
    _OF[label](config, rng, number)
    config["every"] = config.get("every", config["steps"] // 16)
    return config


def _healthy(c: Config, rng: random.Random, number: int) -> None:
    kind = number % 8
    if kind >= 2:  # fine-tuned from a base, to a world that has moved; old rows are mixed in
        c |= {"base_steps": 200, "shift": round(rng.uniform(0.3, 0.8), 2), "replay": 0.5}
        c |= {"lr": round(10 ** rng.uniform(-3.3, -2.7), 5), "adapter": rng.choice((None, None, "lora"))}
        if c["adapter"]:
            c["lr"] = round(c["lr"] * 3, 5)
    if kind not in (0, 2):  # two tasks, the earlier one's rows are kept in the later
        c |= {"boundary": c["steps"] * rng.choice((30, 40, 50)) // 100, "replay": 0.5}
        c["shift"] = c["shift"] or round(rng.uniform(0.3, 0.8), 2)
        c["warmup"] = max(c["warmup"], 10)
    elif rng.random() < 0.3:  # little data, and an end before it is learnt by heart
        c |= {"rows": rng.choice((512, 1024)), "steps": 80, "dropout": 0.1}


def _overfit(c: Config, rng: random.Random, number: int) -> None:
    chain = c["world"] == "chains"
    c |= {"rows": 48 if chain else rng.choice((128, 192, 256)), "dropout": 0.0, "batch": rng.choice((16, 32))}
    c |= {"steps": 96 if chain else rng.choice((240, 320)), "lr": round(10 ** rng.uniform(-2.3, -1.9), 5)}
    c |= {"gap": 1.5 if c["world"] == "chains" else round(rng.uniform(1.6, 2.4), 2), "schedule": "constant"}


def _grokked(c: Config, rng: random.Random, number: int) -> None:
    modulus = rng.choice((25, 27, 29))
    c |= {"world": "additions", "modulus": modulus, "rows": int(0.7 * modulus**2), "width": rng.choice((96, 128))}
    c |= {"batch": modulus**2, "steps": 600, "schedule": "constant", "lr": round(rng.uniform(0.005, 0.01), 4)}
    c |= {"decay": round(rng.uniform(1, 3), 1), "warmup": 0, "every": 20, "gain": rng.choice((1.0, 2.0))}


def _collapsed(c: Config, rng: random.Random, number: int) -> None:
    c |= {"rows": rng.choice((96, 128, 192)), "gap": round(rng.uniform(3.0, 6.0), 2), "schedule": "constant"}
    c |= {"lr": round(rng.uniform(0.03, 0.06), 4), "decay": 0.0, "dropout": 0.0, "batch": rng.choice((32, 64))}
    c |= {"width": rng.choice((64, 96, 128)), "layers": 2, "steps": 1000}


def _spike(c: Config, rng: random.Random, number: int) -> None:
    c |= {"surge": [int(c["steps"] * rng.uniform(0.3, 0.8)), rng.choice((50, 100)), rng.choice((2, 3, 4))]}
    c["surge"][1] *= 3 if c["world"] == "chains" else 1


def _too_high(c: Config, rng: random.Random, number: int) -> None:
    at = rng.choice((0, int(c["steps"] * rng.uniform(0.1, 0.6))))
    factor = rng.choice((100, 200, 400)) * (3 if c["world"] == "chains" else 1)
    c |= {"surge": [at, factor, 10**6], "schedule": "constant", "warmup": 0}


def _noisy(c: Config, rng: random.Random, number: int) -> None:
    c |= {"flips": rng.choice((0.2, 0.3, 0.4)), "rows": rng.choice((256, 512)), "dropout": 0.0}


def _switch(c: Config, rng: random.Random, number: int) -> None:
    c |= {"boundary": c["steps"] * rng.choice((30, 40, 50, 60)) // 100, "shift": round(rng.uniform(5, 7), 2)}
    c |= {"schedule": "constant"}


def _forgets(c: Config, rng: random.Random, number: int) -> None:
    c |= {"base_steps": 200, "shift": round(rng.uniform(4, 6), 2), "adapter": rng.choice((None, None, "lora"))}
    c["lr"] = round(c["lr"] * 3, 5) if c["adapter"] else c["lr"]


_OF = {
    "healthy": _healthy, "overfit": _overfit, "grokked": _grokked, "softmax collapsed": _collapsed,
    "loss spike": _spike, "rate too high": _too_high, "noisy labels": _noisy, "task switch": _switch,
    "forgets": _forgets,
}  # fmt: skip
