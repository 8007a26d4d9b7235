"""Typical faults of trainers and backends, which `verify` must name."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.accelerators.base import Accelerator, StepResult
from myllm_ray.accelerators.ddp import DDPAccelerator
from myllm_ray.accelerators.fsdp import FSDPAccelerator
from myllm_ray.accelerators.single import SingleGPUAccelerator
from myllm_ray.common.types import Micro, StepOutput
from myllm_ray.trainers.sft import SFTTrainer


class MeanOfMeans(SFTTrainer):
    """Averages within each micro-batch and then over micro-batches: the classic normalization error."""

    def batch_weight(self, micro: Micro) -> Tensor:
        return torch.tensor(1.0)

    def train_step(self, micro: Micro) -> StepOutput:
        output = super().train_step(micro)
        return StepOutput(output.loss_sum / super().batch_weight(micro), output.metrics)


class MeanOverRanks(DDPAccelerator):
    """Ignores that DDP averages the gradients."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class SteppedTwice(SingleGPUAccelerator):
    """Steps the schedule twice: once itself, and once in the base class."""

    def optimizer_step(self, gradient_clip: float | None) -> StepResult:
        result = super().optimizer_step(gradient_clip)
        self.schedule.step()
        return result


class LowPrecision(SingleGPUAccelerator):
    """Computes in bf16, whatever the config says."""

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16)


class Unclipped(SingleGPUAccelerator):
    """Measures the gradient norm and does not clip."""

    def clip(self, gradient_clip: float | None) -> float | Tensor:
        return super().clip(None)


class UnshardedReference(FSDPAccelerator):
    """Shards the trained model, and keeps frozen models whole on every rank."""

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        return Accelerator.prepare_frozen(self, model)


class NoDropout(SingleGPUAccelerator):
    """Leaves the model in evaluation mode."""

    def wrap(self, model: nn.Module) -> nn.Module:
        wrapped = super().wrap(model)
        wrapped.train(False)
        wrapped.train = lambda mode=True: wrapped  # type: ignore[method-assign, assignment, misc]
        return wrapped


class Broken(SingleGPUAccelerator):
    """Fails in the first backward pass."""

    def backward(self, loss: Tensor) -> None:
        raise ZeroDivisionError("planted")


class Forgetful(SFTTrainer):
    """Calls the model without the position ids that mark where documents begin."""

    def train_step(self, micro: Micro) -> StepOutput:
        return super().train_step({name: value for name, value in micro.items() if name != "position_ids"})
