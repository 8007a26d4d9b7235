"""Checkpoints: one format whatever wrote it, whole or absent, never unpickled.

`<folder>/step-00000100/` holds safetensors files, written by torch.distributed.checkpoint (each rank writes its shards; a
header says which part of which tensor they are), and `manifest.json`, written last: step, place in the data, config,
versions, names and shapes of all tensors, and a checksum per file. A directory without a valid manifest does not exist.
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
from myllm_ray.engine.checkpoint_writer import BackgroundWriter, manifest_checksum, own_part, reason, sha256, write
from myllm_ray.engine.mirror import Mirror

FORMAT_VERSION = 2
log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})$")
_PACKAGES = ("myllm_ray", "torch", "transformers", "ray", "safetensors", "numpy")


class CheckpointManager:
    """Writes, checks, finds, loads and thins out checkpoints. When to save is the engine's business.

    Args:
        model: kept for runs wired by hand; the tensors come from the accelerator.
        folder: where the `step-…` directories stand. None: `checkpoints` in the current folder, and the engine writes there only what it is
            asked for: by `checkpoint` in its config, by a callback, or by `save`.
        keep_last: how many of the newest to keep; None keeps all.
        keep_best: name of a metric; the checkpoint with its lowest value is kept as well.
        background: write from a copy while training goes on; one at a time.
        keep_every: the checkpoints whose step is a multiple of this are kept as well.
        mirror: URL of a folder where the same checkpoints are to stand, too.
    """

    def __init__(self, model: nn.Module | None = None, folder: str | Path | None = None, keep_last: int | None = 2,
                 keep_best: str | None = None, background: bool = False, keep_every: int | None = None,
                 mirror: str | None = None):
        self.model = model
        self.folder, self.on_request = Path("checkpoints" if folder is None else folder), folder is None
        self.keep_last, self.keep_best, self.keep_every = keep_last, keep_best, keep_every
        self.background = background
        self.mirror = Mirror(mirror) if mirror else None
        self._background = BackgroundWriter() if background else None
        self._committed: list[Path] = []

    def save(self, step: int, tensors: dict[str, Tensor], manifest: dict[str, Any], copied: bool = False) -> Path:
        """Write a checkpoint: all ranks call this, with their shards of the same tensors.

        Args:
            step: optimizer steps done.
            tensors: by fully-qualified name; sharded ones are DTensors.
            manifest: what else must be known to go on (JSON).
            copied: the tensors are copies, which nobody changes while they are written.

        Raises:
            CheckpointError: it can't be written (in the background: the one before); nothing half-written is left, earlier
                checkpoints stay.
        """
        final = self.folder / f"step-{step:08d}"
        shapes = {name: list(t.shape) for name, t in tensors.items()}
        manifest = {"format": FORMAT_VERSION, "step": step, **manifest, "tensors": shapes, "versions": versions()}

        def job(part: dict[str, Tensor], group: Any) -> None:
            write(final, part, manifest, group)
            problem = self._settle(final) if distributed.is_main() else None
            problem = next((p for p in distributed.gather_objects(problem, group) if p), None)
            if problem:
                raise CheckpointError(problem)
            self._committed.append(final)

        if self._background is None:
            job(own_part(tensors), None)
            distributed.barrier()
        else:
            self._background.start(job, own_part(tensors), copied)
        return final

    def make_ready(self, tensors: dict[str, Tensor]) -> None:
        """Before the first step: get the memory that writing in the background needs. Nothing to do for writing at once."""
        if self._background is not None:
            self._background.make_ready(own_part(tensors))

    @property
    def failed(self) -> bool:
        """Whether writing in the background failed, here; `wait` then says how."""
        return self._background is not None and self._background.failed

    def wait(self, seconds: float | None = None) -> None:
        """Until no checkpoint is being written, or for so many seconds.

        Raises:
            CheckpointError: the last one failed.
        """
        if self._background is not None:
            self._background.wait(seconds)

    def committed(self) -> list[Path]:
        """Checkpoints that became whole since the last call, oldest first."""
        done, self._committed = self._committed, []
        return done

    def load(self, folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Copy a checkpoint into live tensors, whatever backend and world size wrote it; returns its manifest.

        Raises:
            CheckpointError: the directory is not a whole checkpoint, or its tensors are others than these.
        """
        manifest, problem = distributed.from_main(self._read_on_main(folder))
        if problem:
            raise CheckpointError(problem)
        saved, now = manifest["tensors"], {name: list(t.shape) for name, t in tensors.items()}
        if saved != now:
            raise CheckpointError(f"{folder} does not fit: {_difference(saved, now)}")
        _read(folder, tensors, alone=not distributed.is_distributed())
        return dict(manifest)

    def load_model(self, folder: Path, model: nn.Module) -> None:
        """Copy only the weights into a model of this process: to sample, export or evaluate."""
        named = [*model.named_parameters(), *model.named_buffers()]
        known = read_manifest(folder)["tensors"]
        tensors = {f"model.{name}": tensor.data for name, tensor in named if f"model.{name}" in known}
        _read(folder, tensors)

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole, fetched from the mirror where it is missing here; damaged ones are named and
        passed over."""
        here = {p.name: p for p in self.all()}
        there = set(self.mirror.names()) if self.mirror is not None else set()
        for name in sorted({*here, *there}, reverse=True):
            if name in here and find_damage(here[name]) is None:
                return here[name]
            path = self.mirror.pull(name, self.folder) if self.mirror is not None and name in there else here[name]
            damage = find_damage(path)
            if damage is None:
                return path
            log.warning("passed over: %s", damage)
        return None

    def all(self) -> list[Path]:
        """Checkpoint directories with a manifest, oldest first."""
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
        """Once a checkpoint is whole: copy it to its second home, and remove what is not kept, here and there."""
        try:
            if self.mirror is not None:
                self.mirror.push(final)
            for path in self.superfluous():
                shutil.rmtree(path)
            if self.mirror is not None:
                kept = {p.name for p in self.all()}
                for name in self.mirror.names():
                    if name not in kept:
                        self.mirror.remove(name)
        except (CheckpointError, OSError) as error:
            return str(error)
        return None

    def superfluous(self) -> list[Path]:
        """Checkpoints that `keep_last`, `keep_best` and `keep_every` do not ask for."""
        everything = self.all()
        if self.keep_last is None:
            return []
        kept = {*everything[-self.keep_last :], self.best()}
        return [p for p in everything if p not in kept and not (self.keep_every and step_of(p) % self.keep_every == 0)]

    def best(self) -> Path | None:
        """The checkpoint with the lowest finite value of the metric `keep_best`."""
        if not self.keep_best:
            return None
        scored = []
        for path in self.all():
            # A damaged one is nobody's best, nor one whose metrics are no mapping or whose value is no number.
            with suppress(CheckpointError, LookupError, TypeError, ValueError, OverflowError):
                value = float(read_manifest(path)["metrics"][self.keep_best])
                if math.isfinite(value):
                    scored.append((value, path))
        return min(scored)[1] if scored else None


def step_of(folder: Path) -> int:
    """The step that a directory `step-00000100` is named after."""
    return int(folder.name.removeprefix("step-"))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, in this process, without a model."""
    tensors = {name: torch.empty(shape) for name, shape in read_manifest(folder)["tensors"].items()}
    _read(folder, tensors)
    return tensors


