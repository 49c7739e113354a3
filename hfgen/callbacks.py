"""The shelf of installed callbacks: every public name their cards export, a third party's too, loaded when asked for."""

from hfgen.catalog import shelf as _shelf

__getattr__, __dir__ = _shelf("callbacks")
