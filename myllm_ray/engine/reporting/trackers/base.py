"""The base class of experiment trackers.

A tracker is a callback on rank 0 whose library runs in a separate process (`delivery.py`). The two halves are:

    training process     starts the delivery process and notifies it of the end of the run; does nothing in a step
    delivery process     reads metrics.jsonl, samples.jsonl and the checkpoints of the run's folder, and passes what is
                         new to `open`, `log_metrics`, `log_samples`, `log_checkpoint` and `finish`

The files of the run's folder are the queue: it has no limit, and nothing in it is lost if the delivery process or the
tracker's server fails. The position in it is kept in `trackers/<name>.json`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field, NonNegativeFloat, model_validator

from myllm_ray.common.extras import require_installed
from myllm_ray.common.secrets import is_secret
from myllm_ray.config.sections import Section
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.reporting.trackers.process import DeliveryProcess

if TYPE_CHECKING:  # the delivery process does not need torch
    from myllm_ray.common.types import RunState

_PREEMPTED_SECONDS = 5.0
"""Longest wait of a preempted run for its trackers: its machine may be taken away."""


class TrackerSection(Section):
    """Settings that all trackers share. A tracker's `Config` is a subclass."""

    project: str = Field("myllm-ray", description="the project (MLflow: the experiment) that contains the run")
    run_name: str | None = Field(None, description="name of the run in the tracker; default: run.name")
    group: str | None = Field(None, description="name that joins several runs; default in a sweep: the sweep's name")
    tags: list[str] = Field(default_factory=list)
    wait_seconds: NonNegativeFloat = Field(
        30.0, description="longest time that the end of the run waits for records that are not delivered yet"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, values: Any) -> Any:
        """Refuses credentials: the config is written to the run's folder."""
        for key, value in values.items() if isinstance(values, dict) else ():
            if is_secret(str(key), value):
                raise ValueError(f"{key}: credentials are read from the environment only; remove them from the config")
        return values


class Point(NamedTuple):
    """The metrics of one logged step."""

    step: int
    """Optimizer step; 0: the evaluation before training."""
    time: float
    """Seconds since the epoch at which the step was logged."""
    metrics: dict[str, float]
    """Training and evaluation metrics; values may be non-finite."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Point:
        """Returns the point of a line of `metrics.jsonl`."""
        numbers = {
            key: float(value)
            for key, value in row.items()
            if key not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        return cls(int(row["step"]), float(row.get("time", 0.0)), numbers)


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows about the run when it is opened."""

    folder: Path
    name: str
    """Name of the run in the tracker."""
    group: str | None
    tags: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    """The config of the run with masked secrets; empty for a run without `config.yaml`."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions of the code and of packages, the platform and the command (`environment.json`)."""
    save: Callable[[], None] = lambda: None
    """Writes `saved` of `open` to disk at once, as when the tracker has created a run and has more to send."""

    def flat_config(self) -> dict[str, Any]:
        """Returns the config by dotted key, without keys that are not set."""
        return dict(_flat("", self.config))


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif value is not None:
        yield prefix, value


class Tracker(Callback):
    """Base class of trackers. A subclass defines `open`, `log_metrics` and what else its library can show.

    These methods run in the delivery process. If one of them raises, the tracker is opened again after a pause and gets
    the same records again. A custom tracker is a class in a module that can be imported.
    """

    class Config(TrackerSection):
        """Settings of the tracker."""

    main_only = True
    library: ClassVar[tuple[str, str] | None] = None
    """The module that the tracker imports, and what `pip install` needs for it."""
    overwrites: ClassVar[bool] = False
    """Whether points of steps that are trained again can replace earlier ones (`open` discards those after `step`)."""

    def __init__(self, config: Any = None, **options: Any):
        super().__init__(config, **options)
        if self.library is not None:
            require_installed(*self.library, f"the tracker {type(self).__name__}")
        self.key = type(self).__name__.removesuffix("Tracker").lower()
        self._process: DeliveryProcess | None = None

    # In the delivery process:

    def open(self, run: TrackedRun, saved: dict[str, Any], step: int) -> int | None:
        """Opens the run in the tracker: a new run, or the one that `saved` identifies. Sends config and environment.

        Args:
            run: the run.
            saved: JSON-like state of the tracker, such as the id of its run; empty for a new run. What the method
                writes to it is kept for later starts.
            step: last step that was delivered; -1: none.

        Returns:
            The last step that the tracker itself has stored, or None if it is not known. Records may have been
            delivered without being stored, or the reverse, if a process was killed.
        """
        raise NotImplementedError

    def log_metrics(self, points: list[Point]) -> None:
        """Stores the metrics of logged steps, in ascending order of steps."""
        raise NotImplementedError

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Stores the answers that were sampled for the batch that ends at `step`: rows of `samples.jsonl`."""

    def log_checkpoint(self, step: int, folder: Path) -> None:
        """Called when a checkpoint is complete. It may be removed soon after (`checkpoint.keep_last`)."""

    def supersede(self) -> None:
        """Marks or removes the open run in the tracker, because a new one with all points replaces it.

        Called if `overwrites` is false and steps were trained again with other results, as after a rewind.
        """

    def finish(self, status: str) -> None:
        """Ends the run in the tracker. `status`: finished, preempted, amended, aborted, rewind, failed or killed."""

    # In the training process:

    def on_train_start(self, state: RunState) -> None:
        if state.folder is None:
            return
        path = f"{type(self).__module__}:{type(self).__qualname__}"
        options = self.config.model_dump(mode="json")
        self._process = DeliveryProcess(Path(state.folder), self.key, path, options, state.step)
        self._process.start()

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        if self._process is not None:
            self._process.check()

    def on_train_end(self, state: RunState) -> None:
        exit = state.exit
        seconds = self.config.wait_seconds if exit is None else min(_PREEMPTED_SECONDS, self.config.wait_seconds)
        self._end("finished" if exit is None else exit.kind, seconds)

    def on_exception(self, state: RunState, error: BaseException) -> None:
        self._end("failed", self.config.wait_seconds)

    def _end(self, status: str, seconds: float) -> None:
        # All trackers of a run are notified before `close` waits for the first of them.
        if self._process is not None:
            self._process.end(status, seconds)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.wait()


def numbered(trackers: list[Tracker]) -> list[Tracker]:
    """Gives each tracker of a run a `key` of its own: `wandb`, and `wandb-2` for the second of the same kind."""
    counts: dict[str, int] = {}
    for tracker in trackers:
        counts[tracker.key] = counts.get(tracker.key, 0) + 1
        if counts[tracker.key] > 1:
            tracker.key = f"{tracker.key}-{counts[tracker.key]}"
    return trackers


def same_point(one: Mapping[str, float | None], other: Mapping[str, float | None]) -> bool:
    """Returns whether two results of one step are equal within rounding, as after a restart with other workers."""
    return one.keys() == other.keys() and all(_close(value, other[name]) for name, value in one.items())


def _close(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-9)
