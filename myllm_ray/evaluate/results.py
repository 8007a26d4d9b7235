"""Results of evaluations as JSON files: `<run>/evaluations/<step>-<key>.json`, written atomically.

The key is a hash of the model's checksum, of the SHA-256 of the data, and of all settings that change the result. An
evaluation with an existing key is read back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

from myllm_ray.common.files import write_json
from myllm_ray.evaluate.subjects import Subject, stem

log = logging.getLogger(__name__)
VERSION = 1
"""Part of the key. Change it when the same evaluation gives another result."""


def key_of(subject: Subject, described: dict[str, Any]) -> str:
    """Returns 16 hexadecimal digits that identify an evaluation.

    Args:
        subject: the model.
        described: the settings and the hashes of the data, as JSON values.
    """
    text = json.dumps([VERSION, subject.identity, described], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def path_of(subject: Subject, key: str, folder: Path | None) -> Path | None:
    """Returns the file of a result, or None if it is not kept. `folder` replaces the model's own folder of results."""
    folder = folder or subject.results
    return None if folder is None else folder / f"{stem(subject)}-{key}.json"


def read(path: Path | None) -> dict[str, Any] | None:
    """Returns the result in a file; None if there is no such file, or if it is not a result."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("version") == VERSION else None


def write(path: Path, result: dict[str, Any]) -> bool:
    """Writes a result atomically, and returns whether that succeeded.

    A failure is a warning: the result has been computed, and the caller prints it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    except OSError as error:
        log.warning(
            "%s: the result can't be written: %s (--output FOLDER writes it elsewhere)", path, error.strerror or error
        )
        return False
    return True


def finite(value: Any) -> Any:
    """Returns a JSON value in which numbers that JSON can't express are None."""
    if isinstance(value, dict):
        return {name: finite(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
