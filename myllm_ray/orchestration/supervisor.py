"""One run, however many worker groups it takes.

    attempt    start the workers from the newest whole checkpoint; it ends in one of these ways:
      done       the run has reached its end
      left       it saved and ended because it was asked to: another number of workers fits the cluster, a node is about to
                 leave, or somebody stops the run (Ctrl-C, SIGTERM, `myllm-ray stop`); no step is lost
      rewound    a bad step: the next attempt goes back to the checkpoint before it (engine/stability.py)
      failed     a worker died, or hung and was ended; counts against scaling.max_failures
    after all but the first (and a stop), the next attempt.

Ray Train restarts groups too, but gives no warning before a resize, and repeats errors that would only come again. So
every attempt is a TorchTrainer of its own, without retries, and what happens between them can be read here. Attempts
stand in `attempts.jsonl`.
"""

from __future__ import annotations

import logging
import math
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from myllm_ray.common.distributed import backend
from myllm_ray.common.files import JSONLines, read_jsonl
from myllm_ray.common.signals import stop_on_signals
from myllm_ray.common.types import Position, steps_of_run
from myllm_ray.config.errors import TrainingError, UserError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.checkpoint import read_manifest
from myllm_ray.engine.pulse import asked, clear, read_beats, request
from myllm_ray.engine.run_folder import folder_of, resume_point
from myllm_ray.engine.watch import Lag, Watch
from myllm_ray.orchestration.cluster import draining_nodes, kill_process, worker_resources, workers_that_fit
from myllm_ray.orchestration.controller import END, EndOnRequest
from myllm_ray.orchestration.failures import Failure, explain
from myllm_ray.orchestration.loops import LAUNCHED, train_loop
from myllm_ray.orchestration.ray_data import build_dataset, execution_options

if TYPE_CHECKING:
    from myllm_ray.data.prepare import PreparedData
    from myllm_ray.engine.startup import Startup

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_STEADY_SECONDS = 3.0
"""How long another number of workers must fit before the run is resized: resources come and go while nodes join."""
_END_SECONDS = 30.0
"""How long the others may take to notice that a worker was ended."""
_SAY_SECONDS = 30.0


