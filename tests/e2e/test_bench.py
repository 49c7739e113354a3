"""recipes/bench at toy size: the report's shape, and the arithmetic that does not depend on the machine. No timing."""

import importlib.util
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from hfgen import catalog
from hfgen.adapters import LoLDUConfig, SVFitConfig
from hfgen.callbacks import HyperfitCallback
from hfgen_plugins.callbacks.hyperfit import evidence as hyperfit

BENCH = Path(__file__).parents[2] / "recipes" / "bench"
RESULTS = BENCH / "results"
CONFIGS = (SVFitConfig, LoLDUConfig)


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def adapters():
    return load("adapters")


@pytest.fixture(scope="module")
def startup():
    return load("startup")


def shape(value):
    """Keys and types of a report, all the way down; a list by its first entry."""
    if isinstance(value, dict):
        return {key: shape(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def test_report_has_the_shape_of_the_kept_one(adapters, tmp_path, capsys):
    out = tmp_path / "report.json"
    adapters.main(["--rounds", "1", "--hidden", "32", "--tokens", "16", "--layers", "1", "--out", str(out)])
    report, kept = json.loads(out.read_text()), json.loads((RESULTS / "adapters.json").read_text())
    assert shape(report) == shape(kept) | {"arguments": shape(report["arguments"])}
    assert [(s["rank"], s["targets"]) for s in report["settings"]] == [
        (rank, place) for place in ("q,v", "all linears") for rank in ("8", "full")
    ]
    assert [b["what"] for b in report["bars"]] == [b["what"] for b in kept["bars"]] and len(kept["bars"]) == 16
    for setting in report["settings"]:
        assert set(setting["methods"]) == {"lora", "svfit", "loldu"}
        assert setting["methods"]["lora"]["step"]["median"] == setting["methods"]["lora"]["memory_ratio"] == 1
        for row in setting["methods"].values():
            parts = {k: v for k, v in row["bytes"].items() if k != "total"}
            assert min(parts.values()) > 0 and sum(parts.values()) == row["bytes"]["total"]
    printed = capsys.readouterr().out
    assert "One training step against peft LoRA r=8" in printed and "svfit, rank 8, q,v: step / LoRA" in printed


@pytest.mark.parametrize(("method", "r"), [("svfit", 8), ("svfit", 32), ("loldu", 8), ("loldu", 32), ("lora", 8)])
@pytest.mark.parametrize("place", ["q,v", "all linears"])
def test_extra_flops_are_2_t_r_m_plus_n_per_linear(adapters, method, r, place):
    args = adapters.BenchArguments(hidden=32, tokens=16, layers=2)
    base = adapters.Arm(args)
    arm = adapters.Arm(args, adapters.adapter_config(method, r, adapters.TARGETS[place]))
    names = {"q_proj", "v_proj"} if place == "q,v" else linears(base.model)
    shapes = [m.weight.shape for n, m in base.model.named_modules() if n.rpartition(".")[2] in names]
    assert len(shapes) == {"q,v": 4, "all linears": 14}[place]
    extra = adapters.flops(arm.forward) - adapters.flops(base.forward)
    assert extra == sum(2 * args.tokens * r * (m + n) for m, n in shapes)


def linears(model):
    return {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}


def test_flops_of_a_step_count_attention(adapters):
    args = adapters.BenchArguments(hidden=32, tokens=16, layers=1)
    arm = adapters.Arm(args)
    linears = sum(2 * 16 * m.weight.numel() for m in arm.model.modules() if isinstance(m, nn.Linear))
    assert adapters.flops(arm.forward) - linears == 4 * 16 * 16 * 32  # q k^T and p v


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 24), st.integers(2, 24), st.integers(1, 30), st.sampled_from(CONFIGS))
def test_saved_bytes_of_an_adapted_linear(tokens, n, m, r, config):
    """4 T r for the projected input, and the r coefficients; the frozen base and the factors add nothing."""
    bench = load_once()
    model = nn.Sequential(nn.Linear(n, m, bias=False)).requires_grad_(False)
    inject_adapter_in_model(config(r=r, target_modules=["0"]), model)
    x = torch.randn(tokens, n, requires_grad=True)
    k = min(r, m, n)
    assert 4 * tokens * k <= bench.saved_bytes(lambda: model(x).sum(), model) <= 4 * tokens * k + 4 * 2 * k


