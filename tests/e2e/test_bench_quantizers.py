"""recipes/bench/quantizers.py at toy size: the report's shape, bits and bytes counted exactly, the built model, the
envelope's arithmetic. No timing."""

import copy
import importlib
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hfgen import sandbox
from hfgen.sandbox import quality

BENCH = Path(__file__).parents[2] / "recipes" / "bench"
KEPT = BENCH / "results" / "quantizers.json"
EASYQUANT = ("rtn", "outliers apart only", "scale search only", "easyquant")
PEERS = ("bitsandbytes nf4", "bitsandbytes nf4, double quant", "bitsandbytes fp4", "bitsandbytes fp4, double quant")
SEARCHED = "easyquant, bits by integer program"
SIZES = {
    "rounds": 1,
    "examples": 20,
    "generations": 1,
    "side": 64,
    "hidden": 64,
    "layers": 1,
    "tokens": 2,
    "million": 0.1,
    "load_hidden": 64,
}
TOY = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
TOY += ["--methods", *EASYQUANT, *PEERS, SEARCHED]
BLOCKS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 5: (8, 5), 6: (4, 3), 8: (1, 1)}


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("quantizers")
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def curve(bench):
    return bench.curve


@pytest.fixture(scope="module")
def peers(bench):
    return bench.peers


@pytest.fixture(scope="module")
def toy(bench, tmp_path_factory):
    """The folder of a report and a plot."""
    folder = tmp_path_factory.mktemp("bench")
    bench.main([*TOY, "--out", str(folder / "report.json"), "--plot", str(folder / "plot.svg")])
    return folder


@pytest.fixture(scope="module")
def report(toy):
    return json.loads((toy / "report.json").read_text())


@pytest.fixture(scope="module")
def kept():
    return json.loads(KEPT.read_text())


@pytest.fixture(scope="module")
def widths():
    """(rows, columns) of the sandbox's quantised layers."""
    return [tuple(p.shape) for n, p in sandbox.load_model().named_parameters() if n.endswith("_proj.weight")]


