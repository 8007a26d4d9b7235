"""One-line descriptions of exceptions: the type, the message and the line of user code that raised it."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_STANDARD = tuple(str(Path(sysconfig.get_path(name)).resolve()) + os.sep for name in ("stdlib", "platstdlib"))
_INSTALLED = f"{os.sep}site-packages{os.sep}"
_LIBRARIES = (
    "torch",
    "ray",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "numpy",
    "pyarrow",
    "tokenizers",
    "safetensors",
    "pydantic",
    "rich",
    "typer",
    "datasets",
    "jinja2",
)
_MOST = 300
"""Largest number of characters of a message that are shown."""


def describe(error: BaseException) -> str:
    """Returns the exception in one line, including the notes added to it.

    Example: `ValueError: mine (my_module.py:12 in train_step)`.
    """
    said = " ".join(str(error).split())[:_MOST]
    place = _place(error)
    notes = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
    return type(error).__name__ + (f": {said}" if said else "") + (f" ({place})" if place else "") + notes


def _place(error: BaseException) -> str | None:
    """Returns the innermost line of user code in the traceback, else of this package, else of any code."""
    frames = traceback.extract_tb(error.__traceback__)
    for kind in (is_users, _is_ours, lambda name: True):
        found = next((frame for frame in reversed(frames) if kind(frame.filename)), None)
        if found is not None:
            return f"{_short(found.filename)}:{found.lineno} in {found.name}"
    return None


def _is_ours(filename: str) -> bool:
    return filename.startswith(_PACKAGE)


def is_users(filename: str) -> bool:
    """Returns whether a file is user code: not this package, the standard library or a library that it calls."""
    if filename.startswith("<") or _is_ours(filename):
        return False
    if _INSTALLED in filename:
        return filename.rpartition(_INSTALLED)[2].split(os.sep)[0].removesuffix(".py") not in _LIBRARIES
    return not filename.startswith(_STANDARD)


def _short(filename: str) -> str:
    """Returns the path relative to the working directory, or the file's name if it is outside that directory."""
    relative = os.path.relpath(filename)
    return Path(filename).name if relative.startswith("..") else relative
