"""The number of workers that fit: free resources, draining nodes, and the CPU of Ray Data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import MakeConfig

from myllm_ray.config import ConfigError, TrainerConfig
from myllm_ray.orchestration import cluster, group, supervisor

A, B, C = "node-a", "node-b", "node-c"


@pytest.mark.parametrize(
    ("free", "leaving", "placed", "expected"),
    [
        ({A: 5.0}, set(), [], 4),
        ({A: 4.0}, set(), [], 2),  # 3 does not divide 8 micro-batches; 4 would leave no CPU for the data
        ({A: 1.0}, set(), [], 0),
        ({A: 2.0}, set(), [], 1),
        ({A: 2.0, B: 2.0}, {B}, [], 1),
        # A running group of 2, whose data CPU is busy or free
        ({A: 0.0}, set(), [A, A], 2),
        ({A: 1.0}, set(), [A, A], 2),
        # A node with two CPUs joins
        ({A: 0.0, B: 2.0}, set(), [A, A], 2),  # 4 also need a CPU for data, which the group may or may not hold: wait
        ({A: 1.0, B: 2.0}, set(), [A, A], 4),
        # A node leaves; another one has a free CPU or has none
        ({A: 1.0, B: 0.0, C: 1.0}, {B}, [A, B], 2),
        ({A: 1.0, B: 0.0}, {B}, [A, B], 1),
        ({A: 0.5, B: 0.0}, {A, B}, [A, B], 0),
    ],
)
def test_workers_that_fit(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    free: dict[str, float],
    leaving: set[str],
    placed: list[str],
    expected: int,
) -> None:
    monkeypatch.setattr(cluster, "draining_nodes", lambda: leaving)
    monkeypatch.setattr(cluster.state, "available_resources_per_node", lambda: {n: {"CPU": c} for n, c in free.items()})
    common = ("scaling.workers=[1,4]", "accelerator.name=ddp", "batch.micro_size=1")
    assert cluster.workers_that_fit(make_config("data.feed=ray", *common), placed) == expected
    without = cluster.workers_that_fit(make_config(*common), placed)
    assert without >= expected, "workers that read their own rows leave one more CPU"
    if not placed:
        staying = sum(int(cpus) for node, cpus in free.items() if node not in leaving)
        assert without == max(n for n in (0, 1, 2, 4) if n <= staying)


def test_custom_resources_count_by_node(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is not split: half of its resources on each of two nodes do not count."""
    monkeypatch.setattr(cluster, "draining_nodes", set)
    free = {A: {"CPU": 8.0, "slot": 1.0}, B: {"CPU": 8.0, "slot": 1.0}}
    monkeypatch.setattr(cluster.state, "available_resources_per_node", lambda: free)
    config = make_config(
        "scaling.workers=[1,4]", "accelerator.name=ddp", "batch.micro_size=1", "scaling.resources_per_worker={slot: 2}"
    )
    assert cluster.workers_that_fit(config) == 0
    assert (
        cluster.workers_that_fit(
            config.model_copy(
                update={"scaling": config.scaling.model_copy(update={"resources_per_worker": {"slot": 1.0}})}
            )
        )
        == 2
    )


def online(make_config: MakeConfig, workers: str, *overrides: str) -> TrainerConfig:
    """Returns a GRPO config with one rollout actor per worker and one GPU per worker and per actor."""
    config = make_config(
        f"scaling.workers={workers}",
        "accelerator.name=ddp",
        "batch.micro_size=1",
        "scaling.gpus_per_worker=1",
        "rollout={placement: actors}",
        "grpo={reward: [{function: 'math:prod'}], group_size: 2}",
        "data.feed=ray",
        *overrides,
        trainer="grpo",
    )
    return config


@pytest.mark.parametrize(
    ("nodes", "fit"),
    [
        ({A: (9.0, 4.0)}, 2),
        ({A: (9.0, 3.0)}, 0),
        ({A: (4.0, 8.0)}, 0),
        ({A: (5.0, 4.0)}, 2),
        ({A: (5.0, 1.0), B: (5.0, 3.0)}, 2),
        ({A: (5.0, 1.5), B: (5.0, 2.5)}, 0),
    ],
)
def test_gpus_of_rollout_actors_are_counted(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, nodes: dict[str, tuple[float, float]], fit: int
) -> None:
    """Regression: workers took all GPUs, and their actors waited without limit."""
    free = {node: {"CPU": cpus, "GPU": gpus} for node, (cpus, gpus) in nodes.items()}
    monkeypatch.setattr(cluster, "draining_nodes", set)
    monkeypatch.setattr(cluster.state, "available_resources_per_node", lambda: free)
    assert cluster.workers_that_fit(online(make_config, "2")) == fit


