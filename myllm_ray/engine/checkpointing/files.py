"""The safetensors files of one rank: which tensors they hold, and how they are written.

A file is written to disk tensor by tensor, so the memory needed is that of one tensor, and its checksum is computed
from the same bytes. The layout of a file is that of the safetensors format: the size of the header (8 bytes), the
header (JSON), and the values of all tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from myllm_ray.common import distributed
from myllm_ray.common.tensor_files import SHARDING, Box, Part, box_of, local

FILE_BYTES = 2**34
"""Largest size of a file with more than one tensor. Most ranks write one file: a few large files are faster to write
and to find than many small ones, on shared file systems and in object stores."""
SMALL_BYTES = 2**16
"""Largest size of a tensor that the first replica writes in any case. Every rank needs the step counters of all
parameters: in the files of all ranks, they would make every rank open every file."""
_CHUNK = 2**22
"""Bytes that are written and hashed at a time: small enough to stay in the processor's cache in between."""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Written(NamedTuple):
    """The files that a rank has written."""

    sums: dict[str, dict[str, Any]]
    """Size in bytes and SHA-256 checksum by file name, as in the manifest."""
    parts: dict[Part, list[str]]
    """The names of the tensors of which the rank holds this part: tensors of equal shape have equal parts."""


def own_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors that this rank writes: its shards, and a share of the tensors and shards that have replicas.

    Tensors are assigned by size, the largest first, to the replica with the smallest total so far, and small ones to
    the first replica. Ties are broken by name, so every rank computes the same assignment without communication.
    """
    loads: dict[int, list[int]] = {}
    mine: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        replica, replicas = _replica(tensor)
        load, amount = loads.setdefault(replicas, [0] * replicas), tensor.numel() * tensor.element_size()
        writer = 0 if amount <= SMALL_BYTES else load.index(min(load))
        load[writer] += amount
        if writer == replica:
            mine[name] = tensor
    # In the original order, not in the order of sizes.
    return {name: mine[name] for name in tensors if name in mine}


def _replica(tensor: Tensor) -> tuple[int, int]:
    """Returns which replica of its part of a tensor this rank holds, and the number of replicas."""
    if not isinstance(tensor, DTensor):
        return distributed.rank(), distributed.world_size()
    replica, replicas = 0, 1
    place = tensor.device_mesh.get_coordinate() or [0] * tensor.device_mesh.ndim
    for number, size, placement in zip(place, tensor.device_mesh.shape, tensor.placements, strict=True):
        if placement.is_replicate():
            replica, replicas = replica * size + number, replicas * size
    return replica, replicas


def plan_files(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Box]]:
    """Returns the files of this rank, and the box of each tensor in them. Values are not needed.

    Args:
        tensors: The result of `own_part`.
    """
    boxes = {name: box_of(tensor) for name, tensor in tensors.items()}
    amounts = {name: math.prod(box.lengths) * tensors[name].element_size() for name, box in boxes.items()}
    files: list[dict[str, Box]] = []
    size = 0
    # The small tensors of all parameters in one file: every rank may need those of the first replica.
    for name in sorted(boxes, key=lambda name: amounts[name] > SMALL_BYTES):
        if not amounts[name]:  # an uneven shard
            continue
        if not files or size + amounts[name] > FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = boxes[name]
        size += amounts[name]
    return {f"rank-{distributed.rank():05d}-{n}.safetensors": boxes for n, boxes in enumerate(files, 1)}


def write_files(folder: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Writes this rank's part of the tensors. There are no collectives.

    Args:
        folder: An existing folder.
        tensors: The result of `own_part`.

    Raises:
        OSError: A file can't be written.
        RuntimeError: A tensor has a dtype that safetensors does not have.
    """
    written = Written({}, {})
    for file, boxes in plan_files(tensors).items():
        written.sums[file] = _write_file(folder / file, {name: tensors[name] for name in boxes}, boxes)
        for name, box in boxes.items():
            written.parts.setdefault(Part(file, box), []).append(name)
    return written


def _write_file(path: Path, tensors: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> dict[str, Any]:
    # The largest elements first: with a header of a multiple of 8 bytes, all tensors are then aligned in the file.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    found = hashlib.sha256()
    with open(path, "wb") as file:
        for chunk in _content(names, tensors, boxes):
            file.write(chunk)
            found.update(chunk)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": found.hexdigest(), "bytes": size}


def _content(names: list[str], tensors: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a file."""
    sharding = {name: {"saved_offsets": list(boxes[name].offsets)} for name in names}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", SHARDING: json.dumps(sharding)}}
    begin = 0
    for name in names:
        held = local(tensors[name])
        if held.dtype not in _DTYPES:
            raise RuntimeError(f"{name} has the dtype {held.dtype}, which safetensors files can't hold")
        end = begin + held.numel() * held.element_size()
        header[name] = {"dtype": _DTYPES[held.dtype], "shape": list(held.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        flat = local(tensors[name]).cpu().contiguous().reshape(-1)
        content = flat.view(torch.uint8).numpy().data
        for start in range(0, len(content), _CHUNK):
            yield content[start : start + _CHUNK]
