"""How many answers a second judge `code` judges, one at a time and several at once.

    OMP_NUM_THREADS=1 python recipes/bench/judges.py --out recipes/bench/results/judges.json

Every judgement is the whole of it: a fresh `python -I -S`, namespaces, an empty root, limits, the answer in a process of
its own, the tests in another. Beside it, interleaved round by round: the same start without a sandbox (`python -I -S -c
pass`), which is the floor of any judge that starts a process per answer, and judge `exact`, which starts none. Half of
the answers are right; verdicts are checked.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from hfgen.judges import CodeJudge, ExactJudge

BAR = 20.0  # judgements a second on two cores
TESTS = ["assert f([3, 1, 2]) == [1, 2, 3]", "assert f([]) == []", "assert f([1, 1]) == [1, 1]"]
RIGHT = (
    "```python\ndef f(xs):\n    out = []\n    for x in xs:\n        out.append(x)\n    out.sort()\n    return out\n```"
)
WRONG = RIGHT.replace("    out.sort()\n", "")


@dataclass
class BenchArguments:
    answers: int = field(default=40, metadata={"help": "Answers judged in one round."})
    rounds: int = field(default=7, metadata={"help": "Rounds that are timed, after one to warm up."})
    workers: str = field(default="1,2,4", metadata={"help": "Judgements at a time, comma-separated."})
    out: str | None = field(default=None, metadata={"help": "JSON file to write."})


def judge_all(judge: Any, count: int) -> float:
    """Answers a second, over `count` of them."""
    calls = [("sort", RIGHT if i % 2 else WRONG, RIGHT, {"tests": TESTS}) for i in range(count)]
    start = time.perf_counter()
    found = judge.many(calls) if hasattr(judge, "many") else [judge(*c[:3], **c[3]) for c in calls]
    seconds = time.perf_counter() - start
    if found != [bool(i % 2) for i in range(count)]:
        raise RuntimeError(f"judge {judge} is wrong: {found}")
    return count / seconds


def bare_starts(count: int) -> float:
    """Starts of `python -I -S -c pass` a second, one at a time."""
    start = time.perf_counter()
    for _ in range(count):
        subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], env={}, check=True)
    return count / (time.perf_counter() - start)


def main() -> None:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()
    kinds: dict[str, Any] = {
        f"code, {n} at a time": CodeJudge(allow_code_execution=True, workers=int(n)) for n in args.workers.split(",")
    }
    rates: dict[str, list[float]] = {name: [] for name in (*kinds, "bare start", "exact")}
    for _ in range(args.rounds + 1):
        for name, judge in kinds.items():
            rates[name].append(judge_all(judge, args.answers))
        rates["bare start"].append(bare_starts(args.answers))
        rates["exact"].append(judge_all(ExactJudge(), args.answers))
    table = Table(title=f"Answers a second, {os.cpu_count()} cores", title_justify="left")
    for column in ("judge", "median", "lowest", "highest"):
        table.add_column(column, justify="right")
    found = {}
    for name, all_rounds in rates.items():
        timed = all_rounds[1:]
        found[name] = {"median": statistics.median(timed), "lowest": min(timed), "highest": max(timed)}
        table.add_row(name, *(f"{v:.1f}" for v in found[name].values()))
    Console().print(table)
    best = max(found[name]["median"] for name in kinds)
    print(f"bar {BAR:g} a second: {'met' if best >= BAR else 'not met'} ({best:.1f})")
    report = {
        "format": 1, "answers_per_second": found, "bar": BAR, "met": best >= BAR, "answers": args.answers,
        "rounds": args.rounds, "cores": os.cpu_count(), "load_average": os.getloadavg()[0],
        "platform": platform.platform(), "python": platform.python_version(),
    }  # fmt: skip
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
        print(f"written: {args.out}")


if __name__ == "__main__":
    main()
