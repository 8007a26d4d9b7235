"""Where the loss stands once documents are cut to rows: counted before a run starts, so that no run trains on nothing.

A target is a token that is trained on and that something precedes in its segment. The store has the number of each document's
targets, so only segments of documents that are cut, and that are trained on in part, are read again. The counts lie beside the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from myllm_ray.common.files import published
from myllm_ray.config.errors import DataError
from myllm_ray.data.plan import RowPlan
from myllm_ray.data.records import TOKENS
from myllm_ray.data.store import TokenStore, describe_documents
from myllm_ray.data.stream import StreamSpec

_CHUNK = 65536


class Targets(NamedTuple):
    """Targets of an epoch's rows."""

    rows: np.ndarray
    """(rows,) int64 targets in each row."""
    whole: int
    """Targets of the epoch's documents before they are cut."""
    cut: int
    """Documents of which a part is left out."""
    lost: int
    """Documents that have targets, none of which is in a row."""

    @property
    def kept(self) -> int:
        return int(self.rows.sum())


def count_targets(plan: RowPlan, epoch: int = 0) -> Targets:
    """Count the targets of an epoch of documents of tokens. Counted once; kept beside the plan.

    Memory grows with the number of rows and documents, not of tokens.
    """
    path = plan.folder(epoch) / "targets.npz"
    segments, firsts = plan.segments(epoch)
    if not path.exists():
        rows, document_rows = np.zeros(len(firsts) - 1, np.int64), np.repeat(np.arange(len(firsts) - 1), np.diff(firsts))
        kept, placed, passes = (np.zeros(len(plan.store), np.int32) for _ in range(3))
        for first in range(0, len(segments), _CHUNK):
            piece = np.asarray(segments[first : first + _CHUNK])
            counts = _of_segments(plan.store, piece)
            np.add.at(rows, document_rows[first : first + len(piece)], counts)
            np.add.at(kept, piece[:, 0], counts)
            np.add.at(placed, piece[:, 0], piece[:, 2])
            np.add.at(passes, piece[piece[:, 1] == 0, 0], 1)  # a source with a weight of 2 comes twice
        whole, cut, lost = _of_documents(plan.store, kept, placed, passes)
        with suppress(OSError), published(path, existing="replace") as beside:  # a cache that can't be written to: counted again the next time
            np.savez(beside, rows=rows, numbers=np.asarray([whole, cut, lost], np.int64))
        return Targets(rows, whole, cut, lost)
    with np.load(path) as saved:
        return Targets(saved["rows"], *map(int, saved["numbers"]))


def _of_segments(store: TokenStore, segments: np.ndarray) -> np.ndarray:
    """(n, 3) segments -> (n,) targets of each."""
    documents, starts, sizes = segments.T
    lengths, targets = store.lengths(documents), store.targets(documents)
    counts = np.where(targets == lengths - 1, sizes - 1, np.where(targets == 0, 0, -1))
    uncut = (starts == 0) & (sizes == lengths)
    counts[uncut] = targets[uncut]
    for i in np.flatnonzero(counts < 0):
        counts[i] = int((store.read(int(documents[i]), int(starts[i]), int(sizes[i]))[1:] >= 0).sum())
    return counts


def _of_documents(store: TokenStore, kept: np.ndarray, placed: np.ndarray, passes: np.ndarray) -> tuple[int, int, int]:
    """(targets before cutting, documents cut, documents that lost all targets), from targets and tokens in rows of each document."""
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
    """Refuse data without a target.

    Args:
        key: of the config, for messages.
        batches: how many are read of the first epoch; more than there are: all.
        each: whether every batch needs a target, as in training, or all of them together, as in an evaluation.

    Raises:
        DataError: names the documents.
    """
    if spec.plan.store.kind != TOKENS:  # an answer always keeps a token: see `tokenize_record`
        return
    found, size = count_targets(spec.plan).rows, spec.global_size
    read = min(len(found), batches * size)
    if not found[:read].any():
        raise DataError(f"{key}: there is nothing to train on: {_why(spec.plan, 0, read)}")
    if each:
        edges = np.arange(0, read, size)
        for first in edges[np.add.reduceat(found[:read], edges) == 0][:1].tolist():
            last = min(first + size, read)
            raise DataError(f"{key}: the batch of step {first // size + 1} (rows {first} to {last - 1}) has nothing to train on: "
                            f"{_why(spec.plan, first, last)}")


def _why(plan: RowPlan, first: int, last: int) -> str:
    """Why rows [first, last) have no target."""
    documents = sorted({segment.document for row in plan.rows(0, first, min(last, first + _CHUNK)) for segment in row})
    named, size = describe_documents(plan.store, documents), plan.packing.size
    if not plan.store.targets(np.asarray(documents)).any():
        return f"no token of {named} is trained on (data.*.format decides that)"
    if plan.packing.overflow == "split":
        return f"these pieces of {named}, split to data.sequence_length={size}, hold no token that is trained on; set it higher"
    return (f"the tokens to train on in {named} stand behind data.sequence_length={size}, where documents are cut off; set it higher, or "
            "data.overflow=split")


def target_warnings(spec: StreamSpec) -> Iterator[str]:
    """What a user should know about how much of the training data is cut off."""
    store, size = spec.plan.store, spec.plan.packing.size
    if store.kind != TOKENS:
        cut = sum(int(source["cut"]) for source in store.meta["sources"])
        if cut:
            yield (f"data.sequence_length={size} cuts off answers of {cut} of {len(store)} documents ({cut / len(store):.1%}): their ends, with the "
                   "token that ends an answer, are not trained on")
        return
    found = count_targets(spec.plan)
    if found.kept < found.whole and found.cut:
        yield (f"data.sequence_length={size} cuts off {found.cut} documents and with them {1 - found.kept / found.whole:.1%} of the tokens to train on"
               + (f"; {found.lost} documents have none left" if found.lost else "") + " (data.overflow says what happens to long documents)")
