"""Configures glibc's allocator to keep freed large blocks.

Every training step allocates tensors of the same sizes, so a kept block is reused at the next step.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_large_blocks() -> bool:
    """Keeps freed blocks in the process instead of returning them to the operating system.

    By default glibc unmaps large blocks when they are freed, and the kernel maps them again, page by page, at every
    step. Measured on CPUs only: a step with a large vocabulary took a third less time.

    Returns:
        Whether this C library supports the settings. They are available with glibc on Linux.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No mmap for large blocks, no trimming of the heap below 2 GiB of free memory, and growth in steps of 256 MiB.
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_TOP_PAD, 256 * 2**20))
