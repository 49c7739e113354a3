"""SaRA: the exact mathematics, against brute force on flat masked vectors."""

import copy
import gc
import json
import math
import os
import subprocess
import sys
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.optim import optimizer as torch_optimizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hfgen import sandbox
from hfgen.adapters import SaraAdamW, SaraConfig, sara_learning_rate
from hfgen.kit import sparse
from hfgen.kit import steps as steps_of
from hfgen.testing.adapters import CHECKS, AdapterCase

ADAM = {"lr": 0.03, "weight_decay": 0.1, "betas": (0.8, 0.95)}


class Net(nn.Module):
    """Two matrices, biases and a norm; the targets are a, norm and b."""

    def __init__(self, seed=0, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.norm, self.b = nn.Linear(9, 12), nn.LayerNorm(12), nn.Linear(12, 5)
        self.to(dtype)

    def forward(self, x):
        return self.b(torch.tanh(self.norm(self.a(x))))


def adapted(net=None, **options):
    options = {"density": 0.3, "target_modules": ["a", "norm", "b"], **options}
    return get_peft_model(Net() if net is None else net, SaraConfig(**options))


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 9, generator=generator, dtype=dtype), torch.randn(8, 5, generator=generator, dtype=dtype)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def steps(model, count, optimizer=None, parts=1, clip=None):
    optimizer = optimizer or torch.optim.AdamW(trained(model), **ADAM)
    x, y = data()
    for _ in range(count):
        optimizer.zero_grad()
        for rows in torch.arange(8).chunk(parts):
            (F.mse_loss(model(x[rows]), y[rows]) / parts).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained(model), clip)
        optimizer.step()
    return optimizer


def reference(threshold, count, progressive=None, reset=True, nuclear=0.0, seed=0, clip=None):
    """AdamW on one flat vector of all masked entries of the net, by hand: the whole net's flat vector after `count` steps."""
    import zlib

    net = Net()
    parameters = dict(net.named_parameters())
    start, sizes = flat(net), [p.numel() for p in parameters.values()]
    index = (start.abs() < threshold).nonzero().flatten()
    values = start[index].clone().requires_grad_()
    active = torch.ones(len(index), dtype=torch.bool)
    x, y = data()
    m, v, t = torch.zeros_like(values), torch.zeros_like(values), 0
    for step in range(count):
        full = start.index_put((index,), values)
        pieces = {n: f.view(p.shape) for (n, p), f in zip(parameters.items(), full.split(sizes), strict=True)}
        (grad,) = torch.autograd.grad(F.mse_loss(torch.func.functional_call(net, pieces, (x,)), y), values)
        with torch.no_grad():
            grad = torch.where(active, grad, 0)
            if clip:
                grad = grad * min(1.0, clip / (float(grad.norm()) + 1e-6))
            if nuclear:
                name = ["a.weight", "b.weight"][zlib.crc32(f"{seed}:{step}".encode()) % 2]
                mask = torch.zeros_like(start)
                mask[index[active]] = 1
                offset = dict(zip(parameters, np.cumsum([0, *sizes]).tolist(), strict=False))[name]
                shape = parameters[name].shape
                part = slice(offset, offset + math.prod(shape))
                u, s, vh = torch.linalg.svd((full * mask)[part].view(shape), full_matrices=False)
                rank = int((s > 1e-9).sum())
                term = torch.zeros_like(start)
                term[part] = (u[:, :rank] @ vh[:rank]).flatten()
                grad = grad + nuclear * (term * mask)[index]
            if step == progressive:
                active = values.abs() < threshold
                if reset:
                    m, v, t = torch.zeros_like(m), torch.zeros_like(v), 0
                    continue
                grad = torch.where(active, grad, 0)
            t += 1
            before = values.clone()
            values *= 1 - ADAM["lr"] * ADAM["weight_decay"]
            m.lerp_(grad, 1 - ADAM["betas"][0])
            v.mul_(ADAM["betas"][1]).addcmul_(grad, grad, value=1 - ADAM["betas"][1])
            root = (v / (1 - ADAM["betas"][1] ** t)).sqrt() + 1e-8
            values -= ADAM["lr"] / (1 - ADAM["betas"][0] ** t) * m / root
            values.copy_(torch.where(active, values, before))
    return start.index_put((index,), values.detach()), active


