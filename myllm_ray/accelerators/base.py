"""The interface of the accelerator backends.

Contract: the caller passes `loss_sum / global weight` to `backward`. After the micro-batch that is marked `last`, the
gradients that the optimizer reads are the sum of these terms over all ranks and micro-batches.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from myllm_ray.accelerators.collectives import Collectives
from myllm_ray.accelerators.memory import check_compiled_dropout, check_compiler, compile_cache, save_memory
from myllm_ray.accelerators.optimizer_state import OptimizerLayout, create_moments
from myllm_ray.accelerators.precision import (
    DTYPES,
    LossScale,
    check_precision,
    check_tf32,
    emulation_note,
    hold_weights,
    set_tf32,
)
from myllm_ray.accelerators.process_group import init_group, keep_group
from myllm_ray.accelerators.sharding import largest_shard, local_bytes
from myllm_ray.accelerators.staging import Transfers
from myllm_ray.common import distributed
from myllm_ray.common.materialize import materialize
from myllm_ray.common.modules import whole_shape
from myllm_ray.config.by_hand import sections
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.sections import AcceleratorSection, ScalingSection, Section
from myllm_ray.config.validation import section_of, typed

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Schedule(Protocol):
    """The part of a learning-rate schedule that a backend uses."""

    def step(self) -> None:
        """Advances the schedule to the next optimizer step."""


BuildSchedule = Callable[[torch.optim.Optimizer], Schedule]
Judge = Callable[[float], str | None]
"""Maps the gradient norm before clipping to the reason why the step must be skipped, or None.

