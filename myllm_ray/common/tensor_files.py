"""Tensors in parts: several safetensors files together hold them, and an index names the file of each part.

A part is a box of a tensor. A reader intersects the box that it needs with the parts, opens only the files of the parts
that overlap, and reads only the bytes of the overlap. The layout of the parts is free: any number of writers, sharded
along any dimensions, serves any number of readers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

SHARDING = "DCP_SHARDING_INFO"
"""Key in a file's metadata: maps each tensor to the offsets of its part.

`HuggingFaceStorageReader` of torch.distributed.checkpoint reads it too.
"""


class Box(NamedTuple):
    """A box of elements of a tensor: the first element and the number of elements of each dimension."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


class Part(NamedTuple):
    """A box of a tensor, and the name of the file that holds it under the tensor's name."""

    file: str
    box: Box


Index = Mapping[str, Sequence[Part]]
"""The parts of each tensor, by its name. The parts of a tensor do not overlap."""


class Read(NamedTuple):
    """The overlap of a part and a wanted box."""

    part: Part
    source: tuple[slice, ...]
    """Its place in the part."""
    target: tuple[slice, ...]
    """Its place in the wanted box."""


def local(tensor: Tensor) -> Tensor:
    """Returns the elements of a tensor that this rank holds, without a copy."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def box_of(tensor: Tensor) -> Box:
    """Returns which box of the global tensor this rank holds; all of it for a tensor that is not a DTensor."""
    if not isinstance(tensor, DTensor):
        return whole(tensor.shape)
    lengths, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Box(tuple(offsets), tuple(lengths))


def whole(shape: Iterable[int]) -> Box:
    """Returns the box of a whole tensor."""
    lengths = tuple(shape)
    return Box((0,) * len(lengths), lengths)


def part_of(tensor: Tensor, box: Box | None) -> Tensor:
    """Returns a box of a tensor as a view; all of it for None."""
    return tensor if box is None else tensor[slices_of(box)]


def slices_of(box: Box) -> tuple[slice, ...]:
    """Returns the index of a box."""
    return tuple(slice(start, start + length) for start, length in zip(*box, strict=True))


def reads(parts: Iterable[Part], wanted: Box) -> Iterator[Read]:
    """Yields what has to be read of the parts of a tensor to fill a box."""
    for part in parts:
        source, target = [], []
        for start, length, first, size in zip(*part.box, *wanted, strict=True):
            begin, end = max(start, first), min(start + length, first + size)
            if begin >= end:
                break
            source.append(slice(begin - start, end - start))
            target.append(slice(begin - first, end - first))
        else:
            yield Read(part, tuple(source), tuple(target))


def plan_reads(index: Index, wanted: Mapping[str, Box]) -> dict[str, list[tuple[str, Read]]]:
    """Returns what has to be read to fill boxes of tensors: (name of the tensor, what to read), by file.

    Raises:
        ValueError: The parts of a tensor do not fill its box exactly.
    """
    by_file: dict[str, list[tuple[str, Read]]] = {}
    # Most tensors of a model share their layout and their box with others.
    known: dict[tuple[int, Box], list[Read]] = {}
    for name, box in wanted.items():
        if not all(box.lengths):  # an uneven shard
            continue
        parts = index.get(name, ())
        if (id(parts), box) not in known:
            known[id(parts), box] = list(reads(parts, box))
        filled = 0
        for read in known[id(parts), box]:
            by_file.setdefault(read.part.file, []).append((name, read))
            filled += math.prod(s.stop - s.start for s in read.target)
        if filled != math.prod(box.lengths):
            raise ValueError(f"its files hold {filled} of {math.prod(box.lengths)} elements of {name}")
    return by_file


def fill(folder: Path, index: Index, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors in place, each rank its own shards. Every file is opened once. There are no collectives.

    Args:
        folder: The folder of the files.
        index: The parts of the tensors.
        tensors: The tensors by name. Sharded ones are DTensors.

    Raises:
        ValueError: The index or a file does not match the tensors.
        OSError, SafetensorError: A file can't be read.
    """
    planned = plan_reads(index, {name: box_of(tensor) for name, tensor in tensors.items()})
    with torch.no_grad():
        for file, wanted in planned.items():
            with safe_open(folder / file, "pt") as opened:
                for name, read in wanted:
                    local(tensors[name])[read.target].copy_(_piece(opened, name, read))


def _piece(opened: Any, name: str, read: Read) -> Tensor:
    """Returns the wanted elements of a part."""
    stored = opened.get_slice(name)
    # A copy of a tensor with another shape might broadcast instead of failing.
    if tuple(stored.get_shape()) != read.part.box.lengths:
        raise ValueError(f"{read.part.file} holds {name} of shape {stored.get_shape()}, not {read.part.box.lengths}")
    complete = all(s == slice(0, n) for s, n in zip(read.source, read.part.box.lengths, strict=True))
    # The whole tensor is a view of the file, which saves a copy.
    piece: Tensor = opened.get_tensor(name) if complete else stored[read.source]
    return piece


