"""Conformance of quantizers: what every card of kind `quantizers` promises to people who use transformers and peft.

A check takes a `QuantizerCase` and raises AssertionError in words. Each is shown to fail on a mutant in hfgen's own tests.
The method must take `bits` and build on `hfgen.kit.quantizer`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoQuantizationConfig,
)

from hfgen import catalog
from hfgen.kit.quantizer import PackedLinear

CHECKS: dict[str, Callable[[QuantizerCase], None]] = {}
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_WIDTHS = (2, 3, 4, 5, 6, 8)
_FILE = "model.safetensors"


def check(function: Callable[[QuantizerCase], None]) -> Callable[[QuantizerCase], None]:
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


@dataclass
class QuantizerCase:
    """A quantizer's config class under test.

    Args:
        config_cls: The class the card's target names.
        options: Keyword arguments beyond bits.
    """

    config_cls: Any
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, **changes: Any) -> Any:
        return self.config_cls(**{**self.options, **changes})

    def llama(self, **changes: Any) -> Any:
        """A tiny Llama with weights of a usable size (transformers' own N(0, .02) makes every difference vanish)."""
        return _spread(LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, vocab_size=32, **_SMALL, **changes)))

    def quantized(self, model: nn.Module | None = None, folder: str | None = None, **changes: Any) -> Any:
        """`model` saved, and loaded with the config (calibrated, if the method is); the packed checkpoint: `folder`."""
        model, config = self.llama() if model is None else model, self.config(**changes)
        if config.calibrated:
            found = config.calibrate(copy.deepcopy(model), self.rows(model))
        else:
            with tempfile.TemporaryDirectory() as plain:
                model.save_pretrained(plain)
                found = type(model).from_pretrained(plain, quantization_config=config)
        if folder is not None:
            found.save_pretrained(folder)
        return found

    @staticmethod
    def rows(model: nn.Module) -> list[dict[str, Tensor]]:
        """What a calibrated method is given: the inputs of one example each."""
        generator = torch.Generator().manual_seed(5)
        if isinstance(model, ViTForImageClassification):
            return [{"pixel_values": torch.randn(3, 8, 8, generator=generator)} for _ in range(16)]
        return [{"input_ids": torch.randint(0, 32, (12,), generator=generator)} for _ in range(16)]

    @staticmethod
    def tokens(seed: int = 3) -> Tensor:
        return torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(seed))

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            return model(self.tokens()).logits


