"""One trial of a sweep as a Ray Tune `Trainable`: a run that waits at every report until Tune lets it continue.

    setup, reset      prepare this actor for a new run; the actor and its imports are kept (Tune: `reuse_actors`)
    step              continue the run to its next report; the first call starts it
    save, restore     write and read the path of the run's newest checkpoint, for a pause (HyperBand) or an exchange
                      (PBT)
    cleanup           end the run and free its resources

With `scaling.workers` 0 or 1 the run is trained in this actor, by the function that `train` calls without Ray.
Otherwise it is trained by a supervisor with its TorchTrainer, as `train` does on Ray.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

from myllm_ray.common.files import JSONLines, link_or_copy, published, read_jsonl, write_json
from myllm_ray.common.tracebacks import describe
from myllm_ray.config.components import tracker_entries
from myllm_ray.config.errors import UserError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sweep import SweepConfig, run_config
from myllm_ray.config.trainers import rollout_of
from myllm_ray.engine.liveness.heartbeat import remove, request
from myllm_ray.engine.run_folder import checkpoints_of, folder_of
from myllm_ray.orchestration.failures import explain
from myllm_ray.orchestration.sweeps.trial_channel import (
    ABORT,
    CONTINUE,
    PLACEMENT_GROUP,
    RemoteTrialChannel,
    TrialChannel,
    TrialReporter,
)

log = logging.getLogger(__name__)
SCORE = "score"
"""Name under which the sweep's metric is reported to Tune."""
_END_SECONDS = 20.0
_POINTER = "checkpoint.json"


@dataclass(frozen=True)
class Shared:
    """Settings that all trials of a sweep share."""

    sweep: SweepConfig
    folder: str
    """Folder of the trials' runs."""
    every: int
    """Steps between two reports."""
    checkpointed: bool
    """Whether every report has a checkpoint, because trials are paused or copied there."""


def in_process(config: TrainerConfig) -> bool:
    """Returns whether a trial of this config trains in its own process, without further workers."""
    rollout = rollout_of(config)
    return config.scaling.most <= 1 and (rollout is None or rollout.placement != "actors")


def name_of(number: int) -> str:
    """Returns the name of a trial and of its run."""
    return f"{number:04d}"


def config_of(shared: Shared, number: int, values: dict[str, Any]) -> TrainerConfig:
    """Returns the config of a trial.

    Callbacks that only show something on a terminal are left out, because the sweep shows its trials itself.

    Args:
        shared: the settings of the sweep's trials.
        number: number of the trial.
        values: the trial's values, by dotted key.
    """
    from myllm_ray.config.resolve import resolve

    config = run_config(shared.sweep, values, name_of(number), shared.folder)
    names = [(entry, entry if isinstance(entry, str) else next(iter(entry))) for entry in config.callbacks]
    # The page of the sweep shows its trials; `myllm-ray report` writes the page of one.
    kept = [
        entry for entry, name in names if name != "report" and not resolve("callbacks", name, "callbacks").on_driver
    ]
    config.checkpoint.mirror = None  # <mirror>/<run.name> would be shared with other sweeps' trials
    config.callbacks = kept if "jsonl" in kept else [*kept, "jsonl"]
    group = shared.sweep.run.name
    config.tracking = [
        {"name": name, "group": group, "run_name": f"{group}-{name_of(number)}", **options}
        for name, options in tracker_entries(config)
    ]
    if in_process(config):
        config.scaling.workers = 0
    if shared.checkpointed:
        config.checkpoint.every_steps, config.checkpoint.async_, config.checkpoint.at_end = shared.every, False, True
        # Another member may take over from the last checkpoint but one of this trial.
        config.checkpoint.keep_last = max(2, config.checkpoint.keep_last or 2)
    return config


