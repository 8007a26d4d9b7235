"""Builds the tensors of a micro-batch from rows of segments.

A micro-batch is first built as flat NumPy arrays, which Ray Data can transport as one Arrow row, and then converted to
tensors on the worker.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

from myllm_ray.common.types import IGNORE, Micro
from myllm_ray.data.packing import Row
from myllm_ray.data.store import TokenStore
from myllm_ray.data.tokenize import decode
from myllm_ray.ops.segments import restarting_positions


def build_micro(store: TokenStore, rows: list[Row], pad_id: int, place: int = 0) -> dict[str, Any]:
    """Builds a micro-batch from rows of segments, as flat int32 arrays.

    All rows are padded to one width: the length of the longest row, rounded up to a multiple of 8, at least 8.
    The first token of each segment has the label `IGNORE`, because no token of its segment precedes it.
    `position_ids` restart at each segment and at the padding, so models treat the padding as a separate document.

    Args:
        store: Token store that the segments refer to.
        rows: Rows, see `packing.Row`. An empty row is all padding.
        pad_id: Token id of the padding.
        place: Index of the first row within its global batch, used by the fingerprint and by `places` (rows, 1).

    Returns:
        `input_ids`, `labels`, `position_ids` and `source_ids`, flattened from (rows, width); `places`, flattened from
        (rows, 1); and the integers `rows` and `fingerprint`. `source_ids` is -1 at the padding.
    """
    longest = max(sum(s.length for s in row) for row in rows)
    width = max(8, -(-longest // 8) * 8)
    ids = np.full((len(rows), width), pad_id, np.int32)
    labels = np.full((len(rows), width), IGNORE, np.int32)
    positions = np.stack([restarting_positions([s.length for s in row], width) for row in rows])
    sources = np.full((len(rows), width), -1, np.int32)
    fingerprint = 0
    # All places are looked up at once, and a row is decoded at once: numpy's overhead is larger than the work.
    of_segments, firsts = store.places(np.fromiter((s.document for row in rows for s in row), np.int64))
    places_of = zip(of_segments.tolist(), firsts.tolist(), strict=True)
    for i, row in enumerate(rows):
        at, starts, encoded = 0, [], np.empty(width, np.int32)
        for segment in row:
            source, first = next(places_of)
            starts.append(at)
            end = at + segment.length
            encoded[at:end] = store.tokens_of(source, first + segment.start, segment.length)
            sources[i, at:end] = source
            at = end
        tokens, trained = decode(encoded[:at])
        ids[i, :at] = tokens
        labels[i, :at] = np.where(trained, tokens, IGNORE)
        # The previous token of the row, if any, belongs to another segment and must not predict this one.
        labels[i, starts] = IGNORE
        fingerprint += row_fingerprint(place + i, ids[i, :at], labels[i, :at])
    places = np.arange(place, place + len(rows), dtype=np.int32)[:, None]
    flat = {"input_ids": ids, "labels": labels, "position_ids": positions, "source_ids": sources, "places": places}
    # The fingerprint is a sum, so that it does not depend on how the rows are split over micro-batches and ranks.
    return {"rows": len(rows), "fingerprint": wrap64(fingerprint), **{k: v.reshape(-1) for k, v in flat.items()}}


def row_fingerprint(place: int, ids: np.ndarray, labels: np.ndarray) -> int:
    """Returns a 64-bit hash of a row's tokens, its labels and its index in the global batch. Padding is excluded."""
    digest = hashlib.blake2b(place.to_bytes(8, "little"), digest_size=8)
    digest.update(ids.astype(np.int32).tobytes())
    digest.update(labels.astype(np.int32).tobytes())
    return int.from_bytes(digest.digest(), "little")


def wrap64(value: int) -> int:
    """Returns `value` modulo 2**64 as a signed 64-bit integer, which fits an int64 tensor or Arrow column."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def to_arrow(micro: dict[str, Any], epoch: int, row: int) -> pa.Table:
    """Returns a micro-batch as an Arrow table with one row.

    Each array becomes a list column. The columns `epoch` and `row` hold the position of the micro-batch in the data;
    `rows` and `fingerprint` are copied from `micro`.
    """
    columns = {
        "epoch": pa.array([epoch], pa.int64()),
        "row": pa.array([row], pa.int64()),
        "rows": pa.array([micro["rows"]], pa.int64()),
        "fingerprint": pa.array([micro["fingerprint"]], pa.int64()),
    }
    for name, value in micro.items():
        if isinstance(value, np.ndarray):
            columns[name] = pa.array([value], pa.list_(pa.from_numpy_dtype(value.dtype)))
    return pa.table(columns)


def to_tensors(micro: dict[str, Any]) -> Micro:
    """Converts flat arrays to tensors of shape (rows, width): integers to int64, floats to float32."""
    import torch  # here: the tasks that build micro-batches call no function that needs it

    wide = {"i": np.int64, "f": np.float32}
    return {
        name: torch.from_numpy(value.astype(wide[value.dtype.kind])).view(int(micro["rows"]), -1)
        for name, value in micro.items()
        if isinstance(value, np.ndarray)
    }
