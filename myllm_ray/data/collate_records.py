"""Micro-batches of records (`records.py`).

A row of the plan is one record, whole. In a micro-batch of pairs a row holds prompt, chosen and rejected end to end; the
answers stand at the same positions, and `segment_ids` (0 prompt, 1 first answer, 2 second, -1 padding) say who may see whom,
so that the prompt is computed once for both.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from myllm_ray.common.types import IGNORE
from myllm_ray.data.collate import row_fingerprint, wrap64
from myllm_ray.data.packing import Row
from myllm_ray.data.records import split
from myllm_ray.data.store import TokenStore


def build_pairs(store: TokenStore, rows: list[Row], pad_id: int, place: int = 0, batch: list[Row] | None = None) -> dict[str, Any]:
    """A micro-batch of prompts with two answers each.

    Returns flat arrays of (rows, width): `input_ids`, `labels` (of the answers), `position_ids`, `segment_ids`; of (rows, 1):
    `documents` (number in the store, -1: an empty row), `places` (number of the row within its global batch), and float32 `margins`; for
    unpaired preferences `desirable` instead.

    Args:
        place: number of the first row within its global batch.
        batch: unpaired preferences: all rows of the global batch. A row's second answer is then that of the next row, for the
            estimate of the KL divergence from answers that belong to other prompts (Ethayarajh et al., 2024, KTO, §4.1).
    """
    records = [split(store.read(*row[0])) if row else None for row in rows]
    if batch is not None:
        records = [_mismatched(store, record, batch, place + i) for i, record in enumerate(records)]
    longest = max((sum(len(part) for part in r[:3]) for r in records if r), default=0)
    width = max(8, -(-longest // 8) * 8)
    ids = np.full((len(rows), width), pad_id, np.int32)
    labels = np.full((len(rows), width), IGNORE, np.int32)
    positions = np.zeros((len(rows), width), np.int32)
    segments = np.full((len(rows), width), -1, np.int32)
    numbers = np.zeros((len(rows), 1), np.float32)
    fingerprint = 0
    for i, record in enumerate(records):
        at = 0
        for number, part in enumerate(record[:3] if record else ()):
            end = at + len(part)
            ids[i, at:end], segments[i, at:end] = part, number
            if number:
                labels[i, at:end] = part
            first = len(record[0]) if record and number else 0
            positions[i, at:end] = np.arange(first, first + len(part))
            at = end
        if record:
            numbers[i, 0] = record[3][0] if batch is not None else record[3].view(np.float32)[0]
        fingerprint += row_fingerprint(place + i, ids[i, :at], labels[i, :at])
    documents = np.asarray([[row[0].document] if row else [-1] for row in rows], np.int32)
    arrays = {"input_ids": ids, "labels": labels, "position_ids": positions, "segment_ids": segments, "documents": documents,
              "places": np.arange(place, place + len(rows), dtype=np.int32)[:, None],
              "margins" if batch is None else "desirable": numbers}
    return {"rows": len(rows), "fingerprint": wrap64(fingerprint), **{k: v.reshape(-1) for k, v in arrays.items()}}


def _mismatched(store: TokenStore, record: list[np.ndarray] | None, batch: list[Row], place: int) -> list[np.ndarray] | None:
    """prompt | completion | completion of the next record of the batch | label."""
    if record is None:
        return None
    filled = [row for row in (*batch[place + 1 :], *batch[:place]) if row] or [batch[place]]
    other = split(store.read(*filled[0][0]))[1]
    return [record[0], record[1], other, record[2]]


def build_prompts(store: TokenStore, rows: list[Row], pad_id: int, place: int = 0) -> dict[str, Any]:
    """A micro-batch of prompts: `input_ids`, `segment_ids` (rows, width), padded on the right; `documents`, `places` (rows, 1).

    `places`: number of the row within its global batch, by which its random numbers are told apart.
    """
    prompts = [split(store.read(*row[0]))[0] if row else np.empty(0, np.int32) for row in rows]
    width = max(8, max(len(p) for p in prompts))
    ids = np.full((len(rows), width), pad_id, np.int32)
    segments = np.full((len(rows), width), -1, np.int32)
    fingerprint = 0
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)], segments[i, : len(prompt)] = prompt, 0
        fingerprint += row_fingerprint(place + i, prompt, np.asarray([row_document(rows[i])]))
    documents = np.asarray([[row_document(row)] for row in rows], np.int32)
    places = np.arange(place, place + len(rows), dtype=np.int32)[:, None]
    arrays = {"input_ids": ids, "segment_ids": segments, "documents": documents, "places": places}
    return {"rows": len(rows), "fingerprint": wrap64(fingerprint), **{k: v.reshape(-1) for k, v in arrays.items()}}


def row_document(row: Row) -> int:
    """The number of the record in a row; -1 where there is none."""
    return row[0].document if row else -1
