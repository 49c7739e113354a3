"""How a quantizer gets into transformers: its config class and its HfQuantizer, in the two mappings, by its functions.

Only the two mappings change. An upstream name is never overridden.
"""

from __future__ import annotations

import importlib.metadata
import threading

from transformers.quantizers import auto

from hfgen import __version__
from hfgen.catalog import CatalogError, busy

_lock = threading.Lock()  # held for dict writes only: nothing is imported under it


def register(name: str, config_cls: type) -> None:
    """Register a config class (whose `quantizer_cls` is its HfQuantizer) under `name`. Twice with one class is a no-op.

    Raises:
        CatalogError: the name belongs to transformers itself or to another class.
        TypeError: `config_cls` has no `quantizer_cls`.
    """
    quantizer_cls = getattr(config_cls, "quantizer_cls", None)
    if not isinstance(quantizer_cls, type):
        raise TypeError(
            f"{config_cls.__qualname__}.quantizer_cls is {quantizer_cls!r}; set it to the method's HfQuantizer class"
        )
    slots = (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, config_cls, auto.register_quantization_config),
        (auto.AUTO_QUANTIZER_MAPPING, quantizer_cls, auto.register_quantizer),
    )
    with busy("quantizers", name), _lock:
        held = [(dict.get(mapping, name), cls, add) for mapping, cls, add in slots]
        for have, cls, _ in held:  # both are looked at before either is written
            if have is not None and _name(have) != _name(cls):
                _refuse(name, have, cls)
        for have, cls, add in held:
            if have is None:
                add(name)(cls)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _refuse(name: str, have: type, cls: type) -> None:
    if have.__module__.startswith("transformers."):
        raise CatalogError(
            f"transformers {importlib.metadata.version('transformers')} ships its own {name!r}, so hfgen {__version__} "
            "does not register one; use transformers', or install a transformers without it"
        )
    raise CatalogError(f"quantizer {name!r} is registered as {_name(have)}; {_name(cls)} needs another name")
