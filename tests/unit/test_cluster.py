"""How many workers fit: what is free, what leaves, and the CPU that reads data."""

from __future__ import annotations

import pytest
from conftest import MakeConfig

from myllm_ray.orchestration import cluster

A, B, C = "node-a", "node-b", "node-c"


@pytest.mark.parametrize(("free", "leaving", "placed", "expected"), [
    ({A: 5.0}, set(), [], 4),
    ({A: 4.0}, set(), [], 2),  # 3 does not divide 8 micro-batches; 4 would leave no CPU for the data
    ({A: 1.0}, set(), [], 0),
    ({A: 2.0}, set(), [], 1),
    ({A: 2.0, B: 2.0}, {B}, [], 1),
    # A group of 2 that runs: its data CPU is busy, or not
    ({A: 0.0}, set(), [A, A], 2),
    ({A: 1.0}, set(), [A, A], 2),
    # A node with two CPUs joins
    ({A: 0.0, B: 2.0}, set(), [A, A], 2),  # 4 need a CPU for data beside them, and it may be counted already: wait
    ({A: 1.0, B: 2.0}, set(), [A, A], 4),
    # A node leaves, and another has room, or has not
    ({A: 1.0, B: 0.0, C: 1.0}, {B}, [A, B], 2),
    ({A: 1.0, B: 0.0}, {B}, [A, B], 1),
    ({A: 0.5, B: 0.0}, {A, B}, [A, B], 0),
])
def test_workers_that_fit(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, free: dict[str, float], leaving: set[str],
                          placed: list[str], expected: int) -> None:
    monkeypatch.setattr(cluster, "draining_nodes", lambda: leaving)
    monkeypatch.setattr(cluster.state, "available_resources_per_node", lambda: {n: {"CPU": c} for n, c in free.items()})
    config = make_config("scaling.workers=[1,4]", "accelerator.name=ddp", "batch.micro_size=1")
    assert cluster.workers_that_fit(config, placed) == expected


def test_custom_resources_count_by_node(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a worker's resources on each of two nodes make no worker."""
    monkeypatch.setattr(cluster, "draining_nodes", set)
    free = {A: {"CPU": 8.0, "slot": 1.0}, B: {"CPU": 8.0, "slot": 1.0}}
    monkeypatch.setattr(cluster.state, "available_resources_per_node", lambda: free)
    config = make_config("scaling.workers=[1,4]", "accelerator.name=ddp", "batch.micro_size=1",
                         "scaling.resources_per_worker={slot: 2}")
    assert cluster.workers_that_fit(config) == 0
    assert cluster.workers_that_fit(config.model_copy(update={"scaling": config.scaling.model_copy(
        update={"resources_per_worker": {"slot": 1.0}})})) == 2
