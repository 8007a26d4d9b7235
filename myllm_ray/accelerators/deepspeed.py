"""DeepSpeed: ZeRO shards the optimizer state (stage 1), the gradients too (2), the parameters too (3); 0 shards nothing.

What DeepSpeed would do by itself and the engine does instead: divide by accumulation steps, average over ranks, step the
schedule. What stands in a checkpoint is `zero_state.py`'s affair.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from myllm_ray.accelerators.base import Accelerator, BuildOptimizer, BuildSchedule, StepResult
from myllm_ray.accelerators.deepspeed_config import check_json, deepspeed_config, frozen_config
from myllm_ray.accelerators.memory import save_memory
from myllm_ray.accelerators.precision import DTYPES, autocast_forward, hold_in
from myllm_ray.accelerators.zero_state import ZeroLossScale, ZeroState
from myllm_ray.common.distributed import world_size
from myllm_ray.common.extras import require
from myllm_ray.common.files import why_not_writable
from myllm_ray.common.materialize import Filled, Source, fill, materialize, source_of
from myllm_ray.common.modules import whole_shape
from myllm_ray.common.quiet import quieten
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.load import merge

_WHOLE_TENSORS = ("adafactor", "muon", "lbfgs", "sparseadam")
"""Optimizers whose step looks at a tensor's shape. ZeRO gives them flat slices of many tensors: another algorithm."""


