"""Bad input: random options of everything that takes options, and hostile files in the folders people are sent.

Random options of S3FT are tested with the method (tests/methods).
"""

import dataclasses
import json
import math
import pickle
import shutil
import struct
import traceback
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hfgen import sandbox
from hfgen.adapters import IncreLoraConfig, IntrinsicConfig, LoLDUConfig, SaraConfig, SomaConfig, SVFitConfig
from hfgen.callbacks import HyperfitCallback
from hfgen.quantizers import EasyQuantConfig

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.floats(allow_nan=True), st.text(max_size=4), st.just(math.inf),
    st.lists(st.integers(-1, 1), max_size=2), st.lists(st.text(max_size=3), max_size=2), st.binary(max_size=3),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=1), st.sampled_from(
        ["grid", "adam", "easyquant", "lm_head", "lu", "exact", "lowrank", "auto", "all", "none", "all-tensors", "did", "said", "dense",
         "constant", "per_tensor", "CAUSAL_LM", 0.5, 64]
    ),
)  # fmt: skip
ADAPTERS = (SVFitConfig, LoLDUConfig, SomaConfig, SaraConfig, IncreLoraConfig, IntrinsicConfig)
ROWS = [[1, 2, 3, 4]] * 3
CONFIGS = {
    EasyQuantConfig: (
        ["bits", "n_sigma", "group_size", "optimizer", "steps", "lr", "modules_to_not_convert", "quant_method", "hfgen", "no_such"],
        {},
    ),
    HyperfitCallback: (
        ["stop_loss", "held_out", "every", "sequences", "length", "context", "new_tokens", "window", "batch_size", "trainer"],
        {"held_out": ROWS, "sequences": 2, "length": 3, "context": 2},
    ),
    **{
        cls: ([*(f.name for f in dataclasses.fields(cls) if f.init), "no_such"], {"target_modules": ["lin"]}) for cls in ADAPTERS
    },
}  # fmt: skip


@pytest.mark.parametrize("config_cls", CONFIGS)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_random_options_work_or_are_refused_by_us(config_cls, data):
    fields, base = CONFIGS[config_cls]
    options = data.draw(st.dictionaries(st.sampled_from(fields), JUNK, min_size=1, max_size=4))
    try:
        config_cls(**{**base, **options})
    except (ValueError, TypeError) as exc:
        frame = traceback.extract_tb(exc.__traceback__)[-1].filename
        assert "/hfgen/" in frame or "/hfgen_plugins/" in frame, (options, exc, frame)
        assert str(exc)
    else:
        assert "no_such" not in options


# --- hostile files --------------------------------------------------------------------------------------------------


