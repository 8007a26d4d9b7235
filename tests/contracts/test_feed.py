"""`data.feed`: Ray Data and the workers themselves give the same micro-batches; a worker never reads other data."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig

from myllm_ray.common import distributed
from myllm_ray.common.types import Batch, Position
from myllm_ray.config import ConfigError, DataError
from myllm_ray.data.prepare import prepare
from myllm_ray.data.stream import LocalStream, StreamSpec
from myllm_ray.orchestration import cluster, ray_data


class Shard:
    """The share of one rank of the blocks of a dataset, as Ray's splitter distributes them."""

    def __init__(self, blocks: list[Any], rank: int, world: int):
        self._blocks = blocks[rank::world]

    def iter_batches(self, **_: Any) -> Iterator[Any]:
        return iter(self._blocks)


class Dataset:
    """A dataset whose tasks run in this process."""

    def __init__(self, tables: list[Any]):
        self._tables = tables

    def map_batches(self, build: Any, **_: Any) -> list[Any]:
        return list(itertools.chain.from_iterable(build(table) for table in self._tables))


def both(
    spec: StreamSpec, monkeypatch: pytest.MonkeyPatch, start: Position, steps: int, rank: int, world: int
) -> tuple[list[Batch], list[Batch]]:
    """Returns the batches of a rank from Ray Data's tasks, and those that the rank reads."""
    from ray.data import DataContext

    monkeypatch.setattr(ray_data.ray.data, "from_arrow", Dataset)
    monkeypatch.setattr(DataContext.get_current(), "target_max_block_size", 1)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    blocks: Any = ray_data.build_dataset(spec, start, steps)
    from_tasks = ray_data.RayStream(spec, Shard(blocks, rank, world))
    return list(from_tasks.batches(start, steps)), list(LocalStream(spec).batches(start, steps))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("start", [Position(), Position(1, 6)])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_both_feeds_give_the_same_batches(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, world: int, start: Position, packing: str
) -> None:
    """Over several epochs, whose last batch is filled up."""
    common = ("data.train.limit=14", "data.validation=null", "batch.global_size=6", "batch.micro_size=1")
    spec = prepare(make_config(*common, f"data.packing={packing}")).train
    steps = 3 * spec.steps_in_epoch(0)
    for rank in range(world):
        tasks, own = both(spec, monkeypatch, start, steps, rank, world)
        assert len(tasks) == len(own) == steps
        for a, b in zip(tasks, own, strict=True):
            assert (a.position, a.next, a.fingerprint) == (b.position, b.next, b.fingerprint)
            assert len(a.micros) == len(b.micros) == 6 // world
            for left, right in zip(a.micros, b.micros, strict=True):
                assert left.keys() == right.keys()
                assert all(torch.equal(left[name], right[name]) for name in left)


def test_only_ray_data_needs_a_free_cpu(make_config: MakeConfig) -> None:
    def need(feed: str) -> float:
        config = make_config("scaling.workers=2", "accelerator.name=ddp", f"data.feed={feed}")
        return cluster.cpus_needed(config, 2)

    assert [need(feed) for feed in ("auto", "worker", "ray")] == [2, 2, 3]
    with pytest.raises(ConfigError, match=r"data\.feed"):
        make_config("data.feed=disk")


def test_a_loop_function_alone_has_no_dataset(make_config: MakeConfig) -> None:
    from myllm_ray.orchestration.loops import train_loop

    with pytest.raises(ConfigError, match=r"data.feed=ray needs `train\(config\)`") as caught:
        train_loop(make_config("data.feed=ray").model_dump(mode="json"))
    assert "\n" not in str(caught.value)


def test_a_node_without_the_data_is_an_error(make_config: MakeConfig) -> None:
    """A worker unpickles the prepared data, and with it opens the folder, which may be another one on its node."""
    prepared = prepare(make_config("data.validation=null"))
    sent, folder = pickle.dumps(prepared), prepared.train.plan.store.folder
    assert pickle.loads(sent).identity == prepared.identity
    meta = folder / "meta.json"
    text = meta.read_text()
    meta.write_text(json.dumps({**json.loads(text), "content_hash": "0" * 32}))
    with pytest.raises(DataError, match=rf"data.cache: {folder} on node .* contains other data than on the node that"):
        pickle.loads(sent)
    elsewhere = Path(f"{folder}-moved")
    shutil.move(folder, elsewhere)
    with pytest.raises(DataError, match=rf"data.cache: node .* can't read {folder}: use a folder that all nodes share"):
        pickle.loads(sent)
    meta = elsewhere / "meta.json"
    meta.write_text(text)
    shutil.move(elsewhere, folder)
    assert pickle.loads(sent).identity == prepared.identity
