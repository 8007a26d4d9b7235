"""From a file and overrides to a validated config: include, environment variables, dotted overrides, clear errors."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.other_names import near_key, right_key
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.trainers import config_class

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_DATA_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zst")
_SHORTHAND = {
    "model": "name", "tokenizer": "name", "optimizer": "name", "scheduler": "name", "accelerator": "name", "run": "name",
    "scaling": "workers", "data": "train.path", "data.train": "path", "data.validation": "path", "batch": "global_size",
    "model.lora": "rank"}
"""{section: the key that was meant where the section is given as one value}."""
_MOST_UNKNOWN = 4
"""Unknown keys named in one message."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainerConfig:
    """Read a YAML or JSON config and apply `key.sub=value` overrides.

    Raises:
        ConfigError: one line that names the key, the file and what to do.
    """
    raw = read_file(Path(path))
    for override in overrides:
        apply_override(raw, override)
    return validate(raw, where=str(path))


def read_file(path: Path, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file as a mapping, `include:` merged below it and `${VAR}` replaced."""
    resolved = path.resolve()
    if resolved in _chain:
        raise ConfigError(f"{path}: include goes round in a circle: {' -> '.join(p.name for p in (*_chain, resolved))}")
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
        raise ConfigError(f"{path}: a config is a mapping of keys to values, this file holds {type(raw).__name__}")
    return include(dict(substitute(raw, str(path))), path, (*_chain, resolved))


def _is_json_lines(text: str) -> bool:
    """Whether the first two lines are a JSON object each."""
    lines = [line for line in text[:100_000].splitlines()[:20] if line.strip()][:2]
    try:
        return len(lines) == 2 and all(isinstance(json.loads(line), dict) for line in lines)
    except ValueError:
        return False


def _is_data(path: Path) -> ConfigError:
    return ConfigError(f"{path} is data, not a config: a config names it under data.train.path (start from a file in configs/, "
                       f"and give data.train.path={path})")


def include(raw: dict[str, Any], path: Path, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A mapping from the file at `path`, laid on the files that its `include` names, relative to that file."""
    names = raw.get("include")
    base: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names or []:
        base = merge(base, read_file(path.parent / name, _chain))
    return merge(base, {key: value for key, value in raw.items() if key != "include"})


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`; mappings merge key by key, anything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def substitute(value: Any, where: str) -> Any:
    """Replace `${VAR}` and `${VAR:-default}` in every string; a string that was all variable is parsed as YAML."""
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
    """Set `a.b.c=value` in place; the value is parsed as YAML, list items are reached by their number."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key.sub=value, such as optimizer.lr=1e-3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    set_key(raw, key, value, f"override {override!r}")


def set_key(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set the dotted key `a.b.c` in place; list items are reached by their number."""
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
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"{where}: {part!r} is not the number of a list item (0 to {len(items) - 1})")
    return int(part)


def validate(raw: Mapping[str, Any], where: str = "config") -> TrainerConfig:
    """Check a plain mapping against the schema of its trainer.

    Raises:
        ConfigError: the first thing that is wrong, with its dotted key.
    """
    cls = config_class(raw.get("trainer", "pretrain"))
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, cls, raw)}") from None


def explain(error: ValidationError, cls: type[BaseModel], raw: Any) -> str:
    """One line for the most telling of pydantic's complaints: unknown keys first, for they explain missing ones."""
    details = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
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
    if first["type"] in ("model_type", "model_attributes_type", "dict_type") and key in _SHORTHAND:
        return f"{key} is a section of keys, not one value: write {key}.{_SHORTHAND[key]}={first['input']}"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}: {message} (got {first['input']!r}){more}"


def _location(detail: Any) -> list[int | str]:
    """Where a complaint of pydantic's is, as parts of a dotted key."""
    *above, last = detail["loc"] or ("",)
    keep_last = detail["type"] == "extra_forbidden" or not _is_union_tag(last)  # an unknown key may be called anything
    return [*(part for part in above if not _is_union_tag(part)), *([last] if keep_last else [])]


def _unknown_key(location: list[int | str], cls: type[BaseModel]) -> str:
    """An unknown key, and the one that was meant: at the right place, of another tool, or almost spelt like it."""
    key = ".".join(str(part) for part in location)
    meant = right_key(cls, location)
    if meant is not None:
        return f"unknown key {key}: use {meant}"
    known = _known_keys(cls, location[:-1])
    close = difflib.get_close_matches(str(location[-1]), known, 1)
    if close:
        return f"unknown key {key}: did you mean {close[0]}?"
    meant = near_key(cls, str(location[-1]))
    return f"unknown key {key}: " + (f"did you mean {meant}?" if meant else f"known here: {', '.join(sorted(known))}")


def _is_union_tag(part: int | str) -> bool:
    """Whether pydantic put the name of a union's member here, which stands in no file."""
    return isinstance(part, str) and (part[:1].isupper() or "[" in part or part in ("str", "dict", "int", "constrained-int"))


def _known_keys(cls: type[BaseModel], location: Sequence[int | str]) -> list[str]:
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
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_in(arg))), None)


def to_yaml(config: TrainerConfig | Mapping[str, Any]) -> str:
    """The resolved config as YAML, every default written out: what `config.yaml` in a run folder holds."""
    raw = config.model_dump(mode="json") if isinstance(config, TrainerConfig) else dict(config)
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON schema that editors use: the union of all trainers' configs, `include` allowed."""
    from myllm_ray.config.trainers import CONFIG_OF_TRAINER

    schema: dict[str, Any] = TrainerConfig.model_json_schema()
    for cls in CONFIG_OF_TRAINER.values():
        extra = cls.model_json_schema()
        schema["properties"].update(extra["properties"])
        schema["$defs"].update(extra["$defs"])
    schema["properties"]["include"] = {"description": "another config file that this one is laid on",
                                       "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    schema.pop("required", None)  # an included file may hold what this one leaves out
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "myllm_ray run"}
