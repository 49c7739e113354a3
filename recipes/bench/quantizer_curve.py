"""Perplexity against effective bits per weight, for recipes/bench/quantizers.py: the arms, the envelope, the picture.

Gap: what the mean negative log likelihood is above float32's, in nats per token (its exp is the ratio of perplexities).

Envelope of the data-free peers: of their points (bits per weight, gap), those that no other of them beats in both, in
order of bits; between two of them log(gap) is linear in bits per weight, left of the first there is none (and no bar),
right of the last the gap is the last one's. Gaps below `FLOOR` are noise and count as `FLOOR`. Each library has several
settings in the race, as we have; all are in the report.

The bar: the best of our data-free settings with 3 bit codes is on or below the envelope, which is its gap over that of the
envelope at its bits per weight: `ratio` <= 1. Which is the best is chosen on the calibration examples, the ratio is that
on the held-out ones, with a 95% interval over examples (delta method; the envelope's points are taken as they were found).

Seconds and peak: of quantising all layers of a model that is in memory, until codes and scales are packed as the method
stores them; of calibrated methods with their own passes over the calibration rows. `peak_bytes` is the most that torch's
CPU allocator held at once beyond what it held before, counted by torch's profiler in a run of its own (so numpy's memory
is not in it), which for methods that train or search is one of `BRIEF` steps.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import quantizer_peers
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from transformers import LlamaForCausalLM

from hfgen.kit.levels import Levels
from hfgen.kit.quantizer import PackedConfig, PackedLinear, adopt, quantizable
from hfgen.quantizers import AdaQuantConfig, EasyQuantConfig, NupesConfig
from hfgen.searches import additive_bits, evopress

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes two lines for every run

BITS = (2, 3, 4, 5, 6, 8)
MENU = (2, 3, 4, 5, 6)  # widths that bits per layer are chosen from
FLOOR = 1e-4  # nats per token
THREE = 3  # bits of the codes that the bar is about
BRIEF = 3  # steps (generations) of the run whose memory is measured, of methods that take many
HFGEN = "hfgen"  # library of our own arms
Rows = list[dict[str, Any]]  # calibration sequences
Finish = Callable[[], tuple[Any, float, int]]  # -> the quantised model, bytes without padding, bytes held
EASYQUANT: dict[str, dict[str, Any]] = {
    "rtn": {"n_sigma": None, "optimizer": "none"},
    "outliers apart only": {"optimizer": "none"},
    "scale search only": {"n_sigma": None},
    "easyquant": {},
}


@dataclass(frozen=True)
class Arm:
    """One method at one width. `work(model)` quantises a float model in memory; what it returns then puts it in place."""

    name: str
    bits: int
    library: str
    work: Callable[[Any], Finish]
    brief: Callable[[Any], Finish] | None = None  # the same with few steps, where it takes many
    calibrated: bool = False


def load(folder: str, config: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()


def stored_bytes(layer: nn.Module) -> int:
    """Bytes of a packed layer's codes, scales, zeros, table and outliers."""
    return sum(t.nbytes for name, t in (*layer.named_parameters(), *layer.named_buffers()) if name != "bias")


# --- arms -----------------------------------------------------------------------------------------------------------


def data_free() -> dict[str, Callable[..., PackedConfig]]:
    """Our settings that need no data: {name: config of `bits`}."""
    nearest = partial(NupesConfig, exponent="per_layer", rounding="value")
    found: dict[str, Callable[..., PackedConfig]] = {
        **{name: partial(EasyQuantConfig, **options) for name, options in EASYQUANT.items()},
        "nupes": NupesConfig,
        "nupes, per layer": partial(NupesConfig, exponent="per_layer"),
        "nupes, per layer, nearest value": nearest,
    }
    for name in ("scale search only", "easyquant", "nupes, per layer, nearest value"):
        found |= {f"{name}, groups of {g}": partial(found[name], group_size=g) for g in quantizer_peers.GROUPS}
    return found


