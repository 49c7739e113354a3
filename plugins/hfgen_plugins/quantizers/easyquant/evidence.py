"""The claim of EasyQuant as an experiment: lower perplexity than round to nearest at equal bits, on the sandbox's model.

Nothing is trained and nothing is tuned: EasyQuant runs with the paper's n_sigma = 3, round to nearest has no number to
choose but the size of its groups, which the settings fix (see `Settings`). torch is imported in the workers only.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from hfgen import catalog, sandbox
from hfgen.evidence import Arm, Experiment, Metric, Verdict, at_most, interval, paired, verdict
from hfgen.sandbox.quality import answers_nll, plant

MODELS = {"sandbox": "the sandbox's model, 3 bit", "planted": "planted outliers, 4 bit"}
ARMS = (
    Arm("float", "float32"),
    Arm("rtn", "RTN"),
    Arm("rtn_groups", "RTN, more bits"),
    Arm("easyquant", "EasyQuant"),
)


@dataclass(frozen=True)
class Settings:
    """Everything that fixes a run but arm and seed. `seed` chooses the examples and the planted channels.

    Attributes:
        bits: Per model.
        groups: Group size of arm "rtn_groups" per model: the widest power of two with which round to nearest stores at
            least as many bits per weight as EasyQuant (counted before any reported seed).
        channels, factor: So many input channels of q, k, v, gate and up are that much larger in the planted model.
        examples: Sums and as many reversals that perplexity is measured on, of 1000 sums.
    """

    bits: dict[str, int] = field(default_factory=lambda: {"sandbox": 3, "planted": 4})
    groups: dict[str, int] = field(default_factory=lambda: {"sandbox": 32, "planted": 16})
    channels: int = 1
    factor: float = 16.0
    examples: int = 500


def run_arm(arm: str, seed: int, settings: Settings, report: Any) -> dict[str, float]:
    """Quantises both models by one arm and measures them; plain numbers by metric key (see `METRICS`)."""
    found, start = {}, time.monotonic()
    for i, name in enumerate(MODELS):
        model = _model(name, arm, seed, settings)
        found[name] = math.exp(answers_nll(model, seed, settings.examples))
        found[f"bits_{name}"] = _stored_bits(model)
        report(i + 1, len(MODELS))
    return found | {"seconds": time.monotonic() - start}


def _model(name: str, arm: str, seed: int, settings: Settings) -> Any:
    """The model of that name, quantised as the arm does it through ``from_pretrained``, in float32."""
    import torch

    config_cls = catalog.load("easyquant", "quantizers")
    options: dict[str, dict[str, Any]] = {"rtn": {"n_sigma": None, "optimizer": "none"}, "easyquant": {}}
    options["rtn_groups"] = options["rtn"] | {"group_size": settings.groups[name]}
    load: dict[str, Any] = {"dtype": torch.float32}
    if arm != "float":
        load["quantization_config"] = config_cls(bits=settings.bits[name], **options[arm])
    if name == "sandbox":
        return sandbox.load_model(**load).eval()
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        planted = sandbox.load_model(dtype=torch.float32)
        plant(planted, settings.channels, settings.factor, seed)
        planted.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, **load).eval()


def _stored_bits(model: Any) -> float:
    """Bits per weight of the quantised layers, scales and outliers included; 32 where nothing is quantised."""
    if not hasattr(model, "hf_quantizer"):
        return 32.0
    layers = [model.get_submodule(name) for name in model.hf_quantizer.quantized]
    tensors = [
        t for layer in layers for name, t in (*layer.named_parameters(), *layer.named_buffers()) if name != "bias"
    ]
    return 8 * sum(t.nbytes for t in tensors) / sum(layer.in_features * layer.out_features for layer in layers)


def judge(samples: Any, settings: Settings) -> list[Verdict]:
    """The verdict on EasyQuant: lower log perplexity than round to nearest, on both models, at equal bits.

    Equal bits are read in two ways: of a code (the paper's), and of all that is stored. Void unless round to nearest does
    harm on both models (the whole interval of its log perplexity over float above 0): else there is nothing to win back.
    """

    def gaps(model: str, a: str, b: str) -> list[float]:
        return paired([math.log(v) for v in samples[a][model]], [math.log(v) for v in samples[b][model]])

    void = None
    for model, label in MODELS.items():
        harm = interval(gaps(model, "rtn", "float"))
        if harm.mean <= 0 or (harm.n > 1 and harm.low <= 0):
            void = f"round to nearest does no harm ({label}), so there is nothing to win back"
    words = {"rtn": "RTN with codes of equal bits", "rtn_groups": "RTN that stores at least as many bits"}
    checks = [
        at_most(f"log perplexity minus that of {words[arm]} ({label})", gaps(model, "easyquant", arm), 0.0)
        for arm in words
        for model, label in MODELS.items()
    ]
    return [verdict("easyquant", checks, void)]


METRICS = (
    Metric("sandbox", f"perplexity, {MODELS['sandbox']}", "number", "of right answers, with teacher forcing"),
    Metric("planted", f"perplexity, {MODELS['planted']}", "number", "the same on the model built with outliers"),
    Metric("bits_sandbox", "stored bits per weight, 3 bit", "number", "codes, scales, outliers"),
    Metric("bits_planted", "stored bits per weight, 4 bit", "number", "codes, scales, outliers"),
    Metric("seconds", "time", "s", "loading, quantising and measuring both models", detail=True),
)
SETTINGS = Settings()
EXPERIMENT = Experiment(
    method="easyquant",
    claim="beats-rtn",
    title="EasyQuant against round to nearest",
    statement=(
        "Tested claim: at equal bits, of a code and of all that is stored, the perplexity is lower than with round to "
        "nearest, on the sandbox's model at 3 bit and on one with planted outliers at 4 bit."
    ),
    arms=ARMS,
    metrics=METRICS,
    chart=("sandbox", ("planted",)),
    settings=SETTINGS,
    smoke_settings=dataclasses.replace(SETTINGS, examples=20),
    run=run_arm,
    judge=judge,
    notes=(
        "The model is a Llama of 0.14 million parameters; perplexity is that of right answers of two tasks that it knows. "
        "It has few large outliers.",
        "The planted model computes the same, but was BUILT so that a few input channels are large, as they are in large "
        "language models: a case that favours keeping outliers apart. Seeds choose its channels.",
        "On the sandbox's own model seeds choose the examples only: the quantised weights are the same for every seed, so "
        "the interval says how sure the figure of this one model is, nothing about other models.",
        "Nothing is tuned: n_sigma = 3 is the paper's, round to nearest has one scale per row, and in the arm with more "
        "bits one per group, the groups being the widest power of two that stores at least as many bits as EasyQuant.",
        "recipes/bench/quantizers.py had measured the arms RTN and EasyQuant on this model (other examples, one planting) "
        "before this experiment was fixed; the arm with more bits had not been looked at.",
    ),
    caption=(
        "Down and to the left is better. Large marks are means over seeds, bars their 95 % intervals, small marks the "
        "single seeds. The dashed lines are the model in float32."
    ),
)
