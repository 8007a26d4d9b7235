"""Nested mappings by dotted key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns a nested mapping as {dotted key: value}. Lists of mappings are flattened by index."""
    nested: Mapping[Any, Any] | None = None
    if isinstance(value, Mapping) and value:
        nested = value
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        nested = dict(enumerate(value))
    if nested is None:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in nested.items():
        found |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return found
