"""DeepSpeed with ZeRO.

Stage 1 shards the optimizer state, stage 2 also the gradients, stage 3 also the parameters. Stage 0 does not shard.
Three functions of DeepSpeed are not used: the division by the number of accumulation steps, the average over ranks
(a factor turns it into a sum), and the steps of the schedule. `zero_state.py` reads and writes the state of ZeRO for
checkpoints.
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

from myllm_ray.accelerators.base import Accelerator, BuildOptimizer, BuildSchedule, Judge, StepResult
from myllm_ray.accelerators.deepspeed_config import check_json, deepspeed_config, frozen_config
from myllm_ray.accelerators.memory import compile_cache, save_memory
from myllm_ray.accelerators.optimizer_state import OptimizerLayout
from myllm_ray.accelerators.precision import DTYPES, autocast_forward, hold_in
from myllm_ray.accelerators.process_group import keep_group
from myllm_ray.accelerators.zero_state import ZeroLossScale, ZeroState
from myllm_ray.common.distributed import world_size
from myllm_ray.common.extras import require
from myllm_ray.common.files import why_not_writable
from myllm_ray.common.materialize import Filled, Source, fill, held, loading, materialize, source_of
from myllm_ray.common.modules import whole_shape
from myllm_ray.common.quiet import quieten
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.load import merge
from myllm_ray.config.sections import OptimizerSection
from myllm_ray.config.validation import section_of

_WHOLE_TENSORS = ("adafactor", "muon", "lbfgs", "sparseadam")
"""Optimizers whose step depends on the shape of a tensor.

