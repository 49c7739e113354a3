"""EasyQuant against round to nearest, bitsandbytes nf4, hqq and quanto: perplexity per bit, cost, bytes.

    OMP_NUM_THREADS=1 python recipes/bench/quantizers.py --rounds 15 --out recipes/bench/results/quantizers.json \\
        --plot recipes/bench/results/quantizers.svg

hqq and optimum-quanto are measured where they are installed. One thread.

Quality. exp of the mean negative log likelihood, over the tokens of right answers in the sandbox model's own style, EOS
included, each predicted from the prompt and the answer's true beginning (teacher forcing): ":17=" with every ordered
triple of digits as its answer, and "Rabcd=" -> "dcba" for as many random words. Bits per weight count all that a method
stores for the quantised layers (codes, padding, scales, zeros, outliers; not tables that are the same for every layer).
All methods quantise the same layers, everything is computed in float32. Most layers have rows of 64 weights, so here a
scale per row (ours) is as fine as the groups of 64 of nf4 and hqq; on wide models theirs are finer. Two models: the
sandbox's, and the same with planted outliers (`plant`): one that is BUILT so that a few input channels are large, as they
are in large language models, which favours methods that keep outliers apart.

Cost. Seconds and passes (roundings per weight) of quantising one matrix; peak memory of loading a model of random
weights from bfloat16 shards with `from_pretrained`; tokens a second of greedy generation of a float32 model, of a bfloat16
one, and of one layer four times as wide (where the CPU has AVX512-BF16, bitsandbytes computes its 4 bit layers in one
bfloat16 kernel, of float32 models too; ours computes in float32). Timings are interleaved: reported is
the median of ratios within a round.

Bytes. The saved file against bits / 8 x weights (rows padded to whole blocks) + 2 a scale + 6 an outlier + all other
tensors as they were + the file's header.
"""

import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, HfArgumentParser, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as host_logging

from hfgen import sandbox
from hfgen.quantizers import EasyQuantConfig

BITS = (2, 3, 4, 8)
CHANNELS, FACTOR = 1, 16.0  # planted: of each layer's 64 input channels; a power of two, so that nothing is rounded
BYTES_BAR, PASSES_BAR, SPEED_BAR = 1.02, 100, 1.0
PROMPT = 128  # tokens of the prompt whose reading is timed
FLOOR = 1e-4  # of the plot, which is logarithmic: below that, differences are noise
LOAD_BAR, LOAD_SIZE = 2e9, 1e9  # bytes of RssAnon, for a model of that many parameters or more
OURS: dict[str, dict[str, Any]] = {
    "rtn": {"n_sigma": None, "optimizer": "none"},
    "outliers apart only": {"optimizer": "none"},
    "scale search only": {"n_sigma": None},
    "easyquant": {},
}
BLOCKS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits -> (codes, bytes) of a block: counted apart from the kit
Coded = tuple[Tensor, int]  # a weight after quantisation, in float32, and the bytes it is stored in


@dataclass
class BenchArguments:
    rounds: int = field(default=15, metadata={"help": "Timed runs of each arm, after one warm-up each."})
    out: str | None = field(default=None, metadata={"help": "JSON file to write."})
    plot: str | None = field(default=None, metadata={"help": "Picture to write: perplexity over bits per weight."})
    examples: int = field(default=1000, metadata={"help": "Answers of each of the two tasks, 1000 at most."})
    side: int = field(default=1024, metadata={"help": "Rows and columns of the matrix whose quantising is timed."})
    hidden: int = field(default=512, metadata={"help": "Width of the model that generates."})
    layers: int = field(default=4, metadata={"help": "Its layers."})
    tokens: int = field(default=32, metadata={"help": "Tokens it generates in one run."})
    million: float = field(default=1000.0, metadata={"help": "Million weights in the layers of the model loaded."})
    load_hidden: int = field(default=2048, metadata={"help": "Its width."})
    load_only: str | None = field(
        default=None, metadata={"help": "FOLDER:METHOD; only load it, print the memory. The bench starts this itself."}
    )


# --- methods --------------------------------------------------------------------------------------------------------


def installed(distribution: str) -> str | None:
    """Its version; None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def nf4(double: bool, weight: Tensor) -> Coded:
    """bitsandbytes nf4 in blocks of 64; `double`: the blocks' maxima are 8 bit codes themselves."""
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=double
    )
    stored = [codes, state.absmax, *((state.state2.absmax, state.offset) if double else ())]
    return bitsandbytes.functional.dequantize_4bit(codes, state), sum(t.nbytes for t in stored)


