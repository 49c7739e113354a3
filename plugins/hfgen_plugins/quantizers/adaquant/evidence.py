"""AdaQuant at 3 bit against round to nearest, against its own start, and against fine-tuning all weights on the same rows.

The rates in `SETTINGS` were chosen, and written to ``tuning.json`` beside this file, by

    python -m hfgen_plugins.quantizers.adaquant.evidence tune

torch is imported in the workers only.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfgen import catalog, sandbox
from hfgen.evidence import Arm, Experiment, Metric, Verdict, at_most, interval, paired, tuning, verdict
from hfgen.sandbox import quality

ARMS = (
    Arm("float", "float32"),
    Arm("rtn", "RTN"),
    Arm("range", "RTN, range searched"),
    Arm("adaquant", "AdaQuant"),
    Arm("adaquant_norms", "AdaQuant, norms tuned"),
    Arm("qat_kl", "all weights, divergence"),
    Arm("qat_ce", "all weights, cross-entropy"),
)
TUNED = ("adaquant", "qat_kl", "qat_ce")
LR = {"adaquant": 0.05, "qat_kl": 1e-3, "qat_ce": 1e-3}  # at rate 1: relative to the scale; Adam's own
GRID = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TUNING_SEEDS = (100, 101)
TUNING_FILE = Path(__file__).with_name("tuning.json")


@dataclass(frozen=True)
class Settings:
    """Everything that fixes a run but arm and seed. `seed` chooses the calibration rows and the held-out examples.

    Attributes:
        bits: Of every quantised layer, one scale and zero point a row.
        sequences: Calibration rows, a quarter of them for judging only, in every arm that looks at data.
        steps: Of AdaQuant, per layer.
        qat_steps: Of fine-tuning, each with all training rows of one length (there are two).
        rates: Per arm, times `LR`.
        examples: Held-out sums, and as many reversals.
    """

    bits: int = 3
    sequences: int = 128
    steps: int = 100
    qat_steps: int = 300
    rates: dict[str, float] = field(default_factory=lambda: {"adaquant": 10.0, "qat_kl": 1.0, "qat_ce": 0.3})
    examples: int = 250


def run_arm(arm: str, seed: int, settings: Settings, report: Any) -> dict[str, float]:
    """Quantises the sandbox's model by one arm and measures it; plain numbers by metric key (see `METRICS`)."""
    import torch

    base = sandbox.load_model(dtype=torch.float32).eval()
    model = sandbox.load_model(dtype=torch.float32).eval()
    rows = quality.rows(seed, settings.sequences)
    start = time.monotonic()
    if arm in ("rtn", "range"):
        model = _data_free(model, settings.bits, search=arm == "range")
    elif arm in ("adaquant", "adaquant_norms"):
        lr, tune = LR["adaquant"] * settings.rates["adaquant"], "norms" if arm == "adaquant_norms" else None
        config = catalog.load("adaquant", "quantizers")(bits=settings.bits, steps=settings.steps, lr=lr, tune=tune)
        model = config.calibrate(model, rows, lambda done, total: report(done, total))
    elif arm != "float":
        _fine_tune(model, rows, arm, seed, settings, report)
    seconds = time.monotonic() - start
    there, here = (quality.answers_nll(m, seed, settings.examples, "held out") for m in (base, model))
    kl = quality.answers_kl(model, base, seed, settings.examples)
    seen = quality.answers_nll(model, seed, settings.sequences // 2, "calibrate")
    before = quality.answers_nll(base, seed, settings.sequences // 2, "calibrate")
    return {
        "gap": here - there,
        "kl": kl,
        "seen": seen - before,
        "nll": here,
        "seconds": seconds,
        "merit": there - here,
    }


def _data_free(model: Any, bits: int, search: bool) -> Any:
    """Affine codes of every layer: the range of the weights, or the one of least error in them."""
    from hfgen.kit.quantizer import PackedLinear, adopt, quantizable

    from .grid import Point, affine, packed_point

    config, layers = catalog.load("adaquant", "quantizers")(bits=bits), {}
    for name, module in quantizable(model, config)[0].items():
        weight: Any = module.weight.detach()
        found = config.quantize_weight(weight)
        if not search:
            grid = affine(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), bits)
            found = packed_point(Point(weight, *grid, weight.new_zeros(0)), bits, weight.shape)
        layers[name] = PackedLinear.of(module, config.for_layer(name), found)
    return adopt(model, config, layers)


def _fine_tune(model: Any, rows: Any, arm: str, seed: int, settings: Settings, report: Any) -> None:
    """Adam on all parameters, codes through the straight-through gradient; the best look at the held-out quarter is kept.

    Scales and zero points begin as AdaQuant's do, and are trained as there. The loss is the divergence from the float
    model ("qat_kl") or the cross-entropy of the rows' own next tokens ("qat_ce").
    """
    import copy

    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.nn.utils import parametrize

    from hfgen.kit.calibration import held_out, prepare
    from hfgen.kit.quantizer import quantizable
    from hfgen.kit.teacher import Teacher

    from .grid import fake_quantize, searched

    class Codes(nn.Module):
        def __init__(self, weight: Any) -> None:
            super().__init__()
            scale, zero = searched(weight.detach(), settings.bits)
            self.start: Any = scale
            self.rho, self.zero = nn.Parameter(torch.ones_like(scale)), nn.Parameter(zero.clone())

        def forward(self, weight: Any) -> Any:
            return fake_quantize(weight, self.start * self.rho, self.zero, settings.bits)

    batches = prepare(rows, 1)
    teacher = Teacher.of(model, batches, 10**9)
    counts = [len(batch["input_ids"]) for batch in batches]
    judges = held_out(torch.arange(sum(counts))).split(counts)
    for module in quantizable(model, catalog.load("adaquant", "quantizers")())[0].values():
        parametrize.register_parametrization(module, "weight", Codes(module.weight))
    lr = LR[arm] * settings.rates[arm]
    grids = [p for n, p in model.named_parameters() if n.endswith((".rho", ".zero"))]
    rest = [p for n, p in model.named_parameters() if not n.endswith((".rho", ".zero"))]
    adam = torch.optim.Adam([{"params": rest, "lr": lr}, {"params": grids, "lr": 0.01}])
    fall = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 1 / settings.qat_steps, settings.qat_steps)

    def loss(at: int, mask: Any) -> Any:
        if arm == "qat_kl":
            return teacher.kl(model, at)[mask].sum() / teacher.logp[at][mask].shape[:-1].numel()
        ids = batches[at]["input_ids"][mask]
        return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def judged() -> float:
        with torch.no_grad():
            return float(sum(loss(at, mask) * mask.sum() for at, mask in enumerate(judges) if mask.any()))

    best, least = copy.deepcopy(model.state_dict()), judged()
    for step in range(1, settings.qat_steps + 1):
        at = step % len(batches)
        adam.zero_grad()
        loss(at, ~judges[at]).backward()
        adam.step()
        fall.step()
        if step % 10 == 0 or step == settings.qat_steps:
            report(step, settings.qat_steps)
            if (found := judged()) < least:
                best, least = copy.deepcopy(model.state_dict()), found
    model.load_state_dict(best)