class Supervisor:
    """Runs a config on Ray to its end.

    Args:
        config: with absolute paths.
        prepared: its data.
        callbacks: for the workers, besides those of the config that belong there; they are pickled.
        startup: occupies the run's folder, and ends after this.
    """

    def __init__(self, config: TrainerConfig, prepared: PreparedData, callbacks: Sequence[Callback], startup: Startup):
        self.config, self.prepared, self.callbacks, self.startup = config, prepared, callbacks, startup
        self.folder = folder_of(config)
        self.failures = 0
        self._attempts = JSONLines(self.folder / "attempts.jsonl", keep=lambda row: True)

    def run(self) -> dict[str, Any]:
        """Attempt after attempt; returns the summary of the last (`worker.run_worker`).

        Raises:
            UserError: what ended the run for good.
        """
        try:
            with stop_on_signals(self._ask_to_stop):
                while True:
                    summary = self._attempt()
                    if summary is not None and (summary["left"] is None or summary["abandoned"] or asked(self.folder) is not None):
                        return summary
        finally:
            self._attempts.close()

    def _ask_to_stop(self, name: str) -> None:
        log.info("%s: saving a checkpoint, then stopping (once more: at once)", name)
        request(self.folder, "stop", name)

    def _attempt(self) -> dict[str, Any] | None:
        """One worker group. Its summary, or None if it failed and there may be another."""
        workers = self._wait_for_room()
        start = resume_point(self.config)
        step = int(read_manifest(start)["step"]) if start else 0
        if workers == 0:  # asked to stop while no workers were there: nothing to save
            return self._stopped(start)
        clear(self.folder)
        self.startup.phase(f"starting {workers} worker{'s' * (workers > 1)}")
        log.info("starting %d worker%s%s", workers, "s" * (workers > 1), f", from step {step}" if step else "")
        group = _Group(self.config, self.prepared, self.callbacks, workers, start)
        try:
            lag = self._watch(group, workers)
        except BaseException:
            group.kill()
            raise
        failure = group.failure
        how, stopped = "done", group.ended and lag is None and not group.summary
        if stopped:
            how = f"left: {asked(self.folder)}, before its first step"
        elif failure is not None:
            how = f"failed: {lag or failure.reason}"
        elif group.summary["left"] is not None:
            how = f"{'rewound' if group.summary['rewound'] else 'left'}: {group.summary['left']}"
        self._attempts.write({"workers": workers, "from_step": step, "to_step": self._last_step(step, group.summary), "end": how,
                              "time": time.time()})
        if stopped:
            return self._stopped(start)
        if failure is None:
            if group.summary["left"] is not None:
                log.info("%s", how)
            return group.summary
        self._count(failure, lag)
        return None

    def _stopped(self, start: Path | None) -> dict[str, Any]:
        """The summary of a run that was asked to stop while nobody trained."""
        return {**self.startup.stopped(asked(self.folder)), "checkpoint": str(start) if start else None,
                "step": int(read_manifest(start)["step"]) if start else 0}

    def _count(self, failure: Failure, lag: Lag | None) -> None:
        """Whether another attempt is allowed after a failure; what went wrong if not."""
        said = str(lag) if lag else failure.reason
        if not failure.again and lag is None:
            raise failure.error
        if failure.charged:
            self.failures += 1
            most = self.config.scaling.max_failures
            if most != -1 and self.failures > most:
                if lag is not None:
                    raise TrainingError(said) from None
                raise failure.error
            log.warning("failure %d%s: %s", self.failures, f" of {most} allowed" if most != -1 else "", said)
        else:
            log.info("%s", said)

    def _last_step(self, step: int, summary: dict[str, Any]) -> int:
        rows = [step, *(row.get("step", 0) for row in read_jsonl(self.folder / "ledger.jsonl"))]
        return int(summary["step"]) if summary else max(rows)

    def _wait_for_room(self) -> int:
        """Until the cluster has room for the run; then the number of workers. 0: somebody has asked to stop."""
        said = -_SAY_SECONDS
        while asked(self.folder) is not None or (workers := workers_that_fit(self.config)) == 0:
            if asked(self.folder) is not None:
                return 0
            if time.monotonic() - said >= _SAY_SECONDS:
                said = time.monotonic()
                self.startup.phase("waiting for room")
                log.info("waiting for room: %d workers of %s", self.config.worker_counts()[0], worker_resources(self.config.scaling))
            time.sleep(_LOOK_SECONDS)
        return workers

    def _watch(self, group: _Group, workers: int) -> Lag | None:
        """While a group runs: end it when a worker hangs, ask it to leave when it should. Returns who hung."""
        watch, hung = Watch(self.folder, self.config.stability.hang_seconds), None
        change: tuple[str | None, float] = (None, time.monotonic())
        leaves, ended, begun = False, 0.0, False
        while group.is_running(_LOOK_SECONDS):
            beats = read_beats(self.folder)
            if not begun and any(beat.get("phase") != "start" for beat in beats.values()):
                begun = True
                self.startup.phase("training")
            if not begun and not group.ended and asked(self.folder) is not None:  # nothing was trained: nothing to save
                group.kill()
            if hung is None and (hung := watch.look()) is not None:
                time.sleep(2.0)  # for the stacks
                group.kill(only=hung.rank)
                ended = time.monotonic()
            if hung is not None and time.monotonic() - ended > _END_SECONDS:  # the others did not notice
                group.kill()
            if len(beats) < workers or leaves:
                continue
            reason = self._why_leave(beats, workers)
            now = time.monotonic()
            if reason != change[0]:
                change = (reason, now)
            if reason is not None and (now - change[1] >= _STEADY_SECONDS or "about to leave" in reason):
                leaves = True
                log.info("%s: saving a checkpoint first", reason)
                request(self.folder, "leave", reason)
        return hung

    def _why_leave(self, beats: dict[int, dict[str, Any]], workers: int) -> str | None:
        """Why this group should make way for another one."""
        nodes = [str(beat.get("node")) for beat in beats.values()]
        leaving = draining_nodes().intersection(nodes)
        if leaving:
            return f"node {min(leaving)[:8]} is about to leave"
        if self.config.scaling.least < self.config.scaling.most and (fit := workers_that_fit(self.config, nodes)) not in (0, workers):
            return f"room for {fit} workers instead of {workers}"
        return None


