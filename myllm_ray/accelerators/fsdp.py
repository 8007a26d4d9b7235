"""FSDP2: parameters, gradients and optimizer state sharded over ranks; gathered block by block while computing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.common.distributed import world_size
from myllm_ray.common.modules import repeated_blocks


class FSDPAccelerator(Accelerator):
    """`fully_shard` per block (Zhao et al., 2023, arXiv:2304.11277): fp32 shards, compute in `precision`, fp32 reduce."""

    distributed = True

    def wrap(self, model: nn.Module) -> nn.Module:
        mesh = init_device_mesh(self.device.type, (world_size(),))
        compute = torch.bfloat16 if self.precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in repeated_blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy, **self.options)
        return fully_shard(model, mesh=mesh, mp_policy=policy, **self.options)  # type: ignore[return-value]

    def microbatch(self, last: bool) -> AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        # FSDP averages over ranks; the contract is a sum.
        (loss * world_size()).backward()

    def state(self) -> dict[str, Tensor]:
        for module in self.model.modules():  # after an evaluation the root's parameters are still gathered
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().state()
