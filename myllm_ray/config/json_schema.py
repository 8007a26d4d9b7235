"""JSON schema of a run's config, for editors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from myllm_ray.config.resolve import SHORT_NAMES, resolve
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import AcceleratorSection, Section, SourceSection, ValidationSection
from myllm_ray.config.trainers import builtin_config_classes, config_class


def json_schema(
    trainers: Iterable[str] = (),
    accelerators: Iterable[str] = (),
    callbacks: Iterable[str] = (),
    formats: Iterable[str] = (),
    trackers: Iterable[str] = (),
) -> dict[str, Any]:
    """Returns the JSON schema: the union of the configs of all trainers, with `include`.

    Args:
        trainers: import paths of custom trainers whose options the schema includes.
        accelerators: the same of custom accelerators.
        callbacks: the same of custom callbacks.
        formats: the same of custom data formats.
        trackers: the same of custom trackers.

    Raises:
        ConfigError: there is no such component.
    """
    custom = [config_class(name) for name in trainers]
    settings = {
        kind: {name: _settings(kind, name) for name in names}
        for kind, names in (
            ("accelerators", accelerators),
            ("callbacks", callbacks),
            ("formats", formats),
            ("trackers", [*SHORT_NAMES["trackers"], *trackers]),
        )
    }
    classes: list[type[BaseModel]] = [TrainerConfig, *builtin_config_classes().values(), *custom]
    components: list[type[BaseModel]] = [cls for found in settings.values() for cls in found.values()]
    # One call for all: pydantic gives classes of one name, such as `Config`, different definitions.
    references, schema = models_json_schema([(cls, "validation") for cls in [*classes, *components]])
    definitions = schema["$defs"]

    def reference(cls: type[BaseModel]) -> dict[str, Any]:
        return dict(references[cls, "validation"])

    def definition(cls: type[BaseModel]) -> dict[str, Any]:
        found: dict[str, Any] = definitions[reference(cls)["$ref"].rpartition("/")[2]]
        return found

    properties: dict[str, Any] = {}
    for cls in classes:
        # The options of a trainer with a short name must be empty: they are in its section.
        properties |= {k: v for k, v in definition(cls)["properties"].items() if k != "options" or cls is TrainerConfig}
    options = [definition(cls)["properties"]["options"] for cls in custom if cls.section_key == "options"]
    if options and any(cls is not TrainerConfig for cls in custom):
        properties["options"] = {"anyOf": [*options, properties["options"]]}
    for section in (AcceleratorSection, SourceSection, ValidationSection):
        kind = "accelerators" if section is AcceleratorSection else "formats"
        found = [reference(cls) for cls in settings[kind].values()]
        if found:
            fields = definitions[section.__name__]["properties"]
            fields["options"] = {"anyOf": [*found, fields["options"]]}
    for name, cls in settings["callbacks"].items():
        entry = {"type": "object", "properties": {name: reference(cls)}, "additionalProperties": False}
        properties["callbacks"]["items"]["anyOf"].append(entry)
    properties["tracking"]["items"] = {
        "anyOf": [{"type": "string"}, *_tracker_entries(settings["trackers"], definition)]
    }
    properties["include"] = {
        "description": "another config file that this file overrides",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    for cls in [*classes, *settings["trackers"].values()]:
        definitions.pop(reference(cls)["$ref"].rpartition("/")[2], None)
    properties["trainer"] = {**properties["trainer"], "default": TrainerConfig.model_fields["trainer"].default}
    # No `required`: an included file may contain what this one leaves out.
    top = {"additionalProperties": False, "type": "object", "properties": properties, "$defs": definitions}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "myllm_ray run", **top}


def _tracker_entries(
    trackers: Mapping[str, type[Section]], definition: Callable[[type[BaseModel]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yields the schema of each tracker's entry in `tracking`: its settings, and its name."""
    for name, cls in trackers.items():
        found = definition(cls)
        yield {**found, "properties": {"name": {"const": name}, **found["properties"]}, "required": ["name"]}


def _settings(kind: str, name: str) -> type[Section]:
    found = getattr(resolve(kind, name, kind), "Config", None)
    return found if isinstance(found, type) and issubclass(found, Section) else Section
