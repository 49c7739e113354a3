"""What a reward ensemble of five costs beside one reward model: time and memory of training and scoring.

    OMP_NUM_THREADS=1 python recipes/bench/ensembles.py --out recipes/bench/results/ensembles.json

One process, one thread, the arms by turns in every round, so that other load on the machine hits all alike. A training
step is compute_loss of trl's RewardTrainer (one model) or EnsembleRewardTrainer, backward and AdamW on a batch of pairs;
scoring is a forward of as many answers without gradient. Reported: the median over rounds of the ratio to one reward
model, with its quartiles. Bytes of training: weights, gradients, AdamW's moments, and what autograd keeps of one batch.
Weights at a real width are counted on the meta device. The peak of scoring with `load_streamed` is the resident size of
a new process above what it had before it read the model.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

from hfgen import sandbox
from hfgen.trainers import EnsembleRewardConfig, EnsembleRewardModel, EnsembleRewardTrainer

MEMBERS = 5
ARMS = ("one", "heads", "lora", "separate")
BARS = {"heads, training step": 1.3, "heads, scoring": 1.3, "heads, bytes of training": 1.3, "heads, weights": 1.3,
        "lora, weights": 1.2, "streamed, peak": 1.3}  # fmt: skip
REAL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 32000}  # fmt: skip


@dataclass
class BenchArguments:
    rounds: int = field(default=9, metadata={"help": "Timed rounds, after one to warm up."})
    hidden: int = field(default=256, metadata={"help": "Width of the timed models."})
    layers: int = field(default=4, metadata={"help": "Their layers."})
    pairs: int = field(default=4, metadata={"help": "Pairs in a batch."})
    tokens: int = field(default=128, metadata={"help": "Tokens of an answer."})
    peak_hidden: int = field(default=512, metadata={"help": "Width of the models whose peak is measured."})
    out: str | None = field(default=None, metadata={"help": "JSON file to write."})


def shape(hidden: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        vocab_size=4000, num_labels=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


class Arm:
    """A trainer with its model, one batch and an optimizer."""

    def __init__(self, name: str, args: BenchArguments, folder: str) -> None:
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(shape(args.hidden, args.layers))
        ids = torch.randint(3, 4000, (2, args.pairs * 2, args.tokens)).tolist()
        data = Dataset.from_dict({"chosen_ids": ids[0], "rejected_ids": ids[1]})
        options: dict[str, Any] = {
            "output_dir": folder, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
            "per_device_train_batch_size": args.pairs,
        }  # fmt: skip
        rest = {"train_dataset": data, "processing_class": sandbox.load_tokenizer()}
        if name == "one":
            self.trainer: Any = RewardTrainer(model, args=RewardConfig(**options), **rest)
        else:
            own = EnsembleRewardConfig(**options, num_members=MEMBERS, backend=name)
            self.trainer = EnsembleRewardTrainer(model, args=own, **rest)
        self.model = self.trainer.model
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.answers = {k: v if v.ndim == 2 else v[0] for k, v in self.batch.items()}
        self.optimizer = torch.optim.AdamW(p for p in self.model.parameters() if p.requires_grad)

    def step(self) -> None:
        self.model.train()
        self.trainer.compute_loss(self.model, dict(self.batch)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def score(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(**self.answers)

    def bytes(self) -> dict[str, int]:
        """Of training: weights, gradients and moments (AdamW has two), and the tensors that autograd keeps."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.model.train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = self.trainer.compute_loss(self.model, dict(self.batch))
        del loss
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        found = {
            "weights": sum(p.nbytes for p in self.model.parameters()), "gradients": trained, "optimizer": 2 * trained,
            "activations": sum(kept.values()),
        }  # fmt: skip
        return found | {"total": sum(found.values())}


def timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "q25": quarters[0], "q75": quarters[2]}


def measure(args: BenchArguments) -> dict[str, Any]:
    """Seconds of one reward model and ratios of the ensembles, per arm."""
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: Arm(name, args, folder) for name in ARMS}
        seconds: dict[str, dict[str, list[float]]] = {a: {"step": [], "score": []} for a in ARMS}
        for number in range(args.rounds + 1):
            for name, arm in arms.items():
                for what in ("step", "score"):
                    took = timed(getattr(arm, what))
                    if number:
                        seconds[name][what].append(took)
        one = seconds["one"]
        sizes = {name: arm.bytes() for name, arm in arms.items()}
    return {
        name: {
            **{
                what: spread([a / b for a, b in zip(seconds[name][what], one[what], strict=True)])
                | {"seconds": statistics.median(seconds[name][what])}
                for what in ("step", "score")
            },
            "bytes": sizes[name],
            "bytes_ratio": sizes[name]["total"] / sizes["one"]["total"],
        }
        for name in ARMS
    }


