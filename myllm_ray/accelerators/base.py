"""Everything that differs between backends, behind one interface.

The contract: the caller passes `loss_sum / global weight` to `backward`; after the micro-batch marked `last`, the
gradients that the optimizer sees are the sum of those terms over every rank and micro-batch.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from myllm_ray.accelerators.memory import check_compiled_dropout, save_memory
from myllm_ray.accelerators.precision import DTYPES, LossScale, autocast_dtypes, check_precision, hold_in
from myllm_ray.accelerators.sharding import largest_shard, local_bytes
from myllm_ray.common import distributed
from myllm_ray.common.materialize import materialize
from myllm_ray.common.modules import whole_shape
from myllm_ray.common.types import Micro, as_mapping
from myllm_ray.config.errors import ConfigError

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


_last_group: list[Any] = []


class Schedule(Protocol):
    """A learning-rate schedule as a backend needs it."""

    def step(self) -> None:
        """Go on to the next optimizer step."""


BuildSchedule = Callable[[torch.optim.Optimizer], Schedule]
Veto = Callable[[float], bool]
"""(norm of the gradient before clipping) -> whether this step is to be left out. The same answer on every rank."""


class StepResult(NamedTuple):
    """`grad_norm`: of all parameters, before clipping. `skipped`: the step was left out (a loss scaler's overflow, a veto)."""

    grad_norm: float
    skipped: bool = False


class Accelerator(ABC):
    """Where the tensors live.

    Args:
        config: a run's config (its `accelerator` section is read), as a model or as a plain dict, or None for defaults.

    Raises:
        ConfigError: options that the backend does not have, or that contradict the config.
        UserError: the backend's library is not installed.
    """

    distributed = False
    """Whether the backend needs a process group, also with one process."""
    stages: ClassVar[tuple[int | None, ...]] = (None,)
    """Values of `accelerator.stage` that mean something here."""
    state_is_a_copy = False
    """Whether `state` gives copies, which training leaves alone, and not the live tensors."""
    offloads: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Where the backend can move `optimizer` and `parameters` to."""

    def __init__(self, config: Any = None):
        self.config = as_mapping(config)
        self.section: Mapping[str, Any] = self.config.get("accelerator") or {}
        self.precision: str = self.section.get("precision") or "fp32"
        self.device_name: str = self.section.get("device") or "auto"
        self.options = dict(self.section.get("options") or {})
        self.offload: dict[str, Any] = {"optimizer": "none", "parameters": "none", "path": None,
                                        **(self.section.get("offload") or {})}
        self.device = torch.device("cpu")
        self.veto: Veto | None = None
        """Asked once a step, when the norm is known and no weight has changed yet; not about an overflow of fp16."""
        self._owns_group = False
        for what in ("optimizer", "parameters"):
            if self.offload[what] not in ("none", *self.offloads.get(what, ())):
                name = self.section.get("name", type(self).__name__)
                raise ConfigError(f"accelerator.offload.{what}={self.offload[what]}: {name} can't; it offloads "
                                  f"{', '.join(f'{k} to {v}' for k, vs in self.offloads.items() for v in vs) or 'nothing'}")

    def check(self) -> None:
        """Look whether this machine can do what the config asks, without starting anything.

        What the backend has on no machine comes first (`check_backend`): advice about this machine's device would not help.

        Raises:
            ConfigError: the device is not there, it can't compute in this precision, or a folder can't be written.
        """
        device = self._choose_device()
        self.check_backend(device)
        check_precision(self.precision, device)

    def check_backend(self, device: torch.device) -> None:
        """Refuse what this backend can't do on any device of this type. Must not depend on what the machine has.

        Raises:
            ConfigError: says what is wrong, and what to use.
        """

    def check_model(self, model: nn.Module) -> None:
        """Look whether this backend can place the model (it may be on the meta device), before anything is written.

        Raises:
            ConfigError: it would be sharded in part only, or dropout is to be compiled.
        """
        check_compiled_dropout(model, self.section)

    def setup(self) -> None:
        """Choose the device, and adopt the process group that Ray or torchrun made, or make one of one process.

        Raises:
            ConfigError: see `check`.
        """
        self.check()
        self.device = self._choose_device()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.distributed and not distributed.is_distributed():
            self._init_group()
        self.loss_scale = LossScale(self.device, enabled=self.precision == "fp16", ranks=distributed.world_size())

    def _choose_device(self) -> torch.device:
        available = torch.cuda.is_available()
        if self.device_name == "cuda" and not available:
            raise ConfigError("accelerator.device=cuda: torch sees no CUDA device here; use auto or cpu")
        if self.device_name == "cpu" or not available:
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())

    def _init_group(self) -> None:
        backend = distributed.backend(self.device.type)
        timeout = timedelta(seconds=(self.config.get("scaling") or {}).get("timeout_seconds", distributed.TIMEOUT_SECONDS))
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # torchrun
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        self._owns_group = True

    def close(self) -> None:
        """Give up what `setup` made."""
        if self._owns_group and distributed.is_distributed():
            self._keep_group()
            dist.destroy_process_group()
            self._owns_group = False

    @staticmethod
    def _keep_group() -> None:
        """Put off the end of gloo's threads until the next group ends.

        A group's destructor joins its threads while it holds the interpreter's lock; a thread that still drops the Python
        objects of its last work waits for that lock, and both wait for ever (torch 2.13).
        """
        _last_group[:] = [dist.group.WORLD]

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer, build_schedule: BuildSchedule) -> nn.Module:
        """Place and wrap the model, then build optimizer and schedule on it (sharding must come before the optimizer).

        Args:
            model: with its weights, or on the meta device with the source of its weights beside it (`common/materialize.py`).
            build_optimizer, build_schedule: called on what the backend made.
        """
        save_memory(model, self.section)
        self.module = model
        self.model = self.wrap(self.module)
        self.optimizer = build_optimizer(self.module)
        self.schedule = build_schedule(self.optimizer)
        return self.model

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, on the device, as this backend runs it."""

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """A model that is used but not trained, placed as the trained one is, without gradients.

        In half precision it holds what the trained model computes with: equal weights give equal outputs. A model on the meta
        device is filled from its source, by a backend that shards without any rank holding the whole.
        """
        if self.precision != "fp32":
            hold_in(model, autocast_dtypes(model, DTYPES[self.precision]))
        return materialize(model, self.device).requires_grad_(False).eval()

    @property
    def shards(self) -> int:
        """Ranks over which each parameter is divided."""
        return 1

    def parameter_bytes(self, model: nn.Module) -> tuple[int, int]:
        """Bytes of a model's parameters that this rank holds between steps, and the most that it should hold.

        Args:
            model: the trained one, or one that `prepare_frozen` gave.
        """
        parameters = list(model.parameters())
        expected = sum(largest_shard(whole_shape(p), self.shards) * p.element_size() for p in parameters)
        return sum(local_bytes(p) for p in parameters), expected

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the configured precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    def microbatch(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; gradients are exchanged in the `last` one of a step."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss_sum / global weight`."""
        self.loss_scale.scale(loss).backward()

    def optimizer_step(self, gradient_clip: float | None) -> StepResult:
        """Unscale, clip, step, advance the schedule, clear the gradients.

        The schedule goes on also where an overflow of fp16 skipped the step: a learning rate belongs to a step's number.
        """
        self.loss_scale.unscale_(self.optimizer)
        norm = self.clip(gradient_clip)
        skipped = self.loss_scale.step(self.optimizer, math.isfinite(norm), vetoed=self.vetoed(norm))
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, skipped)

    def vetoed(self, norm: float) -> bool:
        """Whether the step is to be left out, for another reason than fp16's overflow."""
        overflow = self.loss_scale.enabled and not math.isfinite(norm)
        return self.veto is not None and not overflow and self.veto(norm)

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
        """Sums over ranks of some numbers, or tensors, which are flattened: (n,) float64 on the CPU."""
        items = [v.detach().to("cpu", torch.float64).flatten() if isinstance(v, Tensor) else torch.tensor([v], dtype=torch.float64)
                 for v in values]
        return distributed.all_reduce_(torch.cat(items).to(self.device)).cpu()

    def all_reduce_ints(self, values: Iterable[int]) -> list[int]:
        """Sums over ranks modulo 2**64, as signed 64-bit integers."""
        tensor = torch.tensor(list(values), dtype=torch.int64, device=self.device)
        return [int(v) for v in distributed.all_reduce_(tensor).cpu()]

    def barrier(self) -> None:
        distributed.barrier()

    def state(self) -> dict[str, Tensor]:
        """Everything to save, by fully-qualified parameter name: `model.<name>`, `optimizer.<name>.<moment>`, fp32.

        The same keys and global shapes on every backend; sharded tensors are DTensors. A tied parameter stands once.
        To load, fill these very tensors and give them to `load_state`: whether they are the live ones is the backend's affair.
        """
        if not self.optimizer.state:
            self.init_optimizer_state(self.optimizer)
        tensors: dict[str, Tensor] = {}
        names = {id(p): name for name, p in self.module.named_parameters()}
        for name, tensor in self.module.named_parameters():
            tensors[f"model.{name}"] = tensor.data
        tensors.update(self.buffers())
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over tensors that `state` gave and a checkpoint filled. Here they are the live ones."""

    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers, as `state` names them."""
        persistent = self.module.state_dict(keep_vars=True)
        return {f"model.{name}": buffer for name, buffer in self.module.named_buffers() if name in persistent}

    @staticmethod
    def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer make its moments, by a step that changes nothing: zero gradients, learning rate 0."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        rates = [group["lr"] for group in optimizer.param_groups]
        saved = [(p.detach().clone(), p.grad) for p in parameters]
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with torch.no_grad():
            for parameter, (value, gradient) in zip(parameters, saved, strict=True):
                parameter.copy_(value)
                parameter.grad = gradient
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for value in [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, Tensor)]:
            value.zero_()
