"""Checkpoints of large models on many ranks, simulated in one process: torch's fake process group, and no values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from myllm_ray.common.tensor_files import Box, Index, Part, plan_reads, whole
from myllm_ray.engine.checkpointing.files import own_part, plan_files
from myllm_ray.engine.checkpointing.writer import _complete, _text

MOMENTS = ("exp_avg", "exp_avg_sq")
FP32 = 4


@dataclass(frozen=True)
class Model:
    """The dimensions of a Llama model."""

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int = 128_256

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each parameter, by its name in a checkpoint without the prefix."""
        keys = self.width // self.heads * self.key_heads
        block = {
            "self_attn.q_proj.weight": (self.width, self.width),
            "self_attn.k_proj.weight": (keys, self.width),
            "self_attn.v_proj.weight": (keys, self.width),
            "self_attn.o_proj.weight": (self.width, self.width),
            "mlp.gate_proj.weight": (self.inner, self.width),
            "mlp.up_proj.weight": (self.inner, self.width),
            "mlp.down_proj.weight": (self.width, self.inner),
            "input_layernorm.weight": (self.width,),
            "post_attention_layernorm.weight": (self.width,),
        }
        return {
            "model.model.embed_tokens.weight": (self.vocabulary, self.width),
            **{f"model.model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in block.items()},
            "model.model.norm.weight": (self.width,),
            "model.lm_head.weight": (self.vocabulary, self.width),
        }

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    @property
    def state_bytes(self) -> int:
        """Bytes of the weights and the moments of AdamW in fp32, and of its step counters."""
        return FP32 * ((1 + len(MOMENTS)) * self.parameters + len(self.shapes()))


MODELS = {
    "Llama-8B": Model(4096, 14_336, 32, 32, 8),
    "Llama-70B": Model(8192, 28_672, 80, 64, 8),
}


@contextmanager
def one_of(rank: int, world: int) -> Iterator[None]:
    """Makes this process a rank of a process group whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def state(model: Model, replicas: int = 1) -> dict[str, Tensor]:
    """Returns the tensors of this rank under FSDP2, without values: moments are sharded like parameters."""
    world = dist.get_world_size()
    placements: list[Any] = [Shard(0)]
    mesh = DeviceMesh("cpu", torch.arange(world), _init_backend=False)
    if replicas > 1:
        placements = [Replicate(), Shard(0)]
        mesh = DeviceMesh("cpu", torch.arange(world).reshape(replicas, -1), _init_backend=False)
    made: dict[tuple[int, ...], DTensor] = {}
    for shape in set(model.shapes().values()):
        lengths, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
        stride = torch.empty(shape, device="meta").stride()
        held = torch.empty(lengths, device="meta")
        made[shape] = DTensor.from_local(held, mesh, placements, run_check=False, shape=shape, stride=stride)
    tensors: dict[str, Tensor] = {f"model.{name}": made[shape] for name, shape in model.shapes().items()}
    for name, shape in model.shapes().items():
        tensors.update({f"optimizer.{name}.{moment}": made[shape] for moment in MOMENTS})
        tensors[f"optimizer.{name}.step"] = torch.empty((), device="meta")
    return tensors


def shapes_of(model: Model) -> dict[str, list[int]]:
    """Returns the global shapes, as the manifest contains them."""
    with one_of(0, 1):
        return {name: list(tensor.shape) for name, tensor in state(model).items()}


Files = dict[str, dict[str, Box]]
"""The tensors in each file, and which box of each."""


def files_of(model: Model, rank: int, world: int, replicas: int = 1) -> Files:
    """Returns the files that a rank writes."""
    with one_of(rank, world):
        return plan_files(own_part(state(model, replicas)))


def boxes_of(model: Model, rank: int, world: int) -> dict[str, Box]:
    """Returns the boxes that a rank loads."""
    sharded: dict[tuple[int, ...], Box] = {}
    with one_of(rank, world):
        mesh = DeviceMesh("cpu", torch.arange(world), _init_backend=False)
        for shape in set(model.shapes().values()):
            lengths, offsets = compute_local_shape_and_global_offset(shape, mesh, [Shard(0)])
            sharded[shape] = Box(tuple(offsets), tuple(lengths))
    boxes: dict[str, Box] = {f"model.{name}": sharded[shape] for name, shape in model.shapes().items()}
    for name, shape in model.shapes().items():
        boxes.update({f"optimizer.{name}.{moment}": sharded[shape] for moment in MOMENTS})
        boxes[f"optimizer.{name}.step"] = whole(())
    return boxes


def manifest_of(model: Model, world: int) -> dict[str, Any]:
    """Returns the manifest of a checkpoint, without what does not depend on the number of ranks."""
    names = {name: number for number, name in enumerate(shapes_of(model))}
    steps = [name for name in names if name.endswith(".step")]
    found = []
    for rank in range(world):
        if world <= 8:  # more than one file per rank
            files = files_of(model, rank, world)
        else:
            own = {n: b for n, b in boxes_of(model, rank, world).items() if not n.endswith(".step")}
            own.update({name: whole(()) for name in steps if rank == 0})
            files = {f"rank-{rank:05d}-1.safetensors": {n: b for n, b in own.items() if math.prod(b.lengths)}}
        parts: dict[Part, list[int]] = {}
        for file, boxes in files.items():
            for name, box in boxes.items():
                parts.setdefault(Part(file, box), []).append(names[name])
        sums = {file: {"sha256": "0" * 64, "bytes": bytes_of(boxes)} for file, boxes in files.items()}
        found.append((sums, list(parts.items())))
    return _complete({"format": 3, "step": 1, "tensors": shapes_of(model)}, found)


def manifest_bytes(manifest: dict[str, Any]) -> int:
    """Returns the size of the manifest's file."""
    return len(_text(json.loads(json.dumps(manifest))))


def bytes_of(boxes: dict[str, Box]) -> int:
    """Returns the bytes of boxes in fp32."""
    return sum(FP32 * math.prod(box.lengths) for box in boxes.values())


def loaded(index: Index, wanted: dict[str, Box]) -> tuple[int, int]:
    """Returns the number of files that a rank opens for its boxes, and the bytes that it reads."""
    by_file = plan_reads(index, wanted)
    elements = sum(math.prod(s.stop - s.start for s in read.target) for reads in by_file.values() for _, read in reads)
    return len(by_file), FP32 * elements
