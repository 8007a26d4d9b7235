"""The values of a sweep's trials, drawn from Ray Tune's own distributions. Trial i's depend on the seed, the key and i alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from ray import tune
from ray.tune.search import sample

from myllm_ray.common.seeds import derive_seed
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.sweep import Dimension, SweepConfig

_TRIALS = 10


def domain_of(dimension: Dimension) -> sample.Domain:
    """Tune's distribution of a key."""
    if dimension.kind in ("choice", "grid"):
        return cast(sample.Domain, tune.choice(dimension.values))
    return cast(sample.Domain, getattr(tune, dimension.kind)(*dimension.values))


def draw(sweep: SweepConfig, key: str, *where: int) -> Any:
    """A value of `key`: always the same for the same seed and place (the number of the trial; for pbt also the step)."""
    rng = np.random.RandomState(derive_seed("sweep", sweep.seed, key, *where) % 2**32)
    return _plain(domain_of(sweep.space[key]).sample(random_state=rng))


def plan(sweep: SweepConfig) -> list[dict[str, Any]] | None:
    """The values of all trials, in order; None where they are only known as the sweep goes on."""
    if sweep.search == "optuna":
        return None
    if sweep.search == "grid":
        return [dict(zip(sweep.space, row, strict=True)) for row in itertools.product(*(d.values for d in sweep.space.values()))]
    return [{key: draw(sweep, key, number) for key in sweep.space} for number in range(trials_of(sweep))]


def trials_of(sweep: SweepConfig) -> int:
    """How many trials the sweep has."""
    if sweep.search == "grid":
        return int(np.prod([len(d.values) for d in sweep.space.values()]))
    return sweep.trials or _TRIALS


def dimensions_from(space: Mapping[str, Any]) -> dict[str, Any]:
    """A space from Python as a sweep's file would have it: Tune's distributions, or mappings such as {"choice": [1, 2]}.

    Raises:
        ConfigError: a distribution that no file can hold.
    """
    return {key: _dimension(key, given) for key, given in space.items()}


def _dimension(key: str, given: Any) -> Any:
    if isinstance(given, Mapping):
        return {"grid": given["grid_search"]} if set(given) == {"grid_search"} else dict(given)
    if isinstance(given, list):
        return {"choice": given}
    if isinstance(given, sample.Categorical):
        return {"choice": list(given.categories)}
    sampler = given.get_sampler() if isinstance(given, sample.Domain) else None
    inner, step = (sampler.sampler, sampler.q) if isinstance(sampler, sample.Quantized) else (sampler, None)
    name = type(inner).__name__
    if isinstance(given, sample.Integer) and step is None and "LogUniform" not in name and "Uniform" in name:
        return {"randint": [given.lower, given.upper]}
    if isinstance(given, sample.Float) and step is None and "LogUniform" in name:
        return {"loguniform": [given.lower, given.upper]}
    if isinstance(given, sample.Float) and "Uniform" in name and "Log" not in name:
        return {"uniform": [given.lower, given.upper]} if step is None else {"quniform": [given.lower, given.upper, step]}
    raise ConfigError(f"space.{key}: can't use {given!r}: give one of {', '.join(Dimension.model_fields)} "
                      "(tune.uniform, loguniform, quniform, randint, choice, grid_search)")


def _plain(value: Any) -> Any:
    """Python's own numbers instead of NumPy's, which no YAML file can hold; floats with the digits that matter."""
    value = value.item() if isinstance(value, np.generic) else value
    return float(f"{value:.4g}") if isinstance(value, float) else value
