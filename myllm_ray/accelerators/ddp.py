"""DistributedDataParallel: every rank holds a complete copy of the model, and gradients are averaged over ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from myllm_ray.accelerators.base import Accelerator, Judge, StepResult
from myllm_ray.accelerators.options import keyword_options
from myllm_ray.common.distributed import world_size
from myllm_ray.common.materialize import materialize


def fix_buckets(model: Any) -> None:
    """Assigns the gradients to their communication buckets for the whole run, in reverse order of the parameters.

    Without this, DDP assigns them again after its first backward pass, in the order in which they became ready. A
    resumed run would reduce its first gradients in other buckets than the uninterrupted run. With three or more ranks,
    the order in which a gradient is summed depends on its place in the bucket, so the sums would differ by rounding.

    Args:
        model: A `DistributedDataParallel` module that has not run yet.
    """
    parameters, sparse = model._build_params_for_reducer()
    # The reducer assigns in the order of its list. Gradients become ready roughly in the reverse order of the forward
    # pass, and a bucket is reduced during the backward pass when it is full.
    parameters, sparse = parameters[::-1], sparse[::-1]
    names = model._build_debug_param_to_name_mapping(parameters)
    # The old reducer, to which the logger refers, goes first: two would hold twice the memory of all gradients.
    model.logger = model.reducer = None
    model._ddp_init_helper(parameters, sparse, names, model.static_graph)
    if model.static_graph:  # not `_set_static_graph`, which warns that it has been called before
        model.reducer._set_static_graph()
        model.logger._set_static_graph()
    for hook, state in model._comm_hooks:
        dist._register_comm_hook(model.reducer, state, hook)
    # Without effect with `find_unused_parameters`, where DDP keeps the first assignment.
    model.reducer._push_all_rebuilt_params()
    model.reducer._rebuild_buckets()


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
        wrapped = DistributedDataParallel(
            materialize(model, self.device),
            device_ids=[self.device] if self.device.type == "cuda" else None,
            **{"gradient_as_bucket_view": True, "forward_sync_buffers": False, **self.options},
        )
        fix_buckets(wrapped)
        return wrapped

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
