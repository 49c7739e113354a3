"""Quantizers in their hosts: registration, architectures, pickup without an import, Trainer, peft, damaged input."""

import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.quantizers import auto

from hfgen.catalog import CatalogError
from hfgen.hosts import transformers as host
from hfgen.kit.quantizer import PackedLinear
from hfgen.quantizers import EasyQuantConfig

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 25, "vocab_size": 32}
TOKENS = torch.arange(2, 12)[None]
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 25,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 32,
    "decoder_start_token_id": 0,
}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 16}
VIT = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4, "num_labels": 3}
# name -> (class, config, inputs, packed layers, float matrices that must be listed)
MODELS = {
    "decoder": (LlamaForCausalLM, LlamaConfig(num_key_value_heads=1, **SMALL), {"input_ids": TOKENS}, 14, ["lm_head"]),
    "encoder": (BertForMaskedLM, BertConfig(**SMALL), {"input_ids": TOKENS}, 12, ["cls.predictions.decoder"]),
    "encoder-decoder": (
        T5ForConditionalGeneration, T5Config(**T5), {"input_ids": TOKENS, "decoder_input_ids": TOKENS}, 28,
        ["lm_head", "shared", "encoder.block.0.layer.1.DenseReluDense.wo"],
    ),
    "vit": (ViTForImageClassification, ViTConfig(**VIT), {"pixel_values": torch.ones(1, 3, 8, 8)}, 12, ["classifier"]),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2), {"input_ids": TOKENS}, 4, ["lm_head", "transformer.wte"]),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(num_key_value_heads=1, num_local_experts=4, **{**SMALL, "intermediate_size": 24}),  # aligned experts
        {"input_ids": TOKENS}, 8,
        ["lm_head", "model.layers.0.mlp.gate"],
    ),
}  # fmt: skip


def build(cls, config):
    generator = torch.Generator().manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    return model


def logits(model, inputs=None):
    with torch.no_grad():
        return model(**(inputs or {"input_ids": TOKENS})).logits


