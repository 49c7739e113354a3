"""How an adapter gets into peft: a PeftType member, then peft's own `register_peft_method`.

Only the enum and peft's mappings change. An upstream name is never overridden.
"""

from __future__ import annotations

import importlib.metadata
import threading
from enum import Enum
from typing import Any, cast

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from hfgen import __version__
from hfgen.catalog import CatalogError, busy

_lock = threading.Lock()  # held for dict and enum writes only: nothing is imported under it


def extend_peft_type(name: str) -> PeftType:
    """Give `PeftType` the member NAME (upper case), so that configs can be named, saved and unpickled.

    Idempotent. Works on CPython 3.11 to 3.13, where an Enum offers no public way to grow.

    Raises:
        CatalogError: peft ships a method of that name itself.
    """
    upper = name.upper()
    with _lock:
        member: Any = PeftType.__members__.get(upper)
        if member is None:
            enum: Any = PeftType
            member = str.__new__(PeftType, upper)
            member._name_, member._value_, member.__objclass__ = upper, upper, PeftType
            member._sort_order_ = len(enum._member_names_)
            member._hfgen = True
            enum._member_names_.append(upper)
            enum._member_map_[upper] = member
            enum._value2member_map_[upper] = member
            type.__setattr__(PeftType, upper, member)  # EnumType's own __setattr__ refuses member names
    if not isinstance(member, Enum) or not getattr(member, "_hfgen", False):
        raise CatalogError(
            f"peft {importlib.metadata.version('peft')} ships its own {upper}, so hfgen {__version__} does not register "
            f"{name!r}; use peft's, or install a peft without it"
        )
    return cast(PeftType, member)


def register(name: str, config_cls: type) -> None:
    """Register a config class (whose `tuner_cls` is its BaseTuner) under `name`. Twice with one class is a no-op.

    Raises:
        CatalogError: the name belongs to peft itself or to another class.
        TypeError: `config_cls` has no `tuner_cls`.
    """
    tuner_cls = getattr(config_cls, "tuner_cls", None)
    if not isinstance(tuner_cls, type):
        raise TypeError(f"{config_cls.__qualname__}.tuner_cls is {tuner_cls!r}; set it to the method's BaseTuner class")
    member = extend_peft_type(name)
    with busy("adapters", name), _lock:
        have = dict.get(PEFT_TYPE_TO_CONFIG_MAPPING, member)
        if have is None:
            register_peft_method(name=name, config_cls=config_cls, model_cls=tuner_cls)
            return
    if (have.__module__, have.__qualname__) != (config_cls.__module__, config_cls.__qualname__):
        raise CatalogError(
            f"adapter {name!r} is registered as {have.__module__}.{have.__qualname__}; "
            f"{config_cls.__module__}.{config_cls.__qualname__} needs another name"
        )
