"""The claim on few mantissa bits as an experiment: a tiny Llama trained from scratch on generated text.

The text is drawn from a Markov chain whose entropy is known, a chain for each seed. Each arm trains with its mantissa bits
at several learning rates; the callback measures sharpness and loss at 25, 50 and 100 % of the run. torch is imported in
the workers only.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from hfgen.evidence import Arm, Experiment, Metric, Verdict, at_least, at_most, interval, paired, verdict

BITS = {"full": None, "bits7": 7, "bits3": 3, "bits2": 2, "bits1": 1}
ARMS = tuple(Arm(name, "float32" if bits is None else f"{bits} mantissa bits") for name, bits in BITS.items())
JUDGED = ("bits3", "bits2", "bits1")


@dataclass(frozen=True)
class Settings:
    """Everything that fixes a run but arm and seed. `seed` draws the text, the start and the row order.

    Attributes:
        rates: Learning rates, each a run of its own, decayed to 0 by a cosine; up to where float32 begins to diverge.
        calm: Sharpness and loss are means over so many of the lowest rates; at higher ones either differs more between two
            ways of rounding than between numbers of bits.
        steps, rows: Of a run, a multiple of 4, and rows of each step.
        vocabulary, length: Of the text; each token has `successors` that may follow it.
        hidden_size, layers: Of the Llama.
        looks_at: Tokens at which sharpness and loss are measured.
        moved: Nats per token by which a loss counts as moved.
        more: "More pairs diverge": at least so much of them.
    """

    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 2e-1, 3e-1, 4e-1)
    calm: int = 3
    steps: int = 120
    rows: int = 16
    vocabulary: int = 64
    length: int = 33
    successors: int = 8
    hidden_size: int = 32
    layers: int = 2
    looks_at: int = 1024
    moved: float = 0.02
    more: float = 0.05


SETTINGS = Settings()


def run_arm(arm: str, seed: int, settings: Settings, report: Any) -> dict[str, float]:
    """Trains with the arm's mantissa bits at every learning rate; plain numbers by metric key (see `METRICS`)."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    start, found = time.monotonic(), []
    rows, floor = text(seed, settings)
    for i, rate in enumerate(settings.rates):
        found.append(_train(BITS[arm], seed, settings, rows, rate))
        report(i + 1, len(settings.rates))
    lost = [run[-1].get("loss", math.inf) > (run[0]["loss"] + floor) / 2 for run in found]
    worst, calm = math.log(settings.vocabulary), found[: settings.calm]
    metrics = {"diverged": sum(lost) / len(lost), "seconds": time.monotonic() - start}
    for look, percent in ((1, 25), (2, 50), (4, 100)):
        sharp = [math.log(run[look]["sharpness"]) for run in calm if "sharpness" in run[look]] or [0.0]
        metrics[f"sharpness_{percent}"] = math.exp(sum(sharp) / len(sharp))
        metrics[f"loss_{percent}"] = sum(min(worst, run[look].get("loss", worst)) for run in calm) / len(calm)
    changed = [run[-1].get("activations_changed", 0.0) for run in found]
    return metrics | {"changed": sum(changed) / len(changed)}


