"""Handling of Ctrl-C and SIGTERM: the first signal requests a stop, the second interrupts immediately."""

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
    """Handles Ctrl-C and SIGTERM inside the block and restores the previous handlers afterwards.

    The first signal calls `ask`; the second raises KeyboardInterrupt. Python allows signal handlers in the main thread
    only, so in other threads the handlers are left unchanged.

    Args:
        ask: Requests a stop; receives the name of the signal.
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
