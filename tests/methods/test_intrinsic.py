"""Intrinsic dimension: Fastfood and both methods against dense projections in float64, counts, d90 and bad input."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, RobertaConfig, RobertaModel

from hfgen import sandbox
from hfgen.adapters import IntrinsicConfig, IntrinsicDimension, estimate_d90
from hfgen.kit.fastfood import Dense, Fastfood, fwht
from hfgen.kit.subspace import MovedLayer, SharedTuner
from hfgen.quantizers import EasyQuantConfig
from hfgen.testing.adapters import CHECKS, AdapterCase
from hfgen_plugins.adapters.intrinsic.intrinsic import IntrinsicLinear, IntrinsicModel
from tests.hosts.test_quantizers import MODELS, build, logits
from tests.methods.test_adapters import Wrap

MODES = pytest.mark.parametrize("mode", ["did", "said"])
SCOPES = pytest.mark.parametrize("scope", ["global", "per_tensor"])
PROJECTIONS = pytest.mark.parametrize("projection", ["fastfood", "dense"])
TARGETS = ["conv", "group", "a", "norm", "b"]
TENSORS = 10
# Signs, permutation and scaled normals of Fastfood(d=4, size=8, seed=1, name="w"): every saved adapter depends on them.
GOLDEN = [
    [1, 1, 1, 1],
    [1, 0, 5, 3, 4, 7, 2, 6],
    [-0.00581058, -0.10283849, -0.1510343, 0.04891768, 0.28339416, 0.09035511, 0.00502312, -0.02616595],
]


class Net(nn.Module):
    """A convolution, two kinds of norms and two matrices; of `a` (12, 18) and its bias (12) the sizes are no powers of two."""

    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.group = nn.Conv2d(1, 2, 2), nn.GroupNorm(2, 2)
        self.a, self.norm, self.b = nn.Linear(18, 12), nn.LayerNorm(12), nn.Linear(12, 4)
        self.to(dtype)

    def forward(self, x):
        x = torch.tanh(self.group(self.conv(x))).flatten(1)
        return self.b(torch.tanh(self.norm(self.a(x))))


def adapted(net=None, **options):
    torch.manual_seed(1)
    return get_peft_model(net or Net(), IntrinsicConfig(**{"d": 30, "target_modules": TARGETS, **options}))


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(6, 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def theta(model, name="default"):
    return model.base_model.intrinsic_theta[name]


def matrix(projection):
    """P (size, d), by feeding unit vectors."""
    return torch.stack([projection.project(e) for e in torch.eye(projection.d, dtype=torch.float64)], 1)


# --- the transform ----------------------------------------------------------------------------------------------------


@given(bits=st.integers(0, 9), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_transform_is_the_hadamard_matrix(bits, seed):
    x = torch.randn(1 << bits, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    before = x.clone()
    hadamard = torch.from_numpy(scipy.linalg.hadamard(1 << bits)).double()
    assert torch.allclose(fwht(x), hadamard @ x, atol=1e-12)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 2)])
def test_the_transform_wants_a_power_of_two(shape):
    with pytest.raises(ValueError, match="length is a power of two"):
        fwht(torch.zeros(shape))


@given(d=st.integers(1, 40), size=st.integers(1, 70), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_fastfood_and_its_gradient_are_the_product_with_the_dense_matrix(d, size, seed):
    """H G Pi H B / sqrt(size sum G^2), from its drawn parts; the adjoint is the transpose and autograd's gradient."""
    fast = Fastfood(d, size, seed, "w")
    signs, order, gauss = fast.draw()
    h = torch.from_numpy(scipy.linalg.hadamard(fast.length)).double()
    assert fast.length == 2 ** math.ceil(math.log2(size)) and sorted(order.tolist()) == list(range(fast.length))
    assert set(signs.tolist()) <= {-1, 1} and len(signs) == min(d, fast.length)
    dense = torch.zeros(size, d, dtype=torch.float64)
    dense[:, : fast.reach] = ((h * gauss.double()) @ h[order.long()])[:size, : fast.reach] * signs
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(d, generator=generator, dtype=torch.float64).requires_grad_()
    g = torch.randn(size, generator=generator, dtype=torch.float64)
    out = fast.project(v)
    assert torch.allclose(out, dense @ v, atol=1e-12) and torch.allclose(matrix(fast), dense, atol=1e-12)
    out.backward(g)
    assert torch.allclose(v.grad, dense.T @ g, atol=1e-12) and torch.equal(v.grad, fast.adjoint(g))
    assert torch.allclose(gauss.double().square().sum() * size, torch.ones((), dtype=torch.float64), atol=1e-6)


