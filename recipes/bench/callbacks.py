"""What callbacks cost in a stock Trainer run: time as a share of its steps, and peak memory beside the same run without.

    OMP_NUM_THREADS=1 python recipes/bench/callbacks.py --out recipes/bench/results/callbacks.json

A Llama takes batches of 8 x 256 tokens. All callbacks but hyperfit are attached, with their defaults, to one run, in which
looks, the user's own evaluations and plain steps lie between each other, so that other load on the machine hits all alike;
every handler of every callback is timed by itself. Per callback: seconds and steps of one look, and its share of the
steps between two looks. Those with an interval of their own are counted at that; those that ride on the user's
evaluations at the host's default of 500 steps between these, and the interval is said from which on they stay under the
bar. Rows of the evaluation sets: 256 and 8, of the held skill 128.

Then denser modes that hold a share of their own, and peak memory (RssAnon, polled) of one process per callback. Last
HyperfitCallback, with its defaults and with a look of the size of the authors' schedule (128 rows for the loss, 32
continuations to 256 tokens, every 250 steps). Models: the one that its claim is run with, and a larger one.
"""

import functools
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hfgen import catalog
from hfgen.callbacks import HyperfitCallback
from hfgen.cli.quantize import PeakMemory

BAR = 0.02  # a look's share of the step time between two looks
MEMORY_BAR = 1.05  # peak memory over the same run without the callback
BATCH, LENGTH = 8, 256
EVALUATIONS = 500  # steps between the user's evaluations: the host's default
MODELS = {
    "claim": {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2, "vocab_size": 1000},
    "larger": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 4000},
}
AUTHORS = {"sequences": 128, "every": 250, "new_tokens": 224, "batch_size": 32}
MONITORS = (  # in the order of their handlers
    "overfit_gap", "learning_curve", "grokking", "stability_gap", "forgetting", "calibration", "soup", "data_diet",
    "softmax_collapse", "instability",
)  # fmt: skip
Rows = list[dict[str, list[int]]]


@dataclass
class BenchArguments:
    looks: int = field(default=6, metadata={"help": "Looks that are timed, after one to warm up."})
    steps_between: int = field(
        default=20, metadata={"help": "Steps timed between two looks; the share is computed for the default interval."}
    )
    models: str = field(default="claim,larger", metadata={"help": "Which of claim, larger."})
    parts: str = field(default="monitors,dense,memory,hyperfit", metadata={"help": "Others keep what --out holds."})
    out: str | None = field(default=None, metadata={"help": "JSON file to write."})
    arm: str | None = field(default=None, metadata={"help": "Internal: one process of the memory part."})


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


def make_model(shape: dict[str, int]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**shape, num_attention_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    )


