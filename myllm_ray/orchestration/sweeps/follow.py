"""What the driver does with the news from Tune: show it, write it down, and end what has spent its budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from myllm_ray.config.sweep import BudgetSection
from myllm_ray.engine.pulse import request
from myllm_ray.orchestration.cluster import remove_group
from myllm_ray.orchestration.failures import explain
from myllm_ray.orchestration.sweeps.desk import PLACEMENT_GROUP
from myllm_ray.orchestration.sweeps.display import SweepDisplay
from myllm_ray.orchestration.sweeps.results import Row, SweepFolder
from myllm_ray.orchestration.sweeps.trial import SCORE, name_of

log = logging.getLogger(__name__)


_GROUP_SECONDS = 4.0
"""How long the workers of a trial that has ended may take to go."""


def remove_leftover(folder: Path) -> None:
    """Remove the placement group of the run in this folder, if it is still there."""
    path = folder / PLACEMENT_GROUP
    if path.exists():
        remove_group(path.read_text(encoding="utf-8"))
        path.unlink(missing_ok=True)


class Budget(tune.Stopper):
    """Ends the whole sweep when its time is spent, or when somebody asks.

    Args:
        budget: as configured.
        earlier: rows of trials that ended before; their hours count.
    """

    def __init__(self, budget: BudgetSection, earlier: Iterable[Row]):
        self._budget, self._started = budget, time.monotonic()
        self.seconds = {row["trial"]: float(row["seconds"]) for row in earlier}
        self.reason: str | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self.reason is None and self._budget.minutes is not None and time.monotonic() - self._started >= 60 * self._budget.minutes:
            self.reason = f"budget.minutes: {self._budget.minutes:g}"
        if self.reason is None and self._budget.trial_hours is not None and sum(self.seconds.values()) >= 3600 * self._budget.trial_hours:
            self.reason = f"budget.trial_hours: {self._budget.trial_hours:g}"
        return self.reason is not None


class Follow(tune.Callback):
    """Keeps a row for each trial; a trial that has ended goes to `results.jsonl` at once."""

    def __init__(self, folder: SweepFolder, display: SweepDisplay, budget: Budget):
        self._folder, self._display, self._budget = folder, display, budget
        self._rows: dict[str, Row] = {}
        self._before: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        self.left: str | None = None
        """By what the sweep was interrupted; what runs then goes on with --resume."""
        for row in folder.rows:
            display.update(row)

    def interrupt(self, name: str) -> None:
        """Let all trials that run save and end, and no further one start."""
        log.info("%s: the trials that run save a checkpoint, then the sweep ends (once more: at once); --resume goes on", name)
        self.left = self._budget.reason = name
        for row in list(self._rows.values()):
            if row["status"] == "running":
                request(self._folder.trials / row["trial"], "stop", name)

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        row = self._row(trial)
        self._before[row["trial"]] = row["seconds"]  # of the parts before a pause
        self._update(trial, status="running")

    def on_trial_result(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any) -> None:
        row = self._row(trial)
        reports = row["reports"] if SCORE not in result else [*row["reports"], [result["step"], result[SCORE]]]
        seconds = self._before.get(row["trial"], 0.0) + float(result["seconds"])
        self._update(trial, reports=reports, seconds=seconds, **{k: result[k] for k in ("step", SCORE) if k in result})
        self._budget.seconds[row["trial"]] = seconds

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        result = trial.last_result or {}
        status, error = result.get("status", "stopped"), result.get("error")
        if status == "stopped" or status == "left":  # (left: it ended when it was asked to)
            if trial.status == TuneTrial.RUNNING:  # its actor may be kept warm, and would not hear of it
                request(self._folder.trials / self._row(trial)["trial"], "abandon" if self.left is None else "stop", "the sweep has ended this trial")
            if self.left is not None or not self._row(trial)["reports"]:  # goes on, or begins, with --resume
                self._update(trial, status="waiting")
                return
            status, error = "stopped", self._budget.reason
        self._update(trial, status=status, error=error, **({SCORE: None} if status == "failed" else {}))
        self._folder.record(self._row(trial))
        self._ended[self._row(trial)["trial"]] = time.monotonic()

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if self.left is not None:
            return
        error = trial.get_pickled_error() or trial.get_error()
        said = explain(error).reason if isinstance(error, BaseException) else "its process died"
        self._update(trial, status="failed", error=said, **{SCORE: None})
        self._folder.record(self._row(trial))
        self._ended[self._row(trial)["trial"]] = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Placement groups of workers that are still there seconds after their trial has ended: its actor was killed, or hangs. Ray
        keeps such a group until the whole job ends, and what it reserved is missing for the trials to come."""
        for name, ended in list(self._ended.items()):
            if time.monotonic() - ended >= _GROUP_SECONDS:
                del self._ended[name]
                remove_leftover(self._folder.trials / name)

    def _row(self, trial: TuneTrial) -> Row:
        config = trial.config["trial"]
        name = name_of(config["number"])
        return self._rows.setdefault(name, {
            "trial": name, "values": config["values"], "status": "waiting", SCORE: None, "step": 0, "seconds": 0.0, "error": None,
            "folder": str(self._folder.trials / name), "reports": []})

    def _update(self, trial: TuneTrial, **news: Any) -> None:
        row = self._row(trial)
        row |= {"values": trial.config["trial"]["values"], **news}
        self._display.update(row)
