"""Makes the sandbox's weights and tokenizer again: ``python -m hfgen.sandbox.build --out DIR`` (about a minute).

One thread, fixed seeds: on one machine the tensors are the same bit for bit every time. The base model sees task E and
R always right; of D's targets 40 % are wrong, so that it ends up half knowing D: the state in which fine-tuning on gold
answers is at its most harmful.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import TYPE_CHECKING

from . import accuracy, tasks

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

STEPS, BATCH, LEARNING_RATE = 2500, 64, 3e-3
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: 4 special tokens, newline and the 95 printable ASCII characters, 100 in all."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *characters))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    pad, bos, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk, padding_side="left",
        model_max_length=256, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """The untrained model. Its initialisation is pinned here: with transformers' N(0, .02) it would stay at chance."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False, dtype="float32",
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" in name:
            torch.nn.init.normal_(weight, std=0.3)
        elif weight.ndim == 2:
            torch.nn.init.xavier_uniform_(weight)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=32, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )  # fmt: skip
    return model


def example(rng: random.Random) -> tuple[str, str]:
    """One pre-training example (prompt, target): D, E or R with equal chance; D's target is wrong 40 % of the time."""
    kind = rng.choice("DER")
    if kind == "R":
        held = set(tasks.R.prompts)
        while (prompt := f"R{''.join(rng.choices(tasks.LETTERS, k=4))}=") in held:
            pass
        return prompt, tasks.R.gold(prompt)
    total = rng.choice(tasks.SUMS)
    prompt = f"{'D' if kind == 'D' else ':'}{total:02d}="
    if kind == "D" and rng.random() < 0.4:
        total = rng.choice([n for n in tasks.SUMS if n != total])
    return prompt, tasks.plain(rng.choice(tasks.triples(total)))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int = STEPS, seed: int = 0) -> None:
    """Pre-trains `model` in place: AdamW, linear warm-up and decay, loss on the targets only."""
    import torch
    from rich.progress import track

    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 100, (steps - s) / steps * 1.25)
    )
    model.train()
    for _ in track(range(steps), description="pre-training the sandbox model"):
        pairs = [example(rng) for _ in range(BATCH)]
        batch = tokenizer([p + t + "<eos>" for p, t in pairs], return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, (prompt, _target) in zip(labels, pairs, strict=True):
            row[: 1 + len(prompt)] = -100  # BOS and the prompt
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def build(out: Path, steps: int = STEPS, seed: int = 0) -> dict[str, float]:
    """Writes model and tokenizer to `out` and returns greedy accuracies: D on trained and held-out prompts, E, R."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order: the same tensors every time
    try:
        tokenizer = make_tokenizer()
        model = make_model(tokenizer, seed)
        train(model, tokenizer, steps, seed)
        model.save_pretrained(out)
        make_tokenizer().save_pretrained(out)
        (out / "model.safetensors").chmod(0o644)  # written 0600; a wheel keeps the mode
        trained, held_out = tasks.D.split(0)
        return {
            "D trained": accuracy(model, tokenizer, tasks.D, trained),
            "D held out": accuracy(model, tokenizer, tasks.D, held_out),
            "E": accuracy(model, tokenizer, tasks.E),
            "R": accuracy(model, tokenizer, tasks.R),
        }
    finally:
        torch.set_num_threads(threads)


def main(arguments: list[str] | None = None) -> None:
    """Command line: ``python -m hfgen.sandbox.build --out DIR [--steps N] [--seed N]``."""
    parser = argparse.ArgumentParser(description="Makes the sandbox's weights and tokenizer again.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, value in build(options.out, options.steps, options.seed).items():
        print(f"{name:<12}{value:.3f}")


if __name__ == "__main__":
    main()
