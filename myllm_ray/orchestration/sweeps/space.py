"""Draws the values of a sweep's trials from Ray Tune's distributions.

The values of trial i depend only on the seed, the key and i.
"""

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
    """Returns Tune's distribution for a key."""
    if dimension.kind in ("choice", "grid"):
        return cast(sample.Domain, tune.choice(dimension.values))
    return cast(sample.Domain, getattr(tune, dimension.kind)(*dimension.values))


def draw(sweep: SweepConfig, key: str, *where: int) -> Any:
    """Draws a value of `key`, always the same one for the same seed and `where`.

    Args:
        sweep: the sweep's config.
        key: the dotted key.
        *where: the number of the trial; for PBT also the step.
    """
    rng = np.random.RandomState(derive_seed("sweep", sweep.seed, key, *where) % 2**32)
    return _plain(domain_of(sweep.space[key]).sample(random_state=rng))


def plan(sweep: SweepConfig) -> list[dict[str, Any]] | None:
    """Returns the values of all trials in order, or None if a searcher chooses them during the sweep."""
    if sweep.search == "optuna":
        return None
    if sweep.search == "grid":
        return [
            dict(zip(sweep.space, row, strict=True))
            for row in itertools.product(*(d.values for d in sweep.space.values()))
        ]
    return [{key: draw(sweep, key, number) for key in sweep.space} for number in range(trials_of(sweep))]


def trials_of(sweep: SweepConfig) -> int:
    """Returns the number of trials of the sweep."""
    if sweep.search == "grid":
        return int(np.prod([len(d.values) for d in sweep.space.values()]))
    return sweep.trials or _TRIALS


def dimensions_from(space: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a space from Python to the form of a sweep's file.

    Args:
        space: {dotted key: one of Tune's distributions, or a mapping such as {"choice": [1, 2]}}.

    Raises:
        ConfigError: a distribution that a file cannot contain.
    """
    return {key: _dimension(key, given) for key, given in space.items()}


def _dimension(key: str, given: Any) -> Any:
    if isinstance(given, Mapping):
        return {"grid": given["grid_search"]} if set(given) == {"grid_search"} else dict(given)
    if isinstance(given, list):
        return {"choice": given}
    if isinstance(given, sample.Categorical):
        return {"choice": list(given.categories)}
    # Tune's distributions carry their kind only in the class of their sampler; a step is a wrapper around it.
    sampler = given.get_sampler() if isinstance(given, sample.Domain) else None
    inner, step = (sampler.sampler, sampler.q) if isinstance(sampler, sample.Quantized) else (sampler, None)
    name = type(inner).__name__
    if isinstance(given, sample.Integer) and step is None and "LogUniform" not in name and "Uniform" in name:
        return {"randint": [given.lower, given.upper]}
    if isinstance(given, sample.Float) and step is None and "LogUniform" in name:
        return {"loguniform": [given.lower, given.upper]}
    if isinstance(given, sample.Float) and "Uniform" in name and "Log" not in name:
        return (
            {"uniform": [given.lower, given.upper]} if step is None else {"quniform": [given.lower, given.upper, step]}
        )
    raise ConfigError(
        f"space.{key}: can't use {given!r}: give one of {', '.join(Dimension.model_fields)} "
        "(tune.uniform, loguniform, quniform, randint, choice, grid_search)"
    )


def _plain(value: Any) -> Any:
    """Converts NumPy numbers, which YAML cannot contain, to Python numbers. Floats get four significant digits."""
    value = value.item() if isinstance(value, np.generic) else value
    return float(f"{value:.4g}") if isinstance(value, float) else value
