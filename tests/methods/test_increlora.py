"""IncreLoRA: scores, averages and allocation step by step against dense float64, the restarts, growth and resume."""

import copy
import gc
import logging
import math
import os
import re
import subprocess
import sys
import traceback
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.adapters import IncreLoraConfig
from hfgen.cli import export
from hfgen.kit import growing, lowrank, steps
from hfgen.testing.adapters import CHECKS, AdapterCase

TARGETS = ["a", "b", "c"]
FIXED = {"init_warmup": 2, "incre_interval": 2, "top_h": 1}


class Net(nn.Module):
    def __init__(self, seed=0, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(9, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.to(dtype)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def adapted(net=None, **options):
    return get_peft_model(
        Net() if net is None else net, IncreLoraConfig(**{"target_modules": TARGETS, **FIXED, **options})
    )


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def layers(model):
    return [m for m in model.modules() if isinstance(m, growing.GrowingLayer)]


def data(dtype=torch.float64, rows=8):
    generator = torch.Generator().manual_seed(5)
    x, y = (
        torch.randn(rows, 9, generator=generator, dtype=dtype),
        torch.randn(rows, 5, generator=generator, dtype=dtype),
    )
    return x, y


def run(model, count, optimizer=None, parts=1, scheduler=None, seen=None):
    optimizer = optimizer or torch.optim.AdamW(trained(model), lr=0.05)
    x, y = data()
    for _ in range(count):
        optimizer.zero_grad()
        for rows in torch.arange(8).chunk(parts):
            (F.mse_loss(model(x[rows]), y[rows]) / parts).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        if seen is not None:
            seen.append((model.base_model.ranks(), [averages(layer) for layer in layers(model)]))
    return optimizer


def averages(layer):
    return layer.increlora_state["default"][1:].view(torch.float64).tolist()


# --- conformance with growth's options --------------------------------------------------------------------------------

OPTIONS = [
    {"init_r": 2, "target_r": 4, "orth_reg": 0.3, "scale": "constant", "score_window": None, **FIXED},
    {"advance_learn": False, "target_r": 8, "lora_dropout": 0.0, **FIXED, "init_warmup": 0},
]


@pytest.mark.parametrize(
    "check", ["learns", "reload", "merge", "transformers", "two_adapters", "half_precision", "copies"]
)
@pytest.mark.parametrize("options", OPTIONS)
def test_conformance_with_options(check, options):
    """The catalogue's own run takes the defaults; here the ranks grow in `learns`."""
    CHECKS[check](AdapterCase(IncreLoraConfig, options))


# --- the mathematics, dense and in float64 ----------------------------------------------------------------------------


class Reference:
    """IncreLoRA on `Net` with dense dW and plain loops: AdamW per component, with its own schedule and state."""

    def __init__(self, model, config, rate, steps_total):
        self.config, self.rate, self.total, self.step = config, rate, steps_total, 0
        self.net, self.names = Net().requires_grad_(False), TARGETS
        self.parts = []  # per module a list of components: dict of a (n), e, b (m), with state
        for layer in layers(model):
            a, e, b = (p.detach().clone() for p in layer.trained_tensors("default"))
            r, size = layer.sizes("default")
            self.parts.append(
                [self.component(a[i], e[i], b[:, i], 0, 0 if i < r else None, False) for i in range(size)]
            )
        self.active = [layer.sizes("default")[0] for layer in layers(model)]
        self.mean, self.spread = [0.0] * 3, [0.0] * 3

    @staticmethod
    def component(a, e, b, born, promoted, restarts):
        state = {k: [torch.zeros_like(v), torch.zeros_like(v), 0] for k, v in (("a", a), ("e", e), ("b", b))}
        return {"a": a.clone(), "e": e.clone(), "b": b.clone(), "state": state, "born": {"a": born, "b": born, "e": promoted},
                "restarts": {"a": restarts, "b": restarts, "e": restarts}}  # fmt: skip

    def schedule(self, born, restarts):
        """The host's linear schedule from `born` on."""
        warmup = self.config.warmup_steps
        t, total = (self.step - born, self.total - born) if restarts else (self.step, self.total)
        return self.rate * (t / warmup if t < warmup else max(0, total - t) / (total - warmup))

    def products(self):
        out = []
        for parts, r in zip(self.parts, self.active, strict=True):
            s = self.config.lora_alpha / (r + 1e-5) if self.config.scale == "alpha_over_rank" else self.config.lora_alpha / self.config.target_r  # fmt: skip
            out.append(s * sum(p["e"] * torch.outer(p["b"], p["a"]) for p in parts))
        return out

    def train_step(self, x, y):
        leaves = [[{k: p[k].requires_grad_() for k in "aeb"} for p in parts] for parts in self.parts]
        products = self.products()
        for d in products:
            d.retain_grad()
        weights = {f"{n}.weight": getattr(self.net, n).weight + d for n, d in zip(self.names, products, strict=True)}
        F.mse_loss(torch.func.functional_call(self.net, weights, (x,)), y).backward()
        scores = [float((d.detach() * d.grad).abs().sum() / d.numel() ** 0.5) for d in products]
        orth = 0
        for parts in self.parts:
            for m in (torch.stack([p["a"] for p in parts]), torch.stack([p["b"] for p in parts])):
                orth = orth + (m @ m.T - torch.eye(len(m), dtype=m.dtype)).norm()
        if self.config.orth_reg:
            (self.config.orth_reg * orth / (2 * len(self.parts))).backward()
        c = self.config
        spent = sum(self.active) == c.budget(3)
        for i, s in enumerate(scores if not spent else []):
            self.mean[i] = c.beta1 * self.mean[i] + (1 - c.beta1) * s
            self.spread[i] = c.beta2 * self.spread[i] + (1 - c.beta2) * abs(s - self.mean[i])
        with torch.no_grad():
            for parts in leaves and self.parts:
                for p in parts:
                    for k in "aeb":
                        if p["born"][k] is not None:
                            self.adamw(p, k)
                        p[k] = p[k].detach()
            if not spent and self.step > c.init_warmup and self.step % c.incre_interval == 0:
                self.allocate()
        self.step += 1
        return scores

    def adamw(self, p, k):
        lr, grad = self.schedule(p["born"][k], p["restarts"][k]), p[k].grad
        state = p["state"][k]
        state[0] = 0.9 * state[0] + 0.1 * grad
        state[1] = 0.999 * state[1] + 0.001 * grad * grad
        state[2] += 1
        value = p[k].detach() * (1 - lr * 0.01)
        root = (state[1] / (1 - 0.999 ** state[2])).sqrt() + 1e-8
        p[k] = value - lr / (1 - 0.9 ** state[2]) * state[0] / root

    def allocate(self):
        c = self.config
        order = sorted(range(3), key=lambda i: (-self.mean[i] * self.spread[i], i))[: c.top_h]
        for i in order:
            left = c.budget(3) - sum(self.active)
            gain = min(c.increment, left)
            parts, r = self.parts[i], self.active[i]
            for _ in range(gain):
                if not c.advance_learn:
                    parts.append(None)
            self.active[i] = r + gain
            if gain:
                a, b = self.drawn(i, gain if not c.advance_learn else r + gain + c.increment - len(parts))
                if c.advance_learn:
                    for p in parts[r : r + gain]:
                        p["born"]["e"], p["restarts"]["e"] = self.step, True
                        p["state"]["e"] = [torch.zeros_like(p["e"]), torch.zeros_like(p["e"]), 0]
                    for j in range(len(a)):
                        parts.append(
                            self.component(a[j], torch.full((1,), 1e-5, dtype=a.dtype), b[:, j], self.step, None, True)
                        )
                        parts[-1]["restarts"]["e"] = True
                else:
                    del parts[r:]
                    for j in range(gain):
                        parts.append(
                            self.component(a[j], torch.zeros(1, dtype=a.dtype), b[:, j], self.step, self.step, True)
                        )
        if sum(self.active) == c.budget(3):
            for i, r in enumerate(self.active):
                del self.parts[i][r:]

    def drawn(self, i, count):
        return self.model_layers[i]._draw(self.config, self.step, count, torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("options", [
    {}, {"scale": "constant", "orth_reg": 0.0}, {"advance_learn": False}, {"incre_rank": 2, "target_total_rank": 8, "top_h": 2},
    {"target_r": 4, "warmup_steps": 4, "orth_reg": 0.5},
])  # fmt: skip
def test_trajectory_scores_and_allocation_against_brute_force(options):
    """Every step: the score of each module, I and U, the ranks and all factors, with authors' schedule per component."""
    total = 24
    model = adapted(**{"score_window": None, "warmup_steps": 3, "lora_alpha": 4, **options})
    config = model.peft_config["default"]
    reference = Reference(model, config, 0.05, total)
    reference.model_layers = layers(model)
    optimizer = torch.optim.AdamW(trained(model), lr=0.05)
    w = config.warmup_steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: t / w if t < w else max(0, total - t) / (total - w)
    )
    x, y = data()
    grown = set()
    for step in range(total):
        seen = []
        run(model, 1, optimizer, scheduler=scheduler, seen=seen)
        reference.train_step(x, y)
        assert list(seen[0][0].values()) == reference.active, step
        for (mean, spread), i in zip(seen[0][1], range(3), strict=True):
            assert mean == pytest.approx(reference.mean[i], rel=1e-9, abs=1e-12)
            assert spread == pytest.approx(reference.spread[i], rel=1e-9, abs=1e-12)
        for layer, parts in zip(layers(model), reference.parts, strict=True):
            a, e, b = (p.detach() for p in layer.trained_tensors("default"))
            for k, got in (("a", a), ("e", e), ("b", b.T)):
                want = torch.stack([p[k] for p in parts])
                assert got.shape == want.shape and torch.allclose(got, want, rtol=0, atol=1e-9), (step, k)
        grown.add(tuple(reference.active))
    assert len(grown) > 2 and sum(reference.active) == config.budget(3)
    assert model.base_model.counts()[1] == 0  # the reserve is dropped


def test_score_in_blocks_is_the_dense_one(monkeypatch):
    monkeypatch.setattr(lowrank, "BLOCK", 30)
    torch.manual_seed(0)
    x, g, left, right = (torch.randn(*s, dtype=torch.float64) for s in ((2, 6, 9), (2, 6, 13), (13, 3), (3, 9)))
    dense = ((left @ right) * (g.reshape(-1, 13).T @ x.reshape(-1, 9))).abs().sum() / (9 * 13) ** 0.5
    assert torch.allclose(lowrank.importance(x, g, left, right), dense, rtol=1e-12)


@given(k=st.integers(1, 5), n=st.integers(1, 7), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_orthogonality_gradient_is_autograds(k, n, seed):
    m = torch.randn(k, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
    (m @ m.T - torch.eye(k, dtype=m.dtype)).norm().backward()
    assert torch.allclose(lowrank.orthogonality_gradient(m.detach()), m.grad, atol=1e-9)
    assert torch.equal(
        lowrank.orthogonality_gradient(torch.eye(k)), torch.zeros(k, k)
    )  # where the norm has no gradient


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_add_the_orthogonality_once(parts):
    whole, cut = (adapted(orth_reg=5.0, target_r=1) for _ in range(2))
    run(whole, 1, torch.optim.SGD(trained(whole), lr=0.1))
    run(cut, 1, torch.optim.SGD(trained(cut), lr=0.1), parts=parts)
    assert all(torch.allclose(p, q, atol=1e-14) for p, q in zip(trained(whole), trained(cut), strict=True))
    plain = adapted(orth_reg=0.0, target_r=1)
    run(plain, 1, torch.optim.SGD(trained(plain), lr=0.1))
    assert not torch.allclose(trained(plain)[0], trained(whole)[0], atol=1e-3)


def test_scores_of_micro_batches_are_summed():
    model = adapted(score_window=None, orth_reg=0.0)
    x, y = data()
    want = torch.zeros(3, dtype=torch.float64)
    for rows in torch.arange(8).chunk(2):
        (F.mse_loss(model(x[rows]), y[rows]) / 2).backward()
    got = torch.stack([layer._scores["default"] for layer in layers(model)])
    for rows in torch.arange(8).chunk(2):
        for layer in layers(model):
            layer._scores.clear()
        (F.mse_loss(model(x[rows]), y[rows]) / 2).backward()
        want += torch.stack([layer._scores["default"] for layer in layers(model)])
    assert torch.allclose(got, want, rtol=1e-12) and bool((got > 0).all())


def test_the_window_scores_the_last_steps_before_an_allocation():
    plan = growing.Plan(5, 4, 1)
    assert [t for t in range(20) if plan.grows(t)] == [8, 12, 16]
    assert [t for t in range(17) if plan.near(t, 2)] == [7, 8, 11, 12, 15, 16]
    assert all(plan.near(t, None) for t in range(17)) and [t for t in range(9) if plan.near(t, 4)] == [5, 6, 7, 8]
    assert [plan.length(g) for g in (1, 2, 3)] == [9, 13, 17] and growing.Plan(0, 1, 3).length(7) == 4
    model, scored = adapted(init_warmup=4, incre_interval=4, score_window=2, target_total_rank=5), []
    optimizer = torch.optim.AdamW(trained(model), lr=0.05)
    for _ in range(16):
        with pytest.MonkeyPatch.context() as patch:
            seen = []
            patch.setattr(growing, "scored", lambda delta, *_, seen=seen: seen.append(delta) or delta)
            run(model, 1, optimizer)
        scored.append(len(seen))
    assert set(scored) == {0, 3}
    steps_scored = [i for i, count in enumerate(scored) if count]
    assert steps_scored == [0, 7, 8, 11, 12]  # the first before anything is known; none when the budget is spent


def test_default_schedule_spends_the_budget_in_the_first_half():
    for total in (30, 200, 5000):
        for modules in (1, 3, 72):
            for options in ({}, {"target_r": 8}, {"target_total_rank": modules + 5}):
                plan = IncreLoraConfig(**options).plan(modules, total)
                config = IncreLoraConfig(**options)
                gains = -(-(config.budget(modules) - modules) // config.increment)
                assert plan.length(gains) <= total // 2 + 1, (total, modules, options)
    assert IncreLoraConfig().plan(72, 8) == (1, 1, 24) and IncreLoraConfig().plan(72, 3) == (1, 1, 72)


# --- growth -----------------------------------------------------------------------------------------------------------


def test_growth_keeps_parameters_groups_and_function():
    """The same Parameter objects; the optimizer's state padded with zeros; eval's function moved by the scale only."""
    model = adapted(scale="constant", score_window=None)
    objects = [id(p) for p in trained(model)]
    x, y = data()
    optimizer = torch.optim.AdamW(trained(model), lr=0.05)
    for step in range(7):
        optimizer.zero_grad()
        loss = F.mse_loss(model.train()(x), y)  # held over the step, with its graph
        loss.backward()
        optimizer.step()
        sizes = [layer.sizes("default") for layer in layers(model)]
        if step == 3:
            ranks = sum(r for r, _ in sizes)
    assert ranks == 3 and sum(r for r, _ in sizes) == 5
    assert [id(p) for p in trained(model)] == objects == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert len(optimizer.param_groups) == 1
    for layer in layers(model):
        r, size = layer.sizes("default")
        for p in layer.trained_tensors("default"):
            assert optimizer.state[p]["exp_avg"].shape == optimizer.state[p]["exp_avg_sq"].shape == p.shape
        reserve = layer.increlora_E["default"][r:]
        assert torch.equal(reserve, torch.full_like(reserve, 1e-5)) and size == r + 1


def test_the_reserve_is_not_in_eval_merge_or_files(tmp_path):
    model, x = adapted(score_window=None), data()[0]
    run(model, 4)
    train, on = model(x), model.eval()(x)
    assert 0 < float((train - on).abs().max()) < 1e-4
    assert model.base_model.counts() == (sum(r * (m.in_features + m.out_features + 1) for m in layers(model) for r in [m.sizes("default")[0]]), 9 + 12 + 24 + 17)  # fmt: skip
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert again.base_model.ranks() == model.base_model.ranks() and torch.equal(again.eval()(x), on)
    model.base_model.finalize()
    assert torch.equal(model(x), on) and model.base_model.counts()[1] == 0
    assert torch.allclose(model.merge_and_unload()(x), on, atol=1e-12)


def test_the_last_gains_are_clipped():
    model = adapted(target_total_rank=8, incre_rank=3, top_h=3, score_window=None)
    run(model, 12)
    assert sorted(model.base_model.ranks().values()) in ([1, 3, 4],) and sum(model.base_model.ranks().values()) == 8
    assert [layer.sizes("default")[0] for layer in layers(model)] == [
        layer.sizes("default")[1] for layer in layers(model)
    ]


def test_ties_go_by_name():
    """Nothing has a gradient, so all scores are zero; NaN and Inf scores are no scores."""
    model = adapted(score_window=None, orth_reg=0.0, target_total_rank=5)
    optimizer = torch.optim.AdamW(trained(model), lr=0.05)
    for step in range(7):
        for p in trained(model):
            p.grad = torch.zeros_like(p)
        layers(model)[2]._scores["default"] = torch.tensor(math.inf if step % 2 else math.nan, dtype=torch.float64)
        optimizer.step()
    assert model.base_model.ranks() == {"a": 3, "b": 1, "c": 1} and averages(layers(model)[2]) == [0.0, 0.0]


def test_sgd_with_momentum_and_lr_zero_groups():
    model = adapted(score_window=None)
    optimizer = torch.optim.SGD(trained(model), lr=0.01, momentum=0.9)
    run(model, 9, optimizer)
    assert sum(model.base_model.ranks().values()) == 6
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in trained(model))
    assert all(torch.isfinite(p).all() for p in trained(model))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused):
    """Its scale is divided out of the scores and reaches the orthogonality term; a step it skips leaves no score behind."""
    ends = []
    for scaled in (False, True):
        factors = []
        model = adapted(Net(dtype=torch.float32), score_window=None, target_total_rank=9)
        optimizer = torch.optim.SGD(trained(model), lr=0.02, fused=fused)
        scaler, (x, y), averaged = (
            torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled),
            data(torch.float32),
            [],
        )
        for skip in (False, False, scaled, False):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            scaler.scale(loss * math.inf if skip else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            factors.append(torch.cat([p.detach().flatten() for p in trained(model)]))
            if not skip:
                averaged.append([averages(layer) for layer in layers(model)])
        ends.append((averaged, factors))
    (plain, one), (scaled, other) = ends
    assert torch.allclose(one[1], other[1], rtol=1e-4, atol=1e-7) and torch.equal(other[1], other[2])
    assert torch.tensor(scaled[1]).allclose(torch.tensor(plain[1]), rtol=1e-4) and torch.tensor(plain[1]).min() > 0
    assert scaled[2] == scaled[1]  # the step after the skipped one is not scored
    assert layers(model)[0].increlora_state["default"][0] == 3


@pytest.mark.slow
def test_planted_ranks():
    """Four 24 x 24 regressions with planted ranks 0, 1, 0, 7 and a budget of 8 (sheet 3.6), five seeds."""

    class Four(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(4))
            for layer in self.m:
                nn.init.zeros_(layer.weight)

        def forward(self, x):
            return torch.stack([layer(x) for layer in self.m])

    for seed in range(5):
        torch.manual_seed(100 + seed)
        wanted = torch.zeros(4, 24, 24)
        for i, rank in enumerate((0, 1, 0, 7)):
            if rank:  # singular values rank, ..., 1
                u, v = (torch.linalg.qr(torch.randn(24, rank))[0] for _ in range(2))
                wanted[i] = u * torch.arange(rank, 0, -1) @ v.T
        torch.manual_seed(seed)
        model = get_peft_model(
            Four(), IncreLoraConfig(target_modules=r"m\.\d", init_warmup=100, incre_interval=100, top_h=1)
        )
        optimizer = torch.optim.AdamW(trained(model), lr=2e-2, weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - t / 800))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(800):
            x = torch.randn(64, 24, generator=generator)
            optimizer.zero_grad()
            ((model(x) - x @ wanted.mT) ** 2).mean().backward()
            optimizer.step()
            scheduler.step()
        assert list(model.base_model.ranks().values()) == [1, 1, 1, 5], seed
        merged = model.eval().merge_and_unload()
        energy = float(sum((layer.weight - w).square().sum() for layer, w in zip(merged.m, wanted, strict=True)))
        uniform = float(sum(torch.linalg.svdvals(w)[2:].square().sum() for w in wanted))  # the best of any (2, 2, 2, 2)
        assert uniform >= 4 * energy, (seed, uniform, energy)


def test_a_second_run_starts_its_own_count(tmp_path):
    """An adapter trained on in a new Trainer: no old births, no second budget, and what is there trains at full rate."""
    first = trainer(tmp_path, {"target_total_rank": 5}, max_steps=6)
    first.train()
    first.save_model(str(tmp_path / "saved"))
    model = PeftModel.from_pretrained(Model(), tmp_path / "saved", is_trainable=True)
    ranks, before = model.base_model.ranks(), [p.detach().clone() for p in trained(model)]
    assert sum(ranks.values()) == 5 and first.state.global_step == 6
    second = Trainer(
        model, TrainingArguments(str(tmp_path), max_steps=2, learning_rate=1e-3, lr_scheduler_type="constant", use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", weight_decay=0.0, max_grad_norm=0.0), train_dataset=first.train_dataset,
    )  # fmt: skip
    second.train()
    assert model.base_model.ranks() == ranks
    assert {int(layer.increlora_state["default"][0]) for layer in layers(model)} == {2}
    moved = [(p - b).abs().amax() for p, b in zip(trained(model), before, strict=True)]
    assert all(1.5e-3 < float(m) < 2.5e-3 for m in moved)  # two steps of Adam, for every component
    rows = (trained(model)[0] - before[0]).abs().amax(1)
    assert bool((rows > 1e-3).all())


# --- hosts ------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.net = Net(dtype=dtype)

    def forward(self, x, labels):
        out = self.net(x)
        return {"loss": F.mse_loss(out, labels), "out": out}


def trainer(folder, config=None, **options):
    x, y = data(torch.float32, rows=16)
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    args = TrainingArguments(**{
        "output_dir": str(folder), "max_steps": 9, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 0.05, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "lr_scheduler_type": "linear", **options,
    })  # fmt: skip
    config = {"target_modules": TARGETS, **(config or {})}
    return Trainer(get_peft_model(Model(), IncreLoraConfig(**config)), args, train_dataset=rows)


RESUMED = {
    "target_total_rank": 6,
    "init_warmup": 1,
    "incre_interval": 2,
    "top_h": 1,
    "warmup_steps": 2,
    "lora_dropout": 0.1,
}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_resume_is_bit_equal_across_allocations(tmp_path, optim):
    """Growth at steps 2, 4, 6 (0-based): cut before the first, between two, and after the last."""

    def build(folder):
        return trainer(tmp_path / folder, RESUMED, save_strategy="steps", save_steps=1, optim=optim)

    whole = build("whole")
    whole.train()
    final = {n: t.clone() for n, t in whole.model.state_dict().items() if "increlora" in n}
    assert sum(whole.model.base_model.ranks().values()) == 6 and whole.model.base_model.counts()[1] == 0
    for step in (2, 4, 8):
        again = build(f"again{step}")
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        now = again.model.state_dict()
        assert final.keys() == {n for n in now if "increlora" in n}
        assert all(torch.equal(now[n], t) for n, t in final.items()), step
        one, other = (torch.load(tmp_path / f / "checkpoint-9" / "optimizer.pt", weights_only=True) for f in ("whole", f"again{step}"))  # fmt: skip
        assert one["param_groups"] == other["param_groups"]
        for key, state in one["state"].items():
            assert all(torch.equal(t, other["state"][key][n]) for n, t in state.items())
        for name in ("scheduler.pt", "rng_state.pth"):
            assert (tmp_path / "whole/checkpoint-9" / name).read_bytes() == (tmp_path / f"again{step}/checkpoint-9" / name).read_bytes()  # fmt: skip


def test_defaults_come_from_the_trainer(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hfgen")
    made = trainer(tmp_path, max_steps=12)
    made.train()
    assert sum(made.model.base_model.ranks().values()) == 6  # target_r=2 of three modules
    grown = [int(re.search(r"after step (\d+)", m)[1]) for m in caplog.messages if "increlora: after step" in m]
    assert grown and max(grown) <= 6
    made.save_model(str(tmp_path / "done"))
    assert "of the budget's" not in caplog.text
    with pytest.raises(ValueError, match=r"max_steps is 2, but IncreLoraConfig needs 3 steps for 3 gains .*; train"):
        trainer(tmp_path, max_steps=2).train()
    with pytest.raises(ValueError, match=r"max_steps is 9, but IncreLoraConfig needs 21 steps .*init_warmup=19"):
        trainer(tmp_path, {"init_warmup": 19, "incre_interval": 1, "top_h": 9}).train()


def test_a_run_that_ends_too_early_says_so(tmp_path, caplog):
    model = adapted()
    run(model, 2)
    model.save_pretrained(tmp_path)
    assert "saved after 2 steps with 3 of the budget's 6 components" in caplog.text


def test_sft_trainer(tmp_path):
    task = sandbox.tasks.R
    rows = Dataset.from_list([{"prompt": p, "completion": task.gold(p)} for p in task.prompts[:16]])
    config = IncreLoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    args = SFTConfig(
        str(tmp_path), max_steps=8, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, bf16=False,
        report_to="none", disable_tqdm=True, save_strategy="no", gradient_checkpointing=True, logging_steps=1,
    )  # fmt: skip
    made = SFTTrainer(
        sandbox.load_model(),
        args=args,
        train_dataset=rows,
        peft_config=config,
        processing_class=sandbox.load_tokenizer(),
    )
    made.train()
    ranks = made.model.base_model.ranks()
    assert sum(ranks.values()) == 2 * len(ranks) and max(ranks.values()) > 1
    made.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(sandbox.load_model(), tmp_path / "saved").eval()
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, made.model.eval()(ids).logits)


def test_export_to_plain_lora(tmp_path):
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 32,
        "intermediate_size": 24,
    }
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        base, IncreLoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **FIXED)
    )
    ids = torch.arange(12).view(2, 6)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    for _ in range(8):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert len(set(model.base_model.ranks().values())) > 1
    model.save_pretrained(tmp_path / "adapter")
    export.run(tmp_path / "adapter", "lora", tmp_path / "lora", str(tmp_path / "base"))
    with torch.no_grad():
        on = model.eval()(ids).logits
        stock = PeftModel.from_pretrained(
            LlamaForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "lora")
        ).eval()
        assert torch.allclose(stock(ids).logits, on, rtol=0, atol=1e-6)
    said = stock.peft_config["default"]
    ranks = {f"model.{n.split('model.', 1)[1]}" if "model." in n else n: r for n, r in model.base_model.ranks().items()}
    assert said.peft_type == "LORA" and said.rank_pattern == said.alpha_pattern
    assert {k: said.rank_pattern.get(k, said.r) for k in ranks} == ranks


