"""The file of a sweep: which keys of which run are searched, and how. The shape of the YAML file, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.load import apply_override, explain, include, read_file, set_key, validate
from myllm_ray.config.schema import Section, TrainerConfig

SCHEDULERS = ("fifo", "asha", "hyperband", "median", "pbt")
CHECKPOINTED = ("hyperband", "pbt")
"""Schedulers that pause trials and go on from their checkpoints."""


class Dimension(Section):
    """The values that one key may take. The names are Ray Tune's."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = None
    quniform: tuple[float, float, PositiveFloat] | None = Field(None, description="[low, high, step]")
    randint: tuple[int, int] | None = Field(None, description="[low, high): high is not among them")
    choice: list[Any] | None = None
    grid: list[Any] | None = Field(None, description="every one of these, with every other grid's values")

    @model_validator(mode="after")
    def _one(self) -> Dimension:
        given = self.given
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)} (got {', '.join(given) or 'none'})")
        values = given[self.kind]
        if self.kind in ("choice", "grid") and not values:
            raise ValueError(f"{self.kind} is an empty list")
        if self.kind not in ("choice", "grid") and values[0] >= values[1]:
            raise ValueError(f"{self.kind}: [low, high], so the first number is the smaller one (got {list(values)})")
        return self

    @property
    def given(self) -> dict[str, Any]:
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}

    @property
    def kind(self) -> str:
        return next(iter(self.given))

    @property
    def values(self) -> list[Any]:
        """What stands in the list: choices, or bounds."""
        return list(self.given[self.kind])

    def examples(self) -> list[Any]:
        """Values to try the key with: all choices, or both ends."""
        return self.values if self.kind in ("choice", "grid") else [self.values[0], self.values[1] - (self.kind == "randint")]


class SchedulerOptions(Section):
    """Which trials are stopped or changed before their end. Steps are optimizer steps of a trial."""

    name: Literal["fifo", "asha", "hyperband", "median", "pbt"] = Field(
        "fifo", description="fifo: all run to their end; asha: successive halving without waiting (Li et al., 2018, arXiv:1810.05934); "
        "hyperband: Li et al., 2016, arXiv:1603.06560; median: stops what is worse than the median (Golovin et al., 2017); "
        "pbt: population-based training (Jaderberg et al., 2017, arXiv:1711.09846)")
    grace_steps: PositiveInt | None = Field(None, description="asha, median: no trial is stopped earlier; default: a tenth of the steps")
    reduction_factor: float = Field(3, gt=1, description="asha, hyperband: one of so many goes on at each rung")
    every_steps: PositiveInt | None = Field(None, description="pbt: steps between two exchanges; default: a fifth of the steps")
    quantile: float = Field(0.25, gt=0, le=0.5, description="pbt: the share of the worst that takes over from the best")
    resample: float = Field(0.25, ge=0, le=1, description="pbt: how often a value is drawn anew instead of changed a little")


class BudgetSection(Section):
    """What a sweep may spend."""

    steps: PositiveInt | None = Field(None, description="of each trial: its run.max_steps; default: what the base config says")
    minutes: PositiveFloat | None = Field(None, description="of the whole sweep, by the clock; trials that are running are stopped")
    trial_hours: PositiveFloat | None = Field(None, description="of all trials together")


