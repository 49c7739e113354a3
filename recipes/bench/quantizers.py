"""Our quantizers and other libraries': perplexity per bit, cost, bytes.

    OMP_NUM_THREADS=1 python recipes/bench/quantizers.py --rounds 15 --out recipes/bench/results/quantizers.json \\
        --plot recipes/bench/results/quantizers.svg

bitsandbytes is measured always, hqq, optimum-quanto, torchao, sinq and auto-round where they are installed
(`quantizer_peers` says how, without touching the environment). One thread. `--parts quality` measures one part again and
keeps the others of the report in `--out`; `parts` in the report says for each what it was measured with.

Quality (`quantizer_curve`). exp of the mean negative log likelihood, over the tokens of right answers in the sandbox
model's own style, EOS included, each predicted from the prompt and the answer's true beginning (teacher forcing): ":17="
with ordered triples of digits as its answer, and "Rabcd=" -> "dcba" for as many random words, none of them among those
that calibrated methods are given. Bits per weight count all that a method needs for the quantised layers: codes at their
own width, scales, zeros, outliers, a table per layer (not tables that are the same for every layer, nor the padding and
the whole bytes of a library's own container: those are in `bytes`). All methods quantise the same layers, everything is
computed in float32. Most layers have rows of 64 weights, so here a scale per row is as fine as groups of 64; on wide
models groups are finer. Two models: the sandbox's, and the same with planted outliers: one that is BUILT so that a few
input channels are large, as they are in large language models, which favours methods that keep outliers apart.

Cost. Seconds and peak memory of quantising these models, for every point of the curve. Seconds and passes (roundings per
weight) of quantising one matrix; peak memory of loading a model of random weights from bfloat16 shards with
`from_pretrained`; tokens a second of greedy generation of a float32 model, of a bfloat16 one, and of one layer four times
as wide (where the CPU has AVX512-BF16, bitsandbytes computes its 4 bit layers in one bfloat16 kernel, of float32 models
too; ours computes in float32). Timings but those of the curve are interleaved: reported is the median of ratios within a
round.

Bytes. The saved file against bits / 8 x weights (rows padded to whole blocks) + 2 a scale + 6 an outlier + all other
tensors as they were + the file's header.
"""

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import quantizer_curve as curve
import quantizer_peers as peers
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, HfArgumentParser, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as host_logging

from hfgen import sandbox
from hfgen.kit.quantizer import PackedConfig
from hfgen.quantizers import EasyQuantConfig, NupesConfig
from hfgen.sandbox import quality

BITS = curve.BITS
PARTS = ("bytes", "quantizing", "generation", "loading", "quality")  # the last loads other libraries
SEED = 0  # of the examples, the planted channels and the calibration rows
CHANNELS, FACTOR = 1, 16.0  # planted: of each layer's 64 input channels; a power of two, so that nothing is rounded
BYTES_BAR, PASSES_BAR, SPEED_BAR = 1.02, 100, 1.0
PROMPT = 128  # tokens of the prompt whose reading is timed
RTN = EasyQuantConfig(**curve.EASYQUANT["rtn"])
LOAD_BAR, LOAD_SIZE = 2e9, 1e9  # bytes of RssAnon, for a model of that many parameters or more
BLOCKS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits -> (codes, bytes) of a block: counted apart from the kit
PLANES = {5: ((2, 1), (8, 1)), 6: ((2, 1), (4, 1))}  # the same of the planes that 5 and 6 bit codes are split into


@dataclass
class BenchArguments:
    rounds: int = field(default=15, metadata={"help": "Timed runs of each arm, after one warm-up each."})
    out: str | None = field(default=None, metadata={"help": "JSON file to write."})
    plot: str | None = field(default=None, metadata={"help": "Picture to write: perplexity over bits per weight."})
    examples: int = field(default=499, metadata={"help": "Held-out answers of each of the two tasks, 499 at most."})
    rows: int = field(default=128, metadata={"help": "Calibration sequences of the methods that take data."})
    generations: int = field(default=30, metadata={"help": "Generations of EvoPress, of 16 candidates each."})
    side: int = field(default=1024, metadata={"help": "Rows and columns of the matrix whose quantising is timed."})
    hidden: int = field(default=512, metadata={"help": "Width of the model that generates."})
    layers: int = field(default=4, metadata={"help": "Its layers."})
    tokens: int = field(default=32, metadata={"help": "Tokens it generates in one run."})
    million: float = field(default=1000.0, metadata={"help": "Million weights in the layers of the model loaded."})
    load_hidden: int = field(default=2048, metadata={"help": "Its width."})
    parts: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "Parts to measure; others are kept from the report in out."},
    )
    methods: list[str] = field(
        default_factory=list, metadata={"help": "Methods of the curve, by the names in the report; none given: all."}
    )
    load_only: str | None = field(
        default=None, metadata={"help": "FOLDER:METHOD; only load it, print the memory. The bench starts this itself."}
    )


