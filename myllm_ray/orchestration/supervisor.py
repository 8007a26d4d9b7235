"""Supervises a run on Ray across its worker groups.

An attempt starts the workers from the newest complete checkpoint. It has one of these outcomes (`Exit` in
common/types.py; `done` and `failed` have no `Exit`):

    done         The run has reached its last step. The supervisor returns.
    preempted    The run has saved a checkpoint and ended on request: another number of workers fits the cluster, a node
                 is about to leave, or the user stops the run (Ctrl-C, SIGTERM, `myllm-ray stop`). No step is lost.
                 A stop before the first step saves nothing. The next attempt follows, except after a stop.
    rewind       A bad step (engine/stability.py). The next attempt resumes from the checkpoint before it.
    aborted      The run has ended without saving, on request of a callback. The supervisor returns.
    amended      The run has saved a checkpoint at the step of an amendment (config/amendments.py), or because one was
                 requested. The next attempt follows with the amended config.
    failed       A worker died, or hung and was ended. The failure counts against `scaling.max_failures`, except when
                 Ray preempts the workers or cannot start them in time. The next attempt follows while the limit is not
                 exceeded. An error that the user must fix is raised at once.

Ray Train restarts worker groups too, but it gives no warning before a resize, and it retries errors that occur again on
every attempt. Therefore each attempt is a separate TorchTrainer without retries. Attempts are recorded in
`attempts.jsonl` in the run's folder.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myllm_ray.common.files import read_jsonl
from myllm_ray.common.signals import stop_on_signals
from myllm_ray.common.types import Exit
from myllm_ray.config.amendments import effective
from myllm_ray.config.errors import TrainingError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.engine.amendments import take_requests
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.checkpointing.manager import read_manifest
from myllm_ray.engine.environment import write_attempt
from myllm_ray.engine.liveness.hang_detector import HangDetector, Straggler
from myllm_ray.engine.liveness.heartbeat import asked, clear, request
from myllm_ray.engine.run_folder import folder_of, resume_point
from myllm_ray.orchestration.cluster import draining_nodes, largest_group, worker_resources, workers_that_fit
from myllm_ray.orchestration.failures import Failure
from myllm_ray.orchestration.group import END_SECONDS, Group, without_watcher
from myllm_ray.orchestration.heartbeats import WorkerHeartbeats
from myllm_ray.preparation import of_segment

if TYPE_CHECKING:
    from myllm_ray.data.prepare import PreparedData
    from myllm_ray.engine.liveness.startup import Startup

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_STEADY_SECONDS = 3.0
"""How long a different number of workers must fit before the run is resized. Resources fluctuate while nodes join."""
_SAY_SECONDS = 30.0


class Supervisor:
    """Runs a config on Ray to its end.

    Args:
        config: the run's config, with absolute paths.
        prepared: the run's prepared data.
        callbacks: callbacks for the workers, in addition to those of the config. They are pickled.
        startup: the context that holds the run's folder. It must stay open until `run` has returned.
        heartbeats: receives the heartbeats of the workers. It must stay open too.
    """

    def __init__(
        self,
        config: TrainerConfig,
        prepared: PreparedData,
        callbacks: Sequence[Callback],
        startup: Startup,
        heartbeats: WorkerHeartbeats,
    ):
        self.config, self.prepared, self.callbacks, self.startup = config, prepared, callbacks, startup
        self.heartbeats = heartbeats
        self.now = config
        """The config of the present segment of the run: with the amendments until now applied."""
        self.folder = folder_of(config)
        self.failures = self.restarts = 0
        self._began = False
        """Whether an earlier group has run."""
        self._node_leaves = False
        """Whether a node of the present group is about to leave."""
        self.events = startup.events

    def run(self) -> dict[str, Any]:
        """Runs attempts until the run has ended.

        Returns:
            The summary of the last attempt (`worker.run_worker`).

        Raises:
            UserError: the error that ended the run.
        """
        with stop_on_signals(self._ask_to_stop), without_watcher():
            while True:
                # A preempted attempt is followed by another one only without a request to stop the whole run.
                summary, why = self._attempt()
                kind = summary["exit"].kind if summary and summary["exit"] else None
                if summary and (kind in (None, "aborted") or asked(self.folder) is not None):
                    if kind == "amended":  # a stop was requested at the same step
                        summary["exit"] = Exit("preempted", why)
                    return self.startup.ended(summary)
                if summary and kind == "amended":
                    self.events.emit("amendment", summary["step"], reason=why)
                    continue
                self.restarts += 1
                self.events.emit("restart", reason=why, restarts=self.restarts)

    def _ask_to_stop(self, name: str) -> None:
        log.info("%s: saving a checkpoint, then stopping (a second signal stops at once)", name)
        request(self.folder, "stop", name)
        self.events.emit("request", request="stop", reason=name)

    def _attempt(self) -> tuple[dict[str, Any] | None, str]:
        """Runs one worker group.

        Returns:
            Its summary, or None if it failed and another attempt is allowed; and how it ended.
        """
        self.config = take_requests(self.config)
        start = resume_point(self.config)
        step = int(read_manifest(start)["step"]) if start else 0
        self.now = effective(self.config, step)
        workers = self._wait_for_resources()
        if workers == 0:  # a stop was requested before any worker started: nothing to save
            return self._stopped(start), ""
        # Heartbeats and requests of the previous group must not be taken for those of the next one.
        link = self.heartbeats.new_group(workers)
        clear(self.folder)
        self.startup.phase(f"starting {workers} worker{'s' * (workers > 1)}")
        log.info("starting %d worker%s%s", workers, "s" * (workers > 1), f", from step {step}" if step else "")
        group = Group(
            self.config,
            self.now,
            of_segment(self.prepared, self.now),
            {"callbacks": list(self.callbacks), "heartbeats": link},
            workers,
            start,
            self.heartbeats.read,
        )
        self._node_leaves, self._began = False, True
        try:
            straggler = self._watch(group, workers)
        except BaseException:  # also a second Ctrl-C: the workers must not outlive the driver
            group.kill()
            raise
        failure = group.failure
        if failure is not None and failure.again and self._node_leaves:  # before its workers had saved
            failure = replace(failure, reason="a node of the workers was preempted", charged=False)
        how, stopped = "done", group.ended and straggler is None and not group.summary
        if stopped:
            how = f"preempted: {asked(self.folder)}, before its first step"
        elif failure is not None:
            how = f"failed: {straggler or failure.reason}"
        elif (exit := group.summary["exit"]) is not None:
            how = f"{exit.kind}: {exit.reason}"
        last = self._last_step(step, group.summary)
        self.events.emit("attempt", last, **write_attempt(self.folder, how, workers, last, step))
        if stopped:
            return self._stopped(start), how
        if failure is None:
            if group.summary["exit"] is not None:
                log.info("%s", how)
            return group.summary, how
        self._count(failure, straggler)
        return None, str(straggler) if straggler else failure.reason

    def _stopped(self, start: Path | None) -> dict[str, Any]:
        """Returns the summary of a run that was stopped before its workers trained a step."""
        return {
            **self.startup.stopped(asked(self.folder)),
            "checkpoint": str(start) if start else None,
            "step": int(read_manifest(start)["step"]) if start else 0,
        }

    def _count(self, failure: Failure, straggler: Straggler | None) -> None:
        """Counts a failure and logs it. Returns if another attempt is allowed.

        Raises:
            UserError: the failure's error; no further attempt is allowed. Errors of other types are raised unchanged.
        """
        said = str(straggler) if straggler else failure.reason
        if not failure.again and straggler is None:
            raise failure.error
        self.failures += failure.charged
        if straggler is None:
            self.events.emit("rank_failed", reason=said, counted=failure.charged, failures=self.failures)
        if failure.charged:
            most = self.config.scaling.max_failures
            if most != -1 and self.failures > most:
                if straggler is not None:
                    raise TrainingError(said) from None
                raise failure.error
            log.warning("failure %d%s: %s", self.failures, f" of {most} allowed" if most != -1 else "", said)
        else:
            log.info("%s", said)

    def _last_step(self, step: int, summary: dict[str, Any]) -> int:
        # A group that failed has no summary; the ledger contains the steps that it trained.
        rows = [step, *(row.get("step", 0) for row in read_jsonl(self.folder / "ledger.jsonl"))]
        return int(summary["step"]) if summary else max(rows)

    def _wait_for_resources(self) -> int:
        """Waits until the run fits into the cluster. Returns the number of workers, or 0 if a stop was requested."""
        said = -_SAY_SECONDS
        while asked(self.folder) is not None or (workers := workers_that_fit(self.now)) == 0:
            if asked(self.folder) is not None:
                return 0
            if time.monotonic() - said >= _SAY_SECONDS:
                said = time.monotonic()
                self.startup.phase("waiting for resources")
                log.info(
                    "waiting for resources: %d workers of %s",
                    self.now.worker_counts()[0],
                    worker_resources(self.config.scaling),
                )
            time.sleep(_LOOK_SECONDS)
        # Ray gives back the reservations of the previous group some time after the group has ended.
        limit = time.monotonic() + (_STEADY_SECONDS if self._began else 0.0)
        while time.monotonic() < limit and workers < largest_group(self.now) and asked(self.folder) is None:
            time.sleep(0.1)
            workers = max(workers, workers_that_fit(self.now))
        return 0 if asked(self.folder) is not None else workers

    def _watch(self, group: Group, workers: int) -> Straggler | None:
        """Watches a group until it has ended.

        Ends a worker that hangs, and requests a preemption when the group should end so that a group of another size or
        on other nodes can start.

        Returns:
            The worker that hung, or None.
        """
        watch, hung = HangDetector(self.folder, self.now.stability.hang_seconds, self.heartbeats.read), None
        change: tuple[str | None, float] = (None, time.monotonic())
        leaves, ended, begun = False, 0.0, False
        while group.is_running(_LOOK_SECONDS):
            beats = self.heartbeats.read()
            if not begun and any(beat.get("phase") != "start" for beat in beats.values()):
                begun = True
                self.startup.phase("training")
            # A stop was requested before any worker trained a step, so there is nothing to save.
            if not begun and not group.ended and asked(self.folder) is not None:
                group.kill()
            if hung is None and (hung := watch.look()) is not None:
                time.sleep(2.0)  # the ranks write their stacks to the run's folder
                # Ending one worker makes the collectives of the others fail, so Ray Train ends the group by itself.
                where = {"phase": hung.phase, "seconds": round(hung.seconds, 1), "stacks": hung.stacks}
                self.events.emit("rank_hung", hung.step, failed_rank=hung.rank, **where, reason=str(hung))
                group.kill(only=hung.rank)
                ended = time.monotonic()
            if hung is not None and time.monotonic() - ended > END_SECONDS:  # the others did not fail
                group.kill()
            # Until every worker has a heartbeat, the nodes of the group are not all known.
            if len(beats) < workers or leaves:
                continue
            # A resize must be possible for some seconds before it is requested. A node that leaves does not wait.
            reason = self._why_leave(beats, workers)
            now = time.monotonic()
            if reason != change[0]:
                change = (reason, now)
            if reason is not None and (now - change[1] >= _STEADY_SECONDS or "about to leave" in reason):
                leaves, self._node_leaves = True, "about to leave" in reason
                log.info("%s: saving a checkpoint first", reason)
                request(self.folder, "preempt", reason)
                self.events.emit("request", request="preempt", reason=reason)
        return hung

    def _why_leave(self, beats: dict[int, dict[str, Any]], workers: int) -> str | None:
        """Returns why this group should end so that a group of another size or on other nodes can start, or None.

        Args:
            beats: the heartbeat of each rank.
            workers: the size of the group.
        """
        nodes = [str(beat.get("node")) for beat in beats.values()]
        leaving = draining_nodes().intersection(nodes)
        if leaving:
            return f"node {min(leaving)[:8]} is about to leave"
        scaling = self.config.scaling
        if scaling.least < scaling.most and (fit := workers_that_fit(self.now, nodes)) not in (0, workers):
            return f"{fit} workers fit instead of {workers}"
        return None