class _Group:
    """One TorchTrainer, running in a thread so that the main thread can watch, and hear Ctrl-C."""

    def __init__(self, config: TrainerConfig, prepared: PreparedData, callbacks: Sequence[Callback], workers: int, start: Path | None):
        self.summary: dict[str, Any] = {}
        self.ended = False
        """Whether `kill` has ended the whole group."""
        self.failure: Failure | None = None
        self._folder = folder_of(config)
        self._trainer = _trainer(config, prepared, callbacks, workers, start)
        self._thread = threading.Thread(target=self._fit, name="myllm-ray-fit", daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self.summary = cast(Any, self._trainer.fit()).return_value
        except UserError as error:
            self.failure = Failure(error, str(error), again=False)
        except BaseException as error:
            self.failure = explain(error) if self.ended else explain(error).kept(self._folder)
        finally:
            shutil.rmtree(self._folder / ".ray", ignore_errors=True)

    def is_running(self, seconds: float) -> bool:
        """Whether it still runs after so many seconds."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def kill(self, only: int | None = None) -> None:
        """End all workers, or one, whatever they do; with all of them the controller, which may be about to start them."""
        if only is None:
            self.ended = True
            request(self._folder, END, "")
            self._thread.join(_END_SECONDS)
            if not self._thread.is_alive():
                return
        for rank, beat in read_beats(self._folder).items():
            try:
                if only in (None, rank):
                    kill_process(beat)
            except Exception as error:  # Ray is going down, and takes them along
                log.debug("could not end worker %s: %s", beat.get("rank"), error)
        if only is None:
            self._thread.join(20)


def _trainer(config: TrainerConfig, prepared: PreparedData, callbacks: Sequence[Callback], workers: int, start: Path | None) -> TorchTrainer:
    scaling = config.scaling

    def remaining() -> ray.data.Dataset:
        """The data from the checkpoint to the end of the run."""
        manifest: dict[str, Any] = read_manifest(start) if start else {"step": 0, "position": {"epoch": 0, "row": 0}}
        per_batch = config.steps_per_batch
        total = steps_of_run(config.run.max_steps, config.run.epochs, per_batch, prepared.train.steps_in_epoch)
        return build_dataset(prepared.train, Position(**manifest["position"]), max(0, total - manifest["step"]) // per_batch)

    launched = {"prepared": prepared, "callbacks": list(callbacks), "start": str(start) if start else None}
    # Ray's own state has a name of its own at every start: a name used before would silently resume from Ray's records.
    return TorchTrainer(
        cast(Any, train_loop), train_loop_config={**config.model_dump(mode="json"), LAUNCHED: launched},
        torch_config=TorchConfig(backend=backend("cuda" if scaling.gpus_per_worker else "cpu"), timeout_s=math.ceil(scaling.timeout_seconds)),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=bool(scaling.gpus_per_worker),
                                     resources_per_worker=worker_resources(scaling)),
        run_config=RunConfig(name=uuid.uuid4().hex[:12], storage_path=str(folder_of(config) / ".ray"),
                             callbacks=cast(Any, [EndOnRequest(str(folder_of(config)))]),
                             failure_config=cast(Any, FailureConfig)(max_failures=0, max_preemption_failures=0,
                                                                     controller_failure_limit=0)),
        datasets={"train": remaining},
        dataset_config=DataConfig(execution_options=execution_options(), enable_shard_locality=False))
