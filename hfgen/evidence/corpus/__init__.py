"""Labelled tiny runs: what monitors are calibrated on, and what their published detection rates are counted on.

``python -m hfgen.evidence.corpus make`` trains every run anew (stock Trainer, monitors attached, one thread each) and
writes ``corpus.jsonl.xz``; ``... figures`` makes the detection figures of the shipped runs and writes
``detection.json``. A run's label says what was done to it; the step at which that sets in is measured on rows that no
monitor sees. Importing this package imports neither torch nor a host.
"""

from .cases import COUNTS, plan, settings
from .figures import halves, read_corpus, read_figures, section

__all__ = ["COUNTS", "halves", "plan", "read_corpus", "read_figures", "section", "settings"]
