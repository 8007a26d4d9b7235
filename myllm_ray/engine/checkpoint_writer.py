"""Writing one checkpoint: beside, manifest last, renamed when whole; at once, or in the background from a copy.

    training   | step | step | copy | step | step | step | step | copy | ...
    background |                    | write, checksums, rename |       | ...

Collectives of the background thread run in a process group of their own: the order of those in the main group is the
training's.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from myllm_ray.common import distributed
from myllm_ray.common.files import write_json
from myllm_ray.config.errors import CheckpointError

FILE_BYTES = 2**28
WAIT_SECONDS = 60.0
"""How long a run that fails waits for a checkpoint that is still being written."""


def write(final: Path, tensors: dict[str, Tensor], manifest: dict[str, Any], group: Any = None) -> None:
    """Write a checkpoint: all ranks call this, each with its own part of the tensors.

    Args:
        final: the directory `step-…`; it appears when the checkpoint is whole.
        tensors: this rank's part (`own_part`), by fully-qualified name; sharded ones are DTensors.
        manifest: everything but the checksums (JSON); `tensors`: the shapes of all.
        group: the process group to agree in; default: the main one.

    Raises:
        CheckpointError: on every rank, if it can't be written on any; nothing half-written is left.
    """
    beside = final.with_name(f".{final.name}.tmp")

    def together(step: Callable[[], Any]) -> list[Any]:
        """A step on every rank; its results by rank, or the first failure on all ranks."""
        try:
            outcome = {"result": step()}
        except (CheckpointException, OSError, RuntimeError) as error:
            if distributed.lost_a_peer(error):
                raise
            outcome = {"failed": reason(error)}
        outcomes = distributed.gather_objects(outcome, group)
        failed = next((o["failed"] for o in outcomes if "failed" in o), None)
        if failed is not None:
            if distributed.is_main():
                shutil.rmtree(beside, ignore_errors=True)
            raise CheckpointError(f"checkpoint {final}: can't be written: {failed}")
        return [o["result"] for o in outcomes]

    together(lambda: _start(beside) if distributed.is_main() else None)
    together(lambda: _write_tensors(beside, tensors, _files(manifest["tensors"]), group))
    sums = {name: found for part in together(lambda: _checksums(beside)) for name, found in part.items()}
    together(lambda: _publish(beside, final, {**manifest, "files": sums}) if distributed.is_main() else None)


class BackgroundWriter:
    """One checkpoint at a time, written by a thread from a copy of the tensors."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._group: Any = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, job: Callable[[dict[str, Tensor], Any], None], tensors: dict[str, Tensor], copied: bool = False) -> None:
        """Copy the tensors and let the thread do `job(copies, process group)`, after the one before has ended.

        Args:
            copied: the tensors are copies already, which nobody changes.

        Raises:
            CheckpointError: the one before failed.
        """
        self.wait()
        if distributed.is_distributed() and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=distributed.timeout())
        staged = tensors if copied else self._stage(tensors)

        def run() -> None:
            try:
                job(staged, self._group)
            except CheckpointError as error:
                self._error = error
            except Exception as error:  # kept for the main thread, which says it in one line
                lost = distributed.lost_a_peer(error)
                self._error = error if lost else CheckpointError(f"writing a checkpoint in the background failed: {reason(error)}")

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def make_ready(self, tensors: dict[str, Tensor]) -> None:
        """Get the memory for the copies, in the background: the first touch of it costs several times the copying."""
        self._buffers = {name: torch.empty(_local(t).shape, dtype=t.dtype, pin_memory=_local(t).is_cuda)
                         for name, t in tensors.items()}
        self._thread = threading.Thread(target=lambda: [b.zero_() for b in self._buffers.values()], daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def wait(self, seconds: float | None = None) -> None:
        """Until nothing is being written, or for so many seconds.

        Raises:
            CheckpointError: what was written last failed. Told once.
            RuntimeError: another rank is gone.
        """
        if self._thread is not None:
            self._thread.join(seconds)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU, in memory that is kept for the next time: fresh memory costs more than the copying."""
        staged: dict[str, Tensor] = {}
        on_gpu = False
        for name, tensor in tensors.items():
            local = _local(tensor)
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = self._buffers[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            buffer.copy_(local.detach(), non_blocking=True)
            on_gpu = on_gpu or local.is_cuda
            # By the constructor: `from_local` would carry the copy back to the mesh's device.
            staged[name] = DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer
        if on_gpu:
            torch.cuda.synchronize()
        return staged


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this rank writes: its shards, and of the tensors that every rank has whole, every so-manieth.

    Dealt out by size, largest first, to the rank that has least so far; the same on every rank.
    """
    load = [0] * distributed.world_size()
    mine: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        if isinstance(tensor, DTensor):
            mine[name] = tensor
            continue
        writer = load.index(min(load))
        load[writer] += tensor.numel() * tensor.element_size()
        if writer == distributed.rank():
            mine[name] = tensor
    return {name: mine[name] for name in tensors if name in mine}


def _start(beside: Path) -> None:
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)


def _files(shapes: dict[str, list[int]]) -> dict[str, int]:
    """Number of the file that each tensor goes to (of each rank's). safetensors makes a file in memory before it writes it."""
    numbers, size = {}, 0
    for name, shape in shapes.items():
        numbers[name] = 1 + size // FILE_BYTES
        size += 4 * math.prod(shape)
    # Counted without gaps: a tensor larger than a file would leave some.
    order = {number: place for place, number in enumerate(sorted(set(numbers.values())), 1)}
    return {name: order[number] for name, number in numbers.items()}


def _write_tensors(beside: Path, tensors: dict[str, Tensor], files: dict[str, int], group: Any) -> None:
    writer = HuggingFaceStorageWriter(str(beside), fqn_to_index_mapping=files, save_distributed=True)
    with warnings.catch_warnings():  # "assuming the intent is to save in a single process": it is
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=not distributed.is_distributed())


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Checksums of this rank's share of the files."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    mine = files[distributed.rank() :: distributed.world_size()]
    return {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in mine}


def _publish(beside: Path, final: Path, manifest: dict[str, Any]) -> None:
    manifest = json.loads(json.dumps(manifest))  # as it will be read
    write_json(beside / "manifest.json", {**manifest, "checksum": manifest_checksum(manifest)})
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Of all that a manifest says, but for its own checksum."""
    text = json.dumps({k: v for k, v in manifest.items() if k != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """What an error says, out of torch.distributed.checkpoint's wrapping, in one line."""
    inner = next(iter(getattr(error, "failures", {}).values()), None)
    text = str(inner[0] if isinstance(inner, tuple) else error)
    return " ".join(text.split())[:300]