def test_a_saved_config_started_afresh_and_other_adapters(tmp_path):
    model = adapted(score_window=None)
    run(model, 8)
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    fresh, x = get_peft_model(Net(), config), data()[0]
    assert torch.equal(fresh(x), Net()(x)) or torch.allclose(fresh(x), Net()(x), atol=1e-3)
    assert fresh.base_model.ranks() == {"a": 1, "b": 1, "c": 1}
    model.add_adapter("other", IncreLoraConfig(target_modules=["a"]))
    model.set_adapter("other")
    assert model.base_model.ranks("other") == {"a": 1}
    model.delete_adapter("other")
    assert not [n for n in model.state_dict() if "other" in n]


def test_a_copy_grows_too():
    model = copy.deepcopy(adapted(score_window=None))
    run(model, 9)
    assert sum(model.base_model.ranks().values()) == 6


def test_hooks_go_with_the_last_adapter():
    model = adapted()
    assert set(layers(model)) <= set(steps._watched)
    ids = {id(layer) for layer in layers(model)}
    del model
    gc.collect()
    assert not ids & {id(layer) for layer in steps._watched}


@pytest.mark.parametrize("kind", ["nf4", "easyquant", "conv1d"])
def test_other_bases(kind):
    from hfgen.quantizers import EasyQuantConfig

    tokens = torch.arange(5, 17).view(2, 6)
    if kind == "nf4":
        bnb = pytest.importorskip("bitsandbytes")
        model = sandbox.load_model()
        for block in model.model.layers:
            old = block.self_attn.q_proj
            made = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
            made.load_state_dict(old.state_dict())
            block.self_attn.q_proj = made.to("cpu")
        targets = ["q_proj"]
    elif kind == "easyquant":
        model, targets = sandbox.load_model(quantization_config=EasyQuantConfig(bits=4)), ["q_proj"]
    else:
        model, targets = AdapterCase(IncreLoraConfig).gpt2(), ["c_attn"]
    model.eval()
    with torch.no_grad():
        before = model(tokens).logits.clone()
    model = get_peft_model(model, IncreLoraConfig(target_modules=targets, target_total_rank=4, **FIXED))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    optimizer = torch.optim.AdamW(trained(model.train()), lr=0.02)
    start = sum(model.base_model.ranks().values())
    for _ in range(9):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert sum(model.base_model.ranks().values()) == 4 >= start
    assert float((model.eval()(tokens).logits - before).abs().max()) > 1e-3


