"""Packs documents into rows of segments. Pure functions of the document lengths; tokens are not read."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from myllm_ray.config.errors import DataError

OPEN_ROWS = 256
"""Maximum number of open rows in best-fit packing. Bounds memory, and how far a document moves in the order."""


class Segment(NamedTuple):
    """A range of `length` tokens of a document, starting at token `start`."""

    document: int
    start: int
    length: int


Row = list[Segment]


def fit(documents: Iterable[tuple[int, int]], size: int, overflow: str) -> Iterator[Segment]:
    """Converts documents to segments of at most `size` tokens.

    Args:
        documents: (document, length in tokens) pairs.
        size: Maximum length of a segment, in tokens.
        overflow: What happens to a longer document: "truncate" drops its end, "split" yields several segments, "error"
            raises.

    Raises:
        DataError: A document is longer than `size` and `overflow` is "error".
    """
    for document, length in documents:
        if length > size and overflow == "error":
            raise DataError(
                f"document {document} has {length} tokens, more than data.sequence_length={size}: "
                "increase data.sequence_length, or set data.overflow to truncate or split"
            )
        if overflow == "split":
            for start in range(0, length, size):
                yield Segment(document, start, min(size, length - start))
        else:
            yield Segment(document, 0, min(length, size))


def one_per_row(segments: Iterable[Segment]) -> Iterator[Row]:
    """Yields one row per segment, without packing."""
    for segment in segments:
        yield [segment]


def best_fit(segments: Iterable[Segment], size: int, open_rows: int = OPEN_ROWS) -> Iterator[Row]:
    """Packs each segment, unsplit, into the fullest open row that has enough free tokens for it.

    At most `open_rows` rows are open. A full row is yielded immediately. When the limit is exceeded, the fullest row is
    yielded. This is the online form of best-fit packing; Ding et al., "Fewer Truncations Improve Language Modeling",
    2024, use the offline form.

    Args:
        segments: Segments of at most `size` tokens.
        size: Length of a row, in tokens.
        open_rows: Maximum number of open rows.
    """
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


def continuous(documents: Iterable[tuple[int, int]], size: int) -> Iterator[Row]:
    """Concatenates documents and cuts them into rows of `size` tokens. Only the last row may be shorter.

    Args:
        documents: (document, length in tokens) pairs.
        size: Length of a row, in tokens.
    """
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
