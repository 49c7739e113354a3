"""Step time and peak memory of SVFit and LoLDU against peft's LoRA r=8, interleaved in one process.

    OMP_NUM_THREADS=1 python recipes/bench/adapters.py --rounds 15 --out recipes/bench/results/adapters.json
    python recipes/bench/adapters.py --device cuda

A 4-layer Llama of width 768 with random fp32 weights takes one batch of 512 tokens. One round is one training step
(forward, loss, backward, AdamW) of every method, in rotating order; reported is the median over rounds of the ratio to
LoRA's step in the same round, so that other load on the machine hits all alike. Memory is counted, not sampled: the
distinct storages autograd keeps for backward, plus weights, factors, gradients and optimizer state.
"""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from hfgen.adapters import LoLDUConfig, SVFitConfig

METHODS = ("lora", "svfit", "loldu")
TARGETS = {"q,v": ["q_proj", "v_proj"], "all linears": "all-linear"}
STEP_BAR = {("8", "q,v"): 1.05, ("8", "all linears"): 1.05, ("full", "q,v"): 1.35}  # against LoRA's step
MEMORY_BAR, FLOP_BAR, MERGED_BAR = 1.05, 1.10, 1.00
MERGED_NOISE = 0.02  # "1.00x" is a ratio of timings: it is met within this


@dataclass
class BenchArguments:
    rounds: int = field(default=15, metadata={"help": "Timed steps of each method, after one warm-up each."})
    out: str | None = field(default=None, metadata={"help": "JSON file to write."})
    device: str = field(default="cpu", metadata={"help": "cpu (one thread) or cuda."})
    hidden: int = field(default=768, metadata={"help": "Width, and the full rank."})
    layers: int = field(default=4, metadata={"help": "Layers."})
    tokens: int = field(default=512, metadata={"help": "Tokens of the batch (one row)."})


def adapter_config(method: str, r: int, targets: Any) -> PeftConfig:
    """The config of a method; LoRA's rank is 8 whatever `r` says."""
    options = {"r": 8 if method == "lora" else r, "target_modules": targets, "task_type": "CAUSAL_LM"}
    kinds = {"lora": partial(LoraConfig, lora_alpha=16), "svfit": SVFitConfig, "loldu": LoLDUConfig}
    return kinds[method](**options)


