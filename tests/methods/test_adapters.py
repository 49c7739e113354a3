"""SVFit and LoLDU: exact mathematics, counts, sizes, architectures and bad input."""

import copy
import json
import traceback

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from hfgen.adapters import LoLDUConfig, SVFitConfig
from hfgen_plugins.adapters.loldu.loldu import INITS, _eliminate, initial_z, ldu
from hfgen_plugins.adapters.svfit.svfit import sketched_singular, top_singular

BOTH = pytest.mark.parametrize("config_cls", [SVFitConfig, LoLDUConfig])


class Net(nn.Module):
    """One linear layer n -> m, without bias, float64 on request."""

    def __init__(self, m=5, n=7, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.lin = nn.Linear(n, m, bias=False, dtype=dtype)

    def forward(self, x):
        return self.lin(x)


def adapted(config_cls, net, **options):
    return get_peft_model(net, config_cls(target_modules=["lin"], **options))


def z_of(model):
    return next(p for p in model.parameters() if p.requires_grad)


# --- the mathematics against float64 brute force --------------------------------------------------------------------


@given(m=st.integers(1, 9), n=st.integers(1, 9), seed=st.integers(0, 10**6), r=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_ldu_is_the_factorisation(m, n, seed, r):
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = min(m, n)
    left, d, upper, perm = ldu(weight, k)
    assert torch.allclose((left * d) @ upper, weight, atol=1e-9)
    lower = left[perm.long()]
    assert torch.equal(lower.triu(1), torch.zeros_like(lower)) and torch.allclose(
        lower.diagonal(), torch.ones(k, dtype=d.dtype)
    )
    assert lower.abs().max() <= 1 + 1e-12  # partial pivoting
    assert torch.allclose(upper.tril(-1), torch.zeros_like(upper)) and torch.allclose(
        upper.diagonal(), torch.ones(k, dtype=d.dtype)
    )
    r = min(r, k)
    for got, whole in zip(ldu(weight, r), (left[:, :r], d[:r], upper[:r], perm), strict=True):
        assert torch.allclose(got.double(), whole.double(), atol=1e-12)
    # a stored row order gives the same factors without pivoting
    for got, want in zip(ldu(weight, r, perm), ldu(weight, r), strict=True):
        assert torch.allclose(got.double(), want.double(), atol=1e-6, rtol=1e-6)


def test_ldu_of_degenerate_weights_is_finite_and_exact():
    torch.manual_seed(0)
    rank3 = torch.randn(6, 3, dtype=torch.float64) @ torch.randn(3, 6, dtype=torch.float64)
    pruned = torch.randn(6, 6, dtype=torch.float64)
    pruned[2] = 0
    for weight, zeros in ((rank3, 3), (torch.zeros(4, 5, dtype=torch.float64), 4), (pruned, 1)):
        left, d, upper, _ = ldu(weight, min(weight.shape))
        assert all(torch.isfinite(t).all() for t in (left, d, upper))
        assert int((d == 0).sum()) == zeros
        assert torch.allclose((left * d) @ upper, weight, atol=1e-9)
        assert torch.equal(left[:, d == 0], torch.zeros_like(left[:, d == 0]))  # frozen: no gradient, no effect


def test_elimination_stops_at_a_zero_pivot_without_nan():
    lower, upper = _eliminate(torch.zeros(3, 4), 2)
    assert torch.equal(lower, torch.eye(3, 2)) and torch.equal(upper, torch.zeros(2, 4))


@BOTH
@pytest.mark.parametrize(("m", "n"), [(5, 7), (7, 5), (6, 6)])
@pytest.mark.parametrize("r", [1, 3, 100])
def test_forward_and_gradient_against_float64(config_cls, m, n, r):
    """y = (W + Left diag(z - z0) Right) x with factors by brute force in float64; dL/dz_i = left_i^T (G^T X) right_i."""
    net = Net(m, n, torch.float64)
    weight = net.lin.weight.detach().clone()
    model = adapted(config_cls, net, r=r)
    k = min(r, m, n)
    if config_cls is SVFitConfig:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        left, z0, right = u[:, :k], s[:k], vt[:k]
    else:
        left, z0, right, _ = ldu(weight, k)
    z = z_of(model)
    assert z.dtype == torch.float64 and z.shape == (k,) and torch.allclose(z, z0, atol=1e-12)
    with torch.no_grad():
        z.add_(torch.randn(k, dtype=torch.float64))
    x = torch.randn(11, n, dtype=torch.float64, requires_grad=True)
    y = model(x)
    full = weight + (left * (z.detach() - z0)) @ right
    assert torch.allclose(y, x @ full.T, atol=1e-10)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected = torch.einsum("mi,mn,in->i", left, grad.T @ x.detach(), right)
    assert torch.allclose(z.grad, expected, atol=1e-9) and torch.allclose(x.grad, grad @ full, atol=1e-9)


def test_energy_takes_the_smallest_rank():
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))  # squares 9 4 1 .25 of 14.25
    for energy, rank in ((0.5, 1), (9 / 14.25, 1), (0.64, 2), (0.9, 2), (0.95, 3), (0.99, 4), (1.0, 4)):
        assert len(top_singular(weight, 1, energy)[1]) == rank, energy
    net = Net(4, 4)
    with torch.no_grad():
        net.lin.weight.copy_(weight)
    assert z_of(adapted(SVFitConfig, net, energy=0.9)).tolist() == [3.0, 2.0]