@PROJECTIONS
def test_the_gradient_is_the_true_one_twice_over(projection):
    """Against finite differences, where compacter's Fastfood gives 1/L of it; and of the gradient again."""
    p = (Fastfood if projection == "fastfood" else Dense)(5, 12, 0, "w")
    v = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(p.project, v) and torch.autograd.gradgradcheck(lambda v: p.project(v) ** 2, v)


def test_columns_have_unit_norm_and_are_nearly_orthogonal():
    gram = matrix(Fastfood(64, 4096, 0, "w"))
    gram = gram.T @ gram
    assert torch.allclose(gram.diagonal(), torch.ones(64, dtype=torch.float64), atol=4e-7)
    assert float((gram - torch.eye(64)).abs().max()) < 0.08  # the sheet's run: 0.06
    cut = torch.stack([matrix(Fastfood(3, 600, seed, "w")).square().sum(0) for seed in range(200)])  # of 1024 rows
    assert float(cut.std()) > 0.01 and abs(float(cut.mean()) - 1) < 0.02
    assert torch.allclose(matrix(Dense(7, 50, 0, "w")).norm(dim=0), torch.ones(7, dtype=torch.float64), atol=1e-6)


def test_what_is_drawn_depends_on_seed_and_name_alone():
    torch.manual_seed(3)
    first = Fastfood(4, 8, 1, "w").draw()
    assert [t.tolist() for t in first[:2]] == GOLDEN[:2] and first[2].tolist() == pytest.approx(GOLDEN[2], rel=1e-6)
    torch.manual_seed(4)
    with torch.device("meta"):
        again = Fastfood(4, 8, 1, "w").draw()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    copied = pickle.loads(pickle.dumps(Fastfood(4, 8, 1, "w")))
    assert not copied._drawn and all(torch.equal(a, b) for a, b in zip(first, copied.draw(), strict=True))
    for other in (Fastfood(4, 8, 2, "w"), Fastfood(4, 8, 1, "v")):
        assert not torch.equal(other.draw()[2], first[2])


def test_a_normal_distribution():
    gauss = Fastfood(1, 1 << 16, 0, "w").draw()[2].double()
    gauss = gauss / gauss.std()
    assert abs(float(gauss.mean())) < 0.02 and abs(float((gauss**4).mean()) - 3) < 0.15
    assert abs(float((gauss.abs() < 1).double().mean()) - 0.6827) < 0.01


# --- the methods against dense projections ----------------------------------------------------------------------------


def by_hand(model, x, scope, mode):
    """The net's output and the gradient of its square, with every P as a dense matrix."""
    net, total = Net(), sum(p.numel() for p in Net().parameters())
    v = theta(model).detach().clone().requires_grad_()
    names = [n for n, _ in net.named_parameters()]
    factors = torch.ones(len(names), dtype=torch.float64)
    if mode == "said":
        factors = model.base_model.intrinsic_lambda["default"].detach().clone().requires_grad_()
    kind = PROJECTION_OF[model.peft_config["default"].projection]
    new = {}
    for i, (name, p) in enumerate(net.named_parameters()):
        dense = matrix(kind(len(v), p.numel(), model.peft_config["default"].seed, name)).detach()
        share = math.sqrt(p.numel() / total) if scope == "global" else 1.0
        new[name] = p.detach() + (share * factors[i] * (dense @ v)).view(p.shape)
    out = functional_call(net, new, (x,))
    out.square().sum().backward()
    return out, [v.grad] + ([factors.grad] if mode == "said" else [])


PROJECTION_OF = {"fastfood": Fastfood, "dense": Dense}