def make_rows(shape: dict[str, int], count: int, seed: int) -> Rows:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape["vocab_size"], (count, LENGTH), generator=rng).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def make_monitors(shape: dict[str, int], every: int, steps: int, names: tuple[str, ...] = MONITORS) -> dict[str, Any]:
    """The callbacks with their defaults, but for `every`, where they have an interval of their own."""
    needs: dict[str, dict[str, Any]] = {
        "learning_curve": {"dataset": "a"}, "grokking": {"test": "a"},
        "stability_gap": {"tasks": ["a", "b"], "ends": [steps // 2]},
        "forgetting": {"skills": {"skill": make_rows(shape, 128, 3)}},
        "softmax_collapse": {"every": every}, "instability": {"every": every},
    }  # fmt: skip
    return {name: catalog.load(name, "callbacks")(**needs.get(name, {})) for name in names}


def timed(callback: TrainerCallback, spent: dict[int, float]) -> TrainerCallback:
    """The callback, whose handlers add their seconds to `spent` by step."""
    for event in [name for name in dir(callback) if name.startswith("on_")]:
        handler = getattr(callback, event)

        @functools.wraps(handler)
        def around(args: Any, state: Any, control: Any, inner: Callable[..., Any] = handler, **kwargs: Any) -> Any:
            start = time.perf_counter()
            answer = inner(args, state, control, **kwargs)
            step = state.global_step + (inner.__name__ == "on_pre_optimizer_step")
            spent[step] = spent.get(step, 0.0) + time.perf_counter() - start
            return answer

        setattr(callback, event, around)
    return callback


def train(shape: dict[str, int], callbacks: list[Any], steps: int, every: int, evaluation: int = 256) -> float:
    """One stock Trainer run with the user's evaluations; the median of their seconds, without callbacks."""
    sets = {"a": make_rows(shape, evaluation, 1), "b": make_rows(shape, 8, 2)}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, use_cpu=True, save_strategy="no",
            report_to="none", disable_tqdm=True, eval_strategy="steps", eval_steps=every, logging_steps=every,
            lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(
            make_model(shape), arguments, train_dataset=make_rows(shape, BATCH * 64, 0), eval_dataset=sets,
            callbacks=callbacks, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
            compute_metrics=lambda p: {"accuracy": float((p.predictions[:, :-1] == p.label_ids[:, 1:]).mean())},
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        for callback in callbacks:
            if getattr(callback, "schedule", None) == "auto":
                callback.attach(trainer)
        trainer.train()
    return statistics.median(r["eval_a_runtime"] for r in trainer.state.log_history if "eval_a_runtime" in r)


def bench_monitors(shape: dict[str, int], args: BenchArguments) -> dict[str, Any]:
    """All monitors in one run: see the module."""
    every, steps = args.steps_between, args.steps_between * (args.looks + 1)
    callbacks = make_monitors(shape, every, steps)
    defaults = {name: catalog.load(name, "callbacks")() for name in ("softmax_collapse", "instability")}
    spent: dict[str, dict[int, float]] = {name: {} for name in callbacks}
    clock = Clock()
    evaluation = train(shape, [clock, *(timed(callbacks[n], spent[n]) for n in callbacks)], steps, every)
    plain = [s for i, s in enumerate(clock.steps, 1) if i > every and i % every]
    step = statistics.median(plain)
    found: dict[str, Any] = {}
    for name, callback in callbacks.items():
        looks = [spent[name].get(i, 0.0) for i in range(2 * every, steps + 1, every)]
        if name == "learning_curve":  # the first evaluations are too few for a fit
            looks = [spent[name][row["step"]] for row in callback.history if "predicted" in row] or looks
        quiet = statistics.median(spent[name].get(i, 0.0) for i in range(every + 1, steps) if i % every)
        look = statistics.median(looks)
        # what data_diet reads grows with the interval: its own share of this one
        interval = every if name == "data_diet" else defaults[name].every if name in defaults else EVALUATIONS
        found[name] = {
            "look_s": look, "look_in_steps": look / step, "between_looks": quiet / step, "every": interval,
            "share": look / (interval * step) + quiet / step, "of_evaluation": look / evaluation,
            "least_every": math.ceil(look / step / max(1e-9, BAR - quiet / step)),
        }  # fmt: skip
    made = {"looks": args.looks, "steps_between": every}
    return made | {"step_s": step, "evaluation_s": evaluation, "callbacks": found}


def bench_dense(shape: dict[str, int], steps: int) -> dict[str, Any]:
    """Modes that look more often than the user evaluates: the share of the run's time they take, and what they hold."""
    rows = make_rows(shape, 16, 3)
    least = math.ceil(len(rows) / (3 * 0.1 * BATCH))
    modes = {
        "stability_gap, every='auto'": catalog.load("stability_gap", "callbacks")(
            ["a", "b"], ends=[steps // 2], every="auto", samples=8
        ),
        f"forgetting, every={least}, 16 rows": catalog.load("forgetting", "callbacks")({"skill": rows}, every=least),
    }
    found = {}
    for name, callback in modes.items():
        spent: dict[int, float] = {}
        clock = Clock()
        train(shape, [clock, timed(callback, spent)], steps, steps, evaluation=8)
        own = sum(seconds for at, seconds in spent.items() if at > 0)
        found[name] = {"share": own / (own + sum(clock.steps)), "holds": 0.1, "looks": len(callback.history)}
    return found


def memory_of(shape: dict[str, int], arm: str) -> dict[str, int]:
    """The peak of this process's RssAnon in four steps, with looks and an evaluation."""
    callbacks = [] if arm == "none" else list(make_monitors(shape, 2, 4, (arm,)).values())
    with PeakMemory() as memory:
        train(shape, callbacks, 4, 4)
    return {"peak": memory.bytes or 0}


def bench_memory(model: str) -> dict[str, Any]:
    """Peaks over that of the run without callbacks, one process each."""
    peaks = {}
    for arm in ("none", *MONITORS):
        command = [sys.executable, __file__, "--models", model, "--arm", arm]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[arm] = json.loads(done.stdout.splitlines()[-1])["peak"]
    return {arm: {"peak": peak, "ratio": peak / peaks["none"]} for arm, peak in peaks.items()}


def measure(shape: dict[str, int], args: BenchArguments, **options: Any) -> dict[str, Any]:
    """One Trainer run of HyperfitCallback: medians of step and look in seconds, and the share for its own interval."""
    model = make_model(shape)
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


def judged(report: dict[str, Any]) -> dict[str, Any]:
    """Whether each bar is met, by model and callback, of the parts that there are."""
    met: dict[str, Any] = {}
    for name, kinds in report.get("hyperfit", {}).items():
        met.setdefault(name, {})["hyperfit, time"] = kinds["defaults"]["share"] <= BAR
    for name, part in report.get("monitors", {}).items():
        met.setdefault(name, {}).update({f"{n}, time": r["share"] <= BAR for n, r in part["callbacks"].items()})
    for name, part in report.get("dense", {}).items():
        met.setdefault(name, {}).update({mode: r["share"] <= r["holds"] for mode, r in part.items()})
    for name, part in report.get("memory", {}).items():
        met.setdefault(name, {}).update({f"{n}, memory": r["ratio"] <= MEMORY_BAR for n, r in part.items()})
    return met


def print_report(report: dict[str, Any]) -> None:
    """The tables, for a terminal."""
    console = Console(width=120)
    table = Table(title=f"Callbacks at batch {BATCH} x {LENGTH}", title_justify="left")
    for column in (
        "model",
        "callback",
        "one look",
        "in steps",
        "every",
        "share of step time",
        "2 % from",
        "peak memory",
    ):
        table.add_column(column, justify="right")
    for name, part in report.get("monitors", {}).items():
        memory = report.get("memory", {}).get(name, {})
        for callback, row in part["callbacks"].items():
            cells = [f"{row['look_s']:.4f} s", f"{row['look_in_steps']:.2f}", str(row["every"]), f"{row['share']:.2%}"]
            peak = f"{memory[callback]['ratio']:.3f}" if callback in memory else "-"
            table.add_row(name, callback, *cells, str(row["least_every"]), peak)
    for name, kinds in report.get("hyperfit", {}).items():
        for kind, row in kinds.items():
            cells = [f"{row['look_s']:.4f} s", f"{row['look_in_steps']:.2f}", str(row["every"]), f"{row['share']:.2%}"]
            table.add_row(name, f"hyperfit, {kind}", *cells, "-", "-")
    for name, modes in report.get("dense", {}).items():
        for mode, row in modes.items():
            table.add_row(name, mode, "-", "-", f"{row['looks']} looks", f"{row['share']:.2%}", "-", "-")
    console.print(table)
    for name, bars in report["met"].items():
        for bar in [bar for bar, met in bars.items() if not met]:
            console.print(f"not met: {name}: {bar}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    models = {name: MODELS[name] for name in args.models.split(",")}
    if args.arm:
        print(json.dumps(memory_of(models[args.models], args.arm)))
        return {}
    report: dict[str, Any] = {}
    if args.out and Path(args.out).is_file():
        report = json.loads(Path(args.out).read_text(encoding="utf-8"))
    made: dict[str, Callable[[str], Any]] = {
        "monitors": lambda name: bench_monitors(models[name], args),
        "dense": lambda name: bench_dense(models[name], 4 * args.steps_between),
        "memory": bench_memory,
        "hyperfit": lambda name: {"defaults": measure(models[name], args), "authors": authors(models[name], args)},
    }
    for part in args.parts.split(","):
        for name in models:
            report.setdefault(part, {})[name] = made[part](name)
    report |= {
        "format": 2, "batch": [BATCH, LENGTH], "models": MODELS, "bar": BAR, "memory_bar": MEMORY_BAR,
        "met": judged(report), "load_average": os.getloadavg()[0],
        "platform": platform.platform(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    print_report(report)
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {args.out}")
    return report


if __name__ == "__main__":
    logging.getLogger("hfgen").setLevel(logging.ERROR)  # random rows are no healthy run
    main()
