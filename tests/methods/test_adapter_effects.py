"""The sheets' small effects: a right implementation adapts a digits classifier to rotated images (specs/adapters.md 1.6, 2.6).

They tell right code from wrong; they rank nothing.
"""

import pytest
import torch
from peft import get_peft_model
from sklearn import datasets
from torch import nn

from hfgen.adapters import LoLDUConfig, SVFitConfig


@pytest.fixture(scope="module")
def digits():
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 8, 8), torch.tensor(labels)
    turned = torch.rot90(x, 1, (1, 2))
    train = torch.arange(len(y)) % 5 != 0
    return {"upright": (x.flatten(1), y), "turned": (turned.flatten(1), y), "train": train}


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 10)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def fit(model, x, y, steps, lr, generator):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        rows = torch.randint(0, len(y), (128,), generator=generator)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accuracy(model, x, y):
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


@pytest.fixture(scope="module")
def bases(digits):
    """Five classifiers pretrained on upright digits, with their state."""
    made = []
    x, y = digits["upright"]
    train = digits["train"]
    for seed in range(5):
        torch.manual_seed(seed)
        model = MLP()
        fit(model, x[train], y[train], 600, 2e-3, torch.Generator().manual_seed(seed))
        assert accuracy(model, x[~train], y[~train]) > 0.94
        made.append(model.state_dict())
    return made


def adapt(digits, bases, config):
    x, y = digits["turned"]
    train, scores = digits["train"], []
    for seed, state in enumerate(bases):
        base = MLP()
        base.load_state_dict(state)
        assert accuracy(base, x[~train], y[~train]) < 0.35  # the baseline is lost on turned images
        model = get_peft_model(base, config())
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 64 + 128 + 10
        fit(model, x[train], y[train], 600, 2e-2, torch.Generator().manual_seed(100 + seed))
        scores.append(accuracy(model, x[~train], y[~train]))
    return scores


def test_svfit_adapts(digits, bases):
    scores = adapt(digits, bases, lambda: SVFitConfig(r=128, target_modules=["a", "b", "c"]))
    assert sum(scores) / 5 >= 0.55 and min(scores) >= 0.45, scores


def test_loldu_adapts_and_only_preserving_inits_do_it_well(digits, bases):
    def loldu(**options):
        return adapt(digits, bases, lambda: LoLDUConfig(r=128, target_modules=["a", "b", "c"], **options))

    lu, ones, broken = loldu(), loldu(init_z="ones"), loldu(init_z="ones", preserve_function=False)
    assert min(lu) >= 0.80, lu
    assert abs(sum(ones) - sum(lu)) / 5 <= 0.05, (ones, lu)
    assert (sum(lu) - sum(broken)) / 5 >= 0.15, (lu, broken)
