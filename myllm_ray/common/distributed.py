"""Helpers for process groups that also work in a process without a group."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 7200.0
"""Default timeout of a process group in seconds; `scaling.timeout_seconds` overrides it."""


def backend(device: str) -> str:
    """Returns the process-group backend for tensors on a device.

    On CUDA the group has gloo in addition to nccl, because the norms of offloaded gradients and the checkpoints that
    are written in the background use collectives on CPU tensors.
    """
    return "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"


def is_distributed() -> bool:
    """Returns whether this process has an initialized process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Returns the rank of this process; 0 without a group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Returns the number of ranks; 1 without a group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Returns whether this process is rank 0."""
    return rank() == 0


def barrier() -> None:
    """Waits until every rank has reached this call; returns immediately without a group."""
    if is_distributed():
        dist.barrier()


def timeout() -> timedelta | None:
    """Returns the timeout of the default process group, or None without a group.

    torch gives additional groups its own default timeout, so the caller passes this one to them.
    """
    if not is_distributed():
        return None
    found: timedelta = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout
    return found


def all_reduce_(tensor: torch.Tensor, op: Any = None) -> torch.Tensor:
    """Reduces a tensor over all ranks in place and returns it; without a group, returns it unchanged.

    Args:
        tensor: The tensor to reduce.
        op: The reduction; default: sum.
    """
    global _seconds
    if is_distributed() and world_size() > 1:
        started = time.perf_counter()
        dist.all_reduce(tensor, op=op or dist.ReduceOp.SUM)
        _seconds += time.perf_counter() - started
    return tensor


def all_reduce_on_host_(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a CPU tensor over all ranks in place and returns it. The device is not used.

    A group whose backend has no collectives on CPU tensors (nccl alone, in a process group of the user) sums a copy on
    the device instead.
    """
    if not is_distributed() or world_size() == 1:
        return tensor
    group = dist.distributed_c10d._get_default_group()
    if torch.device("cpu") in group._device_types:
        return all_reduce_(tensor)
    return tensor.copy_(all_reduce_(tensor.to(group._device_types[0])))


_seconds = 0.0


def seconds_in_collectives() -> float:
    """Returns the seconds that this process has spent in `all_reduce_`. Collectives of the backends do not count."""
    return _seconds


def lost_a_peer(error: BaseException) -> bool:
    """Returns whether a collective failed because another process exited, so that the cause is on another rank."""
    # torch raises most of these errors as plain RuntimeErrors, so the texts of gloo and NCCL identify them.
    return isinstance(error, dist.DistError) or any(
        sign in str(error)
        for sign in ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL error")
    )


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Returns the values of all ranks, ordered by rank, on every rank. The values must be JSON-like."""
    if not is_distributed() or world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_on_main(value: Any, group: Any = None) -> list[Any]:
    """Returns the values of all ranks, ordered by rank, on rank 0, and an empty list on the others."""
    if not is_distributed() or world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, dst=0, group=group)
    return values or []


def from_main(value: Any) -> Any:
    """Broadcasts the value of rank 0 to all ranks and returns it."""
    if not is_distributed() or world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