class SweepRun(Section):
    """The sweep's folder `<storage>/<name>`."""

    name: str = Field("sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    storage: str = "runs"
    overwrite: bool = Field(False, description="replace an earlier sweep of the same name")


class SweepConfig(Section):
    """A search over keys of a run's config. Trial i is a pure function of this file and i (but for optuna, and pbt's exchanges)."""

    base: str | dict[str, Any] = Field(description="the run's config: a file, relative to this one, or the config itself (with `include`, if you like)")
    space: dict[str, Dimension] = Field(min_length=1, description="dotted keys of the base config")
    metric: str = Field("loss", description="any metric that the run logs")
    mode: Literal["min", "max"] = "min"
    trials: PositiveInt | None = Field(None, description="default: 10; grid: every combination once")
    search: Literal["random", "grid", "optuna"] = "random"
    scheduler: SchedulerOptions = Field(default_factory=SchedulerOptions)
    max_concurrent: Literal["auto"] | PositiveInt = Field("auto", description="trials at a time; auto: what the cluster can hold")
    report_every: PositiveInt | None = Field(None, description="steps between two values that the scheduler sees; default: fits it")
    budget: BudgetSection = Field(default_factory=BudgetSection)
    run: SweepRun = Field(default_factory=SweepRun)
    seed: int = Field(0, ge=0, description="of the search; the runs have their own")
    fork_from: str | None = Field(None, description="a checkpoint, or a run's folder, that all trials start from")
    keep: Literal["best", "all"] = Field("best", description="checkpoints of which trials stay; metrics stay of all")

    @field_validator("scheduler", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """`asha`, or `{asha: {grace_steps: 10}}`."""
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
            raise ValueError(f"scheduler: {self.scheduler.name} chooses among trials that exist: use search: random with it, or fifo, asha "
                             "or median with optuna")
        if self.scheduler.name == "pbt" and (self.trials or 10) < 2:
            raise ValueError("scheduler: pbt needs at least 2 trials")
        return self


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep's file and apply `key.sub=value` overrides; `base` becomes the base's content, validated.

    Raises:
        ConfigError: one line that names the key, the file and what to do.
    """
    path = Path(path)
    raw = read_file(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        dotted, _, kind = key.removeprefix("space.").rpartition(".")
        if equals and dotted and key.startswith("space."):  # space.optimizer.lr.choice=[...]: the key searched has dots itself
            nested: dict[str, Any] = {}
            apply_override(nested, f"{kind}={value}")
            raw["space"] = {**(raw.get("space") or {}), dotted: nested}
        else:
            apply_override(raw, override)
    if "base" not in raw and "trainer" in raw:
        raise ConfigError(f"{path}: this is a run's config: a sweep's file names it as `base`, and the keys to search under `space`")
    base = raw.get("base")
    if isinstance(base, str):
        raw["base"] = read_file(path.parent / base)
    elif isinstance(base, dict):
        raw["base"] = include(base, path)
    return validate_sweep(raw, str(path))


def validate_sweep(raw: Mapping[str, Any], where: str = "sweep") -> SweepConfig:
    """Check a plain mapping; every key of the space is tried in the base config."""
    raw = dict(raw)
    if isinstance(raw.get("base"), str):
        raw["base"] = read_file(Path(raw["base"]))
    try:
        sweep = SweepConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, SweepConfig, raw)}") from None
    assert isinstance(sweep.base, dict)
    # Defaults written out: what is recorded must still mean the same when a later version has others.
    sweep.base = validate(sweep.base, where=f"{where}: base").model_dump(mode="json")
    for key, dimension in sweep.space.items():
        problems = [problem for value in dimension.examples() if (problem := _problem(sweep, {key: value}))]
        # Single values may be wrong alone and right beside another key's; an unknown key never is.
        known = [p for p in problems if "unknown key" in p]
        if known or (len(problems) == len(dimension.examples()) and len(sweep.space) == 1):
            raise ConfigError(f"{where}: space.{key}: {(known or problems)[0]}")
    return sweep


def _problem(sweep: SweepConfig, values: Mapping[str, Any]) -> str | None:
    try:
        run_config(sweep, values, "trial", "")
    except ConfigError as error:
        return str(error).removeprefix("trial: ")
    return None


def run_config(sweep: SweepConfig, values: Mapping[str, Any], name: str, storage: str) -> TrainerConfig:
    """The run that trains the base config with these values of its keys.

    Raises:
        ConfigError: these values do not go together.
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
