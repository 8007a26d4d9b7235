"""`estimate`: tokens, operations, memory, communication, time and price of a run, before it is started.

Tokens and lengths of documents come from the plan of the data, which is that of the run. The memory is that of one
worker: see verify/memory.py. The time assumes an MFU, or is measured here by a few steps (`bench`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from myllm_ray.accelerators.memory import check_compiled_dropout
from myllm_ray.accelerators.sharding import sharding_of
from myllm_ray.common.hardware import Hardware
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.examples import TOKENS
from myllm_ray.data.prepare import PreparedData
from myllm_ray.data.row_tokens import row_tokens
from myllm_ray.data.stream import StreamSpec
from myllm_ray.data.targets import count_targets
from myllm_ray.data.tokenizer import open_tokenizer
from myllm_ray.dependencies import kind_of_model, model_section
from myllm_ray.engine.reporting.monitor import host_memory
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.flops import ModelFlops, model_flops
from myllm_ray.models.load import build_skeleton
from myllm_ray.ops.workload import Workload
from myllm_ray.preparation import absolute, check_names, prepare_data
from myllm_ray.verify import memory

_CONTEXT = 600_000_000
"""Bytes that CUDA, its libraries and torch need on a device."""
MFU = 0.4
"""Assumed MFU: what dense models of 1 to 70 billion parameters reach on A100 and H100 in public reports."""


@dataclass(frozen=True)
class DataCount:
    """What a run trains on, from the plan of its data."""

    steps: int
    tokens: int
    """Tokens of all steps, without padding."""
    trained: int
    """Tokens with a loss."""
    positions: int
    """Tokens with the padding of the micro-batches."""
    flops: float
    """Operations of all steps and workers, forward and backward."""
    widest: int
    """Width of the widest micro-batch."""
    most_trained: int
    """Largest number of tokens with a loss in a micro-batch."""
    packs: bool
    """Whether a row contains several documents."""


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
        ConfigError: rows depend on sampling or are pairs, or the model is built by a factory.
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
    if kind != TOKENS:
        raise ConfigError(
            f"estimate: trainer {config.trainer} trains on {kind}; only trainers on tokens (pretrain, sft) can be "
            "estimated: measure it with myllm-ray bench"
        )
    tokenizer = open_tokenizer(prepared.tokenizer_folder)

    def build() -> torch.nn.Module:
        built = build_skeleton(model_section(config), tokenizer, config.data.sequence_length, kind_of_model(config))
        if built is None:
            raise ConfigError("estimate: a model.factory can't be built without its weights: measure it with bench")
        return built

    model = build()
    check_compiled_dropout(model, config.accelerator)
    workers = hardware.count if hardware is not None else max(1, config.scaling.most)
    flops = model_flops(model)
    counted = count_data(config, prepared, flops)
    communication = communication_of(model, config, workers)
    process = resident if hardware is None else _CONTEXT
    parts = {"process": process, **memory_of(build, config, counted, workers)}
    notes = []
    if hardware is not None and step_seconds is None:
        step_seconds = _assumed_seconds(config, hardware, counted, communication, mfu)
        notes.append(f"time: assumes an MFU of {mfu:.0%} (--mfu), communication beside the computation")
        if sum(parts.values()) > hardware.device.memory:
            notes.append(
                f"a worker needs more than the {hardware.device.memory / 1e9:.0f} GB of {hardware.device.name}"
            )
    budget = config.run.budget
    return Estimate(
        workers=workers,
        data=counted,
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        memory=parts,
        communication=communication,
        hardware="the CPUs here" if hardware is None else f"{hardware.count} x {hardware.device.name}",
        step_seconds=step_seconds,
        usd_per_hour=budget.usd_per_hour if usd_per_hour is None and budget is not None else usd_per_hour,
        notes=notes,
    )


def count_data(config: TrainerConfig, prepared: PreparedData, flops: ModelFlops) -> DataCount:
    """Counts what a run trains on, epoch by epoch, to its last step."""
    spec = prepared.train
    per_batch = config.steps_per_batch
    batches = config.run.total_steps(per_batch, spec.steps_in_epoch) // per_batch
    left, epoch = batches, 0
    tokens = trained = positions = widest = most = 0
    total, packs = 0.0, False
    while left > 0:
        used = min(left, spec.steps_in_epoch(epoch))
        rows = row_tokens(spec.plan, epoch)[: used * spec.global_size]
        targets = count_targets(spec.plan, epoch).rows[: len(rows)]
        widths = _widths(spec, rows)
        segments, firsts = spec.plan.segments(epoch)
        lengths = np.asarray(segments[: firsts[len(rows)], 2])
        total += flops.of(Workload(lengths, int(targets.sum())))
        tokens, trained = tokens + int(rows.sum()), trained + int(targets.sum())
        positions, widest = positions + int(widths.sum()) * spec.micro_size, max(widest, int(widths.max()))
        most = max(most, int(np.add.reduceat(targets, np.arange(0, len(rows), spec.micro_size)).max()))
        packs = packs or bool((np.diff(firsts[: len(rows) + 1]) > 1).any())
        left, epoch = left - used, epoch + 1
    return DataCount(batches * per_batch, tokens, trained, positions, total, widest, most, packs)


def _widths(spec: StreamSpec, rows: np.ndarray) -> np.ndarray:
    """Returns the widths of the micro-batches of rows, as the collator pads them."""
    longest = np.maximum.reduceat(rows, np.arange(0, len(rows), spec.micro_size))
    found: np.ndarray = np.maximum(8, -(-longest // 8) * 8)
    return found


def memory_of(
    build: Callable[[], torch.nn.Module], config: TrainerConfig, counted: DataCount, workers: int
) -> dict[str, int]:
    """Returns the parts of a worker's memory at its peak, in bytes, without the process itself.

    Args:
        build: builds the model on the meta device.
        config: the config of the run.
        counted: what it trains on.
        workers: number of workers.
    """
    model, shards, precision = build(), sharding_of(config.accelerator, workers), config.accelerator.precision
    text: Any = getattr(model, "config").get_text_config()  # noqa: B009
    trains_head = bool(model.head.requires_grad) if isinstance(model, CausalLM) else True
    every, several = (
        config.accelerator.activation_checkpointing,
        config.batch.global_size // config.batch.micro_size // workers > 1,
    )
    trained = memory.parameter_bytes(model, 1, trained_only=True)
    gradients = memory.parameter_bytes(model, shards.gradients, trained_only=True)
    rows, width = config.batch.micro_size, counted.widest
    passes = memory.training_bytes(build(), every, precision, rows, width, counted.packs, several)
    return {
        "parameters": memory.parameter_bytes(model, shards.parameters) + memory.buffer_bytes(model),
        "gathered parameters": memory.gathered_bytes(model, precision, shards.parameters),
        "optimizer": memory.optimizer_bytes(model, config, shards.optimizer),
        "gradients": gradients,
        # The passes hold the complete gradients of one worker.
        "activations": max(0, passes - trained),
        "head": memory.head_bytes(
            int(text.hidden_size), int(text.vocab_size), counted.most_trained, precision, trains_head
        ),
    }


def communication_of(model: torch.nn.Module, config: TrainerConfig, workers: int) -> dict[str, int]:
    """Returns the bytes that a worker sends per optimizer step, by what they are, for ring algorithms."""
    if workers == 1:
        return {}
    shards, ring = sharding_of(config.accelerator, workers), (workers - 1) / workers
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    size = 4 if config.accelerator.precision == "fp32" else 2
    weights = sum(size * p.numel() for p in model.parameters())
    micros = config.batch.global_size // config.batch.micro_size // workers
    if shards.parameters > 1:  # gathered for each forward and each backward pass
        return {"parameters": int(2 * micros * ring * weights), "gradients": int(ring * gradients)}
    if shards.optimizer > 1:
        return {"parameters": int(ring * gradients), "gradients": int(ring * gradients)}
    return {"gradients": int(2 * ring * gradients)}


def _assumed_seconds(
    config: TrainerConfig, hardware: Hardware, counted: DataCount, communication: dict[str, int], mfu: float
) -> float:
    peak = hardware.device.peak(config.accelerator.precision, tf32=True)
    if peak is None:
        raise ConfigError(f"accelerator.precision={config.accelerator.precision}: {hardware.device.name} has none")
    # Padding is computed too, but is not part of the MFU.
    padded = counted.positions / max(1, counted.tokens)
    computing = counted.flops * padded / counted.steps / (hardware.count * peak * mfu)
    return max(computing, sum(communication.values()) / hardware.device.link)
