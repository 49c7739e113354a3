"""A small experiment that every adapter can be put through: a vision transformer that reads letters learns turned ones.

A ViT of a few ten thousand parameters is pretrained here, in seconds, on images of the 26 capital letters. Then it is
adapted, with a new classifier head, to the 26 small letters, turned by a quarter. Arms: head only, LoRA, the method; the
same images, steps and batches, the head's learning rate the same, the adapter's chosen for each arm on other seeds by
the same grid. Nothing is downloaded or saved. The images are drawn with the fonts that matplotlib brings along.

torch and the hosts are imported in the workers only.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfgen import catalog

from .experiment import Arm, Metric, Samples
from .jobs import trainer_progress
from .stats import Verdict, at_least, interval, paired, verdict
from .tuning import Row, best_rate, try_grid

SIDE, PATCH, JITTER = 16, 4, 12  # pixels, pixels, degrees
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic", "STIXGeneral", "cmr10")
CAPITALS, SMALL = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
HEAD = "head"
"""Id of the reference arm: only the new head is trained."""


GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
TUNING_SEEDS = (100, 101, 102)
CRITERION = "highest mean accuracy on test images of the new task, then the lower rate; the old task is not looked at"


@dataclass(frozen=True)
class Settings:
    """Everything that fixes a run but arm and seed. `seed` draws the base model, all images, the start and the order.

    Attributes:
        method: The adapter's name, which is its arm's id.
        options: Arguments of its config.
        lora_rank: r of the LoRA arm, alpha = 2 r.
        rates: Learning rate by arm id: of the head in arm "head" and in every other, of the adapter in the others.
            AdamW without weight decay, linear decay to 0.
        targets: The adapted modules.
        steps, batch_size: Of the adaptation.
        images, test_images: Turned small letters to train on and to measure on.
        hidden_size, layers: Of the ViT.
        source_steps, source_batch_size, source_rate, source_images: Of the pretraining on capitals.
        margin: "At least as accurate" allows this much less accuracy.
        fewer: LoRA trains at least so many times as many numbers in the adapted layers; by construction, no result.
    """

    method: str
    options: dict[str, Any]
    lora_rank: int
    rates: dict[str, float]
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    steps: int = 500
    batch_size: int = 32
    images: int = 2000
    test_images: int = 1500
    hidden_size: int = 64
    layers: int = 2
    source_steps: int = 1500
    source_batch_size: int = 64
    source_rate: float = 4e-3
    source_images: int = 8000
    margin: float = 0.01
    fewer: float = 16.0


def arms(label: str, rank: int) -> tuple[Arm, ...]:
    """The three arms of the method called `label`; its id is the label in lower case."""
    return (Arm(HEAD, "head only"), Arm("lora", f"LoRA r={rank}"), Arm(label.lower(), label))


def parts(settings: Settings, arms: tuple[Arm, ...]) -> dict[str, Any]:
    """What every `Experiment` of this kind has in common, as its keyword arguments."""
    smoke = dataclasses.replace(
        settings, steps=20, images=200, test_images=200, source_steps=20, source_images=200, layers=1
    )
    return {
        "arms": arms, "metrics": METRICS, "chart": ("kept", ("accuracy",)), "smoke_settings": smoke, "run": run_arm,
        "judge": judge, "notes": NOTES, "steps": settings.steps, "tries": len(GRID) * len(TUNING_SEEDS),
        "tuning_seeds": TUNING_SEEDS, "caption": CAPTION,
    }  # fmt: skip


CAPTION = (
    "Up: more of the new task learnt; right: more of the old task kept. Large marks are means over seeds, bars their 95 % "
    "intervals, small marks the single seeds. The dashed lines are the arm that trains the new head only."
)
NOTES = (
    "A small experiment: a vision transformer of about 0.07 million parameters, pretrained for each seed on drawn capital "
    "letters (16 x 16 pixels, several fonts, noise), is adapted to small letters turned by a quarter. It is no benchmark "
    "of the paper; it tells whether the claim shows at this size, not whether it holds elsewhere.",
    "All arms have the same images, steps, batches and start, the same new head and the same learning rate of the head, "
    "chosen with the head alone. The adapter's rate of each arm was chosen with the same grid, number of tries and other "
    "seeds: " + CRITERION + ".",
    "Adapted are the query and value projections, as in the paper. Rank 8 is an eighth of these layers' width, while it "
    "is a hundredth of a base model's: relative to the model LoRA is larger here than in the paper.",
    "Old task kept: accuracy on capitals with the old head put back, for the reader; the verdict does not look at it.",
)
METRICS = (
    Metric("accuracy", "new task", explanation="share right of test images of small letters turned by a quarter"),
    Metric(
        "kept", "old task kept", explanation="share right of test images of capitals, with the old head", detail=True
    ),
    Metric("source", "old task before", explanation="the same before adaptation", detail=True),
    Metric("parameters", "trained numbers", "count", "in the adapted layers, without the head"),
    Metric("seconds", "time", "s", "adaptation on one thread, without pretraining and measuring"),
)


def tune(settings: Settings, arms: Sequence[Arm], workers: int = 2) -> dict[str, Any]:
    """Chooses the head's rate in the arm "head", then with that the adapter's rate in each other arm; plain data."""

    def choose(some: Sequence[Arm], fixed: dict[str, float]) -> tuple[dict[str, float], list[Row]]:
        def with_rate(arm: str, rate: float) -> Settings:
            return dataclasses.replace(settings, rates=fixed | {arm: rate})

        rows = try_grid(run_arm, some, GRID, TUNING_SEEDS, with_rate, workers)
        return {a.id: best_rate([r for r in rows if r["arm"] == a.id], ("accuracy",)) for a in some}, rows

    head, head_rows = choose([a for a in arms if a.id == HEAD], {})
    rest, rows = choose([a for a in arms if a.id != HEAD], head)
    fixed = dataclasses.asdict(settings)
    del fixed["rates"]
    return {
        "format": 1, "criterion": CRITERION, "grid": list(GRID), "seeds": list(TUNING_SEEDS), "settings": fixed,
        "chosen": head | rest, "runs": head_rows + rows,
    }  # fmt: skip


def judge(samples: Samples, settings: Settings) -> list[Verdict]:
    """The verdict on: at least as accurate as LoRA (but for `margin`), which trains `fewer` times as many numbers.

    Void unless LoRA ends above the head alone (the whole interval of the paired difference above 0) and the arms have
    the sizes that the claim is about.
    """
    own, lora, head = samples[settings.method], samples["lora"], samples[HEAD]
    learnt = interval(paired(lora["accuracy"], head["accuracy"]))
    ratio = min(a / b for a, b in zip(lora["parameters"], own["parameters"], strict=True))
    void = None
    if learnt.mean <= 0 or (learnt.n > 1 and learnt.low <= 0):
        void = (
            f"LoRA did not end above the new head alone (difference {learnt.mean:+.3f}, interval {learnt.low:+.3f} to "
            f"{learnt.high:+.3f}), so there is no baseline to compare with"
        )
    if ratio < settings.fewer:
        void = f"LoRA trains {ratio:.1f} times as many numbers, the claim is about {settings.fewer:g} times"
    words = f"accuracy at most {settings.margin:g} below that of" if settings.margin else "accuracy above that of"
    check = at_least(
        f"{words} LoRA r={settings.lora_rank}, which trains {settings.fewer:g} times as many numbers",
        paired(own["accuracy"], lora["accuracy"]),
        -settings.margin,
    )
    return [verdict(settings.method, [check], void)]


@functools.lru_cache(maxsize=3)  # the arms of one seed see the same images; nobody writes to them
def letters(alphabet: str, count: int, turn: int, seed: str) -> tuple[Any, Any]:
    """`count` images (count, 1, SIDE, SIDE) in [-1, 1] float32 and their classes (count) int64; a function of `seed`.

    Font, size, place and slant are drawn at random, noise is added; `turn` is in degrees, counter-clockwise.
    """
    import matplotlib
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

    rng = random.Random(seed)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), size) for name in FONTS for size in (22, 26, 30)]
    images, classes = np.empty((count, SIDE, SIDE), dtype=np.float32), []
    for i in range(count):
        label = rng.randrange(len(alphabet))
        image = Image.new("L", (2 * SIDE, 2 * SIDE))
        place = (SIDE + rng.uniform(-2, 2), SIDE + rng.uniform(-2, 2))
        ImageDraw.Draw(image).text(place, alphabet[label], fill=255, font=rng.choice(fonts), anchor="mm")
        image = image.rotate(turn + rng.uniform(-JITTER, JITTER), Image.Resampling.BILINEAR)
        images[i] = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
        classes.append(label)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 0.2, images.shape).astype(np.float32)
    return torch.from_numpy(images / 127.5 - 1 + noise)[:, None], torch.tensor(classes)


def run_arm(arm: str, seed: int, settings: Settings, report: Any) -> dict[str, float]:
    """Pretrains (once per seed and process), adapts by one arm, measures; plain numbers by metric key."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    source = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name in _SOURCE}
    state, before = _pretrained(seed, tuple(source.items()))
    model = _vit(settings.hidden_size, settings.layers)
    model.load_state_dict(state)
    old_head = model.classifier
    transformers.set_seed(seed)
    model.classifier = torch.nn.Linear(settings.hidden_size, len(SMALL))
    model, head, adapter = _prepare(arm, settings, model)
    groups = [{"params": head, "lr": settings.rates[HEAD]}]
    if adapter:
        groups.append({"params": adapter, "lr": settings.rates[arm]})
    start = time.monotonic()
    train = letters(SMALL, settings.images, 90, f"new task, train {seed}")
    _fit(model, train, torch.optim.AdamW(groups, weight_decay=0.0), settings.steps, settings.batch_size, seed, report)
    seconds = time.monotonic() - start
    vit = (model if arm == HEAD else model.get_base_model()).vit
    return {
        "accuracy": _accuracy(model, letters(SMALL, settings.test_images, 90, f"new task, test {seed}")),
        "kept": _accuracy(lambda x: old_head(vit(x).last_hidden_state[:, 0]), _source_test(seed)),
        "source": before,
        "parameters": sum(p.numel() for p in adapter),
        "seconds": seconds,
    }


