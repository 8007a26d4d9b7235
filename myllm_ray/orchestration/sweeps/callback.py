"""Driver-side handling of Tune's events: shows and records trials, and ends the sweep when its budget is spent."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from myllm_ray.config.sweep import BudgetSection
from myllm_ray.engine.liveness.heartbeat import request
from myllm_ray.orchestration.cluster import remove_group
from myllm_ray.orchestration.failures import explain
from myllm_ray.orchestration.sweeps.console import SweepConsole
from myllm_ray.orchestration.sweeps.results import Row, SweepFolder
from myllm_ray.orchestration.sweeps.trial import SCORE, name_of
from myllm_ray.orchestration.sweeps.trial_channel import PLACEMENT_GROUP

log = logging.getLogger(__name__)


_GROUP_SECONDS = 4.0
"""How long the workers of an ended trial may take to exit."""


def remove_leftover(folder: Path) -> None:
    """Removes the placement group of the run in this folder if it still exists."""
    path = folder / PLACEMENT_GROUP
    if path.exists():
        remove_group(path.read_text(encoding="utf-8"))
        path.unlink(missing_ok=True)


class Budget(tune.Stopper):
    """Ends the whole sweep when its budget is spent or when `reason` is set.

    Args:
        budget: the sweep's `budget` section.
        earlier: rows of trials that ended in an earlier session. Their time counts towards `trial_hours`.
    """

    def __init__(self, budget: BudgetSection, earlier: Iterable[Row]):
        self._budget, self._started = budget, time.monotonic()
        self.seconds = {row["trial"]: float(row["seconds"]) for row in earlier}
        self.reason: str | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if (
            self.reason is None
            and self._budget.minutes is not None
            and time.monotonic() - self._started >= 60 * self._budget.minutes
        ):
            self.reason = f"budget.minutes: {self._budget.minutes:g}"
        if (
            self.reason is None
            and self._budget.trial_hours is not None
            and sum(self.seconds.values()) >= 3600 * self._budget.trial_hours
        ):
            self.reason = f"budget.trial_hours: {self._budget.trial_hours:g}"
        return self.reason is not None


class SweepCallback(tune.Callback):
    """Keeps a row for each trial and records a trial in `results.jsonl` when it ends.

    Args:
        folder: the sweep's folder.
        display: the sweep's table.
        budget: the sweep's budget.
    """

    def __init__(self, folder: SweepFolder, display: SweepConsole, budget: Budget):
        self._folder, self._display, self._budget = folder, display, budget
        self._rows: dict[str, Row] = {}
        self._before: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        self.interrupted: str | None = None
        """Name of the signal that interrupted the sweep, or None. `--resume` resumes the trials that ran then."""
        for row in folder.rows:
            display.update(row)

    def interrupt(self, name: str) -> None:
        """Makes all running trials save a checkpoint and end, and prevents the start of further ones."""
        log.info(
            "%s: running trials save a checkpoint, then the sweep ends (second signal: at once); --resume continues it",
            name,
        )
        self.interrupted = self._budget.reason = name
        for row in list(self._rows.values()):
            if row["status"] == "running":
                request(self._folder.trials / row["trial"], "stop", name)

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        row = self._row(trial)
        self._before[row["trial"]] = row["seconds"]  # seconds before a pause; Tune reports those since the start
        self._update(trial, status="running")

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        row = self._row(trial)
        reports = row["reports"] if SCORE not in result else [*row["reports"], [result["step"], result[SCORE]]]
        seconds = self._before.get(row["trial"], 0.0) + float(result["seconds"])
        self._update(trial, reports=reports, seconds=seconds, **{k: result[k] for k in ("step", SCORE) if k in result})
        self._budget.seconds[row["trial"]] = seconds

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        result = trial.last_result or {}
        status, error = result.get("status", "stopped"), result.get("error")
        if status in ("stopped", "preempted"):
            # Tune keeps the actor for reuse and may not notify it, so the run is ended by a request in its folder.
            if trial.status == TuneTrial.RUNNING:
                request(
                    self._folder.trials / self._row(trial)["trial"],
                    "abort" if self.interrupted is None else "stop",
                    "the sweep has ended this trial",
                )
            # An interrupted trial is not recorded as ended: `--resume` resumes it, or starts it if it has no reports.
            if self.interrupted is not None or not self._row(trial)["reports"]:
                self._update(trial, status="waiting")
                return
            status, error = "stopped", self._budget.reason
        self._update(trial, status=status, error=error, **({SCORE: None} if status == "failed" else {}))
        self._folder.record(self._row(trial))
        self._ended[self._row(trial)["trial"]] = time.monotonic()

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if self.interrupted is not None:  # not recorded as failed, so `--resume` runs it again
            return
        error = trial.get_pickled_error() or trial.get_error()
        said = explain(error).reason if isinstance(error, BaseException) else "its process died"
        self._update(trial, status="failed", error=said, **{SCORE: None})
        self._folder.record(self._row(trial))
        self._ended[self._row(trial)["trial"]] = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Removes placement groups that still exist some seconds after their trial has ended."""
        # The trial's actor was killed or hangs. Ray keeps such a group until the whole job ends, and its resources
        # would be missing for the next trials.
        for name, ended in list(self._ended.items()):
            if time.monotonic() - ended >= _GROUP_SECONDS:
                del self._ended[name]
                remove_leftover(self._folder.trials / name)

    def _row(self, trial: TuneTrial) -> Row:
        config = trial.config["trial"]
        name = name_of(config["number"])
        return self._rows.setdefault(
            name,
            {
                "trial": name,
                "values": config["values"],
                "status": "waiting",
                SCORE: None,
                "step": 0,
                "seconds": 0.0,
                "error": None,
                "folder": str(self._folder.trials / name),
                "reports": [],
            },
        )

    def _update(self, trial: TuneTrial, **news: Any) -> None:
        row = self._row(trial)
        row |= {"values": trial.config["trial"]["values"], **news}
        self._display.update(row)
