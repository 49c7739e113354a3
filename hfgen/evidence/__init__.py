"""Claims are computed: run an experiment over seeds, put intervals on it, say what came out. Knows no method.

A method's ``evidence.py`` gives an `Experiment`; `run_experiment` runs its arms over seeds in worker processes and
returns the report as plain data; `write_report` makes ``report.json`` and a self-contained ``report.html`` of it.
Importing this package imports neither torch nor scipy nor matplotlib.
"""

from .experiment import FORMAT, Arm, Experiment, Metric, run_experiment
from .jobs import Job, JobError, run_jobs
from .report import write_report
from .stats import LEVEL, Check, Interval, Verdict, at_least, at_most, interval, verdict

__all__ = [
    "FORMAT",
    "LEVEL",
    "Arm",
    "Check",
    "Experiment",
    "Interval",
    "Job",
    "JobError",
    "Metric",
    "Verdict",
    "at_least",
    "at_most",
    "interval",
    "run_experiment",
    "run_jobs",
    "verdict",
    "write_report",
]