class TensorFiles:
    """Reads tensors or parts of them, one at a time. Files stay open.

    Args:
        folder: The folder of the files.
        index: The parts of the tensors.
    """

    def __init__(self, folder: Path, index: Index):
        self.folder, self.index = folder, index
        self._opened: dict[str, Any] = {}

    def read(self, name: str, shape: Sequence[int], box: Box | None = None) -> Tensor:
        """Returns a tensor in the dtype of its files.

        Args:
            name: The name of the tensor.
            shape: Its shape.
            box: The part to read; None: all.

        Raises:
            ValueError: The index or a file does not match the shape.
        """
        box = box or whole(shape)
        found: Tensor | None = None
        for file, wanted in plan_reads(self.index, {name: box}).items():
            if file not in self._opened:
                self._opened[file] = safe_open(self.folder / file, "pt")
            for _, read in wanted:
                piece = _piece(self._opened[file], name, read)
                found = torch.empty(box.lengths, dtype=piece.dtype) if found is None else found
                found[read.target] = piece
        return torch.empty(box.lengths) if found is None else found


def to_json(index: Index) -> dict[str, Any]:
    """Returns an index as JSON: the distinct `layouts` of parts, and `index`, the number of each tensor's layout.

    Tensors of equal shape are sharded equally, so a model has few layouts, and the size does not grow with the number
    of tensors times the number of files.

    Args:
        index: The parts of the tensors. Layouts are equal if they have the same `Part` objects.
    """
    numbers: dict[tuple[int, ...], int] = {}
    layouts: list[Sequence[Part]] = []
    of: dict[str, int] = {}
    for name, parts in index.items():
        key = tuple(map(id, parts))  # comparing the values takes seconds for a large model on many ranks
        if key not in numbers:
            numbers[key] = len(layouts)
            layouts.append(parts)
        of[name] = numbers[key]
    return {
        "layouts": [[[p.file, list(p.box.offsets), list(p.box.lengths)] for p in parts] for parts in layouts],
        "index": of,
    }


def index_of(folder: Path, manifest: Mapping[str, Any]) -> dict[str, list[Part]]:
    """Returns the index of a checkpoint. Files are opened only for format 2, whose manifest has no index.

    Args:
        folder: The folder of the checkpoint.
        manifest: Its manifest. It may come from anywhere, so a wrong entry raises an error.

    Raises:
        ValueError: The manifest is malformed, or it names files that are not files of the checkpoint.
        OSError, SafetensorError: A file of a checkpoint of format 2 can't be read.
    """
    try:
        known = set(manifest["files"])
        if any(Path(name).name != name for name in known):
            raise ValueError("manifest.json names a file outside the checkpoint")
        if manifest["format"] == 2:
            return _index_of_headers(folder, sorted(name for name in known if name.endswith(".safetensors")))
        layouts = [
            [Part(file, Box(_numbers(offsets), _numbers(lengths))) for file, offsets, lengths in layout]
            for layout in manifest["layouts"]
        ]
        index = {name: layouts[number] for name, number in manifest["index"].items()}
        if not known.issuperset(part.file for layout in layouts for part in layout):
            raise ValueError("the index in manifest.json names a file that is not listed")
        ranks = {name: len(shape) for name, shape in manifest["tensors"].items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the index in manifest.json is malformed ({type(error).__name__})") from None
    for name, parts in index.items():
        if any({len(p.box.offsets), len(p.box.lengths)} != {ranks.get(name)} for p in parts):
            raise ValueError(f"the index in manifest.json has parts of {name} with another number of dimensions")
    return index


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
        raise ValueError("the index in manifest.json is malformed (offsets and lengths are not natural numbers)")
    return tuple(values)


def _index_of_headers(folder: Path, files: Iterable[str]) -> dict[str, list[Part]]:
    """Returns the index of files that were written by torch.distributed.checkpoint, from their headers."""
    index: dict[str, list[Part]] = {}
    for file in files:
        with safe_open(folder / file, "pt") as opened:
            sharding = json.loads((opened.metadata() or {}).get(SHARDING, "{}"))
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                lengths = opened.get_slice(name).get_shape()
                # A tensor that one rank wrote as a whole may have no offsets.
                offsets = sharding.get(name, {}).get("saved_offsets") or [0] * len(lengths)
                index.setdefault(name, []).append(Part(file, Box(_numbers(list(offsets)), tuple(lengths))))
    return index
