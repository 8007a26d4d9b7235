"""The plan of an epoch: the assignment of document segments to rows, stored on disk for random access.

A plan depends only on the lengths of the documents. The first process that needs it writes it next to the store. Its
content is a pure function of the config, so concurrent writers are harmless. It is read through a memory map: resuming
in the middle of an epoch costs the same as starting it, and a Ray Data task on any node reads its rows without the
preceding ones.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import BinaryIO

import numpy as np

from myllm_ray.common.files import published
from myllm_ray.common.seeds import generator
from myllm_ray.config.errors import DataError
from myllm_ray.data.mixture import Mixer, Mixture, State
from myllm_ray.data.order import Order, documents
from myllm_ray.data.packing import (
    Documents,
    Row,
    Rows,
    Segment,
    best_fit,
    continuous,
    fit,
    one_per_row,
    regrouped,
    whole,
)
from myllm_ray.data.store import TokenStore

PLAN_VERSION = 2
_NEWER = ("by_formula", "mixture")
_SMALL = 4096
"""Largest number of documents for which an epoch is planned in memory.

This is faster than a file, and runs of many short epochs leave no files on disk.
"""
_FLUSH_ROWS = 65536
"""Number of rows that are shuffled together, and written at once."""
_LEAST_FLUSH_ROWS = 4096
"""Smallest number of rows of a source of a mixture that are shuffled together."""
_END = "end.json"
"""File of a plan with the state of the mixture after the epoch."""
_PIECE = 32768
"""Number of documents that are packed at once."""
_ROUND_ROWS = 1024
"""Number of rows that small sources of a mixture fill together: several passes, which share rows. See `_passes`."""
_MOST_SEGMENTS = 2**18
"""Largest number of segments that are made at once, unless one document has more."""


@dataclass(frozen=True)
class Packing:
    """The packing of documents into rows.

    Attributes:
        kind: "none", "best_fit", "continuous", or "record" (one complete example per row).
        size: Length of a row, in tokens.
        overflow: See `packing.fit`.
    """

    kind: str
    size: int
    overflow: str = "truncate"


class RowPlan:
    """The rows of all epochs of a store, for a given order and packing."""

    def __init__(self, store: TokenStore, order: Order, packing: Packing):
        self.store, self.order, self.packing = store, order, packing
        # Without the fields that are newer than existing plans, as long as they have no effect.
        ordered = {name: value for name, value in asdict(order).items() if name not in _NEWER or value}
        described = json.dumps([PLAN_VERSION, store.content_hash, ordered, asdict(packing)], sort_keys=True)
        self.key = hashlib.sha256(described.encode()).hexdigest()[:16]
        self._open = lru_cache(maxsize=2)(self._open_epoch)
        self._row_counts: dict[int, int] = {}
        self._starts: dict[int, State] = {}

    def __reduce__(self) -> tuple[object, ...]:
        # Memory maps and the cache of opened epochs are per process: an unpickled plan opens its own.
        return RowPlan, (self.store, self.order, self.packing)

    def rows_in_epoch(self, epoch: int) -> int:
        """Returns the number of rows in an epoch. The first call plans the epoch; the result is cached."""
        if self.order.mixture is not None:
            return self.order.mixture.rows
        if epoch not in self._row_counts:
            self._row_counts[epoch] = len(self._open(epoch)[1]) - 1
        return self._row_counts[epoch]

    def folder(self, epoch: int) -> Path:
        """Returns the folder of the plan of an epoch."""
        return self.store.folder / "plans" / f"{self.key}-{epoch}"

    def segments(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns all segments of an epoch, (n, 3) int64, and the index of the first segment of each row, (rows + 1,).

        The columns are document, start and length. The arrays are memory-mapped, except for small stores.
        """
        return self._open(epoch)

    def rows(self, epoch: int, start: int, stop: int) -> list[Row]:
        """Returns rows [start, stop) of an epoch. Rows after its end are empty; they fill the last global batch."""
        segments, firsts = self._open(epoch)
        found: list[Row] = []
        for row in range(start, stop):
            if row >= len(firsts) - 1:
                found.append([])
                continue
            found.append([Segment(*map(int, s)) for s in segments[firsts[row] : firsts[row + 1]]])
        return found

    def _packed(self, documents: Iterator[Documents]) -> Iterator[Rows]:
        """Yields the rows of documents in packing order, in bounded memory."""
        size, overflow = self.packing.size, self.packing.overflow
        if self.packing.kind == "continuous":
            return continuous(documents, size)
        if self.packing.kind == "record":
            return one_per_row(whole(documents))
        if self.packing.kind == "best_fit":
            return best_fit(fit(documents, size, overflow), size)
        return one_per_row(fit(documents, size, overflow))

    def _shuffled(self, rows: Iterator[Rows], size: int, *seed: int) -> Iterator[Rows]:
        """Yields rows in their final order, in pieces of `size` rows. `seed` and its number seed that of a piece."""
        for number, piece in enumerate(regrouped(rows, size)):
            if self.order.shuffle == "none":
                yield piece
            else:  # a long document fills many consecutive rows, which would share a batch
                rng = generator("rows", self.order.seed, *seed, number)
                yield piece.take(rng.permutation(len(piece.counts)))

    def _lengths(self, parts: Iterator[np.ndarray]) -> Iterator[Documents]:
        """Yields the documents with the given numbers, in pieces that have a bounded number of segments."""
        for numbers in _pieces(parts, _PIECE):
            lengths = self.store.lengths(numbers)
            most = np.cumsum(lengths // self.packing.size + 2)
            edges = np.searchsorted(most, np.arange(_MOST_SEGMENTS, int(most[-1]), _MOST_SEGMENTS), side="right")
            for first, stop in itertools.pairwise(np.unique([0, *edges, len(numbers)]).tolist()):
                yield numbers[first:stop], lengths[first:stop]

    def _open_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the same arrays as `segments`, and writes the plan first if it does not exist."""
        if len(self.store) <= _SMALL:
            parts = list(self._plan(epoch))
            return np.concatenate([segments for segments, _ in parts]), _firsts([counts for _, counts in parts])
        folder = self.folder(epoch)
        if not folder.exists():
            self._write(folder, epoch)
        firsts = np.load(folder / "firsts.npy", mmap_mode="r")
        segments = np.memmap(folder / "segments.bin", np.int64, "r").reshape(-1, 3)
        return segments, firsts

    def _plan(self, epoch: int) -> Iterator[Rows]:
        """Yields the rows of an epoch in their final order, in pieces of at most `_FLUSH_ROWS` rows.

        Raises:
            DataError: The epoch has no rows.
        """
        if self.order.mixture is not None:
            yield from self._mixed(self.order.mixture, epoch)
            return
        rows, empty = self._packed(self._lengths(documents(self.store, self.order, epoch))), True
        for piece in self._shuffled(rows, _FLUSH_ROWS, epoch):
            empty = False
            yield piece
        if empty:
            part = "validation" if self.order.validation else "training"
            raise DataError(
                f"the {part} data is empty: it has no documents; change data.validation.split or provide more data"
            )

    def _mixed(self, mixture: Mixture, epoch: int) -> Iterator[Rows]:
        """Yields the rows of an epoch of a mixture, and keeps the state after it."""
        by_tokens = self.packing.kind != "record"
        start, names = self._start(epoch), self.store.sources
        mixer = Mixer(mixture, epoch * mixture.rows, start, self._rows_of_source, names, by_tokens)
        yield from mixer.rows(mixture.rows)
        self._starts[epoch + 1] = mixer.state

    def _start(self, epoch: int) -> State:
        """Returns the state of the mixture at the start of an epoch. Plans earlier epochs of which it is not known."""
        self._starts.setdefault(0, State.first(len(self.store.sources)))
        known = epoch
        while known not in self._starts:
            path = self.folder(known - 1) / _END
            if path.exists():
                self._starts[known] = State.read(path)
            else:
                known -= 1
        for earlier in range(known, epoch):
            for _ in self._plan(earlier):
                pass
        return self._starts[epoch]

    def _rows_of_source(self, source: int, round: int) -> Iterator[Rows]:
        """Yields the rows of a round of a source of a mixture."""
        passes = self._passes(source)
        numbers = range(round * passes, (round + 1) * passes)
        parts = (part for number in numbers for part in documents(self.store, self.order, number, source))
        # The sources are open at the same time, so each has a part of the memory.
        size = max(_LEAST_FLUSH_ROWS, _FLUSH_ROWS // len(self.store.sources))
        return self._shuffled(self._packed(self._lengths(parts)), size, round, source)

    def _passes(self, source: int) -> int:
        """Returns the number of passes of a round of a source: those that fill `_ROUND_ROWS` rows, at least one.

        The last rows of a round are not full. Without several passes, most rows of a small source would not be.
        """
        of_source = self.store.meta["sources"][source]
        if self.packing.kind in ("continuous", "best_fit"):
            filled = int(of_source["tokens"]) / self.packing.size
        else:
            filled = len(self.store.documents_of(source))
        return max(1, ceil(_ROUND_ROWS / filled)) if filled else 1

    def _write(self, folder: Path, epoch: int) -> None:
        try:
            with published(folder, existing="keep") as beside:
                beside.mkdir(parents=True)
                with open(beside / "segments.bin", "wb") as file, open(beside / "firsts.npy", "wb") as index:
                    _write_header(index, 0)
                    index.write(bytes(8))
                    rows = first = 0
                    for piece in self._plan(epoch):
                        file.write(np.ascontiguousarray(piece.segments).data)
                        ends = first + np.cumsum(piece.counts)
                        index.write(ends.data)
                        rows, first = rows + len(ends), int(ends[-1])
                    _write_header(index, rows + 1)
                if self.order.mixture is not None:
                    self._starts[epoch + 1].write(beside / _END)
        except OSError as error:
            raise DataError(f"data.cache: {folder} can't be written: {error}") from None


def _write_header(file: BinaryIO, count: int) -> None:
    """Writes the header of a `.npy` file of (count,) int64. It has the same length for any count."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (count,)})


def _firsts(counts: list[np.ndarray]) -> np.ndarray:
    """Returns the index of the first segment of each row, and the total, from the segment counts of the rows."""
    return np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts]))


def _pieces(parts: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yields the same numbers in arrays of `size`; the last one may be shorter."""
    held: list[np.ndarray] = []
    for part in parts:
        held.append(part)
        while sum(map(len, held)) >= size:
            joined = np.concatenate(held) if len(held) > 1 else held[0]
            yield joined[:size]
            held = [joined[size:]]
    rest = np.concatenate(held) if held else np.empty(0, np.int64)
    if len(rest):
        yield rest
