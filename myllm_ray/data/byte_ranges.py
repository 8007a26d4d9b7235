"""Random access to byte ranges of files, on disk or at a URL."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any, Protocol

from fsspec.core import url_to_fs

from myllm_ray.config.errors import DataError

OPEN_FILES = 64
"""Largest number of files that one `ByteRanges` keeps open."""


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


class _Remote:
    def __init__(self, path: str):
        self._filesystem, self._path = url_to_fs(path)

    def read(self, first: int, count: int) -> bytes:
        return bytes(self._filesystem.cat_file(self._path, start=first, end=first + count))

    def close(self) -> None:
        pass


class ByteRanges:
    """Reads ranges of files. It keeps the files open that were used last. Not for several threads."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, _File] = OrderedDict()

    def read(self, path: str, first: int, count: int, version: Any = None) -> bytes:
        """Returns bytes [first, first + count) of a file.

        Args:
            path: Path or URL.
            first, count: The range.
            version: `version_of` the file when it was prepared. It is compared when the file is opened. None: unknown.

        Raises:
            DataError: The file can't be read, has changed, or is truncated.
        """
        try:
            file = self._files.get(path)
            if file is None:
                if version is not None and tuple(version) != version_of(path):
                    raise DataError(f"{path} has changed since the data was prepared; start the run again")
                file = self._files[path] = _Remote(path) if "://" in path else _Local(path)
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)[1].close()
            self._files.move_to_end(path)
            found = file.read(first, count)
        except OSError as error:
            raise DataError(f"{path} can't be read: {error}") from None
        if len(found) != count:
            raise DataError(f"{path} is shorter than its index")
        return found

    def close(self) -> None:
        """Closes all files."""
        while self._files:
            self._files.popitem()[1].close()
