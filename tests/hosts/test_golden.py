"""A checkpoint of every released format still loads and gives what it gave (tests/fixtures/golden)."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hfgen import sandbox

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
FOLDERS = sorted(p for p in GOLDEN.iterdir() if (p / "golden.json").exists())


def test_every_format_has_one():
    assert {p.name for p in FOLDERS} >= {
        "svfit-1",
        "loldu-1",
        "soma-1",
        "sara-1",
        "increlora-1",
        "intrinsic-1",
        "easyquant-1",
        "easyquant-2",
        "nupes-2",
        "adaquant-2",
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_it_gives_what_it_gave(folder):
    if (folder / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(sandbox.load_model(), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(torch.arange(3, 13)[None]).logits.double()[0, -1, :8]
    want = torch.tensor(json.loads((folder / "golden.json").read_text())["last_logits"], dtype=torch.float64)
    assert torch.allclose(logits, want, atol=1e-4), (logits, want)