_SOURCE = ("hidden_size", "layers", "source_steps", "source_batch_size", "source_rate", "source_images")


@functools.lru_cache(maxsize=1)  # a worker takes the arms of one seed one after the other
def _pretrained(seed: int, source: tuple[tuple[str, Any], ...]) -> tuple[dict[str, Any], float]:
    """State of a ViT trained on capitals, and its accuracy on new ones; `source` holds the settings named `_SOURCE`."""
    import torch
    import transformers

    s = dict(source)
    transformers.set_seed(seed)
    model = _vit(s["hidden_size"], s["layers"])
    data = letters(CAPITALS, s["source_images"], 0, f"old task, train {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["source_rate"], weight_decay=0.01)
    _fit(model, data, optimizer, s["source_steps"], s["source_batch_size"], seed)
    return model.state_dict(), _accuracy(model, _source_test(seed))


def _source_test(seed: int) -> tuple[Any, Any]:
    return letters(CAPITALS, 1000, 0, f"old task, test {seed}")


def _vit(hidden_size: int, layers: int) -> Any:
    """transformers' ViTForImageClassification, one grey channel, no dropout."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=layers, num_attention_heads=4,
        image_size=SIDE, patch_size=PATCH, num_channels=1, num_labels=len(CAPITALS), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _prepare(arm: str, settings: Settings, model: Any) -> tuple[Any, list[Any], list[Any]]:
    """The model as the arm trains it, the head's parameters and the adapter's (none in arm "head")."""
    if arm == HEAD:
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        return model, list(model.classifier.parameters()), []
    from peft import LoraConfig, get_peft_model

    shared = {"target_modules": list(settings.targets), "modules_to_save": ["classifier"]}
    if arm == settings.method:
        config = catalog.load(arm, "adapters")(**settings.options, **shared)
    else:
        config = LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, **shared)
    model = get_peft_model(model, config)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in trained if ".modules_to_save." in name]
    return model, head, [p for name, p in trained if ".modules_to_save." not in name]


def _fit(
    model: Any, data: tuple[Any, Any], optimizer: Any, steps: int, batch_size: int, seed: int, report: Any = None
) -> None:
    """The stock Trainer, linear decay to 0."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    rows = [{"pixel_values": x, "labels": y} for x, y in zip(*data, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, lr_scheduler_type="linear",
            seed=seed, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        trainer.remove_callback(PrinterCallback)
        if report is not None:
            trainer.add_callback(trainer_progress(report))
        trainer.train()
    model.eval()


def _accuracy(model: Any, data: tuple[Any, Any]) -> float:
    """Share of `data` that `model` (images -> logits, or an object that holds them) classifies rightly."""
    import torch

    with torch.no_grad():
        out = model(data[0])
    return float((getattr(out, "logits", out).argmax(-1) == data[1]).float().mean())
