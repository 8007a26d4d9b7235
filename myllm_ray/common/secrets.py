"""Keeps keys and tokens out of what a run writes down: config.yaml, environment.json, manifests, logs."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
# Not every `..._token`: eos_token and its like are no secrets.
_NAMES = (r"password|passwd|secret|credentials?|api_?key|access_?key(?:_id)?|secret_?access_?key|private_?key|"
          r"(?:auth|access|api|hf|hub|bearer|session|refresh)_?token")
_SECRET_NAME = re.compile(rf"(?i)(?:^|[_\-.])(?:{_NAMES})$|^token$")
_NAMED = re.compile(rf"(?i)(?P<name>(?<![a-z0-9])(?:[\w.\-]*[_\-.])?(?:{_NAMES})[\"']?\s*[:=]\s*)"
                    r"(?P<value>\"[^\"\n]*\"|'[^'\n]*'|[^\s,}\]]+)")
_SHAPES = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|"
                     r"xox[abpr]-[A-Za-z0-9\-]{10,}|glpat-[A-Za-z0-9_\-]{16,})")
_IN_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")


def mask_text(text: str) -> str:
    """The text with what looks like a secret replaced: keys by their known shapes, `name: value` by telling names, logins in URLs."""
    text = _NAMED.sub(lambda m: m["name"] + MASK if m["value"] not in ("null", "None", "true", "false") else m[0], text)
    return _IN_URL.sub(MASK, _SHAPES.sub(MASK, text))


def mask(value: Any, name: str = "") -> Any:
    """A nested mapping or list with its secrets replaced."""
    if isinstance(value, dict):
        return {key: mask(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask(inner, name) for inner in value]
    if isinstance(value, str):
        return MASK if value and _SECRET_NAME.search(name) else mask_text(value)
    return value
