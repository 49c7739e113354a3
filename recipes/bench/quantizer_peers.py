"""Quantizers of other libraries for recipes/bench/quantizers.py, each as a function of one weight or of one model.

A weight's method returns `Coded`, a model's method changes the model in place and returns its bytes. What is not
installed is left out. Tested with bitsandbytes 0.50, hqq 0.2.8, optimum-quanto 0.2.7, torchao 0.18, sinq 0.2 and
auto-round 0.16 on a CPU. None of them has to be in the package's own environment:

    pip install --target PEERS --no-deps hqq optimum-quanto torchao sinq auto-round termcolor einops py-cpuinfo ninja
    rm PEERS/sitecustomize.py   # sinq's, which would patch transformers in every Python that finds the folder
    PYTHONPATH=PEERS python recipes/bench/quantizers.py ...

`packed` counts the codes at their own width, without padding: hqq holds 3 bits in 32 bit words of ten and 5 and 6 bits
in whole bytes, torchao everything in whole bytes. Scales and zeros have 16 bits, where a library does not store fewer;
a zero that is the same for all layers is not counted. `held` is what the library's own tensors take.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import bitsandbytes
import torch
from torch import Tensor, nn

LIBRARIES = ("hqq", "optimum-quanto", "torchao", "sinq", "auto-round")  # besides bitsandbytes
GROUPS = (64, 32, 16)  # weights that share a scale, of the methods that leave it open
WIDTHS = (2, 3, 4, 5, 6, 8)
AUTO_ROUND = ((2, 64), (3, 64), (3, 32), (4, 64))  # (bits, group)


class Coded(NamedTuple):
    """One quantised weight: the bytes it takes packed without padding, those its library holds, and the way back."""

    packed: float
    held: int
    dense: Callable[[], Tensor]  # float32


def installed(distribution: str) -> str | None:
    """Its version; None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def nbytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def bnb(kind: str, double: bool, weight: Tensor) -> Coded:
    """bitsandbytes nf4 or fp4 in blocks of 64; `double`: the blocks' maxima are 8 bit codes themselves."""
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight.contiguous(), blocksize=64, quant_type=kind, compress_statistics=double
    )
    size = nbytes(codes, state.absmax, *((state.state2.absmax, state.offset) if double else ()))
    return Coded(size, size, lambda: bitsandbytes.functional.dequantize_4bit(codes, state))


def hqq(bits: int, group: int, weight: Tensor) -> Coded:
    """hqq in groups along a row, with 16 bit scales and zeros."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.cpu(*Quantizer.quantize(weight, nbits=bits, group_size=group, axis=1, device="cpu"))
    meta["compute_dtype"] = torch.float32
    aside = nbytes(meta["scale"], meta["zero"])
    return Coded(weight.numel() * bits / 8 + aside, codes.nbytes + aside, lambda: Quantizer.dequantize(codes, meta))


def quanto(bits: int, weight: Tensor) -> Coded:
    """optimum-quanto's QLinear as it is by default, of a float16 layer so that scales have 16 bits."""
    import optimum.quanto as q

    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False).half()
    plain.weight.data = weight.half()
    layer = q.QLinear.from_module(plain, weights={2: q.qint2, 4: q.qint4, 8: q.qint8}[bits])
    layer.freeze()
    size = sum(t.nbytes for name, t in layer.state_dict().items() if name.startswith("weight"))

    def dense() -> Tensor:
        parts = layer.weight  # in float32, as everything here is
        if bits == 8:
            return parts._data.float() * parts._scale.float()
        found: Tensor = q.WeightQBitsTensor(
            parts.qtype, parts.axis, parts._group_size, parts.size(), parts.stride(), parts._data,
            parts._scale.float(), parts._shift.float() if parts._shift.is_floating_point() else parts._shift,
        ).dequantize()  # fmt: skip
        return found

    return Coded(size, size, dense)