# --- quality --------------------------------------------------------------------------------------------------------


class Texts:
    """Examples of `hfgen.sandbox.quality` as one batch per task (all rows are equally long there)."""

    def __init__(self, count: int, part: str = "held out") -> None:
        tokenizer = sandbox.load_tokenizer()
        pairs = quality.examples(SEED, count, part)
        self.batches = []
        for part in (pairs[:count], pairs[count:]):
            ids = tokenizer([p + a + tokenizer.eos_token for p, a in part], return_tensors="pt")["input_ids"]
            self.batches.append((ids, 1 + len(part[0][0])))  # BOS and the prompt
        self.tokens = sum(ids.shape[0] * (ids.shape[1] - start) for ids, start in self.batches)

    @torch.no_grad()
    def nll(self, model: Any) -> Tensor:
        """Negative log likelihood (nats) of every answer, float64 (examples)."""
        found = []
        for ids, start in self.batches:
            logp = model(input_ids=ids).logits[:, start - 1 : -1].double().log_softmax(-1)
            found.append(-logp.gather(-1, ids[:, start:, None]).sum((1, 2)))
        return torch.cat(found)


def make_planted(source: str, out: str, texts: Texts) -> dict[str, Any]:
    """Save the planted model to `out`. Raises ValueError if it does not compute what the model at `source` does."""
    model = curve.load(source)
    with torch.no_grad():
        before = [model(input_ids=ids).logits for ids, _ in texts.batches]
        quality.plant(model, CHANNELS, FACTOR, SEED)
        after = [model(input_ids=ids).logits for ids, _ in texts.batches]
    worst = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    if worst > 1e-4:
        raise ValueError(f"the planted model's logits differ by {worst}; it must compute what the sandbox model does")
    model.save_pretrained(out)
    return {
        "built": True,
        "how": f"{CHANNELS} input channel of q, k, v, gate, up x {FACTOR:g}, that channel of the norm before / {FACTOR:g}",
        "largest_logit_difference": worst,
    }


# --- cost -----------------------------------------------------------------------------------------------------------


