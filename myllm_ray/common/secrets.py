"""Masks keys and tokens in everything that a run writes: config.yaml, environment.json, manifests, logs."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
# Not every `..._token` is a secret: eos_token and similar names are not.
_NAMES = (
    r"password|passwd|secret|credentials?|api_?key|access_?key(?:_id)?|secret_?access_?key|private_?key|"
    r"(?:auth|access|api|hf|hub|bearer|session|refresh)_?token"
)
_SECRET_NAME = re.compile(rf"(?i)(?:^|[_\-.])(?:{_NAMES})$|^token$")
_NAMED = re.compile(
    rf"(?i)(?P<name>(?<![a-z0-9])(?:[\w.\-]*[_\-.])?(?:{_NAMES})[\"']?\s*[:=]\s*)"
    r"(?P<value>\"[^\"\n]*\"|'[^'\n]*'|[^\s,}\]]+)"
)
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|"
    r"xox[abpr]-[A-Za-z0-9\-]{10,}|glpat-[A-Za-z0-9_\-]{16,})"
)
# The login of a URL: `user:password` in `https://user:password@host`.
_IN_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")


def mask_text(text: str) -> str:
    """Returns the text with likely secrets masked.

    It masks keys with a known format (such as `hf_...`), the value in `name: value` where the name indicates a secret,
    and credentials in URLs.
    """
    text = _NAMED.sub(lambda m: m["name"] + MASK if m["value"] not in ("null", "None", "true", "false") else m[0], text)
    return _IN_URL.sub(MASK, _SHAPES.sub(MASK, text))


def is_secret(name: str, value: Any) -> bool:
    """Returns whether a key with this name, or its value, looks like a secret."""
    return bool(_SECRET_NAME.search(name)) or (isinstance(value, str) and mask_text(value) != value)


def mask(value: Any, name: str = "") -> Any:
    """Returns a copy of a nested mapping or list with its secrets masked.

    Args:
        value: The value to mask.
        name: The key of the value in the mapping that contains it.
    """
    if isinstance(value, dict):
        return {key: mask(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask(inner, name) for inner in value]
    if isinstance(value, str):
        return MASK if value and _SECRET_NAME.search(name) else mask_text(value)
    return value
