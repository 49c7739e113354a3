"""Supervised fine-tuning with any installed adapter, quantizer and callbacks by name, through the stock SFTTrainer.

    python recipes/sft.py --config recipes/sft.yaml            # the embedded tiny model and task, on a CPU
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/sft.py --config recipes/sft.yaml \\
        --model_name_or_path DIR_OR_ID --dataset_name FILE_OR_ID --adapter svfit --adapter_args '{"r": 64}' \\
        --quantizer easyquant --quantizer_args '{"bits": 4}' --callbacks hyperfit \\
        --callback_args '{"hyperfit": {"stop_loss": 0.05}}'

Names are those of `hfgen ls`; `--adapter` also takes peft's own (lora, ia3, ...). All names and options are checked
before anything is loaded. Data: a .json, .jsonl, .csv, .parquet or .txt file, a directory or a hub id, with rows of
`prompt` and `completion`, of `messages`, or of `text`. Every trl/transformers argument is taken as usual. On a machine
without an accelerator `use_cpu` is set and `bf16` is not, unless you say otherwise. Written to `output_dir`: the
adapter (or the model), checkpoints, train_results.json, eval_results.json.
"""

import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset, load_from_disk
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from hfgen import catalog, sandbox

FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
# The new process of the reload check: peft, transformers and what they find by themselves.
RELOAD = """
import json, sys
import torch
from pathlib import Path
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
assert not any(name.partition(".")[0] == "hfgen" for name in sys.modules), "hfgen was imported"
folder, options, file = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
if (Path(folder) / "adapter_config.json").is_file():
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **options), folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
with torch.no_grad():
    save_file({"logits": model.eval()(input_ids=load_file(file)["input_ids"]).logits.float()}, file)
"""