ZeRO passes them flat slices of several tensors, which results in a different algorithm.
"""


class DeepSpeedAccelerator(Accelerator):
    """Trains with `deepspeed.initialize` (ZeRO: Rajbhandari et al., 2020, arXiv:1910.02054).

    In half precision, stages 1 to 3 hold parameters of that dtype and fp32 master weights; stage 0 holds fp32
    parameters. All stages compute under autocast, like the other backends.

    `accelerator.options` is a DeepSpeed JSON. A key that the config determines is rejected if its value differs.
    """

    distributed = True
    stages = (0, 1, 2, 3)
    gradient_dtypes = ("fp32", "bf16")
    offloads: ClassVar[Mapping[str, tuple[str, ...]]] = {"optimizer": ("cpu", "disk"), "parameters": ("cpu", "disk")}

    def __init__(self, config: Any = None):
        super().__init__(config)
        quieten(cuda=torch.cuda.is_available() and self.device_name != "cpu")
        self.deepspeed = require("deepspeed", "deepspeed", "accelerator.name=deepspeed")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it logs about a page at every start
        # DeepSpeed compiles its shared-memory collectives for CPUs at the first start. This needs a compiler and takes
        # half a minute. torch.distributed is used instead.
        self.deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.stage: int = 2 if self.section.stage is None else self.section.stage
        self.state_is_a_copy = self.stage > 0
        self._check_stage()
        self._frozen: list[Any] = []
        self.json = deepspeed_config(self.config, self.section, self.stage)

    @property
    def shards(self) -> int:
        return world_size() if self.stage == 3 else 1

    @property
    def optimizer_layout(self) -> OptimizerLayout:
        if self.stage == 0:
            return "whole"
        return "slices" if self.stage < 3 else "slices_by_group"

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = self.optimizer if self.stage == 0 else cast(Any, self.optimizer).optimizer
        return inner

    def _check_stage(self) -> None:
        if self.section.gradient_dtype != "fp32" and self.stage == 0:
            raise ConfigError(
                f"accelerator.gradient_dtype={self.section.gradient_dtype}: deepspeed with accelerator.stage=0 holds "
                "fp32 parameters, whose gradients are fp32; use accelerator.stage 1, 2 or 3"
            )
        if self.offload.optimizer != "none" and self.stage == 0:
            raise ConfigError(
                "accelerator.offload.optimizer: stage 0 can't offload, because it does not shard; "
                "use accelerator.stage 1, 2 or 3"
            )
        if "disk" in (self.offload.optimizer, self.offload.parameters) and self.stage != 3:
            raise ConfigError(f"accelerator.offload: only stage 3 offloads to disk, accelerator.stage is {self.stage}")
        if self.offload.parameters != "none" and self.stage != 3:
            raise ConfigError(
                f"accelerator.offload.parameters: only stage 3 shards parameters, accelerator.stage is {self.stage}"
            )
        name = section_of(self.config, "optimizer", OptimizerSection).name.rpartition(":")[2]
        if self.stage > 0 and name.lower() in _WHOLE_TENSORS:
            raise ConfigError(
                f"optimizer.name={name} needs whole tensors, but ZeRO passes flat slices: use fsdp, ddp, or "
                "accelerator.stage=0"
            )

    def check_backend(self, device: torch.device) -> None:
        check_json(self.json)

    def check(self) -> None:
        super().check()
        if "disk" not in (self.offload.optimizer, self.offload.parameters):
            return
        problem = why_not_writable(Path(self.offload.path or ""))
        if problem:
            raise ConfigError(f"accelerator.offload.path: {self.offload.path} can't be written: {problem}")
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise ConfigError(
                "accelerator.offload: offloading to disk needs DeepSpeed's async_io, which needs the headers of libaio "
                "(Debian: apt install libaio-dev)"
            )

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer, build_schedule: BuildSchedule) -> nn.Module:
        save_memory(model, self.section, compile_cache(self.config))
        self._autocast_inside(model)
        self.module, source = model, source_of(model)
        os.environ.setdefault("LOCAL_RANK", "0")  # read by zero.Init
        self.json = merge({"zero_optimization": self._buffers(model)}, self.json)
        # Under stage 3, parameters on the meta device are created and sharded module by module, so no rank holds all
        # of them.
        if self.stage == 3 and source is not None:
            with loading(model, source) as counted:
                self._fill(model, counted, self.json)
        else:
            materialize(model, "cpu" if self.offload.parameters != "none" else self.device)
        # DeepSpeed rounds the parameters to half precision in place. A copy on the CPU keeps the fp32 values, unless
        # the source can create them again.
        rounded = self.precision != "fp32" and self.stage > 0
        if rounded and source is None:
            whole = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in model.named_parameters()}
            source = held(whole)
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory usage at every start
            engine, self.optimizer, *_ = self.deepspeed.initialize(
                model=model, optimizer=build_optimizer(model), config=self.json, dist_init_required=False
            )
        self.engine = engine
        if self.stage == 3:
            # The model uses the weight of its head without calling the module. DeepSpeed detects this in the first
            # forward pass and registers the parameter. The second forward pass then uses parameters in a different
            # order than the recorded one, and DeepSpeed fails, unless a backward pass between them resets the record.
            # Registering the parameter before the first pass avoids this.
            for parameter in getattr(model, "parameters_used_directly", list)():
                self.deepspeed.zero.register_external_parameter(model, parameter)
        self.model = cast(nn.Module, engine)
        self.schedule = build_schedule(self.optimizer)
        if self.stage > 0:
            self.loss_scale = ZeroLossScale(self.optimizer, enabled=self.precision == "fp16")  # type: ignore[assignment]
            self._gate()
            self.zero = ZeroState(self.deepspeed, model, self.optimizer, self.stage, self.device)
            if rounded and source is not None:
                # DeepSpeed created its fp32 master weights from the rounded parameters. Restore the exact values.
                self.zero.set_masters(source)
        return self.model

    def _gate(self) -> None:
        """Wraps the step of the inner optimizer, so that the judge is called within `engine.step`.

        At this point ZeRO has computed the gradient norm and has not changed any weight. ZeRO calls the inner optimizer
        once per group of parameters. The judge is called at the first of these calls and its result applies to all.
        """
        zero = cast(Any, self.optimizer)
        step = zero.optimizer.step
        self._judge: Judge | None = None
        self._judged, self._reason = False, None

        def gated(*args: Any, **kwargs: Any) -> Any:
            if self._judge is not None and not self._judged:
                self._judged, self._reason = True, self.judge(float(zero._global_grad_norm), self._judge)
            return None if self._reason is not None else step(*args, **kwargs)

        zero.optimizer.step = gated

    def _autocast_inside(self, model: nn.Module) -> None:
        """Runs the model's forward under autocast.

        An autocast context around the call has no effect, because DeepSpeed's engine disables it.
        """
        if self.precision != "fp32":
            autocast_forward(model, super().autocast)

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """Places a model that is not trained: sharded under stage 3, complete on every rank under the other stages.

        Stage 3 uses a second engine without an optimizer.
        """
        self._autocast_inside(model)
        # Stage 0 trains fp32 parameters under autocast like DDP, so the base class applies.
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
            with loading(model, source) as counted:
                self._fill(model, counted, json)
        else:
            model.to("cpu" if self.offload.parameters != "none" else self.device)
        with redirect_stdout(io.StringIO()):
            engine, *_ = self.deepspeed.initialize(model=model, config=json, dist_init_required=False)
        self._frozen.append(engine)
        # DeepSpeed overrides `eval` and sets the mode of the inner module only, not its own `training` flag.
        nn.Module.train(engine, False)
        return cast(nn.Module, engine)

    def _buffers(self, model: nn.Module) -> dict[str, Any]:
        """Returns the option for the size of the buffers through which parameters are read from and written to disk.

        The size is the number of elements of the largest parameter. DeepSpeed's default takes 2 GB per worker.
        """
        if self.offload.parameters != "disk":
            return {}
        return {"offload_param": {"buffer_size": max(whole_shape(p).numel() for p in model.parameters())}}

    def wrap(self, model: nn.Module) -> nn.Module:
        return self.model  # `prepare` creates it together with the optimizer

    def _fill(self, model: nn.Module, source: Source, json: dict[str, Any]) -> None:
        """Creates the weights of a model on the meta device, module by module, and shards each before the next one.

        Args:
            model: The model on the meta device, modified in place.
            source: Returns the value of a parameter or buffer by its name.
            json: The DeepSpeed JSON.
        """
        # A tied parameter has several names, but the source may know only the first.
        first_names = {id(p): name for name, p in model.named_parameters()}
        named = {name: first_names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        compute = torch.float32 if self.precision == "fp32" else DTYPES[self.precision]
        done: Filled = {}
        # Submodules come before the modules that contain them, because `zero.Init` processes a module recursively.
        for name, module in reversed(list(model.named_modules())):
            fill(module, lambda n: source(named.get(n, n)), "cpu", prefix=name, recurse=False, done=done)
            # A tied parameter may already be partitioned; only a partitioned one has `ds_id`.
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
        # This has to be set before the forward pass. Otherwise the gradients are wrong, and DeepSpeed reports no error.
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks, but the contract is a sum.
        loss = loss * world_size()
        # Under stages 1 to 3, ZeRO applies its loss scale itself. The loss is already divided by the global weight, so
        # it is not divided by the number of accumulation steps.
        self.engine.backward(self.loss_scale.scale(loss) if self.stage == 0 else loss, scale_wrt_gas=False)

    def optimizer_step(self, gradient_clip: float | None, judge: Judge | None = None) -> StepResult:
        if self.stage == 0:
            return super().optimizer_step(gradient_clip, judge)
        if (gradient_clip or 0.0) != self.json["gradient_clipping"]:
            raise ValueError(
                f"gradient_clip={gradient_clip}, but DeepSpeed was initialized with {self.json['gradient_clipping']}"
            )
        self._judge, self._judged, self._reason = judge, False, None
        self.engine.step()
        # DeepSpeed does not get the schedule, because it would not advance it in a skipped step.
        self.schedule.step()
        norm = self.engine.get_global_grad_norm()
        norm = math.nan if norm is None else norm
        # ZeRO skipped the step because of the norm, so the inner optimizer, and with it the judge, was not called.
        if judge is not None and not self._judged and not math.isfinite(norm):
            self._reason = self.judge(norm, judge)
        self._judge = None
        overflow = self.loss_scale.enabled and bool(cast(Any, self.optimizer).overflow)
        return StepResult(norm, self._reason is not None or overflow, self._reason)

    def generation(self) -> AbstractContextManager[Any]:
        """Returns a context in which all parameters are complete on every rank.

        In this context the model runs without collectives, so ranks may call it a different number of times.
        """
        return nullcontext() if self.stage < 3 else self._gathered()

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Gathers all parameters and removes the hooks of ZeRO-3 within the context.

        The hooks release the parameters of a module after its forward pass, gather them before the next one, and
        compare the order of modules with other ranks. The last two are collectives, but the ranks sample answers of
        different lengths and so run a different number of forward passes.
        """
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
                # Restores the complete tables, so that all hooks, including those of others, keep their order.
                for key, table in tables.items():
                    table.clear()
                    table.update(before[key])

    def state(self, frozen: bool = True) -> dict[str, Tensor]:
        if self.stage == 0:
            return super().state(frozen)
        return {
            **self.zero.tensors(frozen),
            **{name: buffer.detach().cpu().clone() for name, buffer in self.buffers().items()},
        }

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
            keep_group()
            # Also clears DeepSpeed's references to the group, which the next run in this process must not find.
            self.deepspeed.comm.destroy_process_group()
            self._owns_group = False
        super().close()
