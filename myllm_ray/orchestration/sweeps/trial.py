"""One trial of a sweep, as Ray Tune sees it: a run that stops at every report until Tune lets it go on.

    setup, reset      a new run is wanted in this actor; the actor and its imports stay (Tune: reuse_actors)
    step              let the run go on to its next report; the first call starts it
    save, restore     of a pause (hyperband) or an exchange (pbt): where the run's own newest checkpoint is
    cleanup           the run ends, and with it all that it holds

With `scaling.workers` 0 or 1 the run is trained here, by the same function that `train` calls without Ray; else by a
supervisor with its TorchTrainer, as `train` does on Ray.
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
from myllm_ray.config.errors import UserError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sweep import SweepConfig, run_config
from myllm_ray.engine.pulse import remove, request
from myllm_ray.engine.run_folder import checkpoints_of, folder_of
from myllm_ray.orchestration.failures import explain
from myllm_ray.orchestration.sweeps.desk import ABANDON, GO_ON, PLACEMENT_GROUP, Desk, RemoteDesk, TrialReporter

log = logging.getLogger(__name__)
SCORE = "score"
"""The sweep's metric, under the one name that Tune gets to see."""
_END_SECONDS = 20.0
_POINTER = "checkpoint.json"


@dataclass(frozen=True)
class Shared:
    """What all trials know."""

    sweep: SweepConfig
    folder: str
    """Of the trials' runs."""
    every: int
    """Steps between two reports."""
    checkpointed: bool
    """Every report comes with a checkpoint, for trials are paused or copied there."""


def in_process(config: TrainerConfig) -> bool:
    """Whether a trial of this config needs no workers beside it."""
    rollout = getattr(config, "rollout", None)
    return config.scaling.most <= 1 and (rollout is None or rollout.placement != "actors")


def name_of(number: int) -> str:
    """The name of a trial, and of its run."""
    return f"{number:04d}"


def config_of(shared: Shared, number: int, values: dict[str, Any]) -> TrainerConfig:
    """The run of a trial. What only shows something on a terminal is left out: the sweep shows its trials itself."""
    from myllm_ray.config.resolve import resolve

    config = run_config(shared.sweep, values, name_of(number), shared.folder)
    names = [(entry, entry if isinstance(entry, str) else next(iter(entry))) for entry in config.callbacks]
    kept = [entry for entry, name in names if not resolve("callbacks", name, "callbacks").on_driver]
    config.checkpoint.mirror = None  # <mirror>/<run.name> would be shared with other sweeps' trials
    config.callbacks = kept if "jsonl" in kept else [*kept, "jsonl"]
    if in_process(config):
        config.scaling.workers = 0
    if shared.checkpointed:
        config.checkpoint.every_steps, config.checkpoint.async_, config.checkpoint.at_end = shared.every, False, True
        config.checkpoint.keep_last = max(2, config.checkpoint.keep_last or 2)  # others take over from the last but one, too
    return config


