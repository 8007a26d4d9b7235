"""Packing: from the lengths of documents to rows of segments. Pure functions; no token is looked at."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from myllm_ray.config.errors import DataError

OPEN_ROWS = 256
"""Rows that best-fit keeps open at a time: bounds memory and how far a document moves from its place in the order."""


class Segment(NamedTuple):
    """`length` tokens of a document, from `start` on."""

    document: int
    start: int
    length: int


Row = list[Segment]


def fit(documents: Iterable[tuple[int, int]], size: int, overflow: str) -> Iterator[Segment]:
    """(document, length) -> segments of at most `size` tokens: truncated, split, or refused, as `overflow` says.

    Raises:
        DataError: a document is longer than `size` and `overflow` is "error".
    """
    for document, length in documents:
        if length > size and overflow == "error":
            raise DataError(f"document {document} has {length} tokens, more than data.sequence_length={size}: "
                            "make rows longer, or set data.overflow to truncate or split")
        if overflow == "split":
            for start in range(0, length, size):
                yield Segment(document, start, min(size, length - start))
        else:
            yield Segment(document, 0, min(length, size))


def one_per_row(segments: Iterable[Segment]) -> Iterator[Row]:
    """No packing: each segment has a row for itself."""
    for segment in segments:
        yield [segment]


def best_fit(segments: Iterable[Segment], size: int, open_rows: int = OPEN_ROWS) -> Iterator[Row]:
    """Best-fit packing: each segment goes whole into the fullest open row that still has room for it.

    At most `open_rows` rows are open; a full row is given out at once, and when one more is needed the fullest is closed.
    (Online best fit; Ding et al., "Fewer Truncations Improve Language Modeling", 2024, use its offline form.)
    """
    rooms: list[tuple[int, int]] = []  # (free tokens, number of the row), sorted
    rows: dict[int, Row] = {}
    number = 0
    for segment in segments:
        at = bisect_left(rooms, (segment.length, -1))
        if at < len(rooms):
            free, row = rooms.pop(at)
        else:
            free, row = size, number
            rows[row] = []
            number += 1
        rows[row].append(segment)
        free -= segment.length
        if free == 0:
            yield rows.pop(row)
            continue
        insort(rooms, (free, row))
        if len(rooms) > open_rows:
            yield rows.pop(rooms.pop(0)[1])
    yield from rows.values()


def continuous(documents: Iterable[tuple[int, int]], size: int) -> Iterator[Row]:
    """Documents end to end, cut every `size` tokens; only the last row may be shorter."""
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