def test_sketch_is_orthonormal_seeded_and_leaves_the_global_generator():
    weight = torch.randn(60, 40)
    state = torch.get_rng_state()
    u, s, vt = sketched_singular(weight, 8, 16, 4, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(u.T @ u, torch.eye(8), atol=1e-5) and torch.allclose(vt @ vt.T, torch.eye(8), atol=1e-5)
    assert torch.equal(s, sketched_singular(weight, 8, 16, 4, seed=5)[1])
    assert torch.allclose(s, torch.linalg.svdvals(weight)[:8], rtol=0.03)


@pytest.mark.parametrize("kind", INITS)
def test_init_z(kind):
    """Every init starts exactly with preserve_function; without it only "lu" does (the authors' ablation)."""
    x = torch.randn(3, 7)
    for preserve in (True, False):
        net = Net()
        before = net(x).detach()
        model = adapted(LoLDUConfig, net, r=5, init_z=kind, preserve_function=preserve)
        exact = torch.equal(model(x), before)
        assert exact == (preserve or kind == "lu")
        d = ldu(net.lin.get_base_layer().weight.detach(), 5)[1]
        if not preserve:  # z0 is the pivots: y = (W + PL diag(z - d) U) x
            layer = model.base_model.model.lin
            assert torch.equal(layer.loldu_z0["default"], d)
    generator = torch.Generator().manual_seed(0)
    z = initial_z(d, kind, generator)
    bound = {"uniform": d.mean().abs() / 2, "s_uniform": 1.0}.get(kind)
    assert z.shape == d.shape and (bound is None or z.abs().max() <= bound)
    fixed = {"lu": d, "constant": d.mean().expand(5), "ones": torch.ones(5), "zeros": torch.zeros(5)}.get(kind)
    assert fixed is None or torch.equal(z, fixed)


def test_every_preserving_init_gives_the_same_run_without_decay():
    """Only z - z0 enters, so SGD from any preserving init walks the same path (sheet 2.6)."""
    ends = []
    for kind in ("lu", "ones", "s_normal"):
        model = adapted(LoLDUConfig, Net(), r=5, init_z=kind)
        optimizer = torch.optim.SGD([z_of(model)], lr=0.05)
        x = torch.randn(16, 7, generator=torch.Generator().manual_seed(1))
        for _ in range(10):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        ends.append(model(x).detach())
    assert torch.allclose(ends[0], ends[1], atol=1e-4) and torch.allclose(ends[0], ends[2], atol=1e-4)


def test_scale_and_alpha():
    x = torch.randn(3, 7)
    outs = {}
    for alpha in (None, 5, 10):
        net = Net()
        before = net(x).detach()
        model = adapted(LoLDUConfig, net, r=5, alpha=alpha)
        with torch.no_grad():
            z_of(model).add_(0.5)
        outs[alpha] = model(x).detach() - before
    assert torch.allclose(outs[None], outs[5], atol=1e-6) and torch.allclose(outs[10], 2 * outs[5], atol=1e-5)
    net = Net()
    before = net(x).detach()
    model = adapted(LoLDUConfig, net, r=5, alpha=10, train_scale=True)
    assert torch.equal(model(x), before) and sum(p.numel() for p in model.parameters() if p.requires_grad) == 6
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    scaled = adapted(SVFitConfig, Net(), r=5, scaling=0.5)
    with torch.no_grad():
        z_of(scaled).add_(1.0)
    u, _, vt = torch.linalg.svd(Net().lin.weight.detach(), full_matrices=False)
    assert torch.allclose(scaled.base_model.model.lin.get_delta_weight("default"), 0.5 * u @ vt, atol=1e-5)


@BOTH
def test_decay_acts_on_z_or_on_the_shift(config_cls):
    """AdamW's decay multiplies the parameter by (1 - lr wd): z itself, or z - z0 with decay_to_init."""
    for shift in (False, True):
        model = adapted(config_cls, Net(), r=3, decay_to_init=shift)
        z = z_of(model)
        before = z.detach().clone()
        assert (before == 0).all() == shift
        z.grad = torch.zeros_like(z)
        torch.optim.AdamW([z], lr=0.1, weight_decay=0.5).step()
        assert torch.allclose(z, before * 0.95)
        moved = model.base_model.model.lin.get_delta_weight("default").abs().max()
        assert (moved == 0) == shift


@BOTH
def test_conversion_to_lora_is_exact(config_cls):
    model = adapted(config_cls, Net(12, 10), r=4, init_weights=False)
    x = torch.randn(5, 10)
    config, tensors = convert_to_lora(model, rank=4)
    a, b = (next(v for k, v in tensors.items() if name in k) for name in ("lora_A", "lora_B"))
    delta = model.base_model.model.lin.get_delta_weight("default")
    assert config.r == 4 and torch.allclose((b @ a) * config.lora_alpha / config.r, delta, atol=1e-5)
    assert x.shape == (5, 10)


# --- counts and sizes -----------------------------------------------------------------------------------------------

ROBERTA = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}