@MODES
@SCOPES
@PROJECTIONS
def test_output_and_gradients_equal_the_dense_projections(mode, scope, projection):
    """Linear, convolution, layer and group norm, all biases; to 1e-12, merged too, and the start is exact."""
    x, plain = data(), Net()(data())
    options = {"mode": mode, "projection_scope": scope, "projection": projection, "seed": 3}
    assert torch.equal(adapted(**options)(x), plain)
    model = adapted(init_weights=False, **options)
    with torch.no_grad():
        for p in model.base_model.intrinsic_lambda.values():
            p.add_(torch.linspace(-0.5, 0.5, len(p), dtype=p.dtype))
    out = model(x)
    out.square().sum().backward()
    want, grads = by_hand(model, x, scope, mode)
    assert float((out - plain).abs().max()) > 1e-2 and torch.allclose(out, want, atol=1e-12)
    assert len(trained(model)) == len(grads)
    for p, grad in zip(trained(model), grads, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-12, rtol=1e-10) and float(grad.abs().max()) > 1e-3
    model.merge_adapter()
    assert torch.allclose(model(x), want, atol=1e-12)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.allclose(model(x), plain, atol=1e-12)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(x), want, atol=1e-12) and not any(isinstance(m, MovedLayer) for m in merged.modules())


@SCOPES
def test_the_norm_of_the_step_is_the_vectors_once_or_per_tensor(scope):
    """With sizes that are powers of two: ||dtheta|| = ||v||, or sqrt(m) ||v|| (Aghajanyan et al.)."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(16, 8, bias=False), nn.Linear(8, 32, bias=False), nn.Linear(32, 64, bias=False)
    ).double()
    model = adapted(net, d=40, target_modules="all-linear", projection_scope=scope, init_weights=False)
    layers = [m for m in model.modules() if isinstance(m, IntrinsicLinear)]
    moved = math.sqrt(sum(float(m.get_delta_weight("default").square().sum()) for m in layers))
    expected = float(theta(model).norm().detach()) * (1 if scope == "global" else math.sqrt(3))
    # Columns of one tensor are orthogonal only nearly: (P^T P - I) is about 1/sqrt(D).
    assert moved == pytest.approx(expected, rel=0.25)
    probe = torch.zeros(40, dtype=torch.float64)
    probe[7] = 2.5
    with torch.no_grad():
        theta(model).copy_(probe)
    moved = math.sqrt(sum(float(m.get_delta_weight("default").square().sum()) for m in layers))
    assert moved == pytest.approx(2.5 * (1 if scope == "global" else math.sqrt(3)), rel=1e-6)


def test_coordinates_beyond_a_small_tensor_do_not_reach_it():
    """d = 30 and a bias of 4 numbers: L = 4."""
    model = adapted(target_modules=["b"], d=30, init_weights=False)
    layer = next(m for m in model.modules() if isinstance(m, IntrinsicLinear))
    assert [p.reach for p, *_ in layer._parts["default"]] == [30, 4]
    before = layer.deltas("default")
    with torch.no_grad():
        theta(model)[4:] += 1.0
    after = layer.deltas("default")
    assert torch.equal(before[1], after[1]) and not torch.allclose(before[0], after[0])
    theta(model).grad = None
    (out,) = torch.autograd.grad(layer.shifts(["default"], [1.0], [theta(model)])[1].sum(), theta(model))
    assert out[:4].abs().sum() > 0 and not out[4:].any()


class Toy(nn.Module):
    """Li et al.: 1000 numbers in 10 blocks of 100, each of which must sum to 1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Linear(100, 10, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.w.weight)

    def forward(self):
        return (self.w(torch.ones(100, dtype=torch.float64)) - 1).square().sum()


