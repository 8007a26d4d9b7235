"""The state of ZeRO as named tensors for checkpoints.

ZeRO stores this state in flat buffers that only DeepSpeed's API can access. Tensors are gathered one at a time, and
each rank keeps its share of the rows (a DTensor on the CPU). A rank never holds more than one complete tensor in
addition to its share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from myllm_ray.accelerators.optimizer_state import create_moments
from myllm_ray.accelerators.precision import FIRST_SCALE
from myllm_ray.common.distributed import rank, world_size


class ZeroState:
    """Fp32 master weights and moments of ZeRO stages 1 to 3, by parameter name.

    Args:
        deepspeed: The library.
        module: The model inside DeepSpeed's engine.
        optimizer: DeepSpeed's ZeRO optimizer.
        stage: 1, 2 or 3.
        device: The device on which collectives run.
    """

    def __init__(self, deepspeed: Any, module: nn.Module, optimizer: Any, stage: int, device: torch.device):
        self.api, self.gathered = deepspeed.utils, deepspeed.zero.GatheredParameters
        self.module, self.optimizer, self.stage, self.device = module, optimizer, stage, device

    def tensors(self, frozen: bool = True) -> dict[str, Tensor]:
        """Returns copies of the state: `model.<name>` and `optimizer.<name>.<moment>`.

        This is a collective: every rank has to call it.

        Args:
            frozen: Whether to include the parameters that are not trained.
        """
        self._make_moments()
        moments, scalars = self._moments()
        tensors: dict[str, Tensor] = {}
        # Each iteration gathers tensors from all ranks, in the same order on every rank.
        for name, parameter in self.module.named_parameters():
            if frozen or parameter.requires_grad:
                tensors[f"model.{name}"] = _share(self._master(parameter))
            if parameter.requires_grad:
                for key in moments:
                    tensors[f"optimizer.{name}.{key}"] = _share(self.api.safe_get_full_optimizer_state(parameter, key))
                tensors.update(
                    {f"optimizer.{name}.{key}": value.detach().cpu().clone() for key, value in scalars.items()}
                )
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Loads tensors that `tensors` returned and a checkpoint filled. Every rank has to call it."""
        moments, scalars = self._moments()
        self.set_masters(lambda name: self._whole(tensors[f"model.{name}"]))
        # Master weights and the parameters that the model computes with are separate tensors, so both are set.
        for name, parameter in self.module.named_parameters():
            if f"model.{name}" not in tensors:  # a frozen parameter, which already has the value of the base
                continue
            with self._open([parameter]), torch.no_grad():
                parameter.copy_(self._whole(tensors[f"model.{name}"]))
            if parameter.requires_grad:
                for key in moments:
                    whole = self._whole(tensors[f"optimizer.{name}.{key}"])
                    self._set(parameter, whole, key)
                # The inner optimizer has one scalar per flat buffer, so all of them get the value.
                for key in scalars:
                    for state in self.optimizer.optimizer.state.values():
                        state[key].copy_(tensors[f"optimizer.{name}.{key}"])

    def set_masters(self, source: Callable[[str], Tensor]) -> None:
        """Sets the fp32 master weights, and does not change the parameters that the model computes with.

        Args:
            source: Returns the complete value of a parameter by its name.
        """
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                self._set(parameter, source(name).to(self.device))

    def _set(self, parameter: nn.Parameter, whole: Tensor, moment: str | None = None) -> None:
        """Sets a master weight or a moment.

        Args:
            parameter: The parameter.
            whole: The complete tensor, the same on every rank.
            moment: Name of the moment; None: the master weight.
        """
        if self.stage < 3:
            if moment is None:
                self.api.safe_set_full_fp32_param(parameter, whole)
            else:
                self.api.safe_set_full_optimizer_state(parameter, whole, moment)
            return
        # DeepSpeed's function for complete tensors fails if the size is not a multiple of the number of ranks, because
        # partitions have equal sizes and the last one is padded. This sets the padded partition of this rank.
        size = cast(Any, parameter).partition_numel()
        padded = nn.functional.pad(whole.flatten(), (0, size * world_size() - whole.numel()))
        part = padded[rank() * size : (rank() + 1) * size]
        if moment is None:
            self.api.safe_set_local_fp32_param(parameter, part)
        else:
            self.api.safe_set_local_optimizer_state(parameter, part, moment)

    def _master(self, parameter: nn.Parameter) -> Tensor:
        """Returns the complete master weight of a parameter, or a copy in fp32 if it is frozen and has none."""
        if parameter.requires_grad:
            master: Tensor = self.api.safe_get_full_fp32_param(parameter)
            return master
        with self._open([parameter], write=False):
            return parameter.detach().float().clone()

    def _open(self, parameters: list[nn.Parameter], write: bool = True) -> Any:
        """Returns a context in which parameters are complete; at its end, the values of rank 0 are kept if `write`."""
        return self.gathered(parameters, modifier_rank=0 if write else None, enabled=self.stage == 3)

    def _moments(self) -> tuple[list[str], dict[str, Tensor]]:
        """Returns the names of the moments of each parameter, and the scalars of the optimizer (Adam's step)."""
        state: dict[str, Any] = next(iter(self.optimizer.optimizer.state.values()), {})
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        return [k for k, v in tensors.items() if v.dim()], {k: v for k, v in tensors.items() if not v.dim()}

    def _make_moments(self) -> None:
        """Makes the inner optimizer create its moments, which ZeRO otherwise does in the first step."""
        zero, inner = self.optimizer, self.optimizer.optimizer
        if self.stage < 3:
            if not inner.state:
                create_moments(inner)
            # ZeRO links moments to parameters only once, after the first parameter group has stepped, so the moments of
            # the other groups are missing. Link them again.
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
            return
        if inner.state:
            return
        # Like a step of ZeRO-3: one flat buffer at a time, swapped in from disk and out again if it is offloaded.
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            group = inner.param_groups[zero.sub_group_to_group_id[i]]
            if zero._swappable_optimizer_subgroup(i):
                zero._optimizer_states_and_gradient_swap_in(i)
            group["params"] = [flat]
            create_moments(inner)
            group["params"] = []
            if zero._swappable_optimizer_subgroup(i):
                zero._optimizer_states_and_gradient_swap_out(i)

    def _whole(self, tensor: Tensor) -> Tensor:
        """Returns the complete tensor, on every rank's device, of which `_share` returned the rows of each rank."""
        if not isinstance(tensor, DTensor):
            return tensor.to(self.device)
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        # Each rank writes its rows into zeros, so the sum over ranks is the complete tensor.
        whole = torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device)
        if shape[0]:
            whole[offset[0] : offset[0] + shape[0]] = tensor.to_local().to(self.device)
        dist.all_reduce(whole)
        return whole


