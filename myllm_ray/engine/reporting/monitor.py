"""Rank 0's events, and measurements of its process for displays."""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import Any

import torch

from myllm_ray.common.types import RunState
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.liveness.heartbeat import Heartbeat
from myllm_ray.engine.reporting.events import EventLog

_MEMORY_SECONDS = 1.0
"""Least time between two measurements of the memory, which take about as long as the rest of a log."""


class RunMonitor(Callback):
    """Emits rank 0's events and sets `RunState.telemetry`. `run_worker` puts it before all other callbacks.

    Args:
        events: the event log of rank 0, open.
        heartbeat: the heartbeat of rank 0, which measures the time of each phase.
    """

    main_only = True

    def __init__(self, events: EventLog, heartbeat: Heartbeat):
        self._events, self._heartbeat = events, heartbeat
        self._since, self._waited = time.monotonic(), 0.0
        self._taken: dict[str, float] = {}
        self._measured, self._memory = -math.inf, 0.0

    def on_train_start(self, state: RunState) -> None:
        state.telemetry = {}
        self._since, self._waited = time.monotonic(), self._heartbeat.spent.get("data", 0.0)
        self._events.emit("train_start", state.step, total_steps=state.total_steps)

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        now, waited = time.monotonic(), self._heartbeat.spent.get("data", 0.0)
        if now - self._measured >= _MEMORY_SECONDS:
            self._measured, self._memory = now, host_memory()
        state.telemetry = {
            "host_memory": self._memory,
            "data_wait": min(1.0, (waited - self._waited) / max(now - self._since, 1e-9)),
        }
        self._since, self._waited = now, waited
        if torch.cuda.is_initialized():
            state.telemetry["device_memory"] = float(torch.cuda.max_memory_allocated())

    def on_evaluate(self, state: RunState, metrics: dict[str, float]) -> None:
        self._events.emit("evaluation", state.step, metrics=metrics, seconds=self._took("evaluation"))

    def on_checkpoint(self, state: RunState, folder: str) -> None:
        # A background checkpoint may complete some steps after its own.
        self._events.emit("checkpoint", state.step, folder=folder, seconds=self._took("checkpoint"))

    def _took(self, phase: str) -> float:
        """Returns the seconds that rank 0 has spent in a phase since the last call."""
        before, self._taken[phase] = self._taken.get(phase, 0.0), self._heartbeat.seconds_in(phase)
        return round(self._taken[phase] - before, 3)

    def on_epoch_end(self, state: RunState) -> None:
        self._events.emit("epoch", state.step, epoch=state.epoch)


def host_memory() -> float:
    """Returns the resident memory of this process in bytes; on systems without /proc, its largest value so far."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return float(int(file.read().split()[1]) * resource.getpagesize())
    except OSError:
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def metrics_of(state: RunState, metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of the event `log`."""
    return {
        "epoch": state.epoch,
        "total_steps": state.total_steps,
        "metrics": dict(metrics),
        "telemetry": dict(state.telemetry or {}),
    }