def count(model, config):
    """Trainable parameters on a meta-device model."""
    with torch.device("meta"):
        net = model()
    return sum(p.numel() for p in get_peft_model(net, config).parameters() if p.requires_grad)


@BOTH
def test_counts_of_the_sheets(config_cls):
    def roberta(**changes):
        return lambda: RobertaModel(RobertaConfig(**(ROBERTA | changes)), add_pooling_layer=False)

    def vit(**changes):
        return lambda: ViTModel(ViTConfig(**(ROBERTA | changes)), add_pooling_layer=False)

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    for model, targets, r, expected in (
        (roberta(), ["query", "value"], 768, 18432),
        (roberta(**large), ["query", "value"], 1024, 49152),
        (vit(), ["q_proj", "v_proj"], 768, 18432),
        (vit(**large), ["q_proj", "v_proj"], 1024, 49152),
        (roberta(), ["query", "key", "value", "dense"], 768, 55296),
    ):
        assert count(model, config_cls(r=r, target_modules=targets)) == expected


def test_counts_of_loldus_rank_ablation():
    def vit():
        return ViTModel(ViTConfig(**ROBERTA), add_pooling_layer=False)

    for r, expected in (
        (1, 24),
        (8, 192),
        (16, 384),
        (32, 768),
        (64, 1536),
        (128, 3072),
        (256, 6144),
        (512, 12288),
        (768, 18432),
    ):
        assert count(vit, LoLDUConfig(r=r, target_modules=["q_proj", "v_proj"])) == expected
    assert count(vit, LoLDUConfig(r=768, target_modules=["q_proj", "v_proj"], train_scale=True)) == 18456


@BOTH
def test_counts_of_llama2_7b(config_cls):
    shape = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert count(lambda: LlamaForCausalLM(shape), config_cls(r=4096, target_modules=["q_proj", "v_proj"])) == 262144
    assert count(lambda: LlamaForCausalLM(shape), config_cls(r=4096, target_modules=seven)) == 917504
    assert count(lambda: LlamaForCausalLM(shape), config_cls(r=256, target_modules=["q_proj", "v_proj"])) == 16384


