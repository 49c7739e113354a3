"""Conformance of adapters: what every card of kind `adapters` promises to people who use peft.

A check takes an `AdapterCase` and raises AssertionError in words. Each is shown to fail on a mutant in hfgen's own tests.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

CHECKS: dict[str, Callable[[AdapterCase], None]] = {}
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
TOLERANCE = 1e-5  # merged against unmerged, float32, on the tiny models here


def check(function: Callable[[AdapterCase], None]) -> Callable[[AdapterCase], None]:
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


@dataclass
class AdapterCase:
    """An adapter's config class under test, with the options that make its trained function differ from the base's.

    Args:
        config_cls: The PeftConfig subclass the card's target names.
        options: Keyword arguments beyond target_modules.
    """

    config_cls: Any
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, **changes: Any) -> Any:
        return self.config_cls(**{"target_modules": ["q_proj", "v_proj"], **self.options, **changes})

    def base(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A tiny Llama with weights of a usable size (transformers' own N(0, .02) makes every difference vanish)."""
        torch.manual_seed(seed)
        return _spread(LlamaForCausalLM(LlamaConfig(intermediate_size=24, num_key_value_heads=1, **_SMALL))).to(dtype)

    def gpt2(self) -> nn.Module:
        torch.manual_seed(0)
        return _spread(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)))

    def adapted(self, base: nn.Module | None = None, **changes: Any) -> Any:
        torch.manual_seed(1)
        return get_peft_model(self.base() if base is None else base, self.config(**changes)).eval()

    @staticmethod
    def tokens(seed: int = 3) -> Tensor:
        return torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(seed))

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            return model(self.tokens()).logits


def _spread(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, p.shape[-1] ** -0.5)
    return model.eval()


def _saved(model: Any, folder: str) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(os.path.join(folder, "adapter_model.safetensors"))


