"""The claim of gradual pruning as an experiment: noisy digits, an MLP pruned as it trains against smaller dense ones.

scikit-learn's 1797 digits (8 x 8 pixels) with noise on every pixel; a 64-256-256-10 network with ReLU, 600 Adam steps
of a stock Trainer. Gradual arms use the callback with its default schedule (begin 100, end 400, every 15); a small dense
arm has the narrowest two hidden layers with which it has at least as many parameters as its counterpart has non-zeros.

    python -m hfgen_plugins.callbacks.gradual_pruning.evidence tune

chooses the learning rate of every arm, on seeds and rows apart, and rewrites ``tuning.json`` beside this file. torch is
imported in the workers only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfgen.evidence import Arm, Experiment, Metric, Verdict, at_least, interval, paired, tuning, verdict
from hfgen.evidence.jobs import trainer_progress
from hfgen.evidence.tuning import best_rate, try_grid

SPARSITIES = (80, 90, 95, 97, 99)
ARMS = (
    Arm("dense", "dense"),
    *(Arm(f"gradual_{s}", f"gradual {s} %") for s in SPARSITIES),
    *(Arm(f"small_{s}", f"small dense, size of {s} %") for s in SPARSITIES),
    Arm("late_90", "one shot 90 %, after training"),
    Arm("once_90", "one shot 90 %, then retrained"),
)
GRID = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TUNING_SEEDS = (100, 101, 102, 103)
CRITERION = (
    "highest accuracy on 297 rows held out from training and from testing, mean over the seeds; then the lower rate"
)
INPUTS, CLASSES = 64, 10
_RATES = {
    "dense": 4e-3, "late_90": 4e-3, "once_90": 2e-3,
    "gradual_80": 1e-3, "gradual_90": 2e-3, "gradual_95": 2e-3, "gradual_97": 2e-3, "gradual_99": 4e-3,
    "small_80": 2e-3, "small_90": 1e-3, "small_95": 1e-3, "small_97": 2e-3, "small_99": 4e-3,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything that fixes a run but arm and seed. `seed` splits the rows, draws noise, start and order of rows.

    Attributes:
        learning_rates: Per arm, constant.
        width: Of both hidden layers of the large network.
        steps: Optimizer steps, of `batch` rows each.
        once: The step of one-shot pruning that is followed by retraining: where the gradual schedule ends.
        noise: Standard deviation of the Gaussian noise on pixels in [0, 1], drawn once per row.
        rows, held_out: Rows to train on and to tune on; the rest is tested.
    """

    learning_rates: dict[str, float] = field(default_factory=lambda: dict(_RATES))
    width: int = 256
    steps: int = 600
    once: int = 400
    batch: int = 64
    noise: float = 0.35
    rows: int = 1000
    held_out: int = 297


SETTINGS = Settings()


def parameters(width: int) -> int:
    """Weights and biases of the network."""
    return INPUTS * width + width * width + width * CLASSES + 2 * width + CLASSES


def small_width(sparsity: int, width: int) -> int:
    """The narrowest width with at least as many parameters as the large network has non-zeros (its biases are dense)."""
    sizes = (INPUTS * width, width * width, width * CLASSES)
    nonzero = sum(n - round(sparsity / 100 * n) for n in sizes) + 2 * width + CLASSES
    return next(w for w in range(1, width + 1) if parameters(w) >= nonzero)


def run_arm(arm: str, seed: int, settings: Settings, report: Any) -> dict[str, float]:
    """Trains one network and tests it; plain numbers by metric key (see `METRICS`)."""
    import torch
    import transformers

    kind, _, size = arm.partition("_")
    train, held_out, test = _data(seed, settings.rows, settings.held_out, settings.noise)
    transformers.set_seed(seed)
    model = _network(small_width(int(size), settings.width) if kind == "small" else settings.width)
    start = time.monotonic()
    _train(model, train, _callback(kind, size, settings), seed, settings, settings.learning_rates[arm], report)
    seconds = time.monotonic() - start
    model.eval()

    def accuracy(rows: Any) -> float:
        with torch.no_grad():
            return float((model(rows[0])["logits"].argmax(-1) == rows[1]).double().mean())

    nonzero = sum(int((p != 0).sum()) for p in model.parameters())
    return {
        "accuracy": accuracy(test), "held_out": accuracy(held_out), "fitted": accuracy(train), "nonzero": nonzero,
        "log_nonzero": math.log10(nonzero), "seconds": seconds,
    }  # fmt: skip


