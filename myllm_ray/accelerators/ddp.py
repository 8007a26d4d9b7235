"""DistributedDataParallel: a whole copy of the model on every rank, gradients averaged over ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.common.distributed import world_size


class DDPAccelerator(Accelerator):
    """`torch.nn.parallel.DistributedDataParallel`; `accelerator.options` are its keyword arguments."""

    distributed = True

    def wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(
            model, device_ids=[self.device] if self.device.type == "cuda" else None,
            **{"gradient_as_bucket_view": True, "forward_sync_buffers": False, **self.options})

    def microbatch(self, last: bool) -> AbstractContextManager[Any]:
        # The forward pass decides whether DDP prepares the exchange, so no_sync must stand around it too.
        return nullcontext() if last else self.model.no_sync()  # type: ignore[operator]

    def backward(self, loss: Tensor) -> None:
        # DDP averages over ranks; the contract is a sum.
        (loss * world_size()).backward()
