"""Tensors that are not in memory, and read in parts: those of a file, and what is put together from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from myllm_ray.common.tensor_files import Box, Part, part_of, reads, whole


class Stored(NamedTuple):
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    read: Callable[[Box], Tensor]
    """Returns a box of the tensor; floating-point values in fp32."""


def stack(tensors: Sequence[Stored], dim: int) -> Stored:
    """Returns tensors of one shape along a new dimension, as `torch.stack` does."""
    return concatenate([_unsqueezed(tensor, dim % (len(tensor.shape) + 1)) for tensor in tensors], dim)


def concatenate(tensors: Sequence[Stored], dim: int) -> Stored:
    """Returns tensors one after the other along a dimension, as `torch.cat` does."""
    first = tensors[0].shape
    dim %= len(first)
    parts, end = [], 0
    for number, tensor in enumerate(tensors):
        offsets = tuple(end if d == dim else 0 for d in range(len(first)))
        parts.append(Part(str(number), Box(offsets, tensor.shape)))
        end += tensor.shape[dim]

    def read(box: Box) -> Tensor:
        found: Tensor | None = None
        for overlap in reads(parts, box):
            inner = Box(tuple(s.start for s in overlap.source), tuple(s.stop - s.start for s in overlap.source))
            piece = tensors[int(overlap.part.file)].read(inner)
            if inner.lengths == box.lengths:
                return piece
            found = torch.empty(box.lengths, dtype=piece.dtype) if found is None else found
            found[overlap.target] = piece
        return torch.empty(box.lengths) if found is None else found

    return Stored((*first[:dim], end, *first[dim + 1 :]), read)


def narrow(tensor: Stored, dim: int, start: int, length: int) -> Stored:
    """Returns a range of a dimension, as `torch.narrow` does."""
    dim %= len(tensor.shape)

    def read(box: Box) -> Tensor:
        return tensor.read(Box(tuple(o + start if d == dim else o for d, o in enumerate(box.offsets)), box.lengths))

    return Stored((*tensor.shape[:dim], length, *tensor.shape[dim + 1 :]), read)


def transpose(tensor: Stored, first: int, second: int) -> Stored:
    """Returns a tensor with two dimensions exchanged."""

    def exchanged(values: tuple[int, ...]) -> tuple[int, ...]:
        changed = list(values)
        changed[first], changed[second] = changed[second], changed[first]
        return tuple(changed)

    def read(box: Box) -> Tensor:
        return tensor.read(Box(exchanged(box.offsets), exchanged(box.lengths))).transpose(first, second)

    return Stored(exchanged(tensor.shape), read)


def computed(shape: tuple[int, ...], create: Callable[[], Tensor]) -> Stored:
    """Returns a tensor of which every part needs all of it."""
    return Stored(shape, lambda box: part_of(create(), box))


def read_whole(tensor: Stored) -> Tensor:
    """Returns all of a tensor."""
    return tensor.read(whole(tensor.shape))


def _unsqueezed(tensor: Stored, dim: int) -> Stored:
    def read(box: Box) -> Tensor:
        inner = Box(*(values[:dim] + values[dim + 1 :] for values in box))
        return tensor.read(inner).unsqueeze(dim)

    return Stored((*tensor.shape[:dim], 1, *tensor.shape[dim:]), read)