def hqq(bits: int, weight: Tensor) -> Coded:
    """hqq in groups of 64 along a row, with 16 bit scales and zeros."""
    from hqq.core.quantize import Quantizer

    found = Quantizer.quantize(weight, nbits=bits, group_size=64, axis=1, device="cpu")
    codes, meta = Quantizer.cpu(*found)
    meta["compute_dtype"] = torch.float32
    return Quantizer.dequantize(codes, meta), sum(t.nbytes for t in (codes, meta["scale"], meta["zero"]))


def quanto(bits: int, weight: Tensor) -> Coded:
    """optimum-quanto's QLinear as it is by default, of a float16 layer so that scales have 16 bits."""
    import optimum.quanto as q

    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False).half()
    plain.weight.data = weight.half()
    layer = q.QLinear.from_module(plain, weights={2: q.qint2, 4: q.qint4, 8: q.qint8}[bits])
    layer.freeze()
    stored = sum(t.nbytes for name, t in layer.state_dict().items() if name.startswith("weight"))
    parts = layer.weight
    if bits == 8:  # dequantised in float32, as everything here is
        return parts._data.float() * parts._scale.float(), stored
    parts = q.WeightQBitsTensor(
        parts.qtype, parts.axis, parts._group_size, parts.size(), parts.stride(), parts._data,
        parts._scale.float(), parts._shift.float() if parts._shift.is_floating_point() else parts._shift,
    )  # fmt: skip
    return parts.dequantize(), stored


def peers() -> dict[tuple[str, int], Callable[[Tensor], Coded]]:
    """{(name, bits): method} of the others that are installed."""
    found: dict[tuple[str, int], Callable[[Tensor], Coded]] = {
        ("nf4", 4): partial(nf4, False),
        ("nf4 double quant", 4): partial(nf4, True),
    }
    if installed("hqq"):
        found |= {("hqq", bits): partial(hqq, bits) for bits in BITS}
    if installed("optimum-quanto"):
        found |= {("quanto", bits): partial(quanto, bits) for bits in (2, 4, 8)}
    return found


def ours(name: str, bits: int) -> EasyQuantConfig:
    return EasyQuantConfig(bits=bits, **OURS[name])


# --- quality --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plant(model: Any, channels: int = CHANNELS, factor: float = FACTOR, seed: int = 0) -> None:
    """Make `channels` input channels of q, k, v, gate and up `factor` times as large, and what feeds them as much smaller.

    The gain of the norm before them is divided, so the model computes the same. In place.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups = {
            layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, linears in groups.items():
            chosen = torch.randperm(norm.weight.numel(), generator=generator)[:channels]
            norm.weight[chosen] /= factor
            for linear in linears:
                linear.weight[:, chosen] *= factor


def examples(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, answer): `count` of the 1000 sums and as many reversals."""
    rng = random.Random(seed)
    triples = [t for total in sandbox.tasks.SUMS for t in sandbox.tasks.triples(total)]
    words = ["".join(rng.choices(sandbox.tasks.LETTERS, k=4)) for _ in range(count)]
    sums = [(f":{sum(t):02d}=", sandbox.tasks.plain(t)) for t in rng.sample(triples, count)]
    return sums + [(f"R{word}=", word[::-1]) for word in words]


class Texts:
    """Examples as one batch per task (all rows are equally long there)."""

    def __init__(self, count: int) -> None:
        tokenizer = sandbox.load_tokenizer()
        pairs = examples(count)
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


def difference(a: Tensor, b: Tensor, tokens: int) -> dict[str, float]:
    """Mean of a - b per token, and its standard error over examples."""
    gap = a - b
    return {"nats_per_token": float(gap.sum()) / tokens, "standard_error": float(gap.std()) * len(gap) ** 0.5 / tokens}


