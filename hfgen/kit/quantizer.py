"""Weight-only quantizers on transformers' HfQuantizer: a method turns one weight into codes, scales and outliers.

What this base gives every method: the packed linear layer of 2 to 8 bit (`hfgen.kit.packing`), loading one tensor at a
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
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft.utils.quantization_utils import QuantizationBackend
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.base import _assign_is_quantized
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfgen import catalog
from hfgen.kit import checks
from hfgen.kit.packing import (
    FEW,
    WIDTHS,
    Columns,
    Packed,
    PackedMatmul,
    Quantized,
    bag_kernel,
    pack,
    packed_shape,
)

logger = logging.getLogger("hfgen")

FORMAT = 2  # of the `hfgen` block in config.json; readers accept every number up to this one
TRIM = 2**20  # weights of a layer from which on freed memory is given back after it
HEADS = ("classifier", "score", "qa_outputs", "lm_head")  # heads of models whose base has no attribute of its own
# Beside `weight`: the tensors a layer may hold, and what their floating dtypes are protected from (casts of the model).
PARTS = ("weight_scale", "weight_zero", "weight_table", "outlier_idx", "outlier_val")
EXACT = ("weight_scale", "weight_table", "outlier_val")


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

    Tensors: `weight` uint8 (`packed_shape`), `weight_scale` float16 (m, G) and, as the method has them, `weight_zero`
    uint8 (m, G), `weight_table` float32 (2**bits), `outlier_idx` int32 (nnz) and `outlier_val` (nnz). An nn.Linear
    subclass, because peft dispatches on that.

    Args:
        config: The layer's own config (`PackedConfig.for_layer`): it gives bits and groups, and quantises again after a
            merge.
        transposed: The layer replaces a Conv1D, whose plain weight is (n, m).
    """

    weight_scale: Tensor
    weight_zero: Tensor | None
    weight_table: Tensor | None
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
        for name, there, shape, kind in (
            ("weight_zero", config.has_zeros, (out_features, groups), torch.uint8),
            ("weight_table", config.has_table, (2**config.bits,), torch.float32),
            ("outlier_idx", config.has_outliers, (0,), torch.int32),
            ("outlier_val", config.has_outliers, (0,), torch.float16),
        ):
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device) if there else None)

    @classmethod
    def of(cls, linear: nn.Module, config: PackedConfig, found: Quantized) -> PackedLinear:
        """The packed form of a Linear or Conv1D, whose bias it takes over; `found` is what became of its weight."""
        m, n = found.codes.shape
        new = cls(n, m, linear.bias is not None, config, isinstance(linear, Conv1D), "meta", linear.weight.dtype)
        new.bias = linear.bias
        new.hold(found)
        return new.train(linear.training)

    def hold(self, found: Quantized) -> None:
        """Take another weight's codes."""
        self._columns = None
        self.weight = PackedWeight(pack(found.codes, self.config.bits))
        self.weight_scale, self.weight_zero, self.weight_table = found.scale, found.zero, found.table
        self.outlier_idx, self.outlier_val = found.positions, found.values

    def packed(self) -> Packed:
        return Packed(
            plain(self.weight),
            self.weight_scale,
            self.outlier_idx,
            self.outlier_val,
            self.config.bits,
            self.in_features,
            self.weight_zero,
            self.weight_table,
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
            and self.weight_table is None
            and bag_kernel(self.config.bits) is not None
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
        return self.packed().dense(dtype)

    def requantize(self, weight: Tensor) -> None:
        """Hold another weight (m, n), by the config's own method."""
        self.hold(self.config.quantize_checked(weight, "the merged layer"))

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
        # `model.to(dtype)` must move scales, tables and outliers but not round them.
        kept = {name: getattr(self, name) for name in EXACT}
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
        bits: Bits per code: 2, 3, 4, 5, 6 or 8.
        bits_map: Bits per code of single layers, {module name: bits}, as `hfgen search` finds them; all others have
            `bits`.
        group_size: Columns that share a scale; None = the whole row. It must divide every layer's in_features.
        modules_to_not_convert: Names (suffixes or regular expressions) to keep in float, besides heads and tied
            embeddings, which always are.
        quant_method: The method's name; filled in.
        hfgen: What wrote the checkpoint and what to install; filled in.

    Raises:
        TypeError, ValueError: a field has a wrong type or value; the sentence names field, value and fix.
    """

    bits: int = 4
    bits_map: dict[str, int] | None = None
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
        checks.one_of(owner, "bits", self.bits, WIDTHS)
        if self.bits_map is not None and not isinstance(self.bits_map, dict):
            raise TypeError(
                f"{owner}.bits_map is {self.bits_map!r}; give a dict {{module name: bits}}, or leave it out"
            )
        for name, bits in (self.bits_map or {}).items():
            checks.one_of(owner, f"bits_map[{name!r}]", bits, WIDTHS)
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

    @property
    def has_zeros(self) -> bool:
        """Whether layers hold `weight_zero`: affine codes."""
        return False

    @property
    def has_table(self) -> bool:
        """Whether layers hold `weight_table`: codes into a table."""
        return False

    @property
    def calibrated(self) -> bool:
        """Whether quantising needs data: `calibrate` then does it, and `from_pretrained` only loads what it made."""
        return False

    def for_layer(self, name: str) -> PackedConfig:
        """The config that the layer of this name holds: with its own bits, and no map."""
        return dataclasses.replace(self, bits=(self.bits_map or {}).get(name, self.bits), bits_map=None)

    def before_reading(self, weights: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        """Called once before a checkpoint is quantised as it is read, for methods with numbers about the whole model.

        `weights()` gives (layer name, weight (m, n)) of every layer to be quantised, read from the files one at a time.
        """

    def calibrate(
        self,
        model: Any,
        rows: list[dict[str, Any]],
        progress: Callable[[int, int], None] | None = None,
        partial: Path | None = None,
    ) -> Any:
        """Quantise `model` (float, in memory) with data; returns it with packed layers, ready for `save_pretrained`.

        Args:
            rows: dicts with `input_ids` (and `attention_mask`), one sequence each; or a model's other inputs.
            progress: Called with (layers done, layers in all).
            partial: A folder for what is done; given again after an interruption, the run goes on from there.
        """
        raise TypeError(f"{type(self).__name__} needs no data: from_pretrained(quantization_config=...) quantises")

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
        made = (found.scale, found.zero, found.table, found.positions, found.values)
        parts = {"weight": pack(found.codes, layer.config.bits), **dict(zip(PARTS, made, strict=True))}
        del found, weight
        if tensor.numel() >= TRIM:
            return_freed_memory()
        return {f"{name}.{leaf}": part for leaf, part in parts.items() if part is not None}


def return_freed_memory() -> None:
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
        calibration: What a calibration found, as its method says; None for a loaded checkpoint.
    """

    requires_calibration = False
    quantization_config: PackedConfig
    calibration: dict[str, Any] | None = None

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        if quantization_config.calibrated and not kwargs.get("pre_quantized", True):
            owner, method = type(quantization_config).__name__, quantization_config.method
            raise ValueError(
                f"{owner} needs data to quantise with: run `hfgen quantize MODEL --method {method} --calib FILE --out DIR` "
                "and load DIR, or call config.calibrate(model, rows) on a model loaded without it"
            )
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
        kept = name.endswith(tuple(f".{leaf}" for leaf in EXACT))
        return None if kept else super().get_new_dtype(converter, param, dtype)

    # --- before loading -------------------------------------------------------------------------------------------
    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        _check_files(checkpoint_files or ())
        config, strict = self.quantization_config, not self.pre_quantized
        found, kept = self.choose(model, strict)
        if strict:
            with torch.device("cpu"):  # the host calls from within its meta device
                config.before_reading(functools.partial(_read_weights, model, checkpoint_files, found, self))
        for name, module in found.items():
            transposed, own = isinstance(module, Conv1D), config.for_layer(name)
            n, m = module.weight.shape if transposed else reversed(module.weight.shape)
            new = PackedLinear(n, m, module.bias is not None, own, transposed, "meta", module.weight.dtype)
            model.set_submodule(name, new)
        self.quantized = list(found)
        self._account(model, kept)
        return model

    def choose(self, model: Any, strict: bool) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """({name: Linear or Conv1D} that are quantised in `model`, {name: why} of those that stay in float).

        The names of `bits_map` become those of this model, where it is the base or the whole of the one they were
        found for. With `strict`, a name in the config that means nothing here is an error.

        Raises:
            ValueError: such a name, a group_size that does not divide a layer's inputs, or nothing to quantise.
        """
        config, kept, found = self.quantization_config, self._kept_in_float(model, strict), {}
        owner = type(config).__name__
        for name, module in model.named_modules():
            if type(module) not in LINEARS or name in kept:
                continue
            n = module.nx if isinstance(module, Conv1D) else module.in_features
            if config.group_size is not None and n % config.group_size:
                raise ValueError(
                    f"{owner}.group_size is {config.group_size}, which does not divide the {n} input features of {name}; "
                    "give a divisor, None (one scale per row), or name the layer in modules_to_not_convert"
                )
            found[name] = module
        if not found:
            raise ValueError(
                f"{owner} found no layer to quantise in {type(model).__name__}: of its Linear and Conv1D layers all are "
                f"kept in float ({', '.join(sorted(kept)) or 'there are none'}); quantise another model or none"
            )
        _own_names(model, config, found, kept, strict)
        return found, kept

    def _kept_in_float(self, model: Any, strict: bool) -> dict[str, str]:
        """Linear layers that stay as they are, and why."""
        user = self.quantization_config.modules_to_not_convert or []
        names = [name for name, _ in model.named_modules() if name]
        for pattern in user:
            if strict and all(should_convert_module(name, [pattern]) for name in names):
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
            if type(module) not in LINEARS:
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
        for name, param in model.named_parameters(remove_duplicate=False):
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
        self.finish(model)
        return model

    def finish(self, model: Any) -> None:
        """What is left to do once every packed layer holds its tensors."""
        # They never change, but DDP would send every buffer at every forward; names as they are inside a PeftModel too.
        model._ddp_params_and_buffers_to_ignore = [
            f"{outside}{name}.{inside}{leaf}"
            for outside in ("", "base_model.model.")
            for name in self.quantized
            for inside in ("", "base_layer.")
            for leaf in PARTS
        ]
        logger.info("%s: %d layers packed", self.quantization_config.quant_method, len(self.quantized))

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


LINEARS = (nn.Linear, Conv1D, PackedLinear)  # the last where a calibration has packed some layers already


# --- which layers ---------------------------------------------------------------------------------------------------


def quantizable(model: Any, config: PackedConfig) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """`PackedQuantizer.choose` for a model in memory, where every name in the config must mean something."""
    return config.quantizer_cls(config, pre_quantized=True).choose(model, strict=True)


def _own_names(
    model: Any, config: PackedConfig, found: Mapping[str, Any], kept: Mapping[str, str], strict: bool
) -> None:
    """Write `config.bits_map` in the names of `model`."""
    own, prefix, owner = {}, f"{model.base_model_prefix}.", type(config).__name__
    for name, bits in (config.bits_map or {}).items():
        here = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in found), None)
        if here is not None:
            own[here] = bits
        elif strict and name in kept:
            raise ValueError(f"{owner}.bits_map names {name!r}, which is kept in float ({kept[name]}); leave it out")
        elif strict:
            close = difflib.get_close_matches(name, list(found), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"layers are called {', '.join(list(found)[:4])}, ..."
            raise ValueError(f"{owner}.bits_map names {name!r}, which is no layer of {type(model).__name__}; {hint}")
    if config.bits_map is not None:
        config.bits_map = own


def adopt(model: Any, config: PackedConfig, layers: Mapping[str, PackedLinear]) -> Any:
    """Make `model` (float, in memory) the quantised model that loading a packed checkpoint gives, with these layers.

    Args:
        layers: A packed layer for every name of `quantizable(model, config)`; each has its own config.

    Returns:
        The same model: hosts now see a quantised one, `save_pretrained` writes a packed checkpoint.

    Raises:
        ValueError: there is a layer too few or too many.
    """
    found, kept = quantizable(model, config)
    if odd := sorted(set(found) ^ set(layers)):
        raise ValueError(
            f"layers has {len(layers)} entries, the config quantises {len(found)} layers; they differ in {odd[0]}: give "
            "a packed layer for each, or name those that stay in float in modules_to_not_convert"
        )
    quantizer = config.quantizer_cls(config, pre_quantized=True)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    quantizer.quantized = list(found)
    quantizer._account(model, kept)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.hf_quantizer, model.config.quantization_config = quantizer, config
    _assign_is_quantized(model)
    quantizer.finish(model)
    return model


def _read_weights(
    model: Any, files: Any, found: Mapping[str, Any], quantizer: PackedQuantizer
) -> Iterator[tuple[str, Tensor]]:
    """(layer name, weight (m, n)) of the layers in `found`, from safetensors files, a tensor at a time.

    Weights that the host puts together from several tensors are not among them.
    """
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise ValueError(
            f"{type(quantizer.quantization_config).__name__} looks at all weights before it quantises the first, which "
            "needs safetensors files; save the model with save_pretrained and load that folder"
        )
    mapping = get_model_conversion_mapping(model, None, quantizer)
    renamings = [c for c in mapping if isinstance(c, WeightRenaming)]
    converters = [c for c in mapping if isinstance(c, WeightConverter)]
    have = model.state_dict()
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (a file is no dict)
                target, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, have)
                name, _, leaf = target.rpartition(".")
                if leaf == "weight" and name in found and converted is None:
                    tensor = file.get_tensor(key)
                    yield name, tensor.T if isinstance(found[name], Conv1D) else tensor


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
    for leaf in EXACT:
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
