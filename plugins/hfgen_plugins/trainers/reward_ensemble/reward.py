"""EnsembleReward: an ensemble as one reward function of trl's GRPOTrainer and RLOOTrainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hfgen.kit import checks

from .modeling import EnsembleRewardModel
from .scoring import AGGREGATIONS


class EnsembleReward:
    """`GRPOTrainer(reward_funcs=EnsembleReward(folder))`: scores answers as RewardTrainer's data were tokenised.

    One function, not K of them: trl adds the rewards of several, which is no minimum and has no variance. Every process
    scores its own answers with a model of its own. Logs `<name>/std` (over members, standardised where the ensemble
    is), `<name>/member_mean` and `<name>/undefined` (share of answers without a finite reward, which are given to trl
    as None), and adds a column `<name>_std` to trl's table of completions.

    Args:
        model: Folder or hub id of an ensemble, or the model.
        processing_class: The members' tokenizer; None loads it from the model's folder.
        name: What trl calls the reward in its logs.
        batch_size: Answers scored at once.
        aggregation: mean, wco or uwo; None takes the model's.
        uwo_lambda: Weight of the variance; None takes the model's.
        streamed: Load each member when it scores and drop it after (backend separate): the peak is one member.

    Raises:
        TypeError, ValueError: a model or tokenizer that cannot score, or WCO/UWO without calibration.
    """

    def __init__(
        self,
        model: str | Path | EnsembleRewardModel,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        name: str = "ensemble_reward",
        batch_size: int = 16,
        aggregation: str | None = None,
        uwo_lambda: float | None = None,
        streamed: bool = False,
    ) -> None:
        checks.integer("EnsembleReward", "batch_size", batch_size, low=1)
        if aggregation is not None:
            checks.one_of("EnsembleReward", "aggregation", aggregation, AGGREGATIONS)
        if not isinstance(name, str) or not name:
            raise TypeError(f"EnsembleReward.name is {name!r}; give a name for the logs")
        if isinstance(model, str | Path):
            processing_class = processing_class or AutoTokenizer.from_pretrained(str(model))
            load: Callable[..., Any] = (
                EnsembleRewardModel.load_streamed if streamed else EnsembleRewardModel.from_pretrained
            )
            model = load(str(model))
        elif streamed and getattr(model, "sources", None) is None:
            raise ValueError("streamed is true and the model is loaded already; give its folder")
        if not isinstance(model, EnsembleRewardModel):
            raise TypeError(f"model is {type(model).__name__}; give an EnsembleRewardModel or its folder")
        if processing_class is None:
            raise ValueError("processing_class is missing; give the tokenizer the members were trained with")
        if processing_class.pad_token is None or processing_class.pad_token == processing_class.eos_token:
            raise ValueError(
                f"the tokenizer's pad_token is {processing_class.pad_token!r} and its eos_token "
                f"{processing_class.eos_token!r}; set pad_token to another token, as in training"
            )
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            raise ValueError(
                "DeepSpeed ZeRO-3 has split the ensemble's weights; make EnsembleReward before the training arguments"
            )
        self.__name__ = name
        self.model, self.tokenizer, self.batch_size = model.eval().requires_grad_(False), processing_class, batch_size
        self.aggregation, self.uwo_lambda = aggregation, uwo_lambda
        model.combine(torch.zeros(1, model.config.num_members), aggregation, uwo_lambda)  # what is refused, now

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One reward per completion; texts, or lists of messages. Other keywords of trl's are not needed.

        Raises:
            ValueError: not one completion per prompt, or no completion has a finite reward.
        """
        scores = self.member_scores(prompts, completions)
        rewards, variances = self.model.combine(scores, self.aggregation, self.uwo_lambda)
        finite = torch.isfinite(rewards)
        if not finite.any():
            raise ValueError(
                f"{self.__name__} has no finite reward for any of {len(rewards)} completions (member scores of the first: "
                f"{scores[0].tolist()}); trl would go on without learning: check the ensemble's weights and its dtype"
            )
        spread = variances.clamp(min=0).sqrt()
        if log_metric is not None:
            log_metric(f"{self.__name__}/std", spread[finite].mean().item())
            log_metric(f"{self.__name__}/member_mean", scores[finite].mean().item())
            log_metric(f"{self.__name__}/undefined", 1 - finite.float().mean().item())
        if log_extra is not None:
            log_extra(f"{self.__name__}_std", spread.tolist())
        return [r if math.isfinite(r) else None for r in rewards.tolist()]

    @torch.inference_mode()
    def member_scores(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
        """Raw scores (N, K) of N answers on the CPU, every member on the same tokens."""
        if len(prompts) != len(completions) or not len(prompts):
            raise ValueError(
                f"there are {len(prompts)} prompts and {len(completions)} completions; give a prompt for every completion"
            )
        ids = [self.encode(p, c) for p, c in zip(prompts, completions, strict=True)]
        device = PartialState().device
        if not hasattr(self.model, "hf_device_map"):
            self.model.to(device)
        batches = []
        for start in range(0, len(ids), self.batch_size):
            part = [{"input_ids": i} for i in ids[start : start + self.batch_size]]
            padded = self.tokenizer.pad(part, padding=True, padding_side="right", return_tensors="pt").to(device)
            batches.append({name: padded[name] for name in ("input_ids", "attention_mask")})
        return self.model.member_scores(batches).cpu()

    def encode(self, prompt: Any, completion: Any) -> list[int]:
        """Token ids as RewardTrainer makes them of a prompt and a chosen answer, end-of-sequence token included."""
        if isinstance(prompt, str) and isinstance(completion, str):
            text, eos = prompt + completion, self.tokenizer.eos_token
            return self.tokenizer(text=text if text.endswith(eos) else text + eos)["input_ids"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return self.tokenizer.apply_chat_template(prompt + completion, tokenize=True, return_dict=True)["input_ids"]
        raise TypeError(
            f"a prompt is {type(prompt).__name__} and its completion {type(completion).__name__}; give two texts, or two "
            "lists of messages"
        )
