"""The offload of tensors from a device's memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from myllm_ray.config.section import Section


class OffloadSection(Section):
    """Offload of tensors from the device's memory, for fsdp (only `parameters: cpu`) and deepspeed."""

    optimizer: Literal["none", "cpu", "disk"] = Field("none", description="for deepspeed stages 1 to 3")
    parameters: Literal["none", "cpu", "disk"] = Field(
        "none", description="for deepspeed stage 3, and for fsdp, where cpu also offloads the optimizer state"
    )
    path: str | None = Field(None, description="for `disk`: a folder on a fast local disk")

    @model_validator(mode="after")
    def _where(self) -> OffloadSection:
        if "disk" in (self.optimizer, self.parameters) and self.path is None:
            raise ValueError("disk needs a folder: give accelerator.offload.path")
        return self
