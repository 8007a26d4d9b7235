"""One device: a GPU where there is one, else the CPU."""

from __future__ import annotations

from typing import Self

from torch import nn

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.common.materialize import materialize
from myllm_ray.config.schema import AcceleratorSection


class SingleGPUAccelerator(Accelerator):
    """Trains on one device, without a process group (the original's name; it also serves the CPU)."""

    @classmethod
    def like(cls, section: AcceleratorSection) -> Self:
        """One device that computes in the precision of another backend, without what is sharded or offloaded there."""
        return cls({"accelerator": {"precision": section.precision, "device": section.device}})

    def wrap(self, model: nn.Module) -> nn.Module:
        return materialize(model, self.device)
