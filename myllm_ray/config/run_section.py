"""The section `run`: name, length and seed of a run, and its amendments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from myllm_ray.config.sections import Section


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Returns values by dotted key: {optimizer: {lr: 1}} and {optimizer.lr: 1} give the same."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{above}{name}"
        found |= flat(value, f"{key}.") if isinstance(value, Mapping) and value else {key: value}
    return found


class AmendmentSection(Section):
    """A change of the config within a run; `config/amendments.py` computes its effect."""

    at: NonNegativeInt = Field(description="number of completed optimizer steps after which the change takes effect")
    set: dict[str, Any] = Field(min_length=1, description="values by key: {optimizer.lr: 1.0e-4}")

    @field_validator("set")
    @classmethod
    def _flat(cls, values: dict[str, Any]) -> dict[str, Any]:
        return flat(values)


class BudgetSection(Section):
    """What a run may use, over all its attempts. It saves a checkpoint and stops when one of them is used up."""

    hours: PositiveFloat | None = Field(None, description="hours of training")
    tokens: PositiveInt | None = Field(
        None, description="tokens of the data without padding; for trainers that read tokens (pretrain, sft)"
    )
    usd: PositiveFloat | None = Field(None, description="price of the hours of training; needs usd_per_hour")
    usd_per_hour: PositiveFloat | None = Field(None, description="price per hour of all hardware of the run together")

    @model_validator(mode="after")
    def _complete(self) -> BudgetSection:
        if self.hours is None and self.tokens is None and self.usd is None:
            raise ValueError("give hours, tokens or usd")
        if (self.usd is None) != (self.usd_per_hour is None):
            raise ValueError("usd and usd_per_hour belong together: give both or neither")
        return self


class RunSection(Section):
    """The run's name, its folder `<storage>/<name>`, its length and its seed."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    storage: str = "runs"
    max_steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    seed: int = Field(0, ge=0)
    determinism: Literal["default", "strict"] = Field(
        "default",
        description="strict: use only deterministic algorithms of torch; default: runs on CUDA agree within rounding",
    )
    overwrite: bool = Field(False, description="replace an earlier run of the same name")
    budget: BudgetSection | None = Field(None, description="hours, tokens or price at which the run saves and stops")
    amendments: list[AmendmentSection] = Field(
        default_factory=list, description="changes of the config within the run; written by `myllm-ray amend`"
    )

    @model_validator(mode="after")
    def _ascending(self) -> RunSection:
        steps = [amendment.at for amendment in self.amendments]
        if steps != sorted(set(steps)):
            raise ValueError(f"amendments: the steps must ascend, each once (got {', '.join(map(str, steps))})")
        return self

    def total_steps(self, steps_per_batch: int, steps_in_epoch: Callable[[int], int]) -> int:
        """Returns the number of optimizer steps of a run: `max_steps`, or those of `epochs` passes over the data.

        Args:
            steps_per_batch: optimizer steps per global batch (PPO: epochs × minibatches).
            steps_in_epoch: returns the number of global batches in an epoch.
        """
        return self.max_steps or steps_per_batch * sum(steps_in_epoch(epoch) for epoch in range(self.epochs or 1))