def torchao(bits: int, group: int, search: bool, weight: Tensor) -> Coded:
    """torchao's IntxWeightOnlyConfig: from minimum to maximum with zeros, or (`search`) symmetric with hqq's scales."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group) if group else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if search else MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm="hqq_scale_only" if search else "affine",
    )
    quantize_(layer, config)
    found: Any = layer.weight
    aside = nbytes(found.scale) + (0 if search else found.zero_point.numel() * bits / 8)
    held = nbytes(found.qdata, found.scale, found.zero_point)
    return Coded(weight.numel() * bits / 8 + aside, held, found.dequantize)


def sinq(bits: int, group: int, weight: Tensor) -> Coded:
    """SINQ as transformers calls it: scales of rows and of columns, the rows' and the zeros in 8 bit codes."""
    from sinq.quantizer import Quantizer

    codes, meta = Quantizer.quantize(
        weight, None, nbits=bits, group_size=group, axis=1, round_zero=bits == 4, compute_dtype=torch.float32,
        device="cpu", tiling_mode="1D", method="sinq_quantAux",
    )  # fmt: skip
    aside = [t for key in ("scale", "zero") if meta[key] is not None for t in meta[key][:3]]
    if isinstance(meta["scale2"], Tensor):  # 16 bit, as in a 16 bit model
        meta["scale2"] = meta["scale2"].half()
        aside.append(meta["scale2"])
    size = nbytes(*aside)
    return Coded(weight.numel() * bits / 8 + size, codes.nbytes + size, lambda: Quantizer.dequantize(codes, meta))


def data_free() -> dict[tuple[str, int], Callable[[Tensor], Coded]]:
    """{(name, bits): method} of those that need no data and are installed. A library's name comes first in the name."""
    found: dict[tuple[str, int], Callable[[Tensor], Coded]] = {
        (f"bitsandbytes {kind}{', double quant' if double else ''}", 4): partial(bnb, kind, double)
        for kind in ("nf4", "fp4")
        for double in (False, True)
    }
    wide = [(bits, group) for bits in WIDTHS for group in GROUPS]
    if installed("hqq"):
        found |= {(f"hqq, groups of {group}", bits): partial(hqq, bits, group) for bits, group in wide}
    if installed("optimum-quanto"):
        found |= {("quanto", bits): partial(quanto, bits) for bits in (2, 4, 8)}
    if installed("torchao"):
        for bits, group in (*wide, *((bits, 0) for bits in WIDTHS)):
            per = f"groups of {group}" if group else "rows"
            found[f"torchao min-max, {per}", bits] = partial(torchao, bits, group, False)
            found[f"torchao hqq scales, {per}", bits] = partial(torchao, bits, group, True)
    if installed("sinq"):
        found |= {(f"sinq, groups of {group}", bits): partial(sinq, bits, group) for bits, group in wide}
    return found


def auto_round(
    bits: int, group: int, model: Any, names: Sequence[str], rows: Sequence[Any], steps: int = 200
) -> tuple[float, int]:
    """auto-round with its own number of steps, symmetric, 16 bit scales; `model` computes with what it found after."""
    from auto_round import AutoRound

    from hfgen import sandbox

    tokenizer = sandbox.load_tokenizer()
    padded = tokenizer.pad([{"input_ids": list(row["input_ids"])} for row in rows], return_tensors="pt")
    batches = [
        {"input_ids": ids, "attention_mask": mask}
        for ids, mask in zip(padded["input_ids"].split(8), padded["attention_mask"].split(8), strict=True)
    ]
    AutoRound(
        model, tokenizer, scheme="W4A16", bits=bits, group_size=group, sym=True, iters=steps, dataset=batches,
        seqlen=padded["input_ids"].shape[1], nsamples=len(rows), batch_size=8, device_map="cpu", amp=False,
        enable_torch_compile=False,
    ).quantize()  # fmt: skip
    layers = [model.get_submodule(name) for name in names]
    size = sum(layer.weight.numel() * bits / 8 + layer.scale.numel() * 2 for layer in layers)
    return size, round(size)


def calibrated() -> dict[tuple[str, int], Callable[..., tuple[float, int]]]:
    """{(name, bits): method} of those that need data and are installed."""
    if not installed("auto-round"):
        return {}
    return {(f"auto-round, groups of {group}", bits): partial(auto_round, bits, group) for bits, group in AUTO_ROUND}