def calibrated() -> dict[tuple[str, int], Callable[[], PackedConfig]]:
    """Our settings that `calibrate`: {(name, bits): config}; an average of so many bits where the name says so."""
    return {
        **{("nupes, learned", bits): partial(NupesConfig, bits=bits, exponent="learned") for bits in (2, 3, 4)},
        **{("adaquant", bits): partial(AdaQuantConfig, bits=bits) for bits in (2, 3, 4)},
        ("adaquant, norms tuned", 3): partial(AdaQuantConfig, bits=3, tune="norms"),
        ("adaquant, bits by integer program", 3): partial(AdaQuantConfig, average_bits=3, choices=MENU),
    }


def searched(steps: int) -> dict[tuple[str, int], Callable[..., dict[str, int]]]:
    """How EasyQuant's bits per layer are chosen: {(name, average bits): model, levels, rows -> bits_map}."""

    def by_evopress(bits: int, model: Any, levels: Levels, rows: Rows, steps: int = steps) -> dict[str, int]:
        schedule = {"generations": steps, "offspring": 16, "survivors": (4, 1), "tokens": (256, 1024)}
        return evopress(model, levels, rows, bits, preset="super-fast", **schedule).plan

    def by_program(bits: int, model: Any, levels: Levels, rows: Rows, steps: int = 0) -> dict[str, int]:
        return additive_bits(model, levels, rows, bits, tokens=1024)

    return {
        ("easyquant, bits by evopress", 3): partial(by_evopress, 3),
        ("easyquant, bits by integer program", 3): partial(by_program, 3),
    }


def with_config(config: Callable[[], PackedConfig], model: Any) -> Finish:
    """Our layers, made from the model's own."""
    found = config()
    layers = quantizable(model, found)[0]
    found.before_reading(lambda: ((name, layer.weight.data) for name, layer in layers.items()))
    packed = {}
    for name, layer in layers.items():
        own = found.for_layer(name)
        packed[name] = PackedLinear.of(layer, own, own.quantize_checked(layer.weight.data, name))
    return partial(_adopted, model, found, packed)


def _adopted(model: Any, config: PackedConfig, packed: Mapping[str, PackedLinear]) -> tuple[Any, float, int]:
    size = sum(stored_bytes(layer) for layer in packed.values())
    return adopt(model, config, packed), size, size


def with_calibration(config: Callable[..., PackedConfig], rows: Rows, model: Any, **brief: int) -> Finish:
    """What our calibrated method makes of the model."""
    done = config(**brief).calibrate(model, rows)
    size = sum(stored_bytes(done.get_submodule(name)) for name in done.hf_quantizer.quantized)
    return lambda: (done, size, size)


def with_search(find: Callable[..., dict[str, int]], rows: Rows, model: Any, **brief: int) -> Finish:
    """EasyQuant at the bits that a search finds for each layer."""
    plan = find(model, Levels.build(model, EasyQuantConfig(), bits=MENU), rows, **brief)
    return with_config(partial(EasyQuantConfig, bits_map=plan), model)


@torch.no_grad()
def with_peer(method: Callable[[Tensor], quantizer_peers.Coded], names: Sequence[str], model: Any) -> Finish:
    """The model whose layers `names` hold what the method makes of their weights."""
    coded = {name: method(model.get_submodule(name).weight.data) for name in names}

    @torch.no_grad()
    def finish() -> tuple[Any, float, int]:
        for name, found in coded.items():
            model.get_submodule(name).weight.copy_(found.dense())
        return model, sum(found.packed for found in coded.values()), sum(found.held for found in coded.values())

    return finish


def with_calibrated_peer(
    method: Callable[..., Any], names: Sequence[str], rows: Rows, model: Any, **brief: int
) -> Finish:
    packed, held = method(model, names, rows, **brief)
    return lambda: (model, packed, held)


def arms(names: Sequence[str], rows: Rows, generations: int) -> list[Arm]:
    """All of ours and of the peers that are installed; `names` are the layers that get quantised."""
    ours, peers = partial(Arm, library=HFGEN), quantizer_peers
    found = [
        ours(name, bits, work=partial(with_config, partial(config, bits=bits)))
        for name, config in data_free().items()
        for bits in BITS
    ]
    long = [(key, partial(with_calibration, config, rows)) for key, config in calibrated().items()]
    long += [(key, partial(with_search, find, rows)) for key, find in searched(generations).items()]
    found += [ours(*key, work=work, brief=partial(work, steps=BRIEF), calibrated=True) for key, work in long]
    found += [
        Arm(*key, key[0].split()[0].rstrip(","), partial(with_peer, method, names))
        for key, method in peers.data_free().items()
    ]
    for key, method in peers.calibrated().items():
        work = partial(with_calibrated_peer, method, names, rows)
        found.append(Arm(*key, key[0].split(",")[0], work, partial(work, steps=BRIEF), calibrated=True))
    return found


