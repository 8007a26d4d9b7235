"""The on-disk store of prepared data: the tokens of all documents of all sources, with random access to documents.

The folder `<cache>/<key>` contains for each source i:

    tokens-<i>.bin    int32, the encoded tokens of all documents (see `tokenize.encode`), or
    tokens-<i>.u16    uint16, their ids, for small vocabularies; see `token_file.py`
    offsets-<i>.npy   int64, the start of each document, followed by the total
    targets-<i>.npy   int64, see `TokenStore.targets`

and one `meta.json`, which is written last. Documents are read with `pread`, so memory use does not grow with the data.
Rows are packed by document length only, so any row of any epoch is located without reading the preceding tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from myllm_ray.common.files import published, write_json
from myllm_ray.config.errors import DataError
from myllm_ray.data.token_file import NARROW, TokenReader, TokenWriter

FORMAT_VERSION = 4
"""Part of the cache key. Change it when the same rows result in different documents."""
_NAMED = 5
"""Maximum number of documents listed in a message."""


class TokenStore:
    """An opened store. Document numbers are consecutive over all sources, starting with source 0."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta: dict[str, Any] = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        self.sources: list[str] = [s["name"] for s in self.meta["sources"]]
        self._offsets = [np.load(self.folder / f"offsets-{i}.npy", mmap_mode="r") for i in range(len(self.sources))]
        self._targets = [np.load(self.folder / f"targets-{i}.npy", mmap_mode="r") for i in range(len(self.sources))]
        self._first = np.cumsum([0, *(len(o) - 1 for o in self._offsets)])
        self._files: dict[int, TokenReader] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def content_hash(self) -> str:
        """A hash of all tokens and document boundaries. Training on stores with equal hashes is equivalent."""
        return str(self.meta["content_hash"])

    @property
    def tokens(self) -> int:
        return sum(int(o[-1]) for o in self._offsets)

    @property
    def kind(self) -> str:
        """The kind of the documents: `tokens`, or a kind of example (`examples.py`)."""
        return str(self.meta["sources"][0].get("kind", "tokens"))

    @property
    def chats(self) -> int:
        """The number of documents that were formatted with the chat template."""
        return sum(int(source["chats"]) for source in self.meta["sources"])

    @property
    def duplicates(self) -> int:
        """The number of documents that are exact copies of another document in any source."""
        return int(self.meta["duplicates"])

    def documents_of(self, source: int) -> range:
        return range(int(self._first[source]), int(self._first[source + 1]))

    def source_of(self, documents: np.ndarray) -> np.ndarray:
        """Returns the source numbers (n,) of the given document numbers (n,)."""
        return np.searchsorted(self._first, documents, side="right") - 1

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Returns the lengths (n,) in tokens of the given document numbers (n,)."""
        return self._looked_up(
            documents, lambda source, local: self._offsets[source][local + 1] - self._offsets[source][local]
        )

    def longer_than(self, size: int) -> int:
        """Returns the number of documents with more than `size` tokens."""
        # In blocks, so that the lengths of a large store are never in memory at once.
        blocks = (np.arange(a, min(a + 65536, len(self))) for a in range(0, len(self), 65536))
        return sum(int((self.lengths(block) > size).sum()) for block in blocks)

    def targets(self, documents: np.ndarray) -> np.ndarray:
        """Returns the number of trained tokens (n,) of the given document numbers (n,).

        The first token of a document is excluded, because no token predicts it. Only for stores of kind `tokens`.
        """
        return self._looked_up(documents, lambda source, local: self._targets[source][local])

    def _looked_up(self, documents: np.ndarray, values: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
        if len(self.sources) == 1:
            return np.asarray(values(0, documents), np.int64)
        found = np.empty(len(documents), np.int64)
        sources = self.source_of(documents)
        for source in np.flatnonzero(np.bincount(sources)).tolist():
            where = sources == source
            found[where] = values(source, documents[where] - self._first[source])
        return found

    def read(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Returns the encoded tokens [start, start + length) of a document, (length,) int32.

        Without `length`, returns all tokens from `start` to the end of the document.

        Raises:
            DataError: The token file is truncated.
        """
        source = int(self.source_of(np.asarray([document]))[0])
        local = document - int(self._first[source])
        first, last = (int(x) for x in self._offsets[source][local : local + 2])
        count = last - first - start if length is None else length
        if source not in self._files:
            self._files[source] = TokenReader(self.folder, source, self.meta["sources"][source])
        return self._files[source].read(first + start, count)

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            file.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens its own file descriptors, and the folder may be another one on its node.
        return open_same, (str(self.folder), self.content_hash)


def open_same(folder: str, content_hash: str) -> TokenStore:
    """Opens a store that another process has opened, possibly on another node.

    Args:
        folder: folder of the store.
        content_hash: `TokenStore.content_hash` in the other process.

    Raises:
        DataError: this node has no such folder, or it contains other data.
    """
    node = socket.gethostname()
    try:
        store = TokenStore(folder)
    except OSError:
        raise DataError(
            f"data.cache: node {node} can't read {folder}: use a folder that all nodes share (data.cache, run.storage)"
        ) from None
    if store.content_hash != content_hash:
        raise DataError(
            f"data.cache: {folder} on node {node} contains other data than on the node that started the run: "
            "use a folder that all nodes share (data.cache, run.storage)"
        )
    return store


def describe_documents(store: TokenStore, documents: Sequence[int]) -> str:
    """Returns a description such as `documents 3, 4 and 2 more of rows`, where `rows` is the name of the source.

    The numbers are the ones that `myllm-ray data` shows.
    """
    names = list(dict.fromkeys(store.sources[s] for s in store.source_of(np.asarray(documents)).tolist()))
    more = f" and {len(documents) - _NAMED} more" if len(documents) > _NAMED else ""
    return (
        f"document{'s' if len(documents) > 1 else ''} {', '.join(map(str, documents[:_NAMED]))}{more} "
        f"of {', '.join(names)}"
    )


