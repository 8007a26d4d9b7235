"""The loss and metrics on held-out data, and on tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.common import distributed
from myllm_ray.common.progress import track
from myllm_ray.common.types import BatchStream, Position
from myllm_ray.engine.ema import WeightAverage
from myllm_ray.engine.reporting.metrics import MetricSum
from myllm_ray.trainers.base import BaseTrainer

log = logging.getLogger(__name__)


class EvaluationTasks(Protocol):
    """The tasks of `evaluation.tasks` (evaluate/training.py)."""

    def __call__(
        self, trainer: BaseTrainer, accelerator: Accelerator, on_batch: Callable[[], None]
    ) -> dict[str, float]:
        """Returns the metrics of all tasks, on every rank. Weights and random numbers are not changed."""


@torch.no_grad()
def evaluate_all(
    trainer: BaseTrainer,
    accelerator: Accelerator,
    data: BatchStream | None,
    tasks: EvaluationTasks | None,
    average: WeightAverage,
    step: int,
    max_batches: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Evaluates a trainer on held-out data and on tasks. See `evaluate` for the other arguments.

    Args:
        tasks: the tasks, or None. They are evaluated with the weights, not with their average.
        average: the average of the weights (section `ema`).
        step: the optimizer step, for messages.

    Returns:
        The metrics of `evaluate_both`, and those of the tasks.
    """
    metrics = {} if data is None else evaluate_both(trainer, accelerator, data, average, max_batches, on_batch)
    if data is not None and not metrics and distributed.is_main():
        log.warning("step %d: the held-out data contains no target token: no validation metrics", step)
    return metrics if tasks is None else {**metrics, **tasks(trainer, accelerator, on_batch)}


@torch.no_grad()
def evaluate(
    trainer: BaseTrainer,
    accelerator: Accelerator,
    data: BatchStream,
    max_batches: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Evaluates a trainer on held-out data. The model is in training mode afterwards.

    Args:
        trainer: the trainer, whose `evaluation_step` is called.
        accelerator: the backend, for devices, precision and the sum over ranks.
        data: the held-out data.
        max_batches: number of global batches to evaluate; default: all.
        on_batch: called before each batch.

    Returns:
        Metrics named `validation_<metric>`, averaged over all batches as if they were one batch. Empty if no token of
        the data is a target.
    """
    trainer.model.eval()
    # float64, because rounding errors of many batches add up in fp32.
    total = MetricSum(torch.tensor(0.0, dtype=torch.float64))
    count = min(data.steps_in_epoch(0), max_batches or 2**62)
    for batch in track(data.batches(Position(), count), "evaluating", count):
        on_batch()
        for micro in trainer.evaluation_micros(batch):
            micro = accelerator.move(trainer.prepare_micro(micro))
            # On the CPU, like the weight of `MetricSum`. This synchronizes host and device for every micro-batch.
            total.weight += trainer.evaluation_weight(micro).double().cpu()
            with accelerator.autocast():
                total.add(trainer.evaluation_step(micro))
    trainer.model.train()
    # One collective for the weight and the checksum of the names, before `reduce` adds the metrics by position.
    total.weight, checksums = accelerator.all_reduce([total.weight, total.checksum])
    total.check_names(int(checksums))
    values = total.reduce(accelerator)
    if "loss" not in values:
        return {}
    metrics = {**values, **trainer.derived_metrics(values)}
    return {f"validation_{name}": value for name, value in metrics.items() if name != "tokens" and name[0] != "_"}


def evaluate_both(
    trainer: BaseTrainer,
    accelerator: Accelerator,
    data: BatchStream,
    average: WeightAverage,
    max_batches: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Evaluates the weights, and with the section `ema` also their average, on the same data.

    Args:
        average: the average of the weights; its metrics are named `validation_ema_<metric>`.
        trainer, accelerator, data, max_batches, on_batch: see `evaluate`.
    """
    metrics = evaluate(trainer, accelerator, data, max_batches, on_batch)
    if not average:
        return metrics
    with average.in_use(accelerator):
        averaged = evaluate(trainer, accelerator, data, max_batches, on_batch)
    return {**metrics, **{name.replace("validation_", "validation_ema_", 1): v for name, v in averaged.items()}}