@dataclass
class RecipeArguments:
    adapter: str | None = field(default=None, metadata={"help": "An installed adapter or one of peft's, e.g. svfit."})
    adapter_args: dict | str | None = field(default=None, metadata={"help": "Its options as JSON, e.g. '{\"r\": 64}'."})
    quantizer: str | None = field(default=None, metadata={"help": "An installed quantizer, e.g. easyquant."})
    quantizer_args: dict | str | None = field(default=None, metadata={"help": "Its options as JSON."})
    callbacks: list[str] = field(default_factory=list, metadata={"help": "Installed callbacks, e.g. hyperfit."})
    callback_args: dict | str | None = field(default=None, metadata={"help": "JSON: {name: {option: value}}."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column that becomes prompt."})
    completion_column: str = field(default="completion", metadata={"help": "Column that becomes completion."})
    eval_rows: int = field(default=0, metadata={"help": "Rows drawn for evaluation where the data has no such split."})
    check_reload: bool = field(default=True, metadata={"help": "Load the result in a new process, compare logits."})


# --- names and options, before anything is loaded -----------------------------------------------------------------
def hint(name: str, names: Collection[str]) -> str:
    close = get_close_matches(name.lower(), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"give one of {', '.join(sorted(names))}"


def options_of(owner: str, given: Any) -> dict[str, Any]:
    """The options as a dict; None means none. Raises ValueError for anything but an object."""
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        found = given
    if not isinstance(found, dict | None):
        raise ValueError(f"{owner} is {given!r}; give a JSON object such as '{{\"r\": 8}}'")
    return found or {}


def construct(owner: str, cls: Any, options: dict[str, Any]) -> Any:
    """`cls(**options)`. Raises ValueError for an option it does not take or needs; its own errors come through."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = [p.name for p in parameters]
        for name in options:
            if name not in names:
                raise ValueError(f"{owner} has {name!r}, which {cls.__name__} does not take; {hint(name, names)}")
    for p in parameters:
        if p.default is p.empty and p.name not in options and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise ValueError(f"{owner} lacks {p.name!r}, which {cls.__name__} needs; add it")
    return cls(**options)


def adapter_config(recipe: RecipeArguments, model_args: ModelConfig) -> Any:
    """A PeftConfig: of `--adapter`, or trl's LoRA with `--use_peft`, or None to train all weights."""
    name, options = recipe.adapter, options_of("adapter_args", recipe.adapter_args)
    if name is None:
        if options:
            raise ValueError("adapter_args is given without adapter; name one with --adapter")
        return get_peft_config(model_args)
    if model_args.use_peft:
        raise ValueError("--adapter and --use_peft are both given; --use_peft is trl's LoRA, choose one")
    installed = {plugin.name for plugin in catalog.plugins("adapters")}
    own = {str.lower(key): key for key in PEFT_TYPE_TO_CONFIG_MAPPING}
    if name in installed:
        cls = catalog.load(name, "adapters")
    elif name in own:
        cls = PEFT_TYPE_TO_CONFIG_MAPPING[own[name]]
    else:
        raise ValueError(f"adapter is {name!r}, which neither hfgen nor peft has; {hint(name, installed | set(own))}")
    return construct("adapter_args", cls, {"task_type": "CAUSAL_LM", **options})


def quantization_config(recipe: RecipeArguments, model_args: ModelConfig) -> Any:
    """The config of `--quantizer`, or trl's bitsandbytes with `--load_in_4bit` and `--load_in_8bit`, or None."""
    options = options_of("quantizer_args", recipe.quantizer_args)
    if recipe.quantizer is None:
        if options:
            raise ValueError("quantizer_args is given without quantizer; name one with --quantizer")
        return get_quantization_config(model_args)
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("--quantizer and --load_in_4bit or --load_in_8bit are both given; choose one")
    return construct("quantizer_args", catalog.load(recipe.quantizer, "quantizers"), options)


def make_callbacks(recipe: RecipeArguments) -> list[Any]:
    """The callbacks of `--callbacks`, each with its own options."""
    given = options_of("callback_args", recipe.callback_args)
    for name in recipe.callbacks:
        if recipe.callbacks.count(name) > 1:
            raise ValueError(f"callbacks names {name!r} twice; name it once")
    classes = {name: catalog.load(name, "callbacks") for name in recipe.callbacks}
    for name in given:
        if name not in classes:
            raise ValueError(f"callback_args has {name!r}, which callbacks does not name; add it there or leave it out")
    owners = {name: f"callback_args.{name}" for name in classes}
    return [construct(owners[n], cls, options_of(owners[n], given.get(n))) for n, cls in classes.items()]


# --- the data -----------------------------------------------------------------------------------------------------
def read_splits(script: ScriptArguments) -> dict[str, Any]:
    """The splits of a local file, a local directory, a hub dataset, or the sandbox's task where none is named."""
    if script.dataset_name is None:
        prompts = sandbox.tasks.D.split()
        rows = [Dataset.from_list(sandbox.tasks.D.rows(part)).remove_columns(["id", "gold"]) for part in prompts]
        return dict(zip((script.dataset_train_split, script.dataset_test_split), rows, strict=True))
    path = Path(script.dataset_name)
    if path.is_file():
        if path.suffix not in FILES:
            raise ValueError(f"dataset_name is {path}; give one of {', '.join(FILES)}, a directory or a hub id")
        files = {script.dataset_train_split: str(path)}
        return load_dataset(FILES[path.suffix], data_files=files, streaming=script.dataset_streaming)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # Dataset.save_to_disk
        found = load_from_disk(str(path))
        return {script.dataset_train_split: found} if isinstance(found, Dataset) else found
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def read_data(script: ScriptArguments, recipe: RecipeArguments, args: SFTConfig) -> tuple[Any, Any]:
    """Training rows, and rows for evaluation or None, in one of the forms SFTTrainer knows."""
    data = read_splits(script)
    if script.dataset_train_split not in data:
        raise ValueError(f"dataset_train_split is {script.dataset_train_split!r}; the data has {', '.join(data)}")
    train, test = data[script.dataset_train_split], data.get(script.dataset_test_split)
    if recipe.eval_rows:
        if test is not None or not isinstance(train, Dataset):
            raise ValueError(
                f"eval_rows is {recipe.eval_rows}, but the data has a split {script.dataset_test_split!r} or is a "
                "stream; leave eval_rows out, or name another dataset_test_split"
            )
        train, test = train.train_test_split(recipe.eval_rows, seed=args.seed).values()
    if args.eval_strategy != "no" and test is None:
        raise ValueError(
            f"eval_strategy is {args.eval_strategy.value!r}, but the data has no split {script.dataset_test_split!r}; "
            "give --eval_rows, or --dataset_test_split"
        )
    return with_columns(train, recipe, args), None if test is None else with_columns(test, recipe, args)


def with_columns(dataset: Any, recipe: RecipeArguments, args: SFTConfig) -> Any:
    """The rows with columns called prompt and completion, or of another form that SFTTrainer takes as it is."""
    for column, name in ((recipe.prompt_column, "prompt"), (recipe.completion_column, "completion")):
        if column != name:
            if column not in (dataset.column_names or [column]) or name in (dataset.column_names or []):
                raise ValueError(f"column {column!r} cannot become {name!r}; the data has {dataset.column_names}")
            dataset = dataset.rename_column(column, name)
    columns = set(dataset.column_names or ["text"])  # a stream may not know them
    forms = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {"input_ids"}, {args.dataset_text_field})
    if not any(form <= columns for form in forms):
        raise ValueError(
            f"the data has columns {', '.join(sorted(columns))}; name prompts and answers with --prompt_column and "
            "--completion_column, or plain text with --dataset_text_field"
        )
    return dataset


# --- what came of it ----------------------------------------------------------------------------------------------
def describe(trainer: SFTTrainer, recipe: RecipeArguments, model_args: ModelConfig) -> int:
    """Print which methods are used and how much they train; the number of trained parameters."""
    kinds = {"adapters": [recipe.adapter] if recipe.adapter else [], "callbacks": recipe.callbacks}
    kinds |= {"quantizers": [recipe.quantizer] if recipe.quantizer else []}
    for kind, names in kinds.items():
        known = {plugin.name: plugin.provenance for plugin in catalog.plugins(kind)}
        for name in names:
            trainer.accelerator.print(f"{kind}: {name} ({known.get(name, 'of peft itself')})")
    parameters = list(trainer.model.parameters())
    trained = [getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad]  # ZeRO-3 empties the others
    size = sum(tensor.nbytes for tensor in (*parameters, *trainer.model.buffers()))
    what = "an adapter" if recipe.adapter or model_args.use_peft else "the model itself"
    trainer.accelerator.print(
        f"trained: {what}, {sum(trained):,} parameters in {len(trained)} tensors; the whole takes {size:,} bytes here"
    )
    return sum(trained)


def reload_deviation(trainer: SFTTrainer, options: dict[str, Any]) -> float | None:
    """Largest change of a training row's logits after a reload on the CPU of a new process; on rank 0, else None.

    The new process runs `RELOAD` above, which imports torch, peft, safetensors and transformers only.
    """
    ids = torch.tensor([next(iter(trainer.train_dataset))["input_ids"][:256]])
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    with torch.no_grad():  # on every rank: the weights may be sharded
        trained = model(input_ids=ids.to(trainer.args.device)).logits.float().cpu()
    if not trainer.is_world_process_zero():
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "reload.safetensors")
        save_file({"input_ids": ids}, file)
        subprocess.run([sys.executable, "-c", RELOAD, trainer.args.output_dir, json.dumps(options), file], check=True)
        return float((load_file(file)["logits"] - trained).abs().max())


def main() -> None:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, RecipeArguments))
    if not torch.accelerator.is_available():
        parser.set_defaults_with_config(use_cpu=True, bf16=False)
    script, args, model_args, recipe = parser.parse_args_and_config()
    peft_config = adapter_config(recipe, model_args)
    quantization = quantization_config(recipe, model_args)
    callbacks = make_callbacks(recipe)
    if (model_args.model_name_or_path is None) != (script.dataset_name is None):
        missing = "model_name_or_path" if model_args.model_name_or_path is None else "dataset_name"
        raise ValueError(f"{missing} is missing; give --{missing} too (neither: the sandbox's model and task)")
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    train, test = read_data(script, recipe, args)
    trainer = SFTTrainer(
        model_args.model_name_or_path or str(sandbox.path()),
        args=args,
        train_dataset=train,
        eval_dataset=test if args.eval_strategy != "no" or callbacks else None,  # a callback may look at it
        callbacks=callbacks,
        peft_config=peft_config,
        quantization_config=quantization,
    )
    for callback in callbacks:
        if hasattr(callback, "attach"):  # the host gives a callback no trainer
            callback.attach(trainer)
    trained = describe(trainer, recipe, model_args)
    resume = args.resume_from_checkpoint
    if str(resume).lower() in ("true", "last"):  # the last checkpoint, if there is one yet
        resume = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        trainer.accelerator.print(f"resuming from {resume}" if resume else "no checkpoint yet: starting at step 0")
    metrics = trainer.train(resume_from_checkpoint=resume).metrics | {"trained_parameters": trained}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_model()
    trainer.accelerator.print(f"saved to {args.output_dir}")
    options = {"dtype": model_args.dtype, "trust_remote_code": args.trust_remote_code}
    if peft_config is not None:  # of the base model, which is not what was saved
        options["revision"] = model_args.model_revision
    if peft_config is not None and quantization is not None:
        options["quantization_config"] = json.loads(json.dumps(quantization.to_dict()))
        trainer.accelerator.print(f"load its base with quantization_config={options['quantization_config']}")
    if recipe.check_reload:
        deviation = reload_deviation(trainer, options)
        trainer.accelerator.print(f"reloaded in a new process: largest change of the logits {deviation}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    main()
