"""Constructs the callbacks and trackers that a config lists."""

from __future__ import annotations

from myllm_ray.config.components import callback_config, callback_entries, tracker_configs
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.reporting.jsonl import JSONLCallback
from myllm_ray.engine.reporting.trackers.base import numbered


def build_callbacks(config: TrainerConfig) -> list[Callback]:
    """Returns the callbacks of the config, in the order of the config, then its trackers.

    With trackers, `jsonl` is added if the config does not list it, because they send what `metrics.jsonl` contains.

    Raises:
        ConfigError: a callback does not accept its options.
    """
    built: list[Callback] = []
    for name, options in callback_entries(config):
        cls, arguments = callback_config(name, options)
        try:
            built.append(cls(**arguments))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"callbacks: {name} does not accept its options: {error}") from None
    trackers = [cls(options) for cls, options in tracker_configs(config)]
    if trackers and not any(isinstance(c, JSONLCallback) for c in built):
        built.append(JSONLCallback())
    return [*built, *numbered(trackers)]
