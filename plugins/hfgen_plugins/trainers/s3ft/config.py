"""The settings of S3FT on top of trl's SFTConfig."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import SFTConfig

from hfgen.kit import checks


@dataclass
class S3FTConfig(SFTConfig):
    """`SFTConfig` with what S3FT's data builder needs. Differs from it in learning rate (1e-4) and epochs (2).

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or a setting of SFTConfig contradicts the method.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "judge_args", "paraphraser_args", "s3ft_vllm_args"]

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Total number of training epochs to perform."})
    completion_only_loss: bool | None = field(
        default=True, metadata={"help": "Loss on the completion only: the method needs it, false is refused."}
    )
    judge: str | None = field(
        default=None,
        metadata={
            "help": "Installed judge of answers (`hfgen ls`): exact, numeric, f1, llm, code. The trainer's judge= wins."
        },
    )
    judge_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the named judge, as JSON, e.g. '{\"tolerance\": 0.01}'."}
    )
    judge_threshold: float = field(
        default=0.5, metadata={"help": "A judge's score from here on means correct (True counts 1, False 0)."}
    )
    paraphraser: str | None = field(
        default="self",
        metadata={"help": "Who rewrites the gold answer: self (the model, by instruction), an installed one, or none."},
    )
    paraphraser_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Options of the named paraphraser, as JSON, e.g. \'{"template": "..."}\'.'}
    )
    s3ft_max_new_tokens: int = field(
        default=512, metadata={"help": "Longest generated answer in tokens; one that is cut off counts as wrong."}
    )
    s3ft_batch_size: int = field(
        default=16,
        metadata={"help": "Rows per block: generated together, by one process, and the unit of resumption."},
    )
    num_candidates: int = field(
        default=1,
        metadata={
            "help": "Own answers tried per row. Above 1 (sampled, first correct kept) is not the paper's method."
        },
    )
    paraphrase_attempts: int = field(
        default=1, metadata={"help": "Rewritings tried per row; the first is greedy, later ones are sampled."}
    )
    s3ft_seed: int = field(default=0, metadata={"help": "Seed of sampled candidates; greedy answers do not use it."})
    s3ft_vllm: bool = field(
        default=False,
        metadata={"help": "Generate the answers with vLLM, which must be installed; in one process, without adapters."},
    )
    s3ft_vllm_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Options of vllm.LLM, as JSON, e.g. \'{"gpu_memory_utilization": 0.4, "max_model_len": 2048}\'.'
        },
    )
    no_paraphrase: bool = field(
        default=False,
        metadata={"help": "Ablation: gold at once where the model's own answer is wrong, whatever the paraphraser."},
    )
    drop_failures: bool = field(
        default=False,
        metadata={
            "help": "Ablation: rows without a right answer are left out instead of trained on gold. With no_paraphrase "
            "this is rejection-sampling fine-tuning (RFT, STaR)."
        },
    )
    string_judge: bool = field(
        default=False,
        metadata={
            "help": "Ablation: right is what equals the gold answer as a string (white space aside), whatever the judge."
        },
    )
    s3ft_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the built data and of what an interrupted build had finished. Default: "
            "_s3ft_data in output_dir (the underscore keeps push_to_hub from uploading it)."
        },
    )

    def __post_init__(self) -> None:
        for name in ("s3ft_max_new_tokens", "s3ft_batch_size", "num_candidates", "paraphrase_attempts"):
            checks.integer("S3FTConfig", name, getattr(self, name), low=1)
        checks.integer("S3FTConfig", "s3ft_seed", self.s3ft_seed, low=0)
        checks.number("S3FTConfig", "judge_threshold", self.judge_threshold)
        for name in ("s3ft_vllm", "no_paraphrase", "drop_failures", "string_judge"):
            checks.boolean("S3FTConfig", name, getattr(self, name))
        if self.no_paraphrase and self.paraphrase_attempts > 1:
            raise ValueError(
                f"S3FTConfig.paraphrase_attempts is {self.paraphrase_attempts} and no_paraphrase is true; leave out one"
            )
        for name in ("judge", "paraphraser"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(
                    f"S3FTConfig.{name} is {getattr(self, name)!r}; give a name here, an object to S3FTTrainer({name}=)"
                )
        if not isinstance(self.s3ft_cache_dir, str | Path | None):
            raise TypeError(f"S3FTConfig.s3ft_cache_dir is {self.s3ft_cache_dir!r}; give a path")
        if self.completion_only_loss is not True:
            raise ValueError(
                f"S3FTConfig.completion_only_loss is {self.completion_only_loss}; S3FT trains on the completion only, "
                "leave it true"
            )
        if isinstance(self.dataset_kwargs, dict) and self.dataset_kwargs.get("skip_prepare_dataset"):
            raise ValueError(
                "S3FTConfig.dataset_kwargs has skip_prepare_dataset; S3FT makes text that must be tokenised"
            )
        super().__post_init__()
        if self.s3ft_vllm_args is not None and not self.s3ft_vllm:
            raise ValueError(f"S3FTConfig.s3ft_vllm_args is {self.s3ft_vllm_args!r}, but s3ft_vllm is false; set it")
        for name in ("judge_args", "paraphraser_args", "s3ft_vllm_args"):
            if not isinstance(getattr(self, name), dict | None):
                raise TypeError(f"S3FTConfig.{name} is {getattr(self, name)!r}; give options as a JSON object")
