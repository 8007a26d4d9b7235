"""Forwards what user code prints in rank 0's process to the driver.

What libraries print stays in Ray's logs.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

from myllm_ray.common.tracebacks import is_users

_MOST_LINES = 200
"""Most lines per second that are forwarded; a print in every micro-batch must not flood the driver."""
_RAYS_PRINTS = (
    os.path.join("ray", "train", "v2", "_internal", "logging", "patch_print.py"),
    os.path.join("ray", "experimental", "tqdm_ray.py"),
)
"""Files of Ray Train and of Ray Data's progress bars that replace the built-in `print`."""
_STANDARD = str(Path(sysconfig.get_path("stdlib")).resolve())


class UserOutput:
    """A standard output that also forwards the whole lines that user code writes.

    Args:
        under: the original stream; it receives all output.
        send: receives each line, without its newline.
    """

    def __init__(self, under: Any, send: Callable[[str], None]):
        self._under, self._send = under, send
        self._partial = ""
        self._since, self._sent, self._dropped = time.monotonic(), 0, 0

    def write(self, text: str) -> int:
        written: int = self._under.write(text)
        # `print` writes the text and the newline in separate calls, so partial lines are kept.
        if _from_user(sys._getframe(1)):
            *lines, self._partial = (self._partial + text).split("\n")
            for line in lines:
                self._forward(line)
        return written

    def finish(self) -> None:
        """Sends the last line if it has no newline, and the number of dropped lines."""
        if self._partial:
            self._forward(self._partial)
        self._partial, self._since = "", 0.0
        self._new_second()

    def _forward(self, line: str) -> None:
        self._new_second()
        if self._sent >= _MOST_LINES:
            self._dropped += 1
            return
        self._sent += 1
        self._send(line)

    def _new_second(self) -> None:
        if time.monotonic() - self._since < 1.0:
            return
        if self._dropped:
            self._send(
                f"({self._dropped:,} more lines of output, over {_MOST_LINES} a second: see them with --verbose)"
            )
        self._since, self._sent, self._dropped = time.monotonic(), 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._under, name)


@contextmanager
def forwarded_output(send: Callable[[str], None] | None) -> Iterator[None]:
    """Forwards the lines that user code prints inside the context to `send`. None: forwards nothing."""
    if send is None:
        yield
        return
    output = UserOutput(sys.stdout, send)
    with redirect_stdout(output):  # type: ignore[type-var]
        try:
            yield
        finally:
            output.finish()


def _from_user(frame: FrameType | None) -> bool:
    """Returns whether the innermost frame outside the standard library and Ray's `print` belongs to user code."""
    while frame is not None and _is_between(frame.f_code.co_filename):
        frame = frame.f_back
    return frame is not None and is_users(frame.f_code.co_filename)


def _is_between(filename: str) -> bool:
    """Returns whether this file only passes output through: the standard library, or Ray's replacement of `print`."""
    if filename.endswith(_RAYS_PRINTS):
        return True
    return filename.startswith((_STANDARD, "<")) and "site-packages" not in filename
