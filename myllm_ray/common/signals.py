"""The polite ways to end a process: the first asks, the second is obeyed at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@contextmanager
def stop_on_signals(ask: Callable[[str], None]) -> Iterator[None]:
    """Inside, the first Ctrl-C or SIGTERM calls `ask` with its name; the second raises KeyboardInterrupt.

    Outside the main thread, where Python lets nobody handle signals, they stay as they were.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        ask(_NAMES[signal.Signals(number)])

    for kind in _NAMES:
        before[kind] = signal.signal(kind, handle)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
