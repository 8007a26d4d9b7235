"""FSDP2: parameters, gradients and optimizer state sharded over ranks; gathered block by block while computing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.accelerators.options import check_names
from myllm_ray.accelerators.precision import DTYPES, hold_in
from myllm_ray.accelerators.sharding import CLASSES, blocks_of, shard_units
from myllm_ray.common import distributed
from myllm_ray.common.distributed import world_size
from myllm_ray.common.materialize import Source, fill, source_of
from myllm_ray.config.errors import ConfigError


class FSDPAccelerator(Accelerator):
    """`fully_shard` per block (Zhao et al., 2023, arXiv:2304.11277): fp32 shards, compute in `precision`, fp32 reduce.

    `accelerator.options`: `reshard_after_forward` (true: give gathered blocks back after the forward pass; false: keep
    them for the backward pass; a number: reshard to so many ranks), `replicas` (hybrid sharding: so many groups of
    ranks hold a whole model each, sharded within the group) and `transformer_layer_cls_to_wrap` (names of the classes of the blocks;
    default: the blocks that repeat). Frozen models are sharded in the same way, and held in `precision`.
    """

    distributed = True
    offloads: ClassVar[Mapping[str, tuple[str, ...]]] = {"parameters": ("cpu",)}

    def __init__(self, config: Any = None):
        super().__init__(config)
        check_names(self.options, ("reshard_after_forward", "replicas", CLASSES), "fsdp")
        self._device_mesh: DeviceMesh | None = None

    @property
    def shards(self) -> int:
        return max(1, world_size() // int(self.options.get("replicas", 1)))

    def check_model(self, model: nn.Module) -> None:
        super().check_model(model)
        blocks_of(model, self.options.get(CLASSES))

    def _mesh(self) -> DeviceMesh:
        """One for all models: every mesh of two dimensions makes process groups."""
        if self._device_mesh is None:
            self._device_mesh = self._make_mesh()
        return self._device_mesh

    def _make_mesh(self) -> DeviceMesh:
        replicas = int(self.options.get("replicas", 1))
        if replicas < 1 or world_size() % replicas:
            raise ConfigError(f"accelerator.options.replicas={replicas} does not divide the {world_size()} workers")
        if replicas == 1:
            return init_device_mesh(self.device.type, (world_size(),))
        mesh = init_device_mesh(self.device.type, (replicas, world_size() // replicas), mesh_dim_names=("replicate", "shard"))
        if (timeout := distributed.timeout()) is not None:
            for group in mesh.get_all_groups():
                distributed_c10d._set_pg_timeout(timeout, group)
        return mesh

    def wrap(self, model: nn.Module) -> nn.Module:
        return self._shard(model, MixedPrecisionPolicy(param_dtype=self._compute, reduce_dtype=torch.float32, cast_forward_inputs=False))

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        if self._compute is not None:  # as the trained model is while it is gathered
            hold_in(model, {name: self._compute for name, p in model.named_parameters() if p.is_floating_point()})
        return self._shard(model.requires_grad_(False).eval(), MixedPrecisionPolicy(cast_forward_inputs=False))

    @property
    def _compute(self) -> torch.dtype | None:
        return None if self.precision == "fp32" else DTYPES[self.precision]

    def _shard(self, model: nn.Module, policy: MixedPrecisionPolicy) -> nn.Module:
        source = source_of(model)
        if source is None:
            model.to("cpu" if self.offload["parameters"] == "cpu" else self.device)
        arguments: dict[str, Any] = {
            "mesh": self._mesh(), "reshard_after_forward": self.options.get("reshard_after_forward", True), "mp_policy": policy}
        if self.offload["parameters"] == "cpu":
            arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        shard_units(model, blocks_of(model, self.options.get(CLASSES)), self.shards, arguments)
        if source is not None:
            self._fill(model, source)
        return model

    def _fill(self, model: nn.Module, source: Source) -> None:
        """Give a sharded model on the meta device its weights: of each tensor, this rank's part."""
        place = torch.device("cpu") if self.offload["parameters"] == "cpu" else self.device
        # What `to_empty` does, but for the shards alone: it would also empty the buffers.
        model._apply(lambda t: torch.empty_like(t, device=place) if isinstance(t, DTensor) else t)
        with torch.no_grad():
            for name, shard in model.named_parameters():
                assert isinstance(shard, DTensor)
                part = distribute_tensor(source(name).to(shard.device), shard.device_mesh, shard.placements, src_data_rank=None)
                shard.to_local().copy_(part.to_local())
        fill(model, source, self.device)  # the buffers

    def microbatch(self, last: bool) -> AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        # FSDP averages over ranks; the contract is a sum.
        super().backward(loss * world_size())

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        modules = [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(self.options.get("reshard_after_forward", True), recurse=False)
                module.reshard()

    def generation(self) -> AbstractContextManager[Any]:
        """All parameters whole on every rank meanwhile, so that ranks may call the model unequally often."""
        if not isinstance(self.options.get("reshard_after_forward", True), bool):
            raise ConfigError("accelerator.options.reshard_after_forward: answers can't be sampled with a number here; use true or false")
        return self._gathered()

    def state(self) -> dict[str, Tensor]:
        for module in self.model.modules():  # after an evaluation the root's parameters are still gathered
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().state()
