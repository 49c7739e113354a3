"""Runs independent jobs in worker processes with progress bars; a job that raises stops the run with its traceback."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

# One thread a worker, set before a worker imports torch: two contended threads cost 3x to 15x on small models.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

Report = Callable[[int, int], None]
"""``report(done, total)``: how a job says how far it is, in steps."""


@dataclass(frozen=True)
class Job:
    """One independent piece of work: `function(**arguments, report=...)` is called in a worker."""

    label: str
    arguments: dict[str, Any] = field(default_factory=dict)


class JobError(RuntimeError):
    """A job raised, or its process died; the message ends with the job's own traceback."""


def trainer_progress(report: Report) -> Any:
    """A TrainerCallback that says how far training is, fifty times a run."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % max(1, state.max_steps // 50) == 0:
                report(state.global_step, state.max_steps)

    return Progress()


def run_jobs(
    function: Callable[..., Any],
    jobs: Sequence[Job],
    workers: int = 2,
    log: Path | None = None,
    console: Console | None = None,
) -> list[Any]:
    """Runs `function` once per job and returns the results in the order of `jobs`.

    Args:
        function: Importable by name (the workers are spawned); called as ``function(**job.arguments, report=report)``.
            What it takes and returns must be plain data.
        jobs: The jobs; they are started in this order.
        workers: Number of worker processes, one thread each, at most one per job.
        log: File that takes whatever the jobs print; None throws it away, so that the progress bars stay whole.
        console: Where progress is drawn; standard error when None.

    Raises:
        ValueError: `workers` is below 1.
        JobError: a job raised or a worker died; the other workers are stopped first.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; give 1 or more")
    context = multiprocessing.get_context("spawn")
    todo, said = context.Queue(), context.Queue()
    for item in [*enumerate(jobs), *[None] * workers]:
        todo.put(item)
    target = (function, todo, said, os.fspath(log) if log else os.devnull, os.getpid())
    processes = [context.Process(target=_work, args=target, daemon=True) for _ in range(min(workers, len(jobs)))]
    try:
        with _environment(WORKER_ENVIRONMENT):
            for process in processes:
                process.start()
        results = _collect(jobs, processes, said, console or Console(stderr=True))
        for process in processes:  # a worker that ends by itself clears its semaphores away, a killed one does not
            process.join(timeout=10)
        return results
    finally:
        todo.cancel_join_thread()  # jobs nobody took must not keep this process alive
        for process in processes:
            process.terminate()
            process.join()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets environment variables and puts the old ones back: spawned processes inherit what is set at their start."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _work(function: Callable[..., Any], todo: Any, said: Any, log: str, parent: int) -> None:
    """The worker's loop: takes jobs until it meets None. What jobs print goes to `log`. It does not outlive `parent`."""

    def report(index: int, done: int, total: int) -> None:
        if os.getppid() != parent:  # killed by a signal, it could not stop its workers
            os._exit(1)
        said.put(("step", index, (done, total)))

    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    while (item := todo.get()) is not None:
        index, job = item
        said.put(("start", index, os.getpid()))
        try:
            result = function(**job.arguments, report=functools.partial(report, index))
        except BaseException:
            said.put(("error", index, traceback.format_exc()))
            return
        said.put(("done", index, result))


def _collect(jobs: Sequence[Job], processes: Sequence[Any], said: Any, console: Console) -> list[Any]:
    """Reads what the workers say until every job is done, drawing one bar per running job and one for all."""
    results: dict[int, Any] = {}
    running: dict[int, tuple[int, TaskID, float]] = {}  # job -> (process id, bar, start)
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        everything = progress.add_task(f"all {len(jobs)} runs", total=len(jobs))
        while len(results) < len(jobs):
            try:
                kind, index, value = said.get(timeout=1.0)
            except queue.Empty:
                _check_alive(jobs, processes, running)
                continue
            if kind == "start":
                running[index] = (value, progress.add_task(jobs[index].label, total=None), time.monotonic())
            elif kind == "step":
                progress.update(running[index][1], completed=value[0], total=value[1])
            elif kind == "error":
                raise JobError(f"{jobs[index].label} failed:\n{value}")
            else:
                results[index] = value
                _, bar, start = running.pop(index)
                progress.remove_task(bar)
                progress.advance(everything)
                progress.console.print(f"  {jobs[index].label:<32} {time.monotonic() - start:5.1f} s", highlight=False)
    return [results[index] for index in range(len(jobs))]


def _check_alive(jobs: Sequence[Job], processes: Sequence[Any], running: dict[int, tuple[int, TaskID, float]]) -> None:
    """A process killed from outside (out of memory) says nothing: notice it, name its job."""
    for process in processes:
        if process.exitcode not in (None, 0):
            label = next((jobs[i].label for i, (pid, *_) in running.items() if pid == process.pid), "starting up")
            raise JobError(
                f"a worker process ended with exit code {process.exitcode} while {label}; a negative code is a signal "
                "(-9: killed, often out of memory): free memory or use fewer workers"
            )