# --- counts and memory ------------------------------------------------------------------------------------------------


def test_counts_on_deberta_shapes():
    """RoBERTa-base's six linears have DeBERTaV3-base's shapes: 72 modules, 165 888 numbers per rank."""
    with torch.device("meta"):
        base = AutoModel.from_config(RobertaConfig(), add_pooling_layer=False)
    targets = ["query", "key", "value", "dense"]
    for options, active, reserve in (
        ({"init_r": 2, "target_r": 2}, 331_776 + 144, 0),
        ({"init_r": 8, "target_r": 8}, 1_327_104 + 8 * 72, 0),
        ({}, 165_888 + 72, 165_888),
        ({"target_r": 8}, 165_888 + 72, 4 * 165_888),
    ):
        model = get_peft_model(copy.deepcopy(base), IncreLoraConfig(target_modules=targets, **options))
        assert len(layers(model)) == 72 and model.base_model.counts() == (active, reserve)
        own = model.peft_config["default"].increment * 72 if reserve else 0  # E of the reserve, which does not move
        assert sum(p.numel() for p in trained(model)) == active + reserve + own


@pytest.mark.parametrize("window", [64, None])
def test_bytes_saved_for_backward(window):
    """x and the R numbers per token, scored or not; beyond that factors only, never m n."""
    torch.manual_seed(0)
    net, t, saved = nn.Sequential(nn.Linear(96, 160)), 50, {}
    model = get_peft_model(net, IncreLoraConfig(target_modules=["0"], score_window=window))

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda s: s):
        model(torch.randn(t, 96))
    size = model.base_model.model[0].sizes("default")[1]
    assert (
        sum(saved.values()) <= t * (96 + size) * 4 + 4 * 4 * size * (96 + 160) + 4 * 96 * 160
    )  # W itself is there anyway
    assert sum(saved.values()) - 4 * 96 * 160 < 4 * 96 * 160 + t * (96 + size) * 4


