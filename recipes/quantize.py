"""Quantise a causal language model while it loads, save it, and measure what that costs in perplexity on a text.

    python recipes/quantize.py --model_name_or_path DIR_OR_ID --text_file FILE --method easyquant --output_dir DIR
    python recipes/quantize.py ... --options '{"bits": 3, "n_sigma": 2.5}' --dtype bfloat16

The whole quantised model is in memory; `hfgen quantize` writes the same folder without that. The perplexity is that of
windows of `max_length` tokens that do not overlap, the first token of each not counted. Written to `output_dir`: the
model, which `from_pretrained` loads as it is, its tokenizer, and quantize.json.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from hfgen.catalog import load


@dataclass
class RecipeArguments:
    """What is quantised, how, and what it is measured on."""

    model_name_or_path: str = field(metadata={"help": "A causal language model with its tokenizer."})
    text_file: str = field(metadata={"help": "The text, UTF-8."})
    method: str = field(metadata={"help": "An installed quantizer (hfgen ls quantizers)."})
    output_dir: str = field(metadata={"help": "Where the quantised model goes."})
    options: dict | str | None = field(default=None, metadata={"help": "Fields of the method's config, as JSON."})
    dtype: str = field(default="auto", metadata={"help": "Of what is not quantised: auto, float32, bfloat16, float16."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a window."})
    batch_size: int = field(default=4, metadata={"help": "Windows of a forward pass."})

    def __post_init__(self) -> None:
        if isinstance(self.options, str):
            self.options = json.loads(self.options)
        if not isinstance(self.options, dict | None):
            raise TypeError(f"options is {self.options!r}; give an object, e.g. '{{\"bits\": 3}}'")
        if self.max_length < 2 or self.batch_size < 1:
            raise ValueError(
                f"max_length is {self.max_length} and batch_size {self.batch_size}; give at least 2 tokens and 1 window"
            )


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor, max_length: int, batch_size: int) -> float:
    """exp of the mean negative log-likelihood, in nats, of `tokens` (N) in windows; the last window may be shorter.

    Raises:
        ValueError: fewer than two tokens: there is nothing to predict.
    """
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens; give one with at least 2")
    whole = len(tokens) // max_length * max_length
    batches = list(tokens[:whole].view(-1, max_length).split(batch_size)) if whole else []
    batches += [tokens[None, whole:]] if len(tokens) - whole > 1 else []
    total, count = 0.0, 0
    for ids in batches:
        ids = ids.to(model.device)
        scores = model(input_ids=ids).logits[:, :-1].float().flatten(0, 1)
        total += float(F.cross_entropy(scores, ids[:, 1:].flatten(), reduction="sum"))
        count += scores.shape[0]
    return math.exp(total / count)


def main() -> None:
    (args,) = TrlParser((RecipeArguments,)).parse_args_and_config()
    config = load(args.method, "quantizers")(**(args.options or {}))
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    text = Path(args.text_file).read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = {}
    for name, quantization in (("plain", None), (args.method, config)):
        model = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, dtype=args.dtype, quantization_config=quantization
        )
        size = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
        rows[name] = {"bytes": size, "perplexity": perplexity(model, tokens, args.max_length, args.batch_size)}
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    result = {"tokens": len(tokens), "config": config.to_dict(), "models": rows}
    Path(args.output_dir, "quantize.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = Table("", "bytes in memory", f"perplexity ({len(tokens):,} tokens)", box=None)
    for name, row in rows.items():
        table.add_row(name, f"{row['bytes']:,}", f"{row['perplexity']:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
