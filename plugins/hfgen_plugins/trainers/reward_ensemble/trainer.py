"""EnsembleRewardTrainer: trl's RewardTrainer on K members at once, each with its own start and order of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, set_seed
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardTrainer
from trl.trainer.utils import create_model_from_path

from .config import ENSEMBLE_FIELDS, EnsembleRewardConfig
from .data import EnsembleCollator, MemberOrders, check_dataset, flip_labels
from .modeling import EnsembleRewardModel
from .scoring import preference_loss, score_penalty


class EnsembleRewardTrainer(RewardTrainer):
    """Trains an `EnsembleRewardModel`. Takes what `RewardTrainer` takes, and a calibration set.

    Members differ by the seed of head (and adapter), `args.seed` + k, and by the order of rows; those of backend
    `heads` by the head only. The loss of member k is -log sigma(r+ - r- - margin) + score_l2 (r+^2 + r-^2) / 2, mean
    over its pairs. `separate` and `lora` have no weight in common: each member gets its own gradient and is clipped by
    itself, as if it were alone (with FSDP or DeepSpeed all are clipped together); the logged loss is the mean over
    members. `heads` trains on the mean.

    Logs, besides RewardTrainer's (over all members): `ensemble/preference_loss`, `ensemble/score_l2` (without its
    weight), in evaluation `ensemble/std` (over members, raw scores) and `ensemble/accuracy` (of the mean of members).

    Args:
        model: A path or hub id, a model (its backbone is taken), or an EnsembleRewardModel to go on with.
        args: Settings; None takes EnsembleRewardConfig's defaults.
        train_dataset: Preference pairs in any form RewardTrainer takes, not streamed.
        eval_dataset: As in RewardTrainer.
        calibration_dataset: Pairs no member is trained on; after training their answers standardise the members.
        processing_class: The tokenizer; None loads the model's own.
        **kwargs: As in RewardTrainer (callbacks, optimizers, ...).

    Raises:
        TypeError, ValueError: data or settings that the method cannot work with.
    """

    _tag_names = ["trl", "reward-trainer", "reward-ensemble", "hfgen"]
    _name = "Reward ensemble"
    _paper = {"title": "Reward Model Ensembles Help Mitigate Overoptimization", "id": "2310.02743"}
    train_dataset: Any
    _signature_columns: Any
    loss_is_scaled_for_ga = False  # compute_loss gives the mean over the micro-batch: Trainer divides by their number

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: EnsembleRewardConfig | None = None,
        *,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        calibration_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else EnsembleRewardConfig(f"{Path(_name(model)).name}-RewardEnsemble")
        _check(args, model, train_dataset, eval_dataset, calibration_dataset, kwargs)
        assert isinstance(train_dataset, Dataset)
        tokenizer = processing_class if processing_class is not None else _tokenizer(model, args)
        _check_tokenizer(tokenizer, args)
        set_seed(args.seed)
        ensemble = _ensemble(model, args)
        init_kwargs, args.model_init_kwargs = args.model_init_kwargs, None  # the model is made
        super().__init__(
            model=ensemble,
            args=args,
            data_collator=kwargs.pop("data_collator", None)
            or EnsembleCollator(tokenizer.pad_token_id, args.pad_to_multiple_of),
            train_dataset=flip_labels(train_dataset, args.label_noise, args.label_noise_seed),
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            **kwargs,
        )
        args.model_init_kwargs = init_kwargs
        self.calibration_dataset = calibration_dataset
        if calibration_dataset is not None:
            self.calibration_dataset = self._prepare_dataset(calibration_dataset, tokenizer, args, "calibration")
        if len(self.train_dataset) == 0:
            raise ValueError(
                f"every pair is longer than max_length ({args.max_length}); raise it or shorten the answers"
            )
        if args.backend != "heads":
            self.train_dataset = MemberOrders(self.train_dataset, args.num_members, args.seed, args.bootstrap)

    @property
    def ensemble(self) -> EnsembleRewardModel:
        """The model without what launchers wrap around it."""
        return self.accelerator.unwrap_model(self.model)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["chosen_ids", "rejected_ids", "margin", "members"]

    # --- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        mode = "train" if self.model.training else "eval"
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], aggregate=False)
        chosen, rejected = outputs.member_logits.chunk(2)  # (P, K)
        margin = inputs.get("margin")
        if margin is not None and margin.ndim == 1:
            margin = margin[:, None]
        preference, penalty = preference_loss(chosen, rejected, margin), score_penalty(chosen, rejected)
        losses = preference + self.args.score_l2 * penalty
        if self.args.center_rewards_coefficient is not None:
            losses = losses + self.args.center_rewards_coefficient * ((chosen + rejected) ** 2).mean(0)
        loss = losses.mean()
        if self.args.backend != "heads":  # the value of the mean, the gradient of the sum: a member's own, whatever K
            loss = loss.detach() + losses.sum() - losses.sum().detach()
        self._note(mode, inputs["attention_mask"], chosen.detach(), rejected.detach(), preference, penalty)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _note(
        self, mode: str, mask: Tensor, chosen: Tensor, rejected: Tensor, preference: Tensor, penalty: Tensor
    ) -> None:
        """Keep what `log` will average, over all processes."""
        gather, metrics = self.accelerator.gather_for_metrics, self._metrics[mode]
        if mode == "train":
            self._total_train_tokens += int(gather(mask.sum()).sum()) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        scores = self.accelerator.gather(torch.cat([chosen, rejected]))
        found = {"min_reward": scores.min(), "mean_reward": scores.mean(), "max_reward": scores.max()}
        means = {
            "accuracy": (chosen > rejected).float(), "margin": chosen - rejected, "ensemble/preference_loss": preference,
            "ensemble/score_l2": penalty,
        }  # fmt: skip
        if mode == "eval":  # in training the columns of separate and lora are other rows
            means["ensemble/std"] = torch.cat([chosen, rejected]).std(1, correction=0)
            means["ensemble/accuracy"] = (chosen.mean(1) > rejected.mean(1)).float()
        found |= {name: gather(value.mean()).mean() for name, value in means.items()}
        for name, value in found.items():
            metrics[name].append(value.item())

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip each member by itself where members have no weight in common; the norm of all of them together."""
        plain = self.accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if self.args.backend == "heads" or not plain:
            return super()._clip_grad_norm(model)
        norm = self.accelerator.clip_grad_norm_(model.parameters(), float("inf"))  # also unscales fp16 gradients, once
        named = [(f".{name}.", p) for name, p in model.named_parameters() if p.grad is not None]
        for k in range(self.args.num_members):
            marks = tuple(f".{part}.{k}." for part in ("backbones", "heads", "lora_A", "lora_B"))
            if self.args.backend == "lora":
                marks = marks[1:]
            own = [p for name, p in named if any(mark in name for mark in marks)]
            torch.nn.utils.clip_grad_norm_(own, self.args.max_grad_norm)
        return norm

    # --- calibration ------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """RewardTrainer.train, then the calibration, if there is a set for it."""
        result = super().train(*args, **kwargs)
        if self.calibration_dataset is not None:
            self.calibrate()
        return result

    def calibrate(self, dataset: Dataset | None = None) -> None:
        """Keep each member's mean and standard deviation over the answers of `dataset` in the model's config.

        Call it in every process. None takes `calibration_dataset`.
        """
        if dataset is None:
            dataset = self.calibration_dataset
        check_dataset("calibration_dataset", dataset)
        dataset = self._prepare_dataset(dataset, self.processing_class, self.args, "calibration")
        columns = dataset.select_columns(["chosen_ids", "rejected_ids"])
        loader = self.accelerator.prepare_data_loader(
            DataLoader(columns, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        )
        model = self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model
        training, found = model.training, []
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in loader:
                batch = self._prepare_inputs(batch)
                scores = model(**batch, aggregate=False).member_logits
                pairs = torch.stack(scores.chunk(2), dim=1)  # (P, 2, K): gather_for_metrics counts rows of the loader
                found.append(self.accelerator.gather_for_metrics(pairs).flatten(0, 1).cpu())
        model.train(training)
        self.ensemble.calibrate(torch.cat(found))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """trl's card, and how the ensemble is made, loaded and meant."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero():
            path.write_text(path.read_text(encoding="utf-8") + card_section(self.args, self.ensemble), encoding="utf-8")


_BACKENDS = {
    "separate": "full models trained side by side",
    "lora": "adapters and heads on one frozen backbone",
    "heads": "heads on one trained backbone. Its members share their features and disagree less on text unlike the "
    "training data than separate models do; their variance is a weak warning",
}


def card_section(args: EnsembleRewardConfig, model: EnsembleRewardModel) -> str:
    """The section "Reward ensemble" of a model card."""
    config = model.config
    calibrated = "no calibration" if config.calibration_mean is None else "members standardised on a calibration set"
    return f"""
## Reward ensemble

{config.num_members} members, backend `{config.backend}`: {_BACKENDS[config.backend]}.
Aggregation `{config.aggregation}` (uwo_lambda {config.uwo_lambda:g}), {calibrated}.
Label noise {args.label_noise:g}, score regulariser {args.score_l2:g}.
The pipeline above does not know the ensemble; load it with hfgen:

```python
from hfgen.trainers import EnsembleReward, EnsembleRewardModel

model = EnsembleRewardModel.from_pretrained(FOLDER)  # forward gives logits, member_logits, variance
reward = EnsembleReward(FOLDER)  # GRPOTrainer(reward_funcs=reward), or reward(prompts, completions)
```
"""


# --- checks -------------------------------------------------------------------------------------------------------


def _name(model: Any) -> str:
    return model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "") or "model"


def _check(
    args: Any, model: Any, train_dataset: Any, eval_dataset: Any, calibration_dataset: Any, kwargs: dict[str, Any]
) -> None:
    """Raise on what the method cannot work with, before anything is made."""
    if not isinstance(args, EnsembleRewardConfig):
        raise TypeError(f"args is {type(args).__name__}; pass an EnsembleRewardConfig (it has RewardConfig's fields)")
    if isinstance(model, PeftModel) or kwargs.get("peft_config") is not None:
        raise ValueError("a PeftModel or peft_config is given; adapters for every member are args.backend='lora'")
    if not isinstance(model, str | PreTrainedModel):
        raise TypeError(f"model is {type(model).__name__}; give a path, a hub id or a PreTrainedModel")
    if isinstance(model, EnsembleRewardModel):
        other = [n for n in ("num_members", "backend") if getattr(model.config, n) != getattr(args, n)]
        if other or model.sources is not None:
            what = f"{other[0]} {getattr(model.config, other[0])!r}" if other else "streamed members"
            raise ValueError(f"model is an ensemble with {what}; give args of the same, and an ensemble loaded whole")
    check_dataset("train_dataset", train_dataset)
    several = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    for name, dataset in {**several, "calibration_dataset": calibration_dataset}.items():
        if dataset is not None:
            check_dataset(name, dataset)
    if calibration_dataset is None and args.normalize and args.aggregation != "mean":
        raise ValueError(
            f"aggregation {args.aggregation!r} compares members, which must be standardised first; give "
            "calibration_dataset, or set normalize to false"
        )


def _tokenizer(model: str | PreTrainedModel, args: EnsembleRewardConfig) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(_name(model), trust_remote_code=args.trust_remote_code)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, args: EnsembleRewardConfig) -> None:
    pad, eos = args.pad_token or tokenizer.pad_token, args.eos_token or tokenizer.eos_token
    if pad is None or pad == eos:
        raise ValueError(
            f"the tokenizer's pad_token is {pad!r} and its eos_token {eos!r}: a stock reward model reads the score before "
            "the padding, so it would be read before the end of the answer; set tokenizer.pad_token to another token"
        )
    tokenizer.pad_token = pad


def _ensemble(model: str | PreTrainedModel, args: EnsembleRewardConfig) -> EnsembleRewardModel:
    """The model to train; an EnsembleRewardModel only gets the settings of its answer."""
    fields = {name: getattr(args, name) for name in ENSEMBLE_FIELDS}
    if isinstance(model, EnsembleRewardModel):
        for name in ("aggregation", "uwo_lambda", "unbiased", "normalize"):
            setattr(model.config, name, fields[name])
        return model
    if isinstance(model, str):
        options = dict(args.model_init_kwargs or {})
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None
        options.setdefault("trust_remote_code", args.trust_remote_code)
        model = create_model_from_path(model, AutoModel, **options)
    return EnsembleRewardModel.from_base(model, seed=args.seed, **fields)


def example(output_dir: str) -> dict[str, Any]:
    """Keyword arguments of an EnsembleRewardTrainer on the sandbox: 16 pairs, 4 steps (the conformance kit runs it)."""
    from hfgen import sandbox

    return {
        "model": sandbox.load_model(),
        "processing_class": sandbox.load_tokenizer(),
        "args": EnsembleRewardConfig(
            output_dir, num_members=3, backend="lora", max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3,
            logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        ),
        "train_dataset": Dataset.from_list(sandbox_pairs(16)),
    }  # fmt: skip


def sandbox_pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Preference pairs on the sandbox's task R: the letters reversed against the letters as they are."""
    from hfgen.sandbox import tasks

    prompts = tasks.R.prompts[start : start + count]
    return [{"prompt": p, "chosen": tasks.R.gold(p), "rejected": p.strip("R=")} for p in prompts]
