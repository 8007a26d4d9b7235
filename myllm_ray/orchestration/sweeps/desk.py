"""Where a training loop hands in what it has reached, and waits until Tune has decided what becomes of it."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any, cast

import ray

from myllm_ray.common.files import write_atomic
from myllm_ray.common.types import RunState
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.pulse import asked

GO_ON, ABANDON, LEAVE = "go on", "abandon", "leave"
_LOOK_SECONDS = 0.3


class Desk:
    """Between two threads of a process; in a Ray actor, between processes (`RemoteDesk`).

    Args:
        folder: the run's. The sweep's driver can abandon a trial there (`pulse.request`), also one whose actor Tune keeps warm
            without telling it anything.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._reports: queue.Queue[tuple[int, dict[str, float]]] = queue.Queue()
        self._verdicts: queue.Queue[str] = queue.Queue()

    def report(self, step: int, metrics: dict[str, float]) -> str:
        """The training's side: GO_ON, ABANDON or (saving first) LEAVE, when that is known."""
        self._reports.put((step, metrics))
        while True:
            try:
                verdict = self._verdicts.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                verdict = None
            if asked(self._folder, "stop") is not None:  # the sweep was interrupted: this trial shall go on another time
                return LEAVE
            if verdict is not None or asked(self._folder, "abandon") is not None:
                return verdict or ABANDON

    def poll(self, seconds: float) -> tuple[int, dict[str, float]] | None:
        """Tune's side: the next report, if there is one in time."""
        try:
            return self._reports.get(timeout=seconds)
        except queue.Empty:
            return None

    def answer(self, verdict: str) -> None:
        self._verdicts.put(verdict)


class RemoteDesk:
    """A desk in an actor; picklable, for the workers of a trial."""

    def __init__(self, folder: str):
        self._actor: Any = cast(Any, ray).remote(num_cpus=0, max_concurrency=4)(Desk).remote(folder)

    def report(self, step: int, metrics: dict[str, float]) -> str:
        return str(ray.get(self._actor.report.remote(step, metrics)))

    def poll(self, seconds: float) -> tuple[int, dict[str, float]] | None:
        found: tuple[int, dict[str, float]] | None = ray.get(self._actor.poll.remote(seconds))
        return found

    def answer(self, verdict: str) -> None:
        ray.get(self._actor.answer.remote(verdict))

    def close(self) -> None:
        ray.kill(self._actor)


class TrialReporter(Callback):
    """In every worker: at fixed steps rank 0 hands in the metrics, and all ranks do what Tune says, at that very step.

    Args:
        desk: a `Desk` or `RemoteDesk`.
        metric: the sweep's; nothing is handed in as long as it has not been logged anew.
        every: steps between two reports.
    """

    def __init__(self, desk: Any, metric: str, every: int):
        self._desk, self._metric, self._every = desk, metric, every
        self._metrics: dict[str, float] = {}
        self._fresh, self._reported = False, 0

    def on_train_start(self, state: RunState) -> None:
        self._reported = state.step
        if state.is_main and state.folder and isinstance(self._desk, RemoteDesk):
            group = ray.util.get_current_placement_group()
            if group is not None:
                write_atomic(Path(state.folder) / PLACEMENT_GROUP, group.id.hex(), durable=False)

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        self._metrics |= metrics
        self._fresh |= self._metric in metrics

    def decides(self, state: RunState) -> bool:
        return self._fresh and state.step // self._every > self._reported // self._every and state.step < state.total_steps

    def on_batch_end(self, state: RunState) -> None:
        if not self.decides(state):
            return
        self._fresh, self._reported = False, state.step
        verdict = self._desk.report(state.step, self._metrics) if state.is_main else GO_ON
        if verdict != GO_ON:
            state.request(verdict, "the sweep has ended this trial")


PLACEMENT_GROUP = ".placement_group"
"""File with the id of the workers' placement group: what is left of it when the trial is gone is removed."""
