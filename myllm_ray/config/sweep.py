"""The config of a sweep: the keys of a run's config that are searched, and how they are searched.

This module only defines and validates the structure of the YAML file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.load import apply_override, include, read_file, set_key, validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import Section
from myllm_ray.config.validation import explain

SCHEDULERS = ("fifo", "asha", "hyperband", "median", "pbt")
CHECKPOINTED = ("hyperband", "pbt")
"""Schedulers that pause trials and resume them from their checkpoints."""


class Dimension(Section):
    """The values that one key can have. The names of the kinds are those of Ray Tune."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = None
    quniform: tuple[float, float, PositiveFloat] | None = Field(None, description="[low, high, step]")
    randint: tuple[int, int] | None = Field(None, description="[low, high): integers, high is excluded")
    choice: list[Any] | None = None
    grid: list[Any] | None = Field(None, description="list of values; all combinations with the other grids are tried")

    @model_validator(mode="after")
    def _one(self) -> Dimension:
        given = self.given
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(type(self).model_fields)} (got {', '.join(given) or 'none'})"
            )
        values = given[self.kind]
        if self.kind in ("choice", "grid") and not values:
            raise ValueError(f"{self.kind} is an empty list")
        if self.kind not in ("choice", "grid") and values[0] >= values[1]:
            raise ValueError(f"{self.kind} is [low, high]: the first number must be smaller (got {list(values)})")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The keys of this dimension that are set, with their values."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}

    @property
    def kind(self) -> str:
        """The kind of values, such as `uniform` or `choice`."""
        return next(iter(self.given))

    @property
    def values(self) -> list[Any]:
        """The choices, or the bounds (and the step of `quniform`)."""
        return list(self.given[self.kind])

    def examples(self) -> list[Any]:
        """Returns values with which the key is checked: all choices, or the smallest and the largest value."""
        return (
            self.values
            if self.kind in ("choice", "grid")
            else [self.values[0], self.values[1] - (self.kind == "randint")]
        )


class SchedulerOptions(Section):
    """The scheduler, which stops or changes trials before their end. Steps are optimizer steps of a trial."""

    name: Literal["fifo", "asha", "hyperband", "median", "pbt"] = Field(
        "fifo",
        description="fifo: all trials run to their end; asha: asynchronous successive halving (Li et al., 2018, "
        "arXiv:1810.05934); hyperband: Li et al., 2016, arXiv:1603.06560; median: stops trials that are worse than the "
        "median (Golovin et al., 2017); pbt: population-based training (Jaderberg et al., 2017, arXiv:1711.09846)",
    )
    grace_steps: PositiveInt | None = Field(
        None, description="asha, median: number of steps before a trial can be stopped; default: a tenth of the steps"
    )
    reduction_factor: float = Field(3, gt=1, description="asha, hyperband: one of this many trials continues per rung")
    every_steps: PositiveInt | None = Field(
        None, description="pbt: number of steps between two exchanges; default: a fifth of the steps"
    )
    quantile: float = Field(0.25, gt=0, le=0.5, description="pbt: share of the worst trials that copy one of the best")
    resample: float = Field(
        0.25, ge=0, le=1, description="pbt: probability that a value is sampled again instead of perturbed"
    )


class BudgetSection(Section):
    """The budget of a sweep."""

    steps: PositiveInt | None = Field(None, description="run.max_steps of each trial; default: that of the base config")
    minutes: PositiveFloat | None = Field(
        None, description="wall time of the whole sweep; running trials are stopped when it ends"
    )
    trial_hours: PositiveFloat | None = Field(None, description="hours of all trials together")


