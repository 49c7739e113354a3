"""SoMA: exact mathematics, counts, the schedule of weight decay, resume, freezing, export and bad input."""

import copy
import gc
import json
import math
import os
import subprocess
import sys
import traceback
import warnings

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hfgen import sandbox
from hfgen.adapters import SomaConfig
from hfgen.cli import export
from hfgen.kit import steps
from hfgen.kit.lowrank import block_of
from hfgen.quantizers import EasyQuantConfig
from hfgen_plugins.adapters.soma import decay as slot
from hfgen_plugins.adapters.soma.soma import minor_components
from tests.hosts.test_quantizers import MODELS, build, logits
from tests.methods.test_adapters import Net, Wrap

CASES = {"decoder": ["q_proj", "down_proj"], "encoder": ["query", "dense"], "gpt2": ["c_attn", "c_proj"],
         "encoder-decoder": ["q", "wi"], "vit": ["q_proj", "fc1"]}  # fmt: skip
COMMON = {
    "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "bf16": False,
    "report_to": "none", "logging_steps": 1, "disable_tqdm": True,
}  # fmt: skip


def adapted(net, **options):
    return get_peft_model(net, SomaConfig(target_modules=["lin"], **options))


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def moved(model, size=0.1):
    """The same model with both trained factors away from their start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(size * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


# --- the mathematics against float64 brute force --------------------------------------------------------------------


@given(m=st.integers(1, 9), n=st.integers(1, 9), seed=st.integers(0, 10**6), share=st.floats(0, 1), s=st.floats(0.1, 9))
@settings(max_examples=80, deadline=None)
def test_the_smallest_components_and_no_others(m, n, seed, share, s):
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = min(m, n)
    r = max(1, round(share * k))
    left, right, null = minor_components(weight, r, s)
    sigma = torch.linalg.svdvals(weight)
    assert left.shape == (m, r) and right.shape == (r, n) and null == 0
    padded = torch.cat([sigma[k - r :], torch.zeros(k - r, dtype=sigma.dtype)])
    assert torch.allclose(torch.linalg.svdvals(s * left @ right), padded, atol=1e-10)  # exactly r, exactly the smallest
    residual = torch.cat([sigma[: k - r], torch.zeros(r, dtype=sigma.dtype)])
    assert torch.allclose(torch.linalg.svdvals(weight - s * left @ right), residual, atol=1e-10)
    # square roots on both sides, columns in falling order, the largest entry of each positive
    for factor in (left.T @ left, right @ right.T):
        assert torch.allclose(factor, (sigma[k - r :] / s).diag(), atol=1e-10)
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("n", [16, 64, 200])
def test_float32_reaches_the_smallest_values_to_its_precision(n):
    torch.manual_seed(n)
    weight = torch.randn(n, n + 8) * 0.02
    left, right, _ = minor_components(weight, 8)
    sigma = torch.linalg.svdvals(weight.double())
    found = torch.linalg.svdvals(left.double() @ right.double())[:8]
    assert (found - sigma[-8:]).abs().max() < 1e-6 * sigma[0]


def test_components_at_rounding_level_start_as_lora(caplog):
    """All-zero rows and a rank-deficient weight: no dead factor, no NaN, and a sentence that says so."""
    torch.manual_seed(0)
    pruned = torch.randn(8, 8)
    pruned[[2, 5]] = 0
    deficient = (torch.randn(8, 5).double() @ torch.randn(5, 8).double()).float()
    for weight, zeros in ((pruned, 2), (deficient, 3), (torch.zeros(8, 8), 4)):
        left, right, null = minor_components(weight, 4)
        assert null == zeros and torch.isfinite(left).all() and torch.isfinite(right).all()
        assert torch.equal(left[:, 4 - zeros :], torch.zeros(8, zeros))
        assert torch.allclose(right[4 - zeros :].norm(dim=1), torch.ones(zeros), atol=1e-5)
        wanted = torch.linalg.svdvals(weight.double())[4:]
        assert torch.allclose(torch.linalg.svdvals((left @ right).double())[:4], wanted, atol=1e-5)
        net = Net(8, 8)
        net.lin.weight.data = weight.clone()
        x = torch.randn(3, 8)
        before = net(x)
        model = adapted(net, r=4)
        assert torch.equal(model(x), before)
        model(x).square().sum().backward() if zeros < 4 else (model(x) - 1).square().sum().backward()
        assert model.base_model.model.lin.soma_B["default"].grad.abs().amax(0).min() > 0  # every column can move
        assert f"soma: {zeros} of the 4 smallest singular values of lin are zero" in caplog.text


@pytest.mark.parametrize(("m", "n"), [(5, 7), (7, 5), (6, 6)])
@pytest.mark.parametrize(("r", "alpha"), [(1, None), (3, None), (5, 2.5)])
def test_forward_and_gradient_against_float64(m, n, r, alpha):
    """y = (W - s B0 A0 + s B A) x; dL/dB = s G^T X A^T, dL/dA = s B^T G^T X."""
    net = Net(m, n, torch.float64)
    weight = net.lin.weight.detach().clone()
    model = adapted(net, r=r, alpha=alpha)
    s = 1.0 if alpha is None else alpha / r
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    residual = weight - (u[:, -r:] * sigma[-r:]) @ vt[-r:]
    layer = moved(model).base_model.model.lin
    a, b = layer.soma_A["default"], layer.soma_B["default"]
    x = torch.randn(11, n, dtype=torch.float64, requires_grad=True)
    y = model(x)
    full = residual + s * b.detach() @ a.detach()
    assert torch.allclose(y, x @ full.T, atol=1e-10)
    assert torch.allclose(layer.get_delta_weight("default"), full - weight, atol=1e-10)
    grad = torch.randn_like(y)
    y.backward(grad)
    outer = grad.T @ x.detach()
    assert torch.allclose(b.grad, s * outer @ a.detach().T, atol=1e-9)
    assert torch.allclose(a.grad, s * b.detach().T @ outer, atol=1e-9)
    assert torch.allclose(x.grad, grad @ full, atol=1e-9)
    assert layer.soma_A0["default"].grad is None and layer.soma_B0["default"].grad is None
    assert torch.equal(net.lin.base_layer.weight, weight)


def test_extra_forward_work_is_that_of_a_lora_of_twice_the_rank():
    net, x = Net(12, 20), torch.randn(9, 20)
    with FlopCounterMode(display=False) as plain:
        net(x)
    with FlopCounterMode(display=False) as with_adapter:
        adapted(net, r=3)(x)
    assert with_adapter.get_total_flops() - plain.get_total_flops() == 2 * 9 * (2 * 3) * (12 + 20)


# --- counts and sizes ----------------------------------------------------------------------------------------------


def on_meta(cls, config, **options):
    with torch.device("meta"):
        model = cls(config)
    return sum(p.numel() for p in trained(get_peft_model(model, SomaConfig(**options))).values())


def test_counts_of_the_sheet():
    llama = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    assert on_meta(RobertaModel, RobertaConfig(), target_modules=["query", "value"]) == 294_912
    assert on_meta(LlamaForCausalLM, llama, target_modules=["q_proj", "v_proj"], r=16) == 8_388_608
    large = Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    paper = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], "r": 16, "start_block": 8}
    assert on_meta(Dinov2Model, large, **paper) == 4_718_592
    assert on_meta(Dinov2Model, large, bias="soma_only", **paper) == 4_718_592 + 147_456


def test_the_file_holds_the_factors_and_their_start(tmp_path):
    model = moved(adapted(Net(5, 7), r=3))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {k.rpartition(".")[2]: tuple(v.shape) for k, v in saved.items()} == {
        "soma_A": (3, 7), "soma_A0": (3, 7), "soma_B": (5, 3), "soma_B0": (5, 3),
    }  # fmt: skip
    # nothing is recomputed from the base it is loaded on: the same delta everywhere
    x = torch.randn(4, 7)
    for seed in (0, 1):
        again = PeftModel.from_pretrained(Net(5, 7, seed=seed), tmp_path)
        delta = again.base_model.model.lin.get_delta_weight("default")
        assert torch.equal(delta, model.base_model.model.lin.get_delta_weight("default"))
        assert torch.allclose(again(x), Net(5, 7, seed=seed)(x) + x @ delta.T, atol=1e-6)


def test_loading_needs_no_svd_and_a_saved_config_starts_afresh(tmp_path, monkeypatch):
    model = moved(adapted(Net(), r=3))
    model.save_pretrained(tmp_path)
    x = torch.randn(4, 7)
    config = SomaConfig.from_pretrained(tmp_path)
    config.inference_mode = False  # as saved it is True
    again = get_peft_model(Net(), config)
    parameters = trained(again)
    assert torch.equal(again(x), Net()(x)) and len(parameters) == 2
    fresh = adapted(Net(), r=3).state_dict()
    assert all(torch.equal(t, fresh[n]) for n, t in again.state_dict().items())
    assert all(torch.equal(p, fresh[n]) for n, p in parameters.items())  # those an optimizer may hold by now
    other = adapted(Net(), r=3)
    other.add_adapter("late", config)
    other.base_model.set_adapter(["default", "late"])
    with pytest.raises(ValueError, match=r"adapter 'late' cannot start while \['default'\] is merged"):
        other.merge_adapter()

    def none(*args, **kwargs):
        raise AssertionError("an SVD")

    monkeypatch.setattr(torch.linalg, "svd", none)
    for low in (False, True):
        assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=low)(x), model(x))


# --- architectures, precisions, quantised bases -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_architectures(name, tmp_path):
    cls, config, inputs = MODELS[name][:3]
    base = build(cls, config)
    plain = logits(base, inputs) if name != "encoder" else logits(base)
    model = get_peft_model(copy.deepcopy(base), SomaConfig(r=3, target_modules=CASES[name])).eval()
    assert torch.equal(logits(model, inputs), plain)
    on = logits(moved(model), inputs)
    assert (on - plain).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), plain)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low).eval()
        assert torch.equal(logits(again, inputs), on)
    assert (logits(model.merge_and_unload(), inputs) - on).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [4, 8])
def test_bitsandbytes_base(kind):
    net = Wrap(kind).eval()
    x = torch.randn(6, 64)
    with torch.no_grad():
        before = net(x).float()
        model = adapted(net, r=8)
        assert torch.equal(model(x).float(), before)
        on = moved(model)(x).float()
    model.train()(x).float().square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(model).values())
    model.eval().merge_adapter()
    with torch.no_grad():
        assert (model(x).float() - on).abs().mean() < 0.12 * on.abs().mean()
        assert (on - before).abs().mean() > 0.05 * on.abs().mean()


def test_easyquant_base():
    base = sandbox.load_model(quantization_config=EasyQuantConfig(bits=4)).eval()
    ids = {"input_ids": torch.arange(2, 12)[None]}
    before = logits(base, ids)
    model = get_peft_model(base, SomaConfig(r=4, target_modules=["q_proj", "down_proj"])).eval()
    assert torch.equal(logits(model, ids), before)
    model(**ids, labels=ids["input_ids"]).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(model).values())
    assert (logits(moved(model), ids) - before).abs().max() > 1e-2


def test_a_host_that_casts_only_what_trains(tmp_path):
    """trl rounds trained parameters of quantised models to bf16: still an exact start, and the file has its function."""
    net, x = Net(), torch.randn(3, 7)
    before = net(x)
    model = adapted(net, r=3)
    for p in trained(model).values():
        p.data = p.data.to(torch.bfloat16)
    assert torch.equal(model(x), before)
    moved(model)
    layer = model.base_model.model.lin
    assert layer.soma_A0["default"].dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), tmp_path).base_model.model.lin
    assert again.soma_A["default"].dtype == torch.float32
    assert torch.allclose(again.get_delta_weight("default"), layer.get_delta_weight("default"), atol=0.02)
    exact = [getattr(layer, f"soma_{p}")["default"].bfloat16().float() for p in ("A", "B", "A0", "B0")]
    assert torch.allclose(again.get_delta_weight("default"), exact[1] @ exact[0] - exact[3] @ exact[2], atol=1e-6)


def test_half_precision_without_upcast_keeps_the_start_frozen():
    net = Net(6, 6, torch.bfloat16)
    model = get_peft_model(net, SomaConfig(target_modules=["lin"], r=2), autocast_adapter_dtype=False)
    assert {n.rpartition(".soma_")[2] for n in trained(model)} == {"A.default", "B.default"}
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    assert torch.equal(model(x), net.lin.base_layer(x))


def test_torch_compile_has_no_graph_break():
    model = moved(adapted(Net(), r=3))
    x = torch.randn(4, 7)
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


# --- freezing ---------------------------------------------------------------------------------------------------------


def test_early_blocks_stay_as_they_are():
    shape = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, vocab_size=20)

    def chosen(**options):
        return sorted(get_peft_model(LlamaForCausalLM(shape), SomaConfig(r=1, **options)).targeted_module_names)

    q = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    assert chosen(target_modules=["q_proj"]) == q
    assert chosen(target_modules=["q_proj"], start_block=3) == q[3:]
    assert chosen(target_modules=r".*q_proj", start_block=1) == q[1:]
    everywhere = chosen(target_modules="all-linear", start_block=2)
    assert len(everywhere) == 14 and all(".2." in n or ".3." in n for n in everywhere)
    assert chosen(target_modules=["q_proj", "lm_head"], start_block=3) == q[3:]
    with pytest.raises(
        ValueError, match="SomaConfig.start_block is 4, but the model's blocks are 0 to 3; give at most 3"
    ):
        chosen(target_modules=["q_proj"], start_block=4)
    assert block_of("encoder.block.3.layer.0.SelfAttention.q") == 3 and block_of("lm_head") is None


# --- weight decay -----------------------------------------------------------------------------------------------------


def cosine(step, total, start=0.05, end=1e-5):
    return end + (start - end) * (1 + math.cos(math.pi * min(step, total) / total)) / 2


def zero_steps(model, optimizer, steps):
    """Updates with zero gradients: AdamW does nothing but decay."""
    for _ in range(steps):
        for p in trained(model).values():
            p.grad = torch.zeros_like(p)
        optimizer.step()


def test_decay_alone_is_the_product_of_the_schedule():
    """A plain loop: A_T = A_0 prod(1 - lr wd_t), whatever weight_decay the optimizer was given; then it stays at the end."""
    for given_decay in (0.0, 0.3):
        model = adapted(Net(5, 7, torch.float64), r=3, weight_decay=0.4, weight_decay_end=0.1, total_steps=6)
        start = {n: p.detach().clone() for n, p in trained(model).items()}
        other = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW(
            [{"params": list(trained(model).values())}, {"params": [other]}], lr=0.1, weight_decay=given_decay
        )
        zero_steps(model, optimizer, 8)
        wanted = math.prod(1 - 0.1 * cosine(t, 6, 0.4, 0.1) for t in range(8))
        assert all(torch.allclose(p, start[n] * wanted, rtol=1e-12) for n, p in trained(model).items())
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.1)
        assert optimizer.param_groups[1]["weight_decay"] == given_decay  # another's group is left alone


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_the_optimizer_decays_in_its_own_sense(cls):
    """SGD and Adam: the schedule's value as an L2 term, equal to the bit with a loop that sets it by hand."""
    ends = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        options = (
            {"weight_decay": None} if by_hand else {"weight_decay": 0.4, "weight_decay_end": 0.1, "total_steps": 5}
        )
        model = adapted(Net(), r=3, **options)
        optimizer = cls(trained(model).values(), lr=0.05)
        x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
        for t in range(5):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if by_hand:
                optimizer.param_groups[0]["weight_decay"] = slot.annealed(slot.Decay(0.4, 0.1, 5), t, 5)
            optimizer.step()
        ends.append(list(trained(model).values()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_plain_loop_resumes_with_its_optimizer(tmp_path):
    """The step is in the optimizer's state_dict."""
    options = {"r": 3, "total_steps": 6, "weight_decay": 0.4, "weight_decay_end": 0.1}
    ends = []
    for stop in (None, 2):
        model = adapted(Net(), **options)
        optimizer = torch.optim.AdamW(trained(model).values(), lr=0.1)
        zero_steps(model, optimizer, stop or 6)
        if stop:
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
            again = copy.deepcopy(model)
            del model, optimizer
            gc.collect()
            optimizer = torch.optim.AdamW(trained(again).values(), lr=0.1)
            optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
            model = again  # a copy is decayed like the original
            zero_steps(model, optimizer, 4)
        ends.append(list(trained(model).values()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


class Watch(TrainerCallback):
    """Weight decay of the adapter's group in every update, and that of the others."""

    def __init__(self):
        self.seen, self.others = [], set()

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        ours = {id(p) for n, p in model.named_parameters() if "soma_" in n}
        for group in optimizer.param_groups:
            if ours & {id(p) for p in group["params"]}:
                self.seen.append(group["weight_decay"])
            else:
                self.others.add(group["weight_decay"])


def trainer_of(folder, base=None, config=None, **changes):
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (16, 8), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    given_config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | (config or {})
    model = get_peft_model(sandbox.load_model() if base is None else base, SomaConfig(**given_config))
    watch = Watch()
    args = TrainingArguments(str(folder), **COMMON | {"save_strategy": "no"} | changes)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[watch])
    trainer.watch = watch
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_anneals_over_its_own_steps(accumulation, tmp_path):
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=accumulation, weight_decay=0.1)
    trainer.train()
    assert trainer.watch.seen == pytest.approx([cosine(t, 4) for t in range(4)], rel=1e-12)
    assert slot.STEP not in trainer.optimizer.param_groups[0]  # the Trainer's step is the one that counts


def test_steps_that_follow_from_epochs(tmp_path):
    """No max_steps: 16 rows, 2 each, 2 at a time: 4 updates per epoch."""
    trainer = trainer_of(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.watch.seen == pytest.approx([cosine(t, 8) for t in range(8)], rel=1e-12)


def test_micro_batches_leave_the_step_as_it_is(tmp_path):
    """The same rows cut in two micro-batches: the same update to rounding, decay included."""
    ends = []
    for size, parts in ((4, 1), (2, 2)):
        trainer = trainer_of(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=parts, optim="sgd",
            config={"weight_decay": 0.9, "weight_decay_end": 0.5},
        )  # fmt: skip
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trained(trainer.model).values()]))
    assert (ends[0] - ends[1]).norm() < 1e-5 * ends[0].norm()