def load_once():
    """hypothesis runs one function many times; it takes no fixture of a narrower scope."""
    return sys.modules.get("bench_adapters") or load("adapters")


def test_saved_bytes_counts_a_storage_once_and_no_parameter(adapters):
    model = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    assert adapters.saved_bytes(lambda: model(x).sum(), model) == 4 * 4 * 8  # x, for the weight's gradient
    assert adapters.saved_bytes(lambda: (model(x).exp() * model(x[:2]).sum()).sum(), model) > 4 * 4 * 8
    lora = nn.Sequential(nn.Linear(8, 8, bias=False))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), lora)
    assert adapters.saved_bytes(lambda: lora(x).sum(), lora) == 4 * 4 * (8 + 2)  # x and A x


def test_ratios_are_taken_within_a_round(adapters):
    found = {"lora": [1.0, 2.0, 4.0], "svfit": [2.0, 4.0, 8.0]}
    assert adapters.ratios(found, "svfit", "lora") == {"median": 2.0, "q25": 2.0, "q75": 2.0}
    order = []
    adapters.interleaved({n: lambda n=n: order.append(n) or 1.0 for n in "abc"}, 2)
    assert "".join(order) == "abc" + "abc" + "bca"


def test_selective_bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    bench, out = load("selective"), tmp_path / "report.json"
    monkeypatch.setattr(bench, "TARGETS", {"q,v": ["q_proj", "v_proj"]})
    bench.main(["--rounds", "1", "--hidden", "32", "--tokens", "16", "--layers", "1", "--out", str(out)])
    report, kept = json.loads(out.read_text()), json.loads((RESULTS / "selective.json").read_text())
    assert shape(report) == shape(kept) | {"arguments": shape(report["arguments"])} and len(kept["bars"]) == 10
    arms = report["settings"][0]["arms"]
    assert arms["sara"]["trained"] == arms["soma"]["trained"] == arms["lora"]["trained"] == 8 * 2 * (32 + 32)
    assert arms["intrinsic"]["trained"] == bench.DIMENSION
    h = bench.IncreLoraConfig(target_r=8).increment
    for name, r in (("first", 1), ("last", 7)):  # with the reserve
        assert arms[f"increlora {name}"]["trained"] == 2 * ((r + h) * 64 + r + h)
    for setting in kept["settings"]:
        sara = setting["arms"]["sara"]
        assert sara["bytes"]["optimizer"] == 8 * sara["trained"] + 4 * sara["tensors"]
    steps = {f"increlora {p}{s}": {"median": m} for p, s, m in (
        ("first", "", 1.0), ("last", "", 1.2), ("first", ", scores", 2.0), ("last", ", scores", 2.2))}  # fmt: skip
    window = bench.IncreLoraConfig(target_r=8).score_window / bench.INTERVAL
    assert bench.averages(steps) == pytest.approx(
        {"default": window * 2.1 + (1 - window) * 1.1, "score_window=None": 2.1}
    )


def test_startup_report(startup, tmp_path, monkeypatch, capsys):
    arms = dict(list(startup.TORCH_ARMS.items())[:1])
    monkeypatch.setattr(startup, "TORCH_ARMS", arms)
    out = tmp_path / "startup.json"
    startup.main(["--processes", "1", "--out", str(out)])
    report, kept = json.loads(out.read_text()), json.loads((RESULTS / "startup.json").read_text())
    missing = set(kept["figures"]) - set(report["figures"])
    assert missing == set(load("startup").TORCH_ARMS) - set(arms)
    for name in missing:
        del kept["figures"][name]
    assert shape(report) == shape(kept) and set(report["bars"]) == {"import hfgen", "hfgen ls", "hook"}
    assert all(row["min"] > 0 for row in report["figures"].values())
    assert "hfgen ls, wall" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "option"), [("adapters", "rounds"), ("startup", "processes")])
