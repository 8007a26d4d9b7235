"""The plan of an epoch: the assignment of document segments to rows, stored on disk for random access.

A plan depends only on the lengths of the documents. The first process that needs it writes it next to the store. Its
content is a pure function of the config, so concurrent writers are harmless. It is read through a memory map: resuming
in the middle of an epoch costs the same as starting it, and a Ray Data task on any node reads its rows without the
preceding ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from myllm_ray.common.files import published
from myllm_ray.common.seeds import generator
from myllm_ray.config.errors import DataError
from myllm_ray.data.order import Order, documents
from myllm_ray.data.packing import Row, Segment, best_fit, continuous, fit, one_per_row
from myllm_ray.data.store import TokenStore

PLAN_VERSION = 2
_SMALL = 4096
"""Largest number of documents for which an epoch is planned in memory.

This is faster than a file, and runs of many short epochs leave no files on disk.
"""
_FLUSH_ROWS = 65536


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
        described = json.dumps([PLAN_VERSION, store.content_hash, asdict(order), asdict(packing)], sort_keys=True)
        self.key = hashlib.sha256(described.encode()).hexdigest()[:16]
        self._open = lru_cache(maxsize=2)(self._open_epoch)
        self._row_counts: dict[int, int] = {}

    def __reduce__(self) -> tuple[object, ...]:
        # Memory maps and the cache of opened epochs are per process: an unpickled plan opens its own.
        return RowPlan, (self.store, self.order, self.packing)

    def rows_in_epoch(self, epoch: int) -> int:
        """Returns the number of rows in an epoch. The first call plans the epoch; the result is cached."""
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

    def iterate(self, epoch: int) -> Iterator[Row]:
        """Yields the rows of an epoch in packing order, computed on the fly in bounded memory."""
        lengths = self._lengths(epoch)
        size, overflow = self.packing.size, self.packing.overflow
        if self.packing.kind == "continuous":
            return continuous(lengths, size)
        if self.packing.kind == "record":
            return ([Segment(document, 0, length)] for document, length in lengths)
        if self.packing.kind == "best_fit":
            return best_fit(fit(lengths, size, overflow), size)
        return one_per_row(fit(lengths, size, overflow))

    def _lengths(self, epoch: int) -> Iterator[tuple[int, int]]:
        for piece in documents(self.store, self.order, epoch):
            for first in range(0, len(piece), _FLUSH_ROWS):
                part = piece[first : first + _FLUSH_ROWS]
                yield from zip(part.tolist(), self.store.lengths(part).tolist(), strict=True)

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

    def _plan(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the rows of an epoch in their final order, in chunks of at most `_FLUSH_ROWS` rows.

        Each chunk consists of the segments, (n, 3) int64, and the number of segments of each row, (rows,) int64.

        Raises:
            DataError: The epoch has no rows.
        """
        number = -1
        for number, rows in enumerate(_chunks(self.iterate(epoch), _FLUSH_ROWS)):
            if self.order.shuffle != "none":  # a long document fills many consecutive rows, which would share a batch
                order = generator("rows", self.order.seed, epoch, number).permutation(len(rows))
                rows = [rows[i] for i in order]
            segments = np.asarray([s for row in rows for s in row], np.int64).reshape(-1, 3)
            yield segments, np.asarray([len(row) for row in rows], np.int64)
        if number < 0:
            part = "validation" if self.order.validation else "training"
            raise DataError(
                f"the {part} data is empty: it has no documents; change data.validation.split or provide more data"
            )

    def _write(self, folder: Path, epoch: int) -> None:
        counts: list[np.ndarray] = []
        try:
            with published(folder, existing="keep") as beside:
                beside.mkdir(parents=True)
                with open(beside / "segments.bin", "wb") as file:
                    for segments, count in self._plan(epoch):
                        file.write(segments.tobytes())
                        counts.append(count)
                np.save(beside / "firsts.npy", _firsts(counts))
        except OSError as error:
            raise DataError(f"data.cache: {folder} can't be written: {error}") from None


def _firsts(counts: list[np.ndarray]) -> np.ndarray:
    """Returns the index of the first segment of each row, and the total, from the segment counts of the rows."""
    return np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts]))


def _chunks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
