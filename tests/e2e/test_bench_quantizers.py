"""recipes/bench/quantizers.py at toy size: the report's shape, bits and bytes counted exactly, the built model. No timing."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hfgen import sandbox

BENCH = Path(__file__).parents[2] / "recipes" / "bench"
KEPT = BENCH / "results" / "quantizers.json"
SIZES = {
    "rounds": 1,
    "examples": 20,
    "side": 64,
    "hidden": 64,
    "layers": 1,
    "tokens": 2,
    "million": 0.1,
    "load_hidden": 64,
}
TOY = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
BLOCKS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_quantizers", BENCH / "quantizers.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    bench.main([*TOY, "--out", str(folder / "report.json"), "--plot", str(folder / "plot.svg")])
    assert "<svg" in (folder / "plot.svg").read_text()
    return json.loads((folder / "report.json").read_text())


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
    optional = {"hqq", "quanto"}  # measured where they are installed
    for part in (report, kept):
        part = part["quantizing"]
        assert set(part) - optional == {"rtn", "easyquant grid", "easyquant adam", "nf4", "nf4 double quant"}
    shared = {name: kept["quantizing"][name] for name in report["quantizing"] if name in kept["quantizing"]}
    found = {name: report["quantizing"][name] for name in shared}
    assert shape(found) == shape(shared)
    for part in (report, kept):
        for row in part["generation"].values():
            assert abs(sum(row.pop("time_share").values()) - 1) < 1e-9
    drop = {"quantizing"}
    assert shape({k: v for k, v in report.items() if k not in drop}) == shape(
        {k: v for k, v in kept.items() if k not in drop}
    )
    names = [b["what"] for b in kept["bars"]]
    assert len(names) == 18 and kept["loading"]["parameters"] >= 1e9 > report["loading"]["parameters"]
    names.remove("loading: peak RssAnon in bytes")  # a bar for large models only
    assert [b["what"] for b in report["bars"]] == names


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
        stored = [p for p in report["bytes"][model] if p["bits"] == bits]
        outliers = stored[0]["parts"]["outliers"]
        assert outliers > 0 and outliers % 6 == 0
        for name in ("outliers apart only", "easyquant"):
            assert found[name, bits]["bits_per_weight"] == 8 * (packed + outliers) / total


def test_bits_per_weight_of_nf4_is_exact(report, widths):
    total = sum(m * n for m, n in widths)
    assert rows(report, "sandbox")["nf4", 4]["bits_per_weight"] == 4 + 32 / 64
    # 8 bits a block of 64; 32 more for 256 blocks of a layer (rounded up) and for its offset
    stored = sum(m * n // 2 + m * n // 64 + 4 * math.ceil(m * n / 64 / 256) + 4 for m, n in widths)
    assert rows(report, "sandbox")["nf4 double quant", 4]["bits_per_weight"] == 8 * stored / total


def test_outliers_are_those_beyond_three_sigma(report, bench):
    model = sandbox.load_model()
    for name in ("sandbox", "planted"):
        if name == "planted":
            bench.plant(model)
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
    bench.plant(planted)
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
    def wrong(model):
        model.model.layers[0].mlp.up_proj.weight.data[:, 0] *= 2

    monkeypatch.setattr(bench, "plant", wrong)
    with pytest.raises(ValueError, match="logits differ by"):
        bench.make_planted(str(sandbox.path()), str(tmp_path), bench.Texts(20))


def test_perplexity_is_that_of_the_answers_and_eos(bench):
    """Against the host's own loss over labels that hide the prompt."""
    model, tokenizer, texts = sandbox.load_model(), sandbox.load_tokenizer(), bench.Texts(20)
    pairs, total = bench.examples(20), 0.0
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


def test_difference_and_its_standard_error(bench):
    found = bench.difference(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 1.0]), tokens=4)
    assert found["nats_per_token"] == 6 / 4
    assert found["standard_error"] == pytest.approx(2**0.5 * 2**0.5 / 4)  # std of (2, 4), 2 examples


def test_passes_are_counted(bench):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    assert bench.passes(bench.ours("rtn", 4), weight) == 1
    assert 50 < bench.passes(bench.ours("easyquant", 4), weight) < 100
    adam = bench.EasyQuantConfig(optimizer="adam", steps=7)
    assert bench.passes(adam, weight) == 1 + 2 * 7 + 1  # at the start, twice a step, the codes


@pytest.mark.parametrize(("option", "value", "fix"), [("rounds", 0, "1 or more"), ("examples", 1, "2 to 1000")])
def test_bad_count(bench, option, value, fix):
    with pytest.raises(ValueError, match=f"{option} is {value}; give {fix}"):
        bench.main([f"--{option}", str(value)])