def _train(bits: int | None, seed: int, settings: Settings, rows: list[Any], rate: float) -> list[dict[str, float]]:
    """The callback's history of one run, looks at 0, 25, 50, 75 and 100 %; without figures that are not finite."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

    from .low_mantissa import LowMantissaCallback

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=settings.vocabulary, hidden_size=settings.hidden_size, intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers, num_attention_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.ndim == 2:  # the host's N(0, .02) hardly learns at this width
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    callback = LowMantissaCallback(
        mantissa_bits=bits, gradients=bits is not None, every=settings.steps // 4, rows=64, tokens=settings.looks_at
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=settings.steps, per_device_train_batch_size=settings.rows, learning_rate=rate,
            warmup_steps=settings.steps // 10, lr_scheduler_type="cosine", seed=seed, save_strategy="no", use_cpu=True,
            logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return callback.history


def text(seed: int, settings: Settings) -> tuple[list[dict[str, list[int]]], float]:
    """Rows for one pass of the run, and the entropy of the next token in nats: no model has a lower loss on new rows."""
    import numpy as np

    rng = np.random.default_rng(seed)
    size = settings.vocabulary
    chain = np.zeros((size, size))
    for row in chain:
        row[rng.choice(size, settings.successors, replace=False)] = rng.dirichlet(np.ones(settings.successors))
    tokens = np.empty((settings.steps * settings.rows, settings.length), int)
    tokens[:, 0] = rng.integers(size, size=len(tokens))
    for i in range(1, settings.length):
        above = chain[tokens[:, i - 1]].cumsum(-1) > rng.random((len(tokens), 1))
        tokens[:, i] = np.where(above.any(-1), above.argmax(-1), chain[tokens[:, i - 1]].argmax(-1))
    logs = np.log(np.where(chain > 0, chain, 1.0))
    entropy = -(chain * logs).sum(-1)[tokens[:, :-1]].mean()
    return [{"input_ids": ids, "labels": ids} for ids in tokens.tolist()], float(entropy)


def judge(samples: Any, settings: Settings) -> list[Verdict]:
    """The verdicts on 3, 2 and 1 bits: sharper than float32 at a quarter of the run, its loss not moved by then, and more
    diverging pairs in the end.

    Void unless float32 learns: at least half of its pairs (of seed and learning rate) do not diverge.
    """
    full = samples["full"]
    lost = interval(full["diverged"]).mean
    void = f"{lost:.0%} of the runs in float32 diverge, so there is no baseline" if lost > 0.5 else None
    found = []
    for arm in JUDGED:
        own = samples[arm]
        logs = [[math.log(v) for v in part["sharpness_25"]] for part in (own, full)]
        checks = [
            at_least("log sharpness at 25 % of the run, minus that of float32", paired(*logs), 0.0),
            at_most(
                "loss at 25 % of the run, minus that of float32",
                paired(own["loss_25"], full["loss_25"]),
                settings.moved,
            ),
            at_least(
                "diverged pairs, minus those of float32", paired(own["diverged"], full["diverged"]), settings.more
            ),
        ]
        found.append(verdict(arm, checks, void))
    return found


METRICS = (
    Metric("loss_100", "final loss", "number", "nats per token, mean over the three lowest learning rates"),
    Metric(
        "diverged",
        "diverged",
        explanation="share of all learning rates that closed less than half of the way to the floor",
    ),
    Metric(
        "sharpness_25", "sharpness at 25 %", "number", "in percent, geometric mean over the three lowest learning rates"
    ),
    Metric("sharpness_50", "sharpness at 50 %", "number", "the same at half of the run"),
    Metric("sharpness_100", "sharpness at the end", "number", "the same at the end"),
    Metric("loss_25", "loss at 25 %", "number", "as the final loss, at a quarter of the run"),
    Metric("loss_50", "loss at 50 %", "number", "as the final loss, at half of the run", detail=True),
    Metric(
        "changed",
        "activations changed",
        explanation="share of the activations entering GEMMs that rounding changed",
        detail=True,
    ),
    Metric("seconds", "time", "s", "of all learning rates on one thread", detail=True),
)
EXPERIMENT = Experiment(
    method="low_mantissa",
    claim="sharper-first",
    title="Fewer mantissa bits: is the loss sharper before it is higher",
    statement=(
        "Tested claim: with 3, 2 or 1 mantissa bits in the GEMMs (weights, activations and gradients, all exponents) the "
        "loss is sharper in the logits at a quarter of the run than in float32, where the loss itself is not yet higher, "
        "and more pairs of seed and learning rate diverge."
    ),
    arms=ARMS,
    metrics=METRICS,
    chart=("loss_25", ("sharpness_25", "diverged")),
    settings=SETTINGS,
    smoke_settings=dataclasses.replace(SETTINGS, steps=8, rates=(1e-2,), looks_at=64),
    run=run_arm,
    judge=judge,
    steps=SETTINGS.steps,
    notes=(
        "A Llama of 35 thousand parameters on text from a Markov chain of 64 tokens, 120 steps of Adam: it is no benchmark "
        "of the paper, whose models are larger by orders of magnitude and trained for much longer; instabilities that need "
        "either do not show here.",
        "Sharpness is our closed form in the logits, on the numbers of the simulated model. It grows with the logits while "
        "the model is unsure, so a run that learns more slowly is less sharp for that reason alone.",
        "A run diverges when it has closed less than half of the way from its first loss to the entropy of the text, the "
        "lowest loss there is on new rows. All arms have the same rates, starts and rows; nothing was tuned per arm.",
        "Rates, steps and bounds were fixed after seeds 100 to 104 had been looked at, on which few bits made the loss "
        "hardly higher and not sharper. The head, the products inside attention and the optimizer are in float32.",
    ),
    caption=(
        "Left: a higher mark at the same loss is the claim. Large marks are means over seeds, bars their 95 % intervals, "
        "small marks the single seeds. The dashed lines are float32."
    ),
)
