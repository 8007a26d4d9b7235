"""Checks `accelerator.options` before anything starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.validation import suggestion


def keyword_options(
    target: Callable[..., Any], options: Mapping[str, Any], own: Iterable[str] = (), key: str = "accelerator.options"
) -> None:
    """Checks that all options are keyword arguments of a function or class.

    Args:
        target: The function or class.
        options: The options of the user.
        own: Arguments that the accelerator sets, which are not allowed in the options.
        key: Config key of the options, for messages.

    Raises:
        ConfigError: Names the first unknown option, and the closest or all valid names.
    """
    # `args` and `kwargs` are the conventional names of variadic parameters, which are not options.
    known = [name for name in inspect.signature(target).parameters if name not in {*own, "self", "args", "kwargs"}]
    check_names(options, known, getattr(target, "__name__", str(target)), key)


def check_names(options: Mapping[str, Any], known: Iterable[str], whose: str, key: str = "accelerator.options") -> None:
    """Checks that all options have a known name.

    Args:
        options: The options of the user.
        known: The valid names.
        whose: Name of the function or library that the options belong to, for messages.
        key: Config key of the options, for messages.

    Raises:
        ConfigError: Names the first unknown option, and the closest or all valid names.
    """
    known = list(known)
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown key {key}.{name} for {whose}: {suggestion(name, known)}")
