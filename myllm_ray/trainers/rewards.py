"""Reward functions of the user's own: called with a time-out, their results checked."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable
from typing import Any

from myllm_ray.config.errors import TrainingError
from myllm_ray.config.resolve import load_object
from myllm_ray.config.trainers import RewardFunction


class FunctionReward:
    """A function `fn(prompts, completions, **columns) -> numbers`, or an `async def` of that form.

    Args:
        settings: the config's entry.
        function: what is called; default: the one that the entry names.

    Raises:
        ConfigError: there is no such function.
    """

    def __init__(self, settings: RewardFunction, function: Callable[..., Any] | None = None):
        self.settings, self.weight, self.failures = settings, settings.weight, 0
        self.function = function or load_object(settings.function, "reward")
        self.name = settings.name or settings.function.rpartition(":")[2].rpartition(".")[2]

    def __call__(self, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        """A finite number for each completion.

        Raises:
            TrainingError: the function raised, hung, or returned something else, and `on_error` is "error".
        """
        try:
            return self._checked(self._within_time(prompts, completions, columns), len(completions))
        except _Failed as error:
            if self.settings.on_error == "error":
                raise TrainingError(f"reward {self.settings.function}: {error} (on_error: a number would be used instead)") from error.__cause__
            self.failures += len(completions)
            return [float(self.settings.on_error)] * len(completions)

    def _within_time(self, *arguments: Any) -> Any:
        """The function's result. A thread that hangs is left behind: Python can't end it."""
        box: list[Any] = []

        def call() -> None:
            try:
                prompts, completions, columns = arguments
                result = self.function(prompts=prompts, completions=completions, **columns, **self.settings.options)
                box.append(asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result)
            except Exception as error:
                box.append(error)

        thread = threading.Thread(target=call, name=f"reward {self.name}", daemon=True)
        thread.start()
        thread.join(self.settings.timeout)
        if thread.is_alive():
            raise _Failed(f"gave no answer within {self.settings.timeout:g} s (timeout)")
        if isinstance(box[0], Exception):
            raise _Failed(f"raised {type(box[0]).__name__}: {box[0]}") from box[0]
        return box[0]

    def _checked(self, values: Any, count: int) -> list[float]:
        if hasattr(values, "tolist"):
            values = values.tolist()
        if not isinstance(values, (list, tuple)) or len(values) != count:
            got = f"{len(values)}" if isinstance(values, (list, tuple)) else type(values).__name__
            raise _Failed(f"must return one number for each of the {count} completions, returned {got}")
        for i, value in enumerate(values):
            if isinstance(value, str) or not _is_finite(value):
                raise _Failed(f"returned {value!r} for completion {i}, which is no finite number")
        return [float(v) for v in values]


class _Failed(Exception):
    pass


async def _awaited(result: Any) -> Any:
    return await result


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
