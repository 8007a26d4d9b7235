"""The figures of a run's speed and memory: model FLOPs, MFU, the time of each phase, peak memory.

They are read when a line of the log is written, and describe the steps since the line before. They depend on the
machine, so they are not part of a comparison of two runs (`common/types.py`, `is_measured`).
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.common import distributed
from myllm_ray.common.hardware import find_device
from myllm_ray.common.types import Micro
from myllm_ray.engine.liveness.heartbeat import Heartbeat
from myllm_ray.ops.workload import Workload
from myllm_ray.trainers.base import BaseTrainer

log = logging.getLogger(__name__)
_PHASES = ("data", "forward", "backward", "optimizer", "checkpoint")
"""Phases whose time every line of the log contains."""
_OUTSIDE = ("start", "evaluation", "checkpoint", "end")
"""Phases that are not part of the time of a step."""
_PENDING = 64
"""Number of unread marks of the device from which they are read before the next line of the log."""


class DevicePhases:
    """Measures how long the device is in each phase, without waiting for it.

    An event is recorded on the stream at the begin of each phase. The time between two events is read once the device
    has passed both. It contains the time in which the device waits for the host.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        """Seconds in each phase, as far as the device has come."""
        self._marks: deque[tuple[str, Any]] = deque()

    def enter(self, phase: str) -> None:
        """Marks the begin of a phase."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))
        if len(self._marks) > _PENDING:
            self.read()

    def read(self) -> dict[str, float]:
        """Returns `spent`, with the phases that the device has completed by now."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            phase, begin = self._marks.popleft()
            self.spent[phase] = self.spent.get(phase, 0.0) + begin.elapsed_time(self._marks[0][1]) / 1000
        return self.spent


class Figures:
    """Measures the steps of a run on this rank.

    Args:
        trainer: counts what the model computes for a micro-batch.
        accelerator: the backend, set up.
        heartbeat: reports the begin of each phase.
        flops: returns the operations of a workload, forward and backward; None: they are not known.
    """

    def __init__(
        self,
        trainer: BaseTrainer,
        accelerator: Accelerator,
        heartbeat: Heartbeat,
        flops: Callable[[Workload], float] | None,
    ):
        self._trainer, self._heartbeat, self._of = trainer, heartbeat, flops
        self.peak = peak_flops(accelerator)
        self._on_cuda = accelerator.device.type == "cuda"
        self._device = DevicePhases() if self._on_cuda else None
        if self._device is not None:
            heartbeat.on_enter = self._device.enter
        self._flops, self._steps = 0.0, 0
        self._before = self._spent()
        self._outside = self._host_seconds(_OUTSIDE)
        self._communication, self._since = distributed.seconds_in_collectives(), time.perf_counter()

    def count(self, micros: Iterable[Micro]) -> None:
        """Counts the operations of a step. The tensors are on the host, or the trainer builds them on the device."""
        self._steps += 1
        if self._of is None:
            return
        try:
            self._flops += sum(self._of(self._trainer.workload(micro)) for micro in micros)
        except KeyError as error:
            # On every rank: the names of the tensors are those of the trainer's data.
            self._of = None
            log.warning(
                "tflops_per_second is not logged: the micro-batches of %s have no %s; override `workload`",
                type(self._trainer).__name__,
                error,
            )

    def read(self) -> dict[str, float]:
        """Returns the figures of the steps since the last call.

        Returns:
            `time/<phase>`, in seconds per step; `tflops_per_second`, and `mfu` if the peak of the device is known, of
            this rank; `memory/host_peak` and on CUDA `memory/device_peak`, in bytes, since the start of the process.
        """
        steps = max(1, self._steps)
        spent, outside, now = self._spent(), self._host_seconds(_OUTSIDE), time.perf_counter()
        communication = distributed.seconds_in_collectives()
        seconds = max(1e-9, now - self._since - (outside - self._outside))
        phases = (*_PHASES, "rollout") if self._trainer.layout == "rollouts" else _PHASES
        found = {f"time/{p}": (spent.get(p, 0.0) - self._before.get(p, 0.0)) / steps for p in phases}
        found["time/communication"] = (communication - self._communication) / steps
        if self._of is not None:
            found["tflops_per_second"] = self._flops / seconds / 1e12
            if self.peak is not None:
                found["mfu"] = self._flops / seconds / self.peak
        found["memory/host_peak"] = peak_host_memory()
        if self._on_cuda:
            found["memory/device_peak"] = float(torch.cuda.max_memory_allocated())
        self._flops, self._steps, self._before, self._outside = 0.0, 0, spent, outside
        self._communication, self._since = communication, now
        return found

    def _spent(self) -> dict[str, float]:
        if self._device is None:
            return {phase: self._heartbeat.seconds_in(phase) for phase in (*_PHASES, "rollout")}
        # Nothing is computed on the device while a checkpoint is written, and the host waits for it.
        return {**self._device.read(), "checkpoint": self._heartbeat.seconds_in("checkpoint")}

    def _host_seconds(self, phases: Iterable[str]) -> float:
        return sum(self._heartbeat.seconds_in(phase) for phase in phases)


def peak_flops(accelerator: Accelerator) -> float | None:
    """Returns the peak FLOP/s of the device of a backend in the precision of the run, or None if it is not known.

    `accelerator.peak_tflops` has priority over the table of devices.
    """
    section = accelerator.section
    if section.peak_tflops is not None:
        return section.peak_tflops * 1e12
    if accelerator.device.type != "cuda":
        return None
    device = find_device(torch.cuda.get_device_name(accelerator.device))
    return None if device is None else device.peak(section.precision, torch.get_float32_matmul_precision() != "highest")


def peak_host_memory() -> float:
    """Returns the largest resident memory of this process so far, in bytes."""
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
