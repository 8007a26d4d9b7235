"""A second home of a run's checkpoints, behind a URL: what survives the machines. Files first, the manifest last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from myllm_ray.common.files import published
from myllm_ray.common.remote import open_storage
from myllm_ray.common.secrets import mask_text
from myllm_ray.config.errors import CheckpointError, ConfigError

_MANIFEST = "manifest.json"


class Mirror:
    """Checkpoints `<url>/step-00000100/`.

    Raises:
        ConfigError: the URL is none, or the library for it is not installed.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._storage, self._root = open_storage(self.url, "checkpoint.mirror", ConfigError)

    def push(self, checkpoint: Path) -> None:
        """Copy a whole checkpoint there.

        Raises:
            CheckpointError: it can't be written; without its manifest, what was copied does not count.
        """
        target = f"{self._root}/{checkpoint.name}"
        with self._clearly("written"):
            if self._storage.exists(target):
                self._storage.rm(target, recursive=True)
            self._storage.makedirs(target, exist_ok=True)
            names = sorted(p.name for p in checkpoint.iterdir() if p.name != _MANIFEST)
            for name in [*names, _MANIFEST]:
                self._storage.put_file(str(checkpoint / name), f"{target}/{name}")

    def names(self) -> list[str]:
        """Names of the checkpoints there that have a manifest, oldest first."""
        with self._clearly("read"):
            self._storage.invalidate_cache()
            if not self._storage.exists(self._root):
                return []
            folders = [p for p in self._storage.ls(self._root, detail=False) if PurePosixPath(p).name.startswith("step-")]
            return sorted(PurePosixPath(p).name for p in folders if self._storage.exists(f"{p.rstrip('/')}/{_MANIFEST}"))

    def pull(self, name: str, folder: Path) -> Path:
        """Copy a checkpoint from there into a folder; it appears when it is complete, and is still to be verified."""
        with published(folder / name, existing="replace") as beside:
            beside.mkdir(parents=True)
            with self._clearly("read"):
                for path in self._storage.ls(f"{self._root}/{name}", detail=False):
                    self._storage.get_file(path, str(beside / PurePosixPath(path).name))
        return folder / name

    def remove(self, name: str) -> None:
        """The manifest first: half a checkpoint must not look whole."""
        with self._clearly("written"):
            self._storage.rm_file(f"{self._root}/{name}/{_MANIFEST}")
            self._storage.rm(f"{self._root}/{name}", recursive=True)

    @contextmanager
    def _clearly(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each file system has exceptions of its own
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise CheckpointError(mask_text(f"checkpoint.mirror: {self.url} can't be {what}: {reason}")) from None
