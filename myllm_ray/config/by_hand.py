"""The short dict of a manually constructed run: {"num_epochs": 3, "gradient_clip": 1.0, "optimizer": {"lr": 1e-4}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.validation import refuse_unknown

_SHORT = {
    "num_epochs": "run.epochs",
    "max_steps": "run.max_steps",
    "seed": "run.seed",
    "batch_size": "batch.global_size",
}
"""Keys of the short dict, with the keys of a config that they abbreviate."""


def sections(config: TrainerConfig | Mapping[str, Any] | None) -> Any:
    """Returns a `TrainerConfig` unchanged, and a dict with its short keys moved into their sections.

    Raises:
        ConfigError: a key of the dict is unknown.
    """
    if isinstance(config, BaseModel):
        return config
    raw = dict(config or {})
    refuse_unknown(raw, [*_SHORT, *TrainerConfig.model_fields], "config")
    for short, key in _SHORT.items():
        if short in raw:
            section, _, name = key.partition(".")
            raw[section] = {name: raw.pop(short), **(raw.get(section) or {})}
    return raw


def gradient_clip(config: Any) -> float | None:
    """Returns the largest gradient norm of a config (see `sections`), or None if gradients are not clipped."""
    if isinstance(config, TrainerConfig):
        return config.gradient_clip
    value: float | None = config.get("gradient_clip", TrainerConfig.model_fields["gradient_clip"].default)
    return value