class Trial(tune.Trainable):
    """A trial (see the module's docstring).

    Tune passes the config {"trial": {"number": ..., "values": {dotted key: value}}}.
    """

    _run: _Run | None = None

    def setup(self, config: dict[str, Any], shared: Shared | None = None) -> None:
        assert shared is not None
        self._shared = shared
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ends the present run. Returns whether this actor can run another trial."""
        self.config = new_config
        self._number, self._values = int(new_config["trial"]["number"]), dict(new_config["trial"]["values"])
        self._donor: dict[str, Any] | None = None
        return self._end()

    def step(self) -> dict[str, Any]:
        if self._run is None:
            started = time.time()
            try:
                self._run = self._start()
            except Exception as error:
                return self._outcome(explain(error).reason, started)
        else:
            self._run.go_on()
        report = self._run.next()
        if report is None:
            ended, self._run = self._run, None
            result = self._outcome(ended.problem, ended.started, ended.summary)
            del ended  # the last reference to the run's model, so that its memory can be freed
            _free()
            return result
        step, metrics = report
        return {
            "step": step,
            "report": math.ceil(step / self._shared.every),
            SCORE: metrics[self._shared.sweep.metric],
            "seconds": time.time() - self._run.started,
        }

    def _start(self) -> _Run:
        config = config_of(self._shared, self._number, self._values)
        folder = folder_of(config)
        if self._donor is not None:
            self._take_over(config)
        if checkpoints_of(config).latest() is not None:
            config.checkpoint.resume = "auto"
        else:  # an earlier attempt that ended before its first checkpoint
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        return (_InProcess if in_process(config) else _WorkerGroup)(config, self._shared)

    def _take_over(self, config: TrainerConfig) -> None:
        """Copies the donor's checkpoint into this trial's folder, so that the run resumes from it.

        The metrics up to that step remain those of this trial. The exchange is recorded in `lineage.jsonl`.
        """
        assert self._donor is not None
        folder, checkpoint = folder_of(config), Path(self._donor["checkpoint"])
        own = folder / "checkpoints" / checkpoint.name
        if self._donor["number"] != self._number:
            with published(own.parent, existing="replace") as beside:
                shutil.copytree(checkpoint, beside / checkpoint.name, copy_function=link_or_copy)
            lineage = JSONLines(folder / "lineage.jsonl", keep=lambda row: row["step"] < self._donor["step"])  # type: ignore[index]
            lineage.write({"step": self._donor["step"], "from": name_of(self._donor["number"]), "values": self._values})
            lineage.close()
        self._donor = None

    def _outcome(self, problem: str | None, started: float, summary: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns the last result of a trial for Tune.

        Args:
            problem: the error in one line, or None.
            started: time at which the run started.
            summary: the summary of the run, or None.
        """
        metric, folder = self._shared.sweep.metric, Path(self._shared.folder) / name_of(self._number)
        final: dict[str, Any] = {}
        for row in read_jsonl(folder / "metrics.jsonl"):
            final |= row
        result: dict[str, Any] = {
            "done": True,
            "seconds": time.time() - started,
            "step": int(final.get("step", 0)),
            "status": "done",
            "error": problem,
        }
        if problem is None and summary is not None and summary["exit"] is not None:
            return {**result, "status": "preempted", "error": summary["exit"].reason}
        score = final.get(metric)
        if problem is None and score is None:
            result["error"] = (
                f"the run logs no metric {metric!r}; it logs "
                f"{', '.join(k for k in final if k not in ('step', 'epoch', 'time'))}"
            )
        elif problem is None and not math.isfinite(float(score)):  # type: ignore[arg-type]
            result["error"] = f"{metric} is {score}"
        if result["error"] is not None:
            return {**result, "status": "failed"}
        return {**result, SCORE: float(score), "report": math.ceil(result["step"] / self._shared.every)}  # type: ignore[arg-type]

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Ends the run and writes the path of its newest checkpoint, for a pause or for a trial that takes over."""
        # The run has saved its checkpoint before it reported, so nothing is lost.
        self._end()
        config = config_of(self._shared, self._number, self._values)
        newest = checkpoints_of(config).latest()
        pointer = (
            {"number": self._number, "checkpoint": str(newest), "step": int(newest.name.split("-")[1])}
            if newest
            else {}
        )
        write_json(Path(checkpoint_dir) / _POINTER, pointer)

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
        pointer = json.loads((Path(checkpoint_dir) / _POINTER).read_text(encoding="utf-8"))
        self._donor = pointer or None

    def cleanup(self) -> None:
        self._end()

    def _end(self) -> bool:
        """Ends the present run, if any. Returns whether it has ended in time."""
        run, self._run = self._run, None
        ended = run is None or run.end(_END_SECONDS)
        del run
        _free()
        return ended


def _free() -> None:
    """Frees the memory of an ended run, also on a GPU, because the process is kept for the next trial."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Run:
    """A run in a thread, with its channel.

    Args:
        config: the trial's config.
        shared: the settings of the sweep's trials.
        channel: a `TrialChannel` or `RemoteTrialChannel`.
        train: trains the config with the reporter as a callback and returns the summary of the run.
    """

    def __init__(
        self,
        config: TrainerConfig,
        shared: Shared,
        channel: Any,
        train: Callable[[TrainerConfig, TrialReporter], dict[str, Any]],
    ):
        self.started = time.time()
        self.summary: dict[str, Any] | None = None
        self.problem: str | None = None
        self._folder, self._channel = folder_of(config), channel
        self._waits = False
        reporter = TrialReporter(channel, shared.sweep.metric, shared.every)
        self._thread = threading.Thread(target=self._work, args=(train, config, reporter), name="trial", daemon=True)
        self._thread.start()

    def _work(
        self,
        train: Callable[[TrainerConfig, TrialReporter], dict[str, Any]],
        config: TrainerConfig,
        reporter: TrialReporter,
    ) -> None:
        try:
            self.summary = train(config, reporter)
        except UserError as error:
            self.problem = str(error)
        except BaseException as error:  # some of torch's errors do not inherit from Exception
            self.problem = describe(error)
            log.debug("trial %s failed", config.run.name, exc_info=True)

    def next(self) -> tuple[int, dict[str, float]] | None:
        """Waits for the next report. Returns None if the run has ended."""
        # `alive` is read before the poll: a report that the thread sent just before its end is still returned.
        while True:
            alive = self._thread.is_alive()
            report: tuple[int, dict[str, float]] | None = self._channel.poll(0.2 if alive else 0.0)
            if report is not None:
                self._waits = True
                return report
            if not alive:
                self._thread.join()
                self.close()
                return None

    def go_on(self) -> None:
        self._waits = False
        self._channel.answer(CONTINUE)

    def end(self, seconds: float) -> bool:
        """Ends the run. Returns whether it has ended within `seconds`."""
        # A run that waits for a decision ends without a checkpoint. A run within a step is requested to save and end.
        if not self._waits and self._thread.is_alive():
            request(self._folder, "stop", "the sweep has ended this trial")
        self._channel.answer(ABORT)
        self._thread.join(seconds)
        if self._thread.is_alive():
            return False
        if self.problem is not None:  # no later call reads the outcome, so an error in saving must be logged here
            log.warning("%s failed while it was being ended: %s", self._folder, self.problem)
        self.close()
        return True

    def close(self) -> None:
        remove(self._folder)


