"""Loading of configs: includes, environment variables, overrides, validation and error messages."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from myllm_ray.config.amendments import check_amendments
from myllm_ray.config.components import check_components
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.trainers import config_class
from myllm_ray.config.validation import explain

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_DATA_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zst")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainerConfig:
    """Reads a config, applies overrides and validates the result.

    Args:
        path: A YAML or JSON file.
        overrides: Overrides, each `key.sub=value`.

    Returns:
        The config, of the class that belongs to its trainer.

    Raises:
        ConfigError: The file can't be read or is not valid. The message is one line that names the key, the file and
            what to do.
    """
    raw = read_file(Path(path))
    for override in overrides:
        apply_override(raw, override)
    return validate(raw, where=str(path))


def read_file(path: Path, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns the content of a config file, merged with its includes and with `${VAR}` replaced.

    Args:
        path: A YAML or JSON file.

    Raises:
        ConfigError: The file can't be read, is not a mapping, or includes itself.
    """
    resolved = path.resolve()
    if resolved in _chain:
        raise ConfigError(f"{path}: circular include: {' -> '.join(p.name for p in (*_chain, resolved))}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except IsADirectoryError:
        inside = f"; its config is {path / 'config.yaml'}" if (path / "config.yaml").is_file() else ""
        raise ConfigError(f"{path} is a folder, not a config file{inside}") from None
    except (OSError, UnicodeDecodeError) as error:
        if path.suffix in _DATA_SUFFIXES:
            raise _is_data(path) from None
        raise ConfigError(f"{path}: can't be read: {error}") from None
    if path.suffix in _DATA_SUFFIXES or _is_json_lines(text):
        raise _is_data(path)
    try:
        raw = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "can't be parsed"
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}") from None
    if isinstance(raw, list) and raw and all(isinstance(row, dict) for row in raw):
        raise _is_data(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, this file contains {type(raw).__name__}")
    return include(dict(substitute(raw, str(path))), path, (*_chain, resolved))


def _is_json_lines(text: str) -> bool:
    """Whether the first two non-empty lines are both JSON objects."""
    lines = [line for line in text[:100_000].splitlines()[:20] if line.strip()][:2]
    try:
        return len(lines) == 2 and all(isinstance(json.loads(line), dict) for line in lines)
    except ValueError:
        return False


def _is_data(path: Path) -> ConfigError:
    """Returns the error for a data file that is given as a config."""
    return ConfigError(
        f"{path} is a data file, not a config: use a config, such as a file in configs/, "
        f"and give 'data.train={{path: {path}, format: FORMAT}}' with the format of the rows, such as instruction"
    )


def include(raw: dict[str, Any], path: Path, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns a mapping merged over the files of its `include`.

    Args:
        raw: The mapping.
        path: The file that contains it. Included paths are relative to the folder of this file.
    """
    names = raw.get("include")
    base: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names or []:
        base = merge(base, read_file(path.parent / name, _chain))
    return merge(base, {key: value for key, value in raw.items() if key != "include"})


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` updated with `over`. Mappings are merged recursively; any other value is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def substitute(value: Any, where: str) -> Any:
    """Returns a value with `${VAR}` and `${VAR:-default}` replaced in all strings.

    A string that consists of a single variable is parsed as YAML after the replacement, so that it can be a number.

    Args:
        value: A mapping, a list, a string or any other value.
        where: The name of the file, for error messages.

    Raises:
        ConfigError: A variable without a default is not set.
    """
    if isinstance(value, dict):
        return {k: substitute(v, where) for k, v in value.items()}
    if isinstance(value, list):
        return [substitute(v, where) for v in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        if name not in os.environ and default is None:
            raise ConfigError(f"{where}: environment variable {name} is not set: set it, or write ${{{name}:-default}}")
        return os.environ.get(name) or default or ""

    replaced = _VARIABLE.sub(replace, value)
    return yaml.safe_load(replaced) if _VARIABLE.fullmatch(value) else replaced


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Applies an override `a.b.c=value` in place.

    Args:
        raw: The config, which is modified.
        override: The override. Its value is parsed as YAML. A part of the key can be the index of a list item.

    Raises:
        ConfigError: The override or its value is not valid.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key.sub=value, such as optimizer.lr=1e-3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    set_key(raw, key, value, f"override {override!r}")


def set_key(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Sets the value of a dotted key in place and creates missing mappings.

    Args:
        raw: The config, which is modified.
        key: The key, such as `a.b.c`. A part can be the index of a list item.
        value: The value.
        where: The origin of the key, for error messages.

    Raises:
        ConfigError: A list has no item with the given index.
    """
    *parents, last = key.split(".")
    target: Any = raw
    for part in parents:
        if isinstance(target, list):
            target = target[_item(target, part, where)]
            continue
        if not isinstance(target.get(part), (dict, list)):
            target[part] = {}
        target = target[part]
    if isinstance(target, list):
        target[_item(target, last, where)] = value
    else:
        target[last] = value


def _item(items: list[Any], part: str, where: str) -> int:
    """Returns the index of a list item, given as text."""
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"{where}: {part!r} is not the index of a list item (0 to {len(items) - 1})")
    return int(part)


def validate(raw: Mapping[str, Any], where: str = "config", components: bool = True) -> TrainerConfig:
    """Validates a mapping against the schema of its trainer and of its components.

    Args:
        raw: The config as a mapping.
        where: The name of the file, for error messages.
        components: Whether to also check accelerator, callbacks and formats, which imports them. A trained model is
            opened without this check.

    Returns:
        The config, of the class that belongs to its trainer.

    Raises:
        ConfigError: The config is not valid. The message names the dotted key of the most important error.
    """
    trainer = raw.get("trainer", "pretrain")
    try:
        cls = config_class(trainer) if isinstance(trainer, str) else TrainerConfig
        config = cls.model_validate(raw)
        check_amendments(config)
        if components:
            check_components(config)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, cls, raw)}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config


def to_yaml(config: TrainerConfig | Mapping[str, Any]) -> str:
    """Returns the config as YAML with all defaults, which is the content of `config.yaml` in a run's folder."""
    raw = config.model_dump(mode="json") if isinstance(config, TrainerConfig) else dict(config)
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