def make_model(args: BenchArguments, adapter: PeftConfig | None) -> Any:
    """The same random Llama for every method, on `args.device`, with the adapter (None: without)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        vocab_size=1024,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    return (model if adapter is None else get_peft_model(model, adapter)).to(args.device)


class Arm:
    """One model with its optimizer and batch."""

    def __init__(self, args: BenchArguments, adapter: PeftConfig | None = None) -> None:
        self.device = args.device
        self.model = make_model(args, adapter).train()
        self.ids = torch.randint(1024, (1, args.tokens), generator=torch.Generator().manual_seed(1)).to(args.device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(trained, lr=1e-3) if adapter else None

    def loss(self) -> Tensor:
        return self.model(input_ids=self.ids, labels=self.ids).loss

    def step(self) -> None:
        """One training step; the gradients stay until the next one, as they do at a step's peak."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    @torch.no_grad()
    def forward(self) -> None:
        self.model(input_ids=self.ids)

    def seconds(self, work: Callable[[], None]) -> float:
        """Wall time of `work`."""
        start = time.perf_counter()
        work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def interleaved(arms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm in every round, after one warm-up each; the order rotates from round to round."""
    names = list(arms)
    for name in names:
        arms[name]()
    found: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                found[name].append(arms[name]())
    finally:
        gc.enable()
    return found


def ratios(found: dict[str, list[float]], name: str, peer: str) -> dict[str, float]:
    """Median and quartiles over rounds of name's time / peer's time."""
    values = [a / b for a, b in zip(found[name], found[peer], strict=True)]
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "q25": low, "q75": high}


def bytes_of(tensors: Any) -> dict[int, int]:
    """{address of the storage: its bytes}."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of the distinct storages autograd keeps between `forward` and backward, without parameters and buffers."""
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps an address from being used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    own = bytes_of([*model.parameters(), *model.buffers()])
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def memory(arm: Arm) -> dict[str, int]:
    """Bytes at the peak of a step, part by part. Call after a step (the optimizer's state exists then)."""
    state = [t for s in arm.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    found = {
        "saved_for_backward": saved_bytes(arm.loss, arm.model),
        "weights": sum(bytes_of([*arm.model.parameters(), *arm.model.buffers()]).values()),
        "gradients": sum(bytes_of(p.grad for p in arm.model.parameters() if p.grad is not None).values()),
        "optimizer": sum(bytes_of(state).values()),
    }
    found["total"] = sum(found.values())
    if arm.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arm.step()
        found["cuda_step_above_start"] = torch.cuda.max_memory_allocated() - before
    return found


def flops(work: Callable[[], Any]) -> int:
    """Floating point operations of `work` by torch's counter, which lacks attention's CPU kernel."""

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        work()
    return counter.get_total_flops()


def bench_setting(args: BenchArguments, rank: str, place: str) -> dict[str, Any]:
    """One setting: every method's step, memory and FLOPs against LoRA r=8 on the same targets."""
    r = args.hidden if rank == "full" else int(rank)
    arms = {method: Arm(args, adapter_config(method, r, TARGETS[place])) for method in METHODS}
    times = interleaved({name: partial(arm.seconds, arm.step) for name, arm in arms.items()}, args.rounds)
    rows = {
        name: {
            "step_s": statistics.median(times[name]),
            "step": ratios(times, name, "lora"),
            "flops": flops(arm.step),
            "forward_flops": flops(arm.forward),
            "bytes": memory(arm),
            "trained": sum(p.numel() for p in arm.model.parameters() if p.requires_grad),
        }
        for name, arm in arms.items()
    }
    for row in rows.values():
        row["flops_ratio"] = row["flops"] / rows["lora"]["flops"]
        row["memory_ratio"] = row["bytes"]["total"] / rows["lora"]["bytes"]["total"]
    return {"rank": rank, "targets": place, "methods": rows}


def bench_merged(args: BenchArguments) -> dict[str, Any]:
    """Forward of the merged model (all linears, r=8) against the base model's: still wrapped, and unloaded."""
    base = Arm(args)
    work = {"base": partial(base.seconds, base.forward)}
    for method in METHODS:
        wrapped, unloaded = (Arm(args, adapter_config(method, 8, TARGETS["all linears"])) for _ in range(2))
        wrapped.model.merge_adapter()
        unloaded.model = unloaded.model.merge_and_unload()
        for name, arm in ((f"{method} merge_adapter", wrapped), (f"{method} merge_and_unload", unloaded)):
            arm.model.eval()
            work[name] = partial(arm.seconds, arm.forward)
    base.model.eval()
    times = interleaved(work, 3 * args.rounds)  # a forward pass is short
    return {n: {"forward_s": statistics.median(t), "ratio": ratios(times, n, "base")} for n, t in times.items()}


def bars(settings: list[dict[str, Any]], merged: dict[str, Any]) -> list[dict[str, Any]]:
    """The issue's bars: what, measured value, bar, met."""
    found = []

    def add(what: str, value: float, bar: float, slack: float = 0.0) -> None:
        found.append({"what": what, "value": value, "bar": bar, "met": bool(value <= bar + slack)})

    for setting in settings:
        key = setting["rank"], setting["targets"]
        for method in METHODS[1:]:
            row, label = setting["methods"][method], f"{method}, rank {key[0]}, {key[1]}"
            if key in STEP_BAR:
                add(f"{label}: step / LoRA", row["step"]["median"], STEP_BAR[key])
            else:
                add(f"{label}: step ratio / FLOP ratio", row["step"]["median"] / row["flops_ratio"], FLOP_BAR)
            if key[0] == "8":
                add(f"{label}: memory / LoRA", row["memory_ratio"], MEMORY_BAR)
    for name, row in merged.items():
        if not name.startswith(("base", "lora")):
            add(f"{name}: forward / base", row["ratio"]["median"], MERGED_BAR, MERGED_NOISE)
    return found


def print_report(report: dict[str, Any]) -> None:
    console = Console(width=None if os.isatty(1) else 130)
    table = Table(title="One training step against peft LoRA r=8 on the same targets (median of ratios, quartiles)")
    for column in ("rank", "targets", "method", "trained", "step", "ratio", "FLOP ratio", "saved MiB", "memory ratio"):
        table.add_column(column, justify="left" if column in ("rank", "targets", "method") else "right")
    for setting in report["settings"]:
        for name, row in setting["methods"].items():
            step = row["step"]
            table.add_row(
                *("8" if name == "lora" else setting["rank"], setting["targets"], name, f"{row['trained']:,}"),
                *(f"{row['step_s']:.3f} s", f"{step['median']:.3f} [{step['q25']:.3f}, {step['q75']:.3f}]"),
                f"{row['flops_ratio']:.3f}",
                *(f"{row['bytes']['saved_for_backward'] / 2**20:.1f}", f"{row['memory_ratio']:.3f}"),
            )
        table.add_section()
    console.print(table)
    verdicts = Table(title=f"Bars (merged within {MERGED_NOISE:.0%} of timing noise)")
    for column in ("what", "value", "bar", "met"):
        verdicts.add_column(column)
    for bar in report["bars"]:
        verdicts.add_row(bar["what"], f"{bar['value']:.3f}", f"<= {bar['bar']:.2f}", "yes" if bar["met"] else "[red]no")
    console.print(verdicts)


def run(
    argv: list[str] | None, measure: Callable[[BenchArguments], dict[str, Any]], show: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """A bench's command line: parses, measures, shows and writes the report; returns it."""
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses(argv)
    if args.rounds < 1:
        raise ValueError(f"rounds is {args.rounds}; give 1 or more")
    if args.device == "cpu":
        torch.set_num_threads(1)
    load = os.getloadavg()
    found = measure(args)
    report = {
        "arguments": asdict(args),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "load_average": {"before": load, "after": os.getloadavg()},
        **found,
    }
    show(report)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    return report


def measured(args: BenchArguments) -> dict[str, Any]:
    """What this bench adds to the report."""
    settings = []
    for place in TARGETS:
        for rank in ("8", "full"):
            print(f"rank {rank}, {place} ...", flush=True)
            settings.append(bench_setting(args, rank, place))
    merged = bench_merged(args)
    return {"settings": settings, "merged": merged, "bars": bars(settings, merged)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench; returns the report it prints."""
    return run(argv, measured, print_report)


if __name__ == "__main__":
    main()