def test_compiled_forward_is_one_graph():
    model = adapted(init_weights=False).eval()
    x = data()[0]
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-12)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_without_a_trainer_the_schedule_has_to_be_given():
    model = adapted(init_warmup=None)
    with pytest.warns(
        UserWarning, match="no transformers Trainer steps this optimizer; give init_warmup, incre_interval"
    ):
        run(model, 6)
    assert set(model.base_model.ranks().values()) == {1}


def test_an_optimizer_that_torch_does_not_know_is_refused():
    model = adapted()
    x = data()[0]
    model(x).sum().backward()
    for p in trained(model):
        p.data -= 0.1 * p.grad
    with pytest.raises(RuntimeError, match=r"increlora_E of a changed without a step of a torch\.optim\.Optimizer"):
        model(x)


def test_an_optimizer_with_a_factored_state_is_refused():
    model = adapted()
    with pytest.raises(
        ValueError, match=r"Adafactor keeps 'row_var' of shape .* cannot grow with it; use an optimizer such"
    ):
        run(model, 1, torch.optim.Adafactor(trained(model)))


@pytest.mark.parametrize("host", ["FSDP", "DEEPSPEED"])
@pytest.mark.parametrize("how", ["launcher", "accelerate"])
def test_sharded_weights_are_refused(host, how, monkeypatch):
    words = f"IncreLoraConfig changes the shapes of its factors while it trains, which {host} keeps in pieces"
    if how == "launcher":
        monkeypatch.setenv(f"ACCELERATE_USE_{host}", "true")
        with pytest.raises(ValueError, match=words):
            adapted()
        return
    model = adapted()
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", SimpleNamespace(value=host))
    model.eval()(data()[0])
    with pytest.raises(ValueError, match=words):
        model.train()(data()[0])


