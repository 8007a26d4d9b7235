"""What a checkpoint costs each rank: files, bytes and the manifest, as in docs/scaling.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from simulated import MODELS, boxes_of, bytes_of, files_of, loaded, manifest_bytes, manifest_of, one_of

from myllm_ray.common.tensor_files import Box, index_of
from myllm_ray.engine.checkpointing.files import FILE_BYTES, own_part, plan_files

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
WORLDS = (8, 64, 512)


def sampled(world: int) -> list[int]:
    return [0, world // 2, world - 1]


def row(name: str, world: int) -> str:
    """Returns a row of the table in docs/scaling.md, after checking its limits."""
    model = MODELS[name]
    share = model.state_bytes / world
    manifest = manifest_of(model, world)
    index = index_of(Path(), manifest)
    written, files, opened, read, half, double = 0, 0, 0, 0, 0, 0
    for rank in sampled(world):
        own = files_of(model, rank, world)
        assert all(manifest["files"][file]["bytes"] == bytes_of(boxes) for file, boxes in own.items())
        files = max(files, len(own))
        written = max(written, sum(bytes_of(boxes) for boxes in own.values()))
        count, size = loaded(index, boxes_of(model, rank, world))
        opened, read = max(opened, count), max(read, size)
    for rank in sampled(world // 2):
        half = max(half, loaded(index, boxes_of(model, rank, world // 2))[0])
    for rank in sampled(world * 2):
        double = max(double, loaded(index, boxes_of(model, rank, world * 2))[0])
    assert sum(f["bytes"] for f in manifest["files"].values()) == model.state_bytes
    assert max(written, read) <= 1.05 * share
    assert files <= (2 if world >= 64 else 1 + share / FILE_BYTES * 1.1)
    assert opened <= 10
    assert max(half, double) <= 10 * (1 if world >= 64 else 2)
    return (
        f"| {name} | {world} | {share / 1e9:.2f} GB | {files} | {written / share:.3f} | {opened} | {read / share:.3f} "
        f"| {double} | {half} | {manifest_bytes(manifest) / 1e3:,.0f} kB |"
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("world", WORLDS)
def test_each_rank_writes_and_reads_its_share(name: str, world: int) -> None:
    assert row(name, world) in PAGE.read_text(encoding="utf-8")


def test_the_models_have_the_sizes_of_their_names() -> None:
    assert {name: round(model.parameters / 1e9, 2) for name, model in MODELS.items()} == {
        "Llama-8B": 8.03,
        "Llama-70B": 70.55,
    }


FULLY_SHARDED = """
from simulated import one_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from myllm_ray.accelerators.sharding import shard_units
from myllm_ray.common.tensor_files import box_of

with one_of(int(sys.argv[1]), 8):
    model = nn.Sequential(nn.Linear(13, 7, bias=False, device="meta"), nn.Linear(7, 7, bias=False, device="meta"))
    shard_units(model, [], 8, {"mesh": init_device_mesh("cpu", (8,))})
    print([(box_of(p), tuple(p.to_local().shape)) for p in model.parameters()])
"""


@pytest.mark.parametrize("rank", [3, 7])
def test_fsdp_shards_as_it_is_simulated(rank: int) -> None:
    """The boxes of a model that `fully_shard` shards, with sizes that the ranks do not divide.

    In a process of its own: torch caches a mesh with the coordinate of the rank that made it first.
    """
    code = f"import sys\nsys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n{FULLY_SHARDED}"
    said = subprocess.run([sys.executable, "-c", code, str(rank)], capture_output=True, text=True, check=True).stdout
    rows, offset = (1, 3) if rank == 3 else (0, 7)
    expected = [(Box((offset, 0), (rows, width)), (rows, width)) for width in (13, 7)]
    assert said.strip() == str(expected)


def test_replicas_of_shards_are_written_once() -> None:
    """Hybrid sharding on 8 ranks, 2 groups of 4: each part has one writer, and the groups write about half each."""
    model = MODELS["Llama-8B"]
    totals = []
    parts: list[tuple[str, tuple[int, ...]]] = []
    for rank in range(8):
        files = files_of(model, rank, 8, replicas=2)
        totals.append(sum(bytes_of(boxes) for boxes in files.values()))
        parts += [(name, box.offsets) for boxes in files.values() for name, box in boxes.items()]
    assert len(parts) == len(set(parts))
    assert sum(totals) == model.state_bytes
    assert max(totals) <= 1.05 * model.state_bytes / 8


def test_replicated_tensors_are_divided_by_size() -> None:
    shapes = {f"model.{i}": (i % 17 + 1, 50_000) for i in range(200)}
    totals, names = [], []
    for rank in range(8):
        with one_of(rank, 8):
            tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            mine = plan_files(own_part(tensors))
        totals.append(sum(bytes_of(boxes) for boxes in mine.values()))
        names += [name for boxes in mine.values() for name in boxes]
    assert sorted(names) == sorted(shapes)
    assert max(totals) <= 1.05 * sum(totals) / 8


if __name__ == "__main__":
    for name in MODELS:
        for world in WORLDS:
            print(row(name, world))
