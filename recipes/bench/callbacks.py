"""What callbacks cost in a stock Trainer run, as a share of its step time.

    OMP_NUM_THREADS=1 python recipes/bench/callbacks.py --out recipes/bench/results/callbacks.json

A Llama takes batches of 8 x 256 tokens. HyperfitCallback looks with its defaults, so that looks and steps lie between
each other in one run and other load on the machine hits both alike. Reported: the median step, the median look, a look
in steps, and its share of the steps between two looks; and in the same way a look of the size of the authors' schedule
(128 rows for the loss, 32 continuations to 256 tokens, every 250 steps). Models: the one that the claim of the card is
run with, and a larger one.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hfgen.callbacks import HyperfitCallback

BAR = 0.02  # a look's share of the step time between two looks
BATCH, LENGTH = 8, 256
MODELS = {
    "claim": {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2, "vocab_size": 1000},
    "larger": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 4000},
}
AUTHORS = {"sequences": 128, "every": 250, "new_tokens": 224, "batch_size": 32}


@dataclass
class BenchArguments:
    looks: int = field(default=6, metadata={"help": "Looks that are timed, after one to warm up."})
    steps_between: int = field(
        default=20, metadata={"help": "Steps timed between two looks; the share is computed for the default interval."}
    )
    models: str = field(default="claim,larger", metadata={"help": "Which of claim, larger."})
    out: str | None = field(default=None, metadata={"help": "JSON file to write."})


class Clock(TrainerCallback):
    """The seconds of every step, without the callbacks between steps."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter() - self.start)


class Timed(HyperfitCallback):
    """HyperfitCallback that keeps the seconds of every look; `AUTHORS` looks continue 32 of their 128 rows."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.looks: list[float] = []

    def look_now(self, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        super().look_now(*args, **kwargs)
        self.looks.append(time.perf_counter() - start)


def measure(shape: dict[str, int], args: BenchArguments, **options: Any) -> dict[str, Any]:
    """One Trainer run: medians of step and look in seconds, and the look's share for the callback's own interval."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**shape, num_attention_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    )
    rows = torch.randint(shape["vocab_size"], (BATCH * 8, LENGTH)).tolist()
    clock = Clock()
    every = options.pop("every", None) or HyperfitCallback(stop_loss=None).every
    callback = Timed(
        stop_loss=None, held_out=(rows * 2)[: options.get("sequences", 64)], every=args.steps_between, **options
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=args.steps_between * (args.looks + 1), per_device_train_batch_size=BATCH, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        data = [{"input_ids": ids, "labels": ids} for ids in rows]
        Trainer(model, arguments, train_dataset=data, callbacks=[clock, callback]).train()
    looks = callback.looks[1:]
    step, look = statistics.median(clock.steps[args.steps_between :]), statistics.median(looks)
    quartiles = statistics.quantiles(looks, n=4) if len(looks) > 1 else [look] * 3
    return {
        "step_s": step, "look_s": look, "look_q25_s": quartiles[0], "look_q75_s": quartiles[2],
        "look_in_steps": look / step, "every": every, "share": look / (every * step), "rows": callback.sequences,
        "new_tokens": callback.new_tokens,
    }  # fmt: skip


def main() -> None:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    found: dict[str, Any] = {}
    for name in args.models.split(","):
        found[name] = {"defaults": measure(MODELS[name], args), "authors": authors(MODELS[name], args)}
    table = Table(title="HyperfitCallback at batch 8 x 256", title_justify="left")
    for column in ("model", "looks", "step", "one look", "in steps", "every", "share of step time"):
        table.add_column(column, justify="right")
    for name, kinds in found.items():
        for kind, row in kinds.items():
            cells = (
                f"{row['step_s']:.3f} s",
                f"{row['look_s']:.3f} s",
                f"{row['look_in_steps']:.1f}",
                str(row["every"]),
            )
            table.add_row(name, kind, *cells, f"{row['share']:.2%}")
    Console().print(table)
    report = {
        "format": 1, "batch": [BATCH, LENGTH], "models": MODELS, "hyperfit": found, "bar": BAR,
        "met": {name: kinds["defaults"]["share"] <= BAR for name, kinds in found.items()},
        "looks": args.looks, "steps_between": args.steps_between, "load_average": os.getloadavg()[0],
        "platform": platform.platform(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
        print(f"written: {args.out}")


def authors(shape: dict[str, int], args: BenchArguments) -> dict[str, Any]:
    """The authors' schedule: the loss of 128 rows and 32 continuations to 256 tokens, each timed by itself and added."""
    few = BenchArguments(looks=2, steps_between=args.steps_between)
    long = {"every": AUTHORS["every"], "new_tokens": AUTHORS["new_tokens"], "batch_size": 32, "sequences": 32}
    short = long | {"new_tokens": 8, "window": 8}
    whole, little = measure(shape, few, **long), measure(shape, few, **short)
    look = whole["look_s"] + 3 * little["look_s"]  # 32 rows with their continuations, and the loss of 96 more
    step = whole["step_s"]
    return whole | {
        "look_s": look, "look_in_steps": look / step, "share": look / (AUTHORS["every"] * step), "rows": 128,
        "look_q25_s": None, "look_q75_s": None,
    }  # fmt: skip


if __name__ == "__main__":
    main()
