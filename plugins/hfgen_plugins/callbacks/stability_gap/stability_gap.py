"""Continual evaluation: what happens to earlier tasks while a later one is trained."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hfgen.kit import checks
from hfgen.kit.examples import ROWS, tiny_run, token_accuracy
from hfgen.kit.measures import Probe, greater
from hfgen.kit.monitor import Event, MonitorCallback

HORIZON = 100  # steps after a task's end in which its fall is the stability gap's
RECOVERED = 0.95  # of the accuracy at the task's end
SHARE = 0.1  # of the wall time that every="auto" takes at most


class Track:
    """The accuracies of one task, taken in one by one, in constant time and memory each.

    Args:
        windows: Window lengths in evaluations.
        start: Last step before the task (0 for the first).
        end: Its last step, or None while it is unknown.
        beta: Evaluations the learning-curve area is the mean of.

    Attributes:
        last: The latest accuracy. at_end: The latest within the task. lowest: The lowest after its end.
        depth: Greatest fall below `at_end` in the first `HORIZON` steps after its end. recovery: Steps from its end until
            it was back at `RECOVERED` of it, once it had been below.
        forgetting, plasticity: Per window the greatest fall and rise between two of its evaluations so far, >= 0.
    """

    def __init__(self, windows: Sequence[int], start: int, end: int | None, beta: int = 10) -> None:
        self.start, self.end, self.beta, self.count, self.first = start, end, beta, 0, 0.0
        self.last: float | None = None
        self.at_end: float | None = None
        self.lowest: float | None = None
        self.depth: float | None = None
        self.recovery: int | None = None
        self.below = False
        self.forgetting = {str(w): 0.0 for w in windows}
        self.plasticity = {str(w): 0.0 for w in windows}
        # monotone queues of [index, accuracy]: their heads are the window's highest and lowest
        self.highs: dict[str, list[list[float]]] = {str(w): [] for w in windows}
        self.lows: dict[str, list[list[float]]] = {str(w): [] for w in windows}

    def add(self, step: int, accuracy: float) -> None:
        """Takes in the accuracy after `step`; steps do not go back, and none is before `start`."""
        for window in self.forgetting:
            highs, lows, oldest = self.highs[window], self.lows[window], self.count - int(window) + 1
            for queue, sign, worst in ((highs, 1, self.forgetting), (lows, -1, self.plasticity)):
                while queue and queue[0][0] < oldest:
                    queue.pop(0)
                if queue:
                    worst[window] = max(worst[window], sign * (queue[0][1] - accuracy))
                while queue and sign * (queue[-1][1] - accuracy) <= 0:
                    queue.pop()
                queue.append([self.count, accuracy])
        self.first += accuracy if self.count < self.beta else 0.0
        self.count += 1
        self.last = accuracy
        if self.end is None or step <= self.end:
            self.at_end = accuracy if step > self.start or self.start == 0 else self.at_end
            return
        self.lowest = accuracy if self.lowest is None else min(self.lowest, accuracy)
        if self.at_end is None:
            return
        if step <= self.end + HORIZON:
            self.depth = max(self.depth or 0.0, self.at_end - accuracy)
        if accuracy < RECOVERED * self.at_end:
            self.below = True
        elif self.below and self.recovery is None:
            self.recovery = step - self.end

    @property
    def area(self) -> float:
        """Mean of the first `beta` accuracies (LCA)."""
        return self.first / max(1, min(self.beta, self.count))


def summary(tracks: Sequence[Track]) -> dict[str, float]:
    """The metrics after an evaluation; the last track is the current task's, those before it have ended.

    acc: mean latest accuracy; wc_acc = (A(k, t) + sum of the earlier tasks' minima) / k; lca; and of the earlier tasks
    min_acc (mean minimum since their end), forgetting (mean of at_end - latest), wf_W (mean windowed forgetting), depth
    (greatest), recovery (mean of those that have recovered); wp_W: windowed plasticity of the current task.
    """
    *earlier, now = tracks
    minima = [track.lowest for track in earlier if track.lowest is not None]
    latest = [track.last for track in tracks if track.last is not None]
    found = {"acc": _mean(latest), "lca": _mean([track.area for track in tracks])}
    found |= {f"wp_{w}": value for w, value in now.plasticity.items()}
    if now.last is not None and len(minima) == len(earlier):
        found["wc_acc"] = (now.last + sum(minima)) / len(tracks)
    if minima:
        found["min_acc"] = _mean(minima)
        found |= {f"wf_{w}": _mean([track.forgetting[w] for track in earlier]) for w in now.forgetting}
    falls = [t.at_end - t.last for t in earlier if t.at_end is not None and t.last is not None]
    depths = [t.depth for t in earlier if t.depth is not None]
    back = [float(t.recovery) for t in earlier if t.recovery is not None]
    found |= {"forgetting": _mean(falls)} if falls else {}
    found |= {"depth": max(depths)} if depths else {}
    return found | ({"recovery": _mean(back)} if back else {})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class StabilityGapCallback(MonitorCallback):
    """Follows the accuracy on earlier tasks while a later one is trained.

    The accuracy on an earlier task often falls in the first steps of the next and comes back; evaluation at the ends of
    tasks does not see it. Metrics, under ``hfgen/stability_gap/``, at each evaluation: those of `summary`, ``task`` (the
    current one, from 1), and ``accuracy/<task>`` of every task so far. Windows count evaluations; with evaluations every
    e steps a window of W is W e steps. Source: De Lange et al. 2023, section 3 (min-ACC, WC-ACC, WF, WP).

    Finding ``stability_gap``: the accuracy on an ended task fell by more than `fall` within 100 steps. Finding
    ``forgetting``: it is that much lower later. Their step is the task's end. Confidence: probability that the
    accuracy is lower at all, given as many rows (two proportions).

    Args:
        tasks: Names of the tasks in the order of training: keys of the dictionary ``eval_dataset``.
        ends: The last step of every task but the last (or of all).
        metric: Name of the accuracy in the evaluations' metrics, without prefix; SFTTrainer: ``mean_token_accuracy``.
        every: None: the user's evaluations. A number: the callback itself evaluates all tasks so far (accuracy on valid
            targets), every so many steps, at step 0 and at the ends of tasks. ``"auto"``: as often as 10 % of the time
            allows, chosen by the clock, so that two runs may differ. The latter two need the attached trainer.
        fall: Fall of accuracy that is a finding.
        windows: Window lengths in evaluations.
        samples: Rows per task, the same at every evaluation (with `every`).
        trainer: See `MonitorCallback`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range; in `train()`: a task without evaluation set or
            metric.
    """

    name = "stability_gap"
    cost = (
        "none but the user's evaluations; every='auto' takes up to 10 % of the time, every=1 a forward of up to 1000 rows "
        "per task at each step, far more than training itself"
    )
    witness = "an evaluation of an earlier task"
    looks_first = False

    def __init__(
        self,
        tasks: Sequence[str],
        ends: Sequence[int],
        metric: str = "accuracy",
        every: int | str | None = None,
        fall: float = 0.1,
        windows: Sequence[int] = (10, 100),
        samples: int = 1000,
        trainer: Any = None,
    ) -> None:
        owner = type(self).__name__
        checks.names(owner, "tasks", tasks, optional=False)
        self.tasks, self.ends, self.windows = list(tasks), list(ends), list(windows)
        if isinstance(tasks, str) or len(set(self.tasks)) < max(2, len(self.tasks)):
            raise ValueError(f"{owner}.tasks is {tasks!r}; give the names of two tasks or more, each once")
        for end, before in zip(self.ends, [0, *self.ends], strict=False):
            checks.integer(owner, "ends", end, low=before + 1)
        if len(self.tasks) - len(self.ends) not in (0, 1):
            raise ValueError(
                f"{owner}.ends has {len(self.ends)} steps for {len(self.tasks)} tasks; give the last step of every task "
                "but the last"
            )
        for window in self.windows:
            checks.integer(owner, "windows", window, low=2)
        if not isinstance(metric, str) or metric.endswith("loss"):
            raise ValueError(f"{owner}.metric is {metric!r}; give the name of an accuracy (higher is better)")
        if isinstance(every, str):
            checks.one_of(owner, "every", every, ("auto",))
        checks.number(owner, "fall", fall, low=0.0, high=1.0)
        checks.integer(owner, "samples", samples, low=1)
        super().__init__(None if every == "auto" else every, trainer)  # type: ignore[arg-type]
        self.schedule, self.metric, self.fall, self.samples = every, metric, fall, samples
        self._tracks: list[Track] = []
        self._seen: dict[str, tuple[int, float, int]] = {}
        self._probes: dict[str, tuple[Probe, int]] = {}
        self._spent = self._cost = self._allowed = self._clock = 0.0
        self._reset()

    def _reset(self) -> None:
        ends = [*self.ends, None][: len(self.tasks)]
        starts = [0, *self.ends][: len(self.tasks)]
        self._tracks = [Track(self.windows, *edges) for edges in zip(starts, ends, strict=True)]

    def arguments(self) -> dict[str, Any]:
        fields = ("tasks", "ends", "metric", "fall", "windows", "samples")
        return {field: getattr(self, field) for field in fields} | {"every": self.schedule}

    def state_dict(self) -> dict[str, Any]:
        return {"tracks": [dict(vars(track)) for track in self._tracks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for track, saved in zip(self._tracks, state["tracks"], strict=True):
            vars(track).update({k: v for k, v in saved.items() if k not in ("start", "end")})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._reset()
        super().on_train_begin(args, state, control, **kwargs)

    def begin(self, event: Event) -> None:
        self._seen, self._probes, self._spent, self._cost, self._allowed = {}, {}, 0.0, 0.0, 0.0
        self._clock = time.perf_counter()
        if self.schedule is None:
            return
        self.needs_forward(event, ", or every=None")
        owner, sets = type(self).__name__, getattr(self.trainer, "eval_dataset", None)
        if not isinstance(sets, Mapping):
            raise ValueError(
                f"{owner}.every is {self.schedule!r} and no trainer with a dictionary of evaluation sets is attached; "
                "call attach(trainer), or set every=None to use the trainer's evaluations"
            )
        if missing := [task for task in self.tasks if task not in sets]:
            raise ValueError(f"{owner}.tasks has {missing[0]!r}, but eval_dataset has {', '.join(sets)}; give its keys")
        for task in self.tasks:
            loader = self.trainer.get_eval_dataloader(task)
            probe = Probe(owner, event, self.samples, 10**9, dataloader=loader)
            self._probes[task] = probe, min(self.samples, len(loader.dataset))
        if self.schedule == "auto" and not event.state.global_step:
            self._look(event)

    # --- the user's evaluations -------------------------------------------------------------------------------------

    def evaluated(self, event: Event, dataset: str, metrics: dict[str, float]) -> dict[str, float]:
        if self.schedule is not None or dataset not in self.tasks:
            return {}
        if self.metric not in metrics:
            raise ValueError(
                f"StabilityGapCallback.metric is {self.metric!r}, and the evaluation of {dataset!r} has "
                f"{', '.join(sorted(metrics))}; give one of these that is an accuracy, or a compute_metrics to the Trainer"
            )
        rows, step = getattr(event.eval_dataloader, "dataset", ()), event.state.global_step
        self._seen[dataset] = step, float(metrics[self.metric]), len(rows) if hasattr(rows, "__len__") else 1
        seen = {task: self._seen[task] for task in self._so_far(step) if task in self._seen}
        if len(seen) == len(self._so_far(step)) and all(at == step for at, _, _ in seen.values()):
            self._keep(step, self._take(step, {task: (value, n) for task, (_, value, n) in seen.items()}))
        return {}

    # --- its own evaluations ----------------------------------------------------------------------------------------

    def look(self, event: Event) -> dict[str, float]:
        if self.schedule is None:
            return {}
        step, start = event.state.global_step, time.perf_counter()
        probes = {task: self._probes[task] for task in self._so_far(step)}
        values = {task: (probe.accuracy(event.model), rows) for task, (probe, rows) in probes.items()}
        self._cost = time.perf_counter() - start
        self._spent += self._cost
        return self._take(step, values)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        step = state.global_step
        at_end = self.schedule is not None and step in (*self.ends, state.max_steps)
        if at_end or (self.schedule == "auto" and self._affordable(step, args)):
            self.look_now(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.schedule is None:
            super().on_evaluate(args, state, control, metrics=metrics, **kwargs)

    def _affordable(self, step: int, args: Any) -> bool:
        """Whether one more evaluation keeps the share; the first rank's clock decides for all."""
        fresh, now = any(end < step <= end + HORIZON for end in self.ends), time.perf_counter()
        self._allowed += (SHARE if fresh else SHARE / 2) * (now - self._clock)
        self._clock = now
        answer = torch.tensor(float(self._spent + self._cost <= self._allowed), device=args.device)
        if args.world_size > 1:
            torch.distributed.broadcast(answer, src=0)
        return bool(answer)

    # --- both -------------------------------------------------------------------------------------------------------

    def _so_far(self, step: int) -> list[str]:
        """The tasks up to the current one; at its end also the next, before its first step."""
        return [task for task, track in zip(self.tasks, self._tracks, strict=True) if step >= track.start]

    def _take(self, step: int, values: dict[str, tuple[float, int]]) -> dict[str, float]:
        """Takes the accuracies in: {task: (accuracy, rows)}; gives the metrics."""
        current = sum(end < step for end in self.ends[: len(self.tasks) - 1])
        for task, track in zip(self.tasks, self._tracks, strict=True):
            if task in values:
                track.add(step, values[task][0])
        if current:
            self.fire()
        for task, track in list(zip(self.tasks, self._tracks, strict=True))[:current]:
            self._judge(step, task, track, self.tasks[current], values[task][1])
        found = summary(self._tracks[: current + 1]) | {"task": current + 1}
        return found | {f"accuracy/{task}": value for task, (value, _) in values.items()}

    def _judge(self, step: int, task: str, track: Track, current: str, rows: int) -> None:
        if track.at_end is None or track.last is None or track.end is None or track.at_end - track.last <= self.fall:
            return
        early = step <= track.end + HORIZON
        sure = greater(track.at_end, track.last, max(1, rows))
        what = f"fell from {track.at_end:.0%} to {track.last:.0%}"
        sentence, advice = (
            f"Stability gap: accuracy on the earlier task {task!r} {what} within {step - track.end} steps of its end, "
            f"while {current!r} is trained.",
            "Replay rows of earlier tasks from the first step of the new one, and warm the learning rate up there.",
        ) if early else (
            f"Forgetting: accuracy on the earlier task {task!r} {what} since its end at step {track.end} and has not come "
            "back.",
            "Replay rows of earlier tasks, lower the learning rate, or train an adapter per task.",
        )  # fmt: skip
        follow = ("overfit", "overconfident", "loss_spike", "divergence", *(["forgetting"] if early else []))
        kind = "stability_gap" if early else "forgetting"
        self.finding(kind, track.end, sure, sentence, advice, explains=follow)


def example(folder: str) -> dict[str, Any]:
    """Keyword arguments of a tiny Trainer run of two tasks with evaluations (for the conformance kit)."""
    monitor = StabilityGapCallback(["a", "b"], ends=[2], windows=[2, 3])
    tasks = {"eval_dataset": {"a": ROWS[:8], "b": ROWS[16:]}, "callbacks": [monitor]}
    return tiny_run(folder, evaluate_every=1) | token_accuracy() | tasks