def _share(whole: Tensor) -> Tensor:
    """Returns a copy on the CPU of this rank's rows of a complete tensor.

    Args:
        whole: The complete tensor, the same on every rank.

    Returns:
        A DTensor that is sharded along the first dimension; with one rank, a plain tensor.
    """
    world = world_size()
    if world == 1:
        return whole.detach().cpu().clone()
    mesh = DeviceMesh("cpu", torch.arange(world), _init_backend=False)  # describes the layout only, without groups
    shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, [Shard(0)])
    rows = whole.detach()[offset[0] : offset[0] + shape[0]].cpu().clone()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


class ZeroLossScale:
    """ZeRO's dynamic loss scaler, with the interface of `precision.LossScale` for metrics and checkpoints.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer.
        enabled: Whether the precision is fp16.
    """

    def __init__(self, optimizer: Any, enabled: bool):
        self.enabled, self.ranks = enabled, world_size()
        self._scaler = optimizer.loss_scaler if enabled else None
        if self._scaler is not None:
            # The internal scale is divided by the number of ranks, like that of `precision.LossScale`.
            self._scaler.min_scale /= self.ranks
            self.load_state_dict({"scale": FIRST_SCALE, "good_steps": 0})

    @property
    def value(self) -> float:
        """The loss scale, independent of the number of ranks."""
        return float(self._scaler.cur_scale) * self.ranks if self._scaler is not None else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Returns the scale and the number of steps since it last changed, as JSON; {} if disabled."""
        if self._scaler is None:
            return {}
        return {"scale": self.value, "good_steps": self._scaler.cur_iter - self._scaler.last_overflow_iter - 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state from a checkpoint.

        Args:
            state: The result of `state_dict`. It is empty for a checkpoint of another precision, and then ignored.
        """
        # DeepSpeed counts good steps as the distance between these two iteration numbers.
        if self._scaler is not None and state:
            self._scaler.cur_scale = state["scale"] / self.ranks
            self._scaler.cur_iter, self._scaler.last_overflow_iter = state["good_steps"], -1