def _spread(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    return model.eval()


def _packed(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


def _far(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def _message(action: Callable[[], Any], what: str) -> str:
    """The text of the ValueError or TypeError that `action` must raise."""
    try:
        action()
    except (ValueError, TypeError) as exc:
        return str(exc)
    raise AssertionError(f"{what} was accepted")


@check
def check_registered(case: QuantizerCase) -> None:
    """Both mappings know the method; AutoQuantizationConfig.from_dict gives the config back; its JSON holds all of it."""
    config = case.config()
    name = config.quant_method
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[name] is case.config_cls, "config class is not the registered one"
    assert AUTO_QUANTIZER_MAPPING[name] is case.config_cls.quantizer_cls, "quantizer class is not the registered one"
    again = AutoQuantizationConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config, f"config does not round-trip through JSON: {again} != {config}"
    block = config.hfgen
    assert block["format"] >= 1 and "pip install" in block["install"], f"hfgen block is {block}"


@check
def check_quantises(case: QuantizerCase) -> None:
    """All seven linear layers of each block are packed; the error falls with the bits and is small at 8."""
    base = case.llama()
    want = case.logits(base)
    errors = []
    for bits in _WIDTHS:
        model = case.quantized(base, bits=bits)
        assert len(_packed(model)) == 14, f"{len(_packed(model))} of 14 layers are packed"
        errors.append(_far(case.logits(model), want))
    assert errors[-1] < 0.02, f"at 8 bit the logits are {errors[-1]:.3f} away"
    assert all(a > b for a, b in itertools.pairwise(errors)), f"the error does not fall with bits: {errors}"


@check
def check_bytes(case: QuantizerCase) -> None:
    """The file: bits / 8 a weight, 2 a scale, 1 a zero, 6 an outlier, 4 a table's entry, the rest, the header; 2 % more."""
    for bits in _WIDTHS:
        with tempfile.TemporaryDirectory() as folder:
            model = case.quantized(folder=folder, bits=bits)
            size = os.path.getsize(os.path.join(folder, _FILE))
            with open(os.path.join(folder, _FILE), "rb") as file:
                limit = 8.0 + int.from_bytes(file.read(8), "little")
            names = load_file(os.path.join(folder, _FILE))
        layers = _packed(model)
        limit += sum(t.nbytes for n, t in names.items() if n.rpartition(".")[0] not in layers)
        for layer in layers.values():
            limit += layer.out_features * -(-layer.in_features // 8) * bits  # a row padded to 8 codes
            limit += 2 * layer.weight_scale.numel()
            limit += 0 if layer.outlier_idx is None else 6 * layer.outlier_idx.numel()
            limit += sum(t.nbytes for t in (layer.weight_zero, layer.weight_table, layer.bias) if t is not None)
        assert size <= 1.02 * limit, f"{size} bytes at {bits} bit where {limit:.0f} are accounted for"


@check
def check_reload(case: QuantizerCase) -> None:
    """A packed checkpoint loads bit-equal, with and without a device map."""
    for bits in _WIDTHS:
        with tempfile.TemporaryDirectory() as folder:
            want = case.logits(case.quantized(folder=folder, bits=bits))
            for options in ({}, {"device_map": "cpu"}, {"device_map": "auto"}):
                again = LlamaForCausalLM.from_pretrained(folder, **options)
                assert len(_packed(again)) == 14, "reload has other layers"
                assert torch.equal(case.logits(again), want), f"reload differs with {options} at {bits} bit"


@check
def check_refused_without_the_plugin(case: QuantizerCase) -> None:
    """A host that does not know the method refuses the file, by the shape of every packed tensor."""
    for bits in _WIDTHS:
        with tempfile.TemporaryDirectory() as folder:
            case.quantized(folder=folder, bits=bits)
            path = os.path.join(folder, "config.json")
            with open(path) as file:
                config = json.load(file)
            del config["quantization_config"]
            with open(path, "w") as file:
                json.dump(config, file)
            try:
                LlamaForCausalLM.from_pretrained(folder)
            except RuntimeError as exc:
                assert "mismatched" in str(exc), exc
            else:
                raise AssertionError(f"a plain model loads the {bits} bit file in silence")


@check
def check_heads(case: QuantizerCase) -> None:
    """Heads and (tied) embeddings stay float and are listed, also beside modules_to_not_convert."""
    vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **_SMALL))
    cases: list[tuple[nn.Module, str, dict[str, Any]]] = [
        (case.llama(), "lm_head", {}),
        (case.llama(tie_word_embeddings=True), "lm_head", {"modules_to_not_convert": ["q_proj"]}),
        (_spread(vit), "classifier", {}),
    ]
    for model, head, changes in cases:
        found = case.quantized(model, **changes)
        assert not isinstance(found.get_submodule(head), PackedLinear), f"the head {head} is quantised"
        listed = found.hf_quantizer.left_in_float
        embeddings = [f"{n}.weight" for n, m in found.named_modules() if isinstance(m, nn.Embedding)]
        assert {f"{head}.weight", *embeddings} <= set(listed), f"not listed: {listed}"
        if changes:
            assert not any("q_proj" in name for name in _packed(found)), "modules_to_not_convert is ignored"
            assert found.lm_head.weight is found.model.embed_tokens.weight, "tied weights came apart"


@check
def check_conv1d(case: QuantizerCase) -> None:
    """GPT-2's Conv1D (weights stored transposed) is quantised, reloads bit-equal and comes back as Conv1D."""
    base = _spread(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)))
    with tempfile.TemporaryDirectory() as folder:
        model = case.quantized(base, folder, bits=8)
        assert len(_packed(model)) == 4, f"{len(_packed(model))} of 4 Conv1D layers are packed"
        on = case.logits(model)
        assert _far(on, case.logits(base)) < 0.02, "Conv1D is quantised wrongly"
        assert torch.equal(case.logits(GPT2LMHeadModel.from_pretrained(folder)), on), "reload differs"
    plain = model.dequantize()
    names = [n for n, m in base.named_modules() if type(m).__name__ == "Conv1D"]
    assert all(type(plain.get_submodule(n)).__name__ == "Conv1D" for n in names), "dequantize gives other layers"
    assert _far(case.logits(plain), on) < 1e-5, "dequantize differs"


