"""`accelerator.options`: checked before anything starts."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from myllm_ray.config.errors import ConfigError


def keyword_options(target: Callable[..., Any], options: Mapping[str, Any], own: Iterable[str] = (),
                    key: str = "accelerator.options") -> None:
    """Check that `options` are keyword arguments of `target`.

    Args:
        own: arguments that the accelerator sets itself.

    Raises:
        ConfigError: names the first that is not, and what there is.
    """
    known = [name for name in inspect.signature(target).parameters if name not in {*own, "self", "args", "kwargs"}]
    check_names(options, known, getattr(target, "__name__", str(target)), key)


def check_names(options: Mapping[str, Any], known: Iterable[str], whose: str, key: str = "accelerator.options") -> None:
    """Check that every option is one of `known`."""
    known = list(known)
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {key}.{name} for {whose}: {hint}")
