"""The values of a config by dotted key, with their defaults; and the keys in which configs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from myllm_ray.common.flatten import flatten
from myllm_ray.config.load import validate

_NONE = object()


@dataclass(frozen=True)
class ConfigValue:
    """A value of a config. `default`: the default as text; None for a required key, or if the default is unknown."""

    key: str
    value: str
    default: str | None
    differs: bool


def config_values(raw: Mapping[str, Any]) -> tuple[list[ConfigValue], bool]:
    """Returns the values of a config, and whether the defaults are known.

    Args:
        raw: the content of a run's `config.yaml`. If this version can't validate it, the defaults are not known.
    """
    try:
        config = validate(raw, where="config.yaml", components=False)
    except Exception:  # a trainer of the user that can't be imported here can raise anything
        return [ConfigValue(key, show(value), None, False) for key, value in flatten(raw).items()], False
    return list(_walk(config, "")), True


def _walk(section: BaseModel, prefix: str) -> Iterator[ConfigValue]:
    for name, info in type(section).model_fields.items():
        key, value = f"{prefix}{info.alias or name}", getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _walk(value, f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(entry, BaseModel) for entry in value):
            for number, entry in enumerate(value):
                yield from _walk(entry, f"{key}.{number}.")
        else:
            default = _default(info)
            known = default is not _NONE
            yield ConfigValue(key, show(value), show(default) if known else None, not known or value != default)


def _default(info: FieldInfo) -> Any:
    if info.is_required():
        return _NONE
    try:
        return info.get_default(call_default_factory=True)
    except (TypeError, ValueError):  # a factory that needs the values of other fields
        return _NONE


def show(value: Any) -> str:
    """Returns a value as in YAML, in one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {show(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show(inner) for inner in value) + "]"
    if isinstance(value, BaseModel):
        return show(value.model_dump())
    return str(value)


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Returns (key, text of each config's value) for each key whose values differ; a missing value is `–`."""
    leaves = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for config in leaves for key in config)
    found = [(key, [show(config[key]) if key in config else "–" for config in leaves]) for key in keys]
    return [(key, shown) for key, shown in found if len(set(shown)) > 1]