def interleaved(arms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
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
                start = time.perf_counter()
                arms[name]()
                found[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return found


def ratios(found: dict[str, list[float]], name: str, peer: str) -> dict[str, float]:
    """Median and quartiles over rounds of name's time / peer's time."""
    values = [a / b for a, b in zip(found[name], found[peer], strict=True)]
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "q25": low, "q75": high}


class CountRounding(TorchDispatchMode):
    """Counts the numbers that torch rounds: a method that codes every weight once has one a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.round, torch.ops.aten.round_):
            self.numbers += args[0].numel()
        return func(*args, **(kwargs or {}))


def passes(config: PackedConfig, weight: Tensor) -> float:
    """Roundings per weight."""
    with CountRounding() as counter:
        config.quantize_checked(weight, "the bench's matrix")
    return counter.numbers / weight.numel()


def bench_quantizing(args: BenchArguments) -> dict[str, Any]:
    """Seconds per million weights at 4 bit. Ours without packing the codes, the others as they come."""
    weight = torch.randn(args.side, args.side, generator=torch.Generator().manual_seed(0))
    configs: dict[str, PackedConfig] = {
        "rtn": RTN,
        "easyquant grid": EasyQuantConfig(),
        "easyquant adam": EasyQuantConfig(optimizer="adam"),
        "nupes, per layer": NupesConfig(exponent="per_layer"),
    }
    work: dict[str, Callable[[], Any]] = {
        name: partial(config.quantize_checked, weight, name) for name, config in configs.items()
    }
    work |= {
        name: partial(method, weight)
        for (name, bits), method in peers.data_free().items()
        if bits == 4 and ("groups" not in name or name.endswith("of 64"))
    }
    times = interleaved(work, args.rounds)
    return {
        name: {
            "seconds_per_million": statistics.median(times[name]) / weight.numel() * 1e6,
            "over_rtn": ratios(times, name, "rtn"),
            "passes": passes(configs[name], weight) if "easyquant" in name or name == "rtn" else None,
        }
        for name in work
    }


def make_shards(args: BenchArguments, folder: str) -> dict[str, int]:
    """Write a Llama of random bfloat16 weights, a file a layer; returns its parameters and those that get quantised."""
    d, inner = args.load_hidden, args.load_hidden * 11 // 4
    layers = max(1, round(args.million * 1e6 / (4 * d * d + 3 * d * inner)))
    config = LlamaConfig(
        hidden_size=d, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=max(1, d // 64),
        vocab_size=8192, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for i in range(-1, layers):
        names = [n for n in shapes if (int(n.split(".")[2]) if n.startswith("model.layers.") else -1) == i]
        tensors = {
            n: torch.ones(shapes[n], dtype=torch.bfloat16)
            if len(shapes[n]) == 1
            else torch.empty(shapes[n], dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            for n in names
        }
        file = f"model-{i + 1:05d}.safetensors"
        save_file(tensors, f"{folder}/{file}", metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    config.save_pretrained(folder)
    Path(folder, "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    sizes = {name: math.prod(s) for name, s in shapes.items()}
    quantized = sum(size for name, size in sizes.items() if name.endswith("_proj.weight"))
    return {"parameters": sum(sizes.values()), "quantized_weights": quantized}


def rss_anon() -> int:
    """Anonymous resident bytes of this process (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def load_configs() -> dict[str, Any]:
    return {
        "easyquant": EasyQuantConfig(),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }


def load_only(folder: str, method: str) -> dict[str, float]:
    """Load the folder in this process: seconds; RssAnon before, after, and its peak, polled every 2 ms."""
    config, done, before = load_configs()[method], threading.Event(), rss_anon()
    peak = before

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, rss_anon())

    thread, start = threading.Thread(target=watch), time.perf_counter()
    thread.start()
    try:
        model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    finally:
        done.set()
        thread.join()
    seconds, after = time.perf_counter() - start, rss_anon()
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    held += sum(p.quant_state.absmax.nbytes for p in model.parameters() if hasattr(p, "quant_state"))  # nf4's scales
    return {"seconds": seconds, "before": before, "peak": max(peak, after), "after": after, "tensors": held}


def bench_loading(args: BenchArguments) -> dict[str, Any]:
    """`load_only` of every method, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = make_shards(args, folder)
        rows = {}
        for method in load_configs():
            command = [sys.executable, __file__, "--load_only", f"{folder}:{method}"]
            env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"loading with {method} failed: {done.stderr[-2000:]}")
            rows[method] = json.loads(done.stdout.splitlines()[-1])
            rows[method]["peak_over_start"] = rows[method]["peak"] - rows[method]["before"]
    return sizes | {"methods": rows}


def generators(hidden: int, layers: int, dtype: torch.dtype) -> dict[str, Any]:
    """One random Llama: plain, with our 4 bit layers, and with bitsandbytes'."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 3, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64), vocab_size=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    nf4_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        configs = {"float32": None, "easyquant": EasyQuantConfig(), "rtn": RTN, "nf4": nf4_config}
        return {name: curve.load(folder, quantization, dtype) for name, quantization in configs.items()}


def bench_speed(models: dict[str, Any], args: BenchArguments) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    """Of every model: tokens a second of generation at batch 1, its ratios, those of reading `PROMPT` tokens; the work."""
    ids = torch.randint(1024, (1, 16), generator=torch.Generator().manual_seed(1))
    work: dict[str, Callable[[], Any]] = {
        name: partial(
            model.generate, ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            max_new_tokens=args.tokens, min_new_tokens=args.tokens,
        )
        for name, model in models.items()
    }  # fmt: skip
    times = interleaved(work, args.rounds)
    prompt = torch.randint(1024, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        reading = interleaved({name: partial(model, prompt) for name, model in models.items()}, args.rounds)
    found: dict[str, Any] = {
        name: {
            "tokens_per_second": args.tokens / statistics.median(times[name]),
            "speed_over_nf4": ratios(times, "nf4", name),
            "speed_over_float32": ratios(times, "float32", name),
            "prompt_speed_over_nf4": ratios(reading, "nf4", name),
        }
        for name in models
    }
    return found, work


def bench_generation(args: BenchArguments) -> dict[str, Any]:
    """`bench_speed` in float32, and what takes the time; then in bfloat16 and of a layer four times as wide, in both.

    The arm called float32 is the plain model, in whichever dtype.
    """
    found, work = bench_speed(generators(args.hidden, args.layers, torch.float32), args)
    for name, row in found.items():
        row |= {"time_share": time_share(work[name]), "other_models": {}}
    for label, hidden, layers, dtype in (
        ("bfloat16", args.hidden, args.layers, torch.bfloat16),
        ("wide float32", 4 * args.hidden, 1, torch.float32),
        ("wide bfloat16", 4 * args.hidden, 1, torch.bfloat16),
    ):
        for name, row in bench_speed(generators(hidden, layers, dtype), args)[0].items():
            found[name]["other_models"][label] = row
    return found


def time_share(work: Callable[[], Any], top: int = 6) -> dict[str, float]:
    """Share of the time spent in torch's operations, of the `top` dearest of them and all others together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    found = {e.key: e.self_cpu_time_total / total for e in events[:top]}
    return found | {"others": 1 - sum(found.values())}


# --- bytes ----------------------------------------------------------------------------------------------------------


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row's codes, planes filled to whole blocks."""
    return sum(-(-columns // codes) * size for codes, size in PLANES.get(bits) or (BLOCKS[bits],))


def bench_bytes(folder: str, bits: int, out: str) -> dict[str, Any]:
    """The file that save_pretrained writes, and the bytes that it may have, counted from the plain model."""
    plain, model = curve.load(folder), curve.load(folder, EasyQuantConfig(bits=bits))
    names = model.hf_quantizer.quantized
    model.save_pretrained(out)
    path = Path(out, "model.safetensors")
    with safe_open(path, "pt") as file:
        outliers = sum(math.prod(file.get_slice(f"{name}.outlier_idx").get_shape()) for name in names)
    with open(path, "rb") as raw:
        header = 8 + int.from_bytes(raw.read(8), "little")
    shapes = [tuple(plain.get_submodule(name).weight.shape) for name in names]
    parts = {
        "codes": sum(m * row_bytes(n, bits) for m, n in shapes),
        "scales": sum(2 * m for m, _ in shapes),
        "outliers": 6 * outliers,
        "other_tensors": sum(p.nbytes for n, p in plain.named_parameters() if n.removesuffix(".weight") not in names),
        "header": header,
    }
    bound = sum(parts.values())
    whole = sum(m * n for m, n in shapes) * bits / 8
    found = path.stat().st_size
    return {
        "bits": bits,
        "file": found,
        "bound": bound,
        "ratio": found / bound,
        "parts": parts,
        "padding": parts["codes"] - whole,
        "float_file": sum(p.nbytes for p in plain.parameters()),
    }


def make_odd(folder: str) -> None:
    """A random Llama whose widths (61 and 151) fill no block of codes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=61, intermediate_size=151, num_hidden_layers=3, num_attention_heads=1, head_dim=16, vocab_size=101
    )
    LlamaForCausalLM(config).save_pretrained(folder)


# --- report ---------------------------------------------------------------------------------------------------------


def row_of(quality: dict[str, Any], model: str, method: str, bits: int) -> dict[str, Any]:
    return next(r for r in quality[model]["methods"] if (r["method"], r["bits"]) == (method, bits))


def bars(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The issue's bars: what, measured value, the rule, the bar, met."""
    found = []

    def add(what: str, value: float, rule: str, bar: float) -> None:
        met = {"<": value < bar, "<=": value <= bar, ">=": value >= bar}[rule]
        found.append({"what": what, "value": value, "rule": rule, "bar": bar, "met": met})

    def perplexity(model: str, method: str, bits: int) -> float:
        value: float = row_of(report["quality"], model, method, bits)["perplexity"]
        return value

    for model, bits, peer, rule in (
        ("sandbox", 3, "rtn", "<"),
        ("planted", 4, "rtn", "<"),
        ("planted", 4, "bitsandbytes nf4", "<="),
    ):
        what = f"{model}, {bits} bit: perplexity of easyquant against {peer}"
        add(what, perplexity(model, "easyquant", bits), rule, perplexity(model, peer, bits))
    for model, part in report["quality"].items():
        if best := curve.best(part):
            what = f"{model}, 3 bit: gap of our best data-free setting / the data-free peers' envelope"
            add(what, best["ratio"], "<=", 1.0)
    add("passes of the default optimizer", report["quantizing"]["easyquant grid"]["passes"], "<", PASSES_BAR)
    speed = report["generation"]["easyquant"]["speed_over_nf4"]["median"]
    add("generation: easyquant's speed / nf4's (a goal)", speed, ">=", SPEED_BAR)
    loading = report["loading"]
    if loading["parameters"] >= LOAD_SIZE:
        add("loading: peak RssAnon in bytes", loading["methods"]["easyquant"]["peak"], "<", LOAD_BAR)
    for model, rows in report["bytes"].items():
        for row in rows:
            add(f"{model}, {row['bits']} bit: bytes of the file / bound", row["ratio"], "<=", BYTES_BAR)
    return found


def print_table(console: Console, title: str, columns: str, rows: list[list[str]]) -> None:
    table = Table(title=title)
    for i, column in enumerate(columns.split("|")):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_quality(console: Console, model: str, part: dict[str, Any]) -> None:
    """Ours, the calibrated ones, and the peers' envelope; all others are in the JSON."""
    front = [(p["method"], p["bits"]) for p in part["curve"]["envelope"]]
    shown = [r for r in part["methods"] if not curve.is_peer(r) or (r["method"], r["bits"]) in front]
    rows = [
        [
            *(r["method"], "yes" if r["calibrated"] else "", str(r["bits"]), f"{r['bits_per_weight']:.3f}"),
            *(f"{r['bytes'] / 1024:.1f}", f"{r['seconds']:.3f}", f"{r['peak_bytes'] / 1024:.0f}"),
            f"{r['perplexity']:.4f}",
            f"{r['over_float']['nats_per_token']:+.4f} ± {r['over_float']['standard_error']:.4f}",
        ]
        for r in sorted(shown, key=lambda r: (r["bits"], r["perplexity"]))
    ]
    title = f"{model} model, perplexity in float {part['float_perplexity']:.4f}"
    columns = "method|calibrated|bits|bits per weight|KiB|seconds|peak KiB|perplexity|nats per token over float"
    print_table(console, title + " (outliers BUILT in)" * (model == "planted"), columns, rows)
    rows = [
        [
            *(r["method"], "yes" if r["calibrated"] else "", f"{r['bits_per_weight']:.3f}", f"{r['gap']:.4f}"),
            *(("-",) * 2 if r["ratio"] is None else (f"{r['envelope']:.4f}", f"{r['ratio']:.3f}")),
            "-" if r["ratio"] is None else "{:.3f} to {:.3f}".format(*r["interval"]),
        ]
        for r in part["curve"]["ours_at_3_bits"]
    ]
    title = f"{model} model: ours with 3 bit codes beside the envelope of the data-free peers, best first as chosen"
    print_table(console, title, "method|calibrated|bits per weight|nats over float|the envelope's|ratio|95%", rows)


def print_report(report: dict[str, Any]) -> None:
    console = Console(width=None if os.isatty(1) else 150)
    for model, part in report["quality"].items():
        print_quality(console, model, part)
    rows = [
        [
            *(name, f"{r['seconds_per_million']:.3f}", f"{r['over_rtn']['median']:.1f}"),
            "-" if r["passes"] is None else f"{r['passes']:.0f}",
        ]
        for name, r in report["quantizing"].items()
    ]
    print_table(console, "Quantising to 4 bit", "method|seconds per million weights|over rtn|passes", rows)
    loading = report["loading"]
    rows = [
        [
            *(name, f"{r['seconds']:.1f}"),
            *(f"{r[k] / 2**20:.0f}" for k in ("before", "peak", "peak_over_start", "tensors")),
        ]
        for name, r in loading["methods"].items()
    ]
    title = f"Loading {loading['parameters'] / 1e6:.1f} M parameters (MiB of RssAnon, mapped files not counted)"
    print_table(console, title, "method|seconds|start|peak|peak - start|the model's tensors", rows)
    rows = [
        [
            *(name, label, f"{r['tokens_per_second']:.1f}"),
            *(f"{r[k]['median']:.2f}" for k in ("speed_over_nf4", "speed_over_float32", "prompt_speed_over_nf4")),
            ", ".join(f"{op.removeprefix('aten::')} {share:.0%}" for op, share in r.get("time_share", {}).items()),
        ]
        for name, row in report["generation"].items()
        for label, r in {"float32": row, **row["other_models"]}.items()
    ]
    columns = f"method|model|tokens/s|speed / nf4|speed / plain|speed / nf4, prompt of {PROMPT}|where the time goes"
    print_table(console, "Greedy generation", columns, rows)
    rows = [
        [b["what"], f"{b['value']:.4f}", f"{b['rule']} {b['bar']:.4f}", "yes" if b["met"] else "[red]no"]
        for b in report["bars"]
    ]
    print_table(console, "Bars", "what|value|bar|met", rows)


def stamp(args: BenchArguments, load_before: tuple[float, float, float]) -> dict[str, Any]:
    """What a part was measured with."""
    names = ("torch", "transformers", "bitsandbytes", "kernels", *peers.LIBRARIES)
    return {
        "arguments": asdict(args),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: peers.installed(name) or "not installed" for name in names},
        "threads": torch.get_num_threads(),
        "load_average": {"before": load_before, "after": os.getloadavg()},
    }


def measure_models(args: BenchArguments, part: str) -> dict[str, Any]:
    """Bytes, or the curve, of the sandbox's model and of the planted one: the report's entries."""
    texts, source = Texts(args.examples), str(sandbox.path())
    with tempfile.TemporaryDirectory() as work:
        models = {"sandbox": source, "planted": f"{work}/planted"}
        built = make_planted(source, models["planted"], texts)
        if part == "bytes":
            make_odd(f"{work}/odd")
            models["odd widths"] = f"{work}/odd"
            return {part: {n: [bench_bytes(p, bits, f"{work}/{n}-{bits}") for bits in BITS] for n, p in models.items()}}
        choice, rows = Texts(args.examples, "calibrate"), quality.rows(SEED, args.rows)
        options = (args.generations, min(3, args.rounds), args.methods)
        found = {name: curve.bench_quality(path, texts, choice, rows, *options) for name, path in models.items()}
        return {"planted": built, "answer_tokens": texts.tokens, part: found}


def run(args: BenchArguments, kept: dict[str, Any]) -> dict[str, Any]:
    """The parts that are asked for, over those of an earlier report."""
    report: dict[str, Any] = {"parts": {}} | kept
    work = {"quantizing": bench_quantizing, "generation": bench_generation, "loading": bench_loading}
    for name in PARTS:
        if name in args.parts:
            print(f"{name} ...", flush=True)
            load_before = os.getloadavg()
            if name in work:
                report[name] = work[name](args)
            else:
                report |= measure_models(args, name)
            report["parts"][name] = stamp(args, load_before)
    report["bars"] = bars(report)
    return report


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench; returns the report it prints."""
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses(argv)
    torch.set_num_threads(1)
    host_logging.disable_progress_bar()
    if args.load_only:
        found = load_only(*args.load_only.rsplit(":", 1))
        print(json.dumps(found))
        return found
    if args.rounds < 1:
        raise ValueError(f"rounds is {args.rounds}; give 1 or more")
    if args.examples < 2:
        raise ValueError(f"examples is {args.examples}; give 2 to 499")
    kept: dict[str, Any] = {}
    if set(args.parts) != set(PARTS):
        if odd := sorted(set(args.parts) - set(PARTS)):
            raise ValueError(f"parts has {odd[0]!r}; give some of {', '.join(PARTS)}")
        if not args.out or not Path(args.out).exists():
            raise ValueError(f"parts is {args.parts}; the others are kept from an earlier report, name it with out")
        kept = json.loads(Path(args.out).read_text(encoding="utf-8"))
    report = run(args, kept)
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_report(report)
    if args.plot:
        curve.plot(report["quality"], args.plot)
    return report


if __name__ == "__main__":
    main()
