"""What libraries print where nobody asked: DeepSpeed's search for devices, transformers' progress bars."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quieten(cuda: bool) -> None:
    """Before the first import of DeepSpeed, which transformers and Accelerate make, too: it looks for devices then, and says so."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    warnings.filterwarnings("ignore", "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)", FutureWarning)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers shows no bars meanwhile."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
