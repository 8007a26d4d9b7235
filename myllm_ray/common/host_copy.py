"""Copies of small tensors to the host that are read later, so that the host does not wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor in host memory.

    On CUDA, the copy is queued behind the work that computes the tensor. `read` waits for this copy only, not for work
    that was queued after it.

    Args:
        tensor: The tensor, on any device. A tensor on the CPU must not be changed before `read`.
    """

    def __init__(self, tensor: Tensor):
        self._value, self._event = tensor.detach(), None
        if tensor.device.type == "cuda":
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._value = pinned.copy_(self._value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        """Waits for the copy and returns it, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.cpu()