def threshold_of(model):
    return model.peft_config["default"]._threshold


# --- the kit ----------------------------------------------------------------------------------------------------------

STEPWISE = {"density": 0.3, "progressive_at": 3, "nuclear_weight": 0.01, "nuclear_min_dim": 7}


@pytest.mark.parametrize("check", sorted(set(CHECKS) - {"zero_import"}))
def test_conformance_with_every_option(check):
    """The catalogue's own run takes the defaults."""
    CHECKS[check](AdapterCase(SaraConfig, STEPWISE))


# --- the threshold ----------------------------------------------------------------------------------------------------


@given(
    parts=st.lists(
        hnp.arrays(np.float32, st.integers(1, 9), elements=st.one_of(st.floats(-3, 3, width=32), st.sampled_from([0.0, -0.0, 0.5, -0.5]))),
        min_size=1, max_size=4,
    ),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_streamed_quantile_is_that_of_a_sort(parts, share, dtype):
    tensors = [torch.from_numpy(p).to(dtype) for p in parts]
    every = torch.cat(tensors).double().abs()
    k = max(1, round(share * len(every)))
    assert sparse.kth_smallest(lambda: tensors, k) == float(every.sort().values[k - 1])
    threshold = sparse.magnitude_threshold("X", None, share, lambda: tensors)
    chosen = torch.cat([sparse.below(t, threshold) for t in tensors])
    assert torch.equal(chosen, every <= every.sort().values[k - 1])
    if len(every) > 1:  # torch's own, where it interpolates nothing
        assert sparse.kth_smallest(lambda: tensors, k) == float(
            every.quantile((k - 1) / (len(every) - 1), interpolation="nearest")
        )


def test_streamed_quantile_over_chunks(monkeypatch):
    monkeypatch.setattr(sparse, "CHUNK", 7)
    tensors = [torch.randn(5, 9), torch.randn(20)]
    every = torch.cat([t.flatten() for t in tensors]).abs().sort().values
    assert [sparse.kth_smallest(lambda: tensors, k) for k in (1, 30, 65)] == [float(every[k - 1]) for k in (1, 30, 65)]
    with pytest.raises(ValueError, match="66-th smallest of 65"):
        sparse.kth_smallest(lambda: tensors, 66)


def test_counts():
    """Of a Gaussian model: erf(theta / (s sqrt 2)) of the entries, within three sigma, and exactly numpy's count."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 300, bias=False), nn.Linear(300, 100, bias=False))
    for p in net.parameters():
        nn.init.normal_(p, std=0.02)
    every = np.concatenate([p.detach().numpy().ravel() for p in net.parameters()])
    model = get_peft_model(net, SaraConfig(threshold=2e-3, target_modules=["0", "1"]))
    nnz = sum(p.numel() for p in trained(model))
    assert nnz == int((np.abs(every) < np.float32(2e-3)).sum())
    share = math.erf(2e-3 / (0.02 * 2**0.5))
    assert abs(nnz - share * every.size) < 3 * (every.size * share * (1 - share)) ** 0.5
    by_density = get_peft_model(model.unload(), SaraConfig(target_modules=["0", "1"]))
    assert sum(p.numel() for p in trained(by_density)) == round(0.06 * every.size)
    optimizer = torch.optim.AdamW(trained(by_density))
    by_density(torch.randn(2, 200)).sum().backward()
    optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values()]
    assert sum(t.numel() * t.element_size() for t in held) == 8 * round(0.06 * every.size) + 4 * 2


def test_learning_rate():
    assert [round(sara_learning_rate(t), 7) for t in (2e-4, 8e-4, 2e-3)] == [9.324e-4, 7.558e-4, 4.966e-4]


# --- the trajectory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
def test_trajectory_is_adamw_on_the_masked_vector(parts):
    model = adapted()
    before = flat(Net())
    steps(model, 6, parts=parts)
    threshold = threshold_of(model)
    want, _ = reference(threshold, 6)
    got = flat(model.merge_and_unload())
    assert torch.allclose(got, want, rtol=0, atol=1e-13)
    moved = got != before
    assert torch.equal(moved, before.abs() < threshold) and int(moved.sum()) == round(0.3 * len(before))


@pytest.mark.parametrize("reset", [True, False])
def test_rethreshold(reset):
    model = adapted(progressive_at=3, reset_state_on_progress=reset)
    optimizer = steps(model, 4)
    threshold = threshold_of(model)
    active = torch.cat([m.sara_active["default"] for m in model.modules() if hasattr(m, "sara_active")])
    assert 0 < int(active.sum()) < len(active)
    assert bool(optimizer.state) is not reset  # this step moved nothing with a reset
    at_four = torch.cat([p.detach().flatten() for p in trained(model)])
    steps(model, 5, optimizer)
    want, still = reference(threshold, 9, progressive=3, reset=reset)
    assert int(still.sum()) == int(active.sum())
    now = torch.cat([p.detach().flatten() for p in trained(model)])
    assert torch.equal(now[~active], at_four[~active]) and not (now[active] == at_four[active]).any()
    assert torch.allclose(flat(model.merge_and_unload()), want, rtol=0, atol=1e-13)


def test_the_gradient_of_frozen_entries_is_not_clipped_with():
    model = adapted(progressive_at=2)
    steps(model, 6, clip=0.05)
    want, _ = reference(threshold_of(model), 6, progressive=2, clip=0.05)
    assert torch.allclose(flat(model.merge_and_unload()), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("parts", [1, 4])
def test_nuclear_term_acts_once_per_step(parts):
    """Against the SVD's U V^T added once per step, whatever the accumulation; the polar factor is good to 1e-3 of it."""
    options = {"density": 0.7, "nuclear_weight": 0.01, "nuclear_min_dim": 4}
    model, plain = adapted(progressive_at=3, **options), adapted(density=0.7, progressive_at=3)
    steps(model, 5, parts=parts)
    steps(plain, 5, parts=parts)
    want, _ = reference(threshold_of(model), 5, progressive=3, nuclear=0.01)
    got, without = flat(model.merge_and_unload()), flat(plain.merge_and_unload())
    assert float((got - want).abs().max()) < 0.05 * float((without - want).abs().max())


@pytest.mark.parametrize("kind", ["square", "wide", "tall", "rank 2", "zero rows", "zero", "sparse"])
def test_polar_factor(kind):
    torch.manual_seed(0)
    m = torch.randn({"wide": (20, 50), "tall": (50, 20)}.get(kind, (30, 30)), dtype=torch.float64)
    if kind == "rank 2":
        m = m[:, :2] @ m[:2]
    elif kind == "zero rows":
        m[::3] = 0
    elif kind == "zero":
        m.zero_()
    elif kind == "sparse":
        m *= torch.rand_like(m) < 0.06
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    keep = s > 0.02 * s[0] if s[0] > 0 else s > 0
    got = u.T @ sparse.polar_factor(m) @ vh.T
    assert torch.allclose(got[keep][:, keep], torch.eye(int(keep.sum()), dtype=m.dtype), atol=2e-3)
    small = got.diagonal()[~keep]
    assert torch.isfinite(got).all() and bool(((small > -1e-9) & (small < 1.01)).all())


def test_bf16_base_trains_float32_masters():
    """Steps far below bf16's spacing add up in the values and arrive in the weight; the base's bits come back."""
    net = Net(dtype=torch.bfloat16)
    before = copy.deepcopy(net.a.weight.data)
    model = adapted(net)
    x = data(torch.bfloat16)[0]
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    layer = model.base_model.model.a
    start = layer.sara_values["default"].detach().clone()
    assert start.dtype == torch.float32
    for _ in range(64):
        model(x)
        for p in trained(model):
            p.grad = torch.full_like(p, -1e-5)
        optimizer.step()
    model(x)
    index = layer.indices("default")[0]
    values = layer.sara_values["default"].detach()[: len(index)]
    assert torch.allclose(values - start[: len(index)], torch.tensor(64e-5), atol=1e-6)
    assert torch.equal(layer.weight.flatten()[index], values.bfloat16())
    with model.disable_adapter():
        assert torch.equal(layer.weight, before)


def test_a_hosts_cast_of_the_values_is_taken_back():
    """trl casts trainable parameters of a bitsandbytes model to bfloat16, after which small steps would vanish."""
    model = adapted(Net(dtype=torch.float32))
    before = [p.detach().clone() for p in trained(model)]
    for p in trained(model):
        p.data = p.data.bfloat16()
    model.train()
    assert all(torch.equal(p, b) for p, b in zip(trained(model), before, strict=True))
    low = get_peft_model(
        Net(dtype=torch.bfloat16), SaraConfig(density=0.3, target_modules=["a"]), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in trained(low.train())} == {torch.bfloat16}  # asked for


def test_resume_in_the_trainer_is_bit_equal_across_a_rethreshold(tmp_path):
    """Kill at step 2, before the re-threshold at 3, and at 4, just after it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(dtype=torch.float32)

        def forward(self, x, labels):
            out = self.net(x)
            return {"loss": F.mse_loss(out, labels), "out": out}

    x, y = data(torch.float32)
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]

    def build(folder, **options):
        config = {**STEPWISE, "density": 0.5, "nuclear_min_dim": 4, "target_modules": ["a", "norm", "b"]}
        args = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=7, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=0.05, save_strategy="steps", save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
            **options,
        )  # fmt: skip
        return Trainer(get_peft_model(Model(), SaraConfig(**config)), args, train_dataset=rows)

    whole = build("whole")
    whole.train()
    final = {n: p.detach().clone() for n, p in whole.model.state_dict().items()}
    active = [t for n, t in final.items() if "sara_active" in n]
    assert any(not t.all() for t in active) and any(t.any() for t in active)
    assert all(int(t) == 7 for n, t in final.items() if "sara_step" in n)
    for step in (2, 4):
        again = build("again")
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        now = again.model.state_dict()
        assert all(torch.equal(now[n], t) for n, t in final.items()), [
            n for n, t in final.items() if not torch.equal(now[n], t)
        ]


def test_a_run_that_ends_too_early_says_so(tmp_path, caplog):
    model = adapted(progressive_at=9)
    steps(model, 2)
    model.save_pretrained(tmp_path)
    assert "saved after 2 steps, before the re-threshold at 9" in caplog.text


def test_a_layer_that_is_not_called_keeps_step():
    """An expert without tokens at the very step of the re-threshold is thinned out with the others."""
    model = adapted(progressive_at=1, nuclear_weight=0.01, nuclear_min_dim=4)
    optimizer, x = torch.optim.AdamW(trained(model), lr=0.05), data()[0]
    for called in (model, model.base_model.model.a, model):
        optimizer.zero_grad()
        called(x).square().mean().backward()
        optimizer.step()
    layers = [m for m in model.modules() if hasattr(m, "sara_step")]
    assert [int(m.sara_step["default"]) for m in layers] == [3, 3, 3]
    b = model.base_model.model.b
    assert 0 < int(b.sara_active["default"].sum()) < b.sara_active["default"].numel()


def test_a_copy_is_driven_too():
    model = copy.deepcopy(adapted(progressive_at=2))
    steps(model, 5)
    want, _ = reference(threshold_of(model), 5, progressive=2)
    assert torch.allclose(flat(model.merge_and_unload()), want, rtol=0, atol=1e-13)


def test_hooks_go_with_the_last_adapter():
    model = adapted(progressive_at=2)
    assert steps_of._handles
    del model
    gc.collect()
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], lr=0.1).step()
    if not steps_of._watched:  # another test's model may live on
        left = torch_optimizer._global_optimizer_pre_hooks.values()
        assert not steps_of._handles and not [hook for hook in left if hook.__module__ == steps_of.__name__]


# --- the weights ------------------------------------------------------------------------------------------------------


def test_a_reference_pass_between_forward_and_backward():
    """DPO: policy forward, reference forward with the adapter disabled, backward."""
    (x, y), model = data(), adapted(init_weights=False)
    F.mse_loss(model(x), y).backward()
    want = [p.grad.clone() for p in trained(model)]
    model.zero_grad()
    loss = F.mse_loss(model(x), y)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x), Net()(x))
    loss.backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(trained(model), want, strict=True))
    loss = F.mse_loss(model(x), y)
    with model.disable_adapter(), pytest.raises(RuntimeError, match="were switched between forward and backward"):
        loss.backward()
    loss = F.mse_loss(model(x), y)
    torch.optim.SGD(trained(model), lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_base_comes_back_to_the_bit():
    """In a state dict, on unmerge, when unloaded; a second adapter is drawn from the base, not from the first."""
    want, model = flat(Net()), adapted(init_weights=False)
    x = data()[0]
    on = model(x)
    assert not torch.equal(flat_of(model), want)  # the values stand in the weights
    state = model.state_dict()
    assert torch.equal(torch.cat([t.flatten() for n, t in state.items() if ".base_layer." in n]), want)
    assert torch.equal(model(x), on)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(x), on)
    model.add_adapter("second", SaraConfig(density=0.3, target_modules=["a", "norm", "b"]))
    first, second = (model.base_model.model.a.sara_index[n] for n in ("default", "second"))
    assert torch.equal(first, second) and torch.equal(model(x), on)
    assert torch.equal(flat(model.unload()), want)


def flat_of(model):
    net = model.base_model.model
    return torch.cat([t.flatten() for m in (net.a, net.norm, net.b) for t in (m.weight, m.bias)])


def test_forward_is_the_base_layers_own():
    """No second product, no copy: one addmm per layer, and what autograd saves is the base's own storage."""
    model = adapted(init_weights=False)
    layer, saved = model.base_model.model.a, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(data()[0].requires_grad_())
    large = {t.untyped_storage().data_ptr() for t in saved if t.numel() == layer.weight.numel()}
    assert large == {layer.weight.untyped_storage().data_ptr()}
    with torch.profiler.profile() as profile:
        layer(data()[0])
    called = {e.key: e.count for e in profile.key_averages()}
    assert called["aten::addmm"] == 1 and "aten::mm" not in called


def test_several_adapters_and_scales():
    model = adapted(init_weights=False)
    torch.manual_seed(3)
    model.add_adapter("other", SaraConfig(density=0.6, target_modules=["a", "b"], init_weights=False))
    layer = model.base_model.model.a
    base = Net().a.weight
    deltas = {n: layer.get_delta_weight(n).detach() for n in ("default", "other")}
    model.base_model.set_adapter(["default", "other"])
    layer.set_scale("other", 0.5)
    layer(data()[0]).sum().backward()
    want = base + deltas["default"] + 0.5 * deltas["other"]
    assert torch.allclose(layer.weight, want, atol=1e-12)
    dense = torch.ones(8, 12, dtype=torch.float64).T @ data()[0]
    for name, scale in (("default", 1.0), ("other", 0.5)):
        index = layer.indices(name)[0]
        grad = layer.sara_values[name].grad[: len(index)]
        assert torch.allclose(grad, scale * dense.flatten()[index], atol=1e-12)
    model.delete_adapter("other")
    assert torch.allclose(model.base_model.model.a.weight, base + deltas["default"], atol=1e-12)


def test_a_tied_weight_is_not_written_to():
    """The output layer shares its weight with the embedding, which stays as it is: dW is added beside."""
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
        "intermediate_size": 24,
    }
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shape)).eval()
    tokens = torch.arange(6)[None]
    before, embedded = net(tokens).logits, net.model.embed_tokens(tokens)
    model = get_peft_model(net, SaraConfig(density=0.5, target_modules=["lm_head"], init_weights=False))
    out = model(tokens).logits
    assert torch.equal(net.model.embed_tokens(tokens), embedded) and not torch.allclose(out, before, atol=1e-3)
    out.sum().backward()
    assert model.base_model.model.lm_head.sara_values["default"].grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes(kind):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    made = (
        bnb.nn.Linear4bit(64, 64, quant_type="nf4")
        if kind == "nf4"
        else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    )
    made.load_state_dict(net[0].state_dict())
    net[0] = made.to("cpu")
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    net.eval()
    x = torch.randn(4, 64)
    with torch.no_grad():
        before = net(x).float()
    model = get_peft_model(net, SaraConfig(density=0.3, target_modules=["0"]))
    assert torch.equal(model(x).float(), before)
    model.train()
    model(x).float().square().sum().backward()
    (values,) = trained(model)
    assert values.grad.abs().sum() > 0
    with torch.no_grad():
        values += 0.05
    on = model.eval()(x).float()
    model.merge_adapter()
    assert (model(x).float() - on).abs().mean() < 0.2 * (on - before).abs().mean()


