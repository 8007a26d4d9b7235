"""Suppresses unneeded output of libraries: DeepSpeed's device detection and the progress bars of transformers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quieten(cuda: bool) -> None:
    """Suppresses the output of DeepSpeed's device detection and a torch deprecation warning.

    DeepSpeed detects devices at its first import, which transformers and Accelerate also trigger. Call this function
    before that import.

    Args:
        cuda: Whether the process uses CUDA; otherwise DeepSpeed is configured for the CPU.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    warnings.filterwarnings(
        "ignore", "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)", FutureWarning
    )


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Disables the progress bars of transformers inside the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
