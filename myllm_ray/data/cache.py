"""The folder of prepared data: on a disk that all nodes share, or at a URL, with a local copy of what is read.

With a URL, a process reads and writes a local folder. What other nodes need (tokenizer, token stores, tables of a
reference model) is uploaded from there, and downloaded where it is missing. Plans are computed on each node, because
they follow from the config. The tokens of a store are read in blocks; see `byte_ranges.py`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from myllm_ray.common.files import published
from myllm_ray.common.remote import open_storage, patiently
from myllm_ray.config.errors import DataError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.byte_ranges import Staging

_TRANSFERS = 4
"""Number of files that are transferred at the same time."""
_COMPLETE = ".complete"
"""Name of the file that marks a folder as complete. It is uploaded last."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class DataCache:
    """The folder of prepared data.

    Attributes:
        folder: The folder; the local copy if there is a URL.
        url: The URL, without a slash at the end. None: `folder` is shared.
        staging: The local folder of blocks of remote files; None: they are not kept.
    """

    folder: Path
    url: str | None = None
    staging: Staging | None = None

    @staticmethod
    def of(config: TrainerConfig) -> DataCache:
        """Returns the cache of a config."""
        data = config.data
        cache = (data.cache or str(Path(config.run.storage) / ".data")).removeprefix("file://")
        local = Path(data.local_cache or Path(tempfile.gettempdir()) / f"myllm_ray-{os.getuid()}").expanduser()
        staging = Staging(local / "blocks", int(data.local_cache_gb * 10**9))
        if "://" not in cache:
            return DataCache(Path(cache), None, staging)
        url = cache.rstrip("/")
        return DataCache(local / hashlib.sha256(url.encode()).hexdigest()[:16], url, staging)

    def remote(self, path: Path) -> str:
        """Returns the URL of a file or folder in `folder`."""
        return f"{self.url}/{path.relative_to(self.folder).as_posix()}"

    def mark(self, folder: Path) -> str | None:
        """Returns what marks a folder at the URL as complete; None if it is not. Without a URL, every folder is."""
        if self.url is None:
            return ""

        def read(storage: Any, root: str) -> str | None:
            storage.invalidate_cache()  # another process may have written
            path = f"{root}/{_COMPLETE}"
            return storage.cat_file(path).decode() if storage.exists(path) else None

        return self._transfer(self.remote(folder), "read", read)

    def upload(self, source: Path, target: Path) -> None:
        """Uploads the files of a folder, and then marks it as complete. Does nothing without a URL.

        Args:
            source: The folder.
            target: Its final path in `self.folder`.

        Raises:
            DataError: The storage can't be written.
        """
        if self.url is None:
            return
        mark = uuid.uuid4().hex
        (source / _COMPLETE).write_text(mark)
        names = sorted(p.name for p in source.iterdir() if p.is_file() and p.name != _COMPLETE)

        def copy(storage: Any, root: str) -> None:
            storage.makedirs(root, exist_ok=True)
            with ThreadPoolExecutor(_TRANSFERS) as pool:
                list(pool.map(lambda name: storage.put_file(str(source / name), f"{root}/{name}"), names))
            storage.put_file(str(source / _COMPLETE), f"{root}/{_COMPLETE}")

        self._transfer(self.remote(target), "written", copy)

    def upload_file(self, path: Path, target: Path) -> None:
        """Uploads a file to the place of `target`, a path in `self.folder`. Does nothing without a URL."""
        if self.url is None:
            return

        def copy(storage: Any, root: str) -> None:
            storage.makedirs(root, exist_ok=True)
            storage.put_file(str(path), f"{root}/{target.name}")

        self._transfer(self.remote(target.parent), "written", copy)

    def fetch(self, folder: Path, leave_out: Callable[[str], bool] = lambda name: False) -> bool:
        """Makes the local folder the same as the complete one at the URL. Returns whether there is one.

        Without a URL, returns whether the folder exists.

        Args:
            folder: A folder in `self.folder`.
            leave_out: Whether a file of the given name is not downloaded.

        Raises:
            DataError: The storage can't be read, or the folder can't be written.
        """
        if self.url is None:
            return folder.exists()
        mark, own = self.mark(folder), folder / _COMPLETE
        if mark is not None and own.exists() and own.read_text() == mark:
            return True
        shutil.rmtree(folder, ignore_errors=True)  # of a store that was removed or replaced
        if mark is None:
            return False

        def copy(storage: Any, root: str) -> None:
            paths = [p for p in storage.ls(root, detail=False) if not leave_out(PurePosixPath(p).name)]
            with published(folder, existing="keep") as beside:
                beside.mkdir(parents=True)
                with ThreadPoolExecutor(_TRANSFERS) as pool:
                    list(pool.map(lambda p: storage.get_file(p, str(beside / PurePosixPath(p).name)), paths))

        self._transfer(self.remote(folder), "read", copy)
        return True

    def fetch_file(self, path: Path) -> None:
        """Downloads a file that is missing on this node, if it is at the URL."""
        if path.exists() or self.url is None:
            return

        def copy(storage: Any, root: str) -> None:
            storage.invalidate_cache()
            if storage.exists(root):
                path.parent.mkdir(parents=True, exist_ok=True)
                with published(path, existing="replace") as beside:
                    storage.get_file(root, str(beside))

        self._transfer(self.remote(path), "read", copy)

    def _transfer(self, url: str, what: str, operation: Callable[[Any, str], Result]) -> Result:
        storage, root = open_storage(url, "data.cache", DataError)
        return patiently(lambda: operation(storage, root), f"data.cache: {url} can't be {what}", DataError)
