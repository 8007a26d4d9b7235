"""The shards of a source: files of tokens, each described by an index of its documents.

A shard is written by the task that tokenizes a part of the source, or is a file that was tokenized before and is used
in place (`pretokenized.py`). The task returns the index, which has 24 bytes per document, and no tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from myllm_ray.config.errors import DataError
from myllm_ray.data.byte_ranges import ByteRanges
from myllm_ray.data.token_file import NARROW, TokenWriter

_FIELDS = [pa.field("length", pa.int64()), pa.field("targets", pa.int64()), pa.field("hash", pa.uint64())]


@dataclass
class Shard:
    """One file of tokens.

    Attributes:
        path: Name of a file in the folder of the store; the absolute path or the URL of a file that is used in place.
        dtype: numpy's name of the type of the stored ids. int32 is encoded (`tokenize.encode`); other types are ids.
        tokens: Number of tokens.
        runs: (first byte, number of tokens) of each run of consecutive tokens in the file.
        bits: Name of a file in the folder of the store with one bit per token, set if the token is trained on, the
            lowest bit of a byte first. None: the tokens of `dtype` int32 say so themselves; all others are trained on.
        version: `byte_ranges.version_of` a file that is used in place.
        digest: BLAKE2b hash of a file in the folder of the store.
    """

    path: str
    dtype: str
    tokens: int
    runs: list[tuple[int, int]] = field(default_factory=list)
    bits: str | None = None
    version: tuple[int, str] | None = None
    digest: str | None = None

    @property
    def described(self) -> dict[str, Any]:
        """The entry in `meta.json`. The runs of all shards are in a file of their own."""
        return {name: value for name, value in vars(self).items() if name != "runs" and value is not None}


def index_batch(
    columns: tuple[np.ndarray, np.ndarray, np.ndarray], shard: Shard | None, **metadata: object
) -> pa.RecordBatch:
    """Returns the index of a shard.

    Args:
        columns: (n,) int64, int64, uint64: number of tokens, number of trained tokens without the first one, and hash
            of each document.
        shard: The file; None if it has no documents.
        metadata: Entries of the metadata of the schema. See `tokenize.tokenize_rows`.
    """
    described = {key: str(value) for key, value in metadata.items()}
    if shard is not None:
        described["shard"] = json.dumps(vars(shard))
    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, _FIELDS, strict=True)]
    return pa.record_batch(arrays, schema=pa.schema(_FIELDS, metadata=described))


def shard_of(batch: pa.RecordBatch) -> Shard | None:
    """Returns the file that an index describes."""
    text = (batch.schema.metadata or {}).get(b"shard")
    return None if text is None else Shard(**json.loads(text))


class DocumentIndex:
    """Computes the index of documents whose tokens arrive in pieces."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)
        self._length = self._targets = 0  # of the document whose end has not been seen
        self._lengths: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._digests: list[bytes] = []

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, values: np.ndarray, ends: np.ndarray) -> None:
        """Adds tokens.

        Args:
            values: (n,) int32, encoded tokens.
            ends: (k,) int64, ascending numbers of the tokens before which a document ends; n if it ends after the last.
        """
        edges = np.concatenate([[0], ends, [len(values)]]).astype(np.int64)
        lengths = np.diff(edges)
        trained = np.concatenate([[0], np.cumsum(values >= 0)])
        counts = np.diff(trained[edges])
        # The first token of a document is not a target.
        starts = lengths > 0
        starts[0] &= self._length == 0
        counts[starts] -= values[edges[:-1][starts]] >= 0
        lengths[0] += self._length
        counts[0] += self._targets
        for first, last in itertools.pairwise(edges[:-1].tolist()):
            self._hash.update(values[first:last].data)
            self._digests.append(self._hash.digest())
            self._hash = hashlib.blake2b(digest_size=8)
        self._hash.update(values[edges[-2] :].data)
        self._length, self._targets = int(lengths[-1]), int(counts[-1])
        self._lengths.append(lengths[:-1])
        self._counts.append(counts[:-1])

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns lengths, targets and hashes as `index_batch` takes them. Tokens after the last end are a document."""
        if self._length:
            self.add(np.empty(0, np.int32), np.zeros(1, np.int64))
        none = np.empty(0, np.int64)
        hashes = np.frombuffer(b"".join(self._digests), np.uint64)
        return np.concatenate([none, *self._lengths]), np.concatenate([none, *self._counts]), hashes


def write_shard(
    folder: Path, stem: str, name: str, batches: Iterable[pa.RecordBatch], vocabulary: int | None, limit: int | None
) -> pa.RecordBatch:
    """Writes documents to a shard and returns its index. Two tasks that write the same shard do not disturb each other.

    Args:
        folder: Folder of the store.
        stem: The files are `tokens-<stem>.u16` and `trained-<stem>.bits`, or `tokens-<stem>.bin`.
        name: Name of the source, for messages.
        batches: Batches of `tokenize.tokenize_rows`.
        vocabulary: A number above all token ids; None: not known. It determines the width of the stored ids.
        limit: Number of documents after which no further batch is read.

    Raises:
        DataError: The folder can't be written, or the format returns documents of several kinds.
    """
    totals = {"skipped": 0, "cut": 0, "chats": 0}
    reason = kind = ""
    index, own = DocumentIndex(), f"{stem}.{uuid.uuid4().hex[:8]}.tmp"
    with ExitStack() as stack:
        writer: TokenWriter | None = None
        for batch in batches:
            metadata = {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}
            totals = {key: value + int(metadata.get(key, 0)) for key, value in totals.items()}
            reason = reason or metadata.get("reason", "")
            kind = one_kind(name, kind, metadata.get("kind", ""))
            column = batch.column(0)
            values = column.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
            ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)
            with _writing(folder):
                if writer is None and len(column):
                    # Examples also contain separators and numbers that are not tokens.
                    narrow = vocabulary is not None and vocabulary <= NARROW and kind in ("", "tokens")
                    writer = stack.enter_context(TokenWriter(folder, own, narrow))
                if writer is not None:
                    writer.write(values)
            index.add(values, ends)
            if limit is not None and len(index) >= limit:
                break
        with _writing(folder):
            stack.close()
    shard = None
    if writer is not None:
        with _writing(folder):
            shard = _published(folder, own, stem, writer)
    return index_batch(index.finish(), shard, reason=reason, kind=kind, **totals)


def one_kind(name: str, kind: str, other: str) -> str:
    """Returns the kind of two parts of a source, of which empty parts have none.

    Raises:
        DataError: They have different kinds.
    """
    if kind and other and kind != other:
        raise DataError(f"data source {name!r}: its format returns {other} for some rows and {kind} for others")
    return kind or other


def _published(folder: Path, own: str, stem: str, writer: TokenWriter) -> Shard:
    suffix, bits = ("u16" if writer.narrow else "bin"), None
    if writer.masked:
        bits = f"trained-{stem}.bits"
        os.replace(folder / f"trained-{own}.bits", folder / bits)
    path = f"tokens-{stem}.{suffix}"
    os.replace(folder / f"tokens-{own}.{suffix}", folder / path)
    dtype = "uint16" if writer.narrow else "int32"
    return Shard(path, dtype, writer.count, [(0, writer.count)], bits, digest=writer.digest)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data.cache: node {socket.gethostname()} can't write {folder}: {error.strerror or error}; all nodes that "
            "tokenize must share the folder (data.cache, run.storage)"
        ) from None


class ShardReader:
    """Reads ranges of the tokens of one source that is stored in shards.

    Args:
        folder: Folder of the store.
        index: Number of the source.
        shards: Entries of the shards in `meta.json`.
        ranges: Reads the files.
        base: Folder or URL of the shards, if it is not `folder`.
    """

    def __init__(
        self, folder: Path, index: int, shards: list[dict[str, Any]], ranges: ByteRanges, base: str | None = None
    ):
        self._ranges, self._base = ranges, base or str(folder)
        self._shards = [Shard(**shard) for shard in shards]
        self._dtypes = [np.dtype(shard.dtype).newbyteorder("<") for shard in self._shards]
        self._paths = [s.path if s.version is not None else f"{self._base}/{s.path}" for s in self._shards]
        self._shard_firsts = np.cumsum([0, *(shard.tokens for shard in self._shards)])
        # (n, 3) int64: number of the shard, first byte, number of tokens
        # As a plain array, because indexing a `memmap` is slow. It still is a view of the file.
        self._runs = np.asarray(np.load(folder / f"runs-{index}.npy", mmap_mode="r"))
        self._firsts = np.concatenate([[0], np.cumsum(self._runs[:, 2])])

    def read(self, first: int, count: int) -> np.ndarray:
        """Returns the encoded tokens [first, first + count), (count,) int32.

        Raises:
            DataError: A file is truncated or has changed.
        """
        parts = []
        run = int(np.searchsorted(self._firsts, first, side="right")) - 1
        while count:
            number, byte, tokens = self._runs[run].tolist()
            skipped = first - int(self._firsts[run])
            taken = min(count, tokens - skipped)
            parts.append(self._read(number, byte, skipped, taken, first - int(self._shard_firsts[number])))
            first, count, run = first + taken, count - taken, run + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.empty(0, np.int32), *parts])

    def _read(self, number: int, byte: int, skipped: int, count: int, place: int) -> np.ndarray:
        """Reads tokens of one run; `place` is the number of the first of them in the shard."""
        shard, dtype = self._shards[number], self._dtypes[number]
        width = dtype.itemsize
        size = width * shard.tokens if shard.version is None else shard.version[0]
        data = self._bytes(self._paths[number], byte + width * skipped, width * count, size, shard.version)
        values = np.frombuffer(data, dtype).astype(np.int32, copy=False)
        if shard.bits is None:
            return values
        skipped = place % 8
        size, length = -(-shard.tokens // 8), -(-(skipped + count) // 8)
        packed = self._bytes(f"{self._base}/{shard.bits}", place // 8, length, size)
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
        # `ids ^ -1` is `~ids`, for the tokens that are not trained on.
        return values ^ (bits[skipped : skipped + count].astype(np.int32) - 1)

    def _bytes(self, path: str, first: int, count: int, size: int, version: Any = None) -> bytes:
        try:
            return self._ranges.read(path, first, count, size, version)
        except DataError as error:
            if version is not None or "://" in path:
                raise
            raise DataError(f"{error}; delete {self._base}, and the next run prepares the data again") from None
