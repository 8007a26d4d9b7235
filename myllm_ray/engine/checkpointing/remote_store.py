"""Copies of a run's checkpoints and records in remote storage, which survive the loss of the machines.

    <url>/step-00000100/    a checkpoint
    <url>/records/          ledger.jsonl, metrics.jsonl and the other records of the run, at the last checkpoint

The manifest is uploaded last and removed first, so a partial copy never has one and is ignored. The records are
uploaded before it, so they contain every step of each complete checkpoint. They are downloaded before a checkpoint, so
that a download that was interrupted is made again.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TypeVar

from myllm_ray.common.files import published, read_jsonl
from myllm_ray.common.remote import open_storage, patiently
from myllm_ray.config.errors import CheckpointError, ConfigError
from myllm_ray.engine.checkpointing.verification import MANIFEST

_LEDGER = "ledger.jsonl"
_RECORDS = ("*.jsonl", "environment.json", "data_summary.json", "budget.json")
"""The files of a run's folder that are its records. `config.yaml` is written again when the run resumes."""
_TRANSFERS = 4
"""Number of files that are transferred at the same time."""
_REMOVALS = 5
"""How often the removal of a folder is tried. Files that are left have no manifest, so nothing reads them."""
Result = TypeVar("Result")


class RemoteCheckpointStore:
    """Checkpoints in the folders `<url>/step-00000100/` of a remote file system.

    Args:
        url: the parent folder.

    Raises:
        ConfigError: the URL is invalid, or the library for its file system is not installed.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._storage, self._root = open_storage(self.url, "checkpoint.mirror", ConfigError)

    def push(self, checkpoint: Path) -> None:
        """Uploads a complete checkpoint of a run, with the run's records, and replaces an existing copy.

        Args:
            checkpoint: the folder `<run>/checkpoints/step-…`.

        Raises:
            CheckpointError: the upload failed. The partial copy has no manifest and is ignored.
        """
        target, run = f"{self._root}/{checkpoint.name}", checkpoint.parent.parent
        names = sorted(p.name for p in checkpoint.iterdir() if p.name != MANIFEST)
        records = sorted(path for pattern in _RECORDS for path in run.glob(pattern))

        def upload() -> None:
            if self._storage.exists(target):
                self._remove(target)
            self._storage.makedirs(target, exist_ok=True)
            self._storage.makedirs(f"{self._root}/records", exist_ok=True)
            self._transfer(
                self._storage.put_file,
                [(str(checkpoint / name), f"{target}/{name}") for name in names]
                + [(str(path), f"{self._root}/records/{path.name}") for path in records],
            )
            # Object stores have no atomic rename of folders, so the order of the files marks a complete copy.
            self._storage.put_file(str(checkpoint / MANIFEST), f"{target}/{MANIFEST}")

        self._patiently("written", upload)

    def names(self) -> list[str]:
        """Returns the names of the stored checkpoints that have a manifest, oldest first."""

        def find() -> list[str]:
            self._storage.invalidate_cache()  # the file system caches listings, and another process may have written
            if not self._storage.exists(self._root):
                return []
            folders = [
                p for p in self._storage.ls(self._root, detail=False) if PurePosixPath(p).name.startswith("step-")
            ]
            return sorted(PurePosixPath(p).name for p in folders if self._storage.exists(f"{p.rstrip('/')}/{MANIFEST}"))

        return self._patiently("read", find)

    def pull(self, name: str, folder: Path) -> Path:
        """Downloads a checkpoint and returns its path, after the run's records if those in its folder do not reach it.

        A folder on another machine may have no records, or those of an earlier time. The caller verifies the
        checkpoint. It exists only after everything is downloaded; an existing one of the same name is replaced.

        Args:
            name: the name of the checkpoint.
            folder: the folder `<run>/checkpoints`.
        """
        run, step = folder.parent, int(name.removeprefix("step-"))
        if max((int(row.get("step", 0)) for row in read_jsonl(run / _LEDGER)), default=0) < step:
            self._patiently("read", lambda: self._download_records(run))
        self._patiently("read", lambda: self._download(f"{self._root}/{name}", folder / name))
        return folder / name

    def remove(self, name: str) -> None:
        """Removes a checkpoint, the manifest first: a partially removed checkpoint must not look complete."""
        self._patiently("written", lambda: self._remove(f"{self._root}/{name}"))

    def remove_records(self) -> None:
        """Removes the records of a run that is removed or replaced."""
        self._patiently("written", lambda: self._remove(f"{self._root}/records"))

    def _remove(self, folder: str) -> None:
        # A client repeats a request whose answer was lost, and then finds nothing to remove.
        with suppress(FileNotFoundError):
            if self._storage.exists(f"{folder}/{MANIFEST}"):
                self._storage.rm_file(f"{folder}/{MANIFEST}")
        for _ in range(_REMOVALS):
            if not self._storage.exists(folder):
                return
            with suppress(FileNotFoundError):
                self._storage.rm(folder, recursive=True)

    def _download(self, source: str, target: Path) -> None:
        with published(target, existing="replace") as beside:
            beside.mkdir(parents=True)
            paths = self._storage.ls(source, detail=False)
            self._transfer(self._storage.get_file, [(path, str(beside / PurePosixPath(path).name)) for path in paths])

    def _download_records(self, run: Path) -> None:
        if not self._storage.exists(f"{self._root}/records"):  # of a version that uploaded no records
            return
        run.mkdir(parents=True, exist_ok=True)
        # The ledger last, because its steps decide whether the records are complete.
        for path in sorted(self._storage.ls(f"{self._root}/records", detail=False), key=lambda p: p.endswith(_LEDGER)):
            with published(run / PurePosixPath(path).name, existing="replace") as beside:
                self._storage.get_file(path, str(beside))

    @staticmethod
    def _transfer(copy: Callable[[str, str], None], files: list[tuple[str, str]]) -> None:
        with ThreadPoolExecutor(_TRANSFERS) as pool:
            list(pool.map(lambda pair: copy(*pair), files))  # raises the first error

    def _patiently(self, what: str, operation: Callable[[], Result]) -> Result:
        """Calls an operation, again and again while the storage can't be reached, and returns its result.

        Raises:
            CheckpointError: any other error, or the time is over. One line, with secrets in the URL masked.
        """
        return patiently(operation, f"checkpoint.mirror: {self.url} can't be {what}", CheckpointError)
