"""Everything that differs between backends, behind one interface.

The contract: the caller passes `loss_sum / global weight` to `backward`; after the micro-batch marked `last`, the
gradients that the optimizer sees are the sum of those terms over every rank and micro-batch.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from myllm_ray.common import distributed
from myllm_ray.common.types import Micro, as_mapping
from myllm_ray.config.errors import ConfigError

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Schedule(Protocol):
    """A learning-rate schedule as a backend needs it."""

    def step(self) -> None:
        """Go on to the next optimizer step."""


BuildSchedule = Callable[[torch.optim.Optimizer], Schedule]


class StepResult(NamedTuple):
    """`grad_norm`: of all parameters, before clipping. `skipped`: the step was left out (a loss scaler's overflow)."""

    grad_norm: float
    skipped: bool = False


class Accelerator(ABC):
    """Where the tensors live.

    Args:
        config: a run's config (its `accelerator` section is read), as a model or as a plain dict, or None for defaults.
    """

    distributed = False
    """Whether the backend needs a process group, also with one process."""

    def __init__(self, config: Any = None):
        section: Mapping[str, Any] = as_mapping(config).get("accelerator") or {}
        self.precision = section.get("precision") or "fp32"
        self.device_name = section.get("device") or "auto"
        self.options = dict(section.get("options") or {})
        self.device = torch.device("cpu")
        self._owns_group = False

    def setup(self) -> None:
        """Choose the device, and adopt the process group that Ray or torchrun made, or make one of one process.

        Raises:
            ConfigError: the device is not there, or cannot compute in this precision.
        """
        self.device = self._choose_device()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.distributed and not distributed.is_distributed():
            self._init_group()

    def _choose_device(self) -> torch.device:
        available = torch.cuda.is_available()
        if self.device_name == "cuda" and not available:
            raise ConfigError("accelerator.device=cuda: torch sees no CUDA device here; use auto or cpu")
        if self.device_name == "cpu" or not available:
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())

    def _init_group(self) -> None:
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # torchrun
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self._owns_group = True

    def close(self) -> None:
        """Give up what `setup` made."""
        if self._owns_group and distributed.is_distributed():
            dist.destroy_process_group()
            self._owns_group = False

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer, build_schedule: BuildSchedule) -> nn.Module:
        """Place and wrap the model, then build optimizer and schedule on it (sharding must come before the optimizer)."""
        self.module = model.to(self.device)
        self.model = self.wrap(self.module)
        self.optimizer = build_optimizer(self.module)
        self.schedule = build_schedule(self.optimizer)
        return self.model

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as this backend runs it."""

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """A model that is used but not trained, on the device, without gradients."""
        return model.to(self.device).requires_grad_(False).eval()

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the configured precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def microbatch(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; gradients are exchanged in the `last` one of a step."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss_sum / global weight`."""
        loss.backward()

    def optimizer_step(self, gradient_clip: float | None) -> StepResult:
        """Clip, step, advance the schedule, clear the gradients."""
        norm = self.clip(gradient_clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm)

    def clip(self, gradient_clip: float | None) -> float:
        """Scale the gradients down to a norm of at most `gradient_clip`; returns the norm they had."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip, norm)
        return float(norm)

    def move(self, micro: Micro) -> Micro:
        """A micro-batch on the device."""
        if self.device.type == "cpu":
            return micro
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in micro.items()}

    def generation(self) -> AbstractContextManager[Any]:
        """A context in which the model's `generate` is legal (parameters whole)."""
        return nullcontext()

    def all_reduce(self, values: Iterable[float | Tensor]) -> Tensor:
        """Sums over ranks of some numbers: (n,) float64 on the CPU."""
        items = [v.detach().to("cpu", torch.float64) if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64)
                 for v in values]
        return distributed.all_reduce_(torch.stack(items).to(self.device)).cpu()

    def all_reduce_ints(self, values: Iterable[int]) -> list[int]:
        """Sums over ranks modulo 2**64, as signed 64-bit integers."""
        tensor = torch.tensor(list(values), dtype=torch.int64, device=self.device)
        return [int(v) for v in distributed.all_reduce_(tensor).cpu()]

    def barrier(self) -> None:
        distributed.barrier()

    def state(self) -> dict[str, Tensor]:
        """Everything to save, by fully-qualified parameter name: `model.<name>`, `optimizer.<name>.<moment>`.

        The same keys and global shapes on every backend; sharded tensors are DTensors. A tied parameter stands once.
        Loading copies into these very tensors, so they must be the live ones (`init_optimizer_state` makes them).
        """
        self.init_optimizer_state()
        tensors: dict[str, Tensor] = {}
        names = {id(p): name for name, p in self.module.named_parameters()}
        for name, tensor in self.module.named_parameters():
            tensors[f"model.{name}"] = tensor.data
        persistent = self.module.state_dict(keep_vars=True)
        for name, buffer in self.module.named_buffers():
            if name in persistent:
                tensors[f"model.{name}"] = buffer
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
        return tensors

    def init_optimizer_state(self) -> None:
        """Let the optimizer make its moments, by a step that changes nothing: zero gradients, learning rate 0."""
        if self.optimizer.state:
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        saved = [p.detach().clone() for g in self.optimizer.param_groups for p in g["params"]]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, value in zip((p for g in self.optimizer.param_groups for p in g["params"]), saved, strict=True):
                parameter.copy_(value)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for moments in self.optimizer.state.values():
            for value in moments.values():
                if isinstance(value, Tensor):
                    value.zero_()