def chosen(found: list[Arm], only: Sequence[str]) -> list[Arm]:
    """Those of these names; all if there are none. Raises ValueError for a name that no arm has."""
    names = {arm.name for arm in found}
    if odd := sorted(set(only) - names):
        raise ValueError(f"methods has {odd[0]!r}; give some of {', '.join(sorted(names))}")
    return [arm for arm in found if not only or arm.name in only]


# --- measuring ------------------------------------------------------------------------------------------------------


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator held at once during `work`, beyond those before it."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # in order of time
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def measure(folder: str, arm: Arm, repeats: int) -> tuple[Any, dict[str, Any]]:
    """The quantised model, and its bytes, seconds and peak."""
    peak = peak_bytes(partial(arm.brief or arm.work, load(folder)))
    seconds = []
    for _ in range(1 if arm.calibrated else repeats):
        model = load(folder)
        start = time.perf_counter()
        finish = arm.work(model)
        seconds.append(time.perf_counter() - start)
    model, packed, held = finish()
    cost = {"packed_bytes": packed, "bytes": held, "seconds": statistics.median(seconds), "peak_bytes": peak}
    return model.eval(), cost


def mean(over: Tensor, tokens: int) -> dict[str, float]:
    """Mean per token of `over` (nats per example), and its standard error over examples."""
    return {
        "nats_per_token": float(over.sum()) / tokens,
        "standard_error": float(over.std()) * len(over) ** 0.5 / tokens,
    }


def dense(layer: Any) -> Tensor:
    """The weight in float32, of a packed or a plain layer."""
    found: Tensor = layer.dequantize() if hasattr(layer, "dequantize") else layer.weight.data
    return found