def weights() -> dict[str, float]:
    """Parameters of five members in those of one reward model, 12 layers of 768, adapters of rank 8 on all layers."""
    base = LlamaConfig(**REAL, num_labels=1)
    with torch.device("meta"):
        one = sum(p.numel() for p in LlamaForSequenceClassification(base).parameters())
        config = EnsembleRewardModel.config_class
        return {
            name: sum(p.numel() for p in EnsembleRewardModel(config(base, MEMBERS, name)).parameters()) / one
            for name in ARMS[1:]
        }


def peaks(args: BenchArguments) -> dict[str, Any]:
    """Bytes that scoring adds to a process: one stock reward model, five streamed, five loaded."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        members = [LlamaForSequenceClassification(shape(args.peak_hidden, 8)) for _ in range(MEMBERS)]
        members[0].save_pretrained(f"{folder}/one")
        ensemble = EnsembleRewardModel.from_members(members)
        for how in ("streamed", "whole"):
            ensemble.save_pretrained(f"{folder}/{how}")
        size = sum(p.nbytes for p in members[0].parameters())
        del members, ensemble
        command = [sys.executable, __file__, "--peak"]
        found = {
            how: int(
                subprocess.run([*command, how, folder], capture_output=True, text=True, check=True).stdout.split()[-1]
            )
            for how in ("one", "streamed", "whole")
        }
    return {"member_bytes": size, **found, "streamed_ratio": found["streamed"] / found["one"],
            "whole_ratio": found["whole"] / found["one"]}  # fmt: skip


def peak(how: str, folder: str) -> None:
    """Prints by how many bytes the resident size grew at most."""
    small = LlamaForSequenceClassification(shape(64, 1))  # what a first forward allocates is not the model's
    ids = torch.arange(3, 11).repeat(4, 1)
    ask = {"one": LlamaForSequenceClassification.from_pretrained, "streamed": EnsembleRewardModel.load_streamed,
           "whole": EnsembleRewardModel.from_pretrained}[how]  # fmt: skip
    with torch.no_grad():
        small(ids)
        before = highest()
        ask(f"{folder}/{how}").eval()(ids)
    print(highest() - before)


def highest() -> int:
    """The most bytes this process has had in memory (Linux; getrusage would count the parent's, too)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    arms, counted, peaked = measure(args), weights(), peaks(args)
    values = {
        "heads, training step": arms["heads"]["step"]["median"], "heads, scoring": arms["heads"]["score"]["median"],
        "heads, bytes of training": arms["heads"]["bytes_ratio"], "heads, weights": counted["heads"],
        "lora, weights": counted["lora"], "streamed, peak": peaked["streamed_ratio"],
    }  # fmt: skip
    table = Table(title=f"{MEMBERS} members in units of one reward model", title_justify="left")
    for column in ("backend", "training step", "scoring", "bytes of training", f"weights at {REAL['hidden_size']}"):
        table.add_column(column, justify="right")
    for name in ARMS[1:]:
        row = arms[name]
        times = [f"{row[w]['median']:.2f} ({row[w]['q25']:.2f} to {row[w]['q75']:.2f})" for w in ("step", "score")]
        table.add_row(name, *times, f"{row['bytes_ratio']:.2f}", f"{counted[name]:.3f}")
    Console().print(table)
    print(f"peak of scoring: streamed {peaked['streamed_ratio']:.2f}, loaded whole {peaked['whole_ratio']:.2f}")
    report = {
        "format": 1, "members": MEMBERS, "arms": arms, "weights": counted, "real": REAL, "peak": peaked,
        "bars": [{"what": w, "bar": b, "value": values[w], "met": values[w] <= b} for w, b in BARS.items()],
        "arguments": asdict(args), "load_average": os.getloadavg()[0], "platform": platform.platform(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {args.out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        peak(sys.argv[2], sys.argv[3])
    else:
        main()