def toy_loss(d, seed, **options):
    """The least loss in the subspace, by least squares."""
    model = get_peft_model(Toy(), IntrinsicConfig(d=d, seed=seed, target_modules=["w"], **options))
    layer = next(m for m in model.modules() if isinstance(m, IntrinsicLinear))
    sums = torch.stack([layer.shifts(["default"], [1.0], [e])[0].sum(1) for e in torch.eye(d, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(sums, torch.ones(10, 1, dtype=torch.float64)).solution
    with torch.no_grad():
        theta(model).copy_(best[:, 0])
    return float(model.base_model().detach())


@PROJECTIONS
def test_the_threshold_lies_at_exactly_ten(projection):
    losses = {d: [toy_loss(d, seed, projection=projection) for seed in range(5)] for d in (5, 8, 9, 10, 15)}
    assert min(losses[9]) > 1e-3 and sum(losses[9]) / 5 > 0.1, losses
    assert max(losses[10]) < 1e-6 and max(losses[15]) < 1e-6, losses
    means = [sum(losses[d]) for d in (5, 8, 9, 10)]
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize(("d", "low", "high"), [(9, 1e-3, 10.0), (10, 0.0, 1e-6)])
def test_training_finds_the_same_threshold(d, low, high):
    model = get_peft_model(Toy(), IntrinsicConfig(d=d, target_modules=["w"]))
    optimizer = torch.optim.LBFGS(
        trained(model), max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = model.base_model()
        loss.backward()
        return loss

    optimizer.step(closure)
    loss = float(model.base_model().detach())
    assert low <= loss < high and loss == pytest.approx(toy_loss(d, 0), abs=1e-6)


# --- memory -----------------------------------------------------------------------------------------------------------


def kept(model, x):
    """Tensors that autograd keeps for backward: (numbers kept of activations, those of nothing the model or input holds)."""
    held = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]} | {x.data_ptr()}
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        model(x)
    return [t for t in found if t.data_ptr() not in held]


def test_nothing_of_a_tensors_size_is_kept_for_backward():
    """A wide layer and few rows: what is kept beyond x, the base's tensors and v is no number at all."""
    torch.manual_seed(0)
    net = nn.Linear(256, 512)

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = copy.deepcopy(net)

        def forward(self, x):
            return self.w(x)

    x = torch.randn(3, 256, requires_grad=True)
    for mode in ("did", "said"):
        model = adapted(Wide(), target_modules=["w"], mode=mode, init_weights=False)
        assert kept(model, x) == []
    assert kept(net.requires_grad_(), x) == []  # a plain layer: x and its weight
    layer = model.base_model.model.w
    naive = nn.Module()
    naive.forward = lambda x: F.linear(x, layer.shifts(["default"], [1.0], layer.vectors(["default"]))[0])
    assert max(t.numel() for t in kept(naive, x)) == 512 * 256  # what the measure finds without `reparametrised`


def test_peak_between_forward_and_backward_does_not_grow_with_the_targets():
    """Of the whole net: activations only, none as large as the largest tensor."""
    x = data()
    plain = sum(t.numel() for t in kept(Net().requires_grad_(), x))
    assert sum(t.numel() for t in kept(adapted(init_weights=False), x)) <= plain


# --- layers -----------------------------------------------------------------------------------------------------------


def test_gradients_reach_x_and_an_unfrozen_base():
    x = data().requires_grad_()
    model = adapted(init_weights=False)
    base = model.base_model.model.a.base_layer
    base.weight.requires_grad_(True)
    model(x).square().sum().backward()
    got = x.grad.clone(), base.weight.grad.clone()
    merged = adapted(init_weights=False).merge_and_unload().requires_grad_(True)
    x.grad = None
    merged(x).square().sum().backward()
    assert torch.allclose(got[0], x.grad, atol=1e-12) and torch.allclose(got[1], merged.a.weight.grad, atol=1e-12)


def test_batch_norm_counts_a_batch_once():
    class Batch(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4, dtype=torch.float64)

        def forward(self, x):
            return self.bn(x)

    model = adapted(Batch(), d=3, target_modules=["bn"], init_weights=False).train()
    model(torch.randn(8, 4, dtype=torch.float64)).square().sum().backward()
    assert int(model.base_model.model.bn.base_layer.num_batches_tracked) == 1 and theta(model).grad.abs().sum() > 0


def test_autocast_gives_the_gradient_of_bfloat16_products():
    grads = []
    for on in (False, True):
        model = adapted(Net(torch.float32), init_weights=False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            model(data(torch.float32)).float().square().sum().backward()
        assert theta(model).grad.dtype == torch.float32
        grads.append(theta(model).grad)
    assert 0 < float((grads[1] - grads[0]).norm()) < 0.1 * float(grads[0].norm())


def test_compiled_forward_is_one_graph():
    model, x = adapted(mode="said", init_weights=False), data()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-12)
    model(x).sum().backward()
    want = [p.grad.clone() for p in trained(model)]
    model.zero_grad()
    compiled(x).sum().backward()
    assert all(torch.allclose(p.grad, w, atol=1e-12) for p, w in zip(trained(model), want, strict=True))


@pytest.mark.parametrize("kind", [4, 8])
def test_bitsandbytes_base(kind):
    net, x = Wrap(kind).eval(), torch.randn(6, 64)
    with torch.no_grad():
        plain = net(x)
    model = adapted(net, target_modules=["lin"])
    assert model.base_model.model.lin.shapes == {"weight": (64, 64)}
    with torch.no_grad():
        assert torch.equal(model(x), plain)
    theta(model).data = theta(model).data.bfloat16()  # as trl casts
    model.train()
    assert theta(model).dtype == torch.float32
    model(x).square().sum().backward()
    assert theta(model).grad.abs().sum() > 0
    with torch.no_grad():
        theta(model).normal_()
        moved = model(x)
        assert torch.allclose(moved - plain, x @ model.base_model.model.lin.get_delta_weight("default").T, atol=2e-2)
        assert float((moved - plain).abs().max()) > 0.05


@pytest.mark.parametrize("name", MODELS)
def test_models_of_all_kinds(tmp_path, name):
    """Every tensor that can take part: exact start, a gradient, reload, merge."""
    cls, config, inputs, *_ = MODELS[name]
    plain = build(cls, config)
    before = logits(plain, inputs)
    start = adapted(copy.deepcopy(plain), d=60, mode="said", target_modules="all-linear")
    assert torch.equal(logits(start.eval(), inputs), before)
    model = adapted(copy.deepcopy(plain), d=100, target_modules="all-tensors", init_weights=False).eval()
    on = logits(model, inputs)
    assert not torch.allclose(on, before, atol=1e-3)
    model(**inputs).logits.square().sum().backward()
    assert theta(model).grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval(), inputs), on)
    assert torch.allclose(logits(model.merge_and_unload(), inputs), on, atol=1e-4)