def packed(model):
    return [name for name, m in model.named_modules() if isinstance(m, PackedLinear)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain tiny Llama."""
    out = tmp_path_factory.mktemp("llama")
    build(*MODELS["decoder"][:2]).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    """It at 2, 3, 4 and 8 bit, each with the sum of its logits."""
    out = tmp_path_factory.mktemp("packed")
    for bits in (2, 3, 4, 8):
        model = LlamaForCausalLM.from_pretrained(folder, quantization_config=EasyQuantConfig(bits=bits))
        model.save_pretrained(out / str(bits))
        (out / str(bits) / "sum.json").write_text(json.dumps(logits(model).double().sum().item()))
    return out


# --- registration ---------------------------------------------------------------------------------------------------


def test_registering_twice_is_free_and_no_name_is_taken_over():
    before = dict.copy(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), dict.copy(auto.AUTO_QUANTIZER_MAPPING)
    host.register("easyquant", EasyQuantConfig)
    with pytest.raises(CatalogError, match="transformers .* ships its own 'hqq'"):
        host.register("hqq", EasyQuantConfig)
    other = type("EasyQuantConfig", (EasyQuantConfig,), {"__module__": "elsewhere"})
    with pytest.raises(CatalogError, match="registered as hfgen_plugins.*; elsewhere.EasyQuantConfig needs another"):
        host.register("easyquant", other)
    with pytest.raises(TypeError, match="quantizer_cls is None"):
        host.register("easyquant", type("Odd", (), {}))
    assert (dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), dict(auto.AUTO_QUANTIZER_MAPPING)) == before


SNAPSHOT = """
import json, sys
import torch, transformers, transformers.modeling_utils, transformers.core_model_loading, transformers.quantizers.base
from transformers.quantizers import auto
from transformers.utils import quantization_config
USE
def look(module):
    return {k: f'{type(v).__name__} {getattr(v, "__module__", "")}.{getattr(v, "__qualname__", "")}'
            for k, v in list(vars(module).items()) if not k.startswith('__')}
modules = [auto, transformers.quantizers, transformers.quantizers.base, quantization_config, transformers.modeling_utils,
           transformers.core_model_loading, torch.nn.Linear, torch.nn.Parameter, transformers.PreTrainedModel]
out = {m.__name__: look(m) for m in modules}
out['config'], out['quantizer'] = sorted(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), sorted(auto.AUTO_QUANTIZER_MAPPING)
print(json.dumps(out))
"""


def test_only_the_two_mappings_change(run_python):
    use = "from hfgen.quantizers import EasyQuantConfig; EasyQuantConfig(bits=4)"
    off = json.loads(run_python(SNAPSHOT.replace("USE", ""), env={"HFGEN_AUTOLOAD": "0"}).stdout)
    used = json.loads(run_python(SNAPSHOT.replace("USE", use)).stdout)
    assert set(used.pop("config")) - set(off.pop("config")) == {"easyquant"}
    assert set(used.pop("quantizer")) - set(off.pop("quantizer")) == {"easyquant"}
    for module, names in off.items():
        changed = {k for k in names.keys() | used[module].keys() if names.get(k) != used[module].get(k)}
        changed -= {"AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"}
        assert not changed, (module, changed)


# --- pickup without an import ---------------------------------------------------------------------------------------

LOAD = """
import json, os, sys
import transformers.quantizers.auto
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
assert not any(m.startswith('hfgen') for m in sys.modules), 'hfgen was imported'
def load(bits):
    folder = f'{os.environ["PACKED"]}/{bits}'
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        total = model.eval()(torch.arange(2, 12)[None]).logits.double().sum().item()
    kind = type(model.model.layers[0].mlp.up_proj).__name__
    return kind, total == json.load(open(folder + '/sum.json'))
def parse():
    return type(AutoQuantizationConfig.from_dict({'quant_method': 'easyquant', 'bits': 3})).__name__
ways = {bits: lambda bits=bits: load(bits) for bits in (2, 3, 4, 8)} | {'from_dict': parse}
for name, way in ways.items():
    sys.stdout.flush()
    if os.fork() == 0:
        try: print('WAY', name, way())
        except Exception as exc: print('WAY', name, type(exc).__name__, str(exc).splitlines()[0][:60])
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


def ways(checkpoint, run_python, **env):
    out = run_python(LOAD, env={"PACKED": str(checkpoint), **env}).stdout
    return dict(line.split(" ", 2)[1:] for line in out.splitlines() if line.startswith("WAY"))


def test_loads_quantised_without_importing_hfgen(checkpoint, run_python):
    want = {str(bits): "('PackedLinear', True)" for bits in (2, 3, 4, 8)} | {"from_dict": "EasyQuantConfig"}
    assert ways(checkpoint, run_python) == want


@pytest.mark.parametrize("env", [{"HFGEN_AUTOLOAD": "0"}, {"HFGEN_BLOCK": "easyquant"}])
def test_switched_off_it_fails_loudly(checkpoint, run_python, env):
    found = ways(checkpoint, run_python, **env)
    assert found.pop("from_dict").startswith("ValueError Unknown quantization type, got easyquant")
    assert set(found) == {"2", "3", "4", "8"} and all(v.startswith("RuntimeError") for v in found.values()), found


# --- architectures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name, tmp_path, caplog):
    """Odd widths (25), all kinds of models: what is packed, what is listed, bit-equal reload, sharded reload."""
    cls, config, inputs, layers, listed = MODELS[name]
    base = build(cls, config)
    base.save_pretrained(tmp_path / "plain")
    with caplog.at_level("WARNING", "hfgen"):
        model = cls.from_pretrained(tmp_path / "plain", quantization_config=EasyQuantConfig(bits=8))
    assert len(packed(model)) == layers == len(model.hf_quantizer.quantized)
    assert {f"{n}.weight" for n in listed} <= set(model.hf_quantizer.left_in_float), model.hf_quantizer.left_in_float
    on, off = logits(model, inputs), logits(base, inputs)
    assert 0 < (on - off).abs().max() < 0.06 * off.abs().max(), "not quantised, or wrongly"
    accounted = set(model.hf_quantizer.left_in_float) | {f"{n}.weight" for n in packed(model)}
    assert {n for n, p in model.named_parameters() if p.ndim > 1} <= accounted
    fused = [n for n in accounted if "experts" in n]
    assert bool(fused) == (name == "mixtral") == ("fused expert tensors" in caplog.text)
    for bits in (2, 3, 4):
        other = cls.from_pretrained(tmp_path / "plain", quantization_config=EasyQuantConfig(bits=bits))
        want = logits(other, inputs)
        other.save_pretrained(tmp_path / str(bits), max_shard_size="3KB")
        assert os.path.exists(tmp_path / str(bits) / "model.safetensors.index.json")
        for options in ({}, {"device_map": "auto"}):
            assert torch.equal(logits(cls.from_pretrained(tmp_path / str(bits), **options), inputs), want), (
                bits,
                options,
            )


def test_another_class_loads_the_same_checkpoint(tmp_path):
    base = build(BertForSequenceClassification, BertConfig(**SMALL))
    base.save_pretrained(tmp_path / "plain")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "plain", quantization_config=EasyQuantConfig())
    assert "bert.pooler.dense" in packed(model) and "classifier" not in packed(model)
    model.save_pretrained(tmp_path / "packed")
    inner = BertModel.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(inner(TOKENS).pooler_output, model.bert(TOKENS).pooler_output)


def test_a_layer_the_checkpoint_lacks_is_named(tmp_path):
    build(BertForMaskedLM, BertConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no bert.pooler.dense.*modules_to_not_convert"):
        BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=EasyQuantConfig())
    config = EasyQuantConfig(modules_to_not_convert=["pooler.dense"])
    model = BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    assert model.hf_quantizer.left_in_float["bert.pooler.dense.weight"] == "named in modules_to_not_convert"


