"""Asking a causal language model without training it: frozen, and left exactly as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)

# LoRA initialisations that move part of the weight into the adapter: without it the base model is another.
_INIT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_SCORE_BUDGET = 2**28  # elements of one (rows, tokens, vocabulary) logits tensor: 1 GiB in float32


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model itself, without PEFT's wrapper.

    Raises:
        TypeError: not a transformers model that generates, nor a PeftModel of one.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel) or not base.can_generate():
        raise TypeError(
            f"model is {type(model).__name__}; pass a transformers model that generates, or a PeftModel of one"
        )
    return base


def check_adapters(model: PreTrainedModel | PeftModel) -> None:
    """Raise where disabling the adapters does not give the model as it was before they were put on.

    Raises:
        ValueError: an adapter is merged, or was initialised by changing the base weights (PiSSA, OLoRA, ...).
    """
    if any(isinstance(m, BaseTunerLayer) and m.merged for m in model.modules()):
        raise ValueError("model has a merged adapter, so its initial weights are gone; unmerge it first")
    configs = getattr(model, "peft_config", {})
    for name, config in configs.items():
        init = getattr(config, "init_lora_weights", None)
        if isinstance(init, str) and init.startswith(_INIT_CHANGES_BASE):
            raise ValueError(
                f"adapter {name!r} has init_lora_weights={init!r}, which changes the base weights, so disabling it "
                "does not give the initial model; pass the plain model and peft_config="
            )


@contextmanager
def frozen(model: PreTrainedModel | PeftModel) -> Iterator[PreTrainedModel]:
    """The base model for inference: eval mode, no gradient, adapters and checkpointing off, plain greedy settings.

    Training and checkpointing flags, `requires_grad` and generation config are put back afterwards, on errors too.
    Greedy means argmax: penalties and sampling settings of the model's own `generation_config` do not apply.

    Raises:
        TypeError: as `base_model`.
        ValueError: as `check_adapters`.
    """
    peft = model if isinstance(model, PeftModel) else None
    base = base_model(model)
    check_adapters(model)
    modules = list(model.modules())
    training = [m.training for m in modules]
    checkpointing = [m for m in modules if getattr(m, "gradient_checkpointing", False)]
    grads = [(p, p.requires_grad) for p in model.parameters()]
    switches = [
        m for m in modules if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) and not m.disable_adapters
    ]
    settings = base.generation_config
    try:
        model.eval()
        for module in checkpointing:
            module.gradient_checkpointing = False
        base.generation_config = GenerationConfig()
        if peft is None:  # adapters that transformers' own add_adapter put in
            for module in switches:
                module.enable_adapters(False)
        with torch.no_grad(), peft.disable_adapter() if peft is not None else nullcontext():
            yield base
    finally:
        if peft is None:
            for module in switches:
                module.enable_adapters(True)
        base.generation_config = settings
        for module in checkpointing:
            module.gradient_checkpointing = True
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for parameter, flag in grads:
            parameter.requires_grad_(flag)


def fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """SHA-256 (hex) over names, dtypes and bytes of the base model's tensors: equal with and without adapters."""
    base = base_model(model)
    skip = tuple(
        f"{name}.{attribute}."
        for name, module in base.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for attribute in (*module.adapter_layer_names, *module.other_param_names)
    )
    digest = hashlib.sha256(type(base).__name__.encode())
    for name, tensor in base.state_dict().items():
        if not f"{name}.".startswith(skip):
            name = name.replace("base_layer.", "").replace("original_module.", "")
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(data.numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Generation:
    """One answer. `finished` says that the model ended it itself (EOS) within the token limit."""

    text: str
    finished: bool


class _SeededTopP(LogitsProcessor):
    """Turns argmax into a sample of softmax(scores / temperature) cut to the top-p nucleus (Gumbel-max trick).

    One generator per row: what a row samples does not depend on its neighbours, its rank or the global generator.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature
        self.nucleus = TopPLogitsWarper(top_p)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """scores (rows, vocabulary) -> perturbed scores, float32."""
        kept = self.nucleus(input_ids, scores.float() / self.temperature)
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])
        tiny = torch.finfo(torch.float32).tiny
        return kept - (-(uniform.clamp_min(tiny)).log()).clamp_min(tiny).log().to(scores.device)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    seeds: Sequence[int] | None = None,
    temperature: float = 0.7,
    top_p: float = 0.9,
) -> list[Generation]:
    """Answers to a batch of token lists, left-padded: greedy, or with `seeds` (one per row) sampled at `temperature`.

    Call it inside `frozen`. The text ends before the first EOS and has no special tokens; it is what follows the
    decoded prompt, so a leading space that a tokenizer drops at the start of a text is kept.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    sampler = [] if seeds is None else [_SeededTopP(seeds, temperature, top_p)]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True,
        eos_token_id=list(eos_ids), pad_token_id=pad,
    )  # fmt: skip
    output = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList(sampler)
    )
    answers = []
    for prompt, new in zip(prompts, output[:, width:].tolist(), strict=True):
        end = next((i for i, token in enumerate(new) if token in eos_ids), None)
        answers.append(Generation(_decode(tokenizer, list(prompt), new[:end]), end is not None))
    return answers


def _decode(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = tokenizer.decode(prompt, **options), tokenizer.decode(prompt + new, **options)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, **options)


def sequence_logps(model: PreTrainedModel, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[float]:
    """log p(sequence[start:] | sequence[:start]) of each token list: sums over tokens, in nats, log-softmax in float32.

    Call it inside `frozen`. Only logits of the scored positions are made, at most `_SCORE_BUDGET` elements at a time.
    A sequence's very first token has no condition and is never scored.
    """
    slim = model._supports_logits_to_keep()
    vocabulary = model.config.get_text_config().vocab_size
    longest = max(len(s) for s in sequences) - min(starts) + 1
    rows = max(1, _SCORE_BUDGET // (longest * vocabulary))
    sums: list[float] = []
    for first in range(0, len(sequences), rows):
        batch = [list(s) for s in sequences[first : first + rows]]
        begins = [max(1, s) for s in starts[first : first + rows]]
        width, low = max(map(len, batch)), min(begins) - 1
        # Right padding: a causal model needs no mask for it and positions start at 0. Pad value 0 is never scored.
        ids = torch.tensor([s + [0] * (width - len(s)) for s in batch], device=model.device)
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in batch], device=model.device)
        keep = {"logits_to_keep": torch.arange(low, width - 1, device=model.device)} if slim and low < width - 1 else {}
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
        logits = logits if keep else logits[:, low : width - 1]
        for row, (begin, sequence) in enumerate(zip(begins, batch, strict=True)):
            scores = logits[row, begin - 1 - low : len(sequence) - 1 - low].float().log_softmax(-1)
            picked = scores.gather(-1, ids[row, begin : len(sequence), None])
            sums.append(picked.sum().item())
    return sums
