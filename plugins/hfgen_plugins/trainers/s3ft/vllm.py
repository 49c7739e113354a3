"""Answers of M0 by vLLM, where it is installed. Greedy answers may differ from transformers' in near ties."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfgen.kit import generation

_MEMORY = 0.5  # share of the device that vLLM takes by itself: the transformers model lies on it too


def module() -> ModuleType:
    """vLLM.

    Raises:
        ValueError: it is not installed or does not import, or there are several processes.
    """
    if PartialState().num_processes > 1:
        raise ValueError(
            f"s3ft_vllm is true in {PartialState().num_processes} processes; build the data in one process first "
            "(build_s3ft_dataset), then train on them in several"
        )
    try:
        return importlib.import_module("vllm")
    except ImportError as exc:
        raise ValueError(
            f"s3ft_vllm is true, but vLLM does not import ({exc}); pip install vllm, or leave s3ft_vllm out"
        ) from exc


class Engine:
    """A vllm.LLM with the weights of `model`, which are saved to a temporary folder for it.

    Args:
        model: The base model, without adapters in it.
        tokenizer: Its tokenizer.
        options: For vllm.LLM.

    Raises:
        ValueError: as `module`, or the model has adapter layers, whose base vLLM cannot load.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]):
        if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
            raise ValueError("s3ft_vllm is true and model has an adapter; pass the plain model and peft_config=")
        self.vllm, self.tokenizer = module(), tokenizer
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            dtype = str(model.dtype).removeprefix("torch.")
            self.llm = self.vllm.LLM(
                **{"model": folder, "dtype": dtype, "seed": 0, "gpu_memory_utilization": _MEMORY, **options}
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
        temperature: float = 0.7,
        top_p: float = 0.9,
    ) -> list[generation.Generation]:
        """As `hfgen.kit.generation.generate`; what a seed samples is vLLM's own."""
        common: dict[str, Any] = {"max_tokens": max_new_tokens, "stop_token_ids": list(eos_ids)}
        settings = [
            self.vllm.SamplingParams(temperature=0.0, **common)
            if seeds is None
            else self.vllm.SamplingParams(temperature=temperature, top_p=top_p, seed=seeds[i] % 2**31, **common)
            for i in range(len(prompts))
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(p)} for p in prompts], sampling_params=settings, use_tqdm=False
        )
        answers = []
        for prompt, output in zip(prompts, outputs, strict=True):
            new, finished = list(output.outputs[0].token_ids), output.outputs[0].finish_reason == "stop"
            end = next((i for i, token in enumerate(new) if token in eos_ids), None)
            answers.append(generation.Generation(generation._decode(self.tokenizer, list(prompt), new[:end]), finished))
        return answers