@check
def check_experts(case: QuantizerCase) -> None:
    """Fused experts (3-D parameters) are quantised or listed, never skipped in silence."""
    config = MixtralConfig(num_key_value_heads=1, num_local_experts=4, vocab_size=32, **_SMALL)
    with tempfile.TemporaryDirectory() as folder:
        model = case.quantized(_spread(MixtralForCausalLM(config)), folder)
        again = MixtralForCausalLM.from_pretrained(folder)
        assert torch.equal(case.logits(again), case.logits(model)), "reload differs"
    for found in (model, again):
        fused = {n for n, p in found.named_parameters() if p.ndim == 3 and p.is_floating_point()}
        missing = fused - set(found.hf_quantizer.left_in_float)
        assert not missing, f"experts left in float and not listed: {sorted(missing)}"


@check
def check_gradient(case: QuantizerCase) -> None:
    """The gradient reaches the input as through the dense weight, and no dense weight is kept for backward."""
    model = case.quantized()
    name, layer = next(iter(_packed(model).items()))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    dense = [t for t in kept if t.is_floating_point() and t.numel() >= layer.in_features * layer.out_features]
    assert not dense, f"{name} keeps a dense weight for backward"
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(y, x, g)
    assert torch.allclose(found, g @ layer.dequantize(), atol=1e-5), "wrong gradient"
    assert not any(p.requires_grad for p in layer.parameters() if p.ndim > 1), "the codes ask for a gradient"


@check
def check_lora(case: QuantizerCase) -> None:
    """Stock LoRA trains, saves and reloads on it; its merge, and DoRA, are refused by a line that names the way."""
    targets = {"target_modules": "all-linear"}
    model = get_peft_model(case.quantized(), LoraConfig(**targets))
    losses = _train(case, model)
    assert losses[-1] < losses[0], f"LoRA does not train: {losses}"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        on = case.logits(model.eval())
        again = PeftModel.from_pretrained(case.quantized(), folder).eval()
        assert torch.equal(case.logits(again), on), "LoRA reloads differently"
    for what, action in (
        ("a stock merge", model.merge_adapter),
        ("a stock safe merge", lambda: model.merge_adapter(safe_merge=True)),
        ("DoRA", lambda: get_peft_model(case.quantized(), LoraConfig(use_dora=True, **targets))),
    ):
        try:
            words = _message(action, what)
        except RuntimeError as exc:
            words = str(exc)
        assert "dequantize" in words, f"{what} is refused by {words!r}, which does not name the way"
    again.dequantize()
    assert _far(case.logits(again.merge_and_unload()), on) < 1e-5, "merged after dequantize() differs"


