"""Documents to rows: packing and splitting, and the plan of an epoch."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeConfig
from hypothesis import given
from hypothesis import strategies as st
from planned import MadeUpStore, reference_best_fit, reference_continuous, reference_fit, reference_rows

from myllm_ray.config.errors import CheckpointError, DataError
from myllm_ray.data import order
from myllm_ray.data import packing as packing_rows
from myllm_ray.data import plan as planning
from myllm_ray.data.order import Order, documents
from myllm_ray.data.packing import Documents, Row, Rows, Segment, best_fit, continuous, fit, one_per_row, regrouped
from myllm_ray.data.permutation import Permutation
from myllm_ray.data.plan import Packing, RowPlan
from myllm_ray.data.prepare import prepare
from myllm_ray.engine.checkpointing.manager import CheckpointManager
from myllm_ray.engine.run_folder import check_same_run

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=80)
SIZE, PIECE = st.integers(4, 32), st.integers(1, 20)


def pieces(lengths: list[int], size: int) -> Iterator[Documents]:
    """Yields documents in pieces of `size`."""
    for first in range(0, len(lengths), size):
        part = np.asarray(lengths[first : first + size], np.int64)
        yield np.arange(first, first + len(part)), part


def as_rows(parts: Iterable[Rows]) -> list[Row]:
    """Returns rows as lists of segments."""
    found: list[Row] = []
    for part in parts:
        assert part.segments.dtype == part.counts.dtype == np.int64
        assert part.counts.sum() == len(part.segments)
        for segments in np.split(part.segments, np.cumsum(part.counts)[:-1]) if len(part.counts) else []:
            found.append([Segment(*map(int, s)) for s in segments])
    return found


@given(LENGTHS, SIZE, st.integers(1, 8), PIECE, st.sampled_from(["truncate", "split"]))
def test_best_fit_is_that_of_one_document_at_a_time(
    lengths: list[int], size: int, open_rows: int, piece: int, overflow: str
) -> None:
    rows = as_rows(best_fit(fit(pieces(lengths, piece), size, overflow), size, open_rows))
    assert rows == list(reference_best_fit(reference_fit(enumerate(lengths), size, overflow), size, open_rows))
    if overflow == "truncate":
        placed = sorted(s for row in rows for s in row)
        assert placed == [Segment(i, 0, min(n, size)) for i, n in enumerate(lengths)]
    assert all(sum(s.length for s in row) <= size for row in rows)


@given(LENGTHS, SIZE, PIECE)
def test_continuous_keeps_every_token_in_order(lengths: list[int], size: int, piece: int) -> None:
    rows = as_rows(continuous(pieces(lengths, piece), size))
    assert rows == list(reference_continuous(enumerate(lengths), size))
    tokens = [(s.document, s.start + i) for row in rows for s in row for i in range(s.length)]
    assert tokens == [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    assert all(sum(s.length for s in row) == size for row in rows[:-1])


@given(LENGTHS, SIZE, PIECE, st.sampled_from(["truncate", "split"]))
def test_one_segment_per_row(lengths: list[int], size: int, piece: int, overflow: str) -> None:
    rows = as_rows(one_per_row(fit(pieces(lengths, piece), size, overflow)))
    assert rows == [[s] for s in reference_fit(enumerate(lengths), size, overflow)]


@given(LENGTHS, SIZE, PIECE, st.integers(1, 9))
def test_regrouped_rows_are_the_same(lengths: list[int], size: int, piece: int, group: int) -> None:
    parts = list(regrouped(continuous(pieces(lengths, piece), size), group))
    assert as_rows(parts) == list(reference_continuous(enumerate(lengths), size))
    assert all(len(part.counts) == group for part in parts[:-1])
    assert all(0 < len(part.counts) <= group for part in parts)


def test_best_fit_over_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(1, 600, 3000).tolist()
    expected = list(reference_best_fit(reference_fit(enumerate(lengths), 512, "truncate"), 512))
    for piece in (1, 7, 1000):
        monkeypatch.setattr(packing_rows, "_PIECE", piece)
        assert as_rows(best_fit(fit(pieces(lengths, 900), 512, "truncate"), 512)) == expected, piece


def test_overflow_error_names_the_document() -> None:
    with pytest.raises(DataError, match=r"document 1 has 9 tokens.*sequence_length=8"):
        list(fit(pieces([8, 9, 10], 2), 8, "error"))


@pytest.mark.parametrize("shuffle", ["full", "window", "none"])
@pytest.mark.parametrize(
    "packing",
    [
        Packing("continuous", 64, "split"),
        Packing("best_fit", 64),
        Packing("best_fit", 64, "split"),
        Packing("none", 64),
        Packing("none", 64, "split"),
        Packing("record", 64),
    ],
    ids=lambda packing: f"{packing.kind}-{packing.overflow}",
)
def test_a_plan_is_that_of_one_document_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: Packing, shuffle: str
) -> None:
    """The rows depend neither on the sizes of the pieces nor on whether the plan is in memory or in files."""
    store = MadeUpStore(tmp_path, [2500, 1, 1700], 50)
    chosen = Order(3, shuffle, 300, (1.0, 2.0, 0.5), 0.1)
    for validation in (False, True):
        plan = RowPlan(store, dataclasses.replace(chosen, validation=validation), packing)
        monkeypatch.setattr(planning, "_FLUSH_ROWS", 128)
        expected = [reference_rows(plan, epoch, 128) for epoch in (0, 1)]
        for small, piece, segments in ((10**6, 32768, 2**18), (0, 100, 2**18), (0, 1000, 7)):
            monkeypatch.setattr(planning, "_SMALL", small)
            monkeypatch.setattr(planning, "_PIECE", piece)
            monkeypatch.setattr(planning, "_MOST_SEGMENTS", segments)
            opened = RowPlan(MadeUpStore(tmp_path / f"{piece}-{segments}", [2500, 1, 1700], 50), plan.order, packing)
            for epoch in (0, 1):
                count = opened.rows_in_epoch(epoch)
                assert count == len(expected[epoch])
                assert opened.rows(epoch, 0, count + 2) == [*expected[epoch], [], []]
                assert opened.rows(epoch, count - 3, count) == expected[epoch][-3:]  # a resumed run


@pytest.mark.parametrize("count", [1, 2, 3, 10, 16, 17, 1000, 65537])
def test_a_permutation_by_formula_has_every_number_once(count: int) -> None:
    places = np.arange(count)
    numbers = Permutation(count, "test", 1)(places)
    assert sorted(numbers.tolist()) == list(range(count))
    assert (Permutation(count, "test", 1)(places[::-1]) == numbers[::-1]).all(), "a number depends on its place only"
    if count > 10:
        assert (Permutation(count, "test", 2)(places) != numbers).any()


def test_permutations_by_formula_are_uniform() -> None:
    """Every number is as likely as any other at each place, and after each number."""
    places, pairs = np.zeros((20, 20)), np.zeros((20, 20))
    for seed in range(4000):
        order = Permutation(20, "test", seed)(np.arange(20))
        places[np.arange(20), order] += 1
        pairs[order[:-1], order[1:]] += 1
    assert ((places - 200) ** 2 / 200).sum() / 380 < 1.2
    assert (np.diag(pairs) == 0).all()
    off = pairs[~np.eye(20, dtype=bool)]
    assert ((off - 200) ** 2 / 200).sum() / 380 < 1.2


def test_a_large_permutation_by_formula() -> None:
    count = 2**40 + 3
    numbers = Permutation(count, "test")(np.arange(5000))
    assert len(set(numbers.tolist())) == 5000
    assert numbers.min() >= 0
    assert numbers.max() < count
    assert abs(numbers.mean() / count - 0.5) < 0.02
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.05
    with pytest.raises(ValueError, match=r"2\*\*62"):
        Permutation(2**63)


@pytest.mark.parametrize("counts", [[2000, 1, 1500], [3, 2], [1]])
def test_the_order_by_formula_has_the_documents_of_the_epoch(tmp_path: Path, counts: list[int]) -> None:
    store, weights = MadeUpStore(tmp_path, counts, 10), (2.0, 1.5, 0.5)[: len(counts)]
    for held_out in (0.0, 0.1):
        chosen = Order(5, "full", weights=weights, held_out=held_out, by_formula=True)
        validation = Order(5, "none", held_out=held_out, validation=True, by_formula=True)
        held = set(np.concatenate([np.empty(0, int), *documents(store, validation, 0)]).tolist()) if held_out else set()
        epochs = []
        for epoch in (0, 1):
            found = np.concatenate([np.empty(0, int), *documents(store, chosen, epoch)])
            assert not held & set(found.tolist())
            for source, weight in enumerate(weights):
                numbers = store.documents_of(source)
                mine = np.bincount(found[np.isin(found, numbers)] - numbers.start, minlength=len(numbers))
                kept = [number - numbers.start for number in numbers if number not in held]
                expected = max(1 if len(numbers) > 1 else 0, round(held_out * len(numbers))) if held_out else 0
                assert len(numbers) - len(kept) == expected
                assert mine.sum() == int(weight) * len(kept) + round(weight % 1 * len(kept))
                assert all(int(weight) <= mine[number] <= np.ceil(weight) for number in kept)
            epochs.append(found.tolist())
        assert len(epochs[0]) < 10 or epochs[0] != epochs[1]


def test_the_key_of_existing_plans_does_not_change(tmp_path: Path) -> None:
    """A run that resumes compares it."""
    store = MadeUpStore(tmp_path, [100], 10)
    assert RowPlan(store, Order(), Packing("best_fit", 64)).key == "bb66f3d5e4aead94"
    assert RowPlan(store, Order(by_formula=True), Packing("best_fit", 64)).key != "bb66f3d5e4aead94"


def test_large_epochs_are_shuffled_by_formula(make_config: MakeConfig) -> None:
    """The documents and the held-out share are complete, and a run does not resume with another order."""
    plans = {}
    for limit in (48, 47):
        prepared = prepare(make_config(f"data.shuffle_in_memory={limit}"))
        plans[limit] = prepared.train.plan
        assert prepared.validation is not None
        assert prepared.train.plan.order.by_formula == prepared.validation.plan.order.by_formula == (limit == 47)
        held = {s.document for row in prepared.validation.plan.rows(0, 0, 100) for s in row}
        for epoch in (0, 1):
            rows = prepared.train.plan.rows(epoch, 0, prepared.train.plan.rows_in_epoch(epoch))
            assert sorted([*held, *(s.document for row in rows for s in row)]) == list(range(48))
        assert len(held) == 5
    assert plans[48].key != plans[47].key
    assert plans[48].key == prepare(make_config("data.shuffle_in_memory=1000")).train.plan.key
    assert plans[48].key == prepare(make_config("data.shuffle_in_memory=null")).train.plan.key
    assert not prepare(make_config("data.shuffle=window", "data.shuffle_in_memory=0")).train.plan.order.by_formula


def test_a_run_does_not_resume_with_the_other_order(make_config: MakeConfig, tmp_path: Path) -> None:
    """A run of a version without the key resumes with null, even if its epochs are above the limit."""
    config = make_config("data.shuffle_in_memory=null")
    saved = config.model_dump(mode="json")
    del saved["data"]["shuffle_in_memory"]
    content = {"position": {"epoch": 0, "row": 8}, "config": saved, "identity": prepare(config).identity}
    checkpoint = CheckpointManager(folder=tmp_path / "checkpoints").save(1, {"model.w": torch.ones(3)}, content)
    check_same_run(checkpoint, config, prepare(config).identity)
    above = make_config("data.shuffle_in_memory=10")
    with pytest.raises(CheckpointError, match=r"order or packing.*data.shuffle_in_memory was None, now it is 10"):
        check_same_run(checkpoint, above, prepare(above).identity)


@pytest.mark.parametrize("kind", ["continuous", "best_fit", "none", "record"])
def test_the_memory_of_planning_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    for module, name in ((planning, "_PIECE"), (planning, "_FLUSH_ROWS"), (packing_rows, "_PIECE"), (order, "_PIECE")):
        monkeypatch.setattr(module, name, 512)
    peaks = []
    for count in (20_000, 100_000):
        plan = RowPlan(MadeUpStore(tmp_path, [count], 700), Order(0, "full", by_formula=True), Packing(kind, 2048))
        tracemalloc.start()
        plan.rows_in_epoch(0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