def test_bad_count(name, option, request):
    with pytest.raises(ValueError, match=f"{option} is 0; give 1 or more"):
        request.getfixturevalue(name).main([f"--{option}", "0"])


def test_callbacks_bench_counts_a_look_against_the_default_interval(monkeypatch):
    bench = load("callbacks")
    monkeypatch.setattr(bench, "LENGTH", 40)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    small = {"length": 40, "new_tokens": 4, "window": 4}
    found = bench.measure(shape, bench.BenchArguments(looks=2, steps_between=2), **small)
    default = inspect.signature(HyperfitCallback).parameters
    assert found["every"] == default["every"].default and found["rows"] == default["sequences"].default
    assert found["share"] == pytest.approx(found["look_s"] / (found["every"] * found["step_s"]))
    assert found["look_in_steps"] == pytest.approx(found["look_s"] / found["step_s"])


SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}


def test_callbacks_bench_times_every_monitor(monkeypatch, tmp_path, capsys):
    """All parts at toy size; the memory part's processes are replaced by this one's reading of two arms."""
    bench, out = load("callbacks"), tmp_path / "report.json"
    monkeypatch.setattr(bench, "LENGTH", 40)
    monkeypatch.setattr(bench, "MODELS", {"claim": SMALL})
    found = bench.main(
        ["--models", "claim", "--parts", "monitors,dense", "--looks", "6", "--steps_between", "2", "--out", str(out)]
    )
    kept = json.loads((RESULTS / "callbacks.json").read_text())
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    assert shape(found["monitors"]["claim"]) == shape(kept["monitors"]["claim"])
    assert list(found["monitors"]["claim"]["callbacks"]) == list(bench.MONITORS)
    assert set(found["dense"]["claim"]) == set(kept["dense"]["claim"])
    defaults = {name: inspect.signature(catalog.load(name, "callbacks")).parameters for name in bench.MONITORS}
    for name, row in found["monitors"]["claim"]["callbacks"].items():
        own = defaults[name]["every"].default if "every" in defaults[name] else None
        assert row["every"] == (2 if name == "data_diet" else own or bench.EVALUATIONS)
        assert row["share"] == pytest.approx(row["look_in_steps"] / row["every"] + row["between_looks"])
        assert row["look_s"] > 0
    assert all(row["looks"] >= 3 for row in found["dense"]["claim"].values())
    assert "Callbacks at batch 8 x 40" in capsys.readouterr().out
    peaks = [bench.memory_of(SMALL, arm)["peak"] for arm in ("none", "calibration")]
    assert min(peaks) > 1e7


def test_callbacks_bench_as_kept():
    bench, report = load("callbacks"), json.loads((RESULTS / "callbacks.json").read_text())
    assert report["met"] == bench.judged(report) and set(report["monitors"]) == set(bench.MODELS)
    for name, part in report["monitors"].items():
        assert list(part["callbacks"]) == list(bench.MONITORS)
        assert all(report["met"][name][f"{callback}, time"] for callback in bench.MONITORS), name
    for name, part in report["memory"].items():
        assert list(part) == ["none", *bench.MONITORS]
        assert all(row["ratio"] == row["peak"] / part["none"]["peak"] for row in part.values())
        assert all(report["met"][name][f"{callback}, memory"] for callback in bench.MONITORS), name


def test_callbacks_bench_measures_the_model_of_the_claim():
    bench, settings = load("callbacks"), hyperfit.SETTINGS
    shape = bench.MODELS["claim"]
    model = hyperfit._model(settings.vocabulary, settings.hidden_size, settings.layers).config
    assert all(getattr(model, key) == value for key, value in shape.items())
    report = json.loads((RESULTS / "callbacks.json").read_text())
    assert report["models"] == bench.MODELS and report["batch"] == [8, 256]
    for row in (kinds["defaults"] for kinds in report["hyperfit"].values()):
        assert row["share"] == pytest.approx(row["look_s"] / (row["every"] * row["step_s"]))
        assert row["every"] == inspect.signature(HyperfitCallback).parameters["every"].default
