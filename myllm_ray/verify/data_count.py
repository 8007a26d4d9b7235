"""What a run trains on, counted from the plan of its data before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from myllm_ray.common.types import Position
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.collate import to_tensors
from myllm_ray.data.row_tokens import row_tokens
from myllm_ray.data.source_counts import tokens_by_source
from myllm_ray.data.stream import StreamSpec
from myllm_ray.data.targets import count_targets
from myllm_ray.models.flops import ModelFlops
from myllm_ray.ops.workload import Workload
from myllm_ray.trainers.preference import PreferenceTrainer


@dataclass(frozen=True)
class DataCount:
    """What a run trains on."""

    steps: int
    tokens: int
    """Tokens of all steps, without padding."""
    trained: int
    """Tokens with a loss; of pairs, the tokens of the answers."""
    positions: int
    """Tokens with the padding of the micro-batches."""
    flops: float
    """Operations of all steps and workers, forward and backward, of the trained model."""
    widest: int
    """Width of the widest micro-batch of the data."""
    widest_at: tuple[int, int]
    """Epoch and first row of the micro-batch that needs the most memory: the widest; among those one with packed rows,
    which need a mask; among those the one with the most tokens with a loss."""
    by_source: dict[str, int] = field(default_factory=dict)
    """Tokens of each source; empty for pairs."""


def count_tokens(config: TrainerConfig, spec: StreamSpec, flops: ModelFlops) -> DataCount:
    """Counts rows of documents, epoch by epoch, to the last step of a run. No token is read."""
    per_batch = config.steps_per_batch
    batches = config.run.total_steps(per_batch, spec.steps_in_epoch) // per_batch
    left, epoch = batches, 0
    tokens = trained = positions = 0
    of_source = np.zeros(len(spec.plan.store.sources), np.int64)
    total, most = 0.0, (0, False, 0, 0, 0)
    while left > 0:
        used = min(left, spec.steps_in_epoch(epoch))
        rows = row_tokens(spec.plan, epoch)[: used * spec.global_size]
        targets = count_targets(spec.plan, epoch).rows[: len(rows)]
        firsts_of_micros = np.arange(0, len(rows), spec.micro_size)
        widths, predicted = _widths(spec, rows), np.add.reduceat(targets, firsts_of_micros)
        segments, firsts = spec.plan.segments(epoch)
        lengths = np.asarray(segments[: firsts[len(rows)], 2])
        total += flops.of(Workload(lengths, int(targets.sum())))
        tokens, trained = tokens + int(rows.sum()), trained + int(targets.sum())
        of_source += tokens_by_source(spec.plan, epoch, len(rows))
        positions += int(widths.sum()) * spec.micro_size
        # Padding is a document too.
        documents = np.diff(firsts[: len(rows) + 1]) + (rows < np.repeat(widths, spec.micro_size)[: len(rows)])
        packed = np.maximum.reduceat(documents, firsts_of_micros) > 1
        place = int(np.lexsort((predicted, packed, widths))[-1])
        found = int(widths[place]), bool(packed[place]), int(predicted[place]), epoch, int(firsts_of_micros[place])
        most = max(most, found, key=lambda item: item[:3])
        left, epoch = left - used, epoch + 1
    by_source = dict(zip(spec.plan.store.sources, of_source.tolist(), strict=True))
    return DataCount(batches * per_batch, tokens, trained, positions, total, most[0], most[3:], by_source)


def _widths(spec: StreamSpec, rows: np.ndarray) -> np.ndarray:
    """Returns the widths of the micro-batches of rows, as the collator pads them."""
    longest = np.maximum.reduceat(rows, np.arange(0, len(rows), spec.micro_size))
    found: np.ndarray = np.maximum(8, -(-longest // 8) * 8)
    return found


def count_pairs(config: TrainerConfig, spec: StreamSpec, flops: ModelFlops, trainer: PreferenceTrainer) -> DataCount:
    """Counts pairs of answers. It builds every micro-batch, because a prompt may be computed once or twice."""
    batches = config.run.total_steps(1, spec.steps_in_epoch)
    tokens = trained = positions = 0
    total, most = 0.0, (0, 0, 0, 0)
    for epoch, row in spec.places(Position(), 0, batches * spec.micros_per_step):
        micro = trainer.prepare_micro(to_tensors(spec.micro_at(epoch, row)))
        work = trainer.workload(micro)
        inputs, _ = trainer.inputs(micro)
        width, count = inputs["input_ids"].shape[1], inputs["input_ids"].numel()
        tokens, trained, positions = tokens + work.tokens, trained + work.predicted, positions + count
        total += flops.of(work)
        most = max(most, (width, work.predicted, epoch, row), key=lambda item: item[:2])
    return DataCount(batches, tokens, trained, positions, total, most[0], most[2:])
