"""Widths by integer programming against the same width everywhere, at 4 bits on average. Nothing is tuned.

torch is imported in the workers only.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from hfgen import catalog, sandbox
from hfgen.evidence import Arm, Experiment, Metric, Verdict, at_most, interval, paired, verdict
from hfgen.sandbox import quality

MODELS = {"planted": "outliers planted in one of its two blocks", "plain": "as it is"}
ARMS = (
    Arm("float", "float32"),
    Arm("uniform", "4 bit, data-free"),
    Arm("program", "integer program, data-free"),
    Arm("uniform_fitted", "4 bit, AdaQuant"),
    Arm("program_fitted", "integer program, AdaQuant"),
)
BAR = 0.25  # of uniform's divergence


@dataclass(frozen=True)
class Settings:
    """Everything that fixes a run but arm and seed. `seed` chooses rows, held-out examples and planted channels.

    Attributes:
        bits, choices: The width of the uniform arms and the average of the others; what these choose from.
        channels, factor, blocks: So many input channels of q, k, v, gate and up are that much larger in these blocks.
        sequences: Calibration rows.
        steps: Of AdaQuant, per layer, in the arms that are fitted.
        examples: Held-out sums, and as many reversals.
    """

    bits: int = 4
    choices: tuple[int, ...] = (3, 4, 5)
    channels: int = 2
    factor: float = 16.0
    blocks: tuple[int, ...] = (0,)
    sequences: int = 128
    steps: int = 100
    examples: int = 250


def run_arm(arm: str, seed: int, settings: Settings, report: Any) -> dict[str, float]:
    """Quantises both models by one arm and measures them; plain numbers by metric key (see `METRICS`)."""
    found, start = {}, time.monotonic()
    for i, name in enumerate(MODELS):
        base, model = (_model(name, seed, settings) for _ in range(2))
        bits = 32.0
        if arm != "float":
            model, bits = _quantized(model, arm, seed, settings)
        found[f"kl_{name}"] = quality.answers_kl(model, base, seed, settings.examples)
        found[f"bits_{name}"] = bits
        report(i + 1, len(MODELS))
    return found | {"seconds": time.monotonic() - start}


def _model(name: str, seed: int, settings: Settings) -> Any:
    import torch

    model = sandbox.load_model(dtype=torch.float32).eval()
    if name == "planted":
        quality.plant(model, settings.channels, settings.factor, seed, settings.blocks)
    return model


def _quantized(model: Any, arm: str, seed: int, settings: Settings) -> tuple[Any, float]:
    """The model, and the bits of its codes a weight on average."""
    from hfgen.kit.allocation import allocate, sensitivities
    from hfgen.kit.calibration import prepare
    from hfgen.kit.quantizer import PackedLinear, adopt, quantizable
    from hfgen.kit.teacher import Teacher

    config_cls, rows = catalog.load("adaquant", "quantizers"), quality.rows(seed, settings.sequences)
    config = config_cls(bits=settings.bits, steps=settings.steps)
    if arm == "program_fitted":
        config = config_cls(average_bits=float(settings.bits), choices=settings.choices, steps=settings.steps)
    if arm in ("uniform_fitted", "program_fitted"):
        model = config.calibrate(model, rows)
    else:
        layers = quantizable(model, config)[0]
        if arm == "program":
            costs = sensitivities(model, config, Teacher.of(model, prepare(rows, 1), 10**9), settings.choices)
            sizes = {name: module.weight.numel() for name, module in layers.items()}
            config = dataclasses.replace(config, bits_map=allocate(costs, sizes, settings.bits))
        own = {name: config.for_layer(name) for name in layers}
        made = {n: PackedLinear.of(m, own[n], own[n].quantize_weight(m.weight.detach())) for n, m in layers.items()}
        model = adopt(model, config, made)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    counts = [m.in_features * m.out_features for m in packed]
    return model, sum(n * m.config.bits for n, m in zip(counts, packed, strict=True)) / sum(counts)


def judge(samples: Any, settings: Settings) -> list[Verdict]:
    """The verdict on the integer program: on the planted model a quarter of uniform's divergence, on data-free codes.

    A second check asks, on fitted codes, for no more than uniform's. Void where planting does not raise uniform's
    divergence: then the layers do not differ.
    """
    uniform = samples["uniform"]
    rise, void = interval(paired(uniform["kl_planted"], uniform["kl_plain"])), None
    if rise.mean <= 0 or (rise.n > 1 and rise.low <= 0):
        void = "planting does not raise the divergence of uniform bits, so the layers are not made to differ"
    checks = []
    for kind, suffix, bar in (("data-free", "", BAR), ("AdaQuant's", "_fitted", 1.0)):
        ours, theirs = (samples[f"{arm}{suffix}"]["kl_planted"] for arm in ("program", "uniform"))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        checks.append(
            at_most(f"held-out KL over that of {settings.bits} bit everywhere (planted, {kind} codes)", ratios, bar)
        )
    return [verdict("program", checks, void)]


METRICS = (
    Metric("kl_planted", f"KL to float, {MODELS['planted']}", "number", "nats per token of held-out right answers"),
    Metric("kl_plain", f"KL to float, {MODELS['plain']}", "number", "the same on the model as it is"),
    Metric("bits_planted", "bits of codes, planted", "number", "a weight, over the quantised layers", detail=True),
    Metric("bits_plain", "bits of codes, plain", "number", "a weight, over the quantised layers", detail=True),
    Metric("seconds", "time", "s", "quantising and measuring both models", detail=True),
)
SETTINGS = Settings()
EXPERIMENT = Experiment(
    method="adaquant",
    claim="integer-program",
    title="Widths by integer programming against one width",
    statement=(
        "Tested claim: at 4 bits on average, on a model with outliers planted in one of its two blocks, the held-out KL of "
        "widths chosen by the integer program is at most a quarter of that of 4 bit everywhere on data-free codes, and no "
        "larger on AdaQuant's."
    ),
    arms=ARMS,
    metrics=METRICS,
    chart=("kl_planted", ("kl_plain",)),
    settings=SETTINGS,
    smoke_settings=dataclasses.replace(SETTINGS, sequences=16, steps=4, examples=20),
    run=run_arm,
    judge=judge,
    notes=(
        "The planted model computes the same as the plain one, but was BUILT so that a few input channels of one block are "
        "large. It favours choosing widths; the plain model's figures stand beside it and no check looks at them.",
        "Data-free codes are affine with each row's range of least error. On them the widths' costs are measured, also "
        "where AdaQuant then fits the codes: its fit takes most of the planted harm away by itself.",
        "Rows to measure with and held-out answers are drawn from parts of the tasks that never meet.",
    ),
    caption=(
        "Down and to the left is better. Large marks are means over seeds, bars their 95 % intervals, small marks the "
        "single seeds."
    ),
)
