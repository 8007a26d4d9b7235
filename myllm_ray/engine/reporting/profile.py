"""The profile of some steps (`logging.profile`, `--profile A:B`): a trace and a table of the most expensive operations.

Rank 0 writes `profile/steps-A-B.json`, for chrome://tracing or Perfetto, and `profile/steps-A-B.txt` in the folder of
the run.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from myllm_ray.common.files import write_atomic
from myllm_ray.common.types import RunState
from myllm_ray.engine.callbacks import Callback

log = logging.getLogger(__name__)
_MOST = 10
"""Number of operations in the table."""


class StepProfiler(Callback):
    """Profiles the steps `first` to `last`, counted from 1. `run_worker` adds it.

    A run that ends earlier writes the steps that it has made.
    """

    main_only = True

    def __init__(self, first: int, last: int):
        self._first, self._last = first, last
        self._profile: Any = None
        self._begun = 0
        self._state: RunState | None = None

    def on_step_start(self, state: RunState) -> None:
        step = state.step + 1
        if self._profile is None and self._first <= step <= self._last and state.folder:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                activities.append(ProfilerActivity.CUDA)
            self._profile, self._begun, self._state = profile(activities=activities), step, state
            self._profile.start()

    def on_step_end(self, state: RunState) -> None:
        if self._profile is not None and state.step >= self._last:
            self._end(state.step)

    def close(self) -> None:
        if self._profile is not None and self._state is not None:
            self._end(self._state.step)

    def _end(self, step: int) -> None:
        assert self._state is not None
        assert self._state.folder
        ended, self._profile = self._profile, None
        ended.stop()
        # A later step of this attempt must not begin another profile.
        self._last = 0
        folder = Path(self._state.folder) / "profile"
        folder.mkdir(exist_ok=True)
        name = f"steps-{self._begun}-{step}"
        ended.export_chrome_trace(str(folder / f"{name}.json"))
        text = operations(ended, f"steps {self._begun} to {step}")
        write_atomic(folder / f"{name}.txt", text)
        log.info("profile: %s/%s.json\n%s", folder, name, text.rstrip())


def operations(ended: Any, title: str) -> str:
    """Returns the table of the operations with the most time of their own, without that of operations they call.

    Args:
        ended: a profile of torch that has ended.
        title: what was profiled.
    """
    events = [event for event in ended.key_averages() if not event.key.startswith("ProfilerStep")]
    on_device = any(event.self_device_time_total for event in events)
    where = "device" if on_device else "CPU"
    timed = [(float(e.self_device_time_total if on_device else e.self_cpu_time_total) / 1000, e) for e in events]
    total = sum(time for time, _ in timed) or 1.0
    timed.sort(key=lambda pair: -pair[0])
    width = max([9, *(min(60, len(event.key)) for _, event in timed[:_MOST])])
    lines = [f"{title}: {where} time of operations, {total:,.1f} ms in all"]
    lines.append(f"{'operation':<{width}}  {'ms':>10}  {'share':>6}  {'calls':>8}")
    for time, event in timed[:_MOST]:
        lines.append(f"{event.key[:60]:<{width}}  {time:>10,.1f}  {time / total:>6.1%}  {event.count:>8,}")
    return "\n".join(lines) + "\n"
