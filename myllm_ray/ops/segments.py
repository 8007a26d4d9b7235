"""Rows that hold several documents: their positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def restarting_positions(lengths: Sequence[int], width: int) -> np.ndarray:
    """(width,) int32: positions of the documents of a row, from 0 in each, and in the padding, a document of its own to a model."""
    places = [*lengths, width - sum(lengths)]
    return np.concatenate([np.arange(length, dtype=np.int32) for length in places])