def test_easyquant():
    """A quantised base of ours: the entries of the dequantised weight, beside the packed one."""
    from hfgen.quantizers import EasyQuantConfig

    model = LlamaForCausalLM.from_pretrained(sandbox.path(), quantization_config=EasyQuantConfig(bits=4)).eval()
    tokens = torch.arange(5, 11)[None]
    before = model(tokens).logits
    model = get_peft_model(model, SaraConfig(density=0.2, target_modules=["q_proj"]))
    assert torch.equal(model(tokens).logits, before)
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(model))


def test_compiled_forward_is_one_graph():
    model = adapted(init_weights=False, progressive_at=3)
    x = data()[0]
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-12)
    model(x).sum().backward()
    want = [p.grad.clone() for p in trained(model)]
    model.zero_grad()
    compiled(x).sum().backward()
    assert all(torch.allclose(p.grad, w, atol=1e-12) for p, w in zip(trained(model), want, strict=True))


def test_unet_built_from_a_config(tmp_path):
    """diffusers, every tensor: linear, convolution, norm and bias."""
    diffusers = pytest.importorskip("diffusers")

    def unet():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8, attention_head_dim=4,
        ).eval()  # fmt: skip

    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([1, 5]), torch.randn(2, 4, 8))
    base = unet()
    every, before = sum(p.numel() for p in base.parameters()), base(*inputs).sample
    model = get_peft_model(base, SaraConfig(density=0.2, target_modules="all-tensors", progressive_at=1))
    nnz = sum(p.numel() for p in trained(model))
    assert 0.2 * every <= nnz < 0.22 * every  # a fresh net's zero biases are ties
    assert torch.equal(model(*inputs).sample, before)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(*inputs).sample.square().mean().backward()
        optimizer.step()
    conv = model.base_model.model.conv_in
    assert conv.weight.ndim == 4 and not torch.equal(conv.weight, unet().conv_in.weight)
    on = model(*inputs).sample
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(unet(), tmp_path)(*inputs).sample, on)
    with model.disable_adapter():
        assert torch.equal(model(*inputs).sample, before)
    assert torch.equal(model.merge_and_unload()(*inputs).sample, on)
    pixels = unet()
    pixels.add_adapter(SaraConfig(density=0.2, target_modules=["to_q", "conv1"], init_weights=False))
    on = pixels(*inputs).sample
    pixels.disable_adapters()
    assert torch.equal(pixels(*inputs).sample, before) and not torch.equal(on, before)


