"""The ordered stream of micro-batches, in-process. Ray Data uses the same `micro_at` (orchestration/ray_data.py).

With global batch size G, micro-batch size m and W workers, step s of an epoch consists of rows [s·G, (s+1)·G). Its
micro-batch j consists of rows [s·G + j·m, s·G + (j+1)·m) and is assigned to rank j mod W. The rows of a step depend
neither on W nor on m.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from myllm_ray.common.types import Batch, Position
from myllm_ray.data.collate import build_micro, to_tensors, wrap64
from myllm_ray.data.collate_examples import build_pairs, build_prompts
from myllm_ray.data.examples import LABELLED, PAIRS, PROMPTS
from myllm_ray.data.plan import RowPlan
from myllm_ray.data.store import describe_documents


@dataclass
class StreamSpec:
    """The specification of a stream. Its pickle is small, so that it can be sent to Ray Data tasks."""

    plan: RowPlan
    global_size: int
    micro_size: int
    pad_id: int

    @property
    def micros_per_step(self) -> int:
        return self.global_size // self.micro_size

    def steps_in_epoch(self, epoch: int) -> int:
        return -(-self.plan.rows_in_epoch(epoch) // self.global_size)

    def micro_at(self, epoch: int, row: int, place: int | None = None) -> dict[str, Any]:
        """Returns the micro-batch that starts at a row of an epoch; see `build` for `place`."""
        return self.build(epoch, row, self.micro_size, place)

    def build(self, epoch: int, row: int, count: int, place: int | None = None) -> dict[str, Any]:
        """Returns `count` rows from `row` on, all of one global batch, as one micro-batch.

        Args:
            epoch, row: position of the first row.
            count: number of rows.
            place: index of the first row in its global batch; default: as in an epoch whose batches all have this size.
        """
        plan, place = self.plan, row % self.global_size if place is None else place
        rows, store = plan.rows(epoch, row, row + count), plan.store
        if store.kind == PROMPTS:
            return build_prompts(store, rows, self.pad_id, place)
        if store.kind in (PAIRS, LABELLED):
            # Unpaired preferences take their second answer from other rows of the global batch.
            batch = plan.rows(epoch, row - place, row - place + self.global_size) if store.kind == LABELLED else None
            return build_pairs(store, rows, self.pad_id, place, batch)
        return build_micro(store, rows, self.pad_id, place)

    def describe(self, position: Position) -> str:
        """Returns a description of the documents of the global batch that starts at `position`, for messages."""
        rows = self.plan.rows(position.epoch, position.row, position.row + self.global_size)
        return describe_documents(self.plan.store, sorted({segment.document for row in rows for segment in row}))

    def after(self, position: Position) -> Position:
        """Returns the position after the step that starts at `position`."""
        row = position.row + self.global_size
        # By rows, not by batches: a batch of another size may have ended at any row (config/amendments.py).
        done = row >= self.plan.rows_in_epoch(position.epoch)
        return Position(position.epoch + 1, 0) if done else Position(position.epoch, row)

    def advance(self, start: Position, steps: int) -> Position:
        """Returns the position `steps` global batches after `start`. Plans only the epochs in between."""
        position = self.normalized(start)
        while (left := -(-(self.plan.rows_in_epoch(position.epoch) - position.row) // self.global_size)) <= steps:
            steps, position = steps - left, Position(position.epoch + 1, 0)
        return Position(position.epoch, position.row + steps * self.global_size)

    def places(self, start: Position, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Yields (epoch, row) of `count` micro-batches, starting with micro-batch number `first` after `start`."""
        step, skip = divmod(first, self.micros_per_step)
        position = self.advance(start, step)
        while count > 0:
            for number in range(skip, min(self.micros_per_step, skip + count)):
                yield position.epoch, position.row + number * self.micro_size
            count, skip = count - (self.micros_per_step - skip), 0
            position = self.after(position)

    def positions(self, start: Position, steps: int) -> Iterator[Position]:
        """Yields the start position of each of the next `steps` global batches."""
        position = self.normalized(start)
        for _ in range(steps):
            yield position
            position = self.after(position)

    def normalized(self, position: Position) -> Position:
        """Returns the start of the next epoch for a position at the end of an epoch, else `position`."""
        if position.row >= self.plan.rows_in_epoch(position.epoch):
            return Position(position.epoch + 1, 0)
        return position


class LocalStream:
    """A stream that is read in the training process."""

    def __init__(self, spec: StreamSpec, rank: int | None = None, world_size: int | None = None):
        from myllm_ray.common import distributed  # imports torch, which tasks that only build micro-batches do not need

        self.spec = spec
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        self.sources, self.describe = spec.plan.store.sources, spec.describe

    def steps_in_epoch(self, epoch: int) -> int:
        return self.spec.steps_in_epoch(epoch)

    def batches(self, start: Position, steps: int) -> Iterator[Batch]:
        """Yields this rank's share of each of the `steps` global batches from `start` on."""
        size = self.spec.micro_size
        for position in self.spec.positions(start, steps):
            mine = range(self.rank, self.spec.micros_per_step, self.world_size)
            yield make_batch(
                self.spec,
                position,
                [self.spec.micro_at(position.epoch, position.row + j * size, j * size) for j in mine],
            )


def make_batch(spec: StreamSpec, position: Position, micros: list[dict[str, Any]]) -> Batch:
    """Returns one rank's micro-batches of the step at `position` as a `Batch`."""
    fingerprint = wrap64(sum(int(m["fingerprint"]) for m in micros))
    return Batch([to_tensors(m) for m in micros], position, spec.after(position), fingerprint)
