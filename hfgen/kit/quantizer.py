"""Weight-only quantizers on transformers' HfQuantizer: a method turns one weight into codes, scales and outliers.

What this base gives every method: the packed 2, 3, 4 and 8 bit linear layer with its gradient, loading one tensor at a
time, true packed checkpoints, `model.dequantize()`, adapters that train and merge on top, Conv1D, heads and tied
embeddings kept in float, and an account of everything that was left in float.

Shapes: a weight W is handled as (m, n) = (out, in), whatever the host stores; G groups of n / G columns share a scale.
"""

from __future__ import annotations

import ctypes
import dataclasses
import difflib
import functools
import logging
import sys
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from peft.utils.quantization_utils import QuantizationBackend
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfgen import catalog
from hfgen.kit import checks

logger = logging.getLogger("hfgen")

FORMAT = 1  # of the `hfgen` block in config.json; readers accept every number up to this one
BLOCKS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits -> (codes, bytes) of one block
CHUNK = 2**19  # weights made dense at a time: 4 bytes each, which stay in a CPU's cache (32 times as many elsewhere)
KERNELS = {2: "2bit", 4: "4bit", 8: "byte"}  # bits -> torch's CPU kernels for rows of codes that end in scale and bias
TAIL = {2: torch.float16, 4: torch.float16, 8: torch.float32}  # bits -> dtype of that scale and bias
FEW = 4  # tokens up to which `Columns` is faster than making the weight dense
TRIM = 2**20  # weights of a layer from which on freed memory is given back after it
HEADS = ("classifier", "score", "qa_outputs", "lm_head")  # heads of models whose base has no attribute of its own


# --- codes and bytes ------------------------------------------------------------------------------------------------


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, ...]:
    """Shape of the packed codes of a (rows, columns) weight: (rows, bytes), or (rows, bytes, 1) where bytes = columns.

    So it never equals the plain weight's (nor its transpose's, which Conv1D stores): without the plugin a host refuses
    the checkpoint by shape, where it would otherwise read codes as weights.
    """
    codes, size = BLOCKS[bits]
    width = -(-columns // codes) * size
    return (rows, width, 1) if width == columns else (rows, width)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, columns), each below 2**bits -> uint8 of `packed_shape`.

    Little-endian within a block: 4 bit has the even column in the low nibble, 3 bit has 8 codes in 3 bytes. Odd widths
    are padded with the code of 0.
    """
    per_block, size = BLOCKS[bits]
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % per_block), value=2 ** (bits - 1)).reshape(rows, -1, per_block)
    kind = torch.uint8 if size == 1 else torch.int32
    word = torch.zeros(padded.shape[:2], dtype=kind, device=codes.device)
    for i in range(per_block):
        word |= padded[..., i].to(kind) << (bits * i)
    packed = torch.stack([(word >> (8 * i)) & 255 for i in range(size)], dim=-1).to(torch.uint8)
    return packed.reshape(packed_shape(rows, columns, bits))


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 codes (rows, columns)."""
    per_block, size = BLOCKS[bits]
    blocks = packed.reshape(packed.shape[0], -1, size)
    word = blocks[..., 0]
    if size > 1:
        word = sum((blocks[..., i].to(torch.int32) << (8 * i) for i in range(1, size)), word.to(torch.int32))
    codes = [(word >> (bits * i)) & (2**bits - 1) for i in range(per_block)] if per_block > 1 else [word]
    return torch.stack(codes, dim=-1).to(torch.uint8).flatten(1)[:, :columns]


def levels(packed: Tensor, bits: int, columns: int) -> Tensor:
    """code - 2**(bits - 1) in float32 (rows, columns), in memory of its own.

    A CPU has a kernel; on CUDA whole bytes are looked up (other devices have no 8 or 16 byte numbers to gather).
    """
    if bits in KERNELS and packed.device.type == "cpu":
        one = torch.ones(packed.shape[0], 1, dtype=torch.float16)
        return _affine(packed, one, bits)[:, :columns].contiguous()
    if bits not in (2, 4) or packed.device.type != "cuda":
        return unpack(packed, bits, columns).to(torch.float32).sub_(2 ** (bits - 1))
    return _looked_up(packed, bits)[:, :columns].contiguous()


