"""Components that a config selects by name: accelerator, callbacks, trackers, formats.

The `Config` class of a component validates its options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import resolve
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import Section, SourceSection
from myllm_ray.config.trainers import takes_config
from myllm_ray.config.validation import typed


def check_components(config: TrainerConfig) -> None:
    """Resolves the names of a config, and validates the options of each component.

    Raises:
        ConfigError: there is no such component, or one of its options is unknown or has a wrong value.
    """
    accelerator = resolve("accelerators", config.accelerator.name, "accelerator.name")
    if not isinstance(accelerator, type) or not hasattr(accelerator, "Config"):
        name = config.accelerator.name
        raise ConfigError(f"accelerator.name: {name} must be a subclass of myllm_ray.Accelerator")
    if accelerator.Config is not None:
        typed(accelerator.Config, config.accelerator.options, "accelerator.options")
    for name, options in callback_entries(config):
        callback_config(name, options)
    for _ in tracker_configs(config):
        pass
    for key, source in data_sources(config):
        format_of(source, key)


def callback_entries(config: TrainerConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the options of each callback, in the order of the config."""
    for entry in config.callbacks:
        yield from ({entry: {}} if isinstance(entry, str) else entry).items()


def callback_config(name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the class of a callback, and the keyword arguments of its constructor.

    For a class that declares `Config`, the only argument is `config`, validated. Other classes receive the options
    unchanged.
    """
    cls = resolve("callbacks", name, "callbacks")
    if not isinstance(cls, type) or not hasattr(cls, "Config") or not takes_config(cls):
        return cls, dict(options)
    return cls, {"config": typed(cls.Config, options, f"callbacks.{name}")}  # type: ignore[attr-defined]


def tracker_entries(config: TrainerConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the options of each tracker, in the order of the config.

    Raises:
        ConfigError: an entry has no name.
    """
    for number, entry in enumerate(config.tracking):
        options = {"name": entry} if isinstance(entry, str) else dict(entry)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"tracking.{number}: the name of the tracker is missing: write {{name: wandb, ...}}")
        yield name, options


def tracker_configs(config: TrainerConfig) -> Iterator[tuple[Any, Section]]:
    """Yields the class of each tracker and its options, validated by the class's `Config`.

    Raises:
        ConfigError: there is no such tracker, or one of its options is unknown or has a wrong value.
    """
    for name, options in tracker_entries(config):
        cls = resolve("trackers", name, "tracking")
        if not isinstance(cls, type) or not hasattr(cls, "log_metrics") or not hasattr(cls, "Config"):
            raise ConfigError(f"tracking: {name} must be a subclass of myllm_ray.Tracker")
        if "wait_seconds" not in cls.Config.model_fields:
            raise ConfigError(f"tracking: {name}: its Config must be a subclass of myllm_ray.TrackerSection")
        yield cls, typed(cls.Config, options, f"tracking.{name}")


def data_sources(config: TrainerConfig) -> Iterator[tuple[str, SourceSection]]:
    """Yields the sources of a config with their keys."""
    many = isinstance(config.data.train, list)
    for number, source in enumerate(config.data.sources):
        yield f"data.train.{number}" if many else "data.train", source
    validation = config.data.validation
    if validation is not None and validation.split is None:
        yield "data.validation", validation
    for number, task in enumerate(config.evaluation.tasks):
        if task.data is not None:
            yield f"evaluation.tasks.{number}.data", task.data


def format_of(source: SourceSection, key: str = "data.train") -> Callable[[Mapping[str, Any]], Any]:
    """Returns the format of a source: a function of a row.

    A format is a function, or a class whose instances are such functions and that declares its options as `Config`.

    Raises:
        ConfigError: there is no such format, or one of its options is unknown or has a wrong value.
    """
    found: Any = resolve("formats", source.format, f"{key}.format")
    if isinstance(found, type):
        if not hasattr(found, "Config"):
            raise ConfigError(
                f"{key}.format: {source.format} is a class without Config: declare one, or give a function"
            )
        made: Callable[[Mapping[str, Any]], Any] = found(typed(found.Config, source.options, f"{key}.options"))  # type: ignore[attr-defined]
        return made
    if source.options:
        raise ConfigError(f"{key}.options: the format {source.format} has no options")
    function: Callable[[Mapping[str, Any]], Any] = found
    return function
