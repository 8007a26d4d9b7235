"""From rows of segments to the tensors of a micro-batch, by way of one Arrow row that Ray Data can carry."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from myllm_ray.common.types import IGNORE, Micro
from myllm_ray.data.packing import Row
from myllm_ray.data.store import TokenStore
from myllm_ray.data.tokenize import decode
from myllm_ray.ops.segments import restarting_positions


def build_micro(store: TokenStore, rows: list[Row], pad_id: int, place: int = 0) -> dict[str, Any]:
    """Rows of segments as flat int32 arrays, all of one width: the longest row's, rounded up to a multiple of 8.

    The first token of each segment has the label `IGNORE`: nothing in the row precedes it that could predict it.
    `position_ids` restart at each segment, and in the padding, which models therefore treat as a document of its own.

    Args:
        store: where the tokens are.
        rows: see `packing.Row`; an empty one is all padding.
        pad_id: the token id that fills up.
        place: number of the first row within its global batch, for the fingerprint and for `places` (rows, 1).
    """
    longest = max(sum(s.length for s in row) for row in rows)
    width = max(8, -(-longest // 8) * 8)
    ids = np.full((len(rows), width), pad_id, np.int32)
    labels = np.full((len(rows), width), IGNORE, np.int32)
    positions = np.stack([restarting_positions([s.length for s in row], width) for row in rows])
    sources = np.full((len(rows), width), -1, np.int32)
    fingerprint = 0
    for i, row in enumerate(rows):
        at = 0
        for segment in row:
            tokens, trained = decode(store.read(*segment))
            end = at + segment.length
            ids[i, at:end] = tokens
            labels[i, at:end] = np.where(trained, tokens, IGNORE)
            labels[i, at] = IGNORE
            sources[i, at:end] = store.source_of(np.asarray([segment.document]))[0]
            at = end
        fingerprint += row_fingerprint(place + i, ids[i, :at], labels[i, :at])
    places = np.arange(place, place + len(rows), dtype=np.int32)[:, None]
    flat = {"input_ids": ids, "labels": labels, "position_ids": positions, "source_ids": sources, "places": places}
    return {"rows": len(rows), "fingerprint": wrap64(fingerprint), **{k: v.reshape(-1) for k, v in flat.items()}}


def row_fingerprint(place: int, ids: np.ndarray, labels: np.ndarray) -> int:
    """A 64-bit hash of a row's tokens and labels and of its place in the global batch; padding does not count."""
    digest = hashlib.blake2b(place.to_bytes(8, "little"), digest_size=8)
    digest.update(ids.astype(np.int32).tobytes())
    digest.update(labels.astype(np.int32).tobytes())
    return int.from_bytes(digest.digest(), "little")


def wrap64(value: int) -> int:
    """`value` modulo 2**64, as a signed 64-bit integer (what a tensor and an Arrow column can hold)."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def to_arrow(micro: dict[str, Any], epoch: int, row: int) -> pa.Table:
    """One micro-batch as a table of one row: every array a list, beside `rows`, `fingerprint` and where it stands."""
    columns = {"epoch": pa.array([epoch], pa.int64()), "row": pa.array([row], pa.int64()),
               "rows": pa.array([micro["rows"]], pa.int64()), "fingerprint": pa.array([micro["fingerprint"]], pa.int64())}
    for name, value in micro.items():
        if isinstance(value, np.ndarray):
            columns[name] = pa.array([value], pa.list_(pa.from_numpy_dtype(value.dtype)))
    return pa.table(columns)


def to_tensors(micro: dict[str, Any]) -> Micro:
    """Flat arrays as tensors of (rows, width): int64, or float32."""
    wide = {"i": np.int64, "f": np.float32}
    return {name: torch.from_numpy(value.astype(wide[value.dtype.kind])).view(int(micro["rows"]), -1)
            for name, value in micro.items() if isinstance(value, np.ndarray)}
