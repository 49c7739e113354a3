"""Cost of the adapters that train a chosen part: IncreLoRA, SaRA, SoMA and intrinsic dimension, against LoRA r=8.

    OMP_NUM_THREADS=1 python recipes/bench/selective.py --rounds 15 --out recipes/bench/results/selective.json

The model, the batch of 512 tokens and the way of measuring are those of `adapters.py` beside this file: training steps of
all arms interleaved in one process, ratios within a round.

IncreLoRA costs more the more components it has, and in the steps before an allocation, in which it scores the modules.
So its arms are the first and the last phase of a run (rank 1, and rank 7 of 8, each with the reserve), once with and once
without the scores; the figure is the mean over the two phases, the scoring steps weighted by their share of an interval.
"""

import os
import statistics
from functools import partial
from typing import Any

import torch
from adapters import TARGETS, Arm, BenchArguments, adapter_config, interleaved, memory, ratios, run
from peft import PeftConfig
from rich.console import Console
from rich.table import Table

from hfgen.adapters import IncreLoraConfig, IntrinsicConfig, SaraConfig, SomaConfig

INTERVAL = 500  # steps between two allocations of IncreLoRA
DIMENSION = 1000  # numbers that the intrinsic adapter trains
BARS = {"increlora": 1.15, "soma": 1.02, "sara": 1.40, "sara forward": 1.00}
NOISE = 0.02  # "1.00x" is a ratio of timings: it is met within this


def trained(arm: Arm) -> list[torch.Tensor]:
    return [p for p in arm.model.parameters() if p.requires_grad]


def increlora(targets: Any, r: int, score_window: int | None) -> PeftConfig:
    """Rank `r` of 8 with the default reserve; the steps measured lie in the first interval."""
    return IncreLoraConfig(
        init_r=r, target_r=8, init_warmup=INTERVAL, incre_interval=INTERVAL, top_h=1, warmup_steps=0,
        score_window=score_window, target_modules=targets, task_type="CAUSAL_LM",
    )  # fmt: skip


def arms_of(args: BenchArguments, targets: Any) -> dict[str, Arm]:
    """LoRA r=8 first; SaRA with as many trained numbers as it, by density."""
    lora = Arm(args, adapter_config("lora", 8, targets))
    numbers = sum(p.numel() for p in trained(lora))
    here = {module.base_layer for module in lora.model.modules() if hasattr(module, "base_layer")}
    density = numbers / sum(p.numel() for layer in here for p in layer.parameters())
    window = IncreLoraConfig.__dataclass_fields__["score_window"].default
    common = {"target_modules": targets, "task_type": "CAUSAL_LM"}
    configs = {
        "increlora first": increlora(targets, 1, window), "increlora first, scores": increlora(targets, 1, None),
        "increlora last": increlora(targets, 7, window), "increlora last, scores": increlora(targets, 7, None),
        "sara": SaraConfig(density=density, **common), "soma": SomaConfig(r=8, total_steps=INTERVAL, **common),
        "intrinsic": IntrinsicConfig(d=DIMENSION, **common),
    }  # fmt: skip
    return {"lora": lora} | {name: Arm(args, config) for name, config in configs.items()}


def averages(steps: dict[str, dict[str, float]]) -> dict[str, float]:
    """IncreLoRA's step over LoRA's, averaged over the steps until the budget is spent; the default window, and None."""
    window = IncreLoraConfig.__dataclass_fields__["score_window"].default
    plain, scores = (
        statistics.mean(steps[f"increlora {phase}{suffix}"]["median"] for phase in ("first", "last"))
        for suffix in ("", ", scores")
    )
    share = min(1.0, window / INTERVAL)
    return {"default": share * scores + (1 - share) * plain, "score_window=None": scores}


