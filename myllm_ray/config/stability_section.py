"""The section `stability` of the config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from myllm_ray.config.section import Section


class StabilitySection(Section):
    """The handling of non-finite values, spikes, and workers that hang."""

    on_spike: Literal["ignore", "skip", "rewind", "stop"] = Field(
        "ignore",
        description="action if a loss or gradient norm is far above the recent ones, or is not finite, before any "
        "weight changes. ignore: a non-finite gradient stops the run, after the optimizer step",
    )
    zscore: PositiveFloat = Field(
        6.0, description="threshold of a spike, in standard deviations above the mean of the recent steps"
    )
    history: int = Field(128, ge=2, description="number of recent steps in the mean and the standard deviation")
    min_history: int = Field(16, ge=2, description="number of steps at the start in which spikes are not detected")
    window: PositiveInt = Field(1, description="rewind: number of batches to skip; the bad batch is the last of them")
    max_interventions: PositiveInt = Field(
        10, description="maximum number of skips and rewinds; one more stops the run"
    )
    hang_seconds: PositiveFloat | None = Field(
        1800,
        description="a worker that stays longer in one phase of a step is considered to hang: the stacks of all "
        "workers are saved, and the workers are restarted; null: no detection",
    )
