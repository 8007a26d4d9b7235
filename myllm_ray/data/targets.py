"""Counts the loss targets in the rows of an epoch, so that a run without targets is rejected before it starts.

A target is a token that is trained on and that has a preceding token in its segment. The store has the number of
targets of each document. Only segments of documents that are both cut and partly trained on are therefore read again.
The counts are cached next to the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from myllm_ray.common.files import published
from myllm_ray.config.errors import DataError
from myllm_ray.data.examples import TOKENS
from myllm_ray.data.plan import RowPlan
from myllm_ray.data.store import TokenStore, describe_documents
from myllm_ray.data.stream import StreamSpec

_CHUNK = 65536
_ROWS = 16384
"""Number of rows whose targets are counted at once."""


class Targets(NamedTuple):
    """The number of targets in the rows of an epoch."""

    rows: np.ndarray
    """(rows,) int64, the number of targets in each row."""
    whole: int
    """Number of targets in the epoch's documents before they are cut."""
    cut: int
    """Number of documents of which a part is not in any row."""
    lost: int
    """Number of documents that have targets, but no target in any row."""

    @property
    def kept(self) -> int:
        """Number of targets in all rows."""
        return int(self.rows.sum())


def count_targets(plan: RowPlan, epoch: int = 0) -> Targets:
    """Counts the targets of an epoch, for a store of kind `TOKENS`; the result is cached next to the plan.

    Memory use is proportional to the number of rows and documents, not to the number of tokens.
    """
    path = plan.folder(epoch) / "targets.npz"
    segments, firsts = plan.segments(epoch)
    if not path.exists():
        rows = np.zeros(len(firsts) - 1, np.int64)
        kept, placed, passes = (np.zeros(len(plan.store), np.int32) for _ in range(3))
        for first in range(0, len(rows), _ROWS):
            edges = np.asarray(firsts[first : first + _ROWS + 1])
            piece = np.asarray(segments[edges[0] : edges[-1]])
            counts = _of_segments(plan.store, piece)
            rows[first : first + _ROWS] = np.add.reduceat(counts, edges[:-1] - edges[0])
            np.add.at(kept, piece[:, 0], counts)
            np.add.at(placed, piece[:, 0], piece[:, 2])
            np.add.at(passes, piece[piece[:, 1] == 0, 0], 1)  # a source with weight 2 occurs twice in an epoch
        whole, cut, lost = _of_documents(plan.store, kept, placed, passes)
        if plan.order.mixture is not None and plan.packing.overflow == "split":
            whole, cut, lost = int(rows.sum()), 0, 0  # the other pieces of a document may be in the next epoch
        with (
            suppress(OSError),
            published(path, existing="replace") as beside,
        ):  # if the cache folder is not writable, the targets are counted again next time
            np.savez(beside, rows=rows, numbers=np.asarray([whole, cut, lost], np.int64))
        return Targets(rows, whole, cut, lost)
    with np.load(path) as saved:
        return Targets(saved["rows"], *map(int, saved["numbers"]))


def _of_segments(store: TokenStore, segments: np.ndarray) -> np.ndarray:
    """Returns the number of targets (n,) of segments (n, 3): document, start, size."""
    documents, starts, sizes = segments.T
    lengths, targets = store.lengths(documents), store.targets(documents)
    # Documents trained on everywhere or nowhere need no reading; -1 marks the segments that must be read.
    counts = np.where(targets == lengths - 1, sizes - 1, np.where(targets == 0, 0, -1))
    uncut = (starts == 0) & (sizes == lengths)
    counts[uncut] = targets[uncut]
    for i in np.flatnonzero(counts < 0):
        counts[i] = int((store.read(int(documents[i]), int(starts[i]), int(sizes[i]))[1:] >= 0).sum())
    return counts


def _of_documents(store: TokenStore, kept: np.ndarray, placed: np.ndarray, passes: np.ndarray) -> tuple[int, int, int]:
    """Returns (targets before cutting, documents cut, documents that lost all targets).

    Args:
        store: the store of the documents.
        kept: (documents,) number of targets of each document in rows.
        placed: (documents,) number of tokens of each document in rows.
        passes: (documents,) number of times that each document occurs in the epoch.
    """
    whole = cut = lost = 0
    for first in range(0, len(store), _CHUNK):
        part = slice(first, min(first + _CHUNK, len(store)))
        numbers = np.arange(part.start, part.stop)
        lengths, targets = store.lengths(numbers), store.targets(numbers)
        whole += int((targets * passes[part]).sum())
        cut += int((placed[part] < lengths * passes[part]).sum())
        lost += int(((passes[part] > 0) & (targets > 0) & (kept[part] == 0)).sum())
    return whole, cut, lost


def check_targets(spec: StreamSpec, key: str, batches: int, each: bool = True) -> None:
    """Rejects data without a target in the first epoch.

    Args:
        spec: the stream to check.
        key: config key, for error messages.
        batches: number of batches of the first epoch to check; all if the epoch has fewer.
        each: if True, every batch needs a target, as in training. If False, one target in all batches is sufficient,
            as in evaluation.

    Raises:
        DataError: a batch, or all of them, have no target. The message names the documents.
    """
    if spec.plan.store.kind != TOKENS:  # at least one token of each answer is kept, see `tokenize_example`
        return
    found, size = count_targets(spec.plan).rows, spec.global_size
    read = min(len(found), batches * size)
    if not found[:read].any():
        raise DataError(f"{key}: there is nothing to train on: {_why(spec.plan, 0, read)}")
    if each:
        edges = np.arange(0, read, size)
        for first in edges[np.add.reduceat(found[:read], edges) == 0][:1].tolist():
            last = min(first + size, read)
            raise DataError(
                f"{key}: the batch of step {first // size + 1} (rows {first} to {last - 1}) has nothing to train on: "
                f"{_why(spec.plan, first, last)}"
            )


def _why(plan: RowPlan, first: int, last: int) -> str:
    """Returns the reason why rows [first, last) have no target, for error messages."""
    documents = sorted({segment.document for row in plan.rows(0, first, min(last, first + _CHUNK)) for segment in row})
    named, size = describe_documents(plan.store, documents), plan.packing.size
    if not plan.store.targets(np.asarray(documents)).any():
        return f"no token of {named} is trained on (data.*.format determines what is trained on)"
    if plan.packing.overflow == "split":
        return (
            f"these pieces of {named}, split to data.sequence_length={size}, contain no token that is trained on; "
            "increase it"
        )
    return (
        f"the tokens to train on in {named} are after data.sequence_length={size}, where documents are cut off; "
        "increase it, or set data.overflow=split"
    )


def target_warnings(spec: StreamSpec) -> Iterator[str]:
    """Yields warnings about the amount of training data that is cut off."""
    store, size = spec.plan.store, spec.plan.packing.size
    if store.kind != TOKENS:
        cut = sum(int(source["cut"]) for source in store.meta["sources"])
        if cut:
            yield (
                f"data.sequence_length={size} cuts off answers of {cut} of {len(store)} documents "
                f"({cut / len(store):.1%}): the ends of these answers, with the token that ends an answer, "
                "are not trained on"
            )
        return
    found = count_targets(spec.plan)
    if found.kept < found.whole and found.cut:
        yield (
            f"data.sequence_length={size} cuts off {found.cut} documents, and {1 - found.kept / found.whole:.1%} "
            "of the tokens to train on"
            + (f"; {found.lost} documents have no such token left" if found.lost else "")
            + " (data.overflow sets how long documents are handled)"
        )