It must return the same value on every rank, because the ranks step together.
"""


class StepResult(NamedTuple):
    """The result of one optimizer step."""

    grad_norm: float | Tensor
    """2-norm of the gradient of all parameters, before clipping; a scalar tensor if the device may still compute it."""
    skipped: bool = False
    """Whether the step changed no weight, because the gradient overflowed in fp16 or the judge rejected the step."""
    reason: str | None = None
    """The reason that the judge returned; None if it accepted the step or was not called."""


class Accelerator(Collectives, Transfers, ABC):
    """Base class of the backends, which place, shard and step a model.

    Args:
        config: The config of a run, as a model or a plain dict; None: the defaults. The backend reads its `accelerator`
            section.

    Raises:
        ConfigError: An option does not exist in this backend, or contradicts the config.
        UserError: The library of the backend is not installed.
    """

    Config: ClassVar[type[Section] | None] = None
    """Class of `accelerator.options`; None: the options belong to the backend's library, and `__init__` checks them."""
    distributed = False
    """Whether the backend needs a process group even with one process."""
    stages: ClassVar[tuple[int | None, ...]] = (None,)
    """Values of `accelerator.stage` that the backend accepts."""
    state_is_a_copy = False
    """Whether `state` returns copies, which training does not modify, instead of the live tensors."""
    mixes_dtypes = False
    """Whether parameters of one model may have different dtypes, so that frozen ones can be in half precision."""
    keeps_frozen = True
    """Whether frozen parameters must stay in fp32: they are saved, or used outside autocast. The engine sets it."""
    gradient_dtypes: ClassVar[tuple[str, ...]] = ("fp32",)
    """Values of `accelerator.gradient_dtype` that the backend supports. Gradients of fp32 parameters are fp32."""
    offloads: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Maps `optimizer` and `parameters` to the places that the backend can offload them to."""

    def __init__(self, config: Any = None):
        self.config = sections(config)
        self.section = section_of(self.config, "accelerator", AcceleratorSection)
        self.precision, self.device_name, self.offload = (
            self.section.precision,
            self.section.device,
            self.section.offload,
        )
        self.options: Any = self.section.options
        if self.Config is not None:
            self.options = typed(self.Config, self.section.options, "accelerator.options")
        self.device = torch.device("cpu")
        self._owns_group = self._is_set_up = False
        name = self.section.name if "name" in self.section.model_fields_set else type(self).__name__
        if self.section.gradient_dtype not in self.gradient_dtypes:
            raise ConfigError(
                f"accelerator.gradient_dtype={self.section.gradient_dtype}: {name} holds fp32 parameters, whose "
                "gradients are fp32; use fsdp, or deepspeed with accelerator.stage 1, 2 or 3"
            )
        for what in ("optimizer", "parameters"):
            where = getattr(self.offload, what)
            if where not in ("none", *self.offloads.get(what, ())):
                raise ConfigError(
                    f"accelerator.offload.{what}={where}: not supported by {name}, which offloads "
                    f"{', '.join(f'{k} to {v}' for k, vs in self.offloads.items() for v in vs) or 'nothing'}"
                )

    def check(self) -> None:
        """Checks whether this machine supports the config, without starting anything.

        Raises:
            ConfigError: The device does not exist or lacks the precision, or a compiler or folder is missing.
        """
        device = self._choose_device()
        # Limits of the backend come first: if no machine supports the config, advice about this device does not help.
        self.check_backend(device)
        check_precision(self.precision, device)
        if self.section.tf32:
            check_tf32(device)
        check_compiler(self.section, device)

    def check_backend(self, device: torch.device) -> None:
        """Rejects a config that this backend does not support on any device of this type.

        The result must not depend on the features of this machine.

        Raises:
            ConfigError: Names the problem and a supported alternative.
        """

    def check_model(self, model: nn.Module) -> None:
        """Checks whether this backend can place the model, before anything is written.

        Args:
            model: The model, possibly on the meta device.

        Raises:
            ConfigError: Only a part of the model would be sharded, or the model has dropout and would be compiled.
        """
        check_compiled_dropout(model, self.section)

    def setup(self) -> None:
        """Chooses the device, and joins the process group if the backend needs one.

        The group is the one that Ray initialized, or a new one: of torchrun's processes, or of this process alone.
        Repeated calls have no effect.

        Raises:
            ConfigError: See `check`.
        """
        if self._is_set_up:
            return
        self.check()
        self.device = self._choose_device()
        if self.device.type == "cuda":
            # "cuda" without an index, also inside libraries, then refers to the device of this worker.
            torch.cuda.set_device(self.device)
            set_tf32(self.section.tf32)
        if self.distributed and not distributed.is_distributed():
            scaling = section_of(self.config, "scaling", ScalingSection)
            init_group(self.device.type, scaling.timeout_seconds)
            self._owns_group = True
        self.loss_scale = LossScale(self.device, enabled=self.precision == "fp16", ranks=distributed.world_size())
        self._is_set_up = True

    def notes(self) -> list[str]:
        """Returns warnings about the device that `setup` has chosen, one line each."""
        return [note for note in [emulation_note(self.precision, self.device)] if note]

    def successor(self, config: Any) -> Self:
        """Returns this backend for another config of the same run, set up, with this one's process group."""
        made = type(self)(config)
        made._owns_group, self._owns_group = self._owns_group, False
        made.setup()
        return made

    def _choose_device(self) -> torch.device:
        available = torch.cuda.is_available()
        if self.device_name == "cuda" and not available:
            raise ConfigError("accelerator.device=cuda: torch sees no CUDA device here; use auto or cpu")
        if self.device_name == "cpu" or not available:
            return torch.device("cpu")
        # A worker may see fewer devices than its node has ranks, for example only its own one, at index 0.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())

    def close(self) -> None:
        """Releases what `setup` created."""
        self._is_set_up = False
        # A group that Ray initialized is left to Ray.
        if self._owns_group and distributed.is_distributed():
            keep_group()
            dist.destroy_process_group()
            self._owns_group = False

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer, build_schedule: BuildSchedule) -> nn.Module:
        """Places and wraps the model, builds the optimizer and the schedule, and returns the wrapped model.

        Args:
            model: The model with its weights, or on the meta device with an attached source of its weights
                (`common/materialize.py`).
            build_optimizer: Called with the placed model.
            build_schedule: Called with the optimizer.
        """
        # Order: `save_memory` changes the blocks inside the wrapper, and sharding replaces the parameters, so the
        # optimizer is built after `wrap`.
        save_memory(model, self.section, compile_cache(self.config))
        if self.mixes_dtypes and not self.keeps_frozen:
            hold_weights(model, self.precision, frozen_only=True)
        self.module = model
        self.model = self.wrap(self.module)
        self.optimizer = build_optimizer(self.module)
        self.schedule = build_schedule(self.optimizer)
        return self.model

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the model, moved to the device and wrapped or sharded by this backend."""

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """Places a model that is not trained in the same way as the trained one, without gradients.

        In half precision, the parameters have the dtype in which the trained model uses them, so equal weights result
        in equal outputs. A model on the meta device is filled from its source; a backend that shards parameters does
        this without a complete copy on any rank.

        Args:
            model: The model, possibly on the meta device.

        Returns:
            The placed model, in evaluation mode.
        """
        hold_weights(model, self.precision)
        return materialize(model, self.device).requires_grad_(False).eval()

    @property
    def asynchronous(self) -> bool:
        """Whether operations on the device return before it has computed them."""
        return self.device.type != "cpu"

    @property
    def shards(self) -> int:
        """Number of ranks over which each parameter is sharded."""
        return 1

    @property
    def optimizer_layout(self) -> OptimizerLayout:
        """The form in which the optimizer gets the parameters. It does not depend on the number of ranks."""
        return "whole"

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that `build_optimizer` returned to `prepare`."""
        return self.optimizer

    def parameter_bytes(self, model: nn.Module) -> tuple[int, int]:
        """Returns the bytes of parameters that this rank holds between steps, and the expected maximum.

        Args:
            model: The trained model, or a model that `prepare_frozen` returned.
        """
        parameters = list(model.parameters())
        expected = sum(largest_shard(whole_shape(p), self.shards) * p.element_size() for p in parameters)
        return sum(local_bytes(p) for p in parameters), expected

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns a context in which operations run in the configured precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    def microbatch(self, last: bool) -> AbstractContextManager[Any]:
        """Returns a context for the forward and backward pass of a micro-batch.

        Args:
            last: Whether this is the last micro-batch of the step, which reduces the gradients over ranks.
        """
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of a loss.

        Args:
            loss: Scalar `loss_sum / global weight` of a micro-batch.
        """
        self.loss_scale.scale(loss).backward()

    def optimizer_step(self, gradient_clip: float | None, judge: Judge | None = None) -> StepResult:
        """Unscales and clips the gradients, steps the optimizer and the schedule, and clears the gradients.

        Args:
            gradient_clip: Maximum norm of the gradient; None: no clipping.
            judge: Called once after the norm is computed and before any weight changes, unless fp16 overflowed.

        Returns:
            The gradient norm, and whether and why the step was skipped.
        """
        # `gradient_clip` is a bound on the true gradients, so the loss scale is removed first.
        self.loss_scale.unscale_(self.optimizer)
        norm = self.clip(gradient_clip)
        # The norm is the same on every rank, and so are the decisions that follow from it. The host waits for it only
        # for a judge or a loss scale.
        reason = self.judge(norm, judge)
        finite = not self.loss_scale.enabled or math.isfinite(norm)
        skipped = self.loss_scale.step(self.optimizer, finite, reject=reason is not None)
        # Also after a skipped step: the learning rate is a function of the step number.
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, skipped, reason)

    def judge(self, norm: float | Tensor, judge: Judge | None) -> str | None:
        """Calls the judge, unless fp16 overflowed, and returns its reason to skip the step or None."""
        if judge is None:
            return None
        value = float(norm)
        # The loss scaler handles an overflow: it skips the step and halves the scale.
        overflow = self.loss_scale.enabled and not math.isfinite(value)
        return None if overflow else judge(value)

    def clip(self, gradient_clip: float | None) -> float | Tensor:
        """Scales the gradients to a norm of at most `gradient_clip`, in place, and returns the norm before clipping."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        # On CUDA one kernel for many tensors. torch selects it by itself for plain tensors only, not for sharded ones.
        foreach = True if parameters and all(p.grad.is_cuda for p in parameters if p.grad is not None) else None
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=foreach)
        # The norm of sharded gradients is a DTensor. `full_tensor` reduces it over ranks, so every rank must call it.
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip, norm, foreach=foreach)
        return norm

    def generation(self) -> AbstractContextManager[Any]:
        """Returns a context in which the model's parameters are complete on every rank, as `generate` requires."""
        return nullcontext()

    def state(self, frozen: bool = True) -> dict[str, Tensor]:
        """Returns the fp32 tensors of a checkpoint, by name: `model.<name>` and `optimizer.<name>.<moment>`.

        `<name>` is the fully qualified name of a parameter. Keys and global shapes are the same on every backend.
        Sharded tensors are DTensors. A tied parameter appears once.

        To load a checkpoint, fill these tensors in place and pass them to `load_state`. `state_is_a_copy` specifies
        whether they are the live tensors.

        Args:
            frozen: Whether to include the parameters that are not trained.
        """
        # Optimizers create their moments in the first step, but a checkpoint may be loaded before that.
        if not self.optimizer.state:
            create_moments(self.optimizer)
        tensors: dict[str, Tensor] = {}
        # `named_parameters` yields a tied parameter once, under its first name.
        names = {id(p): name for name, p in self.module.named_parameters()}
        for name, tensor in self.module.named_parameters():
            if frozen or tensor.requires_grad:
                tensors[f"model.{name}"] = tensor.data
        tensors.update(self.buffers())
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Loads the tensors that `state` returned, after a checkpoint filled them.

        The base class does nothing, because its `state` returns the live tensors.
        """

    def buffers(self) -> dict[str, Tensor]:
        """Returns the persistent buffers, by their names in `state`."""
        # A state dict has no other buffers.
        persistent = self.module.state_dict(keep_vars=True)
        return {f"model.{name}": buffer for name, buffer in self.module.named_buffers() if name in persistent}
