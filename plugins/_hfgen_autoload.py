"""Entry point of group `torch.backends`: lets host mappings look unknown names up among installed hfgen plugins.

Standard library only, a top-level module of its own (no package __init__ runs), and nothing here may raise: torch turns
any exception into a failed `import torch`. `HFGEN_AUTOLOAD=0` turns it off.

A mapping is swapped for a `LazyMapping` at the moment its own module has finished executing, before an importer can bind
it. Where the host was imported earlier, its dict stays and is filled in place through the host's register function.
"""

import os
import sys
from importlib.machinery import ModuleSpec

# module that owns the mappings -> (kind in the catalogue, names of its dicts)
_TARGETS = {
    "peft.mapping": ("adapters", ("PEFT_TYPE_TO_CONFIG_MAPPING",)),
    "transformers.quantizers.auto": ("quantizers", ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING")),
}
_pending: set[str] = set()  # targets not handled yet
_busy: set[str] = set()  # targets whose spec is being looked up by us right now


def _warn(message):
    import warnings

    warnings.warn(f"hfgen: {message}", RuntimeWarning, stacklevel=3)


class LazyMapping(dict):
    """A dict that asks the catalogue for a missing name once it is asked for, and is a plain dict otherwise."""

    __slots__ = ("_host", "_kind")

    def __init__(self, data, kind, host):
        super().__init__(data)
        self._kind, self._host = kind, host

    def _load(self, key):
        # While the host itself is being imported it registers its own methods: nothing to look up.
        if getattr(getattr(sys.modules.get(self._host), "__spec__", None), "_initializing", False):
            return False
        try:
            from hfgen import catalog
        except Exception as exc:  # a moved clone or a broken install must not change what the host does
            _warn(f"cannot look {key!r} up, hfgen does not import ({exc!r}); reinstall it or set HFGEN_AUTOLOAD=0")
            return False
        return catalog.lookup(self._kind, key) and dict.__contains__(self, key)

    def __missing__(self, key):
        if self._load(key):
            return dict.__getitem__(self, key)
        raise KeyError(key)

    def __contains__(self, key):
        return dict.__contains__(self, key) or self._load(key)

    def get(self, key, default=None):
        return self[key] if key in self else default  # noqa: SIM401 (that is this method)


class _WatchedSpec(ModuleSpec):
    """A ModuleSpec that swaps the mappings when the import system says that the module has been executed."""

    @property
    def _initializing(self):
        return self.__dict__.get("_hfgen_initializing", False)

    @_initializing.setter
    def _initializing(self, value):
        was, self.__dict__["_hfgen_initializing"] = self._initializing, value
        if was and not value:
            _swap(self.name)


def _watch(spec):
    flag = spec.__dict__.pop("_initializing", False)
    spec.__class__ = _WatchedSpec
    spec.__dict__["_hfgen_initializing"] = flag


def _swap(name):
    """Swap the dicts of a module that has just been executed (it is absent if its execution failed)."""
    module = sys.modules.get(name)
    if module is None or name not in _pending:
        return
    _pending.discard(name)
    kind, attributes = _TARGETS[name]
    for attribute in attributes:
        old = getattr(module, attribute, None)
        if type(old) is dict:
            setattr(module, attribute, LazyMapping(old, kind, name.partition(".")[0]))
        else:
            _warn(f"{name}.{attribute} is {type(old).__name__}, not a dict: this host version is untested")


class _Finder:
    """Watches the import of the targets; finds nothing itself."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname not in _pending or fullname in _busy:
            return None
        _busy.add(fullname)
        try:
            from importlib.util import find_spec

            spec = find_spec(fullname)
            if type(spec) is ModuleSpec:
                _watch(spec)
            return spec
        except Exception as exc:  # never break a foreign import: the ordinary finders go on
            _warn(f"could not hook {fullname}: {exc!r}")
            return None
        finally:
            _busy.discard(fullname)


def _arrive(name):
    """Handle a target that is in sys.modules already: half-way through (watch it) or done (fill it in place)."""
    module = sys.modules.get(name)
    if module is None:
        return
    spec = getattr(module, "__spec__", None)
    if getattr(spec, "_initializing", False):
        if type(spec) is ModuleSpec:
            _watch(spec)
        return
    _pending.discard(name)
    from hfgen import catalog

    catalog.register_all(_TARGETS[name][0])


def install():
    """Put the hook in place, once. Called at the end of `import torch` and by `import hfgen`."""
    if os.environ.get("HFGEN_AUTOLOAD", "1") == "0" or any(f is _Finder for f in sys.meta_path):
        return
    _pending.update(_TARGETS)
    sys.meta_path.insert(0, _Finder)
    for name in _TARGETS:
        try:
            _arrive(name)
        except Exception as exc:
            _warn(f"could not register with {name.partition('.')[0]}, which was imported earlier: {exc!r}")
