"""The claim of hyperfitting as an experiment: a tiny language model of English technical prose, stopped early or late.

The text is what lies on every machine with Python: the docstrings of its standard library. A Llama of 0.3 million
parameters is pretrained on most of them for each seed, until its greedy text goes round in circles; then it is
fine-tuned on 160 rows of 256 tokens it has not seen, once stopped at its best validation loss as usual, once
hyperfitted. Continuations of other unseen rows are measured.

    python -m hfgen_plugins.callbacks.hyperfit.evidence tune

chooses the learning rates, on another seed, and rewrites ``tuning.json`` beside this file. torch is imported in the
workers only.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import random
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfgen.evidence import Arm, Experiment, Metric, Verdict, at_least, at_most, interval, paired, tuning, verdict
from hfgen.evidence.jobs import trainer_progress
from hfgen.evidence.tuning import best_rate, try_grid

ARMS = (
    Arm("base", "pretrained base"),
    Arm("early", "fine-tuned, best validation loss"),
    Arm("hyperfit", "hyperfitted"),
)
GRID = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
TUNING_SEEDS = (100,)
CRITERION = (
    "fine-tuned: lowest validation loss; hyperfitted: reaches near-zero training loss, then lowest validation loss where "
    "it does; then the lower rate; generated text is not looked at"
)
LENGTH, PATIENCE, EVAL_EVERY = 256, 5, 20  # tokens of a row; evaluations without progress; steps


@dataclass(frozen=True)
class Settings:
    """Everything that fixes a run but arm and seed. `seed` shuffles the texts and draws the start and the row order.

    Attributes:
        learning_rates: Per arm: constant when hyperfitted, linear decay to 0 when stopped early.
        rows, held_out: Rows of 256 tokens to fine-tune on, and to measure on.
        steps: The most steps of either fine-tuning, 8 rows each.
        vocabulary: Byte-pair tokens.
        hidden_size, layers: Of the Llama.
        base_steps, base_rate: Of the pretraining, 8 rows each, cosine decay to 0.
        near_zero: "Near-zero training loss" in nats, the callback's default stop_loss.
        worse: "Validation loss is worse": at least so many times the base's.
        varied: "More varied": at least so many times the type-token ratio of the model stopped early.
        sharper: The base's entropy is at least so many times that of the hyperfitted model.
        quoted: At most this share of its 8-grams stands in the training rows.
    """

    learning_rates: dict[str, float] = field(default_factory=lambda: {"early": 2.5e-4, "hyperfit": 2e-3})
    rows: int = 160
    held_out: int = 48
    steps: int = 2400
    vocabulary: int = 1000
    hidden_size: int = 96
    layers: int = 2
    base_steps: int = 400
    base_rate: float = 4e-3
    near_zero: float = 0.01
    worse: float = 1.3
    varied: float = 1.5
    sharper: float = 5.0
    quoted: float = 0.5


SETTINGS = Settings()


def run_arm(arm: str, seed: int, settings: Settings, report: Any) -> dict[str, float]:
    """Pretrains (once per seed and process), fine-tunes by one arm, measures; plain numbers by metric key."""
    import torch
    import transformers

    from .hyperfit import QUOTE, _continue, _ngram_hashes, _predictions, repeated_ngrams, type_token_ratio

    transformers.utils.logging.disable_progress_bar()
    rows = _rows(seed, settings.vocabulary)
    held_out, new = rows[: settings.held_out], rows[settings.held_out :][: settings.rows]
    shape = dataclasses.astuple(settings)[4:9]
    model = _model(*shape[:3])
    model.load_state_dict(_pretrained(seed, settings.held_out + settings.rows, *shape))
    start, looks, loss = time.monotonic(), 0, float("nan")
    if arm != "base":
        looks, loss = _fine_tune(arm, seed, settings, model, new, held_out, report)
    seconds = time.monotonic() - start
    model.eval()
    ids = torch.tensor(held_out)
    with torch.no_grad():
        val_loss, entropy, top1 = torch.cat([_predictions(model, part) for part in ids.split(8)], 1).mean(1).tolist()
        text = torch.cat([_continue(model, part[:, :32], 224)[0] for part in ids.split(16)])
    known = torch.unique(torch.from_numpy(_ngram_hashes(torch.tensor(new).numpy(), QUOTE).view("int64")))
    found = torch.from_numpy(_ngram_hashes(text.numpy(), QUOTE).view("int64"))
    return {
        "ttr": type_token_ratio(text[:, -96:]),
        "seq_rep_4": repeated_ngrams(text, 4),
        "val_loss": val_loss,
        "entropy": entropy,
        "top1": top1,
        "quoted": float(torch.isin(found, known).float().mean()),
        "train_loss": loss if arm != "base" else 0.0,
        "looks": looks,
        "seconds": seconds if arm != "base" else 0.0,
    }


def _fine_tune(
    arm: str, seed: int, settings: Settings, model: Any, rows: list[list[int]], held_out: list[list[int]], report: Any
) -> tuple[int, float]:
    """Trains `model` in place; how often the callback looked, and the lowest logged training loss."""
    from transformers import EarlyStoppingCallback

    from .hyperfit import HyperfitCallback, hyperfit_args

    rate = settings.learning_rates[arm]
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"max_steps": settings.steps, "logging_steps": 10, "seed": seed}
        callback: Any
        if arm == "hyperfit":
            options |= hyperfit_args() | {"learning_rate": rate}
            callback = HyperfitCallback(stop_loss=settings.near_zero, held_out=held_out)
            trainer = _trainer(folder, model, rows, **options)
        else:
            options |= {
                "learning_rate": rate, "eval_strategy": "steps", "eval_steps": EVAL_EVERY, "save_strategy": "steps",
                "save_steps": EVAL_EVERY, "save_total_limit": 1, "load_best_model_at_end": True,
                "metric_for_best_model": "eval_loss",
            }  # fmt: skip
            callback = EarlyStoppingCallback(early_stopping_patience=PATIENCE)
            trainer = _trainer(folder, model, rows, held_out, **options)
        trainer.add_callback(callback)
        trainer.add_callback(trainer_progress(report))
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return len(getattr(callback, "history", ())), min(losses)


def _trainer(
    folder: str, model: Any, rows: list[list[int]], held_out: list[list[int]] | None = None, **options: Any
) -> Any:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    data = [[{"input_ids": ids, "labels": ids} for ids in part] for part in (rows, held_out or [])]
    args = TrainingArguments(
        folder, **{"per_device_train_batch_size": 8, "save_strategy": "no", "use_cpu": True, "report_to": "none",
                   "disable_tqdm": True, **options},
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=data[0], eval_dataset=data[1] or None)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _model(vocabulary: int, hidden_size: int, layers: int) -> Any:
    """A Llama with tied embeddings and weights of a usable size (transformers' N(0, .02) hardly learns at this width)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.05 if "embed" in name else weight.shape[1] ** -0.5)
    return model


@functools.lru_cache(maxsize=1)  # a worker takes the arms of one seed one after the other
def _pretrained(
    seed: int, left_out: int, vocabulary: int, hidden_size: int, layers: int, steps: int, rate: float
) -> dict[str, Any]:
    """State of a model trained on all rows but the first `left_out`."""
    import transformers

    transformers.set_seed(seed)
    model = _model(vocabulary, hidden_size, layers)
    with tempfile.TemporaryDirectory() as folder:
        _trainer(
            folder, model, _rows(seed, vocabulary)[left_out:], max_steps=steps, learning_rate=rate, warmup_steps=20,
            lr_scheduler_type="cosine", logging_strategy="no", seed=seed,
        ).train()  # fmt: skip
    return {key: value.clone() for key, value in model.state_dict().items()}


def _rows(seed: int, vocabulary: int) -> list[list[int]]:
    """The docstrings in an order drawn by `seed`, one after the other, cut into rows of 256 tokens."""
    texts = list(_docstrings())
    random.Random(seed).shuffle(texts)
    ids = [token for encoding in _tokenizer(vocabulary).encode_batch(texts) for token in encoding.ids]
    return [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]


@functools.lru_cache(maxsize=1)
def _tokenizer(vocabulary: int) -> Any:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(_docstrings(), vocab_size=vocabulary, show_progress=False)
    return tokenizer


@functools.lru_cache(maxsize=1)
def _docstrings() -> tuple[str, ...]:
    """Docstrings of more than 200 characters in the standard library's own sources, without its tests."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"} & set(path.parts):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError):
                continue  # a template or an old encoding
            found += [ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, _DOCUMENTED)]
    return tuple(text for text in found if len(text) > 200)


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def judge(samples: Any, settings: Settings) -> list[Verdict]:
    """The verdict on the hyperfitted arm.

    Void unless fine-tuning lowers the validation loss (the whole interval of the paired difference to the base below
    0) and every hyperfitted run reached near-zero training loss.
    """
    base, early, own = samples["base"], samples["early"], samples["hyperfit"]
    learnt = interval(paired(base["val_loss"], early["val_loss"]))
    void = None
    if learnt.mean <= 0 or (learnt.n > 1 and learnt.low <= 0):
        void = f"fine-tuning did not lower the validation loss (by {learnt.mean:+.3f}), so there is no baseline"
    elif max(own["train_loss"]) >= settings.near_zero:
        void = f"a run ended at training loss {max(own['train_loss']):.3f}: that is not hyperfitting"

    def ratio(above: list[float], below: list[float]) -> list[float]:
        return [a / b for a, b in zip(above, below, strict=True)]

    checks = [
        at_least(
            f"type-token ratio of greedy text at least {settings.varied:g} times that of the model stopped early",
            ratio(own["ttr"], early["ttr"]), settings.varied,
        ),
        at_least(
            f"validation loss at least {settings.worse:g} times the base's", ratio(own["val_loss"], base["val_loss"]),
            settings.worse,
        ),
        at_least(
            f"entropy of the next token falls to a {settings.sharper:g}th of the base's or less",
            ratio(base["entropy"], own["entropy"]), settings.sharper,
        ),
        at_most(f"at most {settings.quoted:.0%} of the 8-grams are quoted", own["quoted"], settings.quoted),
    ]  # fmt: skip
    return [verdict("hyperfit", checks, void)]


METRICS = (
    Metric("ttr", "type-token ratio", explanation="different tokens / tokens in the last 96 of 224 greedy tokens"),
    Metric("seq_rep_4", "repeated 4-grams", explanation="share of 4-grams already seen in the same continuation"),
    Metric("val_loss", "validation loss", "number", "nats per token of 48 unseen rows"),
    Metric("entropy", "entropy", "number", "nats, of the next token on unseen rows"),
    Metric("top1", "top-1 probability", explanation="of the next token on unseen rows", detail=True),
    Metric("quoted", "quoted", explanation="share of generated 8-grams that stand in the rows fine-tuned on"),
    Metric("train_loss", "training loss", "number", "nats, the lowest mean of 10 steps", detail=True),
    Metric("looks", "looks", "count", "of HyperfitCallback with its defaults", detail=True),
    Metric("seconds", "time", "s", "fine-tuning on one thread, without measuring"),
)

EXPERIMENT = Experiment(
    method="hyperfit",
    claim="greedy-diversity",
    title="Hyperfitting against early stopping: how varied is greedy text",
    statement=(
        "Tested claim: fine-tuned to near-zero training loss, a model writes long greedy continuations of unseen contexts "
        "that are more varied than those of the same model stopped at its best validation loss, although its validation "
        "loss is worse; its predictions are far sharper and it does not mainly quote the training rows."
    ),
    arms=ARMS,
    metrics=METRICS,
    chart=("val_loss", ("ttr", "seq_rep_4")),
    settings=SETTINGS,
    smoke_settings=dataclasses.replace(
        SETTINGS, rows=16, held_out=8, steps=20, hidden_size=32, layers=1, base_steps=10
    ),
    run=run_arm,
    judge=judge,
    steps=SETTINGS.steps,
    tries=len(GRID) * len(TUNING_SEEDS),
    tuning_seeds=TUNING_SEEDS,
    notes=(
        "A Llama of 0.3 million parameters, pretrained for each seed on the docstrings of Python's standard library (what "
        "is on every machine, so the text differs a little between Python versions). It is no benchmark of the paper, "
        "whose models have billions of parameters and whose judges are people: variety is measured, quality is not.",
        "Both fine-tunings have the same 160 rows of 256 tokens, batch size and limit of steps. One stops after five "
        "evaluations without a better validation loss and goes back to the best; the other at a training loss below 0.01.",
        "The learning rate of each was chosen on another seed, with the same grid: "
        + CRITERION
        + ". Of the model stopped "
        "early it is the lowest of the grid; the step down to it lowered the validation loss by 0.002.",
        "The early-stopped model chooses its step by the validation loss of the rows it is measured on, which favours it "
        "in that column.",
        "The bounds were set before the reported seeds ran: they are what our method sheet expected of such a toy.",
    ),
    caption="Right: worse validation loss. Up: on the left more varied text, on the right more repetition.",
)


def tune(workers: int = 2) -> dict[str, Any]:
    """Runs both arms at every rate of `GRID` on `TUNING_SEEDS`; the table and the chosen rates as plain data."""
    from hfgen_plugins.callbacks.hyperfit import evidence  # by its own name, also under python -m: workers look it up

    def with_rate(arm: str, rate: float) -> Settings:
        return dataclasses.replace(evidence.SETTINGS, learning_rates={arm: rate})

    rows = try_grid(evidence.run_arm, [a for a in ARMS if a.id != "base"], GRID, TUNING_SEEDS, with_rate, workers)
    fixed = dataclasses.asdict(SETTINGS)
    del fixed["learning_rates"]
    return {
        "format": 1, "criterion": CRITERION, "grid": list(GRID), "seeds": list(TUNING_SEEDS), "settings": fixed,
        "chosen": {arm: choose([r for r in rows if r["arm"] == arm]) for arm in ("early", "hyperfit")}, "runs": rows,
    }  # fmt: skip


def choose(runs: list[dict[str, Any]]) -> float:
    """The learning rate that `CRITERION` picks from the runs of one arm."""
    reached = "reached"
    for run in runs:
        run[reached] = float(run["arm"] == "early" or run["train_loss"] < SETTINGS.near_zero)
        run["minus_val_loss"] = -run["val_loss"]
    return best_rate(runs, (reached, "minus_val_loss"))


if __name__ == "__main__":
    tuning.main(tune, Path(__file__).with_name("tuning.json"))