def _callback(kind: str, size: str, settings: Settings) -> Any:
    from .gradual_pruning import GradualPruningCallback

    at = {"late": settings.steps, "once": settings.once}
    if kind == "gradual":
        return GradualPruningCallback(int(size) / 100)
    return GradualPruningCallback(int(size) / 100, begin_step=at[kind], end_step=at[kind]) if kind in at else None


def _train(model: Any, rows: Any, callback: Any, seed: int, settings: Settings, rate: float, report: Any) -> None:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=settings.steps, per_device_train_batch_size=settings.batch, learning_rate=rate, seed=seed,
            lr_scheduler_type="constant", logging_strategy="no", save_strategy="no", use_cpu=True, report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        data = [{"x": x, "labels": label} for x, label in zip(*rows, strict=True)]
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback] if callback else [])
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(trainer_progress(report))
        trainer.train()


def _network(width: int) -> Any:
    from torch import nn
    from torch.nn import functional as F

    class Network(nn.Sequential):
        def forward(self, x: Any, labels: Any = None) -> Any:
            logits = super().forward(x)
            return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    return Network(
        nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )  # fmt: skip


@functools.lru_cache(maxsize=1)  # a worker takes the arms of one seed one after the other
def _data(seed: int, rows: int, held_out: int, noise: float) -> tuple[Any, Any, Any]:
    """(x float32 (n, 64), labels int64 (n)) to train on, to tune on and to test on."""
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    digits, random = load_digits(), np.random.default_rng(seed)
    x = digits.data / 16 + noise * random.standard_normal(digits.data.shape)
    order = random.permutation(len(x))
    parts = order[:rows], order[rows : rows + held_out], order[rows + held_out :]
    found = [(torch.tensor(x[part], dtype=torch.float32), torch.tensor(digits.target[part])) for part in parts]
    return found[0], found[1], found[2]


def crossing(samples: Any) -> float | None:
    """Non-zero weights below which the mean accuracy of small dense networks is higher at every sparsity tried.

    Log-linear between two sparsities; None where the sparsest pruned network is better than its small dense one.
    """

    def mean(kind: str, key: str) -> list[float]:
        return [interval(samples[f"{kind}_{s}"][key]).mean for s in SPARSITIES]

    gaps, sizes = paired(mean("gradual", "accuracy"), mean("small", "accuracy")), mean("gradual", "log_nonzero")
    better = [i for i, gap in enumerate(gaps) if gap >= 0]
    if better and better[-1] == len(gaps) - 1:
        return None
    if not better:
        return float(10 ** sizes[0])
    i = better[-1]
    return float(10 ** (sizes[i] + gaps[i] / (gaps[i] - gaps[i + 1]) * (sizes[i + 1] - sizes[i])))


def judge(samples: Any, settings: Settings) -> list[Verdict]:
    """The verdict at each sparsity; at 90 % against one-shot pruning too.

    Void where a baseline never learnt: the whole interval of the dense network's accuracy, and of the small one's, must
    be above three times chance.
    """

    def better(arm: str, than: str, words: str) -> Any:
        gaps = paired(samples[arm]["accuracy"], samples[than]["accuracy"])
        return at_least(f"test accuracy minus that of {words}", gaps, 0.0)

    found = []
    for s in SPARSITIES:
        void = None
        for arm in ("dense", f"small_{s}"):
            learnt = interval(samples[arm]["accuracy"])
            if (learnt.low if learnt.n > 1 else learnt.mean) <= 3 / CLASSES:
                void = f"arm {arm} never learnt (accuracy {learnt.mean:.2f}), so there is no baseline"
        checks = [better(f"gradual_{s}", f"small_{s}", "a small dense network of as many non-zeros")]
        if s == 90:
            checks.append(better("gradual_90", "once_90", "one-shot pruning and as much retraining"))
            checks.append(better("gradual_90", "late_90", "one-shot pruning after training"))
        found.append(verdict(f"gradual_{s}", checks, void))
    where = crossing(samples)
    words = "; up to the highest sparsity tried, no size at which small dense wins was found"
    if where:
        share = 1 - where / parameters(settings.width)
        words = (
            f"; below about {where:,.0f} non-zeros ({share:.1%} of all parameters zero) small dense has the higher mean"
        )
    return [dataclasses.replace(v, reason=v.reason + words) if v.arm == "gradual_90" else v for v in found]


