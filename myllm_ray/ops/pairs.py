"""Rows that hold a prompt and several answers to it: who sees whom, and where each answer token is predicted.

`segment_ids` (B, S): 0 prompt, 1, 2, ... the answers, -1 padding. All answers stand at the positions right behind the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from myllm_ray.common.types import Micro


class Answers(NamedTuple):
    """The T answer tokens of a micro-batch in row-major order. An answer is (row, segment), numbered row by row."""

    predictors: Tensor
    """(T,) place in the flattened (B · S) micro-batch of the token that predicts each."""
    targets: Tensor
    """(T,) token ids."""
    answer: Tensor
    """(T,) number of the answer: row · answers per row + segment - 1."""


def pair_row(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], margin: float = 0.0) -> dict[str, Any]:
    """Token ids as a row of a preference trainer's `dataset`, for runs wired by hand."""
    parts = (prompt, chosen, rejected)
    positions = [*range(len(prompt) + len(chosen)), *range(len(prompt), len(prompt) + len(rejected))]
    return {"input_ids": [i for part in parts for i in part], "segment_ids": [n for n, part in enumerate(parts) for _ in part],
            "position_ids": positions, "margins": [margin]}


def shared_prompt_mask(segment_ids: Tensor) -> Tensor:
    """(B, S) -> (B, 1, S, S) bool: a token sees what precedes it in the prompt and in its own answer; padding sees itself."""
    size = segment_ids.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segment_ids.device).tril()
    keys, queries = segment_ids[:, None, :], segment_ids[:, :, None]
    seen = ((keys == 0) & (queries >= 0)) | ((keys == queries) & (queries >= 0))
    itself = torch.eye(size, dtype=torch.bool, device=segment_ids.device)
    return ((seen & causal) | itself)[:, None]


def answers(input_ids: Tensor, segment_ids: Tensor, per_row: int = 2) -> Answers:
    """Where the answer tokens of rows of segments are, and what predicts them: the first of each answer, the prompt's last."""
    size = input_ids.shape[1]
    rows, places = (segment_ids > 0).nonzero(as_tuple=True)
    segments = segment_ids[rows, places]
    before = torch.where(places > 0, segment_ids[rows, (places - 1).clamp(min=0)], -1)
    last_of_prompt = (segment_ids == 0).sum(1) - 1
    predictors = torch.where(before == segments, places - 1, last_of_prompt[rows])
    return Answers(rows * size + predictors, input_ids[rows, places], rows * per_row + segments - 1)


def one_answer_per_row(micro: Micro) -> Micro:
    """The plain form: each answer in a row of its own behind a copy of its prompt, padded on the right.

    Rows 2i and 2i + 1 are the answers of row i; the answer's `segment_ids` are 1. Answer numbers (`answers`, per_row=1) are
    the same as in the shared form.
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
    plain = {"input_ids": torch.stack([pad(r, (0, width - len(r))) for r in rows]),
             "segment_ids": torch.stack([pad(k, (0, width - len(k)), value=-1) for k in kinds])}
    plain["position_ids"] = torch.arange(width, device=ids.device).expand(len(rows), width)
    return plain


def last_tokens(segment_ids: Tensor, per_row: int = 2) -> tuple[Tensor, Tensor]:
    """Places in the flattened micro-batch of the last token of each answer, and the numbers of these answers."""
    following = torch.nn.functional.pad(segment_ids[:, 1:], (0, 1), value=-1)
    rows, places = ((segment_ids > 0) & (following != segment_ids)).nonzero(as_tuple=True)
    return rows * segment_ids.shape[1] + places, rows * per_row + segment_ids[rows, places] - 1


def sum_by(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """(T,) values -> (count,) sums of each group; a group without values is 0."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, groups, values)