def test_half_precision_checkpoints_keep_their_scales_under_another_dtype(folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=EasyQuantConfig())
    model.save_pretrained(tmp_path)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.outlier_val.dtype == torch.bfloat16 and logits(model).dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float32):
        again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert torch.equal(again.model.layers[0].mlp.up_proj.dequantize(), layer.dequantize())
        assert logits(again).dtype == dtype


def test_generation_is_that_of_the_dequantised_model(folder):
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=EasyQuantConfig())
    ids = model.generate(TOKENS, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.dequantize().generate(TOKENS, max_new_tokens=8, do_sample=False), ids)


# --- on top ---------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.randint(0, 32, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("kind", ["lora", "svfit", "loldu"])
def test_trainer_resumes_bit_equal_on_four_bits(kind, checkpoint, tmp_path):
    from hfgen.adapters import LoLDUConfig, SVFitConfig

    config_cls = {"lora": LoraConfig, "svfit": SVFitConfig, "loldu": LoLDUConfig}[kind]

    def trainer(out, **options):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(checkpoint / "4")
        model = get_peft_model(base, config_cls(target_modules="all-linear", task_type="CAUSAL_LM"))
        args = TrainingArguments(
            str(out), per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, seed=1, save_steps=2, report_to=[],
            use_cpu=True, disable_tqdm=True, gradient_checkpointing=True, **options,
        )  # fmt: skip
        return Trainer(model, args, train_dataset=Rows())

    whole = trainer(tmp_path / "a")
    whole.train()
    again = trainer(tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    state = {n: p for n, p in again.model.named_parameters() if p.requires_grad}
    assert state and all(torch.equal(p, state[n]) for n, p in whole.model.named_parameters() if p.requires_grad)
    fresh = trainer(tmp_path / "c").model
    assert any(not torch.equal(p, state[n]) for n, p in fresh.named_parameters() if p.requires_grad), "nothing trained"


def test_lora_over_conv1d_merges_after_dequantising(tmp_path):
    build(GPT2LMHeadModel, GPT2Config(**GPT2)).save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=EasyQuantConfig())
    model = get_peft_model(model, LoraConfig(target_modules=["c_attn", "c_proj"], init_lora_weights=False)).eval()
    on = logits(model)
    with pytest.raises(ValueError, match="dequantize"):
        model.merge_and_unload()
    model.dequantize()
    merged = model.merge_and_unload()
    assert type(merged.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert (logits(merged) - on).abs().max() < 1e-5


def test_an_hfgen_adapter_survives_dequantising_its_base(folder):
    from hfgen.adapters import SVFitConfig

    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=EasyQuantConfig())
    model = get_peft_model(model, SVFitConfig(target_modules=["q_proj"], init_weights=False)).eval()
    on = logits(model)
    model.dequantize()
    assert (logits(model) - on).abs().max() < 1e-5 and (logits(model.merge_and_unload()) - on).abs().max() < 1e-5


# --- bad input ------------------------------------------------------------------------------------------------------


def test_configs_on_the_wrong_checkpoint(folder, checkpoint):
    with pytest.raises(ValueError, match="EasyQuantConfig but you are passing a BitsAndBytesConfig"):
        LlamaForCausalLM.from_pretrained(checkpoint / "4", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ValueError, match="EasyQuantConfig but you are passing a dict"):
        LlamaForCausalLM.from_pretrained(checkpoint / "4", quantization_config={"quant_method": "easyquant", "bits": 4})
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config={"quant_method": "easyquant", "bits": 3})
    assert model.config.quantization_config.bits == 3 and packed(model)
    with pytest.raises(TypeError, match="did you mean 'bits'"):
        LlamaForCausalLM.from_pretrained(folder, quantization_config={"quant_method": "easyquant", "bit": 3})


def test_a_group_that_does_not_divide_names_the_layer(folder):
    with pytest.raises(
        ValueError, match=r"group_size is 16, which does not divide the 25 input features of .*down_proj"
    ):
        LlamaForCausalLM.from_pretrained(folder, quantization_config=EasyQuantConfig(group_size=16))
    config = EasyQuantConfig(group_size=16, modules_to_not_convert=["down_proj"])
    assert len(packed(LlamaForCausalLM.from_pretrained(folder, quantization_config=config))) == 12


def test_a_name_that_matches_nothing_has_a_hint(folder):
    with pytest.raises(ValueError, match=r"'dwn_proj', which matches no module; did you mean 'down_proj'\?"):
        LlamaForCausalLM.from_pretrained(
            folder, quantization_config=EasyQuantConfig(modules_to_not_convert=["dwn_proj"])
        )


def test_outliers_that_point_nowhere_are_refused(checkpoint, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint / "4", tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if n.endswith("outlier_idx") and t.numel())
    tensors[name][-1] = 10**6
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"the outliers of {name.rpartition('.')[0]} are damaged"):
        LlamaForCausalLM.from_pretrained(tmp_path / "bad")
