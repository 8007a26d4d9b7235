"""Console output of the package's log messages, for the command line.

When the package is imported as a library, it prints nothing unless the application configures `logging`.
"""

from __future__ import annotations

import logging
import sys

from myllm_ray.common.secrets import mask_text


class _Printer(logging.Handler):
    """Prints log records to the current `sys.stdout`.

    `logging.StreamHandler` keeps the stream that it was created with and would miss a later redirection.
    """

    def emit(self, record: logging.LogRecord) -> None:
        print(mask_text(self.format(record)), file=sys.stdout, flush=True)


def show_progress() -> None:
    """Prints the package's own log messages to standard output, one plain line per message."""
    logger = logging.getLogger("myllm_ray")
    if not logger.handlers:
        logger.addHandler(_Printer())
        logger.setLevel(logging.INFO)
