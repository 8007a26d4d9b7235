"""Progress of long preparations: what the process is doing, how much of it is done, and how long the rest takes.

Code that takes long reports to a `Task`. Displays and heartbeats read `current()` when they need it; nothing is sent,
so a loop can report as often as it wants.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """The state of a task.

    Attributes:
        task: what is done, as a present participle: `tokenizing`.
        done: the finished part, in the unit of `total`.
        total: the whole amount; None: unknown.
        seconds: how long the task has taken so far.
    """

    task: str
    done: float
    total: float | None
    seconds: float

    @property
    def left(self) -> float | None:
        """The estimated seconds until the end, or None if they can't be estimated yet."""
        if not self.total or self.done <= 0:
            return None
        return self.seconds * max(0.0, self.total - self.done) / self.done

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Task:
    """Context manager that makes a task visible in `current` while its block runs.

    Args:
        name: what is done: `tokenizing`.
        total: the whole amount; None: unknown.
        measure: returns the finished part, for code that can't call `advance`.
    """

    def __init__(self, name: str, total: float | None = None, measure: Callable[[], float] | None = None):
        self.name, self.total, self._measure = name, total, measure
        self._done, self._started = 0.0, time.monotonic()

    def __enter__(self) -> Task:
        self._started = time.monotonic()
        _tasks.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _tasks.remove(self)

    def advance(self, amount: float = 1) -> None:
        """Adds to the finished part."""
        self._done += amount

    @property
    def progress(self) -> Progress:
        done = self._done if self._measure is None else self._measure()
        return Progress(self.name, done, self.total, time.monotonic() - self._started)


_tasks: list[Task] = []
"""The tasks of this process, the innermost last. Appending and removing are atomic, so readers need no lock."""


def current(at_least: float = 0.0) -> Progress | None:
    """Returns the state of the innermost task of this process that has taken at least that many seconds, or None."""
    for task in reversed(list(_tasks)):
        found = task.progress
        if found.seconds >= at_least:
            return found
    return None


def track(items: Iterable[T], name: str, total: float | None = None) -> Iterator[T]:
    """Yields the items of a loop and reports each as done when the next one is requested."""
    with Task(name, total) as task:
        for item in items:
            yield item
            task.advance()