def test_a_running_group_keeps_its_place_with_its_actors(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "draining_nodes", set)
    monkeypatch.setattr(cluster.state, "available_resources_per_node", lambda: {A: {"CPU": 4.0, "GPU": 0.0}})
    assert cluster.workers_that_fit(online(make_config, "2"), [A, A]) == 2
    assert cluster.workers_that_fit(online(make_config, "2"), [A]) == 0, "a second worker and its actor have no GPU"


@pytest.mark.parametrize(
    ("nodes", "overrides", "problem"),
    [
        ({A: (9.0, 4.0)}, (), None),
        (
            {A: (9.0, 3.0)},
            (),
            r"scaling.workers=2 and 1 rollout actor beside each need 4 GPU, the Ray cluster has 3: "
            r"use fewer workers or rollout.actors",
        ),
        ({A: (4.0, 4.0)}, (), r"need 5 CPU \(one of them for reading data\), the Ray cluster has 4"),
        ({A: (9.0, 6.0)}, ("rollout.actors=2",), None),
        ({A: (9.0, 5.0)}, ("rollout.actors=2",), "and 2 rollout actors beside each need 6 GPU"),
        ({A: (9.0, 2.0), B: (9.0, 2.0)}, ("rollout={placement: colocated}", "scaling.gpus_per_worker=2"), None),
        (
            {A: (9.0, 3.0), B: (9.0, 1.0)},
            ("rollout={placement: colocated}", "scaling.gpus_per_worker=2"),
            r"do not fit on the nodes.*each must fit on one node",
        ),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    nodes: dict[str, tuple[float, float]],
    overrides: tuple[str, ...],
    problem: str | None,
) -> None:
    resources = [{"CPU": cpus, "GPU": gpus} for cpus, gpus in nodes.values()]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": r} for r in resources])
    monkeypatch.setattr(
        cluster.ray, "cluster_resources", lambda: {k: sum(r[k] for r in resources) for k in ("CPU", "GPU")}
    )
    config = online(make_config, "2", *overrides)
    if problem is None:
        cluster.check_size(config)
    else:
        with pytest.raises(ConfigError, match=problem):
            cluster.check_size(config)


@pytest.mark.parametrize(("gpus", "backend"), [(0, "gloo"), (1, "cpu:gloo,cuda:nccl"), (0.5, "cpu:gloo,cuda:nccl")])
def test_the_process_group_under_ray(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, gpus: float, backend: str
) -> None:
    """The backend covers CPU and CUDA tensors, and the timeout is two hours.

    Regression: Ray's default is nccl alone with half an hour. Tensors on the CPU (offloaded norms, checkpoints) had no
    backend.
    """
    found: dict[str, Any] = {}
    monkeypatch.setattr(group, "Trainer", lambda *_, **named: found.update(named))
    config = make_config(f"scaling.gpus_per_worker={gpus}", "scaling.workers=1", "accelerator.name=ddp")
    group._trainer(config, config, cast(Any, None), {}, 1, None)
    assert (found["torch_config"].backend, found["torch_config"].timeout_s) == (backend, 7200)
    assert found["scaling_config"].use_gpu is bool(gpus)


def test_a_resize_waits_until_the_previous_group_has_given_back_its_place(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the group after a resize had the size of what was free at that moment, and was resized again."""
    config = make_config("scaling.workers=[1,2]", "accelerator.name=ddp", "batch.micro_size=1")
    nodes = [{"Alive": True, "NodeID": node, "Resources": {"CPU": 1.0}} for node in (A, B)]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(cluster, "draining_nodes", set)
    fit = iter([1, 1, 1, 2])
    monkeypatch.setattr(supervisor, "workers_that_fit", lambda _: next(fit))
    run = supervisor.Supervisor(config, cast(Any, None), [], cast(Any, SimpleNamespace(events=None)), cast(Any, None))
    run._began = True
    assert run._wait_for_resources() == 2
    monkeypatch.setattr(supervisor, "workers_that_fit", lambda _: 1)
    run._began = False
    assert run._wait_for_resources() == 1, "nothing to wait for at the start"
    monkeypatch.setattr(cluster, "draining_nodes", lambda: {B})
    run._began = True
    assert run._wait_for_resources() == 1, "no larger group fits without the node that leaves"
