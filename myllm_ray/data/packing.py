"""Packs documents into rows of segments. Pure functions of the document lengths; tokens are not read.

Documents arrive in pieces, and rows leave in pieces. The rows do not depend on the cut into pieces. Memory use is
bounded by the size of a piece and, for best-fit packing, by the number of open rows.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from myllm_ray.config.errors import DataError

OPEN_ROWS = 256
"""Maximum number of open rows in best-fit packing. Bounds memory, and how far a document moves in the order."""
_ROW_BITS = 15
"""Bits of a row's number within a piece. Tokens and number of a row share an int, which is fast up to 30 bits."""
_LAST_ROW = 2**_ROW_BITS - 1
_PIECE = 2 ** (_ROW_BITS - 1)


class Segment(NamedTuple):
    """A range of `length` tokens of a document, starting at token `start`."""

    document: int
    start: int
    length: int


Row = list[Segment]
Documents = tuple[np.ndarray, np.ndarray]
"""Document numbers (n,) int64 and their lengths in tokens (n,) int64."""


class Rows(NamedTuple):
    """Consecutive rows."""

    segments: np.ndarray
    """(n, 3) int64, the segments of all rows: document, start, length."""
    counts: np.ndarray
    """(rows,) int64, the number of segments of each row."""

    def split(self, row: int) -> tuple[Rows, Rows]:
        """Returns the rows before `row`, and the others."""
        at = int(self.counts[:row].sum())
        return Rows(self.segments[:at], self.counts[:row]), Rows(self.segments[at:], self.counts[row:])

    def take(self, order: np.ndarray) -> Rows:
        """Returns the rows with the numbers `order` (n,), in that order."""
        firsts = _before(self.counts)
        counts = self.counts[order]
        places = np.repeat(firsts[order] - _before(counts), counts) + np.arange(counts.sum())
        return Rows(self.segments.take(places, 0), counts)


