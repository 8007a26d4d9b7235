"""The exponential moving average of the weights: updated after each step, saved, evaluated and exported.

Averaged weights often have a lower loss than the last ones, because the noise of single steps is averaged out (Polyak
and Juditsky, 1992; Izmailov et al., 2018, arXiv:1803.05407). The average costs one more fp32 copy of the trainable
parameters, sharded like them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.accelerators.sharding import reshard
from myllm_ray.common import distributed
from myllm_ray.config.errors import CheckpointError, ConfigError
from myllm_ray.config.sections import EMASection
from myllm_ray.config.validation import typed
from myllm_ray.engine.checkpointing.averages import PREFIX
from myllm_ray.engine.checkpointing.manager import read_manifest


class WeightAverage:
    """The average of the trainable parameters of a run. Without the section `ema` every method does nothing.

    After optimizer step s > `start_step`, if s is a multiple of `every_steps` and the step was not skipped:
    average ← decay · average + (1 - decay) · weights. Up to `start_step`, the average is the weights.

    Args:
        config: a run's config, as a `TrainerConfig` or a plain dict. Only its section `ema` is read.
    """

    def __init__(self, config: Any = None):
        found = config.get("ema") if isinstance(config, Mapping) else getattr(config, "ema", None)
        self.section = None if found is None else typed(EMASection, found, "ema")
        self._weights: dict[str, nn.Parameter] = {}
        self._average: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return self.section is not None

    def check(self, accelerator: Accelerator) -> None:
        """Checks that the parameters of a backend can be averaged.

        Raises:
            ConfigError: they are in flat slices (ZeRO stages 1 to 3).
        """
        if self and accelerator.optimizer_layout.startswith("slices"):
            raise ConfigError(
                "ema: ZeRO stages 1 to 3 keep the fp32 weights in flat slices of several tensors, which are not "
                "averaged: use fsdp, ddp, or accelerator.stage=0"
            )

    def prepare(self, accelerator: Accelerator) -> None:
        """Starts the average from the weights of a prepared accelerator."""
        if self:
            # Not read again later: FSDP2 replaces the parameters of a module while they are gathered.
            self._weights = {name: p for name, p in accelerator.module.named_parameters() if p.requires_grad}
            self._average = {name: p.detach().clone() for name, p in self._weights.items()}

    def update(self, step: int, skipped: bool) -> None:
        """Updates the average after an optimizer step. This is one fused operation, without a synchronization.

        Args:
            step: number of the optimizer step, counted from 1.
            skipped: whether the step changed no weight.
        """
        if self.section is None or skipped:
            return
        average, weights = [_local(t) for t in self._average.values()], [_local(p) for p in self._weights.values()]
        if step <= self.section.start_step:
            torch._foreach_copy_(average, weights)
        elif step % self.section.every_steps == 0:
            torch._foreach_lerp_(average, weights, 1 - self.section.decay)

    @contextmanager
    def in_use(self, accelerator: Accelerator) -> Iterator[None]:
        """A context in which the model has the averaged weights. Afterwards both have their values again, bit for bit.

        The tensors are exchanged one by one, so at most one of them exists twice.
        """
        self._exchange(accelerator)
        try:
            yield
        finally:
            self._exchange(accelerator)

    @torch.no_grad()
    def _exchange(self, accelerator: Accelerator) -> None:
        reshard(accelerator.model)  # gathered copies would keep the other values
        for name, average in self._average.items():
            weight, mean = _local(self._weights[name]), _local(average)
            copy = weight.clone()
            weight.copy_(mean)
            mean.copy_(copy)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the live tensors of the average by their names in a checkpoint, `ema.<name of the parameter>`."""
        return {f"{PREFIX}{name}": average for name, average in self._average.items()}

    def tensors_to_load(self, folder: Path) -> dict[str, Tensor]:
        """Returns the tensors that a checkpoint must fill.

        A checkpoint of a run without `ema` fills none if its step is at most `start_step`, because the average then is
        the weights. Every rank calls this.

        Raises:
            CheckpointError: the checkpoint has no average, and its step is after `start_step`.
        """
        if self.section is None:
            return {}
        step, saved = distributed.from_main(_found(folder) if distributed.is_main() else None)
        if saved:
            return self.tensors()
        if step > self.section.start_step:
            raise CheckpointError(
                f"{folder} has no averaged weights: its run had no section `ema`. To start the average there, set "
                f"ema.start_step={step}"
            )
        return {}

    def loaded(self, filled: bool) -> None:
        """Completes a resume: without a saved average, the average starts from the weights that were loaded."""
        if self and not filled:
            torch._foreach_copy_(
                [_local(t) for t in self._average.values()], [_local(p) for p in self._weights.values()]
            )


def _found(folder: Path) -> tuple[int, bool]:
    """Like `_step_and_average`, but leaves the error of a damaged manifest to `CheckpointManager.load`.

    Only rank 0 calls this. If it raised an error, the other ranks would wait for it.
    """
    try:
        return _step_and_average(folder)
    except CheckpointError:
        return 0, True


def _step_and_average(folder: Path) -> tuple[int, bool]:
    manifest = read_manifest(folder)
    return int(manifest["step"]), any(name.startswith(PREFIX) for name in manifest["tensors"])


def _local(tensor: Tensor) -> Tensor:
    # `detach`: the values of a parameter are changed in place.
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