def test_easyquant_base():
    base = LlamaForCausalLM.from_pretrained(sandbox.path(), quantization_config=EasyQuantConfig(bits=4)).eval()
    tokens = torch.arange(4, 20).view(2, 8)
    plain = base(tokens).logits
    model = adapted(base, target_modules=["q_proj", "v_proj"])
    assert torch.equal(model(tokens).logits, plain)
    model(tokens, labels=tokens).loss.backward()
    assert theta(model).grad.abs().sum() > 0


# --- one vector for all layers ----------------------------------------------------------------------------------------


@MODES
def test_counts_and_the_file(tmp_path, mode):
    """d trained numbers, 4 d bytes and a header; the seed is in the config."""
    model = adapted(Net(torch.float32), mode=mode, seed=9, init_weights=False)
    assert model.get_nb_trainable_parameters()[0] == 30
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    sizes = {k: v.numel() for k, v in load_file(path).items()}
    said = {"base_model.intrinsic_theta": 30 - TENSORS, "base_model.intrinsic_lambda": TENSORS}
    assert sizes == (said if mode == "said" else {"base_model.intrinsic_theta": 30})
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 4 * 30 + 8 + header and header < 300
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["seed"] == 9 and len(config["hfgen"]["projection"]) == 16 and len(json.dumps(config)) < 2000
    again = PeftModel.from_pretrained(Net(torch.float32), tmp_path)
    assert torch.equal(again(data(torch.float32)), model(data(torch.float32)))


def test_counts_on_a_model_without_weights():
    """RoBERTa-base, query and value: 24 layers of 768 x 768 and their biases."""
    with torch.device("meta"):
        base = RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1))
    config = IntrinsicConfig(d=1000, mode="said", target_modules=["query", "value"])
    model = get_peft_model(base, config)
    assert model.get_nb_trainable_parameters()[0] == 1000
    assert (config._tensors, config._total) == (48, 24 * (768 * 768 + 768))
    assert theta(model).shape == (952,)


