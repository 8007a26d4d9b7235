"""What the package says about its progress, for commands; a library's user sees nothing unless they ask logging for it."""

from __future__ import annotations

import logging
import sys

from myllm_ray.common.secrets import mask_text


class _Printer(logging.Handler):
    """Prints to what standard output is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(mask_text(self.format(record)), file=sys.stdout, flush=True)


def show_progress() -> None:
    """Print the package's own messages, one plain line each, to standard output."""
    logger = logging.getLogger("myllm_ray")
    if not logger.handlers:
        logger.addHandler(_Printer())
        logger.setLevel(logging.INFO)