class Trial(tune.Trainable):
    """See above. The config that Tune gives: {"trial": {"number": ..., "values": {dotted key: value}}}."""

    _run: _Run | None = None

    def setup(self, config: dict[str, Any], shared: Shared | None = None) -> None:
        assert shared is not None
        self._shared = shared
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """True if this actor is free for another trial."""
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
            del ended
            _free()
            return result
        step, metrics = report
        return {"step": step, "report": math.ceil(step / self._shared.every), SCORE: metrics[self._shared.sweep.metric],
                "seconds": time.time() - self._run.started}

    def _start(self) -> _Run:
        config = config_of(self._shared, self._number, self._values)
        folder = folder_of(config)
        if self._donor is not None:
            self._take_over(config)
        if checkpoints_of(config).latest() is not None:
            config.checkpoint.resume = "auto"
        else:  # an attempt that was cut off before it saved anything
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        return (_InProcess if in_process(config) else _WorkerGroup)(config, self._shared)

    def _take_over(self, config: TrainerConfig) -> None:
        """Go on from another trial's checkpoint as if it were one's own: metrics up to there stay those of this trial."""
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
        """The last result of a trial."""
        metric, folder = self._shared.sweep.metric, Path(self._shared.folder) / name_of(self._number)
        final: dict[str, Any] = {}
        for row in read_jsonl(folder / "metrics.jsonl"):
            final |= row
        result: dict[str, Any] = {"done": True, "seconds": time.time() - started, "step": int(final.get("step", 0)),
                                  "status": "done", "error": problem}
        if problem is None and summary is not None and summary["left"] is not None:
            return {**result, "status": "left", "error": summary["left"]}
        score = final.get(metric)
        if problem is None and score is None:
            result["error"] = f"the run logs no metric {metric!r}; it logs {', '.join(k for k in final if k not in ('step', 'epoch', 'time'))}"
        elif problem is None and not math.isfinite(float(score)):  # type: ignore[arg-type]
            result["error"] = f"{metric} is {score}"
        if result["error"] is not None:
            return {**result, "status": "failed"}
        return {**result, SCORE: float(score), "report": math.ceil(result["step"] / self._shared.every)}  # type: ignore[arg-type]

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune pauses this trial, or lets another one take over from it: its own checkpoint was saved before it reported."""
        self._end()
        config = config_of(self._shared, self._number, self._values)
        newest = checkpoints_of(config).latest()
        pointer = {"number": self._number, "checkpoint": str(newest), "step": int(newest.name.split("-")[1])} if newest else {}
        write_json(Path(checkpoint_dir) / _POINTER, pointer)

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
        pointer = json.loads((Path(checkpoint_dir) / _POINTER).read_text(encoding="utf-8"))
        self._donor = pointer or None

    def cleanup(self) -> None:
        self._end()

    def _end(self) -> bool:
        """End the run that is going on here, if there is one; whether it did end."""
        run, self._run = self._run, None
        ended = run is None or run.end(_END_SECONDS)
        del run
        _free()
        return ended


def _free() -> None:
    """Give back what a run has left behind, also on a device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Run:
    """A run in a thread, with its desk."""

    def __init__(self, config: TrainerConfig, shared: Shared, desk: Any, train: Callable[[TrainerConfig, TrialReporter], dict[str, Any]]):
        self.started = time.time()
        self.summary: dict[str, Any] | None = None
        self.problem: str | None = None
        self._folder, self._desk = folder_of(config), desk
        self._waits = False
        reporter = TrialReporter(desk, shared.sweep.metric, shared.every)
        self._thread = threading.Thread(target=self._work, args=(train, config, reporter), name="trial", daemon=True)
        self._thread.start()

    def _work(self, train: Callable[[TrainerConfig, TrialReporter], dict[str, Any]], config: TrainerConfig, reporter: TrialReporter) -> None:
        try:
            self.summary = train(config, reporter)
        except UserError as error:
            self.problem = str(error)
        except BaseException as error:  # torch raises some of its own that are no Exception
            self.problem = describe(error)
            log.debug("trial %s failed", config.run.name, exc_info=True)

    def next(self) -> tuple[int, dict[str, float]] | None:
        """The next report; None when the run has ended."""
        while True:
            alive = self._thread.is_alive()
            report: tuple[int, dict[str, float]] | None = self._desk.poll(0.2 if alive else 0.0)
            if report is not None:
                self._waits = True
                return report
            if not alive:
                self._thread.join()
                self.close()
                return None

    def go_on(self) -> None:
        self._waits = False
        self._desk.answer(GO_ON)

    def end(self, seconds: float) -> bool:
        """Whether it has ended in time. One that waits for a verdict saves nothing, one in the middle of a step a checkpoint."""
        if not self._waits and self._thread.is_alive():
            request(self._folder, "stop", "the sweep has ended this trial")
        self._desk.answer(ABANDON)
        self._thread.join(seconds)
        if self._thread.is_alive():
            return False
        if self.problem is not None:  # nobody asks for its outcome any more: what did not get saved must not be silent
            log.warning("%s, when it was ended: %s", self._folder, self.problem)
        self.close()
        return True

    def close(self) -> None:
        remove(self._folder)


class _InProcess(_Run):
    """Trained in this process."""

    def __init__(self, config: TrainerConfig, shared: Shared):
        super().__init__(config, shared, Desk(str(folder_of(config))), self._train)

    @staticmethod
    def _train(config: TrainerConfig, reporter: TrialReporter) -> dict[str, Any]:
        from myllm_ray.orchestration.pools import services
        from myllm_ray.worker import build_callbacks, run_local

        return run_local(config, [*build_callbacks(config), reporter], services)


class _WorkerGroup(_Run):
    """Trained by a TorchTrainer."""

    def __init__(self, config: TrainerConfig, shared: Shared):
        super().__init__(config, shared, RemoteDesk(str(folder_of(config))), self._train)

    @staticmethod
    def _train(config: TrainerConfig, reporter: TrialReporter) -> dict[str, Any]:
        from myllm_ray.engine.startup import Startup, StoppedAtStart
        from myllm_ray.orchestration.supervisor import Supervisor
        from myllm_ray.worker import absolute, prepare_run

        config = absolute(config)
        with Startup(config) as startup:
            try:
                prepared = prepare_run(config, phase=startup.phase)
                startup.training()
            except StoppedAtStart as reason:
                return startup.stopped(reason)
            return Supervisor(config, prepared, [reporter], startup).run()

    def close(self) -> None:
        super().close()
        (self._folder / PLACEMENT_GROUP).unlink(missing_ok=True)
        try:
            self._desk.close()
        except ray.exceptions.RayError as error:
            log.debug("%s", error)