def test_energy_on_a_meta_model_is_refused():
    with torch.device("meta"):
        net = Net()
    with pytest.raises(ValueError, match="energy needs the base model's weights"):
        adapted(SVFitConfig, net, energy=0.9)


@pytest.mark.parametrize(
    ("config_cls", "factors", "numbers"),
    [
        (SVFitConfig, "auto", lambda m, n, r: 2 * r),
        (SVFitConfig, True, lambda m, n, r: 2 * r + r * (m + n)),
        (LoLDUConfig, "auto", lambda m, n, r: 2 * r + m),
        (LoLDUConfig, True, lambda m, n, r: 2 * r + m + r * (m + n)),
    ],
)
def test_file_size_is_the_formula_plus_header(config_cls, factors, numbers, tmp_path):
    adapted(config_cls, Net(40, 30), r=8, save_factors=factors).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 4 * numbers(40, 30, 8) + header
    names = {k.rsplit(".", 1)[1] for k in load_file(path)}
    keys = {"svfit_sigma", "svfit_sigma0"} if config_cls is SVFitConfig else {"loldu_z", "loldu_z0", "loldu_perm"}
    prefix = "svfit" if config_cls is SVFitConfig else "loldu"
    assert names == keys | ({f"{prefix}_left", f"{prefix}_right"} if factors is True else set())


def test_saved_for_backward_is_t_times_r():
    """Bytes kept beyond the base layer: T r 4 + O(r), never T n or m n (the sheet's peak-memory bar)."""
    saved = set()
    total = 0

    def pack(t):
        nonlocal total
        if t.untyped_storage().data_ptr() not in saved:
            saved.add(t.untyped_storage().data_ptr())
            total += t.untyped_storage().nbytes()
        return t

    tokens, r = 64, 4
    for config_cls in (SVFitConfig, LoLDUConfig):
        model = adapted(config_cls, Net(96, 80), r=r)
        kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        saved, total = set(kept), 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(tokens, 80))
        assert tokens * r * 4 <= total <= tokens * r * 4 + 16 * r


# --- architectures and bases ----------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=1, **SMALL)), None),
    "opt": (lambda: OPTForCausalLM(OPTConfig(vocab_size=20, ffn_dim=20, word_embed_proj_dim=16, max_position_embeddings=32, **{k: v for k, v in SMALL.items() if k != "intermediate_size"})), None),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)), None),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2, decoder_start_token_id=0)), None),
    "bert": (lambda: BertModel(BertConfig(vocab_size=20, **SMALL)), None),
    "vit": (lambda: ViTModel(ViTConfig(image_size=8, patch_size=4, **SMALL)), ["q_proj", "v_proj"]),
}  # fmt: skip


def run(name, model):
    ids = torch.arange(3, 11)[None] % 20
    with torch.no_grad():
        if name == "vit":
            return model(pixel_values=torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)).last_hidden_state
        if name == "t5":
            return model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
        out = model(input_ids=ids)
        return out.logits if "logits" in out else out.last_hidden_state


@BOTH
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", ["default", "all-linear"])
def test_architectures(config_cls, name, targets, tmp_path):
    build, own = MODELS[name]
    targets = own if targets == "default" else targets
    torch.manual_seed(0)
    base = build().eval()
    plain, before = copy.deepcopy(base), run(name, base)
    model = get_peft_model(base, config_cls(r=3, target_modules=targets)).eval()
    assert torch.equal(run(name, model), before)
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(plain), config_cls(r=3, target_modules=targets, init_weights=False)).eval()
    on = run(name, model)
    assert not torch.allclose(on, before, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(name, PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()), on)
    merged = model.merge_and_unload()
    assert (run(name, merged) - on).abs().max() < 1e-5
    if name != "vit":
        again = copy.deepcopy(plain)
        again.load_adapter(str(tmp_path))
        assert torch.equal(run(name, again.eval()), on)