class _InProcess(_Run):
    """A run that is trained in this process."""

    def __init__(self, config: TrainerConfig, shared: Shared):
        super().__init__(config, shared, TrialChannel(str(folder_of(config))), self._train)

    @staticmethod
    def _train(config: TrainerConfig, reporter: TrialReporter) -> dict[str, Any]:
        from myllm_ray.engine.configured import build_callbacks
        from myllm_ray.orchestration.actor_pools import services
        from myllm_ray.orchestration.ray_metrics import RayMetrics
        from myllm_ray.worker import run_local

        return run_local(config, [*build_callbacks(config), RayMetrics(config), reporter], services)


class _WorkerGroup(_Run):
    """A run that is trained by a TorchTrainer."""

    def __init__(self, config: TrainerConfig, shared: Shared):
        super().__init__(config, shared, RemoteTrialChannel(str(folder_of(config))), self._train)

    @staticmethod
    def _train(config: TrainerConfig, reporter: TrialReporter) -> dict[str, Any]:
        from myllm_ray.engine.liveness.startup import Startup, StoppedAtStart
        from myllm_ray.orchestration.driver_events import link_to_driver
        from myllm_ray.orchestration.heartbeats import WorkerHeartbeats
        from myllm_ray.orchestration.supervisor import Supervisor
        from myllm_ray.preparation import absolute, prepare_run

        config = absolute(config)
        with Startup(config) as startup:
            try:
                prepared = prepare_run(config, phase=startup.phase)
                startup.training()
            except StoppedAtStart as reason:
                return startup.stopped(reason)
            with link_to_driver() as link, WorkerHeartbeats(link, startup.folder) as heartbeats:
                return Supervisor(config, prepared, [reporter], startup, heartbeats).run()

    def close(self) -> None:
        super().close()
        (self._folder / PLACEMENT_GROUP).unlink(missing_ok=True)
        try:
            self._channel.close()
        except ray.exceptions.RayError as error:
            log.debug("%s", error)
