"""Checkpoints in one format for all backends and world sizes, written atomically and read without pickle.

`<folder>/step-00000100/` contains safetensors files and `manifest.json`. torch.distributed.checkpoint writes the
safetensors files: each rank writes its shards, and the header of a file records which part of which tensor a shard is.
The manifest is written last. It contains the step, the position in the data, the config, versions, names and shapes of
all tensors, and a checksum per file. A directory without a valid manifest is not a checkpoint and is ignored.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import platform
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException

from myllm_ray.common import distributed
from myllm_ray.common.types import Position
from myllm_ray.config.errors import CheckpointError
from myllm_ray.engine.checkpointing.remote_store import RemoteCheckpointStore
from myllm_ray.engine.checkpointing.writer import BackgroundWriter, manifest_checksum, own_part, reason, sha256, write

FORMAT_VERSION = 2
log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})$")
_PACKAGES = ("myllm_ray", "torch", "transformers", "ray", "safetensors", "numpy")


class CheckpointManager:
    """Writes, verifies, finds and loads checkpoints, and removes old ones. The engine decides when to save.

    Args:
        model: kept for engines that are constructed manually; not used, the tensors come from the accelerator.
        folder: the parent of the `step-…` directories. None: `checkpoints` in the current folder; the engine then saves
            only on request: by `checkpoint` in its config, by a callback, or by a call of `save`.
        keep_last: number of the newest checkpoints to keep; None keeps all.
        keep_best: name of a metric; the checkpoint with its lowest value is kept in addition.
        background: write from a copy of the tensors while training continues, one checkpoint at a time.
        keep_every: checkpoints whose step is a multiple of this are kept in addition.
        mirror: URL of a folder that receives a copy of every kept checkpoint.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        folder: str | Path | None = None,
        keep_last: int | None = 2,
        keep_best: str | None = None,
        background: bool = False,
        keep_every: int | None = None,
        mirror: str | None = None,
    ):
        self.model = model
        self.folder, self.on_request = Path("checkpoints" if folder is None else folder), folder is None
        self.keep_last, self.keep_best, self.keep_every = keep_last, keep_best, keep_every
        self.background = background
        self.remote = RemoteCheckpointStore(mirror) if mirror else None
        self._background = BackgroundWriter() if background else None
        self._committed: list[Path] = []

    def save(self, step: int, tensors: dict[str, Tensor], manifest: dict[str, Any], copied: bool = False) -> Path:
        """Writes a checkpoint and returns its folder. Every rank calls this, with its shards of the same tensors.

        In the background mode the call waits for the previous checkpoint and returns when the tensors are copied.

        Args:
            step: number of completed optimizer steps.
            tensors: tensors by fully-qualified name; sharded ones are DTensors.
            manifest: other entries that a resumed run needs (JSON).
            copied: whether the tensors are copies already, which training does not change.

        Raises:
            CheckpointError: the checkpoint can't be written (in the background mode: the previous one). No partial
                checkpoint is left, and earlier checkpoints are kept.
        """
        final = self.folder / f"step-{step:08d}"
        shapes = {name: list(t.shape) for name, t in tensors.items()}
        manifest = {"format": FORMAT_VERSION, "step": step, **manifest, "tensors": shapes, "versions": versions()}

        def job(part: dict[str, Tensor], group: Any) -> None:
            write(final, part, manifest, group)
            # Rank 0 copies and removes files. Its failure is sent to all ranks, so that all of them raise the error.
            problem = self._settle(final) if distributed.is_main() else None
            problem = next((p for p in distributed.gather_objects(problem, group) if p), None)
            if problem:
                raise CheckpointError(problem)
            self._committed.append(final)

        if self._background is None:
            # In the training thread, so the main process group can be used.
            job(own_part(tensors), None)
            distributed.barrier()
        else:
            self._background.start(job, own_part(tensors), copied)
        return final

    def make_ready(self, tensors: dict[str, Tensor]) -> None:
        """Allocates the buffers of the background mode, before the first step. Does nothing in the other mode."""
        if self._background is not None:
            self._background.make_ready(own_part(tensors))

    @property
    def failed(self) -> bool:
        """Whether a background write failed on this rank; `wait` then raises the error."""
        return self._background is not None and self._background.failed

    def wait(self, seconds: float | None = None) -> None:
        """Waits until no checkpoint is being written.

        Args:
            seconds: the longest time to wait; None: without limit.

        Raises:
            CheckpointError: the last write failed.
        """
        if self._background is not None:
            self._background.wait(seconds)

    def committed(self) -> list[Path]:
        """Returns the checkpoints that were completed since the last call, oldest first."""
        done, self._committed = self._committed, []
        return done

    def load(self, folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Copies a checkpoint into existing tensors and returns its manifest. Every rank calls this.

        The backend and world size may differ from those that wrote the checkpoint.

        Args:
            folder: the checkpoint.
            tensors: tensors by fully-qualified name, filled in place; sharded ones are DTensors.

        Raises:
            CheckpointError: the checkpoint is incomplete or damaged, or names or shapes of its tensors differ.
        """
        manifest = self.verified(folder)
        self.fill(folder, manifest, tensors)
        return manifest

    def verified(self, folder: Path) -> dict[str, Any]:
        """Returns the manifest of a checkpoint after its checksums were verified. Every rank calls this.

        Raises:
            CheckpointError: the checkpoint is incomplete or damaged.
        """
        # One rank verifies the checksums: all ranks then raise the same error, and the files are hashed once.
        manifest, problem = distributed.from_main(self._read_on_main(folder))
        if problem:
            raise CheckpointError(problem)
        return dict(manifest)

    def fill(self, folder: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Copies a checkpoint into existing tensors, in place. Every rank calls this; see `load`.

        Args:
            folder: the checkpoint.
            manifest: the result of `verified`.
            tensors: tensors by fully-qualified name; sharded ones are DTensors.

        Raises:
            CheckpointError: the files can't be read, or names or shapes of the tensors differ.
        """
        # Names and shapes are global, not those of the shards, so this check gives the same result on every rank.
        now = {name: list(t.shape) for name, t in tensors.items()}
        # A run that no longer averages its weights (`ema`) leaves the average of the checkpoint out.
        saved = {n: s for n, s in manifest["tensors"].items() if n in now or not n.startswith("ema.")}
        if saved != now:
            raise CheckpointError(f"{folder} does not match this run: {_difference(saved, now)}")
        _read(folder, tensors, alone=not distributed.is_distributed())

    def load_model(self, folder: Path, model: nn.Module) -> None:
        """Copies only the weights into a model of this process, for sampling, export or evaluation."""
        named = [*model.named_parameters(), *model.named_buffers()]
        known = read_manifest(folder)["tensors"]
        tensors = {f"model.{name}": tensor.data for name, tensor in named if f"model.{name}" in known}
        _read(folder, tensors)

    def latest(self) -> Path | None:
        """Returns the newest complete checkpoint, or None.

        A checkpoint that is missing or damaged in the folder is fetched from the mirror. Damaged checkpoints are logged
        and skipped.
        """
        here = {p.name: p for p in self.all()}
        there = set(self.remote.names()) if self.remote is not None else set()
        # Names are padded with zeros, so their alphabetical order is the order of the steps.
        for name in sorted({*here, *there}, reverse=True):
            if name in here and find_damage(here[name]) is None:
                return here[name]
            fetched = self.remote if name in there else None
            path = fetched.pull(name, self.folder) if fetched is not None else here[name]
            damage = find_damage(path)
            if damage is None:
                if fetched is not None:
                    fetched.pull_records(path)
                return path
            log.warning("checkpoint skipped: %s", damage)
        return None

    def all(self) -> list[Path]:
        """Returns the checkpoint directories that have a manifest, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _NAME.match(p.name) and (p / "manifest.json").is_file())

    @staticmethod
    def _read_on_main(folder: Path) -> tuple[dict[str, Any], str | None]:
        if not distributed.is_main():
            return {}, None
        damage = find_damage(folder)
        return (read_manifest(folder), None) if damage is None else ({}, damage)

    def _settle(self, final: Path) -> str | None:
        """Copies a checkpoint to the mirror and removes those that are not kept; returns the error text, if any."""
        try:
            if self.remote is not None:
                self.remote.push(final)
            # After the copy: if the upload fails, no older checkpoint is lost, neither in the folder nor on the mirror.
            # Before the mirror is cleaned: it then keeps exactly what the folder keeps.
            for path in self.superfluous():
                shutil.rmtree(path)
            if self.remote is not None:
                kept = {p.name for p in self.all()}
                for name in self.remote.names():
                    if name not in kept:
                        self.remote.remove(name)
        except (CheckpointError, OSError) as error:
            return str(error)
        return None

    def superfluous(self) -> list[Path]:
        """Returns the checkpoints that none of `keep_last`, `keep_best` and `keep_every` keeps."""
        everything = self.all()
        if self.keep_last is None:
            return []
        kept = {*everything[-self.keep_last :], self.best()}
        return [p for p in everything if p not in kept and not (self.keep_every and step_of(p) % self.keep_every == 0)]

    def best(self) -> Path | None:
        """Returns the checkpoint with the lowest finite value of the metric `keep_best`, or None."""
        if not self.keep_best:
            return None
        scored = []
        for path in self.all():
            # A damaged manifest, or a metric that is missing or not a number, excludes the checkpoint without an error.
            with suppress(CheckpointError, LookupError, TypeError, ValueError, OverflowError):
                value = float(read_manifest(path)["metrics"][self.keep_best])
                if math.isfinite(value):
                    scored.append((value, path))
        return min(scored)[1] if scored else None


def step_of(folder: Path) -> int:
    """Returns the step in a directory name such as `step-00000100`."""
    return int(folder.name.removeprefix("step-"))


def read_tensors(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint, unsharded, in this process. No model is needed.

    Args:
        folder: the checkpoint.
        wanted: returns whether the tensor of a name is read; default: all.
    """
    shapes = read_manifest(folder)["tensors"]
    tensors = {name: torch.empty(shape) for name, shape in shapes.items() if wanted(name)}
    _read(folder, tensors)
    return tensors


def read_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors in place with those of a checkpoint that have their names, in this process.

    Raises:
        CheckpointError: The files can't be read.
    """
    _read(folder, tensors)


def _read(folder: Path, tensors: dict[str, Tensor], alone: bool = True) -> None:
    """Fills tensors in place from the safetensors files of a folder. Other files are not read.

    Args:
        alone: whether this process reads without collectives; else all ranks call this together.

    Raises:
        CheckpointError: the files can't be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except (
        Exception,
        CheckpointException,
    ) as error:  # safetensors, torch and file systems raise different types; CheckpointException is a BaseException
        if distributed.lost_a_peer(error):  # the files are not the cause
            raise
        raise CheckpointError(f"{folder} can't be read: {reason(error)}") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint. The files of the checkpoint are not verified.

    Raises:
        CheckpointError: the manifest is missing, damaged, or of another format version.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{folder} is not a checkpoint: it has no valid manifest.json") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no valid manifest.json")
    if manifest["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: checkpoint format {manifest['format']!r:.40}, this version reads {FORMAT_VERSION}"
        )
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise CheckpointError(f"{folder}: manifest.json is damaged (its checksum differs)")
    return manifest


