"""The section `scheduler`: the schedule of the learning rate."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from myllm_ray.config.section import Section


class SchedulerSection(Section):
    """The schedule of the learning rate, a function of the optimizer step only."""

    name: str = Field(
        "constant",
        description="constant, linear, cosine, cosine_with_restarts, wsd, polynomial, "
        "inverse_sqrt, or an import path of fn(progress: float) -> multiplier",
    )
    warmup_steps: int | None = Field(None, ge=0)
    warmup_ratio: float | None = Field(None, ge=0, le=1, description="length of the warm-up as a share of all steps")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="multiplier of the learning rate at the end of the decay")
    start_step: NonNegativeInt | None = Field(
        None, description="step at which the schedule begins; set by an amendment of a run (run.amendments)"
    )
    decay_steps: PositiveInt | None = Field(
        None, description="step at which the decay ends, counted from start_step; default: the last step"
    )
    decay_ratio: float = Field(0.2, gt=0, le=1, description="wsd: length of the decay as a share of all steps")
    cycles: PositiveInt = Field(1, description="cosine_with_restarts: number of cycles")
    power: PositiveFloat = Field(1.0, description="polynomial: exponent")

    @model_validator(mode="after")
    def _one_warmup(self) -> SchedulerSection:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        return self