def shape(value):
    """Keys and types of a report, all the way down; a list by its first entry."""
    if isinstance(value, dict):
        return {key: shape(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def rows(report, model):
    return {(r["method"], r["bits"]): r for r in report["quality"][model]["methods"]}


def test_report_has_the_shape_of_the_kept_one(report, kept):
    report, kept = copy.deepcopy((report, kept))
    always = {
        "rtn",
        "easyquant grid",
        "easyquant adam",
        "nupes, per layer",
        *PEERS,
    }  # the others are measured where they are installed
    assert always <= set(report["quantizing"]) and always <= set(kept["quantizing"])
    for part in (report, kept):
        part["quantizing"] = {name: part["quantizing"][name] for name in always}
        for row in part["generation"].values():
            assert abs(sum(row.pop("time_share").values()) - 1) < 1e-9
        for model in part["quality"].values():
            model["methods"] = [r for r in model["methods"] if (r["method"], r["bits"]) == ("rtn", 4)]
            model["curve"]["envelope"] = model["curve"]["envelope"][:1]
    names = [b["what"] for b in kept["bars"]]
    assert len(names) == 26 and kept["loading"]["parameters"] >= 1e9 > report["loading"]["parameters"]
    # bars for large models, and of peers with 3 bits or less
    names = [n for n in names if n != "loading: peak RssAnon in bytes" and "envelope" not in n]
    assert [b["what"] for b in report["bars"]] == names
    for part in (report, kept):
        assert set(part["parts"]) == {"bytes", "quantizing", "generation", "loading", "quality"}
        for entry in part["parts"].values():
            assert set(entry) == {"arguments", "machine", "versions", "threads", "load_average"}
        del part["bars"], part["parts"]
        for model in part["quality"].values():
            del model["curve"]["ours_at_3_bits"]
    assert shape(report) == shape(kept)


def test_kept_curve_has_every_method(curve, kept):
    """All of ours at every width, all libraries of the issue, and what each point cost."""
    names = {(name, bits) for name in curve.data_free() for bits in curve.BITS}
    names |= set(curve.calibrated()) | set(curve.searched(1))
    for part in kept["quality"].values():
        ours = {(r["method"], r["bits"]) for r in part["methods"] if r["library"] == "hfgen"}
        assert ours == names
        libraries = {r["library"]: r["calibrated"] for r in part["methods"] if r["library"] != "hfgen"}
        assert libraries == {"bitsandbytes": False, "hqq": False, "quanto": False, "torchao": False, "sinq": False,
                             "auto-round": True}  # fmt: skip
        for row in part["methods"]:
            assert (
                2 < row["bits_per_weight"] <= 10 and row["bytes"] > 0 and row["seconds"] > 0 and row["peak_bytes"] > 0
            )


def test_kept_curve_follows_from_the_kept_points(curve, kept):
    for part in kept["quality"].values():
        peers = [r for r in part["methods"] if curve.is_peer(r)]
        ours = {r["method"]: r for r in part["methods"] if r["library"] == "hfgen" and r["bits"] == 3}
        found = part["curve"]["ours_at_3_bits"]
        assert sorted(r["method"] for r in found) == sorted(ours)
        chosen = [curve.log_ratio(ours[r["method"]], peers, "over_float_choice") for r in found]
        assert chosen == sorted(chosen)
        for r in found:
            low, high = r["interval"]
            assert low < r["ratio"] < high and r["gap"] / r["envelope"] == pytest.approx(r["ratio"]) == pytest.approx(
                math.exp(curve.log_ratio(ours[r["method"]], peers))
            )
        front = [(p["method"], p["bits"]) for p in part["curve"]["envelope"]]
        assert front == [(r["method"], r["bits"]) for r in curve.pareto(peers)] and len(front) > 10


def test_kept_bars_follow_from_the_kept_figures(bench, kept):
    assert bench.bars(kept) == kept["bars"]
    for bar in kept["bars"]:
        assert bar["met"] == {"<": bar["value"] < bar["bar"], "<=": bar["value"] <= bar["bar"]}.get(
            bar["rule"], bar["value"] >= bar["bar"]
        )


@pytest.mark.parametrize("bits", BLOCKS)
def test_bits_per_weight_is_exact(report, widths, bits):
    total = sum(m * n for m, n in widths)
    codes, size = BLOCKS[bits]
    packed = sum(m * -(-n // codes) * size + 2 * m for m, n in widths)
    for model in ("sandbox", "planted"):
        found = rows(report, model)
        assert report["quality"][model]["quantized_weights"] == total == 131072
        for name in ("rtn", "scale search only"):
            assert found[name, bits]["bits_per_weight"] == 8 * packed / total
            assert found[name, bits]["bytes"] == packed
        stored = [p for p in report["bytes"][model] if p["bits"] == bits]
        outliers = stored[0]["parts"]["outliers"]
        assert outliers > 0 and outliers % 6 == 0
        for name in ("outliers apart only", "easyquant"):
            assert found[name, bits]["bits_per_weight"] == 8 * (packed + outliers) / total


def test_bits_per_weight_of_peers_is_exact(report, widths):
    total = sum(m * n for m, n in widths)
    # 8 bits a block of 64; 32 more for 256 blocks of a layer (rounded up) and for its offset
    stored = sum(m * n // 2 + m * n // 64 + 4 * math.ceil(m * n / 64 / 256) + 4 for m, n in widths)
    for kind in ("nf4", "fp4"):
        found = rows(report, "sandbox")
        assert found[f"bitsandbytes {kind}", 4]["bits_per_weight"] == 4 + 32 / 64
        assert found[f"bitsandbytes {kind}, double quant", 4]["bits_per_weight"] == 8 * stored / total


def test_searched_bits_keep_the_budget(report, widths):
    """At most 3 bits on average, besides EasyQuant's scales and outliers."""
    for model in ("sandbox", "planted"):
        found = rows(report, model)
        row, uniform = found[SEARCHED, 3], found["easyquant", 3]
        assert row["calibrated"] and not uniform["calibrated"]
        assert uniform["bits_per_weight"] - 0.05 < row["bits_per_weight"] <= uniform["bits_per_weight"]


def test_peers_stand_for_the_weight(peers):
    """Every installed one: as many numbers, the bytes that were said, an error that falls with bits."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    given, errors = weight.clone(), {}
    for (name, bits), method in peers.data_free().items():
        found = method(weight)
        dense = found.dense()
        assert torch.equal(weight, given) and dense.shape == weight.shape and dense.dtype == torch.float32
        assert weight.numel() * bits / 8 < found.packed <= found.held
        errors.setdefault(name, {})[bits] = float((dense - weight).square().mean())
    assert set(errors) >= set(PEERS)
    for name, by_bits in errors.items():
        ordered = [by_bits[bits] for bits in sorted(by_bits)]
        assert ordered == sorted(ordered, reverse=True) and ordered[-1] < (0.03 if "fp4" in name else 0.012)


def test_a_method_of_no_such_name_is_refused(curve):
    arms = curve.arms(["a"], [], 1)
    assert curve.chosen(arms, []) == arms and {a.name for a in curve.chosen(arms, ["nupes"])} == {"nupes"}
    with pytest.raises(ValueError, match="methods has 'nupez'; give some of adaquant"):
        curve.chosen(arms, ["rtn", "nupez"])


# --- memory -----------------------------------------------------------------------------------------------------------


def test_peak_is_the_most_held_at_once(curve):
    before = torch.zeros(250_000)  # not counted

    def work():
        a = before + 1  # 1 MB
        b = torch.cat([a, a])  # and 2 MB
        del a
        return b + 1  # 4 MB in all

    assert curve.peak_bytes(work) == pytest.approx(4_000_000, abs=1000)
    assert curve.peak_bytes(lambda: [work() for _ in range(3)]) == pytest.approx(8_000_000, abs=1000)  # two are kept


# --- the envelope -----------------------------------------------------------------------------------------------------


def point(bits_per_weight, gap, library="hqq", bits=3, calibrated=False, choice=None, name="x"):
    return {
        "method": name, "bits": bits, "library": library, "calibrated": calibrated, "bits_per_weight": bits_per_weight,
        "over_float": {"nats_per_token": gap}, "over_float_choice": {"nats_per_token": gap if choice is None else choice},
    }  # fmt: skip


def test_envelope_by_hand(curve):
    rows = [
        point(2, 1.0),
        point(4, 0.01),
        point(3, 0.5),
        point(3.5, 0.6),
        point(4, 0.02),
        point(6, -0.1),
        point(7, 0.1),
    ]
    assert [(r["bits_per_weight"], curve.gap(r)) for r in curve.pareto(rows)] == [
        (2, 1.0), (3, 0.5), (4, 0.01), (6, curve.FLOOR),
    ]  # fmt: skip
    assert curve.log_ratio(point(3.5, 0.05), rows) == pytest.approx(math.log(0.05 / math.sqrt(0.5 * 0.01)))
    assert curve.log_ratio(point(2.25, 1.0), rows) == pytest.approx(-0.25 * math.log(0.5))
    assert curve.log_ratio(point(4, 0.03), rows) == pytest.approx(math.log(3))
    assert curve.log_ratio(point(9, 0.0), rows) == 0 and curve.log_ratio(point(1.9, 0.0), rows) is None
    assert curve.log_ratio(point(3, 1.0), []) is None


@given(st.lists(st.tuples(st.floats(2, 9), st.floats(-1e-3, 5)), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_no_point_lies_below_its_own_envelope(curve, points):
    rows = [point(*p) for p in points]
    front = curve.pareto(rows)
    for a in rows:
        assert curve.log_ratio(a, rows) >= -1e-9
        assert any(f["bits_per_weight"] <= a["bits_per_weight"] and curve.gap(f) <= curve.gap(a) for f in front)
    assert all(abs(curve.log_ratio(f, rows)) < 1e-9 for f in front)


def test_the_best_is_chosen_on_other_examples(curve):
    rows = [
        point(3.0, 0.1), point(4.0, 0.1, bits=4),
        point(3.2, 0.20, "hfgen", choice=0.02, name="chosen"), point(3.2, 0.05, "hfgen", choice=0.03, name="lucky"),
        point(3.2, 0.001, "hfgen", calibrated=True, name="with data"), point(3.2, 1e-3, "hfgen", bits=4, name="4 bit"),
        point(2.0, 1e-3, "hfgen", name="left of all"), point(3.1, 1e-3, "auto-round", calibrated=True),
    ]  # fmt: skip
    over = [torch.full((10,), r["over_float"]["nats_per_token"]) for r in rows]
    part = {"curve": curve.curve(rows, over, tokens=10)}
    assert [(p["bits_per_weight"], p["gap"]) for p in part["curve"]["envelope"]] == [(3.0, 0.1)]
    best = curve.best(part)
    assert best["method"] == "chosen" and best["ratio"] == pytest.approx(2) and best["envelope"] == pytest.approx(0.1)
    assert best["interval"] == pytest.approx([2, 2])  # every example says the same
    assert curve.best(part, calibrated=True)["method"] == "with data"
    assert [r["method"] for r in part["curve"]["ours_at_3_bits"]] == ["with data", "chosen", "lucky", "left of all"]
    assert part["curve"]["ours_at_3_bits"][-1]["ratio"] is None
    assert curve.best({"curve": {"ours_at_3_bits": part["curve"]["ours_at_3_bits"][-1:]}}) is None


def test_interval_is_that_of_a_bootstrap(curve):
    generator, n = torch.Generator().manual_seed(0), 400
    noise = torch.rand(3, n, generator=generator, dtype=torch.float64) * torch.tensor([[0.4], [0.2], [0.3]])
    over = list(noise + noise[1] / 2)  # on the same examples, so together
    rows = [
        point(b, float(o.mean()), library)
        for o, b, library in zip(over, (3, 4, 3.25), ("a", "a", "hfgen"), strict=True)
    ]
    (found,) = curve.curve(rows, over, tokens=n)["ours_at_3_bits"]
    draws = torch.randint(n, (4000, n), generator=generator)
    left, right, ours = (o[draws].mean(1).log() for o in over)
    error = float((ours - 0.75 * left - 0.25 * right).std())
    low, high = (math.log(x / found["ratio"]) for x in found["interval"])
    assert high == pytest.approx(1.96 * error, rel=0.08) and low == pytest.approx(-high)


def test_plot_shows_every_library(curve, toy, tmp_path):
    drawn = (toy / "plot.svg").read_text()
    for text in ("sandbox model", "planted model (outliers built in)", "bitsandbytes", "hfgen, calibrated"):
        assert f">{text}</text>" in drawn
    rng, names = random.Random(0), ("hfgen", "bitsandbytes", "hqq", "quanto", "torchao", "sinq", "auto-round")
    rows = [point(2 + rng.random() * 6, rng.random(), n, calibrated=n == "auto-round") for n in names for _ in range(4)]
    part = {"float_perplexity": 1.4, "methods": rows, "curve": curve.curve(rows, [torch.ones(5)] * len(rows), 5)}
    curve.plot({"sandbox": part}, str(tmp_path / "plot.svg"))
    drawn = (tmp_path / "plot.svg").read_text()
    for name in (*names[:-1], "auto-round, calibrated", "above the data-free peers' envelope"):
        assert f">{name}</text>" in drawn


# --- parts ------------------------------------------------------------------------------------------------------------


def test_one_part_is_measured_again(bench, toy, report, tmp_path):
    report = json.loads((toy / "report.json").read_text())
    report["parts"]["bytes"], report["bytes"], report["generation"]["rtn"]["tokens_per_second"] = "old", "old", 7
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    bench.main([*TOY, "--examples", "10", "--parts", "bytes", "--out", str(path)])
    found, first = json.loads(path.read_text()), json.loads((toy / "report.json").read_text())
    assert found["bytes"] == first["bytes"] and found["quality"] == first["quality"]
    assert found["generation"]["rtn"]["tokens_per_second"] == 7
    assert found["parts"]["bytes"]["arguments"]["examples"] == 10
    assert found["parts"]["quality"] == first["parts"]["quality"]
    assert [b["what"] for b in found["bars"]] == [b["what"] for b in first["bars"]]


@pytest.mark.parametrize(
    ("parts", "sentence"), [(["bites"], "parts has 'bites'; give some of bytes"), (["bytes"], "name it with out")]
)
def test_bad_parts(bench, parts, sentence):
    with pytest.raises(ValueError, match=sentence):
        bench.main(["--parts", *parts])


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_outliers_are_those_beyond_three_sigma(report, bench):
    model = sandbox.load_model()
    for name in ("sandbox", "planted"):
        if name == "planted":
            quality.plant(model, bench.CHANNELS, bench.FACTOR, bench.SEED)
        count = 0
        for key, weight in model.named_parameters():
            if key.endswith("_proj.weight"):
                count += int(((weight - weight.mean()).abs() >= 3 * weight.std(correction=0)).sum())
        assert report["bytes"][name][0]["parts"]["outliers"] == 6 * count


def test_bytes_of_the_file(report):
    for name, found in report["bytes"].items():
        assert [r["bits"] for r in found] == list(BLOCKS)
        for row in found:
            assert row["bound"] == sum(row["parts"].values()) and row["ratio"] == row["file"] / row["bound"]
            assert row["file"] <= 1.02 * row["bound"]
            assert (row["padding"] > 0) == (name == "odd widths" and row["bits"] < 8)


def test_bytes_bound_sees_a_tensor_too_many(bench, tmp_path, monkeypatch):
    save = bench.LlamaForCausalLM.save_pretrained

    def wasteful(model, out):
        save(model, out)
        path = Path(out) / "model.safetensors"
        save_file(load_file(path) | {"mask": torch.zeros(10_000, dtype=torch.uint8)}, path)

    monkeypatch.setattr(bench.LlamaForCausalLM, "save_pretrained", wasteful)
    row = bench.bench_bytes(str(sandbox.path()), 4, str(tmp_path))
    assert row["file"] - row["bound"] == 10_000 and row["ratio"] > 1.02


def test_planted_model_computes_the_same(bench, report):
    assert report["planted"]["built"] is True and report["planted"]["largest_logit_difference"] < 1e-4
    assert report["quality"]["planted"]["float_perplexity"] == pytest.approx(
        report["quality"]["sandbox"]["float_perplexity"], rel=1e-5
    )
    plain, planted = sandbox.load_model(), sandbox.load_model()
    quality.plant(planted, bench.CHANNELS, bench.FACTOR, bench.SEED)
    ids = torch.randint(4, 100, (8, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(planted(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=0)
    for a, b in zip(plain.model.layers, planted.model.layers, strict=True):
        for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            times = b.get_submodule(path).weight / a.get_submodule(path).weight
            assert sorted(set(times.flatten().tolist())) == [1.0, 16.0] and (times == 16).sum() == len(times)
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            assert torch.equal(a.get_submodule(path).weight, b.get_submodule(path).weight)


def test_a_planted_model_that_computes_something_else_is_refused(bench, monkeypatch, tmp_path):
    def wrong(model, *args):
        model.model.layers[0].mlp.up_proj.weight.data[:, 0] *= 2

    monkeypatch.setattr(quality, "plant", wrong)
    with pytest.raises(ValueError, match="logits differ by"):
        bench.make_planted(str(sandbox.path()), str(tmp_path), bench.Texts(20))


def test_perplexity_is_that_of_the_answers_and_eos(bench):
    """Against the host's own loss over labels that hide the prompt."""
    model, tokenizer, texts = sandbox.load_model(), sandbox.load_tokenizer(), bench.Texts(20)
    pairs, total = quality.examples(bench.SEED, 20, "held out"), 0.0
    assert texts.tokens == sum(len(a) + 1 for _, a in pairs) == 20 * 6 + 20 * 5
    nll = texts.nll(model)
    for i, (prompt, answer) in enumerate(pairs):
        task = sandbox.tasks.R if prompt[0] == "R" else sandbox.tasks.E
        assert task.judge(prompt, answer)
        ids = tokenizer(prompt + answer + "<eos>", return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, : 1 + len(prompt)] = -100
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=labels).loss) * (len(answer) + 1)
        assert float(nll[i]) == pytest.approx(loss, rel=1e-4, abs=1e-4)
        total += loss
    assert float(nll.sum()) == pytest.approx(total, rel=1e-4)
    assert float(nll.sum()) / texts.tokens == pytest.approx(quality.answers_nll(model, bench.SEED, 20, "held out"))


def test_mean_and_its_standard_error(curve):
    found = curve.mean(torch.tensor([2.0, 4.0]), tokens=4)
    assert found["nats_per_token"] == 6 / 4
    assert found["standard_error"] == pytest.approx(2**0.5 * 2**0.5 / 4)  # std of (2, 4), 2 examples


def test_passes_are_counted(bench):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    assert bench.passes(bench.RTN, weight) == 1
    assert 50 < bench.passes(bench.EasyQuantConfig(), weight) < 100
    adam = bench.EasyQuantConfig(optimizer="adam", steps=7)
    assert bench.passes(adam, weight) == 1 + 2 * 7 + 1  # at the start, twice a step, the codes


@pytest.mark.parametrize(("option", "value", "fix"), [("rounds", 0, "1 or more"), ("examples", 1, "2 to 499")])
def test_bad_count(bench, option, value, fix):
    with pytest.raises(ValueError, match=f"{option} is {value}; give {fix}"):
        bench.main([f"--{option}", str(value)])