def test_bad_input():
    for options, error, message in (
        ({"init_r": 0}, ValueError, r"IncreLoraConfig\.init_r is 0; give an integer of at least 1"),
        ({"init_r": 3}, ValueError, "target_r is 2 and init_r is 3; give at least 3"),
        ({"target_r": 2.0}, TypeError, "target_r is 2.0"),
        ({"incre_rank": 0}, ValueError, "incre_rank is 0"),
        ({"beta1": 1.0}, ValueError, "beta1 is 1.0"),
        ({"beta2": -0.1}, ValueError, "beta2 is -0.1"),
        ({"lora_alpha": 0}, ValueError, "lora_alpha is 0"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout is 1.0"),
        ({"orth_reg": math.nan}, ValueError, "orth_reg is nan"),
        ({"orth_reg": False}, TypeError, "orth_reg is False"),
        ({"advance_learn": 1}, TypeError, "advance_learn is 1"),
        ({"scale": "constnat"}, ValueError, "did you mean 'constant'"),
        ({"init_warmup": -1}, ValueError, "init_warmup is -1; give an integer of at least 0"),
        ({"incre_interval": 0}, ValueError, "incre_interval is 0"),
        ({"top_h": 0}, ValueError, "top_h is 0"),
        ({"score_window": 0}, ValueError, "score_window is 0"),
        ({"targetr": 3}, TypeError, "unexpected keyword argument 'targetr'; did you mean 'target_r'"),
    ):
        with pytest.raises(error, match=message) as e:
            adapted(**options)
        assert "/hfgen" in traceback.extract_tb(e.tb)[-1].filename
    with pytest.raises(
        ValueError, match="target_total_rank is 2, but 3 modules start with init_r=1 each; give at least 3"
    ):
        run(adapted(target_total_rank=2), 1)
    net = Net()
    net.b.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the weight of b holds NaN or Inf"):
        adapted(net)


# --- two processes ----------------------------------------------------------------------------------------------------

_WORKER = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from tests.methods.test_increlora import *
size, parts, folder = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
made = trainer(folder, RESUMED | {"lora_dropout": 0.0, "score_window": None}, per_device_train_batch_size=size,
               gradient_accumulation_steps=parts, train_sampling_strategy="sequential", max_grad_norm=0.5, ddp_timeout=60)
made.train()
state = {n: t for n, t in made.model.state_dict().items() if "increlora" in n}
torch.save((state, made.model.base_model.ranks(), made.accelerator.num_processes), f"{folder}/{os.environ.get('RANK', 'one')}.pt")
"""


@pytest.mark.slow
def test_two_processes_end_as_one(tmp_path):
    """2 x 2 rows (and two micro-batches each) are 4 rows of 4 micro-batches: same ranks, factors to rounding."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    for command in ([*launch, os.getcwd(), "1", "2"], [sys.executable, str(script), os.getcwd(), "1", "4"]):
        done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
    (zero, ranks, count), (other, same, _), (one, alone, single) = (
        torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("0", "1", "one")
    )
    assert (count, single) == (2, 1) and ranks == same == alone and sum(ranks.values()) == 6 and max(ranks.values()) > 1
    assert all(torch.equal(zero[n], other[n]) for n in zero)
    for n, t in zero.items():
        assert t.shape == one[n].shape
        if t.is_floating_point():
            assert torch.allclose(t, one[n], atol=1e-5), n
