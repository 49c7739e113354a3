"""hfgen: research methods for better-generalising fine-tuning, as plugins Hugging Face models pick up.

Importing this package imports neither torch nor a host library. It installs the lookup hook (see `_hfgen_autoload`)
in case torch did not: with `HFGEN_AUTOLOAD=0` it does nothing, and methods are reached through the shelves
(`from hfgen.adapters import SVFitConfig`).
"""

__version__ = "0.1.0"

try:
    import _hfgen_autoload as _autoload
except ImportError:  # a source tree that was never installed: the shelves work, pickup by name needs the install
    _autoload = None  # type: ignore[assignment]
if _autoload is not None:
    _autoload.install()
