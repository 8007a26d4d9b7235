"""The number of tokens in the rows of a run, from the plan of the data. No token is read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from myllm_ray.data.plan import RowPlan
from myllm_ray.data.stream import StreamSpec

_ROWS = 65536
"""Number of rows that are read at once."""


def row_tokens(plan: RowPlan, epoch: int) -> np.ndarray:
    """Returns (rows,) int64, the number of tokens in each row of an epoch, without padding."""
    segments, firsts = plan.segments(epoch)
    found = np.empty(len(firsts) - 1, np.int64)
    for first in range(0, len(found), _ROWS):
        edges = np.asarray(firsts[first : first + _ROWS + 1])
        lengths = segments[edges[0] : edges[-1], 2]
        found[first : first + _ROWS] = np.add.reduceat(lengths, edges[:-1] - edges[0])
    return found


def batch_tokens(spec: StreamSpec) -> Iterator[np.ndarray]:
    """Yields, for each epoch in turn, (batches,) int64 the number of tokens in each global batch."""
    epoch = 0
    while True:
        rows = row_tokens(spec.plan, epoch)
        yield np.add.reduceat(rows, np.arange(0, len(rows), spec.global_size))
        epoch += 1


def batches_for_tokens(spec: StreamSpec, tokens: int, most: int) -> int | None:
    """Returns the number of global batches after which a run has seen at least `tokens` tokens.

    Args:
        spec: the stream of the run.
        tokens: number of tokens.
        most: number of global batches of the run.

    Returns:
        The number, or None if the whole run has fewer tokens.
    """
    seen = batches = 0
    for counts in batch_tokens(spec):
        total = seen + np.cumsum(counts)
        if total[-1] >= tokens:
            found = batches + int(np.searchsorted(total, tokens)) + 1
            return found if found <= most else None
        seen, batches = int(total[-1]), batches + len(counts)
        if batches >= most:
            break
    return None
