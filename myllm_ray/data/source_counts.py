"""What a run reads of each source, from the plan of the data. No token is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from myllm_ray.data.examples import TOKENS
from myllm_ray.data.mixture import UNIT, Mixture
from myllm_ray.data.plan import RowPlan
from myllm_ray.data.stream import StreamSpec

_ROWS = 65536
"""Number of rows that are read at once."""
_MOST_COUNTED = 2**18
"""Largest number of rows that `source_uses` counts."""


@dataclass(frozen=True)
class SourceUse:
    """What a run reads of a source of a mixture.

    Attributes:
        share: Share of the tokens of the run; of preferences and prompts, of its rows.
        passes: Number of passes over the documents for training.
    """

    share: float
    passes: float


def tokens_by_source(plan: RowPlan, epoch: int, rows: int) -> np.ndarray:
    """Returns (sources,) int64, the tokens of each source in the first `rows` rows of an epoch, without padding."""
    return _counted(plan, epoch, rows)[0]


def source_uses(spec: StreamSpec, batches: int) -> list[SourceUse]:
    """Returns what a run reads of each source of a mixture.

    The first rows of the first epoch are counted. For later rows, which may not be planned yet, the counts follow from
    the shares of their stages and from the mean length of the rows and documents that were counted.

    Args:
        spec: The stream of the run, whose sources have shares.
        batches: Number of global batches of the run.
    """
    plan, mixture = spec.plan, spec.plan.order.mixture
    assert mixture is not None
    total = batches * spec.global_size
    first = min(total, mixture.rows, _MOST_COUNTED)
    tokens, begun, rows = _counted(plan, 0, first)
    amounts = tokens if plan.store.kind == TOKENS else rows
    amount_of_row = amounts.sum() / max(1, first)
    expected = amounts + _rows_after(mixture, first, total) * amount_of_row
    documents = np.asarray([int(s["documents"]) for s in plan.store.meta["sources"]])
    # The documents of a source without a counted row are taken as whole ones.
    own = np.asarray([int(s["tokens"]) for s in plan.store.meta["sources"]]) if plan.store.kind == TOKENS else documents
    per_amount = np.where(begun > 0, begun / np.maximum(1, amounts), documents / np.maximum(1, own))
    kept = documents * (1 - plan.order.held_out)
    passes = per_amount * expected / np.maximum(1, kept)
    return [SourceUse(float(a / expected.sum()), float(p)) for a, p in zip(expected, passes, strict=True)]


def _rows_after(mixture: Mixture, first: int, total: int) -> np.ndarray:
    """Returns (sources,) the rows [first, total) of a run, divided by share."""
    found: np.ndarray = np.zeros(len(mixture.stages[0].shares))
    while first < total:
        _, stage = mixture.stage_at(first)
        stop = total if stage.until is None else min(total, stage.until)
        found += (stop - first) * np.asarray(stage.shares) / UNIT
        first = stop
    return found


def _counted(plan: RowPlan, epoch: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the tokens, the begun documents and the rows of each source in the first `rows` rows, each (sources,)."""
    segments, firsts = plan.segments(epoch)
    count = len(plan.store.sources)
    tokens, begun, of_source = (np.zeros(count, np.int64) for _ in range(3))
    for first in range(0, min(rows, len(firsts) - 1), _ROWS):
        edges = np.asarray(firsts[first : min(first + _ROWS, rows) + 1])
        piece = np.asarray(segments[edges[0] : edges[-1]])
        sources = plan.store.source_of(piece[:, 0])
        tokens += np.bincount(sources, piece[:, 2], count).astype(np.int64)
        begun += np.bincount(sources[piece[:, 1] == 0], minlength=count)
        of_source += np.bincount(sources[edges[:-1] - edges[0]], minlength=count)
    return tokens, begun, of_source
