"""Reward ensembles on two processes: the step, the metrics and the calibration of one; GRPO and RLOO with the reward."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from hfgen import sandbox
from hfgen.trainers import EnsembleReward, EnsembleRewardConfig, EnsembleRewardModel, EnsembleRewardTrainer
from hfgen_plugins.trainers.reward_ensemble.trainer import sandbox_pairs

BACKENDS = ("separate", "lora", "heads")
QUIET = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
         "save_strategy": "no", "logging_steps": 1, "ddp_timeout": 60}  # fmt: skip
METRICS = (
    "loss", "accuracy", "margin", "ensemble/preference_loss", "ensemble/score_l2", "num_tokens", "grad_norm",
    "eval_ensemble/std",
)  # fmt: skip


def pairs(count, start=0):
    return Dataset.from_list([{**row, "margin": 0.1} for row in sandbox_pairs(count, start)])


def adapters(backend):
    return {"adapter_r": 2} if backend == "lora" else {}


def train(folder, backend, size, parts):
    """Two SGD steps of 8 pairs each, in float64; 9 pairs, an odd number, to evaluate and calibrate on."""
    trainer = EnsembleRewardTrainer(
        sandbox.load_model().double(),
        args=EnsembleRewardConfig(
            str(folder), **QUIET, backend=backend, num_members=2, **adapters(backend), aggregation="wco", score_l2=0.1,
            label_noise=0.25, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=parts,
            optim="sgd", learning_rate=0.1, max_grad_norm=0.5, lr_scheduler_type="constant",
            per_device_eval_batch_size=2,
        ),
        train_dataset=pairs(32),
        eval_dataset=pairs(8, 40),
        calibration_dataset=pairs(9, 40),
        processing_class=sandbox.load_tokenizer(),
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    logged = {k: v for row in trainer.state.log_history for k, v in row.items() if k in METRICS}
    config = trainer.ensemble.config
    return trainer, {"logged": logged, "mean": config.calibration_mean, "std": config.calibration_std}


def reinforce(folder, cls, args):
    model = EnsembleRewardModel.from_base(sandbox.load_model(), num_members=2, backend="heads")
    model.config.pad_token_id = sandbox.load_tokenizer().pad_token_id
    model.calibrate(torch.randn(20, 2, generator=torch.Generator().manual_seed(0)))
    trainer = cls(
        sandbox.load_model(),
        reward_funcs=EnsembleReward(model, sandbox.load_tokenizer(), aggregation="uwo"),
        processing_class=sandbox.load_tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": [f"D{i:02d}=" for i in range(8)]}),
        args=args(str(folder), **QUIET, max_steps=2, per_device_train_batch_size=4, num_generations=4,
                  max_completion_length=8, learning_rate=1e-3),
    )  # fmt: skip
    trainer.train()
    row = trainer.state.log_history[0]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return {
        "std": row["ensemble_reward/std"], "reward": row["reward"], "extra": len(trainer._logs["extra"]["ensemble_reward_std"]),
        "weights": weights.double().sum().item(),
    }  # fmt: skip


def worker(folder):
    found = {}
    for backend in BACKENDS:
        trainer, found[backend] = train(folder, backend, 2, 2)
        if os.environ["RANK"] == "0":
            save_file(dict(trainer.ensemble.state_dict()), Path(folder, f"{backend}.safetensors"))
    found["grpo"] = reinforce(folder, GRPOTrainer, GRPOConfig)
    found["rloo"] = reinforce(folder, RLOOTrainer, RLOOConfig)
    Path(folder, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    os._exit(0)  # without gloo's teardown


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, __file__, folder], env=environment, capture_output=True, text=True, timeout=280)
    paths = [folder / f"rank-{r}.json" for r in range(2)]
    assert all(p.exists() for p in paths), done.stderr[-3000:]
    return folder, [json.loads(p.read_text()) for p in paths]


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_do_what_one_does(ranks, tmp_path, backend):
    folder, (first, second) = ranks
    start = EnsembleRewardModel.from_base(
        sandbox.load_model().double(), seed=42, num_members=2, backend=backend, **adapters(backend)
    )
    trainer, single = train(tmp_path, backend, 8, 1)
    together, alone, before = (
        load_file(folder / f"{backend}.safetensors"),
        trainer.ensemble.state_dict(),
        start.state_dict(),
    )
    change = sum(float((alone[n] - before[n]).norm() ** 2) for n in alone) ** 0.5
    apart = sum(float((alone[n] - together[n]).norm() ** 2) for n in alone) ** 0.5
    assert change > 1e-3 and apart / change < 1e-10
    assert set(single["logged"]) == set(METRICS)
    for name, value in single["logged"].items():
        assert first[backend]["logged"][name] == pytest.approx(value, rel=1e-5), name
    for name in ("mean", "std"):
        assert first[backend][name] == second[backend][name] == pytest.approx(single[name], rel=1e-8)


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_a_reward_in_every_process(ranks, name):
    first, second = (r[name] for r in ranks[1])
    assert first == second and first["std"] > 0 and first["extra"] == 8  # the answers of both processes


if __name__ == "__main__":
    worker(sys.argv[1])