def _train(case: QuantizerCase, model: Any, steps: int = 4) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(case.tokens(), labels=case.tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@check
def check_adapters(case: QuantizerCase) -> None:
    """Every adapter that comes with hfgen trains, saves, reloads and merges on it, the merge within 8 bit's error."""
    own = [p.card for p in catalog.plugins() if p.kind == "adapters" and p.distribution == "hfgen" and p.card]
    for card in own:  # a stranger's fault is not this quantizer's
        config_cls = catalog.load(card.name, "adapters")
        model = get_peft_model(case.quantized(bits=8), config_cls(target_modules=["q_proj", "v_proj"]))
        before = case.logits(model.eval())
        losses = _train(case, model.train(), 8)
        assert losses[-1] < losses[0], f"{card.name} does not train: {losses}"
        on = case.logits(model.eval())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = PeftModel.from_pretrained(case.quantized(bits=8), folder).eval()
        assert torch.equal(case.logits(again), on), f"{card.name} reloads differently"
        merged = model.merge_and_unload()
        assert len(_packed(merged)) == 14, f"{card.name}'s merge leaves another layer"
        assert _far(case.logits(merged), on) < 0.3 * _far(before, on) + 0.01, f"{card.name}'s merge is lost"
        with tempfile.TemporaryDirectory() as folder:
            merged.save_pretrained(folder)
            assert torch.equal(case.logits(LlamaForCausalLM.from_pretrained(folder)), case.logits(merged))


@check
def check_dequantize(case: QuantizerCase) -> None:
    """`model.dequantize()` gives a plain model of the same function, which saves as one."""
    model = case.quantized()
    on = case.logits(model)
    plain = model.dequantize()
    assert not _packed(plain), "a packed layer is left"
    assert _far(case.logits(plain), on) < 1e-5, "dequantised differs"
    assert any(p.requires_grad for p in plain.model.layers.parameters()), "the plain model is frozen"
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        again = LlamaForCausalLM.from_pretrained(folder)
    assert not hasattr(again, "hf_quantizer") and torch.equal(case.logits(again), case.logits(plain)), "saved differs"


@check
def check_bad_weights(case: QuantizerCase) -> None:
    """NaN and Inf are refused by an error of the method's own that names the layer."""
    for value in (float("nan"), float("inf")):
        base = case.llama()
        with torch.no_grad():
            base.model.layers[1].mlp.up_proj.weight[2, 3] = value
        try:
            words = _message(functools.partial(case.quantized, base), f"a weight with {value}")
        except RuntimeError as exc:
            words = str(exc)
        assert "layers.1.mlp.up_proj" in words and "NaN" in words, f"the error does not name the layer: {words}"


@check
def check_zero_rows(case: QuantizerCase) -> None:
    """Rows and matrices of zeros stay zeros."""
    base = case.llama()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[1] = 0
        base.model.layers[1].mlp.up_proj.weight[:] = 0
    layers = [layer.mlp.up_proj for layer in case.quantized(base).model.layers]
    assert not layers[0].dequantize()[1].any() and not layers[1].dequantize().any(), "zeros are not kept"


@check
def check_no_layer(case: QuantizerCase) -> None:
    """A model in which nothing can be quantised is an error."""
    words = _message(lambda: case.quantized(modules_to_not_convert=["model"]), "a model without a layer to quantise")
    assert "no layer" in words, words


@check
def check_options(case: QuantizerCase) -> None:
    """Unknown options and values, another method's config, names that match nothing: errors that name them."""
    for word, action in (
        ("no_such_option", lambda: case.config(no_such_option=1)),
        ("bits", lambda: case.config(bits=7)),
        ("group_size", lambda: case.config(group_size=0)),
        ("quant_method", lambda: case.config(quant_method="gptq")),
        ("format", lambda: case.config_cls.from_dict({**case.config().to_dict(), "hfgen": {"format": 99}})),
        ("no_such_module", lambda: case.quantized(modules_to_not_convert=["no_such_module"])),
        ("group_size", lambda: case.quantized(group_size=5)),
    ):
        words = _message(action, word)
        assert word in words, f"the message does not name {word}: {words}"


@check
def check_damaged_file(case: QuantizerCase) -> None:
    """A truncated file, and one with a tensor missing, are refused with a ValueError that says so."""
    for damage in ("truncated", "incomplete"):
        with tempfile.TemporaryDirectory() as folder:
            case.quantized(folder=folder)
            path = os.path.join(folder, _FILE)
            if damage == "truncated":
                with open(path, "r+b") as file:
                    file.truncate(os.path.getsize(path) - 5)
            else:
                tensors = load_file(path)
                del tensors[next(n for n in sorted(tensors) if n.endswith("_proj.weight_scale"))]
                save_file(tensors, path, {"format": "pt"})
            words = _message(functools.partial(LlamaForCausalLM.from_pretrained, folder), f"a {damage} file")
            assert "complete" in words, words


@check
def check_copies(case: QuantizerCase) -> None:
    """deepcopy and pickle of the model keep the function and the packed layers."""
    model = case.quantized()
    on = case.logits(model)
    for name, copied in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        assert len(_packed(copied)) == 14 and torch.equal(case.logits(copied), on), f"{name} differs"


@check
def check_cast(case: QuantizerCase) -> None:
    """`model.to(dtype)` rounds no scale and no outlier; half-precision models load and run."""
    model = case.quantized()
    before = {name: layer.dequantize() for name, layer in _packed(model).items()}
    model.to(torch.bfloat16)
    assert all(torch.equal(layer.dequantize(), before[n]) for n, layer in _packed(model).items()), (
        "a cast rounds scales"
    )
    assert case.logits(model).dtype == torch.bfloat16 and torch.isfinite(case.logits(model)).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(case.logits(case.quantized())).all()


@check
def check_deterministic(case: QuantizerCase) -> None:
    """Quantised twice, whatever the global random state, the codes are the same."""
    states = []
    for seed in (11, 12):
        base = case.llama()
        torch.manual_seed(seed)
        states.append(case.quantized(base).state_dict())
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items()), "depends on the global random state"
