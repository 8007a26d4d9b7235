"""`estimate`: tokens, operations, memory, communication, time and price of a run, before it is started.

Tokens and lengths of documents come from the plan of the data, which is that of the run. The memory is that of one
worker: see verify/memory.py. The time assumes an MFU, or is measured here by a few steps (`bench`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from myllm_ray.accelerators.memory import check_compiled_dropout
from myllm_ray.accelerators.sharding import sharding_of
from myllm_ray.common.hardware import Hardware
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.examples import PAIRS, TOKENS
from myllm_ray.dependencies import trainer_class_of
from myllm_ray.engine.reporting.monitor import host_memory
from myllm_ray.models.flops import model_flops
from myllm_ray.preparation import absolute, check_names, prepare_data
from myllm_ray.trainers.preference import PreferenceTrainer
from myllm_ray.verify.data_count import DataCount, count_pairs, count_tokens
from myllm_ray.verify.skeleton import skeleton_trainer

_CONTEXT = 600_000_000
"""Bytes that CUDA, its libraries and torch need on a device."""
MFU = 0.4
"""Assumed MFU: what dense models of 1 to 70 billion parameters reach on A100 and H100 in public reports."""


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run. Bytes are those of one worker; communication is per optimizer step and worker."""

    workers: int
    data: DataCount
    parameters: int
    trained_parameters: int
    memory: dict[str, int]
    communication: dict[str, int]
    hardware: str
    step_seconds: float | None = None
    usd_per_hour: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def total_memory(self) -> int:
        """Bytes of one worker at the peak."""
        return sum(self.memory.values())

    @property
    def hours(self) -> float | None:
        """Hours of all steps, without evaluation and checkpoints."""
        return None if self.step_seconds is None else self.data.steps * self.step_seconds / 3600

    @property
    def usd(self) -> float | None:
        """Price of the hours."""
        return None if self.hours is None or self.usd_per_hour is None else self.hours * self.usd_per_hour

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "total_memory": self.total_memory, "hours": self.hours, "usd": self.usd}


def estimate(
    config: TrainerConfig,
    hardware: Hardware | None = None,
    mfu: float = MFU,
    usd_per_hour: float | None = None,
    step_seconds: float | None = None,
) -> Estimate:
    """Estimates a run.

    Args:
        config: the run's config. The data is prepared into its cache; nothing else is written.
        hardware: the accelerators, one for each worker; None: the CPUs of this machine.
        mfu: assumed MFU.
        usd_per_hour: price of all hardware per hour; default: that of `run.budget`.
        step_seconds: measured seconds per step, which replace the assumption.

    Raises:
        ConfigError: the rows are neither documents nor pairs, a factory builds the model, or what the model computes
            depends on values.
    """
    config = absolute(config)
    if config.run.amendments:
        raise ConfigError("estimate: run.amendments are not supported: leave them out (run.amendments=[])")
    if config.batch.find_micro_size:
        raise ConfigError("estimate: batch.micro_size: auto is found by training: give a number")
    if hardware is not None:
        config.accelerator.device = "auto"
    check_names(config)
    prepared = prepare_data(config)
    resident = int(host_memory())
    kind = prepared.train.plan.store.kind
    pairs = kind == PAIRS and issubclass(trainer_class_of(config), PreferenceTrainer)
    if kind != TOKENS and not pairs:
        raise ConfigError(
            f"estimate: trainer {config.trainer} trains on {kind} here; only trainers on tokens (pretrain, sft) or "
            "pairs (dpo, reward) can be estimated: measure it with myllm-ray bench"
        )
    device = torch.device("cpu" if hardware is None else "cuda")
    trainer = skeleton_trainer(config, prepared, device)
    model = trainer.model
    check_compiled_dropout(model, config.accelerator)
    workers = hardware.count if hardware is not None else max(1, config.scaling.most)
    flops = model_flops(model)
    counted = (
        count_pairs(config, prepared.train, flops, trainer)
        if isinstance(trainer, PreferenceTrainer)
        else count_tokens(config, prepared.train, flops)
    )
    communication = communication_of(model, config, workers)
    sizes = [p.numel() for p in model.parameters()], [p.numel() for p in model.parameters() if p.requires_grad]
    process = resident if hardware is None else _CONTEXT
    from myllm_ray.verify.memory import memory_of  # after the measurement of this process, which it makes larger

    passes = 1 + len(trainer.frozen_models) / 3  # a forward pass costs a third of both
    parts = {"process": process, **memory_of(trainer, config, prepared, counted, workers, hardware is None)}
    notes = []
    if hardware is not None and step_seconds is None:
        step_seconds = _assumed_seconds(config, hardware, counted, communication, mfu, passes)
        notes.append(f"time: assumes an MFU of {mfu:.0%} (--mfu), communication beside the computation")
        if sum(parts.values()) > hardware.device.memory:
            notes.append(
                f"a worker needs more than the {hardware.device.memory / 1e9:.0f} GB of {hardware.device.name}"
            )
    budget = config.run.budget
    return Estimate(
        workers=workers,
        data=counted,
        parameters=sum(sizes[0]),
        trained_parameters=sum(sizes[1]),
        memory=parts,
        communication=communication,
        hardware="the CPUs here" if hardware is None else f"{hardware.count} x {hardware.device.name}",
        step_seconds=step_seconds,
        usd_per_hour=budget.usd_per_hour if usd_per_hour is None and budget is not None else usd_per_hour,
        notes=notes,
    )


def communication_of(model: torch.nn.Module, config: TrainerConfig, workers: int) -> dict[str, int]:
    """Returns the bytes that a worker sends per optimizer step, by what they are, for ring algorithms."""
    if workers == 1:
        return {}
    shards = sharding_of(config.accelerator, workers)
    group = workers // shards.replicas  # that shares the shards
    ring, across = (group - 1) / group, (shards.replicas - 1) / shards.replicas
    half = config.accelerator.gradient_dtype == "bf16"
    gradients = sum((2 if half else 4) * p.numel() for p in model.parameters() if p.requires_grad)
    size = 4 if config.accelerator.precision == "fp32" else 2
    weights = sum(size * p.numel() for p in model.parameters())
    micros = config.batch.global_size // config.batch.micro_size // workers
    if shards.parameters > 1:  # gathered for each forward and each backward pass
        passes = 1 if config.accelerator.options.get("reshard_after_forward") is False else 2
        # Under hybrid sharding the shards of the gradients are also summed over the groups.
        return {
            "parameters": int(passes * micros * ring * weights),
            "gradients": int((ring + 2 * across / group) * gradients),
        }
    if shards.optimizer > 1:
        updated = sum(size * p.numel() for p in model.parameters() if p.requires_grad)
        return {"parameters": int(ring * updated), "gradients": int(ring * gradients)}
    return {"gradients": int(2 * (workers - 1) / workers * gradients)}


def _assumed_seconds(
    config: TrainerConfig,
    hardware: Hardware,
    counted: DataCount,
    communication: dict[str, int],
    mfu: float,
    passes: float,
) -> float:
    peak = hardware.device.peak(config.accelerator.precision, tf32=True)
    if peak is None:
        raise ConfigError(f"accelerator.precision={config.accelerator.precision}: {hardware.device.name} has none")
    # Padding is computed too, but is not part of the MFU.
    padded = counted.positions / max(1, counted.tokens)
    computing = passes * counted.flops * padded / counted.steps / (hardware.count * peak * mfu)
    return max(computing, sum(communication.values()) / hardware.device.link)
