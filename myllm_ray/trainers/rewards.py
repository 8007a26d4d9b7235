"""User-defined reward functions, called with a time limit and with checks of their results."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, PositiveFloat

from myllm_ray.common.tracebacks import describe
from myllm_ray.config.errors import ConfigError, TrainingError
from myllm_ray.config.resolve import load_object
from myllm_ray.config.sections import Section

Columns = Callable[[int], dict[str, Any]]
"""A function from the document number of a prompt to the fields of its data row.

The fields may include `prompts` and `prompt_texts` (see `Reward`).
"""


def gather_columns(columns_of: Columns, documents: list[int]) -> dict[str, list[Any]]:
    """Returns the fields of the documents by name, with one value per document; None if the document lacks it."""
    # A document occurs once per answer to it; its fields are read only once.
    fields = {document: columns_of(document) for document in dict.fromkeys(documents)}
    names = list(dict.fromkeys(name for document in documents for name in fields[document]))
    return {name: [fields[document].get(name) for document in documents] for name in names}


class FunctionReward:
    """A function `fn(prompts, completions, **columns) -> numbers`, or an `async def` of that form.

    The function is called with keyword arguments, and only with those that it accepts: `prompts`, `completions`, the
    names in `columns`, and the options of the config.

    Args:
        config: An entry of the config's list of rewards.
        function: The function to call; default: the function that the entry names.

    Raises:
        ConfigError: The function does not exist, or does not accept one of `options`.
    """

    class Config(Section):
        """A reward function: fn(prompts, completions, **fields) -> one number per completion. See docs/rollouts.md."""

        function: str = Field(description="import path: my_pkg.my_mod:fn; it may be an `async def`")
        weight: float = 1.0
        name: str | None = Field(
            None, description="the name under which its rewards are logged; default: the function's"
        )
        timeout: PositiveFloat | None = Field(
            60.0, description="seconds for one call, without the start of its process; null: no limit"
        )
        on_error: Literal["error"] | float = Field(
            "error",
            description="when it raises, hangs, or returns something other than finite numbers: end the run, "
            "or this reward",
        )
        workers: int = Field(
            0,
            ge=0,
            description="number of Ray actors per training worker that share the batch; 0: the training process "
            "calls it",
        )
        options: dict[str, Any] = Field(default_factory=dict, description="further keyword arguments")

        @property
        def logged_as(self) -> str:
            """The name under which its rewards are logged."""
            return self.name or self.function.rpartition(":")[2].rpartition(".")[2]

    def __init__(self, config: Config, function: Callable[..., Any] | None = None):
        self.config, self.weight, self.failures = config, config.weight, 0
        self.function = function or load_object(config.function, "reward")
        # Checked here, so that a wrong option fails before the run starts instead of in the first batch.
        self._accepted = _keywords(self.function)
        unknown = [] if self._accepted is None else sorted(config.options.keys() - self._accepted)
        if unknown:
            raise ConfigError(
                f"reward {config.function}: the function takes no {', '.join(unknown)} (options); it takes "
                f"{', '.join(sorted(self._accepted or ()))}"
            )
        self.name = config.logged_as

    def __call__(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        """Returns one finite number per completion.

        Args:
            prompts: The prompts; see `Reward`.
            completions: The texts of the answers.
            columns: Fields of the data by name, with one value per completion.

        Raises:
            TrainingError: The function raised, exceeded its timeout, or did not return finite numbers, and `on_error`
                is "error".
        """
        try:
            return self.checked(self.within_time(prompts, completions, columns), len(completions))
        except RewardFailure as error:
            if self.config.on_error == "error":
                raise TrainingError(
                    f"reward {self.config.function}: {error} (to use a number instead, set on_error)"
                ) from error.__cause__
            # One wrong value makes the result of the whole call unusable, so all completions get the fallback.
            self.failures += len(completions)
            return [float(self.config.on_error)] * len(completions)

    def within_time(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> Any:
        """Returns the result of the function, which runs in a thread.

        Raises:
            RewardFailure: The function raised, or did not return within the timeout.
        """
        # Python cannot end a thread. The thread of a function that hangs stays, and is a daemon so that the process can
        # exit.
        # An exception in a thread does not reach the caller, so `box` carries it.
        box: list[Any] = []

        def run() -> None:
            try:
                box.append(self.call(prompts, completions, columns))
            except Exception as error:
                box.append(error)

        thread = threading.Thread(target=run, name=f"reward {self.name}", daemon=True)
        thread.start()
        thread.join(self.config.timeout)
        if thread.is_alive():
            raise RewardFailure(f"returned nothing within {self.config.timeout:g} s (timeout)")
        if isinstance(box[0], RewardFailure):
            raise box[0]
        return box[0]

    def call(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> Any:
        """Calls the function without a time limit and returns its result.

        Raises:
            RewardFailure: The function raised.
        """
        try:
            given = {**columns, "prompts": prompts, "completions": completions, **self.config.options}
            result = self.function(**self.accepted(given))
            return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result
        except Exception as error:
            raise RewardFailure(f"raised {describe(error)}") from error

    def accepted(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns those of the given keyword arguments that the function accepts."""
        return {name: value for name, value in given.items() if self._accepted is None or name in self._accepted}

    def checked(self, values: Any, count: int) -> list[float]:
        """Returns the result of the function as a list of `count` finite numbers.

        Args:
            values: A list, a tuple, or a tensor or array of numbers.
            count: Number of completions.

        Raises:
            RewardFailure: `values` is something else.
        """
        # Tensors and arrays have `tolist`.
        if hasattr(values, "tolist"):
            values = values.tolist()
        if not isinstance(values, (list, tuple)) or len(values) != count:
            got = f"{len(values)}" if isinstance(values, (list, tuple)) else type(values).__name__
            raise RewardFailure(f"must return one number for each of the {count} completions, returned {got}")
        for i, value in enumerate(values):
            # float() would accept a text such as "1".
            if isinstance(value, str) or not _is_finite(value):
                raise RewardFailure(f"returned {value!r} for completion {i}, which is not a finite number")
        return [float(v) for v in values]


class RewardFailure(Exception):
    """A reward function raised, exceeded its timeout, or did not return finite numbers. The message says which."""


def _keywords(function: Callable[..., Any]) -> set[str] | None:
    """Returns the names of a function's keyword arguments; None if it accepts any, or if they cannot be determined."""
    try:
        parameters = inspect.signature(function).parameters.values()
    # Some builtins and C extensions have no signature.
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