class Bomb:
    """Makes a folder when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for name, config_cls in (("svfit", SVFitConfig), ("loldu", LoLDUConfig)):
        config = config_cls(r=4, target_modules=["q_proj"], init_weights=False)
        get_peft_model(sandbox.load_model(), config).save_pretrained(root / name)
    model = AutoModelForCausalLM.from_pretrained(str(sandbox.path()), quantization_config=EasyQuantConfig(bits=4))
    model.save_pretrained(root / "easyquant")
    return root


def load(kind, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "easyquant":
            return AutoModelForCausalLM.from_pretrained(str(folder))
        return PeftModel.from_pretrained(sandbox.load_model(), str(folder))


def refused(kind, folders, tmp_path, file, damage, words):
    """Loading a copy with `file` damaged raises one of the expected errors and runs nothing."""
    shutil.copytree(folders / kind, tmp_path / "case")
    damage(tmp_path / "case" / file)
    with pytest.raises((ValueError, TypeError, KeyError, RuntimeError, pickle.UnpicklingError), match=words) as caught:
        load(kind, tmp_path / "case")
    assert not (tmp_path / "ran").exists()
    return caught.value


def tensors(change):
    def damage(path):
        save_file(dict(change(k, v) for k, v in load_file(path).items()), path, metadata={"format": "pt"})

    return damage


WHOLE = "is not a complete safetensors file"
FILES = {
    "empty": (lambda p: p.write_bytes(b""), WHOLE),
    "only a length": (lambda p: p.write_bytes(p.read_bytes()[:8]), WHOLE),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:100]), WHOLE),
    "cut in the data": (lambda p: p.write_bytes(p.read_bytes()[:-40]), WHOLE),
    "header of 4 EB": (lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{}"), WHOLE),
    "header of 200 MB": (lambda p: p.write_bytes(struct.pack("<Q", 200_000_000) + b"{}"), WHOLE),
    "header is a list": (lambda p: p.write_bytes(struct.pack("<Q", 2) + b"[]"), WHOLE),
    "pickle": (lambda p: p.write_bytes(pickle.dumps(Bomb(p.parents[1] / "ran"))), WHOLE),
    "torch.save": (lambda p: torch.save({"x": Bomb(p.parents[1] / "ran")}, p), WHOLE),
    "path-like names": (tensors(lambda k, v: (f"../../{k}", v)), "has no svfit_sigma|the checkpoint has no "),
    "scalars": (tensors(lambda k, v: (k, torch.zeros(()))), r"has shape \(\)|ignore_mismatched_sizes|damaged"),
    "other shapes": (tensors(lambda k, v: (k, torch.zeros(7, 9))), r"has shape \(7, 9\)|ignore_mismatched_sizes"),
    "NaN": (tensors(lambda k, v: (k, v * math.nan if v.is_floating_point() else v)), "holds NaN or Inf"),
    "integers for numbers": (
        tensors(lambda k, v: (k, v.to(torch.int8) if v.is_floating_point() else v)), "does not fit|weight_scale of .* is torch.int8 in the checkpoint, not torch.float16"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["svfit", "easyquant"])
@pytest.mark.parametrize("case", FILES)
def test_hostile_tensor_files(kind, case, folders, tmp_path):
    damage, words = FILES[case]
    file = "model.safetensors" if kind == "easyquant" else "adapter_model.safetensors"
    refused(kind, folders, tmp_path, file, damage, words)


@pytest.mark.parametrize("positions", [[-5], [10**9], [7, 7], [9, 3]])
def test_outliers_outside_the_weight_are_refused(positions, folders, tmp_path):
    def move(key, value):
        if "outlier_idx" in key:
            return key, torch.tensor(positions, dtype=value.dtype)
        return key, torch.ones(len(positions), dtype=value.dtype) if "outlier_val" in key else value

    refused("easyquant", folders, tmp_path, "model.safetensors", tensors(move), "the outliers of .* are damaged")


def test_the_adapter_of_another_method(folders, tmp_path):
    def swap(path):
        shutil.copy(folders / "loldu" / path.name, path)

    refused("svfit", folders, tmp_path, "adapter_model.safetensors", swap, "has no svfit_sigma")


@pytest.mark.parametrize(
    ("kind", "file", "name"),
    [
        ("svfit", "adapter_model.safetensors", "adapter_model.bin"),
        ("easyquant", "model.safetensors", "pytorch_model.bin"),
    ],
)
@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_a_pickle_beside_runs_nothing(kind, file, name, write, folders, tmp_path):
    def swap(path):
        path.unlink()
        write({"x": Bomb(path.parents[1] / "ran")}, path.with_name(name))

    refused(kind, folders, tmp_path, file, swap, "Weights only load failed|nopickle|safetensors|weights_only")


def changed(**values):
    def damage(path):
        config = json.loads(path.read_text())
        config.get("quantization_config", config).update(values)
        path.write_text(json.dumps(config))

    return damage


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 10**9}, "has shape"),
        ({"r": "8; import os"}, "SVFitConfig.r is '8; import os'"),
        ({"peft_type": "../../os"}, r"\.\./\.\./os"),
        ({"peft_type": "os.system"}, "os.system"),
        ({"hfgen": [1]}, r"SVFitConfig.hfgen is \[1\]"),
        ({"target_modules": ["../../etc"]}, "matches no module of the model"),
        ({"scaling": "__import__('os')"}, "SVFitConfig.scaling is"),
    ],
)
def test_hostile_adapter_configs(values, words, folders, tmp_path):
    refused("svfit", folders, tmp_path, "adapter_config.json", changed(**values), words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bits": "4; import os"}, "EasyQuantConfig.bits is '4; import os'"),
        ({"bits": 3}, "ignore_mismatched_sizes"),
        ({"group_size": 7}, "EasyQuantConfig.group_size is 7, which does not divide"),
        ({"quant_method": "../../os"}, "ignore_mismatched_sizes"),
        ({"hfgen": [1]}, r"EasyQuantConfig.hfgen is \[1\]"),
        ({"hfgen": {"format": 99}}, "format 99, this hfgen reads up to 2"),
        ({"modules_to_not_convert": ["(a+)+$", ".*"]}, "found no layer to quantise|did you mean|matches no"),
        ({"zzz": 1}, "got an unexpected keyword argument 'zzz'"),
        ({"n_sigma": -1}, "EasyQuantConfig.n_sigma is -1"),
    ],
)
def test_hostile_quantisation_configs(values, words, folders, tmp_path):
    refused("easyquant", folders, tmp_path, "config.json", changed(**values), words)