METRICS = (
    Metric("accuracy", "accuracy", explanation="on noisy digits that were neither trained on nor tuned on"),
    Metric("nonzero", "non-zeros", "count", "weights and biases that are not zero"),
    Metric("log_nonzero", "log10 of non-zeros", "number", detail=True),
    Metric("held_out", "accuracy on the tuning rows", detail=True),
    Metric("fitted", "accuracy on the training rows", detail=True),
    Metric("seconds", "time", "s", "training on one thread", detail=True),
)
EXPERIMENT = Experiment(
    method="gradual_pruning",
    claim="large-sparse",
    title="Gradual pruning against one-shot pruning and small dense networks",
    statement=(
        "Tested claim: at equal non-zeros a network pruned gradually is at least as accurate as a small dense one, at 90 % "
        "also as one pruned at once, with as much retraining or none; and where that ends."
    ),
    arms=ARMS,
    metrics=METRICS,
    chart=("log_nonzero", ("accuracy",)),
    settings=SETTINGS,
    smoke_settings=dataclasses.replace(SETTINGS, steps=20, once=13),
    run=run_arm,
    judge=judge,
    steps=SETTINGS.steps,
    tries=len(GRID) * len(TUNING_SEEDS),
    tuning_seeds=TUNING_SEEDS,
    notes=(
        "An MLP of 85 thousand parameters on scikit-learn's digits with noise that keeps a dense network well below "
        "perfect: no benchmark of the paper, whose networks are convolutional and recurrent and far larger. Where small "
        "dense wins depends on the width that is pruned, and says nothing about other networks.",
        "All arms have 600 Adam steps of the same rows; the learning rate of each was chosen from the same grid on other "
        "seeds and other rows ("
        + CRITERION
        + "). Of the arm pruned after training it is the one that is best after that.",
        "Biases are not pruned and count as non-zeros. The small dense network has at least as many non-zeros as the "
        "pruned one; the places of the zeros are not counted, though a sparse format must store them.",
        "Accuracy on the tuning rows is not looked at in the verdict; bounds are zero.",
    ),
    caption="Up is more accurate, left is fewer non-zeros. The dashed line is the dense network.",
)


def tune(workers: int = 2) -> dict[str, Any]:
    """Runs every arm at every rate of `GRID` on `TUNING_SEEDS`; the table and the chosen rates as plain data."""
    from hfgen_plugins.callbacks.gradual_pruning import evidence  # by its own name, also under python -m

    def with_rate(arm: str, rate: float) -> Settings:
        return dataclasses.replace(evidence.SETTINGS, learning_rates={arm: rate})

    rows = try_grid(evidence.run_arm, ARMS, GRID, TUNING_SEEDS, with_rate, workers)
    fixed = dataclasses.asdict(SETTINGS)
    del fixed["learning_rates"]
    chosen = {arm.id: best_rate([r for r in rows if r["arm"] == arm.id], ("held_out",)) for arm in ARMS}
    return {
        "format": 1, "criterion": CRITERION, "grid": list(GRID), "seeds": list(TUNING_SEEDS), "settings": fixed,
        "chosen": chosen, "runs": rows,
    }  # fmt: skip


if __name__ == "__main__":
    tuning.main(tune, Path(__file__).with_name("tuning.json"))
