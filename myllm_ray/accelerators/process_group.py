"""The process group that a backend creates if neither Ray nor the user has initialized one."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from myllm_ray.common import distributed

_last_group: list[Any] = []
"""The group of the last run in this process; see `keep_group`."""


def init_group(device_type: str, timeout_seconds: float) -> None:
    """Initializes the default group: of torchrun's processes, or of this process alone.

    Args:
        device_type: `cpu` or `cuda`, which determines the backend.
        timeout_seconds: the longest time that a collective waits.
    """
    backend, timeout = distributed.backend(device_type), timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # torchrun
        dist.init_process_group(backend, timeout=timeout)
    else:
        # HashStore is in-process, so a group of one process needs no address and no port.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def keep_group() -> None:
    """Keeps a reference to the default group, so that its destructor does not run before the next group is closed.

    The destructor of a gloo group joins the group's threads while it holds the GIL. A thread that still has to release
    the Python objects of its last operation waits for the GIL, so both deadlock (torch 2.13).
    """
    _last_group[:] = [dist.group.WORLD]