def write_store(
    folder: Path,
    sources: list[tuple[str, Iterable[pa.RecordBatch], int | None]],
    extra: dict[str, Any],
    vocabulary: int | None = None,
) -> None:
    """Writes a store to a temporary folder and renames it to `folder`.

    If another process has created `folder` in the meantime, that store is kept.

    Args:
        folder: Folder of the store.
        sources: (name, batches of `tokenize_rows`, maximum number of documents or None) of each source, in order.
        extra: Additional entries of `meta.json`.
        vocabulary: A number above all token ids; None: not known. It determines the width of the stored ids, not the
            content hash.

    Raises:
        DataError: A source has no documents, the sources are of different kinds, the folder can't be written, or it
            exists and is not a token store.
    """
    try:
        with published(folder, existing="keep") as beside:
            beside.mkdir(parents=True)
            digest = hashlib.sha256()
            hashes: list[np.ndarray] = []
            described = [
                _write_source(beside, i, name, batches, limit, digest, hashes, vocabulary)
                for i, (name, batches, limit) in enumerate(sources)
            ]
            kinds = {source["name"]: source["kind"] for source in described}
            if len(set(kinds.values())) > 1:
                raise DataError(
                    "data.train: sources of different kinds can't be mixed "
                    f"({', '.join(f'{n}: {k}' for n, k in kinds.items())})"
                )
            write_json(
                beside / "meta.json",
                {
                    "format": FORMAT_VERSION,
                    "sources": described,
                    "content_hash": digest.hexdigest()[:32],
                    "duplicates": _duplicates(np.concatenate(hashes)),
                    **extra,
                },
            )
    except OSError as error:
        raise DataError(f"data.cache: {folder} can't be written: {error}") from None
    if not (folder / "meta.json").exists():
        raise DataError(f"data.cache: {folder} exists but is not a token store; remove it")


def _write_source(
    folder: Path,
    index: int,
    name: str,
    batches: Iterable[pa.RecordBatch],
    limit: int | None,
    digest: Any,
    hashes: list[np.ndarray],
    vocabulary: int | None,
) -> dict[str, Any]:
    """Writes the files of one source and returns its entry in `meta.json`.

    Updates `digest` with the tokens and offsets, and appends the document hashes (n,) uint64 to `hashes`.
    """
    skipped, cut, chats, reason, kind = 0, 0, 0, "", ""
    lengths: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    own: list[np.ndarray] = []
    count = 0
    with ExitStack() as stack:
        file: TokenWriter | None = None
        for batch in batches:
            metadata = batch.schema.metadata or {}
            skipped += int(metadata.get(b"skipped", b"0"))
            reason = reason or metadata.get(b"reason", b"").decode()
            cut += int(metadata.get(b"cut", b"0"))
            chats += int(metadata.get(b"chats", b"0"))
            here = metadata.get(b"kind", b"").decode()
            if kind and here and here != kind:
                raise DataError(f"data source {name!r}: its format returns {here} for some rows and {kind} for others")
            kind = kind or here
            column = batch.column(0)
            if limit is not None:
                column = column.slice(0, max(0, limit - count))
            values = column.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
            if file is None and len(column):
                # Examples also contain separators and numbers that are not tokens.
                narrow = vocabulary is not None and vocabulary <= NARROW and kind in ("", "tokens")
                file = stack.enter_context(TokenWriter(folder, index, narrow))
            if file is not None:
                file.write(values)
            digest.update(values.data)
            lengths.append(column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64))
            targets.append(_targets(values, lengths[-1]))
            own.append(_hashes(values, lengths[-1]))
            count += len(column)
            if limit is not None and count >= limit:
                break
    if count == 0 or file is None:
        why = f"all {skipped} rows were skipped, the first: {reason}" if skipped else "it contains no documents"
        raise DataError(f"data source {name!r} is empty: {why}")
    own_hashes = np.concatenate(own)
    hashes.append(own_hashes)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    np.save(folder / f"offsets-{index}.npy", offsets)
    np.save(folder / f"targets-{index}.npy", np.concatenate(targets))
    digest.update(offsets.tobytes())
    return {
        "name": name,
        "documents": count,
        "tokens": int(offsets[-1]),
        "skipped": skipped,
        "first_skipped": reason,
        "cut": cut,
        "kind": kind or "tokens",
        "chats": chats,
        "duplicates": _duplicates(own_hashes),
        **file.described,
    }


def _hashes(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the hashes (n,) uint64 of the documents, whose tokens are concatenated in `values`."""
    edges = np.concatenate([[0], np.cumsum(lengths)])
    digests = (hashlib.blake2b(values[a:b].tobytes(), digest_size=8).digest() for a, b in itertools.pairwise(edges))
    return np.frombuffer(b"".join(digests), np.uint64)


def _duplicates(hashes: np.ndarray) -> int:
    """Returns the number of documents that repeat an earlier one, by their hashes."""
    return len(hashes) - len(np.unique(hashes))


def _targets(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the number of trained tokens (n,) of each document, its first token excluded.

    Args:
        values: Encoded tokens of all documents, concatenated. Tokens that are not trained on are negative.
        lengths: (n,) document lengths in tokens.
    """
    ends = np.cumsum(lengths)
    trained = np.concatenate([[0], np.cumsum(values >= 0)])
    starts = ends - lengths
    # An empty document has no first token.
    first = np.zeros(len(lengths), np.int64)
    first[lengths > 0] = values[starts[lengths > 0]] >= 0
    targets: np.ndarray = trained[ends] - trained[starts] - first
    return targets
