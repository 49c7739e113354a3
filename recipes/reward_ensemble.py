"""An ensemble of reward models on your preference pairs: mean, worst case, or mean less variance.

    accelerate launch recipes/reward_ensemble.py --config recipes/reward_ensemble.yaml \\
        --model_name_or_path DIR_OR_ID --dataset_name FILE_OR_ID
    python recipes/reward_ensemble.py --config recipes/reward_ensemble.yaml --model_name_or_path sandbox \\
        --dataset_name sandbox --learning_rate 1e-3

Data: rows with `chosen` and `rejected` (text, or lists of messages), maybe `prompt` and `margin`. A part of them is
kept from training: its answers standardise the members. Every trl/transformers argument is taken as usual. On a machine
without an accelerator `use_cpu` is set and `bf16` is not, unless you say otherwise. Use the result with
recipes/grpo_ensemble.py.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset, load_from_disk
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, ScriptArguments, TrlParser

from hfgen import sandbox
from hfgen.trainers import EnsembleRewardConfig, EnsembleRewardTrainer

FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class RecipeArguments:
    calibration_share: float = field(
        default=0.1, metadata={"help": "Share of the pairs that standardises the members and is not trained on."}
    )


def read_data(script: ScriptArguments, split: str) -> Dataset:
    """One split of the sandbox, a local file, a local directory or a hub dataset."""
    if not script.dataset_name:
        raise ValueError("dataset_name is missing; give --dataset_name with a file, a directory, a hub id, or sandbox")
    if script.dataset_streaming:
        raise ValueError("dataset_streaming is true; members take the rows in several orders, leave it out")
    path = Path(script.dataset_name)
    if script.dataset_name == "sandbox":
        return Dataset.from_list(sandbox_pairs())
    if path.is_file():
        if path.suffix not in FILES:
            raise ValueError(f"dataset_name is {path}; give one of {', '.join(FILES)}, a directory or a hub id")
        return load_dataset(FILES[path.suffix], data_files=str(path), split="train")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # Dataset.save_to_disk
        dataset = load_from_disk(str(path))
        return dataset if isinstance(dataset, Dataset) else dataset[split]
    return load_dataset(script.dataset_name, name=script.dataset_config, split=split)


def sandbox_pairs(count: int = 600) -> list[dict[str, str]]:
    """Three digits with the sum that the prompt asks for, against three with another sum."""
    draw, rows = random.Random(0), []
    while len(rows) < count:
        total, other = draw.choice(sandbox.tasks.SUMS), draw.choice(sandbox.tasks.SUMS)
        if total != other:
            good, bad = (sandbox.tasks.plain(draw.choice(sandbox.tasks.triples(t))) for t in (total, other))
            rows.append({"prompt": f"D{total:02d}=", "chosen": good, "rejected": bad})
    return rows


def split_data(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Pairs to train on, and pairs to calibrate on (None when the share is 0)."""
    if not 0 <= share < 1:
        raise ValueError(f"calibration_share is {share}; give a number from 0 up to, not including, 1")
    if not share:
        return dataset, None
    if len(dataset) < 2:
        raise ValueError(
            f"there are {len(dataset)} pairs, too few to keep some for calibration; set calibration_share 0"
        )
    parts = dataset.train_test_split(test_size=max(1, round(share * len(dataset))), seed=seed)
    return parts["train"], parts["test"]


def main() -> None:
    parser = TrlParser((ScriptArguments, EnsembleRewardConfig, ModelConfig, RecipeArguments))
    if not torch.accelerator.is_available():
        parser.set_defaults_with_config(use_cpu=True, bf16=False)
    script, args, model_args, recipe = parser.parse_args_and_config()
    if not model_args.model_name_or_path:
        raise ValueError(
            "model_name_or_path is missing; give --model_name_or_path with a directory, a hub id or sandbox"
        )
    if model_args.use_peft:
        raise ValueError("use_peft is true; adapters for every member are --backend lora")
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    path = model_args.model_name_or_path
    train, calibration = split_data(read_data(script, script.dataset_train_split), recipe.calibration_share, args.seed)
    trainer = EnsembleRewardTrainer(
        str(sandbox.path()) if path == "sandbox" else path,
        args=args,
        train_dataset=train,
        eval_dataset=read_data(script, script.dataset_test_split) if args.eval_strategy != "no" else None,
        calibration_dataset=calibration,
    )
    resume = args.resume_from_checkpoint
    if str(resume).lower() in ("true", "last"):  # the last checkpoint, if there is one yet
        resume = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        trainer.accelerator.print(f"resuming from {resume}" if resume else "no checkpoint yet: starting at step 0")
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.create_model_card(model_name=Path(args.output_dir).name, dataset_name=script.dataset_name)
    trainer.accelerator.print(f"saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main()
