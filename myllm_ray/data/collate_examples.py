"""Builds micro-batches of examples (`examples.py`).

Each row of the plan is one complete example. In a micro-batch of pairs, a row is the concatenation of prompt, chosen
and rejected. Both answers have the same position ids, and `segment_ids` (0 prompt, 1 first answer, 2 second answer, -1
padding) determine the attention mask, so that the prompt is computed only once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from myllm_ray.common.types import IGNORE
from myllm_ray.data.collate import row_fingerprint, wrap64
from myllm_ray.data.examples import split
from myllm_ray.data.packing import Row
from myllm_ray.data.store import TokenStore


def build_pairs(
    store: TokenStore, rows: list[Row], pad_id: int, place: int = 0, batch: list[Row] | None = None
) -> dict[str, Any]:
    """Builds a micro-batch of prompts with two answers each.

    Args:
        store: Token store with the examples.
        rows: Rows of one example each. An empty row is all padding.
        pad_id: Token id of the padding.
        place: Index of the first row within its global batch.
        batch: All rows of the global batch, for unpaired preferences; None for pairs. For unpaired preferences, the
            second answer of a row is the answer of the next row of the global batch. It is used to estimate the KL
            divergence from answers to other prompts (Ethayarajh et al., 2024, KTO, §4.1).

    Returns:
        Flattened from (rows, width): `input_ids`, `labels` (`IGNORE` outside the answers), `position_ids` and
        `segment_ids`. Flattened from (rows, 1): `documents` (document number in the store, -1 for an empty row),
        `places` (index of the row within its global batch), and float32 `margins`, or `desirable` for unpaired
        preferences. Also the integers `rows` and `fingerprint`.
    """
    examples = [split(store.read(*row[0])) if row else None for row in rows]
    if batch is not None:
        examples = [_mismatched(store, example, batch, place + i) for i, example in enumerate(examples)]
    longest = max((sum(len(part) for part in r[:3]) for r in examples if r), default=0)
    width = max(8, -(-longest // 8) * 8)
    ids = np.full((len(rows), width), pad_id, np.int32)
    labels = np.full((len(rows), width), IGNORE, np.int32)
    positions = np.zeros((len(rows), width), np.int32)
    segments = np.full((len(rows), width), -1, np.int32)
    numbers = np.zeros((len(rows), 1), np.float32)
    fingerprint = 0
    for i, example in enumerate(examples):
        at = 0
        for number, part in enumerate(example[:3] if example else ()):
            end = at + len(part)
            ids[i, at:end], segments[i, at:end] = part, number
            if number:
                labels[i, at:end] = part
            # Both answers continue the positions of the prompt.
            first = len(example[0]) if example and number else 0
            positions[i, at:end] = np.arange(first, first + len(part))
            at = end
        if example:
            # The store holds int32 only: a margin is the bit pattern of a float32, a label is 0 or 1.
            numbers[i, 0] = example[3][0] if batch is not None else example[3].view(np.float32)[0]
        fingerprint += row_fingerprint(place + i, ids[i, :at], labels[i, :at])
    documents = np.asarray([[row[0].document] if row else [-1] for row in rows], np.int32)
    arrays = {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "segment_ids": segments,
        "documents": documents,
        "places": np.arange(place, place + len(rows), dtype=np.int32)[:, None],
        "margins" if batch is None else "desirable": numbers,
    }
    return {"rows": len(rows), "fingerprint": wrap64(fingerprint), **{k: v.reshape(-1) for k, v in arrays.items()}}


def _mismatched(
    store: TokenStore, example: list[np.ndarray] | None, batch: list[Row], place: int
) -> list[np.ndarray] | None:
    """Returns prompt, completion, completion of the next non-empty row of the global batch, and label."""
    if example is None:
        return None
    filled = [row for row in (*batch[place + 1 :], *batch[:place]) if row] or [batch[place]]
    other = split(store.read(*filled[0][0]))[1]
    return [example[0], example[1], other, example[2]]


def build_prompts(store: TokenStore, rows: list[Row], pad_id: int, place: int = 0) -> dict[str, Any]:
    """Builds a micro-batch of prompts, padded on the right.

    Args:
        store: Token store with the examples.
        rows: Rows of one example each. An empty row is all padding.
        pad_id: Token id of the padding.
        place: Index of the first row within its global batch.

    Returns:
        Flattened from (rows, width): `input_ids` and `segment_ids` (0 prompt, -1 padding). Flattened from (rows, 1):
        `documents` (document number in the store, -1 for an empty row) and `places` (index of the row within its global
        batch, which seeds its random numbers). Also the integers `rows` and `fingerprint`.
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
    """Returns the document number of the example in a row, or -1 for an empty row."""
    return row[0].document if row else -1
