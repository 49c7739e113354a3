"""What hfgen costs before it is used: `import hfgen`, `hfgen ls`, and the hook at the end of `import torch`.

    OMP_NUM_THREADS=1 python recipes/bench/startup.py --processes 15 --out recipes/bench/results/startup.json

Every figure is taken in fresh processes. The hook's cost is measured inside them (loading the entry point and calling
it, as torch does): `import torch` itself varies by far more than a millisecond. That import, with and without the hook
and with torch's autoloading off, is timed as well, interleaved, for information.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

IMPORT_HFGEN = """
import sys, time
start = time.process_time()
import hfgen
seconds = time.process_time() - start
heavy = {"torch", "transformers", "peft", "trl", "accelerate", "datasets"} & set(sys.modules)
assert not heavy, f"import hfgen imported {sorted(heavy)}"
print(seconds)
"""
# torch is imported without its autoloading, then what its autoloading does with our entry point is timed.
HOOK = """
import time
import torch
from importlib.metadata import entry_points
(hook,) = [e for e in entry_points(group="torch.backends") if e.name == "hfgen"]
start = time.perf_counter()
hook.load()()
print(time.perf_counter() - start)
"""
IMPORT_TORCH = """
import time
start = time.perf_counter()
import torch
print(time.perf_counter() - start)
"""
TORCH_ARMS = {
    "import torch, hook on": {"HFGEN_AUTOLOAD": "1"},
    "import torch, hook off": {"HFGEN_AUTOLOAD": "0"},
    "import torch, torch's autoloading off": {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
}
BARS = {"import hfgen": 0.05, "hfgen ls": 0.4, "hook": 0.001}
LABELS = {"import hfgen": "import hfgen, CPU", "hfgen ls": "hfgen ls, wall", "hook": "hook added to import torch, wall"}


@dataclass
class StartupArguments:
    processes: int = field(default=15, metadata={"help": "Fresh processes of each kind, after one warm-up each."})
    out: str | None = field(default=None, metadata={"help": "JSON file to write."})


def fresh(code: str, env: dict[str, str] | None = None) -> float:
    """The number that `code` prints in a new interpreter."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def hfgen_ls() -> float:
    """Wall seconds of the installed command `hfgen ls`, interpreter start included."""
    command = Path(sysconfig.get_path("scripts")) / "hfgen"
    start = time.perf_counter()
    subprocess.run([command, "ls"], capture_output=True, check=True)
    return time.perf_counter() - start


def summary(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "seconds": values}


def measure(processes: int) -> dict[str, dict[str, Any]]:
    """Every figure, interleaved: process i of each kind runs before process i + 1 of any."""
    work: dict[str, Callable[[], float]] = {
        "import hfgen": partial(fresh, IMPORT_HFGEN),
        "hfgen ls": hfgen_ls,
        "hook": partial(fresh, HOOK, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}),
        **{name: partial(fresh, IMPORT_TORCH, env) for name, env in TORCH_ARMS.items()},
    }
    for run in work.values():  # caches: bytecode, disk
        run()
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(processes):
        for name, run in work.items():
            found[name].append(run())
    return {name: summary(values) for name, values in found.items()}


def print_report(report: dict[str, Any]) -> None:
    table = Table(title=f"Start-up, {report['arguments']['processes']} fresh processes each")
    for column in ("what", "median", "min", "max", "bar", "met"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, row in report["figures"].items():
        cells = [f"{row[k] * 1e3:.2f} ms" for k in ("median", "min", "max")]
        bar = report["bars"].get(name)
        verdict = (f"< {bar['bar'] * 1e3:g} ms", "yes" if bar["met"] else "[red]no") if bar else ("", "")
        table.add_row(LABELS.get(name, name), *cells, *verdict)
    Console(width=None if os.isatty(1) else 110).print(table)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench; returns the report it prints."""
    (args,) = HfArgumentParser(StartupArguments).parse_args_into_dataclasses(argv)
    if args.processes < 1:
        raise ValueError(f"processes is {args.processes}; give 1 or more")
    load = os.getloadavg()
    figures = measure(args.processes)
    medians = {name: figures[name]["median"] for name in BARS}
    report = {
        "arguments": asdict(args),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "load_average": {"before": load, "after": os.getloadavg()},
        "figures": figures,
        "bars": {n: {"value": medians[n], "bar": bar, "met": medians[n] < bar} for n, bar in BARS.items()},
    }
    print_report(report)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    return report


if __name__ == "__main__":
    main()