def load(folder: str, config: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()


def stored_bytes(layer: nn.Module) -> int:
    """Bytes of a packed layer's codes, scales and outliers."""
    return sum(t.nbytes for name, t in (*layer.named_parameters(), *layer.named_buffers()) if name != "bias")


def with_ours(folder: str, name: str, bits: int) -> tuple[Any, int]:
    """The model with packed layers, and their bytes."""
    model = load(folder, ours(name, bits))
    return model, sum(stored_bytes(model.get_submodule(n)) for n in model.hf_quantizer.quantized)


@torch.no_grad()
def with_peer(folder: str, method: Callable[[Tensor], Coded], names: list[str]) -> tuple[Any, int]:
    """The model whose layers `names` hold what the method makes of their weights, and the bytes of that."""
    model, stored = load(folder), 0
    for name in names:
        weight = model.get_submodule(name).weight
        coded, size = method(weight.data)
        weight.copy_(coded)
        stored += size
    return model, stored


def bench_quality(folder: str, texts: Texts) -> dict[str, Any]:
    """Perplexity and bits per weight of every method on the model in `folder`."""
    plain = load(folder)
    names = load(folder, EasyQuantConfig()).hf_quantizer.quantized
    weights = {name: plain.get_submodule(name).weight.data for name in names}
    total = sum(w.numel() for w in weights.values())
    size = sum(float(w.square().sum()) for w in weights.values())
    exact = texts.nll(plain)
    arms: dict[tuple[str, int], Callable[[], tuple[Any, int]]] = {
        (name, bits): partial(with_ours, folder, name, bits) for name in OURS for bits in BITS
    }
    arms |= {key: partial(with_peer, folder, method, names) for key, method in peers().items()}
    rows, nlls = [], {}
    for (name, bits), make in arms.items():
        model, stored = make()
        nlls[name, bits] = nll = texts.nll(model)
        error = sum(float((dense(model.get_submodule(n)) - w).square().sum()) for n, w in weights.items())
        rows.append(
            {
                "method": name,
                "bits": bits,
                "bits_per_weight": 8 * stored / total,
                "perplexity": math.exp(float(nll.sum()) / texts.tokens),
                "over_float": difference(nll, exact, texts.tokens),
                "relative_weight_error": error / size,
            }
        )
    pairs = [("easyquant", bits, peer, bits) for peer in ("rtn", "scale search only") for bits in BITS]
    pairs += [("easyquant", bits, "nf4", 4) for bits in (3, 4)]
    return {
        "float_perplexity": math.exp(float(exact.sum()) / texts.tokens),
        "quantized_layers": len(names),
        "quantized_weights": total,
        "methods": rows,
        "paired": [
            {"a": f"{a} {i} bit", "b": f"{b} {j} bit"} | difference(nlls[a, i], nlls[b, j], texts.tokens)
            for a, i, b, j in pairs
        ],
    }


def dense(layer: Any) -> Tensor:
    """The weight in float32, of a packed or a plain layer."""
    found: Tensor = layer.dequantize() if hasattr(layer, "dequantize") else layer.weight.data
    return found


def make_planted(source: str, out: str, texts: Texts) -> dict[str, Any]:
    """Save the planted model to `out`. Raises ValueError if it does not compute what the model at `source` does."""
    model = load(source)
    with torch.no_grad():
        before = [model(input_ids=ids).logits for ids, _ in texts.batches]
        plant(model)
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


def passes(config: EasyQuantConfig, weight: Tensor) -> float:
    with CountRounding() as counter:
        config.quantize_checked(weight, "the bench's matrix")
    return counter.numbers / weight.numel()


def bench_quantizing(args: BenchArguments) -> dict[str, Any]:
    """Seconds per million weights at 4 bit. Ours without packing the codes, the others as they come."""
    weight = torch.randn(args.side, args.side, generator=torch.Generator().manual_seed(0))
    configs = {
        "rtn": ours("rtn", 4),
        "easyquant grid": ours("easyquant", 4),
        "easyquant adam": EasyQuantConfig(optimizer="adam"),
    }
    work: dict[str, Callable[[], Any]] = {
        name: partial(config.quantize_checked, weight, name) for name, config in configs.items()
    }
    work |= {name: partial(method, weight) for (name, bits), method in peers().items() if bits == 4}
    times = interleaved(work, args.rounds)
    return {
        name: {
            "seconds_per_million": statistics.median(times[name]) / weight.numel() * 1e6,
            "over_rtn": ratios(times, name, "rtn"),
            "passes": passes(configs[name], weight) if name in configs else None,
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
        configs = {"float32": None, "easyquant": EasyQuantConfig(), "rtn": ours("rtn", 4), "nf4": nf4_config}
        return {name: load(folder, quantization, dtype) for name, quantization in configs.items()}


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


def bench_bytes(folder: str, bits: int, out: str) -> dict[str, Any]:
    """The file that save_pretrained writes, and the bytes that it may have, counted from the plain model."""
    plain, model = load(folder), load(folder, EasyQuantConfig(bits=bits))
    names = model.hf_quantizer.quantized
    model.save_pretrained(out)
    path = Path(out, "model.safetensors")
    with safe_open(path, "pt") as file:
        outliers = sum(math.prod(file.get_slice(f"{name}.outlier_idx").get_shape()) for name in names)
    with open(path, "rb") as raw:
        header = 8 + int.from_bytes(raw.read(8), "little")
    shapes = [tuple(plain.get_submodule(name).weight.shape) for name in names]
    codes, size = BLOCKS[bits]
    parts = {
        "codes": sum(m * -(-n // codes) * size for m, n in shapes),
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
        ("planted", 4, "nf4", "<="),
    ):
        what = f"{model}, {bits} bit: perplexity of easyquant against {peer}"
        add(what, perplexity(model, "easyquant", bits), rule, perplexity(model, peer, bits))
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


def print_report(report: dict[str, Any]) -> None:
    console = Console(width=None if os.isatty(1) else 130)
    for model, quality in report["quality"].items():
        rows = [
            [
                *(r["method"], str(r["bits"]), f"{r['bits_per_weight']:.3f}", f"{r['perplexity']:.4f}"),
                f"{r['over_float']['nats_per_token']:+.4f} ± {r['over_float']['standard_error']:.4f}",
                f"{r['relative_weight_error']:.5f}",
            ]
            for r in sorted(quality["methods"], key=lambda r: (r["bits"], r["perplexity"]))
        ]
        title = f"{model} model, perplexity in float {quality['float_perplexity']:.4f}" + (
            " (outliers BUILT in)" if model == "planted" else ""
        )
        print_table(
            console, title, "method|bits|bits per weight|perplexity|nats per token over float|weight error", rows
        )
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


def plot(quality: dict[str, Any], path: str) -> None:
    """What the perplexity is above float's, over effective bits per weight, a panel per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.fonttype"] = "none"
    figure, axes = pyplot.subplots(1, len(quality), figsize=(11, 4.2), sharey=True)
    for axis, (model, part) in zip(axes, quality.items(), strict=True):
        methods = list(dict.fromkeys(r["method"] for r in part["methods"]))
        for i, method in enumerate(methods):
            points = sorted(
                (r["bits_per_weight"], max(FLOOR, r["perplexity"] - part["float_perplexity"]))
                for r in part["methods"]
                if r["method"] == method
            )
            style = {"linewidth": 2.2, "zorder": 3} if method == "easyquant" else {"linewidth": 1, "alpha": 0.8}
            axis.plot(*zip(*points, strict=True), marker="osv^Dx+*P"[i % 9], label=method, **style)
        axis.set(title=f"{model} model{' (outliers built in)' if model == 'planted' else ''}", yscale="log")
        axis.set_xlabel("bits per weight, scales, zeros and outliers counted")
    axes[0].set_ylabel(f"perplexity - float32's perplexity (least {FLOOR:g})")
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
    pyplot.close(figure)


def run(args: BenchArguments) -> dict[str, Any]:
    """All parts, in order."""
    load_before, texts, source = os.getloadavg(), Texts(args.examples), str(sandbox.path())
    names = ("torch", "transformers", "bitsandbytes", "hqq", "optimum-quanto", "kernels")
    report: dict[str, Any] = {
        "arguments": asdict(args),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: installed(name) or "not installed" for name in names},
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as work:
        planted, odd = f"{work}/planted", f"{work}/odd"
        report["planted"] = make_planted(source, planted, texts)
        make_odd(odd)
        print("quality ...", flush=True)
        report["answer_tokens"] = texts.tokens
        report["quality"] = {
            name: bench_quality(path, texts) for name, path in (("sandbox", source), ("planted", planted))
        }
        print("bytes ...", flush=True)
        report["bytes"] = {
            name: [bench_bytes(path, bits, f"{work}/{name}-{bits}") for bits in BITS]
            for name, path in (("sandbox", source), ("planted", planted), ("odd widths", odd))
        }
    for name, part in (("quantizing", bench_quantizing), ("generation", bench_generation), ("loading", bench_loading)):
        print(f"{name} ...", flush=True)
        report[name] = part(args)
    report["bars"] = bars(report)
    report["load_average"] = {"before": load_before, "after": os.getloadavg()}
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
    if not 1 < args.examples <= 1000:
        raise ValueError(f"examples is {args.examples}; give 2 to 1000")
    report = run(args)
    print_report(report)
    if args.plot:
        plot(report["quality"], args.plot)
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
