"""What initial weights and frozen models cost each rank of FSDP, as in docs/scaling.md."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from simulated import MODELS, Model, one_of
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from myllm_ray.accelerators.fsdp import FSDPAccelerator
from myllm_ray.accelerators.sharding import placement
from myllm_ray.common.modules import outside_blocks, parameter_count, repeated_blocks
from myllm_ray.common.tensor_files import Box
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models.initialization import DRAWN_IN_BLOCKS, blocks
from myllm_ray.models.load import build_deferred

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
WORLDS = (8, 64, 512)
Shapes = list[tuple[int, ...]]


def mixtral() -> Shapes:
    """Returns the shapes of Mixtral 8x22B, whose experts transformers stacks."""
    model = Model(6144, 16_384, 56, 48, 8, vocabulary=32_000)
    dense = [shape for name, shape in model.shapes().items() if ".mlp." not in name]
    return [*dense, *[(8, 6144), (8, 2 * 16_384, 6144), (8, 6144, 16_384)] * model.layers]


SHAPES: dict[str, Shapes] = {**{name: [*m.shapes().values()] for name, m in MODELS.items()}, "Mixtral-8x22B": mixtral()}


def box(shape: tuple[int, ...], rank: int, world: int) -> Box:
    """Returns the part of a parameter that a rank holds."""
    chosen = placement(world)(nn.Parameter(torch.empty(shape, device="meta"))) or Shard(0)
    with one_of(rank, world):
        mesh = DeviceMesh("cpu", torch.arange(world), _init_backend=False)
        lengths, offsets = compute_local_shape_and_global_offset(shape, mesh, [chosen])
    return Box(tuple(offsets), tuple(lengths))


@functools.cache
def costs(shape: tuple[int, ...], rank: int, world: int) -> tuple[int, int]:
    """Returns the number of values that a rank holds of a parameter, and the number that it draws."""
    part = box(shape, rank, world)
    held, whole = math.prod(part.lengths), math.prod(shape)
    if not held or whole < DRAWN_IN_BLOCKS:
        return held, whole if held else 0
    return held, sum(math.prod(block.lengths) for _, block in blocks(shape, part))


def row(name: str, world: int) -> str:
    """Returns a row of the table in docs/scaling.md, after checking its limits."""
    shapes = SHAPES[name]
    share = sum(math.prod(shape) for shape in shapes) / world
    ranks = (0, world // 2, world - 1)
    held, drawn = (max(sum(costs(shape, rank, world)[i] for shape in shapes) for rank in ranks) for i in (0, 1))
    assert held <= 1.05 * share
    assert world > 64 or drawn <= 1.1 * share
    return f"| {name} | {world} | {share / 1e6:,.0f} M | {drawn / share:.3f} | {held / share:.3f} |"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("world", WORLDS)
def test_each_rank_draws_and_reads_its_share(name: str, world: int) -> None:
    assert row(name, world) in PAGE.read_text(encoding="utf-8")


LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
}
RANKS = 64


def reference(precision: str) -> str:
    """Returns a row of the table in docs/scaling.md: the memory of a reference model on 64 ranks."""
    model = build_deferred(ModelSection(config=LLAMA_8B), byte_tokenizer(), 64, 0)
    model.__dict__.pop("_initial_values")
    with one_of(0, RANKS):
        accelerator = FSDPAccelerator({"accelerator": {"name": "fsdp", "precision": precision}})
        accelerator.device = torch.device("meta")
        accelerator._device_mesh = init_device_mesh("cpu", (RANKS,))
        total, blocks_, size = parameter_count([model]), repeated_blocks(model), {"fp32": 4, "bf16": 2}[precision]
        outside = total - parameter_count(blocks_)
        assert outside_blocks(model, blocks_)[0] == 4096, "embedding and head, and the last norm"
        frozen = accelerator.prepare_frozen(model)
        held, _ = accelerator.parameter_bytes(frozen)
    assert all(isinstance(block, FSDPModule) for block in blocks_)
    assert all(isinstance(p, DTensor) and p.element_size() == size for p in frozen.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert held <= 1.01 * size * total / RANKS
    block = max(parameter_count([block]) for block in blocks_)
    return (
        f"| {precision} | {size * total / 1e9:.2f} GB | {held / 1e9:.3f} GB | {size * block / 1e9:.2f} GB "
        f"| {size * outside / 1e9:.2f} GB |"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_reference_is_sharded_in_the_compute_dtype(precision: str) -> None:
    assert reference(precision) in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    for name in SHAPES:
        for world in WORLDS:
            print(row(name, world))
    for precision in ("fp32", "bf16"):
        print(reference(precision))
