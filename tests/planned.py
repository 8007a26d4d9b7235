"""Token stores without tokens, whose lengths follow from the document numbers, and a reference of the plan."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from myllm_ray.common.seeds import generator
from myllm_ray.data.order import documents
from myllm_ray.data.packing import Row, Segment
from myllm_ray.data.plan import RowPlan
from myllm_ray.data.store import TokenStore


class MadeUpStore(TokenStore):
    """A store whose documents have lengths between 1 and about twice the mean, a function of their numbers.

    Args:
        folder: folder of the plans.
        counts: number of documents of each source.
        mean: mean length in tokens.
    """

    def __init__(self, folder: Path, counts: list[int], mean: int):
        self.folder, self.mean = folder, mean
        self.sources = [f"source-{i}" for i in range(len(counts))]
        self._first = np.cumsum([0, *counts])
        tokens = [int(self.lengths(np.asarray(self.documents_of(i))).sum()) for i in range(len(counts))]
        self.meta = {
            "content_hash": f"{counts} {mean}",
            "sources": [{"kind": "tokens", "tokens": count} for count in tokens],
        }

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        mixed = documents.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
        found: np.ndarray = 1 + (mixed % np.uint64(2 * self.mean - 1)).astype(np.int64)
        return found


def reference_rows(plan: RowPlan, epoch: int, flush_rows: int) -> list[Row]:
    """Returns the rows of an epoch, computed one document at a time."""
    numbers = [int(d) for part in documents(plan.store, plan.order, epoch) for d in part]
    return reference_rows_of(plan, numbers, flush_rows, epoch)


def reference_round(plan: RowPlan, source: int, round: int, passes: int, flush_rows: int) -> list[Row]:
    """Returns the rows of a round of `passes` passes over a source of a mixture, computed one document at a time."""
    numbers = [
        int(d)
        for number in range(round * passes, (round + 1) * passes)
        for part in documents(plan.store, plan.order, number, source)
        for d in part
    ]
    return reference_rows_of(plan, numbers, flush_rows, round, source)


def reference_rows_of(plan: RowPlan, numbers: list[int], flush_rows: int, *seed: int) -> list[Row]:
    """Returns the rows of documents, computed one document at a time."""
    lengths = [int(n) for n in plan.store.lengths(np.asarray(numbers, np.int64))]
    pairs, size = list(zip(numbers, lengths, strict=True)), plan.packing.size
    if plan.packing.kind == "continuous":
        rows = list(reference_continuous(pairs, size))
    elif plan.packing.kind == "record":
        rows = [[Segment(document, 0, length)] for document, length in pairs]
    elif plan.packing.kind == "best_fit":
        rows = list(reference_best_fit(reference_fit(pairs, size, plan.packing.overflow), size))
    else:
        rows = [[segment] for segment in reference_fit(pairs, size, plan.packing.overflow)]
    if plan.order.shuffle == "none":
        return rows
    found: list[Row] = []
    for number, first in enumerate(range(0, len(rows), flush_rows)):
        piece = rows[first : first + flush_rows]
        found += [piece[i] for i in generator("rows", plan.order.seed, *seed, number).permutation(len(piece))]
    return found


def reference_fit(documents: Iterable[tuple[int, int]], size: int, overflow: str) -> Iterator[Segment]:
    """Yields the segments of documents."""
    for document, length in documents:
        if overflow == "split":
            for start in range(0, length, size):
                yield Segment(document, start, min(size, length - start))
        else:
            yield Segment(document, 0, min(length, size))


def reference_best_fit(segments: Iterable[Segment], size: int, open_rows: int = 256) -> Iterator[Row]:
    """Yields the rows of best-fit packing."""
    spaces: list[tuple[int, int]] = []  # (free tokens, row number), sorted
    rows: dict[int, Row] = {}
    number = 0
    for segment in segments:
        at = bisect_left(spaces, (segment.length, -1))
        if at < len(spaces):
            free, row = spaces.pop(at)
        else:
            free, row = size, number
            rows[row] = []
            number += 1
        rows[row].append(segment)
        free -= segment.length
        if free == 0:
            yield rows.pop(row)
            continue
        insort(spaces, (free, row))
        if len(spaces) > open_rows:
            yield rows.pop(spaces.pop(0)[1])
    yield from rows.values()


def reference_continuous(documents: Iterable[tuple[int, int]], size: int) -> Iterator[Row]:
    """Yields the rows of concatenated documents."""
    row: Row = []
    free = size
    for document, length in documents:
        start = 0
        while start < length:
            take = min(free, length - start)
            row.append(Segment(document, start, take))
            start += take
            free -= take
            if free == 0:
                yield row
                row, free = [], size
    if row:
        yield row