def find_damage(folder: Path) -> str | None:
    """Returns why a directory is not a complete checkpoint, or None if it is one.

    In a complete checkpoint the manifest is valid and every file has the recorded size and SHA-256 checksum.
    """
    try:
        manifest = read_manifest(folder)
        for name, expected in manifest["files"].items():
            path = folder / name
            if Path(name).name != name:  # an untrusted manifest must not cause reads outside its folder
                return f"{folder}: manifest.json names a file outside the checkpoint ({name[:80]!r})"
            if not path.is_file() or path.is_symlink():  # a link could also lead outside the folder
                return f"{folder}: file {name} is missing"
            # The size first: it finds a truncated file without reading it.
            if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
                return f"{folder}: file {name} is damaged (its checksum differs)"
        for path in sorted(folder.glob("*.safetensors")):  # the reader reads all of them
            if path.name not in manifest["files"]:
                return f"{folder}: file {path.name} is not listed in manifest.json"
            with safe_open(path, "pt"):
                pass
        dict(manifest["tensors"])
        Position(**manifest.get("position", {}))
        int(manifest["step"])
    except CheckpointError as error:
        return str(error)
    except SafetensorError as error:
        return f"{folder}: a file is not a valid safetensors file: {reason(error)}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder} is not a checkpoint: its manifest.json is malformed"
    return None


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that determine what a run computes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _difference(saved: dict[str, Any], now: dict[str, Any]) -> str:
    for name in sorted(set(saved) | set(now)):
        if saved.get(name) != now.get(name):
            was, is_now = saved.get(name, "not present"), now.get(name, "not present")
            return f"tensor {name} was {was}, now it is {is_now}; the model or the optimizer has changed"
    return "its tensors differ"
