"""Copies of a run's checkpoints in remote storage, which survive the loss of the machines.

The manifest is uploaded last and removed first, so a partial copy never has one and is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from myllm_ray.common.files import published
from myllm_ray.common.remote import open_storage
from myllm_ray.common.secrets import mask_text
from myllm_ray.config.errors import CheckpointError, ConfigError

_MANIFEST = "manifest.json"


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
        """Uploads a complete checkpoint and replaces an existing copy of the same name.

        Raises:
            CheckpointError: the upload failed. The partial copy has no manifest and is ignored.
        """
        target = f"{self._root}/{checkpoint.name}"
        with self._clearly("written"):
            if self._storage.exists(target):
                self._storage.rm(target, recursive=True)
            self._storage.makedirs(target, exist_ok=True)
            # Object stores have no atomic rename of folders, so the order of the files marks a complete copy.
            names = sorted(p.name for p in checkpoint.iterdir() if p.name != _MANIFEST)
            for name in [*names, _MANIFEST]:
                self._storage.put_file(str(checkpoint / name), f"{target}/{name}")

    def names(self) -> list[str]:
        """Returns the names of the stored checkpoints that have a manifest, oldest first."""
        with self._clearly("read"):
            self._storage.invalidate_cache()  # the file system caches listings, and another process may have written
            if not self._storage.exists(self._root):
                return []
            folders = [
                p for p in self._storage.ls(self._root, detail=False) if PurePosixPath(p).name.startswith("step-")
            ]
            return sorted(
                PurePosixPath(p).name for p in folders if self._storage.exists(f"{p.rstrip('/')}/{_MANIFEST}")
            )

    def pull(self, name: str, folder: Path) -> Path:
        """Downloads a checkpoint into a folder and returns its path there. The caller verifies it.

        The path exists only after the download is complete; an existing checkpoint of the same name is replaced.
        """
        with published(folder / name, existing="replace") as beside:
            beside.mkdir(parents=True)
            with self._clearly("read"):
                for path in self._storage.ls(f"{self._root}/{name}", detail=False):
                    self._storage.get_file(path, str(beside / PurePosixPath(path).name))
        return folder / name

    def remove(self, name: str) -> None:
        """Removes a checkpoint, the manifest first: a partially removed checkpoint must not look complete."""
        with self._clearly("written"):
            self._storage.rm_file(f"{self._root}/{name}/{_MANIFEST}")
            self._storage.rm(f"{self._root}/{name}", recursive=True)

    @contextmanager
    def _clearly(self, what: str) -> Iterator[None]:
        """Turns any error in the block into a CheckpointError of one line, with secrets in the URL masked."""
        try:
            yield
        except Exception as error:  # each file system raises its own types of exceptions
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise CheckpointError(mask_text(f"checkpoint.mirror: {self.url} can't be {what}: {reason}")) from None
