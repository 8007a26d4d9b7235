"""Hugging Face Accelerate: `accelerate.Accelerator` and its plugins, with the interface of the other backends."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from myllm_ray.accelerators.base import Accelerator, BuildOptimizer, BuildSchedule, Judge, StepResult
from myllm_ray.accelerators.ddp import fix_buckets
from myllm_ray.accelerators.fsdp import FSDPAccelerator
from myllm_ray.accelerators.memory import compile_cache, save_memory
from myllm_ray.accelerators.optimizer_state import OptimizerLayout
from myllm_ray.accelerators.options import keyword_options
from myllm_ray.accelerators.precision import autocast_forward
from myllm_ray.accelerators.sharding import blocks_of
from myllm_ray.common.distributed import world_size
from myllm_ray.common.extras import require
from myllm_ray.common.materialize import materialize
from myllm_ray.common.modules import repeated_blocks
from myllm_ray.common.quiet import quieten
from myllm_ray.config.errors import ConfigError

# Maps arguments of `accelerate.Accelerator` that are not allowed in the options to the config keys that replace them.
_DECIDED = {
    "mixed_precision": "accelerator.precision",
    "cpu": "accelerator.device",
    "dynamo_backend": "accelerator.compile",
    "dynamo_plugin": "accelerator.compile",
    "gradient_accumulation_steps": "the section `batch`",
    "gradient_accumulation_plugin": "the section `batch`",
    "dataloader_config": "the section `data`",
    "step_scheduler_with_optimizer": "the section `scheduler`",
    "device_placement": "accelerator.device",
    "project_dir": "run.storage",
    "project_config": "run.storage",
    "log_with": "the section `callbacks`",
    "rng_types": "run.seed",
    "split_batches": "the section `batch`",
    "even_batches": "the section `batch`",
    "deepspeed_plugin": "accelerator.name=deepspeed",
    "deepspeed_plugins": "accelerator.name=deepspeed",
}
# Maps the plugin arguments of `accelerate.Accelerator` to their classes in `accelerate.utils`.
_PLUGINS = {
    "fsdp_plugin": "FullyShardedDataParallelPlugin",
    "torch_tp_plugin": "TorchTensorParallelPlugin",
    "megatron_lm_plugin": "MegatronLMPlugin",
}


class HFAccelerator(Accelerator):
    """Trains with `accelerate.Accelerator`; `accelerator.options` are its keyword arguments.

    Plugins and handlers are mappings of their arguments: `fsdp_plugin: {fsdp_version: 2, ...}`,
    `kwargs_handlers: {DistributedDataParallelKwargs: {bucket_cap_mb: 50}}`. Without a plugin, Accelerate trains with
    DDP.
    """

    distributed = True

    def __init__(self, config: Any = None):
        super().__init__(config)
        # Accelerate imports DeepSpeed if it is installed, and DeepSpeed prints messages.
        quieten(cuda=torch.cuda.is_available() and self.device_name != "cpu")
        self.accelerate = require("accelerate", "myllm_ray[accelerate]", "accelerator.name=accelerate")
        for key in self.options:
            if key in _DECIDED:
                raise ConfigError(f"accelerator.options.{key}: {_DECIDED[key]} controls this; remove the option")
        keyword_options(self.accelerate.Accelerator, self.options)
        self._arguments()  # reports errors in the options before anything starts

    _wrapping: Mapping[str, Any] = MappingProxyType({"auto_wrap_policy": "no_wrap"})
    """Default wrapping options of the FSDP plugin. `prepare` replaces them by the repeated blocks of the model."""

    def _arguments(self) -> dict[str, Any]:
        return {key: self._object(key, value) for key, value in self.options.items()}

    def _object(self, key: str, value: Any) -> Any:
        """Returns an option in the form that Accelerate accepts: mappings become plugins and handlers."""
        if key == "kwargs_handlers" and isinstance(value, Mapping):
            return [
                self._build(name, arguments, f"accelerator.options.{key}.{name}") for name, arguments in value.items()
            ]
        if key in _PLUGINS and isinstance(value, Mapping):
            if key == "fsdp_plugin" and value.get("fsdp_version", 2) != 2:
                raise ConfigError(
                    "accelerator.options.fsdp_plugin.fsdp_version: only version 2 keeps the names of the parameters, "
                    "which checkpoints need"
                )
            defaults = {"fsdp_version": 2, **self._wrapping} if key == "fsdp_plugin" else {}
            return self._build(_PLUGINS[key], {**defaults, **value}, f"accelerator.options.{key}")
        return value

    def _build(self, name: str, arguments: Mapping[str, Any] | None, key: str) -> Any:
        cls = getattr(self.accelerate.utils, name, None)
        if cls is None:
            raise ConfigError(f"{key}: accelerate.utils has no {name}")
        keyword_options(cls, arguments or {}, key=key)
        return cls(**{option: self._hook(f"{key}.{option}", value) for option, value in (arguments or {}).items()})

    def _hook(self, key: str, value: Any) -> Any:
        """Returns a communication hook of DDP as the enumeration that Accelerate requires; it ignores its name."""
        if not key.endswith((".comm_hook", ".comm_wrapper")) or not isinstance(value, str):
            return value
        if value in ("power_sgd", "batched_power_sgd"):
            raise ConfigError(f"{key}={value}: checkpoints do not contain its state, so a resumed run would differ")
        if value not in ("no", "fp16", "bf16"):
            raise ConfigError(f"{key}={value!r}: choose from no, fp16, bf16")
        return self.accelerate.utils.DDPCommunicationHookType(value)

    def check_backend(self, device: torch.device) -> None:
        if self.precision == "fp16" and device.type == "cpu":
            raise ConfigError(
                "accelerator.precision=fp16: Accelerate supports it on GPUs only; use bf16, or ddp, fsdp or deepspeed"
            )
        handlers = self.options.get("kwargs_handlers")
        ddp = handlers.get("DistributedDataParallelKwargs") if isinstance(handlers, Mapping) else None
        if device.type == "cpu" and ddp and "bf16" in (ddp.get("comm_hook"), ddp.get("comm_wrapper")):
            raise ConfigError(
                "accelerator.options.kwargs_handlers: DDP communicates in bf16 on GPUs only; leave the hook out, or "
                "choose fp16"
            )
        if "fsdp_plugin" in self.options and device.type == "cpu":
            raise ConfigError(
                "accelerator.options.fsdp_plugin: Accelerate ignores it on CPUs and trains with DDP; use "
                "accelerator.name=fsdp"
            )

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer, build_schedule: BuildSchedule) -> nn.Module:
        save_memory(model, self.section, compile_cache(self.config))
        self._forget()
        self.check_model(model)
        blocks = {type(block).__name__ for block in repeated_blocks(model)}
        if blocks:
            self._wrapping = {
                "auto_wrap_policy": "transformer_based_wrap",
                "transformer_cls_names_to_wrap": sorted(blocks),
            }
        # Without OMP_NUM_THREADS, Accelerate changes the number of threads on CPUs.
        with _environment_kept(OMP_NUM_THREADS=str(torch.get_num_threads())):
            self.outer = self.accelerate.Accelerator(
                cpu=self.device.type == "cpu",
                mixed_precision={"fp32": "no"}.get(self.precision, self.precision),
                **self._arguments(),
            )
        self.module = materialize(model, self.device)
        # Not the data loader, which Accelerate would shard and seed, and not the scheduler, which it would step once
        # per rank.
        self.model, self.outer_optimizer = self.outer.prepare(self.module, build_optimizer(self.module))
        if isinstance(self.model, DistributedDataParallel):
            fix_buckets(self.model)
        self.module = self.outer.unwrap_model(self.model, keep_fp32_wrapper=True)
        self.optimizer = self.outer_optimizer.optimizer
        self.schedule = build_schedule(self.optimizer)
        # In fp16, Accelerate scales the loss with its own scaler; metrics and checkpoints read and write that one.
        if self.outer.scaler is not None:
            self.loss_scale.adopt(self.outer.scaler)
        return self.model

    def check_model(self, model: nn.Module) -> None:
        super().check_model(model)
        plugin = self.options.get("fsdp_plugin")
        if isinstance(plugin, Mapping) and not plugin.keys() & {"auto_wrap_policy", "transformer_cls_names_to_wrap"}:
            blocks_of(model)

    @property
    def shards(self) -> int:
        return world_size() if "fsdp_plugin" in self.options else 1

    @property
    def optimizer_layout(self) -> OptimizerLayout:
        return "shards" if "fsdp_plugin" in self.options else "whole"

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """Places a model that is not trained: sharded if the trained model has an FSDP plugin, otherwise complete."""
        # Accelerate adds autocast only to the forward of the model that it prepares.
        if self.precision != "fp32":
            autocast_forward(model, super().autocast)
        if "fsdp_plugin" not in self.options:
            return super().prepare_frozen(model)
        fsdp = FSDPAccelerator({"accelerator": {"precision": self.precision, "device": self.device_name}})
        fsdp.device = self.device
        return fsdp.prepare_frozen(model)

    def wrap(self, model: nn.Module) -> nn.Module:
        return self.model  # `prepare` creates it together with the optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # Accelerate adds autocast to the model's forward

    def microbatch(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.outer.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        # Accelerate averages over ranks, but the contract is a sum. It applies its loss scale itself.
        self.outer.backward(loss * world_size())

    def optimizer_step(self, gradient_clip: float | None, judge: Judge | None = None) -> StepResult:
        self.outer.unscale_gradients(self.outer_optimizer)
        norm = self.clip(gradient_clip)
        reason = self.judge(norm, judge)
        # The step of Accelerate's optimizer includes the update of the scaler. After a rejected step the scaler has to
        # be updated separately, because it can't unscale twice without an update.
        if reason is None:
            self.outer_optimizer.step()
        elif self.outer.scaler is not None:
            self.outer.scaler.update()
        self.schedule.step()
        self.outer_optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, reason is not None or bool(self.outer_optimizer.step_was_skipped), reason)

    def close(self) -> None:
        if hasattr(self, "outer"):
            self.outer.free_memory()
            self._forget()
        super().close()

    @staticmethod
    def _forget() -> None:
        """Resets the state that Accelerate stores in its classes, so that the next run in this process has its own."""
        from accelerate.state import AcceleratorState, GradientState, PartialState

        AcceleratorState._reset_state()
        GradientState._reset_state()
        PartialState._reset_state()


@contextmanager
def _environment_kept(**variables: str) -> Iterator[None]:
    """Restores the environment variables after the block.

    Accelerate writes ranks and addresses into the environment, which later runs in this process would read.

    Args:
        variables: Environment variables to set inside the block.
    """
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in sorted(set(os.environ) - set(before)):
            del os.environ[name]
        os.environ.update(before)
