"""Writes one checkpoint, synchronously or in a background thread from a copy of the tensors.

The files are written to a temporary folder next to the final one, the manifest last. The folder is renamed when it is
complete. In the background mode training stops only for the copy:

    training   | step | step | copy | step | step | step | step | copy | ...
    background |                    | write, checksums, rename |       | ...

Collectives of the background thread use a separate process group. In the main group they would interleave with the
collectives of training in an order that differs between ranks.
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

# Smaller than most checkpoints, so that writing a file needs little memory; see `_files`.
FILE_BYTES = 2**28
WAIT_SECONDS = 60.0
"""How long a run that fails waits for a checkpoint that is still being written, in seconds."""


def write(final: Path, tensors: dict[str, Tensor], manifest: dict[str, Any], group: Any = None) -> None:
    """Writes a checkpoint. Every rank calls this, with its own part of the tensors.

    Args:
        final: the directory `step-…`; it exists only after the checkpoint is complete.
        tensors: this rank's part (`own_part`), by fully-qualified name; sharded ones are DTensors.
        manifest: everything but the checksums (JSON); its entry `tensors` contains the shapes of all tensors.
        group: the process group of the collectives; default: the main one.

    Raises:
        CheckpointError: a rank can't write its part. It is raised on every rank, and no partial checkpoint is left.
        RuntimeError: a collective failed because another rank exited.
    """
    beside = final.with_name(f".{final.name}.tmp")

    def together(step: Callable[[], Any]) -> list[Any]:
        """Runs a step on every rank and returns the results by rank; raises the first failure on all ranks."""
        # A rank whose step fails must still enter the gather, or the other ranks would wait there until the timeout.
        try:
            outcome = {"result": step()}
        except (CheckpointException, OSError, RuntimeError) as error:
            if distributed.lost_a_peer(error):  # the gather would fail in the same way
                raise
            outcome = {"failed": reason(error)}
        outcomes = distributed.gather_objects(outcome, group)
        failed = next((o["failed"] for o in outcomes if "failed" in o), None)
        if failed is not None:
            if distributed.is_main():
                shutil.rmtree(beside, ignore_errors=True)
            raise CheckpointError(f"checkpoint {final}: can't be written: {failed}")
        return [o["result"] for o in outcomes]

    # Each step ends with a gather, so no rank writes before the folder exists, hashes before all files are complete, or
    # returns before the checkpoint is renamed.
    together(lambda: _start(beside) if distributed.is_main() else None)
    together(lambda: _write_tensors(beside, tensors, _files(manifest["tensors"]), group))
    sums = {name: found for part in together(lambda: _checksums(beside)) for name, found in part.items()}
    together(lambda: _publish(beside, final, {**manifest, "files": sums}) if distributed.is_main() else None)


class BackgroundWriter:
    """Writes checkpoints in a thread, one at a time, from a copy of the tensors."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._group: Any = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(
        self, job: Callable[[dict[str, Tensor], Any], None], tensors: dict[str, Tensor], copied: bool = False
    ) -> None:
        """Waits for the previous job, copies the tensors and starts `job(copies, process group)` in the thread.

        Args:
            job: writes the copies; its collectives use the given process group.
            tensors: this rank's part of the tensors, by name.
            copied: whether the tensors are copies already, which training does not change.

        Raises:
            CheckpointError: the previous job failed.
        """
        self.wait()  # the previous job reads the buffers that the next copy overwrites
        if distributed.is_distributed() and self._group is None:
            # Creating a group is a collective of the main group, so the training thread does it, not the background
            # thread. gloo, because the copies are on the CPU.
            self._group = dist.new_group(backend="gloo", timeout=distributed.timeout())
        staged = tensors if copied else self._stage(tensors)

        def run() -> None:
            try:
                job(staged, self._group)
            except CheckpointError as error:
                self._error = error
            except Exception as error:  # kept for the training thread, which raises it in `wait`
                lost = distributed.lost_a_peer(error)
                self._error = (
                    error
                    if lost
                    else CheckpointError(f"writing a checkpoint in the background failed: {reason(error)}")
                )

        # A daemon: a write that hangs in a collective or in the file system must not keep the process alive.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def make_ready(self, tensors: dict[str, Tensor]) -> None:
        """Allocates the buffers of the copies and touches their pages in the background.

        The first write to new memory takes several times as long as the copy itself.
        """
        self._buffers = {
            name: torch.empty(_local(t).shape, dtype=t.dtype, pin_memory=_local(t).is_cuda)
            for name, t in tensors.items()
        }
        self._thread = threading.Thread(target=lambda: [b.zero_() for b in self._buffers.values()], daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the last job failed on this rank, and `wait` has not raised its error yet."""
        return self._error is not None

    def wait(self, seconds: float | None = None) -> None:
        """Waits until the thread has ended.

        Args:
            seconds: the longest time to wait; None: without limit.

        Raises:
            CheckpointError: the last write failed. Raised once.
            RuntimeError: another rank has exited.
        """
        if self._thread is not None:
            self._thread.join(seconds)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies tensors to the CPU, into buffers that are reused because allocation takes longer than the copy."""
        staged: dict[str, Tensor] = {}
        on_gpu = False
        for name, tensor in tensors.items():
            local = _local(tensor)
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = self._buffers[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            # The buffers of GPU tensors are pinned, so the copies are queued without waiting for each other.
            buffer.copy_(local.detach(), non_blocking=True)
            on_gpu = on_gpu or local.is_cuda
            # The constructor, because `from_local` would move the copy back to the mesh's device.
            staged[name] = DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer
        # Training may change the tensors as soon as this returns, and the thread reads the buffers.
        if on_gpu:
            torch.cuda.synchronize()
        return staged


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors that this rank writes: its shards, and a share of the tensors that are replicated.

    Replicated tensors are assigned by size, the largest first, to the rank with the smallest total so far. Ties are
    broken by name, so every rank computes the same assignment without communication.
    """
    load = [0] * distributed.world_size()
    mine: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        if isinstance(tensor, DTensor):  # each rank writes its local shard
            mine[name] = tensor
            continue
        writer = load.index(min(load))
        load[writer] += tensor.numel() * tensor.element_size()
        if writer == distributed.rank():
            mine[name] = tensor
    # In the original order, not in the order of sizes.
    return {name: mine[name] for name in tensors if name in mine}


def _start(beside: Path) -> None:
    shutil.rmtree(beside, ignore_errors=True)  # left by a process that was killed while writing
    beside.mkdir(parents=True)


def _files(shapes: dict[str, list[int]]) -> dict[str, int]:
    """Returns the number of the file for each tensor, among the files of each rank.

    safetensors builds a whole file in memory before it writes it, so a file has about `FILE_BYTES`, with 4 bytes per
    element.

    Args:
        shapes: the shapes of all tensors, by name.
    """
    numbers, size = {}, 0
    for name, shape in shapes.items():
        numbers[name] = 1 + size // FILE_BYTES
        size += 4 * math.prod(shape)
    # Renumbered without gaps: after a tensor larger than a file some numbers are unused.
    order = {number: place for place, number in enumerate(sorted(set(numbers.values())), 1)}
    return {name: order[number] for name, number in numbers.items()}


def _write_tensors(beside: Path, tensors: dict[str, Tensor], files: dict[str, int], group: Any) -> None:
    writer = HuggingFaceStorageWriter(str(beside), fqn_to_index_mapping=files, save_distributed=True)
    with warnings.catch_warnings():  # "assuming the intent is to save in a single process": this is intended
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=not distributed.is_distributed())


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns size and SHA-256 checksum of this rank's share of the files in a shared folder, by name."""
    # Sorted, because the order of `iterdir` may differ between ranks and a file would be missed.
    files = sorted(p for p in folder.iterdir() if p.is_file())
    mine = files[distributed.rank() :: distributed.world_size()]
    return {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in mine}


def _publish(beside: Path, final: Path, manifest: dict[str, Any]) -> None:
    manifest = json.loads(json.dumps(manifest))  # as a reader gets it, which the checksum depends on
    write_json(beside / "manifest.json", {**manifest, "checksum": manifest_checksum(manifest)})
    shutil.rmtree(final, ignore_errors=True)  # a resumed run may write a step again
    beside.rename(final)


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 checksum of a manifest's content without the entry `checksum`."""
    text = json.dumps({k: v for k, v in manifest.items() if k != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Returns the SHA-256 checksum of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """Returns an error's message in one line of at most 300 characters.

    For a CheckpointException of torch.distributed.checkpoint, this is the message of the error of one rank.
    """
    inner = next(iter(getattr(error, "failures", {}).values()), None)
    text = str(inner[0] if isinstance(inner, tuple) else error)
    return " ".join(text.split())[:300]