def _far(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


@check
def check_registered(case: AdapterCase) -> None:
    """peft's mappings know the type; the enum round-trips; the prefix is `<name>_` (transformers' loader relies on it)."""
    config = case.config()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[config.peft_type.value] is case.config_cls, (
        "config class is not the registered one"
    )
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    assert tuner.prefix == config.peft_type.value.lower() + "_", f"prefix {tuner.prefix!r} is not '<name>_'"
    assert type(config.peft_type)(config.peft_type.value) is config.peft_type, (
        "PeftType(value) does not give the member"
    )
    held = case.adapted().base_model
    own = [n for n, _ in (*held.named_parameters(), *held.named_buffers()) if not n.startswith("model.")]
    assert own or not tuner.uses_shared_state, (
        "uses_shared_state without state on the tuner: transformers' add_adapter refuses it for nothing"
    )
    assert tuner.uses_shared_state or not own, (
        f"{own[0]} is state on the tuner, which transformers' add_adapter would lose; set uses_shared_state"
    )


@check
def check_exact_start(case: AdapterCase) -> None:
    """With init_weights=True the function is unchanged, to the bit."""
    base = case.base()
    before = case.logits(base)
    assert torch.equal(case.logits(case.adapted(base)), before), "logits change at the start"


@check
def check_random_start(case: AdapterCase) -> None:
    """With init_weights=False the function is changed (or every later check would be vacuous)."""
    assert _far(case.logits(case.adapted(init_weights=False)), case.logits(case.base())) > 1e-3, (
        "init_weights=False does nothing"
    )


@check
def check_trainable(case: AdapterCase) -> None:
    """Only adapter parameters train, all of them get a gradient, and a step changes the function."""
    model = case.adapted().train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    prefix = model.base_model.prefix
    assert trained and all(prefix in n for n in trained), f"trainable parameters outside the adapter: {list(trained)}"
    model(case.tokens(), labels=case.tokens()).loss.backward()
    without = [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without, f"no gradient for {without}"
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained), "the base got gradients"
    before = case.logits(model)
    torch.optim.SGD(trained.values(), lr=0.1).step()
    assert _far(case.logits(model), before) > 0, "a step does not change the function"


@check
def check_shardable(case: AdapterCase) -> None:
    """No trained parameter is a scalar: FSDP2's fully_shard cuts along the first dimension and refuses them."""
    model = get_peft_model(case.base(), case.config())
    scalars = [n for n, p in model.named_parameters() if p.requires_grad and p.ndim == 0]
    assert not scalars, f"{scalars[0]} is a scalar, which FSDP2 cannot shard; give it the shape (1,)"


@check
def check_learns(case: AdapterCase) -> None:
    """Thirty AdamW steps lower the loss."""
    model = case.adapted().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        loss = model(case.tokens(), labels=case.tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < losses[0] - 0.01, f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"


@check
def check_accumulation(case: AdapterCase) -> None:
    """The gradient of a batch is the mean of the gradients of its equal halves, to 1e-5 of its norm."""
    grads = []
    for parts in (1, 2):
        model = case.adapted(init_weights=False).train()
        for rows in case.tokens().chunk(parts):
            (model(rows, labels=rows).loss / parts).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert float((grads[0] - grads[1]).norm()) <= 1e-5 * float(grads[0].norm()), "micro-batches change the gradient"


@check
def check_reload(case: AdapterCase) -> None:
    """save_pretrained, then PeftModel.from_pretrained on the same base (also low_cpu_mem_usage): equal logits."""
    model = case.adapted(init_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for low in (False, True):
            again = PeftModel.from_pretrained(case.base(), folder, low_cpu_mem_usage=low).eval()
            assert torch.equal(case.logits(again), case.logits(model)), (
                f"reload changes logits (low_cpu_mem_usage={low})"
            )
            assert not any(p.requires_grad for p in again.parameters()), "a loaded adapter must be frozen by default"
        trainable = PeftModel.from_pretrained(case.base(), folder, is_trainable=True)
        assert any(p.requires_grad for p in trainable.parameters()), "is_trainable=True leaves nothing trainable"


@check
def check_saves_only_the_adapter(case: AdapterCase) -> None:
    """The file holds adapter tensors only, in safetensors, and nothing of another adapter."""
    model = case.adapted(init_weights=False)
    torch.manual_seed(2)
    model.add_adapter("other", case.config(init_weights=False))
    with tempfile.TemporaryDirectory() as folder:
        names = _saved(model, folder)
    prefix = model.base_model.prefix
    assert names and all(prefix in n for n in names), f"foreign tensors in the file: {sorted(names)}"
    assert not any("other" in n or "default" in n for n in names), f"adapter names in the file: {sorted(names)}"


@check
def check_says_what_to_install(case: AdapterCase) -> None:
    """adapter_config.json (key `hfgen`) and README.md of a saved adapter name the distribution."""
    with tempfile.TemporaryDirectory() as folder:
        case.adapted().save_pretrained(folder)
        with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
            block = json.load(file).get("hfgen") or {}
        with open(os.path.join(folder, "README.md"), encoding="utf-8") as file:
            readme = file.read()
    assert "pip install" in str(block.get("install")) and isinstance(block.get("format"), int), f"hfgen block: {block}"
    assert block["install"] in readme, "README.md does not say what to install"


@check
def check_disable(case: AdapterCase) -> None:
    """disable_adapter() gives the base to the bit, and leaving it the adapter again."""
    base = case.base()
    before = case.logits(base)
    model = case.adapted(base, init_weights=False)
    on = case.logits(model)
    with model.disable_adapter():
        assert torch.equal(case.logits(model), before), "disabled differs from the base"
    assert torch.equal(case.logits(model), on), "enabled again differs"


@check
def check_merge(case: AdapterCase) -> None:
    """Merged equals unmerged, unmerge restores, merge_and_unload leaves plain layers."""
    model = case.adapted(init_weights=False)
    on, plain = case.logits(model), case.logits(case.base())
    model.merge_adapter()
    assert _far(case.logits(model), on) < TOLERANCE, f"merged differs by {_far(case.logits(model), on):.2e}"
    model.unmerge_adapter()
    assert _far(case.logits(model), on) < TOLERANCE, "unmerged differs"
    with model.disable_adapter():
        assert _far(case.logits(model), plain) < TOLERANCE, "unmerge leaves a trace in the base"
    merged = model.merge_and_unload()
    assert _far(case.logits(merged), on) < TOLERANCE, "merge_and_unload differs"
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear, "merge_and_unload leaves adapter layers"


@check
def check_safe_merge(case: AdapterCase) -> None:
    """safe_merge refuses a broken adapter with peft's sentence and leaves the base alone."""
    model = case.adapted(init_weights=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(float("nan"))
    try:
        model.merge_adapter(safe_merge=True)
    except ValueError as exc:
        assert "NaNs detected in the merged weights" in str(exc), str(exc)
    else:
        raise AssertionError("safe_merge accepted NaN")
    with model.disable_adapter():
        assert torch.isfinite(case.logits(model)).all(), "the base was written to"


@check
def check_two_adapters(case: AdapterCase) -> None:
    """Two adapters do not see each other, switching works, both active add up, deleting leaves nothing."""
    model = case.adapted(init_weights=False)
    first = case.logits(model)
    torch.manual_seed(7)
    model.add_adapter("second", case.config(init_weights=False))
    assert torch.equal(case.logits(model), first), "adding an adapter changes the active one"
    model.set_adapter("second")
    second = case.logits(model)
    assert _far(second, first) > 1e-4, "the second adapter gives the first's function"
    model.set_adapter("default")
    assert torch.equal(case.logits(model), first), "switching back differs"
    model.base_model.set_adapter(["default", "second"])
    both = case.logits(model)
    assert _far(both, first) > 1e-4 and _far(both, second) > 1e-4, "two active adapters act as one"
    model.base_model.merge_adapter()
    assert _far(case.logits(model), both) < TOLERANCE, "two merged adapters differ from two active ones"
    model.base_model.unmerge_adapter()
    model.base_model.set_adapter("default")
    model.delete_adapter("second")
    leaks = [n for n in model.state_dict() if "second" in n]
    layers = [m for m in model.modules() if hasattr(m, "_all_available_adapter_names")]
    leaks += [str(type(m)) for m in layers if "second" in m._all_available_adapter_names()]
    assert not leaks, f"delete_adapter leaves {leaks}"
    # Unmerging above restored the base to rounding only.
    assert _far(case.logits(model), first) < TOLERANCE, "deleting the other adapter changes this one"


@check
def check_no_add_while_merged(case: AdapterCase) -> None:
    """An adapter that reads the base weight cannot be added while another one is merged into it."""
    model = case.adapted(init_weights=False)
    model.merge_adapter()
    try:
        model.add_adapter("late", case.config())
    except ValueError as exc:
        assert "merged" in str(exc), str(exc)
    else:
        raise AssertionError("an adapter was built from a merged weight")


@check
def check_modules_to_save(case: AdapterCase) -> None:
    """A head in modules_to_save trains, is saved and comes back."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        shape = LlamaConfig(intermediate_size=24, num_labels=3, pad_token_id=0, **_SMALL)
        return _spread(LlamaForSequenceClassification(shape))

    model = case.adapted(build(), modules_to_save=["score"], init_weights=False)
    head = model.base_model.model.score.modules_to_save["default"].weight
    assert head.requires_grad, "the head does not train"
    with torch.no_grad():
        head.add_(1.0)
    with tempfile.TemporaryDirectory() as folder:
        names = _saved(model, folder)
        assert any(n.endswith("score.weight") for n in names), f"no head in {sorted(names)}"
        again = PeftModel.from_pretrained(build(), folder).eval()
    assert torch.equal(case.logits(again), case.logits(model)), "the head does not come back"


@check
def check_transformers(case: AdapterCase) -> None:
    """transformers' own add_adapter / save_pretrained / load_adapter / disable_adapters.

    Where all layers share state on the tuner the hosts refuse, and must do so in words and leave the model alone.
    """
    base = case.base()
    plain = case.logits(base)
    if PEFT_TYPE_TO_TUNER_MAPPING[case.config().peft_type].uses_shared_state:
        with tempfile.TemporaryDirectory() as folder:
            case.adapted().save_pretrained(folder)
            for adopt in (lambda: base.add_adapter(case.config()), lambda: case.base().load_adapter(folder)):
                try:
                    adopt()
                except ValueError as exc:
                    assert "get_peft_model" in str(exc), f"the refusal does not name get_peft_model: {exc}"
                else:
                    raise AssertionError("state on the tuner was lost: add_adapter or load_adapter took the method")
        assert torch.equal(case.logits(base), plain), "a refused add_adapter changes the model"
        return
    torch.manual_seed(1)
    base.add_adapter(case.config(init_weights=False))
    on = case.logits(base)
    assert _far(on, plain) > 1e-3, "add_adapter does nothing"
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        again = case.base()
        again.load_adapter(folder)
        assert torch.equal(case.logits(again), on), "load_adapter differs"
    base.disable_adapters()
    assert torch.equal(case.logits(base), plain), "disable_adapters differs from the base"


@check
def check_half_precision(case: AdapterCase) -> None:
    """On a bf16 base: exact start, adapter in float32 (peft's autocast rule) or in bf16 when that is switched off."""
    base = case.base(dtype=torch.bfloat16)
    before = case.logits(base)
    model = case.adapted(base)
    assert torch.equal(case.logits(model), before), "logits change at the start"
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, "adapter is not float32"
    low = get_peft_model(case.base(dtype=torch.bfloat16), case.config(init_weights=False), autocast_adapter_dtype=False)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}, "autocast_adapter_dtype=False is ignored"
    assert torch.isfinite(case.logits(low.eval())).all()


@check
def check_gradient_checkpointing(case: AdapterCase) -> None:
    """Checkpointing (as Trainer turns it on) leaves the gradient as it is."""
    grads = []
    for on in (False, True):
        model = case.adapted(init_weights=False).train()
        if on:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(case.tokens(), labels=case.tokens()).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.allclose(grads[0], grads[1], rtol=1e-5, atol=1e-7), "checkpointing changes the gradient"


@check
def check_conv1d(case: AdapterCase) -> None:
    """GPT-2's Conv1D (weights stored transposed): exact start, merge, reload."""
    targets = ["c_attn", "c_proj"]
    base = case.gpt2()
    before = case.logits(base)
    assert torch.equal(case.logits(case.adapted(base, target_modules=targets)), before), "logits change at the start"
    model = case.adapted(case.gpt2(), target_modules=targets, init_weights=False)
    on = case.logits(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert torch.equal(case.logits(PeftModel.from_pretrained(case.gpt2(), folder).eval()), on), "reload differs"
    assert _far(case.logits(model.merge_and_unload()), on) < TOLERANCE, "merged differs"


@check
def check_foreign_base(case: AdapterCase) -> None:
    """On another base an adapter either refuses (ValueError) or acts with the same weight delta as on its own."""
    model = case.adapted(init_weights=False)
    delta = {n: m.get_delta_weight("default") for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            other = PeftModel.from_pretrained(case.base(seed=9), folder)
        except ValueError:
            return
    found = {n: m.get_delta_weight("default") for n, m in other.named_modules() if hasattr(m, "get_delta_weight")}
    assert all(torch.allclose(found[n], d, atol=1e-5) for n, d in delta.items()), (
        "loads on another base with another delta"
    )


@check
def check_damaged_file(case: AdapterCase) -> None:
    """A truncated file, and one with a tensor missing, are refused with a ValueError."""
    model = case.adapted(init_weights=False)
    for damage in ("truncated", "incomplete"):
        with tempfile.TemporaryDirectory() as folder:
            tensors = _saved(model, folder)
            path = os.path.join(folder, "adapter_model.safetensors")
            if damage == "truncated":
                with open(path, "r+b") as file:
                    file.truncate(os.path.getsize(path) - 5)
            else:
                from safetensors.torch import save_file

                save_file({k: v for k, v in tensors.items() if k != sorted(tensors)[0]}, path, {"format": "pt"})
            try:
                PeftModel.from_pretrained(case.base(), folder)
            except ValueError:
                continue
            raise AssertionError(f"a {damage} file was loaded")


@check
def check_options(case: AdapterCase) -> None:
    """An unknown option, targets that match nothing and an unsupported layer are errors that name them."""
    for build, error, word in (
        (lambda: case.config(no_such_option=1), TypeError, "no_such_option"),
        (lambda: case.adapted(target_modules=["no_such_module"]), ValueError, "no_such_module"),
        (lambda: case.adapted(target_modules=["embed_tokens"]), TypeError, "embed_tokens"),
        (lambda: case.config(target_modules=3), TypeError, "target_modules"),
        (lambda: case.config(init_weights="maybe"), TypeError, "init_weights"),
    ):
        try:
            build()
        except error as exc:
            assert word in str(exc), f"the message does not name {word}: {exc}"
        else:
            raise AssertionError(f"{word} was accepted")


@check
def check_lora_conversion(case: AdapterCase) -> None:
    """A layer that says it converts to LoRA gives, through peft's convert_to_lora, a LoRA with the same function."""
    model = case.adapted(init_weights=False)
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if not all(layer.supports_lora_conversion("default") for layer in layers):
        return
    config, tensors = convert_to_lora(model, rank=8)
    lora = get_peft_model(case.base(), config).eval()
    set_peft_model_state_dict(lora, tensors)
    far = _far(case.logits(lora), case.logits(model))
    assert far < 1e-4, f"the converted LoRA differs by {far:.2e}"


class _Halves(nn.Module):
    """A linear layer that stores W / 2 in float16 and tells adapters so by `hfgen_backend()`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.weight = nn.Parameter((linear.weight.data / 2).half(), requires_grad=False)

    def hfgen_backend(self) -> QuantizationBackend:
        return _HalvesBackend()

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * 2).T


class _HalvesBackend(QuantizationBackend):
    layer_type, supports_merge, backend_name = "linear", True, "halves"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        return base_layer.weight.float() * 2

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        peft_layer.get_base_layer().weight.data = (weight_data / 2).half()


@check
def check_quantised_base(case: AdapterCase) -> None:
    """On layers with another form of weight (`hfgen_backend()`): exact start, gradient, merge to their precision."""
    base = case.base()
    for block in base.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(block.self_attn, name, _Halves(getattr(block.self_attn, name)))
    before = case.logits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft does not know the layer's type and says so
        plain = case.adapted(copy.deepcopy(base))
        assert torch.equal(case.logits(plain), before), "logits change at the start"
        model = case.adapted(base, init_weights=False)
    model(case.tokens(), labels=case.tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "no gradient through the layer"
    on = case.logits(model)
    model.merge_adapter()
    assert _far(case.logits(model), on) < 0.02 * _far(on, before), "merged differs by more than float16 rounds"


_NEW_PROCESS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[3], weights_only=True)).logits, sys.argv[3])
"""


@check
def check_zero_import(case: AdapterCase) -> None:
    """A new process that never imports hfgen loads the saved adapter through peft, with the same logits."""
    model = case.adapted(init_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        case.base().save_pretrained(os.path.join(folder, "base"))
        model.save_pretrained(os.path.join(folder, "adapter"))
        exchange = os.path.join(folder, "logits.pt")
        torch.save(case.tokens(), exchange)
        command = [sys.executable, "-c", _NEW_PROCESS, f"{folder}/base", f"{folder}/adapter", exchange]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"not picked up: {done.stderr[-500:]}"
        assert torch.equal(torch.load(exchange, weights_only=True), case.logits(model)), "other logits"


@check
def check_copies(case: AdapterCase) -> None:
    """deepcopy and pickle of the config and the model keep the function; the config's JSON round-trips."""
    model = case.adapted(init_weights=False)
    assert torch.equal(case.logits(copy.deepcopy(model)), case.logits(model)), "deepcopy differs"
    assert torch.equal(case.logits(pickle.loads(pickle.dumps(model))), case.logits(model)), "pickle differs"
    config = case.config()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        again = case.config_cls.from_pretrained(folder)
    assert again == config, f"config.json does not round-trip: {again} != {config}"


@check
def check_deterministic(case: AdapterCase) -> None:
    """Built twice on one base, an adapter holds the same numbers (ranks of a run must agree)."""
    states = []
    for global_seed in (11, 12):
        base = case.base()
        torch.manual_seed(global_seed)
        model = get_peft_model(base, case.config())
        prefix = model.base_model.prefix
        tensors = [*model.named_parameters(), *model.named_buffers()]  # with the factors that are not saved
        states.append({n: t for n, t in tensors if prefix in n})
    different = [n for n, t in states[0].items() if not torch.equal(t, states[1][n])]
    assert not different, f"depends on the global random state: {different}"
