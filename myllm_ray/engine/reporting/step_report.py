"""The values of training steps, which the device may still be computing when a step returns.

A step reads nothing from the device. The norm of its gradient and its metrics are copied to the host, and the host
reads these copies in the next step, when the device has work again. They are read at once before an evaluation, a
checkpoint, the end of an epoch and the end of the run.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from myllm_ray.accelerators.base import StepResult
from myllm_ray.common.host_copy import HostCopy
from myllm_ray.common.types import Position
from myllm_ray.config.errors import TrainingError
from myllm_ray.engine.reporting.metrics import MetricSum, ReducedMetrics
from myllm_ray.trainers.base import BaseTrainer

if TYPE_CHECKING:
    from myllm_ray.engine.loop import TrainerEngine


class StepReport:
    """The norm of the gradient and the metrics of a step.

    The constructor starts the copy of the norm to the host; the methods wait for it and for the metrics.

    Args:
        step: number of the step, counted from 1.
        position: the position of its batch in the data.
        result: of the optimizer step.
        reduced: the metrics; None if nothing was computed or they are not read.
        learning_rate: of the step.
        logs: whether the interval of the log ends with the step.
    """

    def __init__(
        self,
        step: int,
        position: Position,
        result: StepResult,
        reduced: ReducedMetrics | None,
        learning_rate: float,
        logs: bool,
    ):
        self.step, self.position, self.skipped, self.logs = step, position, result.skipped, logs
        self._rate, self._reduced, norm = learning_rate, reduced, result.grad_norm
        self._norm = HostCopy(norm) if isinstance(norm, Tensor) else norm

    @property
    def grad_norm(self) -> float:
        """The norm of the gradient before clipping."""
        return float(self._norm.read()) if isinstance(self._norm, HostCopy) else self._norm

    def check(self) -> None:
        """Checks the gradient.

        Raises:
            TrainingError: it is not finite, and the step was not skipped.
        """
        if self.skipped or math.isfinite(norm := self.grad_norm):
            return
        raise TrainingError(
            f"step {self.step}: the gradient is not finite (norm {norm}), in the batch at epoch "
            f"{self.position.epoch}, row {self.position.row}; see its rows with "
            f"`myllm-ray replay RUN --step {self.step}`. The last checkpoint is kept. Try a lower "
            "optimizer.lr, a longer warm-up, or accelerator.precision=fp32"
        )

    def metrics(self, trainer: BaseTrainer) -> dict[str, float]:
        """Returns the metrics for the log, without those whose names begin with `_`."""
        values = self._reduced.read() if self._reduced is not None else {}
        found = {
            **values,
            **(trainer.derived_metrics(values) if values else {}),
            "learning_rate": self._rate,
        }
        found = {name: value for name, value in found.items() if name[0] != "_"}
        if not self.skipped:  # an overflowing gradient has no norm
            found["grad_norm"] = self.grad_norm
        return found


@dataclass
class Rates:
    """The speed of the steps since the last line of the log."""

    steps: int = 0
    seconds: float = 0.0
    logged_wait: float = 0.0

    def add(self, seconds: float) -> None:
        """Adds a step that took this many seconds, without the wait for its data."""
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds

    def read(self, tokens: float, waited: float) -> dict[str, float]:
        """Returns the metrics of the speed and starts again.

        Args:
            tokens: number of tokens of the last step.
            waited: seconds in which the training thread waited for data since the start of the run.
        """
        self.logged_wait, waited = waited, waited - self.logged_wait
        # The time of one step alone is no measure: the device computes it while the host prepares the next ones.
        values = {
            "time": time.time(),
            "tokens_per_second": tokens * self.steps / self.seconds if self.seconds else 0.0,
            "data_wait": waited / max(self.steps, 1),
            "data_wait_share": waited / (waited + self.seconds) if self.seconds else 0.0,
        }
        self.steps, self.seconds = 0, 0.0
        return values


class StepReports:
    """Reads the values of the steps of an engine, raises on a non-finite gradient, evaluates and logs.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: TrainerEngine):
        self._engine, self.rates = engine, Rates()
        self._unread: StepReport | None = None

    def add(self, result: StepResult, sums: MetricSum | None, position: Position, started: float) -> None:
        """Adds the step that the engine has made. The values of the previous one have been read.

        Args:
            result: of the optimizer step.
            sums: the sums of the metrics; None if nothing was computed.
            position: the position of the batch in the data.
            started: the time at which the step began, of `time.perf_counter`.

        Raises:
            TrainingError: the gradient is not finite.
        """
        engine, settings, step = self._engine, self._engine.settings, self._engine.state.step
        last = step == engine.state.total_steps
        evaluates = engine.evaluates and (
            engine.due(settings.evaluation.every_steps, "evaluate") or (settings.evaluation.at_end and last)
        )
        logs = step % settings.logging.every_steps == 0 or last
        reduced = sums.start(engine.accelerator) if sums is not None and (logs or evaluates) else None
        self._unread = StepReport(step, position, result, reduced, engine.last_rate, logs)
        # A policy for bad steps and a loss scale have waited for the norm. A CPU has no work left.
        complete = engine.stability.active or engine.accelerator.loss_scale.enabled
        now = complete or evaluates or last or not engine.accelerator.asynchronous
        if now:
            self._unread.check()  # the time of the step includes the work of the device
        self.rates.add(time.perf_counter() - started)
        if now:
            self.finish(evaluates)

    def finish(self, evaluates: bool = False) -> None:
        """Reads the values of the last step, unless they were read, evaluates on request, and logs if it is due.

        Raises:
            TrainingError: the gradient is not finite.
        """
        report, self._unread = self._unread, None
        if report is None:
            return
        report.check()
        evaluated = self._engine.evaluate() if evaluates else {}
        if evaluates:
            self._engine.agree(0)
        if evaluated or report.logs:
            self._log(report, evaluated)

    def _log(self, report: StepReport, evaluated: dict[str, float]) -> None:
        engine, state = self._engine, self._engine.state
        metrics = report.metrics(engine.trainer)
        tokens = metrics.get("tokens", 0.0)
        if engine.accelerator.loss_scale.enabled:
            metrics["loss_scale"] = engine.accelerator.loss_scale.value
        if engine.accelerator.loss_scale.enabled or engine.stability.active:
            metrics["skipped_steps"] = float(engine.skipped_steps)
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        waited = engine.batches.waited if engine.batches is not None else 0.0
        engine.metrics = {**metrics, **evaluated, **engine.constants, **self.rates.read(tokens, waited)}
        engine.metrics |= engine.figures.read()
        # The position of the reported step, which may be the one before the current step.
        current = state.position, state.epoch
        state.position, state.epoch = report.position, report.position.epoch
        engine.callbacks.emit("on_log", state, engine.metrics)
        state.position, state.epoch = current
