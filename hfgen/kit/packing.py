"""The packed format: codes of 2 to 8 bits and back, and products with weights that are held that way. No host is known.

Shapes: a weight W is (m, n) = (out, in); G groups of n / G columns share a scale. A code c stands for

    scale * (c - 2**(bits - 1)),    scale * (c - zero)    or    scale * table[c].
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = (2, 3, 4, 5, 6, 8)  # bits of a code
BLOCKS = {1: (8, 1), 2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits -> (codes, bytes) of one block
PLANES = {5: 1, 6: 2}  # bits -> those beyond the low four, which lie after these
CHUNK = 2**19  # weights made dense at a time: 4 bytes each, which stay in a CPU's cache (32 times as many elsewhere)
KERNELS = {2: "2bit", 4: "4bit", 8: "byte"}  # bits -> torch's CPU kernels for rows of codes that end in scale and bias
TAIL = {2: torch.float16, 4: torch.float16, 8: torch.float32}  # bits -> dtype of that scale and bias
FEW = 4  # tokens up to which `Columns` is faster than making the weight dense


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, ...]:
    """Shape of the packed codes of a (rows, columns) weight: (rows, bytes), or (rows, bytes, 1) where bytes = columns.

    So it never equals the plain weight's (nor its transpose's, which Conv1D stores): without the plugin a host refuses
    the checkpoint by shape, where it would otherwise read codes as weights.
    """
    width = _width(columns, bits)
    return (rows, width, 1) if width == columns else (rows, width)


def _width(columns: int, bits: int) -> int:
    """Bytes of a row."""
    if bits in PLANES:
        return _width(columns, 4) + _width(columns, PLANES[bits])
    codes, size = BLOCKS[bits]
    return -(-columns // codes) * size


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, columns), each below 2**bits -> uint8 of `packed_shape`.

    Little-endian within a block: 4 bit has the even column in the low nibble, 3 bit has 8 codes in 3 bytes; 5 and 6 bit
    have the low nibbles of the row, then the bits above them. Odd widths are padded with the middle code, 2**(bits - 1).
    """
    middle = 2 ** (bits - 1)
    if bits in PLANES:
        low, high = _blocks(codes & 15, 4, middle & 15), _blocks(codes >> 4, PLANES[bits], middle >> 4)
        packed = torch.cat([low, high], dim=1)
    else:
        packed = _blocks(codes, bits, middle)
    return packed.reshape(packed_shape(codes.shape[0], codes.shape[1], bits))


