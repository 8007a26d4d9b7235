"""Channel on which a training loop reports its metrics and waits for Tune's decision to continue or end the trial."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any, cast

import ray

from myllm_ray.common.files import write_atomic
from myllm_ray.common.types import RunState
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.liveness.heartbeat import asked

CONTINUE, ABORT, PREEMPT = "continue", "abort", "preempt"
_LOOK_SECONDS = 0.3


class TrialChannel:
    """Channel between two threads of a process, or between processes as a Ray actor (`RemoteTrialChannel`).

    Args:
        folder: the run's folder. The sweep's driver can end a trial with a request there (`heartbeat.request`), also a
            trial whose actor Tune keeps for reuse without a notification.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._reports: queue.Queue[tuple[int, dict[str, float]]] = queue.Queue()
        self._verdicts: queue.Queue[str] = queue.Queue()

    def report(self, step: int, metrics: dict[str, float]) -> str:
        """Called by the training: reports metrics and waits for the decision.

        Args:
            step: optimizer steps done.
            metrics: the last logged metrics, by name.

        Returns:
            CONTINUE, ABORT, or PREEMPT (save a checkpoint, then end).
        """
        self._reports.put((step, metrics))
        while True:
            try:
                verdict = self._verdicts.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                verdict = None
            # A request to stop (such as an interrupted sweep) has priority over Tune's decision: the trial saves a
            # checkpoint, so that it can be resumed.
            if asked(self._folder, "stop") is not None:
                return PREEMPT
            if verdict is not None or asked(self._folder, "abort") is not None:
                return verdict or ABORT

    def poll(self, seconds: float) -> tuple[int, dict[str, float]] | None:
        """Called by Tune's trial: waits for at most `seconds` and returns the next report (step, metrics), or None."""
        try:
            return self._reports.get(timeout=seconds)
        except queue.Empty:
            return None

    def answer(self, verdict: str) -> None:
        self._verdicts.put(verdict)


class RemoteTrialChannel:
    """A `TrialChannel` in a Ray actor. It can be pickled, for the workers of a trial."""

    def __init__(self, folder: str):
        # Several concurrent calls, because `report` blocks in the actor until `answer` is called.
        self._actor: Any = cast(Any, ray).remote(num_cpus=0, max_concurrency=4)(TrialChannel).remote(folder)

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
    """Callback on every rank: rank 0 reports the metrics at fixed steps, and all ranks apply the decision at that step.

    Args:
        channel: a `TrialChannel` or `RemoteTrialChannel`.
        metric: the sweep's metric. Nothing is reported until it has been logged again since the last report.
        every: steps between two reports.
    """

    def __init__(self, channel: Any, metric: str, every: int):
        self._channel, self._metric, self._every = channel, metric, every
        self._metrics: dict[str, float] = {}
        self._fresh, self._reported = False, 0

    def on_train_start(self, state: RunState) -> None:
        self._reported = state.step
        if state.is_main and state.folder and isinstance(self._channel, RemoteTrialChannel):
            # With the id in a file, the sweep's driver can remove the group after the trial's actor was killed.
            group = ray.util.get_current_placement_group()
            if group is not None:
                write_atomic(Path(state.folder) / PLACEMENT_GROUP, group.id.hex(), durable=False)

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        self._metrics |= metrics
        self._fresh |= self._metric in metrics

    def decides(self, state: RunState) -> bool:
        return (
            self._fresh and state.step // self._every > self._reported // self._every and state.step < state.total_steps
        )

    def on_batch_end(self, state: RunState) -> None:
        if not self.decides(state):
            return
        # Only rank 0 waits for the decision. `decides` is the same on all ranks, and the engine applies the request of
        # one rank to all of them, in this step.
        self._fresh, self._reported = False, state.step
        verdict = self._channel.report(state.step, self._metrics) if state.is_main else CONTINUE
        if verdict != CONTINUE:
            state.request(verdict, "the sweep has ended this trial")


PLACEMENT_GROUP = ".placement_group"
"""File with the id of the workers' placement group, which is removed if it still exists after the trial's end."""
