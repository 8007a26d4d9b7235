"""The budget of a run (`run.budget`): after so many hours, tokens or dollars it saves a checkpoint and stops.

Hours are those of training in all attempts of the run: `budget.json` in its folder keeps them, so the time of a process
that was killed counts too, within a few seconds. Tokens are those of the data without padding. Their number is a
function of the step, so a budget of tokens ends the run at the same step on any hardware.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from myllm_ray.common.files import write_atomic
from myllm_ray.common.types import RunState
from myllm_ray.config.run_section import BudgetSection
from myllm_ray.engine.callbacks import Callback

_NAME = "budget.json"
_SECONDS = 5.0
"""Seconds between two writes of the file."""


def seconds_used(folder: Path) -> float:
    """Returns the seconds of training that the attempts of a run have used."""
    try:
        return float(json.loads((folder / _NAME).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def reason_to_stop(budget: BudgetSection, seconds: float, step: int, last_step: int | None) -> str | None:
    """Returns which part of a budget is used up, or None.

    Args:
        budget: the budget.
        seconds: seconds of training so far.
        step: number of completed steps.
        last_step: the step after which the tokens are used up, if the budget has tokens.
    """
    hours = seconds / 3600
    if last_step is not None and step >= last_step:
        return f"run.budget.tokens: {budget.tokens:,} tokens are used after step {last_step:,}"
    if budget.hours is not None and hours >= budget.hours:
        return f"run.budget.hours: {budget.hours:g} hours are used"
    if budget.usd is not None and hours * (budget.usd_per_hour or 0.0) >= budget.usd:
        return f"run.budget.usd: {budget.usd:g} USD are used ({hours:.3g} hours at {budget.usd_per_hour:g} USD)"
    return None


class RunBudget(Callback):
    """Requests a checkpoint and the end of the run once its budget is used up. `run_worker` adds it.

    Rank 0 measures the time; the exchange of requests makes all ranks stop at the same step.

    Args:
        budget: the budget.
        folder: the run's folder.
        last_step: see `reason_to_stop`.
    """

    main_only = True

    def __init__(self, budget: BudgetSection, folder: Path, last_step: int | None):
        self._budget, self._path, self._last_step = budget, folder / _NAME, last_step
        self._before, self._started = 0.0, time.monotonic()
        self._written = self._started

    def on_train_start(self, state: RunState) -> None:
        self._before, self._started = seconds_used(self._path.parent), time.monotonic()
        self._written = self._started

    def on_step_end(self, state: RunState) -> None:
        now = time.monotonic()
        reason = reason_to_stop(self._budget, self._seconds, state.step, self._last_step)
        if reason is not None:
            state.request("save", reason)
            state.request("stop", reason)
        elif now - self._written >= _SECONDS:
            self._write()

    def close(self) -> None:
        self._write()

    @property
    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def _write(self) -> None:
        self._written = time.monotonic()
        write_atomic(self._path, json.dumps({"seconds": round(self._seconds, 3)}), durable=False)
