"""Writes token stores from the indexes of their shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from myllm_ray.common.files import published, write_json
from myllm_ray.config.errors import DataError
from myllm_ray.data.cache import DataCache
from myllm_ray.data.shards import Shard, one_kind, shard_of
from myllm_ray.data.store import TokenStore

FORMAT_VERSION = 4
"""Part of the cache key. Change it when the same rows result in different documents."""
HASHED_TOKENS = 2**28
"""Largest number of tokens for which the content hash is that of the tokens themselves, as in earlier versions."""
_PIECE = 2**22


class SourceShards(NamedTuple):
    """What is to be written of a source."""

    name: str
    write: Callable[[Path, int], Iterable[pa.RecordBatch]]
    """Writes the shards of the source with the given number to a folder, and returns their indexes in order."""
    limit: int | None = None
    """Largest number of documents. Shards after it are not used."""


def write_store(
    folder: Path, sources: list[SourceShards], extra: dict[str, Any], cache: DataCache | None = None
) -> None:
    """Writes a store to a temporary folder and renames it to `folder`.

    If another process has created `folder` in the meantime, that store is kept. No token passes through this process,
    unless there are so few that the content hash is computed from them.

    Args:
        folder: Folder of the store.
        sources: The sources, in order.
        extra: Additional entries of `meta.json`.
        cache: The cache that the folder is in. With a URL, the shards are there, and the index is uploaded.

    Raises:
        DataError: A source has no documents, the sources are of different kinds, the folder can't be written, or it
            exists and is not a token store.
    """
    try:
        with published(folder, existing="keep") as beside:
            beside.mkdir(parents=True)
            hashes: list[np.ndarray] = []
            described = [_write_source(beside, i, source, hashes) for i, source in enumerate(sources)]
            kinds = {source["name"]: source["kind"] for source in described}
            if len(set(kinds.values())) > 1:
                raise DataError(
                    "data.train: sources of different kinds can't be mixed "
                    f"({', '.join(f'{n}: {k}' for n, k in kinds.items())})"
                )
            meta = {
                "format": FORMAT_VERSION,
                "sources": described,
                "content_hash": "",
                "duplicates": _duplicates(np.concatenate(hashes)),
                **extra,
            }
            write_json(beside / "meta.json", meta)
            remote = cache is not None and cache.url is not None
            base = cache.remote(folder) if cache is not None and remote else None
            meta["content_hash"] = _content_hash(TokenStore(beside, cache, base or str(beside)), hashes)
            write_json(beside / "meta.json", meta)
            if cache is not None:
                cache.upload(beside, folder)
    except OSError as error:
        raise DataError(f"data.cache: {folder} can't be written: {error}") from None
    if not (folder / "meta.json").exists():
        raise DataError(f"data.cache: {folder} exists but is not a token store; remove it")


def _write_source(folder: Path, index: int, source: SourceShards, hashes: list[np.ndarray]) -> dict[str, Any]:
    """Writes the files of one source and returns its entry in `meta.json`.

    Appends the document hashes (n,) uint64 to `hashes`.
    """
    totals = {"skipped": 0, "cut": 0, "chats": 0}
    reason = kind = ""
    shards: list[Shard] = []
    own: list[np.ndarray] = []
    count = start = 0
    offsets, targets = (_Column(folder / f"{name}-{index}.npy") for name in ("offsets", "targets"))
    with offsets, targets:
        offsets.append(np.zeros(1, np.int64))
        for batch in source.write(folder, index):
            metadata = {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}
            totals = {key: value + int(metadata.get(key, 0)) for key, value in totals.items()}
            reason = reason or metadata.get("reason", "")
            kind = one_kind(source.name, kind, metadata.get("kind", ""))
            if source.limit is not None:
                batch = batch.slice(0, max(0, source.limit - count))
            lengths, trained, digests = (column.to_numpy(zero_copy_only=False) for column in batch.columns)
            shard = shard_of(batch)
            if shard is not None and len(lengths):
                offsets.append(start + np.cumsum(lengths))
                start += shard.tokens
                targets.append(trained)
                own.append(digests)
                shards.append(shard)
            count += len(lengths)
            if source.limit is not None and count >= source.limit:
                break
    if count == 0:
        skipped = totals["skipped"]
        why = f"all {skipped} rows were skipped, the first: {reason}" if skipped else "it contains no documents"
        raise DataError(f"data source {source.name!r} is empty: {why}")
    hashes.append(np.concatenate(own))
    runs = [(number, *run) for number, shard in enumerate(shards) for run in shard.runs]
    np.save(folder / f"runs-{index}.npy", np.asarray(runs, np.int64).reshape(-1, 3))
    return {
        "name": source.name,
        "documents": count,
        "tokens": offsets.last,
        "first_skipped": reason,
        "kind": kind or "tokens",
        "duplicates": _duplicates(hashes[-1]),
        **totals,
        "shards": [shard.described for shard in shards],
    }


class _Column:
    """Writes a `.npy` file of int64 in pieces. To be used as a context manager."""

    def __init__(self, path: Path):
        self.count = self.last = 0
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115
        self._header()

    def _header(self) -> None:
        # It has the same length for any count.
        self._file.seek(0)
        described = {"descr": "<i8", "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, described)

    def append(self, values: np.ndarray) -> None:
        """Appends (n,) int64; `last` is the last of them."""
        self._file.write(np.ascontiguousarray(values, np.int64).data)
        self.count += len(values)
        self.last = int(values[-1])

    def __enter__(self) -> _Column:
        return self

    def __exit__(self, *_: object) -> None:
        self._header()
        self._file.close()


def _content_hash(store: TokenStore, hashes: list[np.ndarray]) -> str:
    """Returns a hash of all tokens and document boundaries. It does not depend on the cut into shards."""
    whole = store.tokens <= HASHED_TOKENS
    digest = hashlib.sha256(b"" if whole else b"documents")
    for source in range(len(store.sources)):
        offsets = np.load(store.folder / f"offsets-{source}.npy", mmap_mode="r")
        if whole:
            for first in range(0, int(offsets[-1]), _PIECE):
                digest.update(store.tokens_of(source, first, min(_PIECE, int(offsets[-1]) - first)).data)
        else:
            digest.update(hashes[source].data)
        for first in range(0, len(offsets), _PIECE):
            digest.update(np.ascontiguousarray(offsets[first : first + _PIECE]).data)
    return digest.hexdigest()[:32]


def _duplicates(hashes: np.ndarray) -> int:
    """Returns the number of documents that repeat an earlier one, by their hashes."""
    return len(hashes) - len(np.unique(hashes))
