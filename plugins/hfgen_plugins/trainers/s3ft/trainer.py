"""S3FTTrainer: builds the S3FT data with the initial model, then is trl's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from trl import SFTTrainer
from trl.trainer.utils import create_model_from_path

from .config import S3FTConfig
from .data import COLUMNS, build_s3ft_dataset, check_dataset, load_tokenizer

if TYPE_CHECKING:
    from hfgen.kit.judging import Judge, Paraphraser


class S3FTTrainer(SFTTrainer):
    """Selective Self-to-Supervised Fine-Tuning. Takes everything `SFTTrainer` takes, and a judge and a paraphraser.

    The data are built once, before any adapter is put on, and kept in `args.s3ft_cache_dir`: a run that resumes reads
    them. They stay on the trainer as `s3ft_dataset`. The loss is SFTTrainer's own; packing works as it does there.
    Logs `s3ft/frac_self`, `s3ft/frac_paraphrase`, `s3ft/frac_gold` and `s3ft/logp_gain` (mean over rows of
    log p(target) - log p(gold) under the initial model, nats per sequence) once, when training starts; with the ablation
    `drop_failures` also `s3ft/frac_dropped`, the share of given rows that are left out.

    Args:
        model: A path or hub id, a model, or a PeftModel (its adapters are disabled while the data are built).
        args: Settings; None takes S3FTConfig's defaults.
        train_dataset: Rows for `build_s3ft_dataset`, or data it gave, which are used as they are.
        judge: Name or callable; None takes `args.judge`.
        paraphraser: Name, callable, object with `.prompt`, or `"none"`; None takes `args.paraphraser`.
        processing_class: The tokenizer; None loads the model's own.
        peft_config: As in SFTTrainer.
        quantization_config: As in SFTTrainer.
        **kwargs: As in SFTTrainer (eval_dataset, callbacks, optimizers, ...).

    Raises:
        TypeError, ValueError: as `build_s3ft_dataset`, or a setting that the method cannot work with.
    """

    _tag_names = ["trl", "s3ft", "hfgen"]
    _name = "S3FT"
    _paper = {
        "title": "Selective Self-to-Supervised Fine-Tuning for Generalization in Large Language Models",
        "id": "2502.08130",
    }
    # SFTTrainer.compute_loss divides by the tokens of the whole accumulation window (and all ranks); see __init__.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: S3FTConfig | None = None,
        *,
        train_dataset: Dataset | None = None,
        judge: str | Judge | None = None,
        paraphraser: str | Paraphraser | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else S3FTConfig(f"{Path(_name(model)).name}-S3FT")
        train_dataset, built = _check(args, train_dataset, kwargs)
        set_seed(args.seed)
        init_kwargs = args.model_init_kwargs
        if isinstance(model, str):
            model = _load(model, args, quantization_config)
            # the model is made, so neither goes to SFTTrainer, which would warn that it is ignored
            args.model_init_kwargs = quantization_config = None
        tokenizer = processing_class if processing_class is not None else load_tokenizer(model)
        self.s3ft_dataset, self.rows_given = train_dataset, len(train_dataset)
        if not built:
            _set_tokens(tokenizer, args)
            if not hasattr(model, "hf_device_map") and not getattr(model, "is_quantized", False):
                model.to(args.device)
            self.s3ft_dataset = build_s3ft_dataset(model, train_dataset, judge, paraphraser, tokenizer, args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.s3ft_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            quantization_config=quantization_config,
            **kwargs,
        )
        args.model_init_kwargs = init_kwargs
        # Trainer counts the window's tokens only if the model takes loss keywords or a compute_loss_func is given;
        # without the count SFTTrainer gives the mean of the micro-batch, which Trainer must divide.
        self.loss_is_scaled_for_ga = bool(self.model_accepts_loss_kwargs) or self.compute_loss_func is not None
        self.add_callback(_LogSources(self))


class _LogSources(TrainerCallback):
    """Logs what the data are made of when training starts (not again when it resumes: the log is in the checkpoint)."""

    def __init__(self, trainer: S3FTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: S3FTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 0:
            metrics, kept = source_metrics(self.trainer.s3ft_dataset), len(self.trainer.s3ft_dataset)
            if args.drop_failures:
                metrics["s3ft/frac_dropped"] = 1 - kept / self.trainer.rows_given
            self.trainer.log(metrics)


def source_metrics(dataset: Dataset) -> dict[str, float]:
    """Shares of the three sources in [0, 1], and the mean of logp_target - logp_gold in nats per sequence."""
    sources = np.array(dataset["source"])
    gain = np.mean(np.array(dataset["logp_target"]) - np.array(dataset["logp_gold"]))
    shares = {f"s3ft/frac_{s}": float(np.mean(sources == s)) for s in ("self", "paraphrase", "gold")}
    return shares | {"s3ft/logp_gain": float(gain)}


def _name(model: Any) -> str:
    return model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "") or "model"


def _check(args: Any, train_dataset: Any, kwargs: dict[str, Any]) -> tuple[Dataset, bool]:
    """Raise on what the method cannot work with; `train_dataset`, and whether it is built data already."""
    if not isinstance(args, S3FTConfig):
        raise TypeError(f"args is {type(args).__name__}; pass an S3FTConfig (every field of SFTConfig is in it)")
    check_dataset(train_dataset)
    built = set(COLUMNS) <= set(train_dataset.column_names)
    if kwargs.get("formatting_func") is not None:
        raise ValueError(
            "formatting_func is given, which makes plain text; S3FT needs prompt and completion, leave it out"
        )
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3 and not built:
        raise ValueError(
            "DeepSpeed ZeRO-3 splits the weights, so answers cannot be generated here; call build_s3ft_dataset in a "
            "run without it and pass its result as train_dataset"
        )
    return train_dataset, built


def _load(path: str, args: S3FTConfig, quantization_config: Any) -> PreTrainedModel:
    """The model as SFTTrainer loads it from a path."""
    options = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.world_size > 1:  # one copy per process: "auto" would spread each over all devices
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(path, **options)


def _set_tokens(tokenizer: PreTrainedTokenizerBase, args: S3FTConfig) -> None:
    """Give the tokenizer the EOS and chat template SFTTrainer will give it, so that M0 is asked as it is trained."""
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise ValueError(
                f"eos_token is {args.eos_token!r}, which the tokenizer does not know; give one of its tokens"
            )
        tokenizer.eos_token = args.eos_token
    if args.chat_template_path is not None:
        path = Path(args.chat_template_path)
        if not path.is_file() or path.suffix not in (".jinja", ".j2"):
            raise ValueError(
                f"chat_template_path is {args.chat_template_path!r}; S3FT takes a .jinja file here, and a template of "
                "another tokenizer through trl.clone_chat_template before the trainer is made"
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")


def example(output_dir: str) -> dict[str, Any]:
    """Keyword arguments of an S3FTTrainer on the sandbox: 8 rows, 4 steps (the conformance kit runs it)."""
    from hfgen import sandbox

    task = sandbox.tasks.D
    return {
        "model": sandbox.load_model(),
        "processing_class": sandbox.load_tokenizer(),
        "args": S3FTConfig(
            output_dir, max_steps=4, per_device_train_batch_size=2, s3ft_batch_size=4, s3ft_max_new_tokens=24,
            logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        ),
        "train_dataset": Dataset.from_list(task.rows(task.prompts[:8])),
        "judge": task.judge,
        "paraphraser": sandbox.tasks.oracle_paraphraser,
    }  # fmt: skip
