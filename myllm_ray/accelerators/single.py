"""One device: a GPU where there is one, else the CPU."""

from __future__ import annotations

from torch import nn

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.common.materialize import materialize


class SingleGPUAccelerator(Accelerator):
    """Trains on one device, without a process group (the original's name; it also serves the CPU)."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return materialize(model, self.device)