def quantised(kind):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(64, 64) / 8
    layer = (
        bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
        if kind == 4
        else bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    )
    layer.load_state_dict({"weight": weight})
    net = nn.Module()
    net.lin = layer.to("cpu")
    net.forward = lambda x: net.lin(x)
    if kind == 8:
        net(torch.zeros(1, 64, dtype=torch.float16))
    return net


class Wrap(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.lin = quantised(kind).lin

    def forward(self, x):
        return self.lin(x)


@BOTH
@pytest.mark.parametrize("kind", [4, 8])
def test_bitsandbytes_base_trains_and_merges(config_cls, kind):
    net = Wrap(kind).eval()
    x = torch.randn(6, 64)
    with torch.no_grad():
        before = net(x).float()  # the eval forward that makes bitsandbytes repack a 4-bit weight on CPU
    model = adapted(config_cls, net, r=8)
    with torch.no_grad():
        assert torch.equal(model(x).float(), before)
        z_of(model).mul_(1.3)
        on = model(x).float()
    model.train()
    model(x).float().square().sum().backward()
    assert z_of(model).grad.abs().sum() > 0
    model.eval().merge_adapter()
    with torch.no_grad():
        # re-quantising moves every weight by up to half a step; an adapter that was merged into garbage moves by O(1)
        assert (model(x).float() - on).abs().mean() < 0.12 * on.abs().mean()
        assert (on - before).abs().mean() > 0.05 * on.abs().mean()


def test_a_layer_with_its_own_backend():
    """A quantiser peft does not know offers `hfgen_backend()`; every kit adapter then trains and merges on it."""
    from peft.utils.quantization_utils import QuantizationBackend

    class Backend(QuantizationBackend):
        layer_type, supports_merge, backend_name = "linear", True, "half"

        def get_base_weight(self, base):
            return base.halves.float() * 2

        def set_base_weight(self, peft_layer, weight):
            peft_layer.get_base_layer().halves.data = (weight / 2).half()

    class Halved(nn.Module):
        in_features, out_features = 7, 5

        def __init__(self):
            super().__init__()
            self.halves = nn.Parameter(torch.randn(5, 7).half(), requires_grad=False)

        def hfgen_backend(self):
            return Backend()

        def forward(self, x):
            return x @ (self.halves.float() * 2).T

    net = Net()
    net.lin = Halved()
    x = torch.randn(3, 7)
    before = net(x)
    model = adapted(SVFitConfig, net, r=5)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        z_of(model).add_(0.5)
    on = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), on, atol=0.02) and not torch.allclose(on, before, atol=0.1)


# --- another base, damaged files -------------------------------------------------------------------------------------


def saved(config_cls, folder, **options):
    adapted(config_cls, Net(), **options).save_pretrained(folder)


@BOTH
@pytest.mark.parametrize("trained", [True, False])
def test_another_base_is_refused_in_our_words(config_cls, trained, tmp_path):
    saved(config_cls, tmp_path, r=3, init_weights=not trained)
    for base in (Net(seed=1), _rows_permuted(), _rounded()):
        with pytest.raises(
            ValueError, match=r"does not fit lin: .*load that base, or save the adapter with save_factors=True"
        ) as e:
            PeftModel.from_pretrained(base, tmp_path)
        assert traceback.extract_tb(e.tb)[-1].filename.endswith("adapter.py")


def _rows_permuted():
    """Same singular values, same norms: only a look along fixed directions tells it from the right base."""
    net = Net()
    net.lin.weight.data = net.lin.weight.data.flip(0).contiguous()
    return net


def _rounded():
    net = Net()
    net.lin.weight.data = (net.lin.weight.data * 8).round() / 8  # about 4 bits
    return net


@BOTH
def test_save_factors(config_cls, tmp_path):
    """True: works on any base, with the same delta. False: a mismatch only warns."""
    saved(config_cls, tmp_path / "with", r=3, init_weights=False, save_factors=True)
    own = PeftModel.from_pretrained(Net(), tmp_path / "with").base_model.model.lin.get_delta_weight("default")
    other = PeftModel.from_pretrained(Net(seed=1), tmp_path / "with").base_model.model.lin.get_delta_weight("default")
    assert torch.equal(own, other)
    saved(config_cls, tmp_path / "warn", r=3, init_weights=False, save_factors=False)
    with pytest.warns(UserWarning, match="does not fit lin"):
        PeftModel.from_pretrained(Net(seed=1), tmp_path / "warn")


