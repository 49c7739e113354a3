"""`hfgen export`: an adapter as a stock LoRA or merged into its base, a quantised model as a plain one."""

from __future__ import annotations

import difflib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from hfgen import catalog
from hfgen.cli.quantize import find_model

TARGETS = ("lora", "merged", "dequantized")


def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="An adapter's folder, or a model's quantised by hfgen.")
    ],
    to: Annotated[str, typer.Option(help="lora | merged (adapters), dequantized (models).")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    base: Annotated[
        str | None, typer.Option(help="The adapter's base model, where it is not the one it names.")
    ] = None,
) -> None:
    """Write what runs without hfgen, and say how far its logits are from those of the original."""
    try:
        before, after = run(folder, to, out, base)
    except (ValueError, TypeError) as exc:
        print(f"hfgen: {exc}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"written to {out}\n{deviation(before, after)}")


def run(folder: Path, to: str, out: Path, base: str | None = None) -> tuple[Any, Any]:
    """What the command does; returns the float32 logits of the original and of what was written, on `probe`.

    Raises:
        ValueError: `to` is unknown, does not fit the folder, or the base is missing.
    """
    if to not in TARGETS:
        close = difflib.get_close_matches(to, TARGETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"give one of {', '.join(TARGETS)}"
        raise ValueError(f"--to is {to!r}; {hint}")
    from hfgen.kit.streaming import check_out, quiet_host

    config = _read(folder, to)
    check_out(out, folder)
    if to == "dequantized" and base is not None:
        raise ValueError(f"--base is {base!r}, but a quantised model has no base; leave it out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with quiet_host(), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        partial = Path(work) / out.name
        if to == "dequantized":
            found = _dequantized(folder, partial)
        else:
            found = _adapter(folder, partial, to, find_base(folder, config, base))
        if out.exists():
            out.rmdir()
        os.rename(partial, out)
    return found


def _read(folder: Path, to: str) -> dict[str, Any]:
    """The config of the kind of folder that `to` wants; registers its method with the host."""
    name = "config.json" if to == "dequantized" else "adapter_config.json"
    other = "adapter_config.json" if to == "dequantized" else "config.json"
    if not (folder / name).is_file():
        if not folder.is_dir():
            raise ValueError(f"DIR is {str(folder)!r}, which is no folder; give one that save_pretrained wrote")
        kinds = {"adapter_config.json": "an adapter, --to lora or merged", "config.json": "a model, --to dequantized"}
        hint = f"it is {kinds[other]}" if (folder / other).is_file() else "give one that save_pretrained wrote"
        raise ValueError(f"{folder} has no {name}, which --to {to} needs; {hint}")
    config: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    if to == "dequantized":
        block = config.get("quantization_config") or {}
        if "hfgen" not in block:
            what = f"quantised by {block['quant_method']!r}, not by hfgen" if block else "not quantised"
            raise ValueError(f"{folder} is {what}; there is nothing to export")
        catalog.load(block["quant_method"], "quantizers")
    elif "hfgen" not in config:
        raise ValueError(
            f"{folder} is an adapter of peft's own ({config.get('peft_type')}), which hfgen does not export; peft's "
            "merge_and_unload and save_as_lora do"
        )
    else:
        catalog.load(config["hfgen"]["method"], "adapters")
    return config


def find_base(folder: Path, config: dict[str, Any], base: str | None) -> Path:
    """The folder of the base model: what --base says, else what the adapter says."""
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{folder} does not name its base model; give it with --base")
    try:
        return find_model(name)
    except ValueError as exc:
        raise ValueError(f"the base model {name!r} is not to be had; give it with --base ({exc})") from None


# --- the exports ----------------------------------------------------------------------------------------------------


def load(folder: Path, dtype: Any = "auto") -> Any:
    """The model in `folder`, by the class its config names; a method of hfgen that quantised it is registered first."""
    from hfgen.kit.streaming import model_class

    block = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    if "hfgen" in block:
        catalog.load(block["quant_method"], "quantizers")
    cls: Any = model_class(folder)
    return cls.from_pretrained(str(folder), dtype=dtype, local_files_only=True)


def _dequantized(folder: Path, out: Path) -> tuple[Any, Any]:
    import torch

    from hfgen.kit.streaming import copy_other_files

    before = logits(load(folder, torch.float32))
    copy_other_files(folder, out)
    load(folder).dequantize().save_pretrained(out)
    return before, logits(load(out, torch.float32))


def _adapter(folder: Path, out: Path, to: str, base: Path) -> tuple[Any, Any]:
    import torch
    from peft import PeftModel

    from hfgen.kit.streaming import copy_other_files

    def on(adapter: Path) -> Any:
        return logits(PeftModel.from_pretrained(load(base, torch.float32), str(adapter)))

    before = on(folder)
    if to == "lora":
        as_lora(PeftModel.from_pretrained(load(base), str(folder))).save_pretrained(str(out))
        return before, on(out)
    model = load(base)
    if getattr(model, "is_quantized", False):
        model = model.dequantize()  # merging would quantise again
    copy_other_files(base, out)
    PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True).save_pretrained(out)
    return before, logits(load(out, torch.float32))


def as_lora(model: Any) -> Any:
    """The same function as a stock LoRA on the same base, scaling 1, by the layers' own `lora_factors`.

    Raises:
        ValueError: the method's dW is no product of two such factors, or it trains biases.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.utils.other import ModulesToSaveWrapper

    from hfgen.kit.adapter import DeltaLayer

    config, name = model.active_peft_config, model.active_adapter
    if config.bias != "none":
        raise ValueError(f"the adapter trains biases (bias={config.bias!r}), which a LoRA has not; use --to merged")
    factors, conv = {}, True
    for layer in (m for m in model.modules() if isinstance(m, DeltaLayer)):
        if not hasattr(layer, "lora_factors"):
            raise ValueError(
                f"method {config.method!r} has no exact LoRA; peft.save_as_lora(path, model, rank=...) makes a near one"
            )
        with torch.no_grad():
            factors[layer.module_name] = layer.lora_factors(name)
        conv = conv and layer.is_conv1d
    saved = {
        n: m.modules_to_save[name].state_dict() for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)
    }
    ranks = {key: len(right) for key, (right, _) in factors.items()}
    rank = max(ranks.values())
    other = {key: r for key, r in ranks.items() if r != rank}
    lora = LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=other, alpha_pattern=dict(other), target_modules=list(factors),
        fan_in_fan_out=conv, modules_to_save=config.modules_to_save, task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path, inference_mode=True,
    )  # fmt: skip
    model = get_peft_model(model.unload(), lora)
    for key, (right, left) in factors.items():
        layer = model.base_model.model.get_submodule(key)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = right.contiguous(), left.contiguous()
    for key, state in saved.items():
        model.get_submodule(key).modules_to_save["default"].load_state_dict(state)
    return model


# --- how far apart --------------------------------------------------------------------------------------------------


def probe(model: Any) -> dict[str, Any]:
    """Fixed inputs: 2 x 16 token ids, or 2 images.

    Raises:
        ValueError: the model takes something else.
    """
    import torch

    config, kind = model.config, model.main_input_name
    if kind == "input_ids":
        ids = (torch.arange(32) * 7919 + 11).remainder(config.get_text_config().vocab_size).view(2, 16)
        return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if config.is_encoder_decoder else {})
    if kind == "pixel_values":
        side = config.image_size
        shape = (2, config.num_channels, *((side, side) if isinstance(side, int) else side))
        count = torch.Size(shape).numel()
        return {kind: torch.cos(torch.arange(count, dtype=torch.float64) ** 2 * 0.37).float().view(shape)}
    raise ValueError(f"the deviation of a model that takes {kind!r} cannot be measured; export it in Python")


def logits(model: Any) -> Any:
    """The model's first output on `probe`, in float32."""
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        found = model.eval()(**probe(inner))
    return (found.logits if hasattr(found, "logits") else found[0]).float()


def deviation(before: Any, after: Any) -> str:
    """One line: the largest difference and what it is to be compared with."""
    worst = float((before - after).abs().max())
    size = float(before.abs().max())
    return f"maximal deviation of the logits: {worst:.3g} (float32, fixed probe; the largest logit is {size:.3g})"
