"""Builds training rows from sampled answers, and grids of values of the answer tokens.

A training row is the concatenation of prompt and answer, padded on the right. Flat tensors contain the T answer tokens
of a micro-batch in row-major order. A grid has the shape (answers, longest answer).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from myllm_ray.common.types import Micro, Samples


class Scored(NamedTuple):
    """The T answer tokens of a micro-batch, in row-major order."""

    predictors: Tensor
    """(T,) index in the flattened input of the token that predicts each answer token."""
    targets: Tensor
    """(T,) token ids."""
    rows: Tensor
    """(T,) index of the answer."""
    steps: Tensor
    """(T,) index of the token within its answer."""


def training_rows(prompts: Tensor, prompt_mask: Tensor, samples: Samples) -> Micro:
    """Returns training rows of prompts and sampled answers.

    Args:
        prompts: (B, P) token ids, padded on the right.
        prompt_mask: (B, P), 1 at the tokens of the prompts and 0 at the padding.
        samples: B · K answers, the K answers to a prompt consecutively.

    Returns:
        `input_ids` and `position_ids` (B · K, S); `prompt_lengths`, `lengths` and `ended` (B · K, 1).
    """
    group = len(samples.tokens) // len(prompts)
    prompts, prompt_lengths = prompts.repeat_interleave(group, 0), prompt_mask.sum(1).repeat_interleave(group)
    width = max(8, int((prompt_lengths + samples.lengths).max()))
    rows = torch.zeros(len(prompts), width, dtype=torch.long, device=prompts.device)
    places = torch.arange(width, device=prompts.device)
    in_prompt = places < prompt_lengths[:, None]
    in_answer = ~in_prompt & (places < (prompt_lengths + samples.lengths)[:, None])
    # Both sides of the masked assignments are in row-major order, so the tokens of each row keep their order.
    rows[in_prompt] = prompts[torch.arange(prompts.shape[1], device=prompts.device) < prompt_lengths[:, None]]
    answer = torch.arange(samples.tokens.shape[1], device=prompts.device) < samples.lengths[:, None]
    rows[in_answer] = samples.tokens[answer]
    return {
        "input_ids": rows,
        "position_ids": places.expand_as(rows),
        "prompt_lengths": prompt_lengths[:, None],
        "lengths": samples.lengths[:, None],
        "ended": samples.ended[:, None].long(),
    }


def answer_tokens(micro: Micro) -> Scored:
    """Returns the answer tokens of training rows."""
    ids, prompts, lengths = micro["input_ids"], micro["prompt_lengths"], micro["lengths"]
    places = torch.arange(ids.shape[1], device=ids.device)
    rows, at = ((places >= prompts) & (places < prompts + lengths)).nonzero(as_tuple=True)
    # A token is predicted by the one before it; prompts are never empty.
    return Scored(rows * ids.shape[1] + at - 1, ids[rows, at], rows, at - prompts[rows, 0])


def to_grid(values: Tensor, scored: Scored, lengths: Tensor) -> Tensor:
    """Returns the values (T,) of the answer tokens as a grid (N, longest answer), zero after the end of an answer."""
    grid = torch.zeros(len(lengths), max(1, int(lengths.max())), dtype=values.dtype, device=values.device)
    grid[scored.rows, scored.steps] = values
    return grid


def packed(micro: Micro) -> tuple[Micro, Tensor]:
    """Packs training rows without their padding, several into one row.

    Uses first fit in order of decreasing length, into rows of twice the longest length. Models isolate the training
    rows by their position ids, as with packed documents.

    Returns:
        `input_ids` (R, W); `position_ids` (R, W), which restart at each training row; `sequences` (R, W), the index of
        the training row of each token, or -1 for padding; and `document_lengths` (see `ops.documents.document_lengths`)
        of the training rows and the padding, on the CPU. Also (N,) the start of each training row in the flattened
        result.
    """
    sizes = (micro["prompt_lengths"] + micro["lengths"])[:, 0].tolist()
    width = -(-2 * max(sizes) // 8) * 8
    spaces: list[int] = []
    homes = {}
    lengths: list[list[int]] = []
    for row in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        home = next((r for r, space in enumerate(spaces) if space >= sizes[row]), len(spaces))
        if home == len(spaces):
            spaces.append(width)
            lengths.append([])
        homes[row] = home * width + width - spaces[home]
        spaces[home] -= sizes[row]
        lengths[home].append(sizes[row])
    ids = micro["input_ids"].new_zeros(len(spaces) * width)
    # The positions of the padding start at 0 too, so models treat it as a separate document.
    positions = torch.cat([torch.arange(-(width - space), space, device=ids.device) for space in spaces])
    sequences = torch.full_like(ids, -1)
    for row, size in enumerate(sizes):
        sequences[homes[row] : homes[row] + size] = row
        ids[homes[row] : homes[row] + size] = micro["input_ids"][row, :size]
        positions[homes[row] : homes[row] + size] = micro["position_ids"][row, :size]
    rows = [torch.tensor([*row, *([space] if space else [])]) for row, space in zip(lengths, spaces, strict=True)]
    starts = torch.tensor([homes[row] for row in range(len(sizes))], device=ids.device)
    return {
        "input_ids": ids.view(-1, width),
        "position_ids": positions.view(-1, width),
        "sequences": sequences.view(-1, width),
        "document_lengths": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
    }, starts


def packed_answers(micro: Micro) -> tuple[Micro, Scored]:
    """Returns `packed` training rows, and the answer tokens with `predictors` that index the packed rows."""
    scored = answer_tokens(micro)
    inputs, starts = packed(micro)
    predictors = starts[scored.rows] + micro["prompt_lengths"][scored.rows, 0] + scored.steps - 1
    return inputs, scored._replace(predictors=predictors)


def padded_answers(micro: Micro) -> tuple[Micro, Scored]:
    """Returns unpacked training rows, one answer per row, with `sequences` as in `packed`, and the answer tokens."""
    rows = torch.arange(len(micro["input_ids"]), device=micro["input_ids"].device)[:, None]
    filled = torch.arange(micro["input_ids"].shape[1], device=rows.device) < micro["prompt_lengths"] + micro["lengths"]
    return {**micro, "sequences": torch.where(filled, rows, -1)}, answer_tokens(micro)
