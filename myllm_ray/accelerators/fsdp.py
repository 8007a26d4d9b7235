"""FSDP2: shards parameters, gradients and optimizer state over ranks, and gathers parameters block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.accelerators.optimizer_state import OptimizerLayout
from myllm_ray.accelerators.precision import DTYPES, hold_in
from myllm_ray.accelerators.sharding import blocks_of, reshard, shard_units
from myllm_ray.common import distributed
from myllm_ray.common.distributed import world_size
from myllm_ray.common.materialize import Source, fill, loading, source_of
from myllm_ray.common.tensor_files import box_of
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.sections import Section


class FSDPAccelerator(Accelerator):
    """Shards each block of the model with `fully_shard` (Zhao et al., 2023, arXiv:2304.11277).

    Shards are fp32, gathered parameters are in `precision`, and gradients are accumulated and reduced in
    `gradient_dtype`. Models that are not trained are sharded in the same way, with shards in `precision`.
    """

    class Config(Section):
        """Options of FSDP2."""

        reshard_after_forward: bool | PositiveInt | None = Field(
            True,
            description="true: free gathered blocks after the forward pass; false: keep them for the backward pass; "
            "a number: reshard to this many ranks",
        )
        replicas: PositiveInt = Field(
            1, description="hybrid sharding: groups of ranks that hold a whole model each, sharded within the group"
        )
        transformer_layer_cls_to_wrap: list[str] | None = Field(
            None, description="class names of the blocks; default: the blocks that repeat; []: none"
        )

    options: Config
    distributed = True
    gradient_dtypes = ("fp32", "bf16")
    offloads: ClassVar[Mapping[str, tuple[str, ...]]] = {"parameters": ("cpu",)}

    def __init__(self, config: Any = None):
        super().__init__(config)
        self._device_mesh: DeviceMesh | None = None

    @property
    def shards(self) -> int:
        return max(1, world_size() // self.options.replicas)

    @property
    def optimizer_layout(self) -> OptimizerLayout:
        return "shards"

    def check_model(self, model: nn.Module) -> None:
        super().check_model(model)
        blocks_of(model, self.options.transformer_layer_cls_to_wrap)

    def _mesh(self) -> DeviceMesh:
        """Returns the device mesh, which all models share, because a mesh of two dimensions creates process groups."""
        if self._device_mesh is None:
            self._device_mesh = self._make_mesh()
        return self._device_mesh

    def _make_mesh(self) -> DeviceMesh:
        replicas = self.options.replicas
        if world_size() % replicas:
            raise ConfigError(f"accelerator.options.replicas={replicas} does not divide the {world_size()} workers")
        if replicas == 1:
            return init_device_mesh(self.device.type, (world_size(),))
        mesh = init_device_mesh(
            self.device.type, (replicas, world_size() // replicas), mesh_dim_names=("replicate", "shard")
        )
        # The groups of a mesh get torch's default timeout, not that of the default group.
        if (timeout := distributed.timeout()) is not None:
            for group in mesh.get_all_groups():
                distributed_c10d._set_pg_timeout(timeout, group)
        return mesh

    def wrap(self, model: nn.Module) -> nn.Module:
        # `fully_shard` modifies the model in place, so `module` and `model` are the same object. By default gradients
        # are reduced in fp32: in half precision, the sum over ranks is rounded.
        reduce = DTYPES[self.section.gradient_dtype]
        return self._shard(
            model, MixedPrecisionPolicy(param_dtype=self._compute, reduce_dtype=reduce, cast_forward_inputs=False)
        )

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        # The dtype of the trained model's parameters while they are gathered. There are no fp32 masters to keep.
        if self._compute is not None:
            hold_in(model, {name: self._compute for name, p in model.named_parameters() if p.is_floating_point()})
        return self._shard(model.requires_grad_(False).eval(), MixedPrecisionPolicy(cast_forward_inputs=False))

    @property
    def _compute(self) -> torch.dtype | None:
        return None if self.precision == "fp32" else DTYPES[self.precision]

    def _shard(self, model: nn.Module, policy: MixedPrecisionPolicy) -> nn.Module:
        source = source_of(model)
        if source is None:
            model.to("cpu" if self.offload.parameters == "cpu" else self.device)
        arguments: dict[str, Any] = {
            "mesh": self._mesh(),
            "reshard_after_forward": self.options.reshard_after_forward,
            "mp_policy": policy,
        }
        if self.offload.parameters == "cpu":
            # The optimizer steps on the CPU. Pinned memory makes the copies to and from the GPU asynchronous.
            arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        # A model on the meta device is sharded first and filled afterwards, so no rank holds all of its parameters.
        shard_units(model, blocks_of(model, self.options.transformer_layer_cls_to_wrap), self.shards, arguments)
        if source is not None:
            with loading(model, source) as counted:
                self._fill(model, counted)
        return model

    def _fill(self, model: nn.Module, source: Source) -> None:
        """Creates the weights of a sharded model on the meta device: of each tensor the part that this rank holds.

        Args:
            model: The sharded model, modified in place.
            source: Creates the parts of the parameters, and the buffers.
        """
        place = torch.device("cpu") if self.offload.parameters == "cpu" else self.device
        # Like `to_empty`, but only for the shards: `to_empty` would also overwrite buffers.
        model._apply(lambda t: torch.empty_like(t, device=place) if isinstance(t, DTensor) else t)
        with torch.no_grad():
            for name, shard in model.named_parameters():
                assert isinstance(shard, DTensor)
                if shard.to_local().numel():  # the last ranks hold nothing of a tensor with few rows
                    shard.to_local().copy_(source(name, box_of(shard)))
        fill(model, source, self.device)  # the buffers

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        root: Any = self.model
        # Without the reduction, gradients accumulate unsharded on every rank until the last micro-batch.
        root.set_requires_gradient_sync(last)
        if self.options.reshard_after_forward is not True:
            yield
            return
        # The backward pass starts with the output head, which belongs to the root unit. Other forward passes have no
        # backward pass that frees the unit.
        root.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            root.set_reshard_after_forward(True, recurse=False)

    def backward(self, loss: Tensor) -> None:
        # FSDP averages over ranks, but the contract is a sum.
        super().backward(loss * world_size())

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        # Each `unshard` is a collective; all ranks call them in the order of the modules.
        modules = [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(bool(self.options.reshard_after_forward), recurse=False)
                module.reshard()

    def generation(self) -> AbstractContextManager[Any]:
        """Returns a context in which all parameters are complete on every rank.

        In this context the model runs without collectives, so ranks may call it a different number of times.

        Raises:
            ConfigError: `reshard_after_forward` is a number.
        """
        if not isinstance(self.options.reshard_after_forward, bool):
            raise ConfigError(
                "accelerator.options.reshard_after_forward: a number is not supported when answers are sampled; "
                "use true or false"
            )
        return self._gathered()

    def state(self, frozen: bool = True) -> dict[str, Tensor]:
        reshard(self.model)
        return super().state(frozen)
