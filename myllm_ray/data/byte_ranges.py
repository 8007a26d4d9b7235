"""Random access to byte ranges of files, on disk or at a URL.

Remote files are read in blocks, which are kept in a local folder of bounded size that the processes of a node share.
"""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fsspec.core import url_to_fs

from myllm_ray.common.remote import patiently
from myllm_ray.config.errors import DataError

OPEN_FILES = 64
"""Largest number of files that one `ByteRanges` keeps open."""
BLOCK = 2**22
"""Number of bytes that are read from a remote file at once."""


def version_of(path: str) -> tuple[int, str]:
    """Returns the size and the modification time of a file, which identify its content.

    Raises:
        OSError: The file can't be read.
    """
    filesystem, inner = url_to_fs(path)
    info = filesystem.info(inner)
    return int(info.get("size") or 0), str(info.get("mtime") or info.get("LastModified") or info.get("etag"))


class _File(Protocol):
    def read(self, first: int, count: int) -> bytes: ...
    def close(self) -> None: ...


class _Local:
    def __init__(self, path: str):
        self._file = os.open(path, os.O_RDONLY)

    def read(self, first: int, count: int) -> bytes:
        found = os.pread(self._file, count, first)
        while len(found) < count and (more := os.pread(self._file, count - len(found), first + len(found))):
            found += more  # one call returns at most 2 GiB
        return found

    def close(self) -> None:
        os.close(self._file)


@dataclass(frozen=True)
class Staging:
    """The local folder of blocks of remote files.

    The processes of a node share it. One that adds a block removes those that were used least recently.

    Attributes:
        folder: The folder.
        limit: Largest size of the blocks, in bytes. It is exceeded by at most one block per process.
    """

    folder: Path
    limit: int

    def find(self, name: str) -> bytes | None:
        """Returns the block of the given name, or None."""
        with suppress(OSError):
            path = self.folder / name
            found = path.read_bytes()
            os.utime(path)
            return found
        return None

    def add(self, name: str, data: bytes) -> None:
        """Adds a block. If the folder can't be written, for example because the disk is full, nothing is added."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            own = self.folder / f"{name}.{uuid.uuid4().hex}.tmp"
            try:
                own.write_bytes(data)
                os.replace(own, self.folder / name)
            finally:
                own.unlink(missing_ok=True)
            self._shrink()

    def _shrink(self) -> None:
        files = []
        for entry in os.scandir(self.folder):
            with suppress(OSError):  # another process has removed it
                files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        excess = sum(size for _, size, _ in files) - self.limit
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            Path(path).unlink(missing_ok=True)
            excess -= size


class _Remote:
    """A remote file of known size.

    Args:
        url: The URL.
        size: Size in bytes.
        version: What distinguishes the content from an earlier one at the same URL.
        staging: The folder of blocks; None: blocks are not kept.
    """

    def __init__(self, url: str, size: int, version: Any, staging: Staging | None):
        self._url, self._size, self._staging = url, size, staging
        self._filesystem, self._path = url_to_fs(url)
        self._name = hashlib.sha256(f"{url} {size} {version} {BLOCK}".encode()).hexdigest()[:32]

    def read(self, first: int, count: int) -> bytes:
        numbers = range(first // BLOCK, -(-(first + count) // BLOCK))
        data = b"".join(self._block(number) for number in numbers)
        skipped = first - numbers.start * BLOCK
        return data[skipped : skipped + count]

    def _block(self, number: int) -> bytes:
        first, last = number * BLOCK, min((number + 1) * BLOCK, self._size)
        name = f"{self._name}-{number}"
        found = self._staging.find(name) if self._staging is not None else None
        if found is not None and len(found) == last - first:
            return found

        def fetch() -> bytes:
            data = bytes(self._filesystem.cat_file(self._path, start=first, end=last))
            if len(data) != last - first:
                raise ConnectionError(f"got {len(data)} bytes instead of {last - first}")
            return data

        found = patiently(fetch, f"{self._url} can't be read", DataError)
        if self._staging is not None:
            self._staging.add(name, found)
        return found

    def close(self) -> None:
        pass


class ByteRanges:
    """Reads ranges of files, for several threads. It keeps the files open that were used last.

    Args:
        staging: The folder of blocks of remote files; None: blocks are not kept.
    """

    def __init__(self, staging: Staging | None = None) -> None:
        self._staging = staging
        self._lock = threading.Lock()  # no thread closes a file from which another one reads
        self._files: OrderedDict[str, _File] = OrderedDict()

    def read(self, path: str, first: int, count: int, size: int, version: Any = None) -> bytes:
        """Returns bytes [first, first + count) of a file.

        Args:
            path: Path or URL.
            first, count: The range.
            size: Size of the file in bytes.
            version: `version_of` the file when it was prepared. It is compared when the file is opened. None: unknown.

        Raises:
            DataError: The file can't be read, has changed, or is truncated.
        """
        with self._lock:
            found = self._read(path, first, count, size, version)
        if len(found) != count:
            raise DataError(f"{path} is shorter than its index")
        return found

    def _read(self, path: str, first: int, count: int, size: int, version: Any) -> bytes:
        try:
            file = self._files.get(path)
            if file is None:
                if version is not None and tuple(version) != version_of(path):
                    raise DataError(f"{path} has changed since the data was prepared; start the run again")
                file = self._files[path] = self._opened(path, size, version)
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)[1].close()
            self._files.move_to_end(path)
            return file.read(first, count)
        except OSError as error:
            raise DataError(f"{path} can't be read: {error}") from None

    def _opened(self, path: str, size: int, version: Any) -> _File:
        return _Remote(path, size, version, self._staging) if "://" in path else _Local(path)

    def close(self) -> None:
        """Closes all files."""
        while self._files:
            self._files.popitem()[1].close()
