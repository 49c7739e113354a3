"""The shelf of installed searches: every public name their cards export, a third party's too, loaded lazily."""

from hfgen.catalog import shelf as _shelf

__getattr__, __dir__ = _shelf("searches")
