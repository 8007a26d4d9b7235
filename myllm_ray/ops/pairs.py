"""Rows of a prompt and several answers to it: attention mask and predictors of the answer tokens.

`segment_ids` (B, S) is 0 for the prompt, 1, 2, ... for the answers and -1 for padding. The position ids of each answer
continue those of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from myllm_ray.common.types import Micro


class Answers(NamedTuple):
    """The T answer tokens of a micro-batch, in row-major order. Answers are numbered by row, then by segment."""

    predictors: Tensor
    """(T,) index in the flattened (B · S) micro-batch of the token that predicts each answer token."""
    targets: Tensor
    """(T,) token ids."""
    answer: Tensor
    """(T,) index of the answer: row · answers per row + segment - 1."""


def pair_row(
    prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], margin: float = 0.0
) -> dict[str, Any]:
    """Returns a row of a preference trainer's `dataset` from token ids, for manually constructed runs.

    Args:
        prompt: Token ids of the prompt.
        chosen: Token ids of the preferred answer.
        rejected: Token ids of the other answer.
        margin: Margin of the preference.
    """
    parts = (prompt, chosen, rejected)
    positions = [*range(len(prompt) + len(chosen)), *range(len(prompt), len(prompt) + len(rejected))]
    return {
        "input_ids": [i for part in parts for i in part],
        "segment_ids": [n for n, part in enumerate(parts) for _ in part],
        "position_ids": positions,
        "margins": [margin],
    }


def shared_prompt_mask(segment_ids: Tensor) -> Tensor:
    """Returns the attention mask (B, 1, S, S), true where attention is allowed, from `segment_ids` (B, S).

    A token attends to itself and to the preceding tokens of the prompt and of its own answer. Padding tokens
    attend only to themselves.
    """
    size = segment_ids.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segment_ids.device).tril()
    keys, queries = segment_ids[:, None, :], segment_ids[:, :, None]
    seen = ((keys == 0) & (queries >= 0)) | ((keys == queries) & (queries >= 0))
    # A softmax over no keys would be non-finite, so each padding token attends to itself.
    itself = torch.eye(size, dtype=torch.bool, device=segment_ids.device)
    return ((seen & causal) | itself)[:, None]


def answers(input_ids: Tensor, segment_ids: Tensor, per_row: int = 2) -> Answers:
    """Returns the answer tokens of a micro-batch and the tokens that predict them.

    The last token of the prompt predicts the first token of each answer.

    Args:
        input_ids: (B, S) token ids.
        segment_ids: (B, S), see the module docstring.
        per_row: Number of answers per row.
    """
    size = input_ids.shape[1]
    rows, places = (segment_ids > 0).nonzero(as_tuple=True)
    segments = segment_ids[rows, places]
    before = torch.where(places > 0, segment_ids[rows, (places - 1).clamp(min=0)], -1)
    last_of_prompt = (segment_ids == 0).sum(1) - 1
    # Within an answer, the preceding token predicts; at a segment boundary, it belongs to another segment.
    predictors = torch.where(before == segments, places - 1, last_of_prompt[rows])
    return Answers(rows * size + predictors, input_ids[rows, places], rows * per_row + segments - 1)


def one_answer_per_row(micro: Micro) -> Micro:
    """Converts rows of two answers to one row per answer, each with a copy of the prompt, padded on the right.

    Rows 2i and 2i + 1 are the answers of row i. The `segment_ids` of each answer are 1. The answer indices (`answers`
    with per_row=1) are the same as for the rows with a shared prompt.
    """
    ids, segments = micro["input_ids"], micro["segment_ids"]
    rows, kinds = [], []
    for row, segment in zip(ids, segments, strict=True):
        for number in (1, 2):
            kept = (segment == 0) | (segment == number)
            rows.append(row[kept])
            kinds.append(segment[kept].clamp(max=1))
    width = max(8, *(len(r) for r in rows))
    pad = torch.nn.functional.pad
    plain = {
        "input_ids": torch.stack([pad(r, (0, width - len(r))) for r in rows]),
        "segment_ids": torch.stack([pad(k, (0, width - len(k)), value=-1) for k in kinds]),
    }
    plain["position_ids"] = torch.arange(width, device=ids.device).expand(len(rows), width)
    return plain


def last_tokens(segment_ids: Tensor, per_row: int = 2) -> tuple[Tensor, Tensor]:
    """Returns the indices in the flattened micro-batch of the last token of each answer, and the answer indices."""
    following = torch.nn.functional.pad(segment_ids[:, 1:], (0, 1), value=-1)
    rows, places = ((segment_ids > 0) & (following != segment_ids)).nonzero(as_tuple=True)
    return rows * segment_ids.shape[1] + places, rows * per_row + segment_ids[rows, places] - 1


def sum_by(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Returns the sum (count,) of the values (T,) of each group. The sum of a group without values is 0."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, groups, values)
