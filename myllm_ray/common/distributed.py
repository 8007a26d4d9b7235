"""Process-group helpers that also work where there is no process group."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 7200.0
"""Default timeout of a process group: `scaling.timeout_seconds`."""


def backend(device: str) -> str:
    """Of the process group for tensors on a device. gloo beside nccl: norms of offloaded gradients, and checkpoints that are
    written in the background, are reduced on the CPU."""
    return "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def timeout() -> timedelta | None:
    """That of the main process group; groups made beside it get torch's default unless they are given this one."""
    if not is_distributed():
        return None
    found: timedelta = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout
    return found


def all_reduce_(tensor: torch.Tensor, op: Any = None) -> torch.Tensor:
    """Sum (or `op`) over ranks, in place; the tensor itself without a group."""
    if is_distributed() and world_size() > 1:
        dist.all_reduce(tensor, op=op or dist.ReduceOp.SUM)
    return tensor


def lost_a_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone: a consequence, not a cause."""
    # torch raises most of these as plain RuntimeErrors; what marks them is where gloo and NCCL say they happened.
    return isinstance(error, dist.DistError) or any(
        sign in str(error) for sign in ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL error"))


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """The value of every rank, by rank, on all of them. JSON-like values only."""
    if not is_distributed() or world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def from_main(value: Any) -> Any:
    """Rank 0's value, on all ranks."""
    if not is_distributed() or world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
