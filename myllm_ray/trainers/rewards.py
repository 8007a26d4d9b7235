"""Reward functions of the user's own: called with a time-out, their results checked."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

from myllm_ray.common.tracebacks import describe
from myllm_ray.config.errors import ConfigError, TrainingError
from myllm_ray.config.resolve import load_object
from myllm_ray.config.trainers import RewardFunction


class FunctionReward:
    """A function `fn(prompts, completions, **columns) -> numbers`, or an `async def` of that form.

    It is called with keyword arguments, only with those that it takes: `prompts`, `completions`, and the names in `columns`.

    Args:
        settings: the config's entry.
        function: what is called; default: the one that the entry names.

    Raises:
        ConfigError: there is no such function, or it does not take one of `options`.
    """

    def __init__(self, settings: RewardFunction, function: Callable[..., Any] | None = None):
        self.settings, self.weight, self.failures = settings, settings.weight, 0
        self.function = function or load_object(settings.function, "reward")
        self._accepted = _keywords(self.function)
        unknown = [] if self._accepted is None else sorted(settings.options.keys() - self._accepted)
        if unknown:
            raise ConfigError(f"reward {settings.function}: the function takes no {', '.join(unknown)} (options); it takes "
                              f"{', '.join(sorted(self._accepted or ()))}")
        self.name = settings.logged_as

    def __call__(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        """A finite number for each completion.

        Raises:
            TrainingError: the function raised, hung, or returned something else, and `on_error` is "error".
        """
        try:
            return self.checked(self.within_time(prompts, completions, columns), len(completions))
        except RewardFailure as error:
            if self.settings.on_error == "error":
                raise TrainingError(f"reward {self.settings.function}: {error} (on_error: a number would be used instead)") from error.__cause__
            self.failures += len(completions)
            return [float(self.settings.on_error)] * len(completions)

    def within_time(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> Any:
        """The function's result. A thread that hangs is left behind: Python can't end it."""
        box: list[Any] = []

        def run() -> None:
            try:
                box.append(self.call(prompts, completions, columns))
            except Exception as error:
                box.append(error)

        thread = threading.Thread(target=run, name=f"reward {self.name}", daemon=True)
        thread.start()
        thread.join(self.settings.timeout)
        if thread.is_alive():
            raise RewardFailure(f"gave no answer within {self.settings.timeout:g} s (timeout)")
        if isinstance(box[0], RewardFailure):
            raise box[0]
        return box[0]

    def call(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> Any:
        """What the function returns.

        Raises:
            RewardFailure: it raised.
        """
        try:
            given = {**columns, "prompts": prompts, "completions": completions, **self.settings.options}
            result = self.function(**self.accepted(given))
            return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result
        except Exception as error:
            raise RewardFailure(f"raised {describe(error)}") from error

    def accepted(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the keyword arguments that the function takes."""
        return {name: value for name, value in given.items() if self._accepted is None or name in self._accepted}

    def checked(self, values: Any, count: int) -> list[float]:
        """The values as finite numbers, `count` of them.

        Raises:
            RewardFailure: they are something else.
        """
        if hasattr(values, "tolist"):
            values = values.tolist()
        if not isinstance(values, (list, tuple)) or len(values) != count:
            got = f"{len(values)}" if isinstance(values, (list, tuple)) else type(values).__name__
            raise RewardFailure(f"must return one number for each of the {count} completions, returned {got}")
        for i, value in enumerate(values):
            if isinstance(value, str) or not _is_finite(value):
                raise RewardFailure(f"returned {value!r} for completion {i}, which is no finite number")
        return [float(v) for v in values]


class RewardFailure(Exception):
    """A reward function did not do what it is for; the message says what happened."""


def _keywords(function: Callable[..., Any]) -> set[str] | None:
    """Names of the keyword arguments of a function; None where it takes any, or where Python can't say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


async def _awaited(result: Any) -> Any:
    return await result


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
