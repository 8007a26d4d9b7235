"""The section `run`: name, length and seed of a run, and its amendments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

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