def test_all_tensors_leaves_tied_ones_out():
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
        "intermediate_size": 24,
    }
    tied = adapted(LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shape)), target_modules="all-tensors")
    names = {n for n, m in tied.base_model.model.named_modules() if isinstance(m, IntrinsicLinear)}
    assert "lm_head" not in names and {"model.norm", "model.layers.0.mlp.up_proj"} <= names and len(names) == 10
    with torch.no_grad():
        tied.add_adapter("second", IntrinsicConfig(d=7, target_modules="all-tensors"))
    assert all(set(m._parts) == {"default", "second"} for m in tied.modules() if isinstance(m, IntrinsicLinear))
    with pytest.raises(ValueError, match="lm_head shares its weight with another module"):
        adapted(LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shape)), target_modules=["lm_head"])
    free = adapted(LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **shape)), target_modules="all-tensors")
    assert isinstance(free.base_model.model.lm_head, IntrinsicLinear)


def test_two_adapters_with_other_targets_do_not_see_each_other(tmp_path):
    x = data()
    model = adapted(target_modules=["a"], init_weights=False)
    alone = model(x)
    model.add_adapter("second", IntrinsicConfig(d=12, mode="said", target_modules=["b", "norm"], init_weights=False))
    assert torch.equal(model(x), alone)
    model.set_adapter("second")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.intrinsic_theta.second", "base_model.intrinsic_lambda.second",
    ]  # fmt: skip
    second = model(x)
    assert not torch.allclose(second, alone)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert set(load_file(tmp_path / "second" / "adapter_model.safetensors")) == {
        "base_model.intrinsic_theta", "base_model.intrinsic_lambda",
    }  # fmt: skip
    model.base_model.set_adapter(["default", "second"])
    both = model(x)
    model.base_model.model.a.set_scale("default", 0.5)
    assert not torch.allclose(model(x), both)
    model.base_model.model.a.set_scale("default", 1.0)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        theta(copied).zero_()
    assert torch.equal(model(x), both) and torch.allclose(copied(x), second, atol=1e-12)
    model.base_model.set_adapter("default")
    model.delete_adapter("second")
    assert list(model.base_model.intrinsic_theta) == ["default"] and not len(model.base_model.intrinsic_lambda)
    assert torch.equal(model(x), alone)


def test_other_names_or_shapes_are_refused_at_load(tmp_path):
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
        "intermediate_size": 24,
    }
    model = adapted(LlamaForCausalLM(LlamaConfig(**shape)), target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="projection is .* names and shapes of its targets"):
        PeftModel.from_pretrained(LlamaModel(LlamaConfig(**shape)), tmp_path)
    with pytest.raises(ValueError, match="projection is .* names and shapes of its targets"):
        PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**shape | {"hidden_size": 32})), tmp_path)
    PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**shape)), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d": 20}))
    with pytest.raises(ValueError, match="projection is"):
        PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**shape)), tmp_path)


SAID = {"mode": "said", "projection_scope": "per_tensor", "projection": "dense"}


@pytest.mark.parametrize("check", sorted(set(CHECKS) - {"zero_import", "trainable"}))
def test_conformance_of_said(check):
    """The catalogue's own run takes DID. `trainable` is left out: dL/dlambda = <dL/dtheta, P v> is 0 where v = 0."""
    CHECKS[check](AdapterCase(IntrinsicConfig, SAID))


def test_the_kit_finds_state_on_the_tuner_that_is_not_declared(monkeypatch):
    monkeypatch.setattr(SharedTuner, "uses_shared_state", False)
    with pytest.raises(AssertionError, match="is state on the tuner, which transformers' add_adapter would lose"):
        CHECKS["registered"](AdapterCase(IntrinsicConfig))


@pytest.mark.parametrize(("fault", "words"), [
    (lambda self, *args, **kwargs: None, "state on the tuner was lost"),
    (lambda self, *args, **kwargs: (_ for _ in ()).throw(ValueError("no")), "does not name get_peft_model"),
])  # fmt: skip
def test_the_kit_finds_a_host_that_takes_shared_state(monkeypatch, fault, words):
    monkeypatch.setattr(LlamaForCausalLM, "add_adapter", fault)
    with pytest.raises(AssertionError, match=words):
        CHECKS["transformers"](AdapterCase(IntrinsicConfig))


