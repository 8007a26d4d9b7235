"""Runs the functions of `data/` in Ray Data: tokenization, and micro-batches in order for every worker.

One Arrow row is one micro-batch, and one block contains one row. Ray's splitter distributes blocks evenly and in order,
so worker r of W receives the micro-batches r, r + W, ..., the same ones that `LocalStream` reads there. Every
micro-batch contains its position, and the stream raises an error if one is out of order.

The module does not import torch: Ray's actors that hold a dataset import it, and each would spend seconds on that.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset, ExecutionOptions

from myllm_ray.common.tracebacks import describe
from myllm_ray.common.types import Batch, Position
from myllm_ray.config.errors import DataError, TrainingError, UserError
from myllm_ray.data.cache import DataCache
from myllm_ray.data.collate import to_arrow
from myllm_ray.data.plan import RowPlan
from myllm_ray.data.shard_tasks import ShardTask
from myllm_ray.data.store import opened_store
from myllm_ray.data.stream import StreamSpec, make_batch
from myllm_ray.orchestration.failures import RemoteError

_LOCAL_SECONDS = 10.0
"""Time for which the driver prepares data itself. The processes of Ray Data take about as long to start."""
_MICROS_PER_TASK = 16
_MOST_TASKS = 4096
_PREFETCH = 8
_PARTS = pa.schema([("first", pa.int64()), ("micros", pa.int64())])
"""Input of one task: it builds `micros` micro-batches, starting with number `first` of the stream. The task computes
their epochs itself, so the cost of a start does not depend on the number of epochs."""


def map_units(work: Callable[[ShardTask], pa.RecordBatch], tasks: list[ShardTask]) -> Iterator[pa.RecordBatch]:
    """Applies `work` to each task of the preparation and yields the results in order.

    The driver does tasks for `_LOCAL_SECONDS`. The others are done in tasks of Ray across the cluster. The result does
    not depend on where a task is done: it writes its tokens itself and returns their index.

    Raises:
        DataError: `work` has raised a `UserError`.
        RemoteError: `work` has raised another error.
    """
    until = time.monotonic() + _LOCAL_SECONDS
    for done, task in enumerate(tasks):
        if time.monotonic() > until:
            yield from _map_on_cluster(work, tasks[done:])
            return
        yield _result(*_attempt(work, task))


def _attempt(
    work: Callable[[ShardTask], pa.RecordBatch], task: ShardTask
) -> tuple[pa.RecordBatch | None, str | None, str | None]:
    """Returns the batch of a task; or the problem as one line, and the traceback if it is not a `UserError`."""
    try:
        return work(task), None, None
    except UserError as error:
        return None, str(error), None
    except Exception as error:  # in a user-defined format
        return None, describe(error), "".join(traceback.format_exception(error))


def _result(batch: pa.RecordBatch | None, problem: str | None, trace: str | None) -> pa.RecordBatch:
    """Returns the batch, or raises the error that `_attempt` describes."""
    if problem is not None:
        raise DataError(problem) if trace is None else RemoteError(problem, trace)
    return batch


def _map_on_cluster(work: Callable[[ShardTask], pa.RecordBatch], tasks: list[ShardTask]) -> Iterator[pa.RecordBatch]:
    _quiet()
    size = -(-len(tasks) // _MOST_TASKS)
    dataset = ray.data.from_arrow(
        [pa.table({"number": list(range(a, min(a + size, len(tasks))))}) for a in range(0, len(tasks), size)]
    )

    def tokenize(table: pa.Table) -> Iterator[pa.Table]:
        for number in table.column("number").to_pylist():
            # Errors in the data are returned as values. Ray would log an exception of a task with its whole stack.
            batch, problem, trace = _attempt(work, tasks[number])
            yield pa.table(
                {
                    "batch": pa.array([None if batch is None else _to_bytes(batch)], pa.large_binary()),
                    "problem": pa.array([problem], pa.string()),
                    "traceback": pa.array([trace], pa.string()),
                }
            )

    results: Iterable[Any] = dataset.map_batches(tokenize, batch_format="pyarrow", batch_size=None).iter_batches(
        batch_format="pyarrow", batch_size=1, prefetch_batches=2
    )
    for table in results:
        problem, trace = table.column("problem")[0].as_py(), table.column("traceback")[0].as_py()
        data = table.column("batch")[0]
        batch = pa.ipc.open_stream(data.as_buffer()).read_next_batch() if problem is None else None
        yield _result(batch, problem, trace)


def _to_bytes(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def execution_options() -> ExecutionOptions:
    """Returns execution options that keep the order of blocks, so the stream is the same at every world size."""
    return ExecutionOptions(preserve_order=True)


def build_dataset(spec: StreamSpec, start: Position, steps: int) -> Dataset:
    """Builds the dataset of the micro-batches of `steps` global batches, in order, across epochs.

    Args:
        spec: the stream.
        start: position of the first global batch.
        steps: number of global batches.

    Returns:
        A dataset in which each micro-batch is a block of one row.
    """
    _quiet()
    DataContext.get_current().target_max_block_size = 1  # bytes: no two micro-batches share a block
    # The number of tasks is limited: each one costs scheduling time and a block in the object store.
    micros = steps * spec.micros_per_step
    size = max(_MICROS_PER_TASK, -(-micros // _MOST_TASKS))
    parts = [{"first": first, "micros": min(size, micros - first)} for first in range(0, micros, size)]
    tables = [pa.Table.from_pylist([part], _PARTS) for part in parts] or [_PARTS.empty_table()]
    # Tasks receive the arguments of the stream instead of the stream itself, and open the store from its folder.
    key = (
        str(spec.plan.store.folder),
        spec.plan.store.cache,
        spec.plan.order,
        spec.plan.packing,
        spec.global_size,
        spec.micro_size,
        spec.pad_id,
    )

    def build(table: pa.Table) -> Iterator[pa.Table]:
        local = _spec(*key)
        for part in table.to_pylist():
            places = local.places(start, part["first"], part["micros"])
            for number, (epoch, row) in enumerate(places, part["first"]):
                place = number % local.micros_per_step * local.micro_size
                yield to_arrow(local.micro_at(epoch, row, place), epoch, row)

    return ray.data.from_arrow(tables).map_batches(build, batch_format="pyarrow", batch_size=None)


@lru_cache(maxsize=4)
def _spec(
    folder: str, cache: DataCache, order: Any, packing: Any, global_size: int, micro_size: int, pad_id: int
) -> StreamSpec:
    """Opens the stream in a task, once per process: Ray reuses processes for many tasks."""
    return StreamSpec(RowPlan(opened_store(folder, cache), order, packing), global_size, micro_size, pad_id)


def _quiet() -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options = execution_options()


class RayStream:
    """Batch stream of one worker that reads from its shard of a Ray dataset.

    Args:
        spec: the stream.
        shard: this worker's shard of the dataset of `build_dataset`.
    """

    def __init__(self, spec: StreamSpec, shard: Any):
        self.spec, self._shard = spec, shard
        self.sources, self.describe = spec.plan.store.sources, spec.describe

    def steps_in_epoch(self, epoch: int) -> int:
        return self.spec.steps_in_epoch(epoch)

    def batches(self, start: Position, steps: int) -> Iterator[Batch]:
        """Yields this rank's share of `steps` global batches, starting at `start`.

        Raises:
            TrainingError: Ray Data returned another micro-batch than the expected one.
        """
        if steps <= 0:
            return
        from myllm_ray.common import distributed

        rows = self._rows()
        size, world, rank = self.spec.micro_size, distributed.world_size(), distributed.rank()
        for position in self.spec.positions(start, steps):
            micros = []
            # Micro-batches are assigned to ranks as in `LocalStream`. Without this check, a block that arrives out of
            # order would silently change the training.
            for j in range(rank, self.spec.micros_per_step, world):
                micro = next(rows, None)
                expected = (position.epoch, position.row + j * size)
                found = None if micro is None else (micro["epoch"], micro["row"])
                if micro is None or found != expected:
                    raise TrainingError(
                        f"the data stream is out of order on rank {rank}: expected (epoch, row) {expected}, "
                        f"got {found}; please report this with your Ray version"
                    )
                micros.append(micro)
            yield make_batch(self.spec, position, micros)

    def _rows(self) -> Iterator[dict[str, Any]]:
        tables: Iterable[pa.Table] = self._shard.iter_batches(
            batch_size=1, batch_format="pyarrow", prefetch_batches=_PREFETCH
        )
        for table in tables:
            row: dict[str, Any] = {}
            for name in table.column_names:
                value = table.column(name)[0]
                row[name] = (
                    value.values.to_numpy() if isinstance(value, (pa.ListScalar, pa.LargeListScalar)) else value.as_py()
                )
            yield row
