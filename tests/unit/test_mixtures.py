"""Mixtures by share: the source of every row, and the sequence of rows."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planned import MadeUpStore, reference_round

from myllm_ray.config.errors import DataError
from myllm_ray.data import mixture as mixing
from myllm_ray.data import order as order_of_documents
from myllm_ray.data import packing as packing_rows
from myllm_ray.data import plan as planning
from myllm_ray.data.mixture import UNIT, Mixture, Stage, choose
from myllm_ray.data.order import Order, documents
from myllm_ray.data.packing import Row
from myllm_ray.data.plan import Packing, RowPlan

SHARES = st.lists(st.integers(0, 1000), min_size=1, max_size=7).filter(any)
PACKINGS = [
    Packing("continuous", 64, "split"),
    Packing("best_fit", 64),
    Packing("best_fit", 64, "split"),
    Packing("none", 64),
    Packing("none", 64, "split"),
    Packing("record", 64),
]
COUNTS = [600, 1, 7, 900]
STAGES = (Stage(300, (UNIT // 2, UNIT // 10, UNIT // 5, UNIT // 5)), Stage(None, (0, 0, UNIT // 4, UNIT - UNIT // 4)))


@given(SHARES, st.integers(1, 300))
def test_rows_of_one_length_differ_by_less_than_one_row(shares: list[int], count: int) -> None:
    """After n rows, a source has share · n rows, rounded up or down."""
    owed = [0] * len(shares)
    found = choose(shares, [[5] * count] * len(shares), owed, count)
    assert len(found) == count
    for n in range(1, count + 1):
        for source, share in enumerate(shares):
            exact = Fraction(share * n, sum(shares))
            assert exact.__floor__() <= found[:n].count(source) <= exact.__ceil__()


@given(SHARES, st.integers(0, 2**32), st.sampled_from([2, 30, 1000]))
def test_rows_of_any_length_differ_by_at_most_one_row(shares: list[int], seed: int, longest: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [rng.integers(1, rng.integers(2, longest + 1), 200).tolist() for _ in shares]
    owed, total = [0] * len(shares), sum(shares)
    found = choose(shares, sizes, owed, 200)
    left, given = [iter(values) for values in sizes], [0] * len(shares)
    for source in found:
        given[source] += next(left[source])
        for other, share in enumerate(shares):
            apart = total * given[other] - share * sum(given)
            assert -total * max(map(max, sizes)) <= apart <= (total - share) * max(sizes[other])
    assert owed == [share * sum(given) - total * mine for share, mine in zip(shares, given, strict=True)]


@given(SHARES, st.lists(st.integers(1, 50), min_size=1))
def test_the_choice_does_not_depend_on_its_parts(shares: list[int], parts: list[int]) -> None:
    sizes = [[1 + (7 * n + source) % 13 for n in range(sum(parts))] for source in range(len(shares))]
    whole = choose(shares, sizes, [0] * len(shares), sum(parts))
    owed, found = [0] * len(shares), list[int]()
    for part in parts:
        rest = [values[found.count(source) :] for source, values in enumerate(sizes)]
        found += choose(shares, rest, owed, part)
    assert found == whole[: len(found)]


def reference(plan: RowPlan, count: int, flush_rows: int) -> Iterator[Row]:
    """Yields the rows of a mixture one at a time, with fractions."""
    mixture, names = plan.order.mixture, range(len(plan.store.sources))
    assert mixture is not None

    def endless(source: int) -> Iterator[Row]:
        for number in itertools.count():
            yield from reference_round(plan, source, number, plan._passes(source), flush_rows)

    def size(row: Row) -> int:
        return 1 if plan.packing.kind == "record" else sum(s.length for s in row)

    rows = [endless(source) for source in names]
    heads: dict[int, Row] = {}
    begin, stages = 0, list(mixture.stages)
    given = [0] * len(rows)
    for n in range(count):
        if stages[0].until == n:
            begin, given = n, [0] * len(rows)
            stages.pop(0)
        shares = [Fraction(share, UNIT) for share in stages[0].shares]
        total, ends = sum(given), {}
        for source in names:
            if shares[source]:
                if source not in heads:
                    heads[source] = next(rows[source])
                if given[source] <= shares[source] * total:
                    ends[source] = (given[source] + size(heads[source])) / shares[source]
        chosen = min(ends, key=lambda source: (ends[source], source))
        row = heads.pop(chosen)
        given[chosen] += size(row)
        yield row
    assert begin in (0, 300)


@pytest.mark.parametrize("shuffle", ["full", "window", "none", "formula"])
@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: f"{packing.kind}-{packing.overflow}")
def test_the_sequence_is_that_of_one_row_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: Packing, shuffle: str
) -> None:
    """It depends neither on pieces and files, nor on where it is cut into epochs, nor on where it is opened."""
    monkeypatch.setattr(planning, "_ROUND_ROWS", 20)
    monkeypatch.setattr(planning, "_FLUSH_ROWS", 64)
    monkeypatch.setattr(planning, "_LEAST_FLUSH_ROWS", 16)
    order = Order(
        3,
        shuffle.replace("formula", "full"),
        100,
        held_out=0.1,
        by_formula=shuffle == "formula",
        mixture=Mixture(STAGES, 700),
    )
    expected = list(reference(RowPlan(MadeUpStore(tmp_path, COUNTS, 50), order, packing), 700, 16))
    for small, piece, most, rows in ((10**6, 32768, 65536, 700), (0, 100, 65536, 128), (0, 1000, 7, 96)):
        monkeypatch.setattr(planning, "_SMALL", small)
        monkeypatch.setattr(planning, "_PIECE", piece)
        monkeypatch.setattr(mixing, "_MOST_ROWS", most)
        cut = Order(**{**vars(order), "mixture": Mixture(STAGES, rows)})
        store = MadeUpStore(tmp_path / f"{rows}", COUNTS, 50)
        plan = RowPlan(store, cut, packing)
        assert plan.rows_in_epoch(3) == rows
        found = [row for epoch in range(700 // rows) for row in plan.rows(epoch, 0, rows)]
        assert found == expected[: len(found)]
        for epoch in range(700 // rows):
            for name in ("kept", "other"):  # the earlier epochs are in files, or not
                opened = RowPlan(
                    MadeUpStore(store.folder if name == "kept" else tmp_path / f"{rows}-{epoch}", COUNTS, 50),
                    cut,
                    packing,
                )
                assert opened.rows(epoch, 5, 9) == expected[epoch * rows + 5 : epoch * rows + 9]
                assert opened.segments(epoch)[1][-1] == len(opened.segments(epoch)[0])


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: f"{packing.kind}-{packing.overflow}")
@pytest.mark.parametrize("by_formula", [False, True])
def test_every_round_has_every_document_once_per_pass(tmp_path: Path, packing: Packing, by_formula: bool) -> None:
    order = Order(0, held_out=0.1, by_formula=by_formula, mixture=Mixture(STAGES, 4096))
    plan = RowPlan(MadeUpStore(tmp_path, COUNTS, 50), order, packing)
    validation = Order(0, "none", held_out=0.1, validation=True, by_formula=by_formula)
    held = {int(d) for part in documents(plan.store, validation, 0) for d in part}
    for source in range(len(COUNTS)):
        passes, orders = plan._passes(source), []
        for number in range(2):
            segments = np.concatenate([rows.segments for rows in plan._rows_of_source(source, number)])
            begun = segments[segments[:, 1] == 0, 0]
            expected = sorted([d for d in plan.store.documents_of(source) if d not in held] * passes)
            assert sorted(begun.tolist()) == expected
            orders.append(begun.tolist())
        assert len(set(orders[0])) < 7 or orders[0] != orders[1]


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: f"{packing.kind}-{packing.overflow}")
def test_the_tokens_of_a_plan_are_those_of_the_shares(tmp_path: Path, packing: Packing) -> None:
    plan = RowPlan(MadeUpStore(tmp_path, COUNTS, 50), Order(1, mixture=Mixture(STAGES, 1000)), packing)
    rows = plan.rows(0, 0, 1000)
    for begin, stage, end in ((0, STAGES[0], 300), (300, STAGES[1], 1000)):
        given = np.zeros(len(COUNTS), np.int64)
        for row in rows[begin:end]:
            size = 1 if packing.kind == "record" else sum(s.length for s in row)
            sources = {int(plan.store.source_of(np.asarray(s.document))) for s in row}
            assert len(sources) == 1
            given[sources.pop()] += size
            exact = given.sum() * np.asarray(stage.shares) / UNIT
            assert (abs(given - exact) <= (1 if packing.kind == "record" else 64)).all()


@pytest.mark.parametrize("kind", ["continuous", "best_fit", "none", "record"])
def test_the_memory_of_planning_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    small = [(planning, "_PIECE"), (planning, "_FLUSH_ROWS"), (planning, "_LEAST_FLUSH_ROWS"), (mixing, "_MOST_ROWS")]
    for module, name in (*small, (packing_rows, "_PIECE"), (order_of_documents, "_PIECE")):
        monkeypatch.setattr(module, name, 512)
    peaks = []
    for count in (10_000, 50_000):
        store, stage = MadeUpStore(tmp_path, [count, count // 10], 700), Stage(None, (UNIT // 2, UNIT // 2))
        order = Order(0, "full", by_formula=True, mixture=Mixture((stage,), count))
        tracemalloc.start()
        RowPlan(store, order, Packing(kind, 2048)).segments(0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_a_source_without_documents_is_an_error(tmp_path: Path) -> None:
    store = MadeUpStore(tmp_path, [50, 1], 20)
    order = Order(0, held_out=0.9, mixture=Mixture((Stage(None, (UNIT // 2, UNIT // 2)),), 64))
    with pytest.raises(DataError, match="'source-1' has no documents for training"):
        RowPlan(store, order, Packing("best_fit", 64)).segments(0)