def _blocks(codes: Tensor, bits: int, fill: int) -> Tensor:
    """One plane: uint8 (rows, bytes)."""
    per_block, size = BLOCKS[bits]
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % per_block), value=fill).reshape(rows, -1, per_block)
    kind = torch.uint8 if size == 1 else torch.int32
    word = torch.zeros(padded.shape[:2], dtype=kind, device=codes.device)
    for i in range(per_block):
        word |= padded[..., i].to(kind) << (bits * i)
    packed = torch.stack([(word >> (8 * i)) & 255 for i in range(size)], dim=-1)
    return packed.to(torch.uint8).reshape(rows, -1)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 codes (rows, columns)."""
    if bits in PLANES:
        low, high = _planes(packed, bits, columns)
        return unpack(low, 4, columns) | (unpack(high, PLANES[bits], columns) << 4)
    per_block, size = BLOCKS[bits]
    blocks = packed.reshape(packed.shape[0], -1, size)
    word = blocks[..., 0]
    if size > 1:
        word = sum((blocks[..., i].to(torch.int32) << (8 * i) for i in range(1, size)), word.to(torch.int32))
    codes = [(word >> (bits * i)) & (2**bits - 1) for i in range(per_block)] if per_block > 1 else [word]
    return torch.stack(codes, dim=-1).to(torch.uint8).flatten(1)[:, :columns]


def _planes(packed: Tensor, bits: int, columns: int) -> tuple[Tensor, Tensor]:
    """The bytes of the low nibbles, and those of the bits above."""
    low, high = packed.flatten(1).split([_width(columns, 4), _width(columns, PLANES[bits])], dim=1)
    return low, high


def levels(packed: Tensor, bits: int, columns: int) -> Tensor:
    """code - 2**(bits - 1) in float32 (rows, columns), in memory of its own.

    A CPU has a kernel; on CUDA whole bytes are looked up (other devices have no 8 or 16 byte numbers to gather).
    """
    if bits in PLANES:
        low, high = _planes(packed, bits, columns)
        above = unpack(high, PLANES[bits], columns).to(torch.float32)
        return levels(low, 4, columns).add_(above, alpha=16).sub_(2 ** (bits - 1) - 8)
    if bits in KERNELS and packed.device.type == "cpu":
        one = torch.ones(packed.shape[0], 1, dtype=torch.float16)
        return _affine(packed, one, bits)[:, :columns].contiguous()
    if bits not in (2, 4) or packed.device.type != "cuda":
        return unpack(packed, bits, columns).to(torch.float32).sub_(2 ** (bits - 1))
    return _looked_up(packed, _table(bits, packed.device))[:, :columns].contiguous()


def looked_up(packed: Tensor, bits: int, columns: int, table: Tensor) -> Tensor:
    """table[code] in float32 (rows, columns), in memory of its own; table float32 (2**bits)."""
    if bits in (2, 4) and packed.device.type in ("cpu", "cuda"):
        return _looked_up(packed, _of_bytes(table, bits))[:, :columns].contiguous()
    return table.index_select(0, unpack(packed, bits, columns).flatten().to(torch.int32)).view(-1, columns)


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


def _looked_up(packed: Tensor, of_bytes: Tensor) -> Tensor:
    """What each byte stands for in float32, padding included: about twice as fast as shifts and masks."""
    found = of_bytes.index_select(0, packed.flatten().to(torch.int32))
    return found.view(torch.float32).view(packed.shape[0], -1)


def _of_bytes(table: Tensor, bits: int) -> Tensor:
    """The 2 or 4 entries of `table` that each of the 256 bytes names; those float32 are seen as one number (256)."""
    byte = torch.arange(256, device=table.device)
    codes = torch.stack([(byte >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=1)
    whole = torch.float64 if bits == 4 else torch.complex128
    return table.to(torch.float32)[codes].view(whole).flatten()


@functools.lru_cache
def _table(bits: int, device: torch.device) -> Tensor:
    """`_of_bytes` of plain codes."""
    return _of_bytes(torch.arange(2**bits, dtype=torch.float32, device=device) - 2 ** (bits - 1), bits)


class Quantized(NamedTuple):
    """One weight (m, n): W = scale * (code - 2**(bits - 1)), and `values` at the flat row-major `positions`.

    `codes` uint8 (m, n), `scale` float16 (m, G); `positions` int32 (nnz) ascending, `values` float16 or bfloat16 (nnz),
    both None for methods without outliers. With `zero`, uint8 (m, G), W = scale * (code - zero); with `table`, float32
    (2**bits), W = scale * table[code]; never both.
    """

    codes: Tensor
    scale: Tensor
    positions: Tensor | None = None
    values: Tensor | None = None
    zero: Tensor | None = None
    table: Tensor | None = None


class Packed(NamedTuple):
    """`Quantized` with packed codes, and what it takes to read them."""

    codes: Tensor
    scale: Tensor
    positions: Tensor | None
    values: Tensor | None
    bits: int
    columns: int
    zero: Tensor | None = None
    table: Tensor | None = None

    @classmethod
    def of(cls, found: Quantized, bits: int) -> Packed:
        parts = (found.scale, found.positions, found.values, bits, found.codes.shape[1], found.zero, found.table)
        return cls(pack(found.codes, bits), *parts)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of W, computed in float32 and rounded once to `dtype`."""
        weight = self._normal(start, stop)
        if self.positions is not None and self.values is not None:
            inside = self.outliers(start, stop)
            weight.view(-1).scatter_(
                0, self.positions[inside].long() - start * self.columns, self.values[inside].float()
            )
        return weight.to(dtype)

    def _normal(self, start: int, stop: int) -> Tensor:
        """Those rows without outliers, in float32."""
        codes, scale, plain = self.codes[start:stop], self.scale[start:stop], self.zero is None and self.table is None
        # Within float16 the kernel can multiply as it unpacks, and rounds nothing that a product afterwards would not.
        folds = plain and self.bits in KERNELS and codes.device.type == "cpu" and scale.shape[1] == 1
        if folds and bool(scale.max() <= 2.0**15 / 2**self.bits):
            return _affine(codes, scale, self.bits)[:, : self.columns].contiguous()
        if self.table is not None:
            weight = looked_up(codes, self.bits, self.columns, self.table)
        else:
            weight = levels(codes, self.bits, self.columns)
        weight = weight.view(stop - start, scale.shape[1], -1)
        if self.zero is not None:
            weight.sub_(_shift(self.zero[start:stop], self.bits)[:, :, None])
        return weight.mul_(scale[:, :, None].float()).view(stop - start, self.columns)

    def outliers(self, start: int, stop: int) -> slice:
        """Those of the rows [start, stop)."""
        if self.positions is None or (start == 0 and stop == self.codes.shape[0]):
            return slice(None)
        index = self.positions
        bounds = torch.tensor([start * self.columns, stop * self.columns], dtype=index.dtype, device=index.device)
        return slice(*torch.searchsorted(index, bounds).tolist())

    def zero_codes(self, positions: Tensor) -> Tensor:
        """The codes that stand for 0 at flat positions, uint8."""
        if self.zero is None:
            return torch.full_like(positions, 2 ** (self.bits - 1), dtype=torch.uint8)
        row, column = positions // self.columns, positions % self.columns
        return self.zero[row, column // (self.columns // self.zero.shape[1])]

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Row ranges of at most `CHUNK` weights (one row at least)."""
        rows = self.codes.shape[0]
        size = CHUNK if self.codes.device.type == "cpu" else 32 * CHUNK
        step = max(1, size // max(1, self.columns))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (m, n), made in chunks of rows."""
        out = torch.empty(self.codes.shape[0], self.columns, dtype=dtype, device=self.codes.device)
        for start, stop in self.chunks():
            out[start:stop] = self.rows(start, stop, dtype)
        return out


def _shift(zero: Tensor, bits: int) -> Tensor:
    """What is taken off code - 2**(bits - 1) to have code - zero, in float32."""
    return zero.float() - 2 ** (bits - 1)


class PackedMatmul(torch.autograd.Function):
    """y = x W^T with a gradient to x only. W is made again in backward, so nothing dense is kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Any) -> Tensor:
        packed = Packed(*parts)
        ctx.save_for_backward(*(part if isinstance(part, Tensor) else None for part in parts))
        ctx.form = packed.bits, packed.columns
        y = x.new_empty(*x.shape[:-1], packed.codes.shape[0])
        for start, stop in packed.chunks():
            y[..., start:stop] = F.linear(x, packed.rows(start, stop, x.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        saved = ctx.saved_tensors
        packed = Packed(*saved[:4], *ctx.form, *saved[6:])
        wide = torch.promote_types(grad.dtype, torch.float32)  # chunks add up without rounding in between
        out = grad.new_zeros(*grad.shape[:-1], packed.columns, dtype=wide)
        for start, stop in packed.chunks():
            out += grad[..., start:stop] @ packed.rows(start, stop, grad.dtype)
        return (out.to(grad.dtype), *[None] * len(saved))


@functools.cache
def bag_kernel(bits: int) -> Any:
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
    shift: Tensor | None  # float32 (G, m): zero - 2**(bits - 1) of affine codes
    source: weakref.ref[Tensor]  # the layer's codes, to see that it still has them

    @classmethod
    def of(cls, packed: Packed, source: Tensor) -> Columns:
        rows, bits, n = packed.codes.shape[0], packed.bits, packed.columns
        per_byte = 8 // bits
        one = torch.ones(n, 1, dtype=torch.float16)
        table = torch.empty(n, -(-rows // per_byte), dtype=torch.uint8)
        step = max(per_byte, CHUNK // n // per_byte * per_byte)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            codes = unpack(packed.codes[start:stop], bits, n).contiguous()
            if packed.positions is not None:  # there the code that stands for 0
                inside = packed.positions[packed.outliers(start, stop)].long()
                codes.view(-1)[inside - start * n] = packed.zero_codes(inside)
            table[:, start // per_byte : -(-stop // per_byte)] = pack(codes.T, bits).flatten(1)
        shift = None if packed.zero is None else _shift(packed.zero, bits).T.contiguous()
        return cls(torch.cat([table, _tail(one, bits)], dim=1), _csr(packed), shift, weakref.ref(source))

    def linear(self, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        """x W^T (..., m) in the dtype of x, computed in float32; x (..., n), scale (m, G)."""
        (rows, groups), columns = scale.shape, self.table.shape[0]
        tokens = x.reshape(-1, columns).float()
        index, offsets = _bags(tokens.shape[0], columns, groups)
        sums = bag_kernel(bits)(self.table, index, offsets, False, 0, False, tokens.view(-1))[:, :rows]
        if self.shift is not None:
            inputs = tokens.view(-1, groups, columns // groups).sum(-1)
            sums = sums - (inputs[:, :, None] * self.shift).view(-1, rows)
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
