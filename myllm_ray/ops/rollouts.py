"""Sampled answers as training rows: prompt and answer end to end, padded on the right; and the answers' tokens as a grid.

Flat tensors hold the T answer tokens of a micro-batch in row-major order; a grid is (answers, longest answer).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from myllm_ray.common.types import Micro, Samples


class Scored(NamedTuple):
    """The T answer tokens of a micro-batch."""

    predictors: Tensor
    """(T,) place in the flattened input of the token that predicts each."""
    targets: Tensor
    """(T,) token ids."""
    rows: Tensor
    """(T,) the answer."""
    steps: Tensor
    """(T,) place in the answer."""


def training_rows(prompts: Tensor, prompt_mask: Tensor, samples: Samples) -> Micro:
    """Prompts (B, P), padded on the right, and K answers to each, prompt by prompt, as rows to train on.

    Returns `input_ids`, `position_ids` (B · K, S), and (B · K, 1): `prompt_lengths`, `lengths`, `ended`.
    """
    group = len(samples.tokens) // len(prompts)
    prompts, prompt_lengths = prompts.repeat_interleave(group, 0), prompt_mask.sum(1).repeat_interleave(group)
    width = max(8, int((prompt_lengths + samples.lengths).max()))
    rows = torch.zeros(len(prompts), width, dtype=torch.long, device=prompts.device)
    places = torch.arange(width, device=prompts.device)
    in_prompt = places < prompt_lengths[:, None]
    in_answer = ~in_prompt & (places < (prompt_lengths + samples.lengths)[:, None])
    rows[in_prompt] = prompts[torch.arange(prompts.shape[1], device=prompts.device) < prompt_lengths[:, None]]
    answer = torch.arange(samples.tokens.shape[1], device=prompts.device) < samples.lengths[:, None]
    rows[in_answer] = samples.tokens[answer]
    return {"input_ids": rows, "position_ids": places.expand_as(rows), "prompt_lengths": prompt_lengths[:, None],
            "lengths": samples.lengths[:, None], "ended": samples.ended[:, None].long()}


def answer_tokens(micro: Micro) -> Scored:
    """Where the answer tokens of training rows are."""
    ids, prompts, lengths = micro["input_ids"], micro["prompt_lengths"], micro["lengths"]
    places = torch.arange(ids.shape[1], device=ids.device)
    rows, at = ((places >= prompts) & (places < prompts + lengths)).nonzero(as_tuple=True)
    return Scored(rows * ids.shape[1] + at - 1, ids[rows, at], rows, at - prompts[rows, 0])


def to_grid(values: Tensor, scored: Scored, lengths: Tensor) -> Tensor:
    """(T,) values of the answer tokens -> (N, longest answer), zero behind the end of an answer."""
    grid = torch.zeros(len(lengths), max(1, int(lengths.max())), dtype=values.dtype, device=values.device)
    grid[scored.rows, scored.steps] = values
    return grid


def packed(micro: Micro) -> tuple[Micro, Tensor]:
    """Training rows without their padding, several to a row: `input_ids`, `position_ids` (R, W) that restart at each,
    `sequences` (R, W), the row of each token or -1; and (N,) where each begins in the flattened result.

    First fit by falling length, into rows twice as long as the longest. Models keep the rows apart by their positions, as they do
    packed documents.
    """
    sizes = (micro["prompt_lengths"] + micro["lengths"])[:, 0].tolist()
    width = -(-2 * max(sizes) // 8) * 8
    rooms: list[int] = []
    homes = {}
    for row in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        home = next((r for r, room in enumerate(rooms) if room >= sizes[row]), len(rooms))
        if home == len(rooms):
            rooms.append(width)
        homes[row] = home * width + width - rooms[home]
        rooms[home] -= sizes[row]
    ids = micro["input_ids"].new_zeros(len(rooms) * width)
    # Padding counts on from 0 too, like a document of its own.
    positions = torch.cat([torch.arange(-(width - room), room, device=ids.device) for room in rooms])
    sequences = torch.full_like(ids, -1)
    for row, size in enumerate(sizes):
        sequences[homes[row] : homes[row] + size] = row
        ids[homes[row] : homes[row] + size] = micro["input_ids"][row, :size]
        positions[homes[row] : homes[row] + size] = micro["position_ids"][row, :size]
    starts = torch.tensor([homes[row] for row in range(len(sizes))], device=ids.device)
    return {"input_ids": ids.view(-1, width), "position_ids": positions.view(-1, width), "sequences": sequences.view(-1, width)}, starts


def packed_answers(micro: Micro) -> tuple[Micro, Scored]:
    """`packed` training rows, and their answer tokens with `predictors` in them."""
    scored = answer_tokens(micro)
    inputs, starts = packed(micro)
    predictors = starts[scored.rows] + micro["prompt_lengths"][scored.rows, 0] + scored.steps - 1
    return inputs, scored._replace(predictors=predictors)


def padded_answers(micro: Micro) -> tuple[Micro, Scored]:
    """Training rows as they are, one answer in each, with `sequences` as in `packed`; and their answer tokens."""
    rows = torch.arange(len(micro["input_ids"]), device=micro["input_ids"].device)[:, None]
    filled = torch.arange(micro["input_ids"].shape[1], device=rows.device) < micro["prompt_lengths"] + micro["lengths"]
    return {**micro, "sequences": torch.where(filled, rows, -1)}, answer_tokens(micro)
