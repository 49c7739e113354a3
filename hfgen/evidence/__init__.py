"""Claims are computed: run an experiment over seeds, put intervals on it, say what came out. Knows no method.

A method's ``evidence.py`` gives an `Experiment`; `run_experiment` runs its arms over seeds in worker processes and
returns the report as plain data; `write_report` makes ``report.json`` and a self-contained ``report.html`` of it. The
ledger (``ledger.json`` beside ``evidence.py``) keeps the report that counts; EVIDENCE.md is rendered from all ledgers.
Importing this package imports neither torch nor scipy nor matplotlib.
"""

from .experiment import FORMAT, Arm, Experiment, Metric, run_experiment, settings_sha256
from .jobs import Job, JobError, run_jobs
from .ledger import LedgerError, enter, find_experiment, ledger_file, read_ledger, render
from .report import write_report
from .stats import LEVEL, Check, Interval, Verdict, at_least, at_most, interval, paired, verdict

__all__ = [
    "FORMAT",
    "LEVEL",
    "Arm",
    "Check",
    "Experiment",
    "Interval",
    "Job",
    "JobError",
    "LedgerError",
    "Metric",
    "Verdict",
    "at_least",
    "at_most",
    "enter",
    "find_experiment",
    "interval",
    "ledger_file",
    "paired",
    "read_ledger",
    "render",
    "run_experiment",
    "run_jobs",
    "settings_sha256",
    "verdict",
    "write_report",
]