def bench_quality(
    folder: str, texts: Any, choice: Any, rows: Rows, generations: int, repeats: int = 3, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Every arm on the model in `folder`: perplexity on `texts`, bits per weight, bytes, seconds, peak memory.

    Args:
        choice: Other texts, on which the best setting is chosen.
        rows: Calibration rows of the arms that take data.
        generations: Of EvoPress.
        repeats: Of the timing of a data-free arm; the median counts.
        only: Names of the arms to measure; none: all.
    """
    plain = load(folder)
    names = list(quantizable(plain, EasyQuantConfig())[0])
    weights = {name: plain.get_submodule(name).weight.data for name in names}
    total = sum(w.numel() for w in weights.values())
    size = sum(float(w.square().sum()) for w in weights.values())
    exact, exact_choice = texts.nll(plain), choice.nll(plain)
    methods, over = [], []
    for arm in chosen(arms(names, rows, generations), only):
        model, cost = measure(folder, arm, repeats)
        over.append(texts.nll(model) - exact)
        error = sum(float((dense(model.get_submodule(n)) - w).square().sum()) for n, w in weights.items())
        methods.append(
            {
                "method": arm.name,
                "bits": arm.bits,
                "library": arm.library,
                "calibrated": arm.calibrated,
                "bits_per_weight": 8 * cost.pop("packed_bytes") / total,
                **cost,
                "perplexity": math.exp(float((exact + over[-1]).sum()) / texts.tokens),
                "over_float": mean(over[-1], texts.tokens),
                "over_float_choice": mean(choice.nll(model) - exact_choice, choice.tokens),
                "relative_weight_error": error / size,
            }
        )
    return {
        "float_perplexity": math.exp(float(exact.sum()) / texts.tokens),
        "quantized_layers": len(names),
        "quantized_weights": total,
        "methods": methods,
        "paired": paired(methods, over, texts.tokens),
        "curve": curve(methods, over, texts.tokens),
    }


def paired(rows: Sequence[Mapping[str, Any]], over: list[Tensor], tokens: int) -> list[dict[str, Any]]:
    """Differences of EasyQuant to its parts and to nf4, on the same answers."""
    index = {(r["method"], r["bits"]): i for i, r in enumerate(rows)}
    found = [(("easyquant", bits), (peer, bits)) for peer in ("rtn", "scale search only") for bits in BITS]
    found += [(("easyquant", bits), ("bitsandbytes nf4", 4)) for bits in (3, 4)]
    return [
        {"a": f"{a[0]} {a[1]} bit", "b": f"{b[0]} {b[1]} bit"} | mean(over[index[a]] - over[index[b]], tokens)
        for a, b in found
    ]


# --- the envelope ---------------------------------------------------------------------------------------------------


def gap(row: Mapping[str, Any], key: str = "over_float") -> float:
    """Nats per token over float, `FLOOR` at least. `key`: on which examples."""
    return max(FLOOR, row[key]["nats_per_token"])


def is_peer(row: Mapping[str, Any]) -> bool:
    """Whether it is in the envelope: of another library, and data-free."""
    return row["library"] != HFGEN and not row["calibrated"]


def pareto(rows: Sequence[Mapping[str, Any]], key: str = "over_float") -> list[Mapping[str, Any]]:
    """The rows that no other one beats in bits per weight and gap, by bits per weight."""
    found: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda r: (r["bits_per_weight"], gap(r, key))):
        if not found or gap(row, key) < gap(found[-1], key):
            found.append(row)
    return found


def around(
    rows: Sequence[Mapping[str, Any]], bits: float, key: str = "over_float"
) -> list[tuple[float, Mapping[str, Any]]]:
    """What the envelope of `rows` at so many bits per weight is made of: (share, row); nothing left of all of them.

    Its log(gap) is the mean of theirs with those shares.
    """
    front = pareto(rows, key)
    left = [r for r in front if r["bits_per_weight"] <= bits][-1:]
    right = [r for r in front if r["bits_per_weight"] > bits][:1]
    if not left or not right:
        return [(1.0, r) for r in left]
    start, end = left[0]["bits_per_weight"], right[0]["bits_per_weight"]
    share = (bits - start) / (end - start)
    return [(1 - share, left[0]), (share, right[0])]


def log_ratio(row: Mapping[str, Any], peers: Sequence[Mapping[str, Any]], key: str = "over_float") -> float | None:
    """log of the row's gap over the envelope's at its bits per weight; None left of the envelope."""
    near = around(peers, row["bits_per_weight"], key)
    return math.log(gap(row, key)) - sum(share * math.log(gap(r, key)) for share, r in near) if near else None


def curve(rows: Sequence[Mapping[str, Any]], over: Sequence[Tensor], tokens: int) -> dict[str, Any]:
    """The envelope's points, and where ours with 3 bit codes lie beside it, in order of the examples for choosing."""
    peers, where = [r for r in rows if is_peer(r)], {id(r): i for i, r in enumerate(rows)}

    def entry(row: Mapping[str, Any]) -> dict[str, Any]:
        near, log = around(peers, row["bits_per_weight"]), log_ratio(row, peers)
        found = {k: row[k] for k in ("method", "calibrated", "bits_per_weight")} | {"gap": gap(row)}
        if log is None:
            return found | {"envelope": None, "ratio": None, "interval": None}
        parts = [over[where[id(row)]] / gap(row), *(-share * over[where[id(r)]] / gap(r) for share, r in near)]
        error = 1.96 * mean(torch.stack(parts).sum(0), tokens)["standard_error"]
        bounds = [math.exp(log - error), math.exp(log + error)]
        return found | {"envelope": gap(row) / math.exp(log), "ratio": math.exp(log), "interval": bounds}

    def choice(row: Mapping[str, Any]) -> float:
        found = log_ratio(row, peers, "over_float_choice")
        return math.inf if found is None else found

    ours = sorted((r for r in rows if r["library"] == HFGEN and r["bits"] == THREE), key=choice)
    return {
        "envelope": [{k: r[k] for k in ("method", "bits", "bits_per_weight")} | {"gap": gap(r)} for r in pareto(peers)],
        "ours_at_3_bits": [entry(row) for row in ours],
    }


def best(part: Mapping[str, Any], calibrated: bool = False) -> dict[str, Any] | None:
    """Of our data-free (or calibrated) settings with 3 bit codes, the one that the examples for choosing put first."""
    own = [r for r in part["curve"]["ours_at_3_bits"] if r["calibrated"] == calibrated and r["ratio"] is not None]
    return own[0] if own else None


# --- the picture ----------------------------------------------------------------------------------------------------

TICKS = (1.4525, 1.454, 1.46, 1.5, 1.6, 2, 4, 20, 100)  # perplexities named at the right edge
COLORS = {HFGEN: "#c1121f", "bitsandbytes": "C0", "hqq": "C2", "quanto": "C4", "torchao": "C5", "sinq": "C1"}
MARKS = {"easyquant": "o", "nupes": "^", "adaquant": "s", "rtn and parts of easyquant": "x"}  # of our points


def plot(quality: Mapping[str, Any], path: str) -> None:
    """A panel per model: every point; a line per library through those of its own that nothing of it beats."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.fonttype"] = "none"
    figure, axes = pyplot.subplots(1, len(quality), figsize=(13, 5.6), sharey=True, squeeze=False, layout="constrained")
    for axis, (model, part) in zip(axes[0], quality.items(), strict=True):
        _panel(axis, part)
        axis.set_title(f"{model} model{' (outliers built in)' if model == 'planted' else ''}")
        axis.set_xlabel("bits per weight; scales, zeros, tables and outliers counted")
    axes[0, 0].set_ylabel(f"nats per token over float32 (below {FLOOR:g}: noise)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
    pyplot.close(figure)


def _panel(axis: Any, part: Mapping[str, Any]) -> None:
    rows = part["methods"]
    axis.set(yscale="log", xlim=(2, 8.8), ylim=(FLOOR * 0.8, 8))
    axis.grid(alpha=0.25, linewidth=0.5)
    front = part["curve"]["envelope"]
    if front:
        x, y = [p["bits_per_weight"] for p in front], [p["gap"] for p in front]
        label = "above the data-free peers' envelope"
        axis.fill_between([*x, 9], [*y, y[-1]], 10, color="0.5", alpha=0.16, linewidth=0, label=label)
        axis.plot([*x, 9], [*y, y[-1]], color="0.55", linewidth=3.5, alpha=0.5, solid_joinstyle="round")
    lines = dict.fromkeys((r["library"], r["calibrated"]) for r in sorted(rows, key=lambda r: r["library"] == HFGEN))
    for i, (library, calibrated) in enumerate(lines):
        line = pareto([r for r in rows if (r["library"], r["calibrated"]) == (library, calibrated)])
        ours = {"linewidth": 2.4, "zorder": 3} if library == HFGEN else {"linewidth": 0.9, "marker": "osv^DP"[i % 6]}
        axis.plot(
            [r["bits_per_weight"] for r in line], [gap(r) for r in line], "--" if calibrated else "-", markersize=3,
            color=COLORS.get(library, "C8"), label=f"{library}{', calibrated' if calibrated else ''}", **ours,
        )  # fmt: skip
    for kind in dict.fromkeys(map(_kind, rows)):
        own = [r for r in rows if _kind(r) == kind]
        axis.scatter(
            [r["bits_per_weight"] for r in own], [gap(r) for r in own], s=16 if kind in MARKS else 4, alpha=0.6,
            color=COLORS.get(own[0]["library"], "C8"), marker=MARKS.get(kind, "."), linewidth=0.8,
            label=f"{HFGEN}: {kind}" if kind in MARKS else None,
        )  # fmt: skip
    right = axis.twinx()
    right.set(yscale="log", ylim=axis.get_ylim())
    shown = [p for p in TICKS if p > part["float_perplexity"]]
    right.set_yticks([math.log(p / part["float_perplexity"]) for p in shown], [f"{p:g}" for p in shown], fontsize=8)
    right.minorticks_off()
    right.set_ylabel(f"perplexity (float32: {part['float_perplexity']:.4f})", fontsize=8)


def _kind(row: Mapping[str, Any]) -> str:
    """What a point's mark says: the library, or which of ours."""
    name: str = row["method"].split(",")[0]
    return row["library"] if row["library"] != HFGEN else name if name in MARKS else list(MARKS)[-1]