def test_a_row_order_of_another_machine_is_followed(tmp_path):
    """A near-tie that fell the other way: the stored permutation decides, and the function is the saved one."""
    weight = torch.tensor([[1.0, 2.0, 0.5], [1.0, -1.0, 3.0], [0.25, 0.5, 4.0]])
    net = Net(3, 3)
    net.lin.weight.data = weight.clone()
    model = adapted(LoLDUConfig, net, r=3, init_weights=False)
    model(torch.zeros(1, 3))
    layer = model.base_model.model.lin
    assert layer.loldu_perm["default"].tolist()[0] in (0, 1)  # |1.0| stands in two rows
    swapped = torch.tensor([1 - layer.loldu_perm["default"].tolist()[0], 0, 2], dtype=torch.int32)
    swapped[1] = 1 - swapped[0]
    left, d, right, _ = ldu(weight, 3, swapped)
    with torch.no_grad():
        layer.loldu_perm["default"], layer._perms["default"] = swapped, swapped
        layer.loldu_left["default"], layer.loldu_right["default"], layer.loldu_z0["default"] = left, right, d
    x = torch.randn(4, 3)
    want = model(x)
    model.save_pretrained(tmp_path)
    base = Net(3, 3)
    base.lin.weight.data = weight.clone()
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again.base_model.model.lin.loldu_perm["default"], swapped)
    assert torch.allclose(again(x), want, atol=1e-6)


@BOTH
@pytest.mark.parametrize(
    "damage", [3, [], {"lin": 1}, {"lin": {"base": [1, 2, 3]}}, {"lin": {"base": ["a"] * 3, "delta": []}}]
)
def test_a_malformed_fingerprint_is_refused(config_cls, damage, tmp_path):
    saved(config_cls, tmp_path)
    path = tmp_path / "adapter_config.json"
    data = json.loads(path.read_text())
    data["hfgen"]["fingerprint"] = damage
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="malformed fingerprint; the file is damaged"):
        PeftModel.from_pretrained(Net(), tmp_path)


@BOTH
def test_a_diverged_adapter_is_refused(config_cls, tmp_path):
    model = adapted(config_cls, Net(), r=3)
    with torch.no_grad():
        z_of(model)[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of lin holds NaN or Inf in the adapter file"):
        PeftModel.from_pretrained(Net(), tmp_path)


@BOTH
@pytest.mark.parametrize("bias", ["all", "only"])
def test_bias_trains_saves_and_loads(config_cls, bias, tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))

    method = config_cls.tuner_cls.prefix.removesuffix("_")
    config = config_cls(target_modules=["0"], r=2, bias="all" if bias == "all" else f"{method}_only")
    model = get_peft_model(net(), config)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert len(trained) == (2 if bias == "all" else 1)
    x = torch.randn(5, 6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(x), model(x))


@BOTH
def test_choosing_targets(config_cls):
    """A list, a regular expression, exclusion and layer indices choose what they do for LoRA."""
    shape = LlamaConfig(vocab_size=20, num_key_value_heads=1, **(SMALL | {"num_hidden_layers": 3}))

    def chosen(**options):
        model = get_peft_model(LlamaForCausalLM(shape), config_cls(r=1, **options))
        return sorted(model.targeted_module_names)

    every = [f"model.layers.{i}.self_attn.{n}" for i in range(3) for n in ("q_proj", "v_proj")]
    assert chosen() == every  # peft's default for Llama
    assert chosen(target_modules=["q_proj", "v_proj"], layers_to_transform=1) == every[2:4]
    assert (
        chosen(target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2], layers_pattern="layers")
        == every[:2] + every[4:]
    )
    assert chosen(target_modules=r".*layers\.2\..*q_proj") == every[4:5]
    assert chosen(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]) == every[::2]


