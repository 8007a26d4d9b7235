"""What ZeRO scatters over flat buffers, as named tensors: the part of a checkpoint that only DeepSpeed's own API can reach.

Tensors are gathered one by one, and each rank keeps its share of the rows (a DTensor on the CPU), so no rank ever holds more than
one whole tensor beside its share.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.accelerators.precision import FIRST_SCALE
from myllm_ray.common.distributed import rank, world_size
from myllm_ray.common.materialize import Source


class ZeroState:
    """Fp32 masters and moments of ZeRO stages 1 to 3, by parameter name.

    Args:
        deepspeed: the library.
        module: the model inside DeepSpeed's engine.
        optimizer: DeepSpeed's ZeRO optimizer.
        stage: 1, 2 or 3.
        device: where collectives run.
    """

    def __init__(self, deepspeed: Any, module: nn.Module, optimizer: Any, stage: int, device: torch.device):
        self.api, self.gathered = deepspeed.utils, deepspeed.zero.GatheredParameters
        self.module, self.optimizer, self.stage, self.device = module, optimizer, stage, device

    def tensors(self) -> dict[str, Tensor]:
        """Copies of everything to save: `model.<name>` and `optimizer.<name>.<moment>`."""
        self._make_moments()
        moments, scalars = self._moments()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            tensors[f"model.{name}"] = _share(self._master(parameter))
            if parameter.requires_grad:
                for key in moments:
                    tensors[f"optimizer.{name}.{key}"] = _share(self.api.safe_get_full_optimizer_state(parameter, key))
                tensors.update({f"optimizer.{name}.{key}": value.detach().cpu().clone() for key, value in scalars.items()})
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The way back: tensors as `tensors()` gave them, filled from a checkpoint."""
        moments, scalars = self._moments()
        self.set_masters(lambda name: self._whole(tensors[f"model.{name}"]))
        for name, parameter in self.module.named_parameters():
            with self._open([parameter]), torch.no_grad():
                parameter.copy_(self._whole(tensors[f"model.{name}"]))
            if parameter.requires_grad:
                for key in moments:
                    whole = self._whole(tensors[f"optimizer.{name}.{key}"])
                    self._set(parameter, whole, key)
                for key in scalars:
                    for state in self.optimizer.optimizer.state.values():
                        state[key].copy_(tensors[f"optimizer.{name}.{key}"])

    def set_masters(self, source: Source) -> None:
        """Set the fp32 masters, and leave the parameters that the model computes with as they are."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                self._set(parameter, source(name).to(self.device))

    def _set(self, parameter: nn.Parameter, whole: Tensor, moment: str | None = None) -> None:
        """Set a master or a moment from a tensor that every rank has whole."""
        if self.stage < 3:
            if moment is None:
                self.api.safe_set_full_fp32_param(parameter, whole)
            else:
                self.api.safe_set_full_optimizer_state(parameter, whole, moment)
            return
        # By the partition: the call for the whole tensor fails where its size is no multiple of the number of ranks.
        size = cast(Any, parameter).partition_numel()
        padded = nn.functional.pad(whole.flatten(), (0, size * world_size() - whole.numel()))
        part = padded[rank() * size : (rank() + 1) * size]
        if moment is None:
            self.api.safe_set_local_fp32_param(parameter, part)
        else:
            self.api.safe_set_local_optimizer_state(parameter, part, moment)

    def _master(self, parameter: nn.Parameter) -> Tensor:
        if parameter.requires_grad:
            master: Tensor = self.api.safe_get_full_fp32_param(parameter)
            return master
        with self._open([parameter], write=False):
            return parameter.detach().float().clone()

    def _open(self, parameters: list[nn.Parameter], write: bool = True) -> Any:
        return self.gathered(parameters, modifier_rank=0 if write else None, enabled=self.stage == 3)

    def _moments(self) -> tuple[list[str], dict[str, Tensor]]:
        """Names of the moments that each parameter has, and the numbers that the whole optimizer has (Adam's step)."""
        state: dict[str, Any] = next(iter(self.optimizer.optimizer.state.values()), {})
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        return [k for k, v in tensors.items() if v.dim()], {k: v for k, v in tensors.items() if not v.dim()}

    def _make_moments(self) -> None:
        """Let the optimizer inside make its moments, which ZeRO puts off to the first step."""
        zero, inner = self.optimizer, self.optimizer.optimizer
        if self.stage < 3:
            if not inner.state:
                Accelerator.init_optimizer_state(inner)
            # ZeRO links moments to parameters once, after the step of the first parameter group: the others' are missing.
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
            return
        if inner.state:
            return
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):  # as ZeRO-3 steps: one group of tensors at a time
            group = inner.param_groups[zero.sub_group_to_group_id[i]]
            if zero._swappable_optimizer_subgroup(i):
                zero._optimizer_states_and_gradient_swap_in(i)
            group["params"] = [flat]
            Accelerator.init_optimizer_state(inner)
            group["params"] = []
            if zero._swappable_optimizer_subgroup(i):
                zero._optimizer_states_and_gradient_swap_out(i)

    def _whole(self, tensor: Tensor) -> Tensor:
        """A tensor that `_share` made, put together again on every rank's device."""
        if not isinstance(tensor, DTensor):
            return tensor.to(self.device)
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        whole = torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device)
        if shape[0]:
            whole[offset[0] : offset[0] + shape[0]] = tensor.to_local().to(self.device)
        dist.all_reduce(whole)
        return whole


def _share(whole: Tensor) -> Tensor:
    """This rank's rows of a tensor that every rank has, on the CPU, in the form that a checkpoint takes."""
    world = world_size()
    if world == 1:
        return whole.detach().cpu().clone()
    mesh = DeviceMesh("cpu", torch.arange(world), _init_backend=False)  # a description: nothing is sent along it
    shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, [Shard(0)])
    rows = whole.detach()[offset[0] : offset[0] + shape[0]].cpu().clone()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


class ZeroLossScale:
    """ZeRO's own dynamic loss scaler, with the face of `precision.LossScale` towards metrics and checkpoints."""

    def __init__(self, optimizer: Any, enabled: bool):
        self.enabled, self.ranks = enabled, world_size()
        self._scaler = optimizer.loss_scaler if enabled else None
        if self._scaler is not None:
            self._scaler.min_scale /= self.ranks
            self.load_state_dict({"scale": FIRST_SCALE, "good_steps": 0})

    @property
    def value(self) -> float:
        return float(self._scaler.cur_scale) * self.ranks if self._scaler is not None else 1.0

    def state_dict(self) -> dict[str, Any]:
        """JSON; empty where disabled."""
        if self._scaler is None:
            return {}
        return {"scale": self.value, "good_steps": self._scaler.cur_iter - self._scaler.last_overflow_iter - 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; one of another precision has nothing to go on from."""
        if self._scaler is not None and state:
            self._scaler.cur_scale = state["scale"] / self.ranks
            self._scaler.cur_iter, self._scaler.last_overflow_iter = state["good_steps"], -1
