"""DistributedDataParallel: every rank holds a complete copy of the model, and gradients are averaged over ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from myllm_ray.accelerators.base import Accelerator, Judge, StepResult
from myllm_ray.accelerators.options import keyword_options
from myllm_ray.common.distributed import world_size
from myllm_ray.common.materialize import materialize


class DDPAccelerator(Accelerator):
    """Trains with `torch.nn.parallel.DistributedDataParallel`.

    `accelerator.options` are its keyword arguments (`bucket_cap_mb`, ...).
    """

    distributed = True
    mixes_dtypes = True

    def __init__(self, config: Any = None):
        super().__init__(config)
        keyword_options(
            DistributedDataParallel,
            self.options,
            own=("module", "device_ids", "output_device", "process_group", "device_mesh", "mixed_precision"),
        )

    # Whether a step has exchanged gradients; see `microbatch`.
    _stepped = False

    def wrap(self, model: nn.Module) -> nn.Module:
        # gradient_as_bucket_view: gradients are views of the communication buckets, which saves one copy of them.
        # forward_sync_buffers=False: no broadcast of the buffers from rank 0 before each forward pass.
        return DistributedDataParallel(
            materialize(model, self.device),
            device_ids=[self.device] if self.device.type == "cuda" else None,
            **{"gradient_as_bucket_view": True, "forward_sync_buffers": False, **self.options},
        )

    def microbatch(self, last: bool) -> AbstractContextManager[Any]:
        # The forward pass decides whether DDP prepares the reduction, so `no_sync` has to include it. With a static
        # graph, DDP records the graph in its first iteration and fails if that iteration does not reduce. The first
        # step therefore reduces in every micro-batch, which results in the same sum.
        if last or (self.options.get("static_graph") and not self._stepped):
            return nullcontext()
        return cast(DistributedDataParallel, self.model).no_sync()

    def optimizer_step(self, gradient_clip: float | None, judge: Judge | None = None) -> StepResult:
        self._stepped = True
        return super().optimizer_step(gradient_clip, judge)

    def backward(self, loss: Tensor) -> None:
        # DDP averages over ranks, but the contract is a sum.
        super().backward(loss * world_size())