_TWO = """
import os, sys, torch
sys.path.insert(0, sys.argv[2])
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.methods.test_intrinsic import adapted, data, trained
dist.init_process_group("gloo")
model = DistributedDataParallel(adapted(mode="said", init_weights=False))
optimizer = torch.optim.SGD(trained(model), lr=0.01)
for _ in range(3):
    optimizer.zero_grad()
    model(data().chunk(2)[dist.get_rank()]).square().mean().backward()
    optimizer.step()
torch.save([p.detach() for p in trained(model)], f"{sys.argv[1]}/{dist.get_rank()}.pt")
dist.barrier()
sys.stdout.flush()
os._exit(0)
"""


def test_two_processes_train_as_one(tmp_path):
    """DDP: the vector gets gradients from every layer, and is averaged once."""
    (tmp_path / "two.py").write_text(_TWO)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    command = [*launch, str(tmp_path / "two.py"), str(tmp_path), root]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    model = adapted(mode="said", init_weights=False)
    optimizer = torch.optim.SGD(trained(model), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(data()).square().mean().backward()
        optimizer.step()
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1)]
    for one, a, b in zip(trained(model), *ranks, strict=True):
        assert torch.equal(a, b) and torch.allclose(one, a, atol=1e-12)


# --- d90 --------------------------------------------------------------------------------------------------------------


def curve(threshold, seen=None):
    """A score that reaches 0.9 exactly at the threshold."""

    def train_and_score(d, seed):
        if seen is not None:
            seen.append((d, seed))
        return 0.9 if d >= threshold else 0.89 * d / threshold

    return train_and_score


@given(threshold=st.integers(11, 5000))
@settings(max_examples=60, deadline=None)
def test_d90_of_a_known_curve(threshold):
    exact = estimate_d90(curve(threshold), 1.0, resolution=1.0)
    assert exact.d90 == threshold and exact.target == 0.9
    near = estimate_d90(curve(threshold), 1.0)
    assert threshold <= near.d90 <= max(threshold + 1, 1.1 * threshold)
    grid = estimate_d90(curve(threshold), 1.0, [10, 100, 1000, 10_000], resolution=math.inf)
    assert grid.d90 == next(d for d in (100, 1000, 10_000) if d >= threshold)
    assert len(grid.scores) <= 3 and list(grid.scores) == sorted(grid.scores)


def test_d90_says_when_the_grid_was_too_small():
    low = estimate_d90(curve(500), 1.0, [10, 20, 40])
    assert low.d90 is None and "even d=40 misses the target; go higher" in low.note
    high = estimate_d90(curve(5), 1.0, [10, 20, 40])
    assert high.d90 == 10 and "starts too high" in high.note
    inside = estimate_d90(curve(30), 1.0, [10, 20, 40], resolution=math.inf)
    assert inside.d90 == 40 and inside.note == "d=20 misses the target and d=40 reaches it"
    assert isinstance(inside, IntrinsicDimension) and dict(inside.scores)[20] == pytest.approx(0.89 * 20 / 30)


def test_d90_averages_over_seeds():
    seen = []
    noisy = curve(100, seen)
    found = estimate_d90(lambda d, s: noisy(d, s) + (0.3 if s else -0.3), 1.0, [90, 110], seeds=(0, 1), resolution=1.0)
    assert found.d90 == 100 and {s for _, s in seen} == {0, 1} and len(seen) == 2 * len(found.scores)


def test_d90_of_the_toy_is_ten():
    found = estimate_d90(
        lambda d, seed: 1 - toy_loss(d, seed), 1.0, share=1 - 1e-6, low=1, high=32, seeds=range(3), resolution=1.0
    )
    assert found.d90 == 10


