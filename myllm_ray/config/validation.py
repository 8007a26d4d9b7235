"""Validation of sections against the classes that components declare, with one-line error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.other_names import near_key, right_key
from myllm_ray.config.sections import Section

S = TypeVar("S", bound=Section)


def typed(cls: type[S], values: Any, key: str) -> S:
    """Returns `values` as an instance of a section's class, with defaults. An instance is returned unchanged.

    Args:
        cls: the class of the section.
        values: a mapping, an instance, or None for the defaults.
        key: the key of the section in the config, for error messages.

    Raises:
        ConfigError: a key is unknown or has a wrong value.
    """
    if isinstance(values, cls):
        return values
    given: Mapping[str, Any] = values.model_dump() if isinstance(values, Section) else dict(values or {})
    try:
        return cls.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"{key}: {explain(error, cls, given)}") from None


def section_of(config: Any, key: str, cls: type[S]) -> S:
    """Returns a section of a config, with its defaults.

    Args:
        config: a `TrainerConfig`, whose sections are already validated, a plain mapping, or None.
        key: the key of the section.
        cls: the class of the section.

    Raises:
        ConfigError: a key of the mapping is unknown, or has a wrong value.
    """
    found = getattr(config, key, None) if isinstance(config, BaseModel) else (config or {}).get(key)
    return typed(cls, found, key)


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Checks that all keys of a mapping are in `known`.

    Raises:
        ConfigError: a key is unknown; the message suggests a key with a similar name.
    """
    for name in given:
        if name not in known:
            raise ConfigError(f"{where}: unknown key {name}: {suggestion(name, known)}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message on an unknown key: the most similar known key, or all known keys."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"


_SHORTHAND = {
    "model": "name",
    "tokenizer": "name",
    "optimizer": "name",
    "scheduler": "name",
    "accelerator": "name",
    "run": "name",
    "scaling": "workers",
    "data": "train.path",
    "data.train": "path",
    "data.validation": "path",
    "batch": "global_size",
    "model.lora": "rank",
}
"""{section: the key that is suggested if the section is given as a single value}."""


_NO_SECTION = ("model_type", "model_attributes_type", "dict_type")
"""Types of errors of pydantic for a value that is not a section."""
_MOST_UNKNOWN = 4
"""Largest number of unknown keys in one message."""


def explain(error: ValidationError, cls: type[BaseModel], raw: Any) -> str:
    """Returns one line that describes the most important error of pydantic.

    Unknown keys come first, because a misspelt key also causes the error that the correct key is missing.

    Args:
        error: The error of pydantic.
        cls: The class of the config.
        raw: The config that was validated.
    """
    details = sorted(error.errors(), key=_priority)
    unknown = [d for d in details if d["type"] == "extra_forbidden"][:_MOST_UNKNOWN]
    more = f" (and {rest} more)" if (rest := len(details) - max(1, len(unknown))) else ""
    if unknown:
        return "; ".join(_unknown_key(_location(detail), cls) for detail in unknown) + more
    first = details[0]
    location = _location(first)
    key = ".".join(str(part) for part in location)
    if first["type"] == "missing":
        return f"{key} is missing{more}"
    if first["type"] == "value_error":
        return f"{key + ': ' if key else ''}{first['ctx']['error']}{more}"
    if first["type"] in _NO_SECTION and key in _SHORTHAND:
        return f"{key} is a section of keys, not one value: write {key}.{_SHORTHAND[key]}={first['input']}"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}: {message} (got {first['input']!r}){more}"


def _priority(detail: Any) -> int:
    """Returns the rank of an error of pydantic among those of one config; the lowest is the most important one."""
    kind = detail["type"]
    # Of a union of a section and a list of sections, the member that the value does not have at all.
    other_member = kind in _NO_SECTION and _are_sections(detail["input"])
    return 0 if kind == "extra_forbidden" else 2 if other_member else 1


def _are_sections(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _location(detail: Any) -> list[int | str]:
    """Returns the location of an error of pydantic as the parts of a dotted key."""
    *above, last = detail["loc"] or ("",)
    # An unknown key is always kept, because it may have the same name as a member of a union.
    keep_last = detail["type"] == "extra_forbidden" or not _is_union_tag(last)
    return [*(part for part in above if not _is_union_tag(part)), *([last] if keep_last else [])]


def _unknown_key(location: list[int | str], cls: type[BaseModel]) -> str:
    """Returns the message for an unknown key.

    It suggests the key of another section or tool, a key with a similar name, or the known keys.
    """
    key = ".".join(str(part) for part in location)
    meant = right_key(cls, location)
    if meant is not None:
        return f"unknown key {key}: use {meant}"
    known = _known_keys(cls, location[:-1])
    close = difflib.get_close_matches(str(location[-1]), known, 1)
    if close:
        return f"unknown key {key}: did you mean {close[0]}?"
    meant = near_key(cls, str(location[-1]))
    return f"unknown key {key}: " + (f"did you mean {meant}?" if meant else f"known keys: {', '.join(sorted(known))}")


def _is_union_tag(part: int | str) -> bool:
    """Whether a part of a location is the name of a union's member, which pydantic adds to the keys of the file."""
    return isinstance(part, str) and (
        part[:1].isupper() or "[" in part or part in ("str", "dict", "int", "bool", "constrained-int")
    )


def _known_keys(cls: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Returns the keys of the section at `location`; empty if there is no such section."""
    for part in location:
        if isinstance(part, int):
            continue
        field = next((f for name, f in cls.model_fields.items() if part == (f.alias or name)), None)
        if field is None:
            return []
        nested = _section_in(field.annotation)
        if nested is None:
            return []
        cls = nested
    return [field.alias or name for name, field in cls.model_fields.items()]


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the first section in a type annotation, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_in(arg))), None)