def bench_setting(args: BenchArguments, place: str) -> dict[str, Any]:
    arms = arms_of(args, TARGETS[place])
    times = interleaved({name: partial(arm.seconds, arm.step) for name, arm in arms.items()}, args.rounds)
    base = Arm(args)
    steps = {name: ratios(times, name, "lora") for name in arms}
    rows = {
        name: {
            "step_s": statistics.median(times[name]), "step": steps[name], "trained": sum(p.numel() for p in trained(arm)),
            "tensors": len(trained(arm)), "bytes": memory(arm),
        }
        for name, arm in arms.items()
    }  # fmt: skip
    for row in rows.values():
        row["memory_ratio"] = row["bytes"]["total"] / rows["lora"]["bytes"]["total"]
    forward = {"base": partial(base.seconds, base.forward), "sara": partial(arms["sara"].seconds, arms["sara"].forward)}
    for arm in (base, arms["sara"]):
        arm.model.eval()
    found = ratios(interleaved(forward, 3 * args.rounds), "sara", "base")
    return {"targets": place, "arms": rows, "increlora": averages(steps), "sara_forward": found}


def bars(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The issue's bars: what, measured value, bar, met."""
    found = []

    def add(what: str, value: float, bar: float, slack: float = 0.0) -> None:
        found.append({"what": what, "value": value, "bar": bar, "met": bool(value <= bar + slack)})

    for setting in settings:
        rows, place = setting["arms"], setting["targets"]
        sara = rows["sara"]
        add(f"increlora, {place}: mean step / LoRA", setting["increlora"]["default"], BARS["increlora"])
        add(f"soma, {place}: step / LoRA", rows["soma"]["step"]["median"], BARS["soma"])
        add(f"sara, {place}: step / LoRA", sara["step"]["median"], BARS["sara"])
        add(f"sara, {place}: forward / base", setting["sara_forward"]["median"], BARS["sara forward"], NOISE)
        exact = 8 * sara["trained"] + 4 * sara["tensors"]
        add(f"sara, {place}: optimizer bytes / (8 nnz + 4 per tensor)", sara["bytes"]["optimizer"] / exact, 1.0)
    return found


def print_report(report: dict[str, Any]) -> None:
    console = Console(width=None if os.isatty(1) else 130)
    table = Table(title="One training step against peft LoRA r=8 on the same targets (median of ratios, quartiles)")
    for column in ("targets", "arm", "trained", "step", "ratio", "saved MiB", "memory ratio"):
        table.add_column(column, justify="left" if column in ("targets", "arm") else "right")
    for setting in report["settings"]:
        for name, row in setting["arms"].items():
            step = row["step"]
            table.add_row(
                *(setting["targets"], name, f"{row['trained']:,}", f"{row['step_s']:.3f} s"),
                f"{step['median']:.3f} [{step['q25']:.3f}, {step['q75']:.3f}]",
                *(f"{row['bytes']['saved_for_backward'] / 2**20:.1f}", f"{row['memory_ratio']:.3f}"),
            )
        means = setting["increlora"]
        table.add_row(setting["targets"], "increlora, until the budget is spent", "", "", f"{means['default']:.3f}")
        table.add_row(setting["targets"], "the same, score_window=None", "", "", f"{means['score_window=None']:.3f}")
        table.add_section()
    console.print(table)
    verdicts = Table(title=f"Bars (forward within {NOISE:.0%} of timing noise)")
    for column in ("what", "value", "bar", "met"):
        verdicts.add_column(column)
    for bar in report["bars"]:
        verdicts.add_row(bar["what"], f"{bar['value']:.3f}", f"<= {bar['bar']:.2f}", "yes" if bar["met"] else "[red]no")
    console.print(verdicts)


def measured(args: BenchArguments) -> dict[str, Any]:
    """What this bench adds to the report."""
    settings = []
    for place in TARGETS:
        print(f"{place} ...", flush=True)
        settings.append(bench_setting(args, place))
    return {"interval": INTERVAL, "settings": settings, "bars": bars(settings)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench; returns the report it prints."""
    return run(argv, measured, print_report)


if __name__ == "__main__":
    main()