# --- effects ----------------------------------------------------------------------------------------------------------


def zeroed(net, share, targets):
    """The net with its smallest entries set to zero, by SaRA's own mask."""
    model = get_peft_model(net, SaraConfig(density=share, target_modules=targets))
    with torch.no_grad():
        for p in trained(model):
            p.zero_()
    return model.merge_and_unload()


def test_the_smallest_fifth_of_the_sandbox_model_does_nothing():
    """The sheet's effect: without the smallest 20 % accuracy stays within a point; without 70 % the model is broken."""
    tokenizer, scores = sandbox.load_tokenizer(), []
    for share in (1e-9, 0.2, 0.7):
        model = zeroed(sandbox.load_model(), share, "all-linear")
        scores.append(sandbox.accuracy(model, tokenizer, sandbox.tasks.R))
    assert scores[0] > 0.99 and abs(scores[1] - scores[0]) < 0.01 and scores[2] < 0.5, scores


def test_the_smallest_fifth_of_a_digits_classifier_does_nothing():
    """Five seeds: the mean change is below a point; training only that fifth learns turned digits (sheet 4.6)."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    turned = torch.rot90(x.view(-1, 8, 8), 1, (1, 2)).flatten(1)
    train, changes, learnt = torch.arange(len(y)) % 5 != 0, [], []

    def fit(model, x, rate, seed):
        optimizer, generator = torch.optim.AdamW(trained(model), lr=rate), torch.Generator().manual_seed(seed)
        for _ in range(400):
            rows = torch.randint(0, int(train.sum()), (128,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x[train][rows]), y[train][rows]).backward()
            optimizer.step()

    def accuracy(model, x):
        with torch.no_grad():
            return float((model(x[~train]).argmax(-1) == y[~train]).float().mean())

    for seed in range(5):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        fit(net, x, 2e-3, seed)
        assert accuracy(net, x) > 0.94 and accuracy(net, turned) < 0.35
        changes.append(accuracy(zeroed(copy.deepcopy(net), 0.2, ["0", "2", "4"]), x) - accuracy(net, x))
        model = get_peft_model(net, SaraConfig(density=0.2, target_modules=["0", "2", "4"]))
        fit(model, turned, 1e-2, 100 + seed)
        learnt.append(accuracy(model, turned))
    assert abs(sum(changes) / 5) < 0.01, changes
    assert sum(learnt) / 5 >= 0.88, learnt


# --- another base, files ----------------------------------------------------------------------------------------------


def test_a_mask_of_another_base_or_dtype_is_refused(tmp_path):
    adapted(Net(dtype=torch.float32), init_weights=False).save_pretrained(tmp_path)
    for base in (Net(dtype=torch.bfloat16), Net(seed=1, dtype=torch.float32)):
        with pytest.raises(
            ValueError, match=r"does not fit a: .* on a float32 base, .*; load the base it was trained on"
        ) as e:
            PeftModel.from_pretrained(base, tmp_path)
        assert traceback.extract_tb(e.tb)[-1].filename.endswith("sparse.py")
    block = json.loads((tmp_path / "adapter_config.json").read_text())["hfgen"]
    assert block["base_dtype"] == "float32" and block["threshold"] > 0
    from safetensors.torch import load_file

    file = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted({n.rpartition(".")[2] for n in file}) == ["sara_mask_hash", "sara_values"]


def test_one_flipped_entry_of_the_mask_is_noticed(tmp_path):
    """Same count, other entries: only the hash can tell."""
    net = Net()
    with torch.no_grad():
        net.a.weight[0, 0], net.a.weight[0, 1] = 1e-9, 5.0
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.a.weight[0, 0], other.a.weight[0, 1] = 5.0, 1e-9
    adapted(net).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the mask has .* and another hash"):
        PeftModel.from_pretrained(other, tmp_path)


# --- without an adapter -----------------------------------------------------------------------------------------------


def test_the_optimizer_alone_does_what_the_adapter_does():
    net, model = Net(), adapted(density=0.4)
    optimizer = SaraAdamW(net, density=0.4, **ADAM)
    x, y = data()
    for _ in range(3):
        optimizer.zero_grad()
        for rows in torch.arange(8).chunk(2):
            (F.mse_loss(net(x[rows]), y[rows]) / 2).backward()
        assert all(p.grad is None for p in net.parameters())
        optimizer.step()
    steps(model, 3, parts=2)
    assert torch.equal(flat(net), flat(model.merge_and_unload()))
    nnz = round(0.4 * flat(net).numel())
    assert sum(t.numel() for s in optimizer.state.values() for n, t in s.items() if n != "step") == 2 * nnz
    assert int((flat(net) != flat(Net())).sum()) == nnz
    optimizer.remove()
    net(x).sum().backward()
    assert net.a.weight.grad is not None


def test_the_optimizer_alone_resumes_with_its_masters():
    def run(net, optimizer, count):
        for step in range(count):
            optimizer.zero_grad()
            net(data(torch.bfloat16)[0] * (1 + step)).float().square().mean().backward()
            optimizer.step()

    def build():
        net = Net(dtype=torch.bfloat16)
        return net, SaraAdamW(net, threshold=0.1, lr=1e-4)

    net, optimizer = build()
    run(net, optimizer, 3)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(net, optimizer, 3)
    again, resumed = build()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    run(again, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.values, resumed.values, strict=True))
    assert torch.equal(flat(net), flat(again))
    with pytest.raises(ValueError, match="entries and this optimizer chose .*; build it on the pretrained model"):
        SaraAdamW(Net(), density=0.5).load_state_dict(state)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["FSDP", "DEEPSPEED"])
@pytest.mark.parametrize("how", ["launcher", "accelerate"])
def test_sharded_weights_are_refused(host, how, monkeypatch):
    if how == "launcher":
        monkeypatch.setenv(f"ACCELERATE_USE_{host}", "true")
        with pytest.raises(ValueError, match=f"which {host} keeps in pieces; train with DDP"):
            adapted()
        return
    model = adapted()
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", SimpleNamespace(value=host))
    model.eval()(data()[0])  # inference is the host's matter
    with pytest.raises(ValueError, match=f"which {host} keeps in pieces"):
        model.train()(data()[0])


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
@pytest.mark.filterwarnings("ignore")
def test_torchs_own_fsdp_is_refused(kind):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = adapted()
        if kind == "fsdp1":
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        else:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(
            ValueError, match="SaraConfig writes single entries into whole weights, which FSDP keeps in pieces"
        ):
            model.train()(data()[0])
        adapted().train()(data()[0])  # a model beside it is not meant
    finally:
        distributed.destroy_process_group()


def test_an_off_loaded_weight_is_refused():
    model = adapted()
    model.base_model.model.a.base_layer.to("meta")
    with pytest.raises(ValueError, match="the weight of a is off-loaded"):
        model.train()(data()[0])


def test_an_optimizer_that_torch_does_not_know_is_refused():
    model = adapted(progressive_at=3)
    x = data()[0]
    model(x).sum().backward()
    for p in trained(model):
        p.data -= 0.1 * p.grad
    with pytest.raises(RuntimeError, match=r"changed without a step of a torch\.optim\.Optimizer"):
        model(x)


def test_bad_input():
    for options, error, message in (
        ({"density": 0}, ValueError, r"SaraConfig\.density is 0; give a finite number above 0 and up to 1"),
        ({"density": 1.5}, ValueError, "density is 1.5"),
        ({"threshold": -1.0}, ValueError, "threshold is -1.0"),
        ({"threshold": math.nan}, ValueError, "threshold is nan"),
        ({"threshold": True}, TypeError, "threshold is True"),
        ({"threshold": 0.1, "density": 0.1}, ValueError, "threshold is 0.1 and density is 0.1; give one of them"),
        ({"nuclear_weight": -1e-3}, ValueError, "nuclear_weight is -0.001"),
        ({"nuclear_weight": False}, TypeError, "nuclear_weight is False"),
        ({"nuclear_weight": 1e-3}, ValueError, "no target is a matrix with both sides above nuclear_min_dim=64"),
        ({"nuclear_min_dim": -1}, ValueError, "nuclear_min_dim is -1"),
        ({"progressive_at": 0}, ValueError, "progressive_at is 0; give an integer of at least 1"),
        ({"progressive_at": 0.5}, TypeError, "progressive_at is 0.5"),
        (
            {"reset_state_on_progress": False},
            ValueError,
            "reset_state_on_progress is False, which needs progressive_at",
        ),
        ({"bias": "all"}, ValueError, "biases of targets take part by their size"),
        (
            {"threshold": 1e-12, "density": None, "target_modules": ["a"]},
            ValueError,
            "no targeted entry is below it; raise it or give density",
        ),
        ({"denstiy": 0.1}, TypeError, "unexpected keyword argument 'denstiy'; did you mean 'density'"),
    ):
        with pytest.raises(error, match=message):
            adapted(**options)
    with torch.device("meta"):
        net = Net()
    with pytest.raises(ValueError, match="is on the meta device"):
        adapted(net)
    net = Net()
    net.b.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the weight of b holds NaN or Inf"):
        adapted(net)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        SaraAdamW(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match=r"SaraAdamW\.threshold is 1e-30 and no targeted entry is below it"):
        SaraAdamW([nn.Parameter(torch.ones(3))], threshold=1e-30)


# --- two processes ----------------------------------------------------------------------------------------------------

_WORKER = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from tests.methods.test_sara import *
dist.init_process_group("gloo")
rank, (x, y) = dist.get_rank(), data()
model = adapted(progressive_at=2, nuclear_weight=0.01, nuclear_min_dim=4)
parallel = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(trained(model), **ADAM)
for _ in range(5):
    optimizer.zero_grad()
    F.mse_loss(parallel(x[rank::2]), y[rank::2]).backward()
    optimizer.step()
mine = {n: t for n, t in model.state_dict().items() if "sara_" in n}
torch.save(mine, f"{sys.argv[2]}/{rank}.pt")
"""


@pytest.mark.slow
def test_two_ranks_hold_the_same_values_and_masks(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    (tmp_path / "worker.py").write_text(_WORKER)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "worker.py"),
    ]
    done = subprocess.run(
        [*launch, os.getcwd(), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(one[n], two[n]) for n in one) and not all(
        t.all() for n, t in one.items() if "sara_active" in n
    )
    alone = adapted(progressive_at=2, nuclear_weight=0.01, nuclear_min_dim=4)
    steps(alone, 5)
    state = alone.state_dict()
    assert all(torch.allclose(one[n].double(), state[n].double(), atol=1e-12) for n in one)
