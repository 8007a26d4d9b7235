"""The plan of an epoch: which segments of which documents stand in which row. On disk, so that any row is found at once.

A plan depends on the lengths of documents alone. It is written next to the store by whoever needs it first (the content is
a pure function of the config, so a race is harmless) and read through a memory map: a resume in the middle of an epoch
costs the same as a start, and a Ray Data task on any node finds its rows without the ones before.
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
"""Documents up to which an epoch is planned in memory: faster than a file, and a thousand epochs of it leave none behind."""
_FLUSH_ROWS = 65536


@dataclass(frozen=True)
class Packing:
    """How documents become rows. `kind`: none | best_fit | continuous | record (whole); `overflow`: see `packing.fit`."""

    kind: str
    size: int
    overflow: str = "truncate"


class RowPlan:
    """The rows of every epoch of a store under an order and a packing."""

    def __init__(self, store: TokenStore, order: Order, packing: Packing):
        self.store, self.order, self.packing = store, order, packing
        described = json.dumps([PLAN_VERSION, store.content_hash, asdict(order), asdict(packing)], sort_keys=True)
        self.key = hashlib.sha256(described.encode()).hexdigest()[:16]
        self._open = lru_cache(maxsize=2)(self._open_epoch)
        self._row_counts: dict[int, int] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return RowPlan, (self.store, self.order, self.packing)

    def rows_in_epoch(self, epoch: int) -> int:
        """How many rows an epoch has. Planned the first time, remembered after that."""
        if epoch not in self._row_counts:
            self._row_counts[epoch] = len(self._open(epoch)[1]) - 1
        return self._row_counts[epoch]

    def folder(self, epoch: int) -> Path:
        """Where the plan of an epoch is kept."""
        return self.store.folder / "plans" / f"{self.key}-{epoch}"

    def segments(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """All segments of an epoch, (n, 3) int64, and the first one of each row, (rows + 1,); memory-mapped."""
        return self._open(epoch)

    def rows(self, epoch: int, start: int, stop: int) -> list[Row]:
        """Rows [start, stop) of an epoch; rows beyond its end are empty (they fill the last global batch)."""
        segments, firsts = self._open(epoch)
        found: list[Row] = []
        for row in range(start, stop):
            if row >= len(firsts) - 1:
                found.append([])
                continue
            found.append([Segment(*map(int, s)) for s in segments[firsts[row] : firsts[row + 1]]])
        return found

    def iterate(self, epoch: int) -> Iterator[Row]:
        """The rows of an epoch in the order in which packing gives them, made on the fly in bounded memory."""
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
        """(segments (n, 3) int64, first segment of each row (rows + 1,) int64), of many documents memory-mapped."""
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
        """The rows of an epoch in their order, many at a time: their segments (n, 3) int64, and how many each row has (rows,) int64.

        Raises:
            DataError: there are no rows.
        """
        number = -1
        for number, rows in enumerate(_chunks(self.iterate(epoch), _FLUSH_ROWS)):
            if self.order.shuffle != "none":  # a long document fills many rows in a row; batches must mix
                order = generator("rows", self.order.seed, epoch, number).permutation(len(rows))
                rows = [rows[i] for i in order]
            segments = np.asarray([s for row in rows for s in row], np.int64).reshape(-1, 3)
            yield segments, np.asarray([len(row) for row in rows], np.int64)
        if number < 0:
            part = "validation" if self.order.validation else "training"
            raise DataError(f"the {part} data is empty: no document is left for it; change data.validation.split "
                            "or give more data")

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
    """The first segment of each row, and the number of segments, from the number of segments in each row."""
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
