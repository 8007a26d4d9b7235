"""The stream of micro-batches split into tasks.

The micro-batches and their order are the same, and the cost of a task depends only on its part.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from conftest import MakeConfig

from myllm_ray.common.types import Position
from myllm_ray.data import plan as planning
from myllm_ray.data.prepare import prepare
from myllm_ray.data.stream import StreamSpec


@pytest.fixture
def spec(make_config: MakeConfig) -> StreamSpec:
    """Returns a stream of 14 documents per epoch; the last batch of an epoch is filled up."""
    return prepare(
        make_config("data.train.limit=14", "data.validation=null", "batch.global_size=4", "batch.micro_size=2")
    ).train


@pytest.mark.parametrize("start", [Position(), Position(2, 4), Position(1, 10**6)])
def test_parts_are_the_whole(spec: StreamSpec, start: Position) -> None:
    whole = [(p.epoch, p.row + j * 2) for p in spec.positions(start, 23) for j in range(2)]
    assert len({epoch for epoch, _ in whole}) > 3
    for size in (1, 3, 16, 100):
        parts = [list(spec.places(start, first, min(size, 46 - first))) for first in range(0, 46, size)]
        assert [place for part in parts for place in part] == whole, size
    for steps in range(23):
        assert spec.advance(start, steps) == list(spec.positions(start, steps + 1))[-1]


def test_a_part_plans_no_epoch_beyond_it(spec: StreamSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    monkeypatch.setattr(
        spec.plan, "_open", lambda epoch: planned.append(epoch) or planning.RowPlan._open_epoch(spec.plan, epoch)
    )
    spec.plan._row_counts.clear()
    list(spec.places(Position(7, 0), 0, 16))
    assert planned
    assert set(planned) <= set(range(7, 15))


def test_the_start_of_a_long_run_plans_nothing(spec: StreamSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 steps of 4 rows, with 14 rows per epoch, are 25,000 epochs or more."""
    from ray.data import DataContext

    from myllm_ray.orchestration import ray_data

    given: list[Any] = []

    class Dataset:
        def map_batches(self, *_: Any, **__: Any) -> Dataset:
            return self

    monkeypatch.setattr(ray_data.ray.data, "from_arrow", lambda tables: given.extend(tables) or Dataset())
    monkeypatch.setattr(DataContext.get_current(), "target_max_block_size", 1)
    monkeypatch.setattr(StreamSpec, "steps_in_epoch", lambda *_: pytest.fail("an epoch was planned"))
    ray_data.build_dataset(spec, Position(3, 4), 100_000)
    assert len(given) <= ray_data._MOST_TASKS
    rows = [table.to_pylist()[0] for table in given]
    assert sum(row["micros"] for row in rows) == 200_000
    assert all(a["first"] + a["micros"] == b["first"] for a, b in itertools.pairwise(rows))


def test_many_epochs_of_few_documents_leave_no_files(spec: StreamSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(spec.plan.store.folder.rglob("*"))
    in_memory = [spec.plan.rows(epoch, 0, 99) for epoch in range(50)]
    assert sorted(spec.plan.store.folder.rglob("*")) == before
    monkeypatch.setattr(planning, "_SMALL", 0)
    from_files = planning.RowPlan(spec.plan.store, spec.plan.order, spec.plan.packing)
    assert [from_files.rows(epoch, 0, 99) for epoch in range(50)] == in_memory
    assert from_files.folder(49).is_dir()
