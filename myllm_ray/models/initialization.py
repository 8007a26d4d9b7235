"""Random weights that are created on request, tensor by tensor or in parts.

Random weights are a function of (seed, tensor name) only. They do not depend on the backend, the number of workers or
the other tensors of the model. The initialization of transformers is recorded on the meta device, where it needs no
memory, and replayed tensor by tensor. The method follows the deferred initialization of torchdistX.

A large tensor is drawn in blocks, each with a seed of its own, so that a rank draws only the blocks that overlap its
shard.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from myllm_ray.common.materialize import Source
from myllm_ray.common.seeds import derive_seed
from myllm_ray.common.tensor_files import Box, Part, part_of, reads, whole

DRAWN_IN_BLOCKS = 2**22
"""Number of elements from which on a tensor is drawn in blocks.

Smaller tensors are drawn whole, with the values that earlier versions gave them; this takes less than 0.05 s a tensor.
The matrices of models from 8 billion parameters on, which are sharded over many ranks, have at least this size.
"""
BLOCK = 2**14
"""Maximum number of elements in a block.

Larger blocks overlap more shards, of which each draws the whole block. Smaller blocks cost time. They also make equal
blocks more probable: the generator of torch uses 32 bits of a seed, so of the 4.3 million blocks of a model of 70
billion parameters about 0.1 % equal another one.
"""
_SIDE = math.isqrt(BLOCK)

_aten = torch.ops.aten
_ELEMENTWISE = {
    _aten.normal_.default,
    _aten.uniform_.default,
    _aten.fill_.Scalar,
    _aten.zero_.default,
    _aten.add_.Tensor,
    _aten.mul_.Tensor,
    _aten.erfinv_.default,
    _aten.clamp_.default,
}
"""Operations that a part of a tensor allows to replay alone, if their other arguments are numbers."""


class Call(NamedTuple):
    """A recorded operation and its result."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


class _Recorder(TorchDispatchMode):
    """Records every operation on meta tensors, grouped by the storages that it reads or writes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[int, list[Call]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        touched = [a for a in tree_leaves((args, kwargs or {}, out)) if isinstance(a, Tensor) and a.is_meta]
        for storage in dict.fromkeys(_storage(t) for t in touched):
            self.calls.setdefault(storage, []).append(Call(func, args, kwargs or {}, out))
        return out


def _storage(tensor: Tensor) -> int:
    # Views of one tensor have the same storage, so an operation on a view is recorded for the tensor.
    return int(tensor.untyped_storage()._cdata)


class Initialization(NamedTuple):
    """The recorded initialization of a model."""

    source: Source
    dependent: frozenset[str]
    """Names of the tensors that `source` can't create: their initialization depends on values of other tensors."""


def record_initialization(model: nn.Module, initialize: Callable[[], Any], seed: int) -> Initialization:
    """Records the initialization of a model on the meta device.

    Args:
        model: The model, on the meta device.
        initialize: Initializes the model.
        seed: The seed of the random weights.
    """
    tensors = {name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta}
    by_name: dict[str, tuple[Tensor, list[Call]]] = {}
    # RuntimeError: the initialization reads values, which meta tensors do not have.
    with suppress(NotImplementedError, RuntimeError):
        with _Recorder() as recorder, torch.no_grad():
            initialize()
        by_name = {name: (t, recorder.calls.get(_storage(t), [])) for name, t in tensors.items()}
    dependent = frozenset(name for name in tensors if name not in by_name or not _is_independent(*by_name[name]))

    def source(name: str, box: Box | None = None) -> Tensor:
        meta, calls = by_name[name]
        if in_blocks(meta, calls):
            return _draw_blocks(meta, calls, box or whole(meta.shape), seed, name)
        # A seed for each name: the values do not depend on the order in which the tensors are requested.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(derive_seed("weight", seed, name))
            return part_of(_replay(meta, calls), box)

    return Initialization(source, dependent)


def _is_independent(meta: Tensor, calls: list[Call]) -> bool:
    """Returns whether recorded operations initialize a tensor and read no other tensor."""
    inputs = [a for call in calls for a in tree_leaves((call.args, call.kwargs)) if isinstance(a, Tensor) and a.is_meta]
    changed = any(call.func._schema.is_mutable for call in calls)
    return changed and all(_storage(a) == _storage(meta) for a in inputs)