class DeepSpeedAccelerator(Accelerator):
    """`deepspeed.initialize` (ZeRO: Rajbhandari et al., 2020, arXiv:1910.02054).

    In half precision stages 1 to 3 hold parameters of that type and fp32 masters; stage 0 holds fp32 parameters. All compute
    under autocast, as the other backends do.
    `accelerator.options` is a DeepSpeed JSON; keys that the config decides are refused where they say something else.
    """

    distributed = True
    stages = (0, 1, 2, 3)
    offloads: ClassVar[Mapping[str, tuple[str, ...]]] = {"optimizer": ("cpu", "disk"), "parameters": ("cpu", "disk")}

    def __init__(self, config: Any = None):
        super().__init__(config)
        quieten(cuda=torch.cuda.is_available() and self.device_name != "cpu")
        self.deepspeed = require("deepspeed", "deepspeed", "accelerator.name=deepspeed")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # a page at every start
        # Its shared-memory collectives for CPUs are compiled at the first start, which takes a compiler and half a minute.
        self.deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        stage = self.section.get("stage")
        self.stage: int = 2 if stage is None else stage
        self.state_is_a_copy = self.stage > 0
        self._check_stage()
        self._frozen: list[Any] = []
        self.json = deepspeed_config(self.options, self.config, self.stage, self.precision, self.offload)

    @property
    def shards(self) -> int:
        return world_size() if self.stage == 3 else 1

    def _check_stage(self) -> None:
        if self.offload["optimizer"] != "none" and self.stage == 0:
            raise ConfigError("accelerator.offload.optimizer: stage 0 shards nothing to offload; use accelerator.stage 1, 2 or 3")
        if "disk" in (self.offload["optimizer"], self.offload["parameters"]) and self.stage != 3:
            raise ConfigError(f"accelerator.offload: only stage 3 offloads to disk, accelerator.stage is {self.stage}")
        if self.offload["parameters"] != "none" and self.stage != 3:
            raise ConfigError(f"accelerator.offload.parameters: only stage 3 shards parameters, accelerator.stage is {self.stage}")
        name = str((self.config.get("optimizer") or {}).get("name") or "adamw").rpartition(":")[2]
        if self.stage > 0 and name.lower() in _WHOLE_TENSORS:
            raise ConfigError(f"optimizer.name={name} needs whole tensors, ZeRO gives it flat slices: use fsdp, ddp, or "
                              "accelerator.stage=0")

    def check_backend(self, device: torch.device) -> None:
        check_json(self.json)

    def check(self) -> None:
        super().check()
        if "disk" not in (self.offload["optimizer"], self.offload["parameters"]):
            return
        problem = why_not_writable(Path(self.offload["path"]))
        if problem:
            raise ConfigError(f"accelerator.offload.path: {self.offload['path']} can't be written: {problem}")
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise ConfigError("accelerator.offload: to disk needs DeepSpeed's async_io, and that needs libaio's headers "
                              "(Debian: apt install libaio-dev)")

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer, build_schedule: BuildSchedule) -> nn.Module:
        save_memory(model, self.section)
        self._autocast_inside(model)
        self.module, source = model, source_of(model)
        os.environ.setdefault("LOCAL_RANK", "0")  # read by zero.Init
        self.json = merge({"zero_optimization": self._buffers(model)}, self.json)
        if self.stage == 3 and source is not None:
            self._fill(model, source, self.json)
        else:
            materialize(model, "cpu" if self.offload["parameters"] != "none" else self.device)
        rounded = self.precision != "fp32" and self.stage > 0
        if rounded and source is None:
            whole = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in model.named_parameters()}
            source = whole.__getitem__
        with redirect_stdout(io.StringIO()):  # it prints its memory at every start
            engine, self.optimizer, *_ = self.deepspeed.initialize(
                model=model, optimizer=build_optimizer(model), config=self.json, dist_init_required=False)
        self.engine = engine
        if self.stage == 3:
            # The head is used without calling its module. DeepSpeed finds that out in the first forward pass, and then refuses the second
            # one, whose order of parameters is another; where a backward pass comes between them, it begins anew.
            for parameter in getattr(model, "parameters_used_directly", list)():
                self.deepspeed.zero.register_external_parameter(model, parameter)
        self.model = cast(nn.Module, engine)
        self.schedule = build_schedule(self.optimizer)
        if self.stage > 0:
            self.loss_scale = ZeroLossScale(self.optimizer, enabled=self.precision == "fp16")  # type: ignore[assignment]
            self._gate()
            self.zero = ZeroState(self.deepspeed, model, self.optimizer, self.stage, self.device)
            if rounded and source is not None:
                # DeepSpeed made its fp32 masters from rounded parameters: give them back what the rounding took.
                self.zero.set_masters(source)
        return self.model

    def _gate(self) -> None:
        """Ask for a veto where ZeRO, its norm computed, calls the optimizer inside it, once for every group of parameters."""
        zero = cast(Any, self.optimizer)
        step = zero.optimizer.step
        self._answer: bool | None = None

        def gated(*args: Any, **kwargs: Any) -> Any:
            if self._answer is None:
                self._answer = self.veto is not None and self.vetoed(float(zero._global_grad_norm))
            return None if self._answer else step(*args, **kwargs)

        zero.optimizer.step = gated

    def _autocast_inside(self, model: nn.Module) -> None:
        """Autocast within the model's forward: one around it would be switched off by DeepSpeed's engine."""
        if self.precision != "fp32":
            autocast_forward(model, super().autocast)

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """Under stage 3 sharded, in an engine without an optimizer; under the others whole, as the trained model is."""
        self._autocast_inside(model)
        if self.stage == 0:
            return super().prepare_frozen(model)
        compute = DTYPES[self.precision]
        hold_in(model, {name: compute for name, p in model.named_parameters() if p.is_floating_point()})
        model.requires_grad_(False).eval()
        if self.stage < 3:
            return materialize(model, self.device)
        json = merge(frozen_config(self.json), {"zero_optimization": self._buffers(model)})
        source = source_of(model)
        if source is not None:
            self._fill(model, source, json)
        else:
            model.to("cpu" if self.offload["parameters"] != "none" else self.device)
        with redirect_stdout(io.StringIO()):
            engine, *_ = self.deepspeed.initialize(model=model, config=json, dist_init_required=False)
        self._frozen.append(engine)
        nn.Module.train(engine, False)  # the engine's own `eval` leaves its flag
        return cast(nn.Module, engine)

    def _buffers(self, model: nn.Module) -> dict[str, Any]:
        """Offloading to disk: buffers through which parameters pass, for the largest one. DeepSpeed's default is 2 GB for every worker."""
        if self.offload["parameters"] != "disk":
            return {}
        return {"offload_param": {"buffer_size": max(whole_shape(p).numel() for p in model.parameters())}}

    def wrap(self, model: nn.Module) -> nn.Module:
        return self.model  # `prepare` has made it, together with the optimizer

    def _fill(self, model: nn.Module, source: Source, json: dict[str, Any]) -> None:
        """Give a model on the meta device its weights, module by module, each sharded before the next is made."""
        first_names = {id(p): name for name, p in model.named_parameters()}
        named = {name: first_names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        compute = torch.float32 if self.precision == "fp32" else DTYPES[self.precision]
        done: Filled = {}
        for name, module in reversed(list(model.named_modules())):  # the parts before the whole: Init looks at all inside
            fill(module, lambda n: source(named.get(n, n)), "cpu", prefix=name, recurse=False, done=done)
            own = list(module.parameters(recurse=False))
            for parameter in own:
                if not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.to(self.device, compute)
            if own:
                self.deepspeed.zero.Init(module=module, config_dict_or_path=json)
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = buffer.to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # see `_autocast_inside`

    def microbatch(self, last: bool) -> AbstractContextManager[Any]:
        # Before the forward pass; forgotten, nothing fails and the training is wrong.
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the contract is a sum.
        loss = loss * world_size()
        self.engine.backward(self.loss_scale.scale(loss) if self.stage == 0 else loss, scale_wrt_gas=False)

    def optimizer_step(self, gradient_clip: float | None) -> StepResult:
        if self.stage == 0:
            return super().optimizer_step(gradient_clip)
        if (gradient_clip or 0.0) != self.json["gradient_clipping"]:
            raise ValueError(f"gradient_clip={gradient_clip}, DeepSpeed was set up with {self.json['gradient_clipping']}")
        self._answer = None
        self.engine.step()
        # The schedule is not given to DeepSpeed, which would leave it standing in a skipped step.
        self.schedule.step()
        norm = self.engine.get_global_grad_norm()
        norm = math.nan if norm is None else float(norm)
        if self._answer is None and not math.isfinite(norm):  # ZeRO left the step out by itself
            self._answer = self.vetoed(norm)
        overflow = self.loss_scale.enabled and bool(cast(Any, self.optimizer).overflow)
        return StepResult(norm, bool(self._answer) or overflow)

    def generation(self) -> AbstractContextManager[Any]:
        """All parameters whole on every rank meanwhile, so that ranks may call the model unequally often."""
        return nullcontext() if self.stage < 3 else self._gathered()

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Whole parameters and no hooks: ZeRO-3's release a module's parameters behind its forward pass, gather them in front of the next
        one, and compare the order of modules with the other ranks. Each of these waits for the other ranks, which write answers of
        other lengths."""
        offload = self.engine.optimizer.parameter_offload
        handles = [*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]
        tables = {id(table): table for handle in handles if (table := handle.hooks_dict_ref()) is not None}
        before = {key: dict(table) for key, table in tables.items()}
        with self.deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            for handle in handles:
                if (table := handle.hooks_dict_ref()) is not None:
                    table.pop(handle.id, None)
            try:
                yield
            finally:
                for key, table in tables.items():  # in their order, between the hooks of others
                    table.clear()
                    table.update(before[key])

    def state(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return super().state()
        return {**self.zero.tensors(), **{name: buffer.detach().cpu().clone() for name, buffer in self.buffers().items()}}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        if self.stage > 0:
            self.zero.load(tensors)
            for name, buffer in self.buffers().items():
                buffer.copy_(tensors[name])

    def close(self) -> None:
        for engine in self._frozen:
            engine.destroy()
        self._frozen.clear()
        if hasattr(self, "engine"):
            self.engine.destroy()
        if self._owns_group and self.deepspeed.comm.is_initialized():
            self._keep_group()
            self.deepspeed.comm.destroy_process_group()  # and what DeepSpeed remembers of it, for the next run here
            self._owns_group = False
        super().close()
