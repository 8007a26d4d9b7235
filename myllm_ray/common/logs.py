"""Console output of the package's log messages, for the command line.

When the package is imported as a library, it prints nothing unless the application configures `logging`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from myllm_ray.common.secrets import mask_text

_other: Callable[[logging.LogRecord], None] | None = None


class _Printer(logging.Handler):
    """Prints log records to the current `sys.stdout`.

    `logging.StreamHandler` keeps the stream that it was created with and would miss a later redirection.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if _other is not None:
            _other(record)
        else:
            print(mask_text(self.format(record)), file=sys.stdout, flush=True)


def show_progress() -> None:
    """Prints the package's own log messages to standard output, one plain line per message."""
    logger = logging.getLogger("myllm_ray")
    if not any(isinstance(handler, _Printer) for handler in logger.handlers):
        logger.addHandler(_Printer())
        logger.setLevel(logging.INFO)


def format_with(write: Callable[[logging.LogRecord], None] | None) -> None:
    """Sets a function that writes the log messages in another format; None: plain lines."""
    global _other
    _other = write