def _replay(meta: Tensor, calls: list[Call]) -> Tensor:
    real: dict[int, Tensor] = {id(meta): torch.empty_like(meta, device="cpu")}

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_meta:
            # An object that no recorded call returned is `.data` of the tensor: another object with the same storage.
            return real.get(id(value), real[id(meta)])
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == "meta" else value

    for func, args, kwargs, out in calls:
        result = func(*tree_map(swap, args), **tree_map(swap, kwargs))
        for before, after in zip(tree_leaves(out), tree_leaves(result), strict=True):
            if isinstance(before, Tensor):
                real.setdefault(id(before), after)
    return real[id(meta)]


def in_blocks(meta: Tensor, calls: list[Call]) -> bool:
    """Returns whether a tensor is drawn in blocks: it is large, and its elements are initialized independently."""
    if meta.numel() < DRAWN_IN_BLOCKS:
        return False
    rows: set[int] = set()
    for func, args, kwargs, out in calls:
        others = [a for a in tree_leaves((args[1:], kwargs)) if isinstance(a, Tensor)]
        if others or not isinstance(args[0], Tensor):
            return False
        if func is _aten.select.int and args[1] == 0 and id(args[0]) not in rows:  # the row of the padding token
            rows.add(id(out))
        elif func not in _ELEMENTWISE or (id(args[0]) not in rows and args[0].shape != meta.shape):
            return False
    return True


def _draw_blocks(meta: Tensor, calls: list[Call], box: Box, seed: int, name: str) -> Tensor:
    """Returns a part of a tensor: the overlap with each block, which is drawn whole with its own seed.

    Args:
        meta: The tensor on the meta device.
        calls: Its recorded initialization.
        box: The part.
        seed: The seed of the random weights.
        name: The name of the tensor.
    """
    value = torch.empty(box.lengths, dtype=meta.dtype)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for number, block in blocks(meta.shape, box):
            # `torch.manual_seed` also seeds the devices, which takes longer.
            torch.default_generator.manual_seed(derive_seed("weight", seed, name, number))
            drawn = _replay_block(calls, block, len(meta), meta.dtype)
            for read in reads([Part("", block)], box):
                value[read.target] = drawn[read.source]
    return value


def _replay_block(calls: list[Call], block: Box, rows: int, dtype: torch.dtype) -> Tensor:
    value = torch.empty(block.lengths, dtype=dtype)
    selected: dict[int, Tensor | None] = {}
    for func, args, kwargs, out in calls:
        if func is _aten.select.int:
            row = args[2] % rows - block.offsets[0]
            selected[id(out)] = value[row] if 0 <= row < len(value) else None
        elif (target := selected.get(id(args[0]), value)) is not None:
            func(target, *args[1:], **kwargs)
    return value


def blocks(shape: Sequence[int], box: Box) -> Iterator[tuple[int, Box]]:
    """Yields the blocks of a tensor that overlap a box, with their numbers.

    A block has a part of a row or several rows. Tensors of three or more dimensions (stacked experts), which may be
    sharded along any dimension, have square blocks in their last two dimensions.

    Args:
        shape: The shape of the tensor.
        box: A part of the tensor.
    """
    lengths = block_shape(shape)
    counts = [-(-size // length) for size, length in zip(shape, lengths, strict=True)]
    touched = [
        range(start // length, -(-(start + size) // length)) for start, size, length in zip(*box, lengths, strict=True)
    ]
    for place in itertools.product(*touched):
        number = 0
        for index, count in zip(place, counts, strict=True):
            number = number * count + index
        offsets = tuple(index * length for index, length in zip(place, lengths, strict=True))
        sizes = tuple(min(length, size - start) for start, length, size in zip(offsets, lengths, shape, strict=True))
        yield number, Box(offsets, sizes)


def block_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the blocks of a tensor, except for the last ones of a dimension, which may be smaller."""
    *outer, last = shape
    if len(outer) < 2:
        columns = min(last, BLOCK)
        return (*(min(rows, BLOCK // columns) for rows in outer), columns)
    return (*(1 for _ in outer[:-1]), min(outer[-1], _SIDE), min(last, _SIDE))
