"""Checkpoints in one format for all backends and world sizes, written atomically and read without pickle.

`<folder>/step-00000100/` contains safetensors files and `manifest.json`. Each rank writes its shards to files of its
own. The manifest is written last. It contains the step, the position in the data, the config, versions, names and
shapes of all tensors, a checksum per file, and the index: which file holds which part of a tensor. A directory without
a valid manifest is not a checkpoint and is ignored.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.common import distributed, tensor_files
from myllm_ray.config.errors import CheckpointError
from myllm_ray.engine.checkpointing.files import own_part
from myllm_ray.engine.checkpointing.remote_store import RemoteCheckpointStore
from myllm_ray.engine.checkpointing.verification import (
    FORMAT_VERSION,
    MANIFEST,
    find_damage,
    read_manifest,
    reason,
    set_aside,
    verify,
)
from myllm_ray.engine.checkpointing.writer import BackgroundWriter, write

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
        manifest, damage = verify(folder)
        if damage is not None:
            raise CheckpointError(damage)
        return manifest

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
        problem = None
        try:
            _read(folder, manifest, tensors)
        except CheckpointError as error:
            problem = str(error)
        # Reading has no collectives, so the others have to hear of a rank that fails.
        problem = next((p for p in distributed.gather_objects(problem) if p), None)
        if problem:
            raise CheckpointError(problem)

    def load_model(self, folder: Path, model: nn.Module) -> None:
        """Copies only the weights into a model of this process, for sampling, export or evaluation."""
        named = [*model.named_parameters(), *model.named_buffers()]
        manifest = read_manifest(folder)
        known = manifest["tensors"]
        _read(folder, manifest, {f"model.{name}": tensor.data for name, tensor in named if f"model.{name}" in known})

    def latest(self, contents: bool = True) -> Path | None:
        """Returns the newest complete checkpoint, or None.

        A checkpoint that is missing or damaged in the folder is fetched from the mirror. Damaged checkpoints are logged
        and skipped.

        Args:
            contents: whether to verify the checksums of its files. A run that resumes verifies them later, in parallel.
                Those of a checkpoint that was just fetched are verified in any case.
        """
        here = {p.name: p for p in self.all()}
        there = set(self.remote.names()) if self.remote is not None else set()
        # Names are padded with zeros, so their alphabetical order is the order of the steps.
        for name in sorted({*here, *there}, reverse=True):
            damage = find_damage(here[name], contents) if name in here else "missing"
            if damage is None:
                return here[name]
            if self.remote is not None and name in there:
                path = self.remote.pull(name, self.folder)
                damage = find_damage(path)
                if damage is None:
                    return path
                with suppress(CheckpointError):  # or its structure would be enough the next time
                    set_aside(path)
            log.warning("checkpoint skipped: %s", damage)
        return None

    def all(self) -> list[Path]:
        """Returns the checkpoint directories that have a manifest, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _NAME.match(p.name) and (p / MANIFEST).is_file())

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
    manifest = read_manifest(folder)
    tensors = {name: torch.empty(shape) for name, shape in manifest["tensors"].items() if wanted(name)}
    _read(folder, manifest, tensors)
    return tensors


def read_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors in place with those of a checkpoint that have their names, in this process.

    Raises:
        CheckpointError: The files can't be read.
    """
    _read(folder, read_manifest(folder), tensors)


def _read(folder: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Fills tensors in place: each rank reads its own shards, without collectives.

    Raises:
        CheckpointError: the files can't be read.
    """
    try:
        tensor_files.fill(folder, tensor_files.index_of(folder, manifest), tensors)
    except Exception as error:  # safetensors, torch and file systems raise different types
        raise CheckpointError(f"{folder} can't be read: {reason(error)}") from None


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
