"""Checkpoints: one format whatever wrote it, whole or absent, never unpickled.

`<folder>/step-00000100/` holds safetensors files, written by torch.distributed.checkpoint (each rank writes its shards; a
header says which part of which tensor they are), and `manifest.json`, written last: step, place in the data, config,
versions, names and shapes of all tensors, and a checksum per file. A directory without a valid manifest does not exist.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from myllm_ray.common import distributed
from myllm_ray.common.files import write_json
from myllm_ray.config.errors import CheckpointError

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{8})$")
_PACKAGES = ("myllm_ray", "torch", "transformers", "ray", "safetensors", "numpy")


class CheckpointManager:
    """Writes, checks, finds, loads and thins out checkpoints. When to save is the engine's business.

    Args:
        model: kept for runs wired by hand; the tensors come from the accelerator.
        folder: where the `step-…` directories stand.
        keep_last: how many of the newest to keep; None keeps all.
        keep_best: name of a metric; the checkpoint with its lowest value is kept as well.
    """

    def __init__(self, model: nn.Module | None = None, folder: str | Path = "checkpoints", keep_last: int | None = 2,
                 keep_best: str | None = None):
        self.model = model
        self.folder = Path(folder)
        self.keep_last, self.keep_best = keep_last, keep_best

    def save(self, step: int, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> Path:
        """Write a checkpoint: all ranks call this, with their shards of the same tensors.

        Args:
            step: optimizer steps done.
            tensors: by fully-qualified name; sharded ones are DTensors.
            manifest: what else must be known to go on (JSON).

        Raises:
            CheckpointError: it can't be written; nothing half-written is left, earlier checkpoints stay.
        """
        final = self.folder / f"step-{step:08d}"
        beside = self.folder / f".step-{step:08d}.tmp"
        problem = distributed.from_main(self._start(beside))
        if problem:
            raise CheckpointError(f"checkpoint {final}: can't be written: {problem}")
        try:
            writer = HuggingFaceStorageWriter(str(beside), save_distributed=True)
            with warnings.catch_warnings():  # "assuming the intent is to save in a single process": it is
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.save(tensors, storage_writer=writer, no_dist=not distributed.is_distributed())
        except (CheckpointException, OSError, RuntimeError) as error:
            distributed.barrier()
            if distributed.is_main():
                shutil.rmtree(beside, ignore_errors=True)
            raise CheckpointError(f"checkpoint {final}: can't be written: {_reason(error)}") from error
        sums = {k: v for part in distributed.gather_objects(self._checksums(beside)) for k, v in part.items()}
        if distributed.is_main():
            shapes = {name: list(t.shape) for name, t in tensors.items()}
            write_json(beside / "manifest.json", {"format": FORMAT_VERSION, "step": step, **manifest, "tensors": shapes,
                                                  "versions": versions(), "files": sums})
            if final.exists():
                shutil.rmtree(final)
            beside.rename(final)
            self._thin_out()
        distributed.barrier()
        return final

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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not distributed.is_distributed())
        return dict(manifest)

    def load_model(self, folder: Path, model: nn.Module) -> None:
        """Copy only the weights into a model of this process: to sample, export or evaluate."""
        named = [*model.named_parameters(), *model.named_buffers()]
        known = read_manifest(folder)["tensors"]
        tensors = {f"model.{name}": tensor.data for name, tensor in named if f"model.{name}" in known}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are passed over."""
        return next((p for p in reversed(self.all()) if find_damage(p) is None), None)

    def all(self) -> list[Path]:
        """Checkpoint directories with a manifest, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _NAME.match(p.name) and (p / "manifest.json").is_file())

    def _start(self, beside: Path) -> str | None:
        if not distributed.is_main():
            return None
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        except OSError as error:
            return _reason(error)
        return None

    @staticmethod
    def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
        """Checksums of this rank's share of the files."""
        files = sorted(p for p in folder.iterdir() if p.is_file())
        mine = files[distributed.rank() :: distributed.world_size()]
        return {p.name: {"sha256": _sha256(p), "bytes": p.stat().st_size} for p in mine}

    @staticmethod
    def _read_on_main(folder: Path) -> tuple[dict[str, Any], str | None]:
        if not distributed.is_main():
            return {}, None
        damage = find_damage(folder)
        return (read_manifest(folder), None) if damage is None else ({}, damage)

    def _thin_out(self) -> None:
        if self.keep_last is None:
            return
        everything = self.all()
        kept = set(everything[-self.keep_last :])
        best = self.best()
        for path in everything:
            if path not in kept and path != best:
                shutil.rmtree(path)

    def best(self) -> Path | None:
        """The checkpoint with the lowest value of the metric `keep_best`."""
        if not self.keep_best:
            return None
        scored = [(m["metrics"][self.keep_best], p) for p in self.all()
                  if self.keep_best in (m := read_manifest(p)).get("metrics", {})]
        return min(scored)[1] if scored else None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, in this process, without a model."""
    tensors = {name: torch.empty(shape) for name, shape in read_manifest(folder)["tensors"].items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def read_manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def find_damage(folder: Path) -> str | None:
    """Why a directory is not a whole checkpoint, or None: manifest there, and every file of the right size and checksum."""
    try:
        manifest = read_manifest(folder)
        files = manifest["files"]
        if manifest["format"] != FORMAT_VERSION:
            return f"{folder}: checkpoint format {manifest['format']}, this version reads {FORMAT_VERSION}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder} is not a checkpoint: it has no valid manifest.json"
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            return f"{folder}: file {name} is missing"
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            return f"{folder}: file {name} is damaged (its checksum differs)"
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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _difference(saved: dict[str, Any], now: dict[str, Any]) -> str:
    for name in sorted(set(saved) | set(now)):
        if saved.get(name) != now.get(name):
            was, is_now = saved.get(name, "not there"), now.get(name, "not there")
            return f"tensor {name} was {was}, now it is {is_now}; the model or the optimizer has changed"
    return "it has other tensors"


def _reason(error: BaseException) -> str:
    inner = next(iter(getattr(error, "failures", {}).values()), None)
    text = str(inner[0] if isinstance(inner, tuple) else error)
    return " ".join(text.split())[:300]
