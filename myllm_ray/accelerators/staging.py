"""Copies of micro-batches to the device. On CUDA, a stream of their own makes them while the device trains."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from myllm_ray.common.micros import to_device
from myllm_ray.common.types import Micro


class Staged(NamedTuple):
    """The copies of some micro-batches."""

    copies: dict[int, Tensor]
    """Tensors on the device, by the `id` of the tensor in host memory. The caller keeps the latter alive."""
    done: torch.cuda.Event
    """Is recorded after the copies."""

    def wait(self) -> None:
        """Lets the current stream of the device wait for the copies. The host does not wait."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self.done)
        for copy in self.copies.values():
            copy.record_stream(stream)  # its memory is not used again before the stream has read it


class Staging:
    """Copies micro-batches to a CUDA device. May be used in a thread other than that of the training.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, micros: list[Micro]) -> tuple[list[Micro], Staged]:
        """Returns the micro-batches in pinned memory, from which the copies are made, and the copies."""
        torch.cuda.set_device(self._device)  # a thread begins with device 0
        pinned: dict[int, Tensor] = {}
        for micro in micros:
            for tensor in micro.values():
                if id(tensor) not in pinned:
                    pinned[id(tensor)] = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
        with torch.cuda.stream(self._stream):
            copies = {id(host): host.to(self._device, non_blocking=True) for host in pinned.values()}
            done = torch.cuda.Event()
            done.record(self._stream)
        return [{name: pinned[id(t)] for name, t in micro.items()} for micro in micros], Staged(copies, done)


class Transfers:
    """The copies that a backend makes of micro-batches."""

    device: torch.device
    _staging: Staging | None = None
    _staged: Staged | None = None

    def move(self, micro: Micro) -> Micro:
        """Returns a micro-batch on the device."""
        if self.device.type == "cpu":
            return micro
        return to_device(micro, self.device, True, {} if self._staged is None else self._staged.copies)

    def copy_ahead(self, micros: list[Micro]) -> tuple[list[Micro], Staged | None]:
        """Starts the copies of micro-batches to the device on a stream of their own. May be called in another thread.

        Returns:
            The micro-batches in host memory, as arguments of `move`, and the argument of `use_copies`.
        """
        if self.device.type != "cuda":
            return micros, None
        self._staging = self._staging or Staging(self.device)
        return self._staging.copy(micros)

    def use_copies(self, staged: Staged | None) -> None:
        """Lets `move` return the copies that `copy_ahead` has started, until the next call."""
        self._staged = staged
        if staged is not None:
            staged.wait()