@pytest.mark.parametrize(("change", "words"), [
    ({"train_and_score": 3}, "train_and_score is 3"), ({"baseline": 0.0}, "baseline is 0"),
    ({"baseline": "high"}, "baseline is 'high'"), ({"share": 1.5}, "share is 1.5"), ({"seeds": ()}, "seeds is empty"),
    ({"grid": []}, "ascending values of d"), ({"grid": [4, 2]}, "ascending values of d"), ({"grid": [0, 2]}, "grid is 0"),
    ({"low": 0}, "low is 0"), ({"low": 9, "high": 8}, "high is 8"), ({"resolution": 0.5}, "resolution is 0.5"),
    ({"train_and_score": lambda d, seed: math.nan}, "gave nan at d="),
    ({"train_and_score": lambda d, seed: None}, "gave None at d="),
])  # fmt: skip
def test_d90_refuses_in_words(change, words):
    options = {"train_and_score": curve(50), "baseline": 1.0, **change}
    with pytest.raises((ValueError, TypeError), match=f"estimate_d90.*{words}"):
        estimate_d90(**options)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    ({"d": 0}, "IntrinsicConfig.d is 0"), ({"d": 2.5}, "IntrinsicConfig.d is 2.5"), ({"d": True}, "IntrinsicConfig.d is True"),
    ({"mode": "sai"}, "mode is 'sai'; did you mean 'said'"), ({"projection": "fast"}, "projection is 'fast'"),
    ({"projection_scope": "tensor"}, "projection_scope is 'tensor'"), ({"seed": -1}, "seed is -1"),
    ({"bias": "all"}, "bias is 'all'; leave it 'none'"), ({"bias": "intrinsic_only"}, "leave it 'none'"),
    ({"dd": 3}, "unexpected keyword argument 'dd'"),
])  # fmt: skip
def test_a_bad_option_is_refused_by_the_config(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        IntrinsicConfig(**{"target_modules": ["a"], **options})


@pytest.mark.parametrize(("options", "words"), [
    ({"d": 10**6}, "d is 1000000 and the targets hold only"),
    ({"d": TENSORS, "mode": "said"}, "spends on the lambdas of 10 tensors"),
    ({"target_modules": ["c"]}, "did you mean|matches no module"),
])  # fmt: skip
def test_a_bad_fit_is_refused_before_anything_is_replaced(options, words):
    net = Net()
    with pytest.raises(ValueError, match=words):
        adapted(net, **options)
    assert not any(isinstance(m, MovedLayer) for m in net.modules())


def test_weights_that_are_elsewhere_are_refused_in_words():
    model = adapted()
    model.base_model.model.a.base_layer.weight = nn.Parameter(torch.empty(12, 18, dtype=torch.float64, device="meta"))
    with pytest.raises(ValueError, match="the weight of a is off-loaded"):
        model(data())
    model = adapted()
    model.base_model.model.a.base_layer.weight.data = torch.empty(0, dtype=torch.float64)
    with pytest.raises(ValueError, match="the weight of a is not whole here"):
        model(data())
    net = Net()
    net.a.weight.ds_id = 1  # DeepSpeed's mark of a parameter that ZeRO-3 has cut up
    with pytest.raises(ValueError, match="the weight of a is cut up by DeepSpeed ZeRO-3"):
        adapted(net)


def test_a_diverged_vector_is_not_loaded(tmp_path):
    model = adapted()
    with torch.no_grad():
        theta(model)[0] = math.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="intrinsic_theta of the model holds NaN or Inf"):
        PeftModel.from_pretrained(Net(), tmp_path)


def test_two_steps_of_adamw_equal_those_on_the_flat_vector():
    """Through the tuner, and by hand with one dense P for all tensors."""
    x, model = data(), adapted(d=20)
    optimizer = torch.optim.AdamW(trained(model), lr=0.05)
    net, total = Net(), sum(p.numel() for p in Net().parameters())
    parts = {
        n: math.sqrt(p.numel() / total) * matrix(Fastfood(20, p.numel(), 0, n)).detach()
        for n, p in net.named_parameters()
    }
    v = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    by_hand = torch.optim.AdamW([v], lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        by_hand.zero_grad()
        F.mse_loss(model(x), torch.ones(6, 4, dtype=torch.float64)).backward()
        new = {n: p.detach() + (parts[n] @ v).view(p.shape) for n, p in net.named_parameters()}
        F.mse_loss(functional_call(net, new, (x,)), torch.ones(6, 4, dtype=torch.float64)).backward()
        optimizer.step()
        by_hand.step()
    assert float(v.detach().norm()) > 0.1 and torch.allclose(theta(model), v, atol=1e-11)


def test_the_tuner_says_that_its_state_is_shared():
    assert IntrinsicModel.uses_shared_state and IntrinsicModel.prefix == "intrinsic_"
