"""GRPO with an ensemble of reward models as its reward, which a policy finds harder to exploit than one of them.

    accelerate launch recipes/grpo_ensemble.py --config recipes/grpo_ensemble.yaml \\
        --model_name_or_path DIR_OR_ID --dataset_name FILE_OR_ID --reward_ensemble DIR
    python recipes/grpo_ensemble.py --config recipes/grpo_ensemble.yaml --model_name_or_path sandbox \\
        --dataset_name sandbox --reward_ensemble reward-ensemble --max_steps 50

The ensemble is what recipes/reward_ensemble.py saves. Data: rows with `prompt` (text, or a list of messages). Every
trl/transformers argument is taken as usual; for RLOO put RLOOConfig and RLOOTrainer in the places of GRPO's. On a machine
without an accelerator `use_cpu` is set and `bf16` is not, unless you say otherwise.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset, load_from_disk
from transformers.trainer_utils import get_last_checkpoint
from trl import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from hfgen import sandbox
from hfgen.trainers import EnsembleReward

FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class RecipeArguments:
    reward_ensemble: str | None = field(default=None, metadata={"help": "Folder or hub id of the ensemble."})
    aggregation: str | None = field(default=None, metadata={"help": "mean, wco or uwo; left out: as it was saved."})
    uwo_lambda: float | None = field(default=None, metadata={"help": "Weight of the variance; left out: as saved."})
    reward_batch_size: int = field(default=16, metadata={"help": "Answers scored at once."})
    streamed: bool = field(
        default=False, metadata={"help": "Load each member when it scores and drop it after (backend separate)."}
    )


def read_data(script: ScriptArguments) -> Dataset:
    """The training split of the sandbox, a local file, a local directory or a hub dataset."""
    if not script.dataset_name:
        raise ValueError("dataset_name is missing; give --dataset_name with a file, a directory, a hub id, or sandbox")
    path, split = Path(script.dataset_name), script.dataset_train_split
    if script.dataset_name == "sandbox":
        dataset = Dataset.from_dict({"prompt": list(sandbox.tasks.D.prompts)})
    elif path.is_file():
        if path.suffix not in FILES:
            raise ValueError(f"dataset_name is {path}; give one of {', '.join(FILES)}, a directory or a hub id")
        dataset = load_dataset(FILES[path.suffix], data_files=str(path), split="train")
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # Dataset.save_to_disk
        dataset = load_from_disk(str(path))
        dataset = dataset if isinstance(dataset, Dataset) else dataset[split]
    else:
        dataset = load_dataset(script.dataset_name, name=script.dataset_config, split=split)
    if "prompt" not in dataset.column_names:
        raise ValueError(f"the data has the columns {dataset.column_names}; GRPO needs prompt")
    return dataset


def main() -> None:
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig, RecipeArguments))
    if not torch.accelerator.is_available():
        parser.set_defaults_with_config(use_cpu=True, bf16=False)
    script, args, model_args, recipe = parser.parse_args_and_config()
    if not model_args.model_name_or_path:
        raise ValueError(
            "model_name_or_path is missing; give --model_name_or_path with a directory, a hub id or sandbox"
        )
    if not recipe.reward_ensemble:
        raise ValueError(
            "reward_ensemble is missing; give --reward_ensemble with what recipes/reward_ensemble.py saved"
        )
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    reward = EnsembleReward(
        recipe.reward_ensemble,
        batch_size=recipe.reward_batch_size,
        aggregation=recipe.aggregation,
        uwo_lambda=recipe.uwo_lambda,
        streamed=recipe.streamed,
    )
    path = model_args.model_name_or_path
    trainer = GRPOTrainer(
        str(sandbox.path()) if path == "sandbox" else path,
        args=args,
        reward_funcs=reward,
        train_dataset=read_data(script),
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    resume = args.resume_from_checkpoint
    if str(resume).lower() in ("true", "last"):  # the last checkpoint, if there is one yet
        resume = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        trainer.accelerator.print(f"resuming from {resume}" if resume else "no checkpoint yet: starting at step 0")
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.accelerator.print(f"saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main()
