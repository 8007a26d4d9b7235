"""The parts of a worker's memory at its peak, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.accelerators.optimizer_state import create_moments
from myllm_ray.accelerators.precision import hold_weights
from myllm_ray.accelerators.sharding import largest_shard, sharding_of
from myllm_ray.common.modules import repeated_blocks
from myllm_ray.common.types import Batch, Micro, Position
from myllm_ray.config.resolve import resolve
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.collate import to_tensors
from myllm_ray.data.prepare import PreparedData
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.verify.data_count import DataCount
from myllm_ray.verify.heap import free_blocks
from myllm_ray.verify.step_memory import record_step


def parameter_bytes(model: nn.Module, shards: int, trained_only: bool = False) -> int:
    """Returns the bytes of the parameters of the worker with the largest shards."""
    return sum(
        p.element_size() * largest_shard(p.shape, shards)
        for p in model.parameters()
        if p.requires_grad or not trained_only
    )


def buffer_bytes(model: nn.Module) -> int:
    """Returns the bytes of the buffers, which every worker holds."""
    return sum(b.numel() * b.element_size() for b in model.buffers())


def optimizer_state(model: nn.Module, config: TrainerConfig, shards: int) -> list[int]:
    """Returns the bytes of each tensor of the optimizer's state, from a step on the meta device."""
    with torch.device("meta"):
        optimizer = OptimizerManager(model, config).build(model)
        create_moments(optimizer)
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    for parameter in model.parameters():
        parameter.grad = None
    return [t.element_size() * (largest_shard(t.shape, shards) if t.dim() else 1) for t in state]


def gathered_bytes(model: nn.Module, precision: str, shards: int) -> int:
    """Returns the bytes of the parameters that a sharding backend gathers: two blocks, or the embeddings."""
    if shards == 1:
        return 0
    blocks = repeated_blocks(model)
    inside = {id(p) for block in blocks for p in block.parameters()}
    largest = max((_elements(block.parameters()) for block in blocks), default=0)
    rest = _elements(p for p in model.parameters() if id(p) not in inside)
    return max(2 * largest, rest) * (4 if precision == "fp32" else 2)


def _elements(parameters: Iterable[Any]) -> int:
    return sum(p.numel() for p in parameters)


def memory_of(
    trainer: BaseTrainer, config: TrainerConfig, prepared: PreparedData, counted: DataCount, workers: int, on_cpu: bool
) -> dict[str, int]:
    """Returns the parts of a worker's memory at its peak, in bytes, without the process itself.

    Args:
        trainer: The trainer with models on the meta device. They are changed: it can't be used afterwards.
        config: The config of the run.
        prepared: Its data.
        counted: What it trains on.
        workers: Number of workers.
        on_cpu: Whether the workers train on CPUs.
    """
    model, section = trainer.model, config.accelerator
    shards = sharding_of(section, workers)
    backend: type[Accelerator] = resolve("accelerators", section.name, "accelerator.name")
    if backend.mixes_dtypes and config.model.lora is not None:
        hold_weights(model, section.precision, frozen_only=True)
    for frozen in trainer.frozen_models.values():
        hold_weights(frozen, section.precision)
    trained = parameter_bytes(model, 1, trained_only=True)
    state = optimizer_state(model, config, shards.optimizer)
    parameters = parameter_bytes(model, shards.parameters) + buffer_bytes(model)
    copies = parameter_bytes(model, shards.parameters, trained_only=True)
    parts = {
        "parameters": parameters,
        "frozen models": sum(
            parameter_bytes(m, shards.parameters) + buffer_bytes(m) for m in trainer.frozen_models.values()
        ),
        "gathered parameters": gathered_bytes(model, section.precision, shards.parameters),
        "optimizer": sum(state),
        "averaged weights": copies if config.ema is not None else 0,
        "gradients": parameter_bytes(model, shards.gradients, trained_only=True),
    }
    if on_cpu and config.checkpoint.async_:
        parts["background checkpoint"] = copies + sum(state) + parts["averaged weights"]
    several = config.batch.global_size // config.batch.micro_size // workers > 1
    micro = _widest(trainer, prepared, counted)
    recording = record_step(trainer, micro, section, config.run.seed, several, config.gradient_clip is not None)
    # The passes hold the complete gradients of one worker.
    parts["activations"] = max(0, recording.peak - trained)
    if on_cpu:
        parts["free blocks of the allocator"] = free_blocks(recording.events, recording.peak, state)
    return parts


def _widest(trainer: BaseTrainer, prepared: PreparedData, counted: DataCount) -> Micro:
    """Returns the micro-batch that needs the most memory, as the trainer gets it."""
    micro, start = to_tensors(prepared.train.micro_at(*counted.widest_at)), Position(*counted.widest_at)
    found: Micro = next(iter(trainer.optimizer_steps(Batch([micro], start, start, 0))))[0]
    return found
