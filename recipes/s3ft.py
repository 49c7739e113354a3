"""S3FT on your own model and data, in one or several processes, resumable.

    accelerate launch recipes/s3ft.py --config recipes/s3ft.yaml \\
        --model_name_or_path DIR_OR_ID --dataset_name FILE_OR_ID
    torchrun --nproc_per_node 2 recipes/s3ft.py --config recipes/s3ft.yaml ...

Data: rows with `prompt` and `completion` (text, or lists of messages), or with `messages`. Other columns reach the
judge by name; `--prompt_column`/`--completion_column` rename. Every trl/transformers argument is taken as usual. On a
machine without an accelerator `use_cpu` is set and `bf16` is not, unless you say otherwise.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import torch
from datasets import Dataset, load_dataset, load_from_disk
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from hfgen.catalog import load
from hfgen.trainers import S3FTConfig, S3FTTrainer

FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class RecipeArguments:
    adapter: str | None = field(default=None, metadata={"help": "Installed hfgen adapter, e.g. svfit (`hfgen ls`)."})
    adapter_args: str | None = field(default=None, metadata={"help": "Its options as JSON, e.g. '{\"r\": 8}'."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts."})
    completion_column: str = field(default="completion", metadata={"help": "Column of the gold answers."})


def read_data(script: ScriptArguments, recipe: RecipeArguments, split: str) -> Dataset:
    """One split of a local file, a local directory or a hub dataset, with columns called prompt and completion."""
    if not script.dataset_name:
        raise ValueError("dataset_name is missing; give --dataset_name with a file, a directory or a hub id")
    if script.dataset_streaming:
        raise ValueError("dataset_streaming is true; S3FT needs the whole data, leave it out")
    path = Path(script.dataset_name)
    if path.is_file():
        if path.suffix not in FILES:
            raise ValueError(f"dataset_name is {path}; give one of {', '.join(FILES)}, a directory or a hub id")
        dataset = load_dataset(FILES[path.suffix], data_files=str(path), split="train")
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # Dataset.save_to_disk
        dataset = load_from_disk(str(path))
        dataset = dataset if isinstance(dataset, Dataset) else dataset[split]
    else:
        dataset = load_dataset(script.dataset_name, name=script.dataset_config, split=split)
    for column, name in ((recipe.prompt_column, "prompt"), (recipe.completion_column, "completion")):
        if column != name:
            if column not in dataset.column_names or name in dataset.column_names:
                raise ValueError(f"column {column!r} cannot become {name!r}; the data has {dataset.column_names}")
            dataset = dataset.rename_column(column, name)
    return dataset


def from_file(spec: str | None) -> Callable | None:
    """The function of `path/to/file.py:function`; None for anything else (a judge's name goes through the config)."""
    path, _, name = (spec or "").rpartition(":")
    if not path.endswith(".py"):
        return None
    if not Path(path).is_file():
        raise ValueError(f"{spec!r} names no file; give path/to/file.py:function or an installed name")
    module = ModuleType(Path(path).stem)
    SourceFileLoader(module.__name__, path).exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{path} has no function {name!r}; define it or name another")
    return getattr(module, name)


def adapter_config(recipe: RecipeArguments, model_args: ModelConfig):
    """A PeftConfig: of `--adapter`, or trl's LoRA with `--use_peft`, or None to train all weights."""
    if recipe.adapter is None:
        if recipe.adapter_args is not None:
            raise ValueError("adapter_args is given without adapter; name one with --adapter")
        return get_peft_config(model_args)
    if model_args.use_peft:
        raise ValueError("--adapter and --use_peft are both given; --use_peft is trl's LoRA, choose one")
    try:
        options = json.loads(recipe.adapter_args or "{}")
        if not isinstance(options, dict):
            raise ValueError("not an object")
    except ValueError as exc:
        raise ValueError(f"adapter_args is {recipe.adapter_args!r}; give a JSON object such as '{{\"r\": 8}}'") from exc
    return load(recipe.adapter, kind="adapters")(**{"task_type": "CAUSAL_LM", **options})


def main() -> None:
    parser = TrlParser((ScriptArguments, S3FTConfig, ModelConfig, RecipeArguments))
    if not torch.accelerator.is_available():
        parser.set_defaults_with_config(use_cpu=True, bf16=False)
    script, args, model_args, recipe = parser.parse_args_and_config()
    if not model_args.model_name_or_path:
        raise ValueError("model_name_or_path is missing; give --model_name_or_path with a directory or a hub id")
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    judge, paraphraser = from_file(args.judge), from_file(args.paraphraser)
    trainer = S3FTTrainer(
        model_args.model_name_or_path,
        args=args,
        train_dataset=read_data(script, recipe, script.dataset_train_split),
        eval_dataset=read_data(script, recipe, script.dataset_test_split) if args.eval_strategy != "no" else None,
        judge=judge,
        paraphraser=paraphraser,
        peft_config=adapter_config(recipe, model_args),
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