def judge(samples: Any, settings: Settings) -> list[Verdict]:
    """The verdict on AdaQuant: a smaller gap to float than round to nearest, its own start, and fine-tuning have.

    Void unless round to nearest does harm (the whole interval of its gap above 0) and fine-tuning learns to do less.
    """
    gap = {arm: samples[arm]["gap"] for arm in samples}
    harm, void = interval(gap["rtn"]), None
    if harm.mean <= 0 or (harm.n > 1 and harm.low <= 0):
        void = "round to nearest does no harm, so there is no gap to close"
    elif interval(paired(gap["qat_kl"], gap["rtn"])).mean >= 0:
        void = "fine-tuning all weights does no better than round to nearest: the baseline never learnt"
    words = {"rtn": "RTN", "range": "RTN with its range searched", "qat_kl": "fine-tuning all weights (divergence)",
             "qat_ce": "fine-tuning all weights (cross-entropy)"}  # fmt: skip
    checks = [
        at_most(f"held-out gap to float minus that of {words[arm]}", paired(gap["adaquant"], gap[arm]), 0.0)
        for arm in words
    ]
    return [verdict("adaquant", checks, void)]


METRICS = (
    Metric(
        "gap",
        "gap to float",
        "number",
        "negative log likelihood of held-out right answers above float32's, nats a token",
    ),
    Metric("kl", "KL to float", "number", "on the same answers, nats a token"),
    Metric(
        "seen",
        "gap on calibration rows",
        "number",
        "the same on answers of the part that calibration rows are drawn from",
    ),
    Metric("nll", "negative log likelihood", "number", "of held-out right answers, nats a token", detail=True),
    Metric("seconds", "time", "s", "quantising, calibrating or training", detail=True),
)
SETTINGS = Settings()
EXPERIMENT = Experiment(
    method="adaquant",
    claim="closes-the-gap",
    title="AdaQuant at 3 bit, 128 sequences",
    statement=(
        "Tested claim: at 3 bit, with 128 sequences, the held-out gap to full precision is smaller than with round to "
        "nearest, than with round to nearest of the best range, and than after fine-tuning all weights on the same rows."
    ),
    arms=ARMS,
    metrics=METRICS,
    chart=("gap", ("kl",)),
    settings=SETTINGS,
    smoke_settings=dataclasses.replace(SETTINGS, sequences=32, steps=4, qat_steps=4, examples=20),
    run=run_arm,
    judge=judge,
    steps=SETTINGS.steps,
    tries=len(GRID) * len(TUNING_SEEDS),
    tuning_seeds=TUNING_SEEDS,
    notes=(
        "The model is a Llama of 0.14 million parameters, 14 quantised layers. Calibration rows and held-out answers are "
        "drawn from parts of the tasks that never meet; seeds choose both. There is one model, intervals are about it.",
        "All arms store the same: codes of 3 bit, a scale and a zero point a row. Fine-tuning begins with AdaQuant's start "
        "and trains every parameter, embeddings and norms, too, as well as the grids; AdaQuant changes the 14 layers.",
        "Every arm that looks at data trains on three quarters of the sequences and is judged while running on the last "
        "quarter: AdaQuant to revert a layer, fine-tuning to keep its best step of 10. The arm with norms tuned, which no "
        "check looks at, has AdaQuant's rate.",
        f"AdaQuant and both fine-tunings had their rate chosen from {len(GRID)} on {len(TUNING_SEEDS)} seeds apart, each.",
    ),
    caption=(
        "Down and to the left is better. Large marks are means over seeds, bars their 95 % intervals, small marks the "
        "single seeds."
    ),
)


def tune(workers: int = 2) -> dict[str, Any]:
    """The table of ``tuning.json``: the rate of highest merit (float's likelihood less the arm's own) per arm."""

    def settings(arm: str, rate: float) -> Settings:
        return dataclasses.replace(SETTINGS, rates={**SETTINGS.rates, arm: rate})

    arms = [arm for arm in ARMS if arm.id in TUNED]
    rows = tuning.try_grid(run_arm, arms, GRID, TUNING_SEEDS, settings, workers)
    chosen = {arm.id: tuning.best_rate([r for r in rows if r["arm"] == arm.id], ("merit",)) for arm in arms}
    return {"grid": GRID, "seeds": TUNING_SEEDS, "chosen": chosen, "rows": rows}


if __name__ == "__main__":
    tuning.main(tune, TUNING_FILE)
