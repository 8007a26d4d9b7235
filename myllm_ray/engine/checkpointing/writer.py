"""Writes one checkpoint, synchronously or in a background thread from a copy of the tensors.

The files are written to a temporary folder next to the final one, the manifest last. The folder is renamed when it is
complete. In the background mode training stops only for the copy:

    training   | step | step | copy | step | step | step | step | copy | ...
    background |                    | write, checksums, rename |       | ...

Collectives of the background thread use a separate process group. In the main group they would interleave with the
collectives of training in an order that differs between ranks.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from myllm_ray.common import distributed
from myllm_ray.common.files import write_atomic
from myllm_ray.common.tensor_files import Part, local, to_json
from myllm_ray.config.errors import CheckpointError
from myllm_ray.engine.checkpointing.files import Written, write_files
from myllm_ray.engine.checkpointing.verification import MANIFEST, manifest_checksum, reason

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

    def together(step: Callable[[], Any]) -> None:
        """Runs a step on every rank; raises the first failure on all ranks."""
        # A rank whose step fails must still enter the gather, or the other ranks would wait there until the timeout.
        failed = None
        try:
            step()
        except (OSError, RuntimeError) as error:
            if distributed.lost_a_peer(error):  # the gather would fail in the same way
                raise
            failed = reason(error)
        failed = next((f for f in distributed.gather_objects(failed, group) if f is not None), None)
        if failed is not None:
            if distributed.is_main():
                shutil.rmtree(beside, ignore_errors=True)
            raise CheckpointError(f"checkpoint {final}: can't be written: {failed}")

    # Each step ends with a gather, so no rank writes before the folder exists, or returns before the checkpoint is
    # renamed.
    together(lambda: _start(beside) if distributed.is_main() else None)
    written: list[Written] = []
    together(lambda: written.append(write_files(beside, tensors)))
    # Only rank 0 needs to know what the others have written. Numbers of tensors are shorter than their names.
    numbers = {name: number for number, name in enumerate(manifest["tensors"])}
    own = [(part, [numbers[name] for name in names]) for part, names in written[0].parts.items()]
    found = distributed.gather_on_main((written[0].sums, own), group)
    together(lambda: _publish(beside, final, _complete(manifest, found)) if distributed.is_main() else None)


Found = tuple[dict[str, dict[str, Any]], list[tuple[Part, list[int]]]]
"""What a rank has written: size and checksum by file, and the numbers of the tensors by their part."""


def _complete(manifest: dict[str, Any], found: list[Found]) -> dict[str, Any]:
    """Returns a manifest with the checksums of all files and the index of the tensors.

    Args:
        manifest: The manifest without them.
        found: What each rank has written.
    """
    index: list[list[Part]] = [[] for _ in manifest["tensors"]]
    for _, parts in found:
        for part, numbers in parts:
            for number in numbers:
                index[number].append(part)
    sums = {file: values for files, _ in found for file, values in files.items()}
    return {**manifest, "files": sums, **to_json(dict(zip(manifest["tensors"], index, strict=True)))}


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
            name: torch.empty(local(t).shape, dtype=t.dtype, pin_memory=local(t).is_cuda) for name, t in tensors.items()
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
            held = local(tensor)
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != held.shape or buffer.dtype != held.dtype:
                buffer = self._buffers[name] = torch.empty(held.shape, dtype=held.dtype, pin_memory=held.is_cuda)
            # The buffers of GPU tensors are pinned, so the copies are queued without waiting for each other.
            buffer.copy_(held.detach(), non_blocking=True)
            on_gpu = on_gpu or held.is_cuda
            # The constructor, because `from_local` would move the copy back to the mesh's device.
            staged[name] = DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer
        # Training may change the tensors as soon as this returns, and the thread reads the buffers.
        if on_gpu:
            torch.cuda.synchronize()
        return staged


def _start(beside: Path) -> None:
    shutil.rmtree(beside, ignore_errors=True)  # left by a process that was killed while writing
    beside.mkdir(parents=True)


def _publish(beside: Path, final: Path, manifest: dict[str, Any]) -> None:
    manifest = json.loads(json.dumps(manifest))  # as a reader gets it, which the checksum depends on
    write_atomic(beside / MANIFEST, _text({**manifest, "checksum": manifest_checksum(manifest)}))
    shutil.rmtree(final, ignore_errors=True)  # a resumed run may write a step again
    beside.rename(final)


def _text(manifest: dict[str, Any]) -> str:
    """Returns a manifest as indented JSON, with one line for each layout: most of it are lists of numbers."""
    layouts = ",\n".join(f"    {json.dumps(layout)}" for layout in manifest["layouts"])
    rest = {name: value for name, value in manifest.items() if name != "layouts"}
    return json.dumps(rest, indent=2, ensure_ascii=False)[:-2] + f',\n  "layouts": [\n{layouts}\n  ]\n}}\n'
