"""The on-disk store of prepared data: the tokens of all documents of all sources, with random access to documents.

The folder `<cache>/<key>` contains for each source i:

    tokens-<i>-<n>.bin    int32, the encoded tokens of the documents of shard n (see `tokenize.encode`), or
    tokens-<i>-<n>.u16    uint16, their ids, for small vocabularies; see `token_file.py`
    runs-<i>.npy          int64, the places of the tokens in the shards, see `shards.py`
    offsets-<i>.npy       int64, the start of each document, followed by the total
    targets-<i>.npy       int64, see `TokenStore.targets`

and one `meta.json`, which is written last. Files that are used in place have no copy in the folder. Stores of earlier
versions have one file of tokens per source. Documents are read with `pread`, so memory use does not grow with the data.
Rows are packed by document length only, so any row of any epoch is located without reading the preceding tokens.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from myllm_ray.config.errors import DataError
from myllm_ray.data.byte_ranges import ByteRanges
from myllm_ray.data.cache import DataCache
from myllm_ray.data.shards import ShardReader
from myllm_ray.data.token_file import TokenReader

_NAMED = 5
"""Maximum number of documents listed in a message."""


class TokenStore:
    """An opened store. Document numbers are consecutive over all sources, starting with source 0.

    Args:
        folder: Folder of the store.
        cache: The cache that the store is in. None: the folder has all files.
        base: Folder or URL of the shards. Default: as in the cache.
    """

    def __init__(self, folder: str | Path, cache: DataCache | None = None, base: str | None = None):
        self.folder, self.cache = Path(folder), cache or DataCache(Path(folder).parent)
        self._base = base or (str(self.folder) if self.cache.url is None else self.cache.remote(self.folder))
        self.meta: dict[str, Any] = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        self.sources: list[str] = [s["name"] for s in self.meta["sources"]]
        self._offsets = [self._mapped(f"offsets-{i}.npy") for i in range(len(self.sources))]
        self._targets = [self._mapped(f"targets-{i}.npy") for i in range(len(self.sources))]
        self._first = np.cumsum([0, *(len(o) - 1 for o in self._offsets)])
        self._files: dict[int, TokenReader | ShardReader] = {}
        self._ranges = ByteRanges(self.cache.staging)

    def _mapped(self, name: str) -> np.ndarray:
        # As a plain array, because indexing a `memmap` is slow. It still is a view of the file.
        return np.asarray(np.load(self.folder / name, mmap_mode="r"))

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
            DataError: The token file is truncated, or has changed.
        """
        source = int(self.source_of(np.asarray([document]))[0])
        local = document - int(self._first[source])
        first, last = (int(x) for x in self._offsets[source][local : local + 2])
        count = last - first - start if length is None else length
        return self.tokens_of(source, first + start, count)

    def places(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the sources (n,) of the given document numbers (n,), and their first tokens (n,) for `tokens_of`."""
        sources = self.source_of(documents) if len(self.sources) > 1 else np.zeros(len(documents), np.int64)
        return sources, self._looked_up(documents, lambda source, local: self._offsets[source][local])

    def tokens_of(self, source: int, first: int, count: int) -> np.ndarray:
        """Returns the encoded tokens [first, first + count) of a source, (count,) int32."""
        if source not in self._files:
            described = self.meta["sources"][source]
            self._files[source] = (
                ShardReader(self.folder, source, described["shards"], self._ranges, self._base)
                if "shards" in described
                else TokenReader(self.folder, source, described)
            )
        return self._files[source].read(first, count)

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            if isinstance(file, TokenReader):
                file.close()
        if hasattr(self, "_ranges"):
            self._ranges.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens its own file descriptors, and the folder may be another one on its node.
        return open_same, (str(self.folder), self.content_hash, self.cache)


def open_same(folder: str, content_hash: str, cache: DataCache | None = None) -> TokenStore:
    """Opens a store that another process has opened, possibly on another node.

    Args:
        folder: folder of the store.
        content_hash: `TokenStore.content_hash` in the other process.
        cache: The cache that the store is in. With a URL, what is missing on this node is downloaded: the index of the
            store, and its tokenizer.

    Raises:
        DataError: this node has no such folder, or it contains other data.
    """
    node = socket.gethostname()
    try:
        store = opened_store(folder, cache)
        if cache is not None and cache.url is not None:
            cache.fetch(cache.folder / Path(store.meta["tokenizer"]).name)
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


def opened_store(folder: str, cache: DataCache | None) -> TokenStore:
    """Opens a store; downloads its index first if it is at a URL and missing on this node."""
    if cache is not None:
        cache.fetch(Path(folder), is_shard)
    return TokenStore(folder, cache)


def is_shard(name: str) -> bool:
    """Returns whether a file of a store has tokens, so that it is not downloaded as a whole."""
    return name.startswith(("tokens-", "trained-"))


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