def fit(documents: Iterable[Documents], size: int, overflow: str) -> Iterator[np.ndarray]:
    """Converts documents to segments (n, 3) int64 of at most `size` tokens.

    Args:
        documents: Pieces of the documents.
        size: Maximum length of a segment, in tokens.
        overflow: What happens to a longer document: "truncate" drops its end, "split" yields several segments, "error"
            raises.

    Raises:
        DataError: A document is longer than `size` and `overflow` is "error".
    """
    for numbers, lengths in documents:
        if overflow == "error" and (lengths > size).any():
            first = int(np.argmax(lengths > size))
            raise DataError(
                f"document {numbers[first]} has {lengths[first]} tokens, more than data.sequence_length={size}: "
                "increase data.sequence_length, or set data.overflow to truncate or split"
            )
        if overflow == "split":
            counts = -(-lengths // size)
            which = np.repeat(np.arange(len(numbers)), counts)
            starts = (np.arange(len(which)) - _before(counts)[which]) * size
            yield _segments(numbers[which], starts, np.minimum(size, lengths[which] - starts))
        else:
            yield _segments(numbers, 0, np.minimum(lengths, size))


def whole(documents: Iterable[Documents]) -> Iterator[np.ndarray]:
    """Converts each document to one segment, of any length."""
    for numbers, lengths in documents:
        yield _segments(numbers, 0, lengths)


def one_per_row(segments: Iterable[np.ndarray]) -> Iterator[Rows]:
    """Yields one row per segment, without packing."""
    for piece in segments:
        yield Rows(piece, np.ones(len(piece), np.int64))


def best_fit(segments: Iterable[np.ndarray], size: int, open_rows: int = OPEN_ROWS) -> Iterator[Rows]:
    """Packs each segment, unsplit, into the fullest open row that has enough free tokens for it.

    At most `open_rows` rows are open; of equally full ones, the one that was opened first is used. A full row is
    yielded immediately. When the limit is exceeded, the fullest row is yielded. The rows that are open at the end
    follow in the order in which they were opened. This is the online form of best-fit packing; Ding et al., "Fewer
    Truncations Improve Language Modeling", 2024, use the offline form.

    Args:
        segments: Pieces of segments of at most `size` tokens.
        size: Length of a row, in tokens.
        open_rows: Maximum number of open rows.
    """
    waiting, row_of = np.empty((0, 3), np.int64), np.empty(0, np.int64)  # the segments in open rows, and their rows
    spaces: list[int] = []
    for whole_piece in segments:
        for first in range(0, len(whole_piece), _PIECE):
            piece = whole_piece[first : first + _PIECE]
            # Open rows have the numbers 0 to n - 1, by age. New rows continue them.
            limits = ((size - piece[:, 2]) << _ROW_BITS) | _LAST_ROW
            chosen, closed, number = _best_fit_rows(limits.tolist(), spaces, size, open_rows)
            waiting, row_of = np.concatenate([waiting, piece]), np.concatenate([row_of, _row_numbers(chosen)])
            # Closed rows come first, in the order in which they were closed; the others keep their order.
            rank = np.full(number, len(closed), np.int64)
            rank[_row_numbers(closed)] = np.arange(len(closed))
            ranks = rank[row_of]
            order = _stable_order(ranks, len(closed) + 1)
            counts = np.bincount(ranks, minlength=len(closed) + 1)[: len(closed)]
            waiting, done = waiting.take(order, 0), int(counts.sum())
            yield Rows(waiting[:done], counts)
            # The new number of an open row is its position among the open rows.
            renumbered = np.cumsum(rank == len(closed)) - 1
            waiting, row_of = waiting[done:].copy(), renumbered[row_of[order[done:]]]
            used = np.asarray(spaces, np.int64) >> _ROW_BITS << _ROW_BITS
            spaces = (used | (_LAST_ROW - renumbered[_row_numbers(spaces)])).tolist()
    yield Rows(waiting.take(_stable_order(row_of, len(spaces)), 0), np.bincount(row_of, minlength=len(spaces)))


def _best_fit_rows(
    limits: list[int], spaces: list[int], size: int, open_rows: int
) -> tuple[array[int], array[int], int]:
    """Chooses the row of each segment.

    This loop is the cost of best-fit packing. It therefore handles integers only: the key of a row is its number of
    tokens, times 2**`_ROW_BITS`, plus `_LAST_ROW` minus the number of the row. The row to use is the one with the
    largest key that is not above the limit of the segment: the fullest, and of equally full ones the oldest.

    Args:
        limits: The largest key of a row that has enough free tokens, for each segment.
        spaces: The keys of the open rows, ascending. Their numbers are 0 to n - 1. Updated.
        size: Length of a row, in tokens.
        open_rows: Maximum number of open rows.

    Returns:
        The key of the row of each segment, the keys of the rows that were closed, in that order, and the number of
        rows, those that were open before included.
    """
    chosen, closed = array("q"), array("q")
    choose, close, pop = chosen.append, closed.append, spaces.pop
    full, empty = size << _ROW_BITS, _LAST_ROW - len(spaces)
    most = full | _LAST_ROW
    for limit in limits:
        at = bisect_right(spaces, limit)
        if at:
            key = pop(at - 1)
            choose(key)
            key += most - limit
            if key < full:
                insort(spaces, key, at - 1)
            else:
                close(key)
        else:
            choose(empty)
            key = empty + most - limit
            empty -= 1
            if key >= full:
                close(key)
                continue
            insort(spaces, key)
            if len(spaces) > open_rows:
                close(pop())
    return chosen, closed, _LAST_ROW - empty


def continuous(documents: Iterable[Documents], size: int) -> Iterator[Rows]:
    """Concatenates documents and cuts them into rows of `size` tokens. Only the last row may be shorter.

    Args:
        documents: Pieces of the documents.
        size: Length of a row, in tokens.
    """
    begun = np.empty((0, 3), np.int64)  # the segments of the row that is not full yet
    used = 0
    for numbers, lengths in documents:
        if not lengths.all():
            numbers, lengths = numbers[lengths > 0], lengths[lengths > 0]
        if not len(lengths):
            continue
        # Positions in tokens count from the start of the row that is not full yet.
        ends = used + np.cumsum(lengths)
        starts = ends - lengths
        first_rows = starts // size
        counts = (ends - 1) // size - first_rows + 1
        which = np.repeat(np.arange(len(counts)), counts)
        rows: np.ndarray = np.arange(len(which)) - (_before(counts) - first_rows)[which]
        begins, own = np.maximum(starts[which], rows * size), starts[which]
        taken = np.minimum(ends[which], (rows + 1) * size) - begins
        segments = np.concatenate([begun, _segments(numbers[which], begins - own, taken)])
        rows = np.concatenate([np.zeros(len(begun), np.int64), rows])
        full, used = divmod(int(ends[-1]), size)
        at = int(np.searchsorted(rows, full))
        begun = segments[at:].copy()  # not a view, which would keep all segments in memory
        if full:
            yield Rows(segments[:at], np.bincount(rows[:at], minlength=full))
    if len(begun):
        yield Rows(begun, np.asarray([len(begun)], np.int64))


def regrouped(rows: Iterable[Rows], size: int) -> Iterator[Rows]:
    """Yields the same rows in pieces of `size` rows; the last piece may have fewer."""
    parts: list[Rows] = []
    held = 0
    for piece in rows:
        rest = piece
        while held + len(rest.counts) >= size:
            head, rest = rest.split(size - held)
            yield joined([*parts, head])
            parts, held = [], 0
        if len(rest.counts):
            parts.append(rest)
            held += len(rest.counts)
    if held:
        yield joined(parts)


def joined(parts: list[Rows]) -> Rows:
    """Returns the rows of all parts, one after the other."""
    return Rows(np.concatenate([p.segments for p in parts]), np.concatenate([p.counts for p in parts]))


def _segments(documents: np.ndarray, starts: np.ndarray | int, lengths: np.ndarray) -> np.ndarray:
    found = np.empty((len(documents), 3), np.int64)
    found[:, 0], found[:, 1], found[:, 2] = documents, starts, lengths
    return found


def _stable_order(numbers: np.ndarray, limit: int) -> np.ndarray:
    """Returns the stable order (n,) of numbers (n,) below `limit`."""
    # numpy sorts 16 bits in linear time
    return np.argsort(numbers.astype(np.uint16) if limit <= 2**16 else numbers, kind="stable")


def _row_numbers(keys: list[int] | array[int]) -> np.ndarray:
    numbers: np.ndarray = _LAST_ROW - (np.asarray(keys, np.int64) & _LAST_ROW)
    return numbers


def _before(counts: np.ndarray) -> np.ndarray:
    """Returns the sum of the counts before each one."""
    before: np.ndarray = np.cumsum(counts) - counts
    return before