def test_the_users_weight_decay_does_not_decay_twice(tmp_path):
    ends = []
    for weight_decay in (0.0, 0.5):
        trainer = trainer_of(tmp_path, weight_decay=weight_decay)
        trainer.train()
        ends.append(list(trained(trainer.model).values()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    off = trainer_of(tmp_path, weight_decay=0.5, config={"weight_decay": None})
    off.train()
    assert off.watch.seen == [0.5] * 4


@pytest.mark.parametrize("quantised", [False, True])
def test_resume_is_bit_equal(quantised, tmp_path):
    def fresh(folder):
        base = sandbox.load_model(quantization_config=EasyQuantConfig(bits=4)) if quantised else None
        return trainer_of(folder, base, {"weight_decay": 0.9}, save_strategy="steps", save_steps=1)

    whole, first = fresh(tmp_path / "whole"), fresh(tmp_path / "cut")
    whole.train()
    first.add_callback(Stop())
    first.train()
    second = fresh(tmp_path / "cut")
    second.train(resume_from_checkpoint=True)
    assert first.state.global_step == 2 and second.watch.seen == whole.watch.seen[2:]
    ends = [trained(t.model) for t in (whole, second)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(p, ends[1][n]) for n, p in ends[0].items())


def test_sft_trainer_and_checkpointing(tmp_path):
    task = sandbox.tasks.R
    rows = Dataset.from_list([{"prompt": p, "completion": task.gold(p)} for p in task.prompts[:8]])
    watch = Watch()
    config = SomaConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", start_block=1)
    trainer = SFTTrainer(
        sandbox.load_model(), args=SFTConfig(str(tmp_path), **COMMON, save_strategy="no", gradient_checkpointing=True),
        train_dataset=rows, peft_config=config, processing_class=sandbox.load_tokenizer(), callbacks=[watch],
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert watch.seen == pytest.approx([cosine(t, 4) for t in range(4)])
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".layers.0." not in n and ("soma_A." in n or "soma_B." in n)}
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(sandbox.load_model(), tmp_path / "saved").eval()
    assert torch.equal(logits(again), logits(trainer.model.eval()))


def test_a_head_in_the_same_group_and_a_bias_in_another(tmp_path):
    base = LlamaForSequenceClassification.from_pretrained(str(sandbox.path()), num_labels=3)
    model = get_peft_model(
        base, SomaConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    )
    optimizer = torch.optim.AdamW(
        [{"params": [p for n, p in trained(model).items() if "soma" in n]},
         {"params": [p for n, p in trained(model).items() if "score" in n], "weight_decay": 0.2}]
    )  # fmt: skip
    with pytest.warns(UserWarning, match="no transformers Trainer steps this optimizer; give total_steps"):
        zero_steps(model, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        zero_steps(model, optimizer, 2)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.2]  # left alone


def test_what_cannot_be_annealed_is_refused(monkeypatch):
    model = adapted(Net(), r=2, total_steps=5)
    with pytest.raises(ValueError, match="LBFGS has no weight_decay to anneal; use one that has, such as AdamW"):
        torch.optim.LBFGS(trained(model).values()).step(lambda: model(torch.ones(1, 7)).sum())
    model.add_adapter("other", SomaConfig(r=2, target_modules=["lin"], total_steps=6))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one group of AdamW holds adapters with 2 weight decay schedules"):
        zero_steps(model, torch.optim.AdamW(trained(model).values()), 1)
    flat = torch.optim.AdamW([nn.Parameter(torch.zeros(4))])
    flat.step()  # another model's optimizer
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        ValueError,
        match=r"none of the adapter's parameters but flat shards \(DeepSpeed, FSDP1\); set weight_decay=None",
    ) as e:
        flat.step()
    assert traceback.extract_tb(e.tb)[-1].filename.endswith("decay.py")
    model.requires_grad_(False)
    flat.step()  # nothing of ours trains


def test_nothing_is_kept_alive():
    gc.collect()
    before = len(steps._watched)
    model = adapted(Net(), r=2)
    assert len(steps._watched) == before + 1 and len(steps._handles) == 2
    model.delete_adapter("default")
    assert not list(model.base_model.model.lin.decayed_parameters())
    del model
    gc.collect()
    assert len(steps._watched) == before


_DDP = """
import sys, torch, torch.distributed as dist
from torch import nn
from peft import get_peft_model
from hfgen.adapters import SomaConfig
dist.init_process_group("gloo")
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 2))
config = SomaConfig(target_modules=["0"], r=3, weight_decay=.9, weight_decay_end=.1, total_steps=4)
model = get_peft_model(net, config)
wrapped = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=.05)
data = torch.randn(4, 8, 7, generator=torch.Generator().manual_seed(1))
for rows in data:
    optimizer.zero_grad()
    wrapped(rows.chunk(dist.get_world_size())[dist.get_rank()]).square().mean().backward()
    optimizer.step()
if dist.get_rank() == 0:
    torch.save([p.detach() for p in model.parameters()], sys.argv[1])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_end_as_one(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(_DDP)
    ends = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.pt"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            script,
            out,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-800:]
        ends.append(torch.load(out))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*ends, strict=True))


# --- as a stock LoRA --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["decoder", "gpt2", "encoder-decoder", "vit"])
def test_export_to_lora_of_twice_the_rank(name, tmp_path):
    cls, config, inputs = MODELS[name][:3]
    base = build(cls, config)
    base.save_pretrained(tmp_path / "base")
    model = moved(
        get_peft_model(cls.from_pretrained(tmp_path / "base"), SomaConfig(r=3, alpha=6.0, target_modules=CASES[name]))
    )
    model.eval().save_pretrained(tmp_path / "soma")
    before, after = export.run(tmp_path / "soma", "lora", tmp_path / "lora", str(tmp_path / "base"))
    assert (before - after).abs().max() < 1e-4 and "maximal deviation of the logits" in export.deviation(before, after)
    said = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert said["peft_type"] == "LORA" and said["r"] == said["lora_alpha"] == 6 and "hfgen" not in said
    stock = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), str(tmp_path / "lora")).eval()
    on = logits(model, inputs)
    assert (logits(stock, inputs) - on).abs().max() < 1e-5 < (on - logits(base, inputs)).abs().max()


def test_export_with_a_start_block_and_refusal_of_biases(tmp_path):
    cls, config = MODELS["decoder"][:2]
    build(cls, config).save_pretrained(tmp_path / "base")

    def write(folder, **options):
        base = cls.from_pretrained(tmp_path / "base")
        moved(get_peft_model(base, SomaConfig(r=3, target_modules=["q_proj"], **options))).save_pretrained(folder)

    write(tmp_path / "late", start_block=1)
    before, after = export.run(tmp_path / "late", "lora", tmp_path / "lora", str(tmp_path / "base"))
    assert (before - after).abs().max() < 1e-5
    before, after = export.run(tmp_path / "late", "merged", tmp_path / "merged", str(tmp_path / "base"))
    assert (before - after).abs().max() < 1e-5
    write(tmp_path / "biased", bias="soma_only")
    with pytest.raises(ValueError, match="the adapter trains biases"):
        export.run(tmp_path / "biased", "lora", tmp_path / "no", str(tmp_path / "base"))


def test_pefts_own_conversion_at_twice_the_rank():
    cls, config, inputs = MODELS["decoder"][:3]
    base = build(cls, config)
    model = moved(get_peft_model(copy.deepcopy(base), SomaConfig(r=3, target_modules=["q_proj", "up_proj"]))).eval()
    lora_config, tensors = convert_to_lora(model, rank=6)
    lora = get_peft_model(base, lora_config).eval()
    set_peft_model_state_dict(lora, tensors)
    assert (logits(lora, inputs) - logits(model, inputs)).abs().max() < 1e-4


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    for options, error, words in (
        ({"r": 6}, ValueError, r"SomaConfig.r is 6, but lin is 5 x 7 and has 5 components; give r up to 5"),
        ({"r": 0}, ValueError, "SomaConfig.r is 0; give an integer of at least 1"),
        ({"alpha": 0}, ValueError, "SomaConfig.alpha is 0; give a finite number above 0"),
        ({"weight_decay": -1.0}, ValueError, "SomaConfig.weight_decay is -1.0; give a finite number above 0 and up to 1"),
        ({"weight_decay_end": 0.2}, ValueError, "weight_decay_end is 0.2; give a finite number above 0 and up to 0.05"),
        ({"weight_decay": None, "total_steps": 5}, ValueError, "total_steps is 5 but weight_decay is None; leave total_st"),
        ({"total_steps": 0}, ValueError, "SomaConfig.total_steps is 0; give an integer of at least 1"),
        ({"start_block": -1}, ValueError, "SomaConfig.start_block is -1; give an integer of at least 0"),
        ({"start_block": 1, "layers_to_transform": [1]}, ValueError, r"layers_to_transform is \[1\]; give one of them"),
        ({"start_blok": 1}, TypeError, "unexpected keyword argument 'start_blok'; did you mean 'start_block'"),
        ({"bias": "lora_only"}, ValueError, "SomaConfig.bias is 'lora_only'; did you mean 'soma_only'"),
    ):  # fmt: skip
        with pytest.raises(error, match=words) as e:
            adapted(Net(), **options)
        frame = traceback.extract_tb(e.tb)[-1].filename
        assert "/hfgen/" in frame or "/hfgen_plugins/" in frame, (options, frame)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_base_or_file_is_named(value, tmp_path):
    net = Net()
    net.lin.weight.data[0, 0] = value
    with pytest.raises(ValueError, match="weight of lin holds NaN or Inf"):
        adapted(net, r=2)
    model = adapted(Net(), r=2)
    with torch.no_grad():
        model.base_model.model.lin.soma_B["default"][0, 0] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="soma_B of lin holds NaN or Inf in the adapter file"):
        PeftModel.from_pretrained(Net(), tmp_path)


def test_a_file_of_another_shape_is_named(tmp_path):
    adapted(Net(), r=2).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"soma_A of lin has shape \(2, 7\) in the adapter file and \(2, 6\) in this model"
    ):
        PeftModel.from_pretrained(Net(5, 6), tmp_path)
