"""Training on one device: a GPU if one is available, otherwise the CPU."""

from __future__ import annotations

from typing import Self

from torch import nn

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.common.materialize import materialize
from myllm_ray.config.sections import AcceleratorSection


class SingleGPUAccelerator(Accelerator):
    """Trains on one device, without a process group. Despite its name, it also supports the CPU."""

    mixes_dtypes = True

    @classmethod
    def like(cls, section: AcceleratorSection) -> Self:
        """Returns a backend for one device with the precision of another backend, without its sharding and offloading.

        Args:
            section: The `accelerator` section of the other backend.
        """
        return cls({"accelerator": {"precision": section.precision, "device": section.device}})

    def wrap(self, model: nn.Module) -> nn.Module:
        return materialize(model, self.device)
