"""Position ids of rows with several documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def restarting_positions(lengths: Sequence[int], width: int) -> np.ndarray:
    """Returns the position ids (width,) int32 of a row of documents of the given lengths.

    Positions restart at 0 at each document and at the padding, so models treat the padding as a separate document.
    """
    places = [*lengths, width - sum(lengths)]
    return np.concatenate([np.arange(length, dtype=np.int32) for length in places])