class SweepRun(Section):
    """The sweep's folder `<storage>/<name>`."""

    name: str = Field("sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    storage: str = "runs"
    overwrite: bool = Field(False, description="replace an earlier sweep of the same name")


class SweepConfig(Section):
    """A search over keys of a run's config.

    Trial i is a function of this config and i only, except with optuna and for the exchanges of pbt.
    """

    base: str | dict[str, Any] = Field(
        description="config of the run: a path relative to this file, or the config itself, which may use `include`"
    )
    space: dict[str, Dimension] = Field(min_length=1, description="values to search, by dotted key of the base config")
    metric: str = Field("loss", description="the metric to optimize, any metric that the run logs")
    mode: Literal["min", "max"] = "min"
    trials: PositiveInt | None = Field(None, description="number of trials; default: 10; grid: all combinations")
    search: Literal["random", "grid", "optuna"] = "random"
    scheduler: SchedulerOptions = Field(default_factory=SchedulerOptions)
    max_concurrent: Literal["auto"] | PositiveInt = Field(
        "auto", description="number of concurrent trials; auto: as the resources of the cluster allow"
    )
    report_every: PositiveInt | None = Field(
        None, description="number of steps between two reports to the scheduler; default: depends on the scheduler"
    )
    budget: BudgetSection = Field(default_factory=BudgetSection)
    run: SweepRun = Field(default_factory=SweepRun)
    seed: int = Field(0, ge=0, description="seed of the search; run.seed is the seed of the runs")
    fork_from: str | None = Field(None, description="checkpoint, or folder of a run, from which all trials start")
    keep: Literal["best", "all"] = Field(
        "best", description="trials whose checkpoints are kept; metrics of all trials are kept"
    )

    @field_validator("scheduler", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Accepts the short forms `asha` and `{asha: {grace_steps: 10}}`."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in SCHEDULERS:
            name, options = next(iter(value.items()))
            return {"name": name, **(options or {})}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        kinds = {key: d.kind for key, d in self.space.items()}
        grids = [key for key, kind in kinds.items() if kind == "grid"]
        if self.search == "grid":
            other = next((key for key, kind in kinds.items() if kind not in ("grid", "choice")), None)
            if other is not None:
                raise ValueError(f"search: grid needs grid or choice for every key; {other} has {kinds[other]}")
            if self.trials is not None:
                raise ValueError("search: grid tries every combination once: leave out trials, or use search: random")
        elif grids:
            raise ValueError(f"space.{grids[0]}: grid is for search: grid; use choice")
        if self.scheduler.name in CHECKPOINTED and self.search == "optuna":
            raise ValueError(
                f"scheduler: {self.scheduler.name} can't be used with search: optuna: use search: random, or "
                "scheduler: fifo, asha or median"
            )
        if self.scheduler.name == "pbt" and (self.trials or 10) < 2:
            raise ValueError("scheduler: pbt needs at least 2 trials")
        return self


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Reads the file of a sweep, applies overrides and validates the result.

    Args:
        path: A YAML or JSON file.
        overrides: Overrides, each `key.sub=value`.

    Returns:
        The config of the sweep, whose `base` is the validated content of the base config.

    Raises:
        ConfigError: The file can't be read or is not valid. The message is one line that names the key, the file and
            what to do.
    """
    path = Path(path)
    raw = read_file(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        dotted, _, kind = key.removeprefix("space.").rpartition(".")
        if (
            equals and dotted and key.startswith("space.")
        ):  # in space.optimizer.lr.choice=[...], the key of the base config contains dots
            nested: dict[str, Any] = {}
            apply_override(nested, f"{kind}={value}")
            raw["space"] = {**(raw.get("space") or {}), dotted: nested}
        else:
            apply_override(raw, override)
    if "base" not in raw and "trainer" in raw:
        raise ConfigError(
            f"{path}: this is the config of a run: write a sweep file that names it as `base`, and the keys in `space`"
        )
    base = raw.get("base")
    if isinstance(base, str):
        raw["base"] = read_file(path.parent / base)
    elif isinstance(base, dict):
        raw["base"] = include(base, path)
    return validate_sweep(raw, str(path))


def validate_sweep(raw: Mapping[str, Any], where: str = "sweep") -> SweepConfig:
    """Validates the config of a sweep and tries every key of the search space in the base config.

    Args:
        raw: The config, as read from a file.
        where: The name of the file, for error messages.

    Raises:
        ConfigError: The config is not valid, or a key or a value of the space is not valid in the base config.
    """
    raw = dict(raw)
    if isinstance(raw.get("base"), str):
        raw["base"] = read_file(Path(raw["base"]))
    try:
        sweep = SweepConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, SweepConfig, raw)}") from None
    assert isinstance(sweep.base, dict)
    # Writes out the defaults, so that the recorded config keeps its meaning if a later version changes them.
    sweep.base = validate(sweep.base, where=f"{where}: base").model_dump(mode="json")
    # A trial that stops early would be compared with trials that do not.
    if sweep.base["run"]["budget"] is not None or any(key.startswith("run.budget") for key in sweep.space):
        raise ConfigError(f"{where}: run.budget: a sweep has a budget of its own: budget.minutes, budget.trial_hours")
    for key, dimension in sweep.space.items():
        problems = [problem for value in dimension.examples() if (problem := _problem(sweep, {key: value}))]
        # A value may be valid only in combination with a value of another key. An unknown key is never valid.
        known = [p for p in problems if "unknown key" in p]
        if known or (len(problems) == len(dimension.examples()) and len(sweep.space) == 1):
            raise ConfigError(f"{where}: space.{key}: {(known or problems)[0]}")
    return sweep


def _problem(sweep: SweepConfig, values: Mapping[str, Any]) -> str | None:
    """Returns the error of the base config with these values, or None."""
    try:
        run_config(sweep, values, "trial", "")
    except ConfigError as error:
        return str(error).removeprefix("trial: ")
    return None


def run_config(sweep: SweepConfig, values: Mapping[str, Any], name: str, storage: str) -> TrainerConfig:
    """Returns the config of a trial: the base config with the given values.

    Args:
        sweep: The config of the sweep.
        values: Values by dotted key.
        name: Name of the trial's run.
        storage: Folder of the trial's run.

    Raises:
        ConfigError: A value is not valid, or the values contradict each other.
    """
    assert isinstance(sweep.base, dict)
    raw = copy.deepcopy(sweep.base)
    raw["run"] |= {"name": name, "storage": storage, "overwrite": False}
    if sweep.budget.steps is not None:
        raw["run"] |= {"max_steps": sweep.budget.steps, "epochs": None}
    if sweep.fork_from is not None:
        raw["checkpoint"]["resume"] = sweep.fork_from
    for key, value in values.items():
        set_key(raw, key, value, f"space.{key}")
    return validate(raw, where="trial")