def _affine(packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """scale * (code - 2**(bits - 1)) in float32, padding included, on a CPU; scale float16 (rows, 1).

    Exact: a product of 11 and at most 8 bits. inf where scale * 2**(bits - 1) does not fit `TAIL`.
    """
    kernel = getattr(torch.ops.quantized, f"embedding_bag_{KERNELS[bits]}_unpack")
    found: Tensor = kernel(torch.cat([packed.flatten(1), _tail(scale, bits)], dim=1))
    return found


def _tail(scale: Tensor, bits: int) -> Tensor:
    """The bytes of scale and bias (rows, 4 or 8)."""
    parts = torch.tensor([1, -(2 ** (bits - 1))], dtype=TAIL[bits])
    return (scale.to(TAIL[bits]) * parts).view(torch.uint8)


def _looked_up(packed: Tensor, bits: int) -> Tensor:
    """`levels` of whole bytes, padding included: about twice as fast as shifts and masks."""
    found = _table(bits, packed.device).index_select(0, packed.flatten().to(torch.int32))
    return found.view(torch.float32).view(packed.shape[0], -1)


@functools.lru_cache
def _table(bits: int, device: torch.device) -> Tensor:
    """The levels of each of the 256 bytes; the 2 or 4 float32 of a byte are seen as one number."""
    byte = torch.arange(256)
    codes = torch.stack([(byte >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=1)
    whole = torch.float64 if bits == 4 else torch.complex128
    return (codes - 2 ** (bits - 1)).to(torch.float32).view(whole).flatten().to(device)


class Quantized(NamedTuple):
    """One weight (m, n): W = scale * (code - 2**(bits - 1)), and `values` at the flat row-major `positions`.

    `codes` uint8 (m, n), `scale` float16 (m, G); `positions` int32 (nnz) ascending, `values` float16 or bfloat16 (nnz),
    both None for methods without outliers.
    """

    codes: Tensor
    scale: Tensor
    positions: Tensor | None = None
    values: Tensor | None = None


class Packed(NamedTuple):
    """`Quantized` with packed codes, and what it takes to read them."""

    codes: Tensor
    scale: Tensor
    positions: Tensor | None
    values: Tensor | None
    bits: int
    columns: int

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of W, computed in float32 and rounded once to `dtype`."""
        codes, scale = self.codes[start:stop], self.scale[start:stop]
        # Within float16 the kernel can multiply as it unpacks, and rounds nothing that a product afterwards would not.
        folds = self.bits in KERNELS and codes.device.type == "cpu" and scale.shape[1] == 1
        if folds and bool(scale.max() <= 2.0**15 / 2**self.bits):
            weight = _affine(codes, scale, self.bits)[:, : self.columns].contiguous()
        else:
            weight = levels(codes, self.bits, self.columns).view(stop - start, scale.shape[1], -1)
            weight = weight.mul_(scale[:, :, None].float()).view(stop - start, self.columns)
        if self.positions is not None and self.values is not None:
            inside = self.outliers(start, stop)
            weight.view(-1).scatter_(
                0, self.positions[inside].long() - start * self.columns, self.values[inside].float()
            )
        return weight.to(dtype)

    def outliers(self, start: int, stop: int) -> slice:
        """Those of the rows [start, stop)."""
        if self.positions is None or (start == 0 and stop == self.codes.shape[0]):
            return slice(None)
        index = self.positions
        bounds = torch.tensor([start * self.columns, stop * self.columns], dtype=index.dtype, device=index.device)
        return slice(*torch.searchsorted(index, bounds).tolist())

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Row ranges of at most `CHUNK` weights (one row at least)."""
        rows = self.codes.shape[0]
        size = CHUNK if self.codes.device.type == "cpu" else 32 * CHUNK
        step = max(1, size // max(1, self.columns))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)


class PackedMatmul(torch.autograd.Function):
    """y = x W^T with a gradient to x only. W is made again in backward, so nothing dense is kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Any) -> Tensor:
        packed = Packed(*parts)
        ctx.save_for_backward(*parts[:4])
        ctx.form = parts[4:]
        y = x.new_empty(*x.shape[:-1], packed.codes.shape[0])
        for start, stop in packed.chunks():
            y[..., start:stop] = F.linear(x, packed.rows(start, stop, x.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        packed = Packed(*ctx.saved_tensors, *ctx.form)
        wide = torch.promote_types(grad.dtype, torch.float32)  # chunks add up without rounding in between
        out = grad.new_zeros(*grad.shape[:-1], packed.columns, dtype=wide)
        for start, stop in packed.chunks():
            out += grad[..., start:stop] @ packed.rows(start, stop, grad.dtype)
        return (out.to(grad.dtype), *[None] * 6)


@functools.cache
def _bag_kernel(bits: int) -> Any:
    """torch's embedding bag over quantised rows; None where it is missing or slow (it is fast in x86 builds)."""
    engines = torch.backends.quantized.supported_engines
    if bits not in KERNELS or "fbgemm" not in engines or not torch.backends.mkl.is_available():
        return None
    return getattr(torch.ops.quantized, f"embedding_bag_{KERNELS[bits]}_rowwise_offsets").default


class Columns(NamedTuple):
    """A packed weight by columns, for few tokens on a CPU: y = sum over k of x[k] W[:, k], without a dense W.

    torch's embedding bag over quantised rows is that sum, computed in float32 from the codes. It costs the packed codes
    once more (and 4 or 8 bytes a column), so it is made only for inference and kept only until training or saving.
    """

    table: Tensor  # uint8 (n, bytes of m codes + tail)
    sparse: Tensor | None  # outliers, float32 CSR (m, n)
    source: weakref.ref[Tensor]  # the layer's codes, to see that it still has them

    @classmethod
    def of(cls, packed: Packed, source: Tensor) -> Columns:
        rows, bits = packed.codes.shape[0], packed.bits
        zero, per_byte = 2 ** (bits - 1), 8 // bits
        one = torch.ones(packed.columns, 1, dtype=torch.float16)
        table = torch.empty(packed.columns, -(-rows // per_byte), dtype=torch.uint8)
        step = max(per_byte, CHUNK // packed.columns // per_byte * per_byte)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            codes = unpack(packed.codes[start:stop], bits, packed.columns).contiguous()
            if packed.positions is not None:
                inside = packed.positions[packed.outliers(start, stop)].long() - start * packed.columns
                codes.view(-1)[inside] = zero
            table[:, start // per_byte : -(-stop // per_byte)] = pack(codes.T, bits).flatten(1)
        return cls(torch.cat([table, _tail(one, bits)], dim=1), _csr(packed), weakref.ref(source))

    def linear(self, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        """x W^T (..., m) in the dtype of x, computed in float32; x (..., n), scale (m, G)."""
        (rows, groups), columns = scale.shape, self.table.shape[0]
        tokens = x.reshape(-1, columns).float()
        index, offsets = _bags(tokens.shape[0], columns, groups)
        sums = _bag_kernel(bits)(self.table, index, offsets, False, 0, False, tokens.view(-1))[:, :rows]
        y = sums * scale.T if groups == 1 else (sums.view(-1, groups, rows) * scale.T).sum(1)
        if self.sparse is not None:
            y += self.sparse.mv(tokens[0]) if len(tokens) == 1 else (self.sparse @ tokens.T).T
        return y.to(x.dtype).view(*x.shape[:-1], rows)


@functools.lru_cache
def _bags(tokens: int, columns: int, groups: int) -> tuple[Tensor, Tensor]:
    """Indices and offsets of a bag per token and group."""
    index = torch.arange(columns, dtype=torch.int32).repeat(tokens)
    return index, torch.arange(0, tokens * columns, columns // groups, dtype=torch.int32)


def _csr(packed: Packed) -> Tensor | None:
    """The outliers as a sparse matrix (m, n) in float32."""
    index, values, n = packed.positions, packed.values, packed.columns
    if index is None or values is None or not len(index):
        return None
    starts = torch.searchsorted(index.long(), torch.arange(packed.codes.shape[0] + 1) * n)
    with warnings.catch_warnings():  # torch says that CSR is in beta
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            starts.int(), index % n, values.float(), (packed.codes.shape[0], n), check_invariants=False
        )


# --- the layer ------------------------------------------------------------------------------------------------------

_KEEP_CLASS = ("data", "detach", "clone", "to", "cpu", "cuda", "contiguous")
# Arithmetic among integers; any with floating numbers is seen by its arguments or its result.
_ARITHMETIC = {f"{a}{name}{b}" for name in ("add", "sub", "mul") for a, b in (("", ""), ("", "_"), ("__i", "__"))}


class PackedWeight(nn.Parameter):
    """Packed codes as a frozen parameter, so that hosts see a layer with a weight; computing with it is refused in words.

    Otherwise whatever reads `layer.weight` as numbers (a stock merge, DoRA, a decomposition) would do so in silence.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> PackedWeight:
        made: PackedWeight = torch.Tensor._make_subclass(cls, plain(data), False)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        memo[id(self)] = made = PackedWeight(plain(self).clone())
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As a plain parameter, which `torch.load(weights_only=True)` reads; `PackedLinear.__setstate__` seals it again.
        return nn.Parameter(plain(self), requires_grad=False).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        with torch._C.DisableTorchFunctionSubclass():
            if name in _ARITHMETIC or any(isinstance(a, Tensor) and a.is_floating_point() for a in args):
                raise ValueError(_NOT_A_WEIGHT)  # a TypeError would become Python's "unsupported operand"
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point():
                raise ValueError(_NOT_A_WEIGHT)
            if name in _KEEP_CLASS and type(out) is Tensor:
                out = out.as_subclass(cls)
        return out


_NOT_A_WEIGHT = (
    "a quantised layer holds packed codes, not weights, so nothing can be added to or computed from them (a stock merge, "
    "DoRA): call model.dequantize() first, or use an hfgen adapter, whose merge quantises again"
)


def plain(tensor: Tensor) -> Tensor:
    """The tensor without its subclass, sharing memory."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(Tensor)


class PackedLinear(nn.Linear):
    """A frozen linear layer that holds W as packed codes: y = x W^T + b.

    Tensors: `weight` uint8 (`packed_shape`), `weight_scale` float16 (m, G) and, for methods with outliers,
    `outlier_idx` int32 (nnz) and `outlier_val` (nnz). An nn.Linear subclass, because peft dispatches on that.

    Args:
        config: The method's config: it gives bits and groups, and quantises again after a merge.
        transposed: The layer replaces a Conv1D, whose plain weight is (n, m).
    """

    weight_scale: Tensor
    outlier_idx: Tensor | None
    outlier_val: Tensor | None
    _columns: Columns | None = None
    _is_hf_initialized = True  # transformers must not draw codes at random; a missing tensor is an error after loading

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: PackedConfig,
        transposed: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.config, self.transposed = config, transposed
        codes = torch.empty(packed_shape(out_features, in_features, config.bits), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        groups = 1 if config.group_size is None else in_features // config.group_size
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=torch.float16, device=device))
        for name, kind in (("outlier_idx", torch.int32), ("outlier_val", torch.float16)):
            self.register_buffer(name, torch.empty(0, dtype=kind, device=device) if config.has_outliers else None)

    def packed(self) -> Packed:
        return Packed(
            plain(self.weight),
            self.weight_scale,
            self.outlier_idx,
            self.outlier_val,
            self.config.bits,
            self.in_features,
        )

    def forward(self, input: Tensor) -> Tensor:
        """y = x W^T + b in the dtype of x (autocast's where that is on).

        Raises:
            TypeError: x is not floating point: the model casts its activations to `weight.dtype`.
        """
        if not input.is_floating_point():
            raise TypeError(
                f"a quantised layer was given {input.dtype}: the model casts activations to the dtype of a weight; name "
                "the layer in modules_to_not_convert"
            )
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        y: Tensor = self._few(input) if self._is_few(input) else PackedMatmul.apply(input, *self.packed())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _is_few(self, x: Tensor) -> bool:
        """Whether this is a step of inference for `Columns`: by mode, dtype and size only, so that reloads agree."""
        return (
            not (self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
            and x.device.type == "cpu" == self.weight_scale.device.type
            and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and 0 < x.numel() <= FEW * self.in_features
            and _bag_kernel(self.config.bits) is not None
            and not torch.compiler.is_compiling()
            and not getattr(getattr(self, "_hf_hook", None), "offload", False)  # its codes are new at every call
        )

    def _few(self, x: Tensor) -> Tensor:
        if self._columns is None or self._columns.source() is not self.weight:
            self._columns = Columns.of(self.packed(), self.weight)
        return self._columns.linear(x, self.weight_scale, self.config.bits)

    def train(self, mode: bool = True) -> PackedLinear:
        if mode:
            self._columns = None
        return super().train(mode)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (m, n) in `dtype`, made in chunks of rows."""
        packed = self.packed()
        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=packed.codes.device)
        for start, stop in packed.chunks():
            out[start:stop] = packed.rows(start, stop, dtype)
        return out

    def requantize(self, weight: Tensor) -> None:
        """Hold another weight (m, n), by the config's own method."""
        self._columns = None
        found = self.config.quantize_checked(weight, "the merged layer")
        self.weight = PackedWeight(pack(found.codes, self.config.bits))
        self.weight_scale, self.outlier_idx, self.outlier_val = found.scale, found.positions, found.values

    def to_plain(self, dtype: torch.dtype) -> nn.Module:
        """The Linear or Conv1D it stands for."""
        with torch.device("meta"):
            new: nn.Module = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            )
        weight = self.dequantize(dtype)
        new.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight)
        if self.bias is not None:
            new.bias = nn.Parameter(self.bias.detach().to(dtype))
        return new.train(self.training)

    def hfgen_backend(self) -> QuantizationBackend:
        """How hfgen's adapters read and write the weight."""
        return PackedBackend(self.config.method)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weight = PackedWeight(self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._columns = None
        # `model.to(dtype)` must move scales and outliers but not round them.
        kept = {name: getattr(self, name) for name in ("weight_scale", "outlier_val")}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(self, name)
            if new is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._columns = None
        super()._load_from_state_dict(*args)

    def _save_to_state_dict(self, *args: Any) -> None:
        self._columns = None
        super()._save_to_state_dict(*args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.config.bits}, group_size={self.config.group_size}"


class PackedBackend(QuantizationBackend):
    """peft's view of a packed layer; also of the plain one that `model.dequantize()` put in its place."""

    layer_type = "linear"
    supports_merge = True

    def __init__(self, name: str) -> None:
        self.backend_name = name

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """W (m, n) in float32 of a packed layer; the weight itself of a plain one."""
        return base_layer.dequantize() if isinstance(base_layer, PackedLinear) else base_layer.weight.data

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Quantise again, so a merge (and an unmerge) is exact to the quantisation error only."""
        base = peft_layer.get_base_layer()
        if isinstance(base, PackedLinear):
            base.requantize(weight_data)
        else:
            base.weight.data = weight_data


# --- the config -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, repr=False)
class PackedConfig(QuantizationConfigMixin):
    """Fields every packed quantizer has. A method adds its own, and implements `quantize_weight`.

    Args:
        bits: Bits per code: 2, 3, 4 or 8.
        group_size: Columns that share a scale; None = the whole row. It must divide every layer's in_features.
        modules_to_not_convert: Names (suffixes or regular expressions) to keep in float, besides heads and tied
            embeddings, which always are.
        quant_method: The method's name; filled in.
        hfgen: What wrote the checkpoint and what to install; filled in.

    Raises:
        TypeError, ValueError: a field has a wrong type or value; the sentence names field, value and fix.
    """

    bits: int = 4
    group_size: int | None = None
    modules_to_not_convert: list[str] | None = None
    quant_method: str = field(default="")  # type: ignore[assignment]  # the host's enum cannot grow; a string works
    hfgen: dict[str, Any] | None = None

    method: ClassVar[str]
    quantizer_cls: ClassVar[type[HfQuantizer]]

    def __new__(cls, *args: Any, **kwargs: Any) -> PackedConfig:
        checks.known_options(cls.__name__, kwargs, [f.name for f in dataclasses.fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        owner = type(self).__name__
        checks.one_of(owner, "bits", self.bits, tuple(BLOCKS))
        if self.group_size is not None:
            checks.integer(owner, "group_size", self.group_size, 1)
        names = self.modules_to_not_convert
        checks.names(owner, "modules_to_not_convert", names)
        if names is not None:
            self.modules_to_not_convert = [names] if isinstance(names, str) else sorted(names)
        if self.quant_method not in ("", self.method):
            raise ValueError(
                f"{owner}.quant_method is {self.quant_method!r}; this is the config of {self.method!r}, leave it out"
            )
        self.quant_method = self.method
        if self.hfgen is None:
            found = catalog.distribution("quantizers", self.method)
            dist, version = found or (type(self).__module__.partition(".")[0], "0")
            install = f"pip install '{dist}>={version}'"
            self.hfgen = {"format": FORMAT, "distribution": dist, "version": version, "install": install}
        _check_format(owner, self.hfgen)
        from hfgen.hosts import transformers as host

        host.register(self.method, type(self))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The host's reader; a newer format is named before its unknown fields would be."""
        _check_format(cls.__name__, config_dict.get("hfgen", {"format": FORMAT}))
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    @property
    def has_outliers(self) -> bool:
        """Whether layers hold `outlier_idx` and `outlier_val`."""
        return False

    @abstractmethod
    def quantize_weight(self, weight: Tensor) -> Quantized:
        """Quantise one weight (m, n), finite and of any floating dtype."""

    def quantize_checked(self, weight: Tensor, name: str) -> Quantized:
        """`quantize_weight`, after and before a look at the numbers. Raises ValueError that names the layer."""
        if not torch.isfinite(weight).all():
            raise ValueError(f"the weight of {name} holds NaN or Inf; mend the model first, or leave the layer out")
        if self.has_outliers and weight.numel() >= 2**31:
            raise ValueError(
                f"the weight of {name} has {weight.numel()} entries, more than the 2**31 - 1 an outlier's position can "
                "name; leave it out with modules_to_not_convert"
            )
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            found = self.quantize_weight(weight)
        if not torch.isfinite(found.scale).all():
            largest = float(weight.abs().max())
            raise ValueError(
                f"the weight of {name} reaches {largest:.3g}: its scale does not fit float16; leave it out"
            )
        return found


def _check_format(owner: str, block: Any) -> None:
    if not isinstance(block, dict) or type(block.get("format")) is not int:
        raise TypeError(f"{owner}.hfgen is {block!r}; leave it out, it is filled in")
    if block["format"] > FORMAT:
        raise ValueError(
            f"{owner}.hfgen says format {block['format']}, this hfgen reads up to {FORMAT}; "
            "upgrade the package that offers it (`hfgen show` names it)"
        )


# --- the quantizer --------------------------------------------------------------------------------------------------


class PackOp(ConversionOps):
    """Quantise the tensors of one layer as they are read; the first error is kept for the quantizer to raise.

    (An exception from here is turned by the host into a RuntimeError that says nothing.)
    """

    def __init__(self, quantizer: PackedQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, (list, tuple)) else value
            if not self.quantizer.param_needs_quantization(model, name):
                out[name] = tensor
                continue
            try:
                out |= self._packed(name.rpartition(".")[0], tensor, get_module_from_name(model, name)[0])
            except Exception as exc:
                self.quantizer.first_error = exc
                out[name] = tensor.new_empty(0)  # of a wrong shape: the host asks the quantizer about it at once
        return out

    def _packed(self, name: str, tensor: Tensor, layer: PackedLinear) -> dict[str, Tensor]:
        weight = tensor.T if layer.transposed else tensor
        if weight.shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"the checkpoint's {name}.weight has shape {tuple(tensor.shape)}, the model wants "
                f"{(layer.out_features, layer.in_features)} (out, in); they belong to different models"
            )
        found = layer.config.quantize_checked(weight, name)
        parts = {"weight": pack(found.codes, layer.config.bits), "weight_scale": found.scale}
        if found.positions is not None and found.values is not None:
            parts |= {"outlier_idx": found.positions, "outlier_val": found.values}
        del found, weight
        if tensor.numel() >= TRIM:
            _return_freed_memory()
        return {f"{name}.{leaf}": part for leaf, part in parts.items()}


def _return_freed_memory() -> None:
    """Give freed pages back to the system: glibc keeps what a layer took, and a large model loads in twice its size."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)


class PackedQuantizer(HfQuantizer):
    """Replaces Linear and Conv1D layers by `PackedLinear`.

    Attributes:
        quantized: Names of the replaced layers.
        left_in_float: Name of every other parameter with two or more dimensions, and why.
        first_error: The first error met while quantising.
    """

    requires_calibration = False
    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantized: list[str] = []
        self.left_in_float: dict[str, str] = {}
        self.first_error: Exception | None = None

    # --- what the host asks ---------------------------------------------------------------------------------------
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def get_quantize_ops(self) -> ConversionOps:
        return PackOp(self)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor is quantised as it is read. Outliers, too: for them the host waives its check of shapes."""
        if self.first_error is not None:
            raise self.first_error
        module, leaf = get_module_from_name(model, param_name)
        wanted = ("outlier_idx", "outlier_val") if self.pre_quantized else ("weight", "outlier_idx", "outlier_val")
        return isinstance(module, PackedLinear) and leaf in wanted

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Scales and outliers keep the dtype they have in the file."""
        name = str(converter.target_patterns[0])
        kept = name.endswith((".weight_scale", ".outlier_val"))
        return None if kept else super().get_new_dtype(converter, param, dtype)

    # --- before loading -------------------------------------------------------------------------------------------
    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        _check_files(checkpoint_files or ())
        config, owner = self.quantization_config, type(self.quantization_config).__name__
        kept = self._kept_in_float(model)
        for name, module in list(model.named_modules()):
            if type(module) not in (nn.Linear, Conv1D) or name in kept:
                continue
            transposed = isinstance(module, Conv1D)
            n, m = module.weight.shape if transposed else reversed(module.weight.shape)
            if config.group_size is not None and n % config.group_size:
                raise ValueError(
                    f"{owner}.group_size is {config.group_size}, which does not divide the {n} input features of {name}; "
                    "give a divisor, None (one scale per row), or name the layer in modules_to_not_convert"
                )
            new = PackedLinear(n, m, module.bias is not None, config, transposed, "meta", module.weight.dtype)
            model.set_submodule(name, new)
            self.quantized.append(name)
        if not self.quantized:
            raise ValueError(
                f"{owner} found no layer to quantise in {type(model).__name__}: of its Linear and Conv1D layers all are "
                f"kept in float ({', '.join(sorted(kept)) or 'there are none'}); quantise another model or none"
            )
        self._account(model, kept)
        return model

    def _kept_in_float(self, model: Any) -> dict[str, str]:
        """Linear layers that stay as they are, and why."""
        user = self.quantization_config.modules_to_not_convert or []
        names = [name for name, _ in model.named_modules() if name]
        for pattern in user:
            if not self.pre_quantized and all(should_convert_module(name, [pattern]) for name in names):
                leaves = sorted({name.rpartition(".")[2] for name in names})
                close = difflib.get_close_matches(pattern.rpartition(".")[2], leaves, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"modules are called {', '.join(leaves)}"
                owner = type(self.quantization_config).__name__
                raise ValueError(f"{owner}.modules_to_not_convert has {pattern!r}, which matches no module; {hint}")
        fp32 = list(getattr(model, "_keep_in_fp32_modules", None) or [])
        ends = self.get_modules_to_not_convert(model)
        base = f"{model.base_model_prefix}." if model.base_model is not model else ""
        kept = {}
        for name, module in model.named_modules():
            if type(module) not in (nn.Linear, Conv1D):
                continue
            if not should_convert_module(name, user):
                kept[name] = "named in modules_to_not_convert"
            elif not should_convert_module(name, fp32):
                kept[name] = "the model keeps it in float32"
            elif not should_convert_module(name, ends) or not name.startswith(base) or name.endswith(HEADS):
                kept[name] = "head or tied embedding"
        return kept

    def _account(self, model: Any, kept: dict[str, str]) -> None:
        """Write down every matrix that is not quantised; fused experts, most of a model's bytes, with a warning."""
        fused = []
        for name, param in model.named_parameters():
            module, _ = get_module_from_name(model, name)
            if param.ndim < 2 or isinstance(module, PackedLinear):
                continue
            experts = param.ndim == 3 and param.shape[0] > 1 and not isinstance(module, nn.modules.conv._ConvNd)
            reason = kept.get(name.removesuffix(".weight")) or ("fused experts" if experts else type(module).__name__)
            self.left_in_float[name] = reason
            fused += [name] if experts else []
        if fused:
            share = sum(model.get_parameter(n).numel() for n in fused)
            logger.warning(
                "%s leaves %d fused expert tensors with %d weights in float: %s",
                self.quantization_config.quant_method, len(fused), share, ", ".join(fused),
            )  # fmt: skip

    # --- after loading --------------------------------------------------------------------------------------------
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.first_error is not None:
            raise self.first_error
        missing = []
        for name in self.quantized:
            layer = model.get_submodule(name)
            for leaf, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                if not getattr(tensor, "_is_hf_initialized", False):
                    missing.append(f"{name}.{leaf}")
            if not missing:  # else there may be anything in the memory
                _check_numbers(name, layer)
            layer.weight = PackedWeight(layer.weight)
        if missing:
            fix = (
                "the checkpoint is incomplete, copy or save it again"
                if self.pre_quantized
                else "name such layers in modules_to_not_convert: codes are not drawn at random"
            )
            raise ValueError(f"the checkpoint has no {', '.join(missing[:5])} ({len(missing)} tensors missing); {fix}")
        # They never change, but DDP would send every buffer at every forward; names as they are inside a PeftModel too.
        model._ddp_params_and_buffers_to_ignore = [
            f"{outside}{name}.{inside}{leaf}"
            for outside in ("", "base_model.model.")
            for name in self.quantized
            for inside in ("", "base_layer.")
            for leaf in ("weight_scale", "outlier_idx", "outlier_val")
        ]
        logger.info("%s: %d layers packed", self.quantization_config.quant_method, len(self.quantized))
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                new = module.to_plain(dtype)
                parent, _, leaf = name.rpartition(".")
                if leaf == "base_layer":  # inside an adapter: frozen, and a Conv1D's transposition is news to it
                    new.requires_grad_(False)
                    for mark in ("fan_in_fan_out", "is_target_conv_1d_layer", "is_conv1d") * module.transposed:
                        if hasattr(adapter := model.get_submodule(parent), mark):
                            setattr(adapter, mark, True)
                model.set_submodule(name, new)
        return model


def _check_files(paths: Any) -> None:
    """Raise ValueError that names the first checkpoint file which is not whole."""
    for path in paths:
        if str(path).endswith(".safetensors"):
            try:
                with safe_open(path, "pt") as file:
                    file.keys()
            except SafetensorError as exc:
                raise ValueError(f"{path} is not a complete safetensors file ({exc}); copy or save it again") from None


def _check_numbers(name: str, layer: PackedLinear) -> None:
    """Raise ValueError where the scales or outliers of a loaded layer cannot be what was saved."""
    index, value = layer.outlier_idx, layer.outlier_val
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    for leaf in ("weight_scale", "outlier_val"):
        tensor = getattr(layer, leaf)
        if tensor is None or tensor.is_meta:
            continue
        if tensor.dtype not in kinds:
            raise ValueError(
                f"{leaf} of {name} is {tensor.dtype} in the checkpoint, not {kinds[0]}; copy or save it again"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{leaf} of {name} holds NaN or Inf; the checkpoint is damaged, copy or save it again")
    if index is None or value is None or index.is_meta or not index.numel():
        return
    last = layer.out_features * layer.in_features
    if len(index) != len(value) or int(index[0]) < 0 or int(index[-1]) >= last or bool((index.diff() <= 0).any()):
        raise ValueError(
            f"the outliers of {name} are damaged: {len(index)} positions and {len(value)} values for {last} weights; "
            "save the checkpoint again"
        )