@BOTH
def test_a_newer_format_is_refused(config_cls, tmp_path):
    saved(config_cls, tmp_path)
    path = tmp_path / "adapter_config.json"
    data = json.loads(path.read_text())
    data["hfgen"]["format"] = 99
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="says format 99, this hfgen reads up to 1"):
        PeftModel.from_pretrained(Net(), tmp_path)


def test_a_second_save_and_a_reload_into_the_same_adapter(tmp_path):
    """The fingerprint of an earlier save does not refuse a later state (resume loads into an existing adapter)."""
    model = adapted(SVFitConfig, Net(), r=3)
    for folder in ("a", "b"):
        with torch.no_grad():
            z_of(model).add_(0.3)
        model.save_pretrained(tmp_path / folder)
    model.load_adapter(tmp_path / "a", "default", is_trainable=True)
    x = torch.randn(3, 7)
    assert torch.equal(model(x), PeftModel.from_pretrained(Net(), tmp_path / "a")(x))


@BOTH
def test_run_time_scale(config_cls):
    """scale_layer, set_scale and unscale_layer multiply the delta, also of a merge; peft's context manager for LoRA's way."""
    net = Net()
    x = torch.randn(3, 7)
    before = net(x).detach()
    model = adapted(config_cls, net, r=3, init_weights=False)
    layer, delta = model.base_model.model.lin, model(x) - before
    layer.scale_layer(0.5)
    assert torch.allclose(model(x), before + 0.5 * delta, atol=1e-6)
    layer.scale_layer(0.5)
    model.merge_adapter()
    assert torch.allclose(model(x), before + 0.25 * delta, atol=1e-6)
    with pytest.raises(ValueError, match="cannot be scaled while"):
        layer.scale_layer(2.0)
    model.unmerge_adapter()
    layer.unscale_layer(0.5)
    assert torch.allclose(model(x), before + 0.5 * delta, atol=1e-6)
    layer.set_scale("default", 2.0)
    layer.unscale_layer()
    assert torch.allclose(model(x), before + delta, atol=1e-6)


@BOTH
def test_torch_compile_has_no_graph_break(config_cls):
    """The forward of a fresh adapter compiles as one graph, and gives what eager gives."""
    model = adapted(config_cls, Net(), r=3, init_weights=False)
    x = torch.randn(4, 7)
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    compiled(x).sum().backward()
    assert z_of(model).grad is not None


def test_a_non_finite_base_is_named():
    net = Net()
    net.lin.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight of lin holds NaN or Inf"):
        adapted(SVFitConfig, net)


def test_multihead_attention_is_refused_not_ignored():
    net = nn.Module()
    net.attn = nn.MultiheadAttention(8, 2)
    with pytest.raises(TypeError, match=r"attn\.out_proj belongs to nn\.MultiheadAttention"):
        get_peft_model(net, SVFitConfig(target_modules=["out_proj"]))


# --- configs -----------------------------------------------------------------------------------------------------------


def test_unknown_option_suggests():
    with pytest.raises(
        TypeError, match=r"SVFitConfig\(\) got an unexpected keyword argument 'enrgy'; did you mean 'energy'"
    ):
        SVFitConfig(enrgy=0.9)
    with pytest.raises(ValueError, match=r"LoLDUConfig.init_z is 'uniforn'; did you mean 'uniform'"):
        LoLDUConfig(init_z="uniforn")
    with pytest.raises(ValueError, match="SVFitConfig.r is 0; give an integer of at least 1"):
        SVFitConfig(r=0)
    with pytest.raises(ValueError, match="energy is 0.9, which needs every singular value"):
        SVFitConfig(energy=0.9, init_svd="lowrank")
    with pytest.raises(ValueError, match="SVFitConfig.r is 16 but energy chooses the rank; leave r out"):
        SVFitConfig(energy=0.9, r=16)
    with pytest.raises(ValueError, match="oversample is 5 but init_svd='exact' draws no sketch"):
        SVFitConfig(oversample=5)
    with pytest.raises(ValueError, match="matches no module of the model; did you mean 'lin'"):
        get_peft_model(Net(), SVFitConfig(target_modules=["linn"]))