def _read(folder: Path, tensors: dict[str, Tensor], alone: bool = True) -> None:
    """Fill tensors from safetensors files; anything else that stands there is not looked at."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except (Exception, CheckpointException) as error:  # safetensors, torch and the file system have exceptions of their own
        if distributed.lost_a_peer(error):
            raise
        raise CheckpointError(f"{folder} can't be read: {reason(error)}") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        CheckpointError: there is no manifest, or it is damaged, or of another format.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{folder} is not a checkpoint: it has no valid manifest.json") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no valid manifest.json")
    if manifest["format"] != FORMAT_VERSION:
        raise CheckpointError(f"{folder}: checkpoint format {manifest['format']!r:.40}, this version reads {FORMAT_VERSION}")
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise CheckpointError(f"{folder}: manifest.json is damaged (its checksum differs)")
    return manifest


def find_damage(folder: Path) -> str | None:
    """Why a directory is not a whole checkpoint, or None: manifest there, and every file of the right size and checksum."""
    try:
        manifest = read_manifest(folder)
        for name, expected in manifest["files"].items():
            path = folder / name
            if Path(name).name != name:  # a manifest from elsewhere must not make us read outside its folder
                return f"{folder}: manifest.json names a file outside the checkpoint ({name[:80]!r})"
            if not path.is_file() or path.is_symlink():
                return f"{folder}: file {name} is missing"
            if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
                return f"{folder}: file {name} is damaged (its checksum differs)"
        for path in sorted(folder.glob("*.safetensors")):  # the reader looks at all of them
            if path.name not in manifest["files"]:
                return f"{folder}: file {path.name} does not belong to it"
            with safe_open(path, "pt"):
                pass
        dict(manifest["tensors"])
        Position(**manifest.get("position", {}))
        int(manifest["step"])
    except CheckpointError as error:
        return str(error)
    except SafetensorError as error:
        return f"{folder}: a file is no safetensors file: {reason(error)}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder} is not a checkpoint: its manifest.json is not as it should be"
    return None


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run computes."""
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
            was, is_now = saved.get(name, "not there"), now.get(name, "not there")
            return f"tensor {name} was {was}, now it is {is_now}; the model or the optimizer has changed"
    return "it has other tensors"
