"""Queries the state of the Ray cluster (how many workers fit, which nodes are about to leave), and ends processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any, cast

import ray
from ray._private.state import state  # the State API proper asks the dashboard, which may be off
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import ScalingSection
from myllm_ray.config.trainers import rollout_of
from myllm_ray.orchestration.failures import clearly


def worker_resources(scaling: ScalingSection) -> dict[str, float]:
    """Returns the resources that one worker reserves, by Ray's resource names."""
    resources = {"CPU": scaling.cpus_per_worker, **scaling.resources_per_worker}
    if scaling.gpus_per_worker:
        resources["GPU"] = scaling.gpus_per_worker
    return resources


def on_a_worker(config: TrainerConfig) -> Callable[..., Any]:
    """Returns a function that calls another one in a Ray task with the resources of one worker.

    The returned function takes the function to call and its arguments, and blocks until the task has ended. Errors are
    raised as `failures.clearly` raises them.
    """
    resources = {
        name: amount for name, amount in worker_resources(config.scaling).items() if name not in ("CPU", "GPU")
    }
    options = {
        "num_cpus": config.scaling.cpus_per_worker,
        "num_gpus": config.scaling.gpus_per_worker,
        "resources": resources,
        "max_retries": 0,
    }

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        task: Any = cast(Any, ray).remote(**options)(function)
        return clearly(lambda: ray.get(task.remote(*arguments)))

    return call


def rollout_actors(config: TrainerConfig) -> int:
    """Returns the number of rollout actors per worker. Each reserves the same CPUs and GPUs as a worker."""
    rollout = rollout_of(config)
    return rollout.actors if rollout is not None and rollout.placement == "actors" else 0


def cpus_needed(config: TrainerConfig, workers: int) -> float:
    """Returns the CPUs that the workers and their actors reserve, plus one for the tasks of Ray Data if it is used."""
    # Without a free CPU the data tasks are never scheduled, and training waits without limit.
    return workers * (1 + rollout_actors(config)) * config.scaling.cpus_per_worker + (config.data.feed == "ray")


def fitting(config: TrainerConfig, nodes: Collection[Mapping[str, float]], most: int) -> int:
    """Returns how many workers, together with their rollout actors, fit on the nodes.

    Args:
        config: the run's config.
        nodes: the resources of each node, by name.
        most: upper bound of the result.
    """
    workers = slots(nodes, worker_resources(config.scaling))
    # Actors reserve only CPUs and GPUs. Without custom resources, actors and workers need the same.
    places = slots(nodes, {n: a for n, a in worker_resources(config.scaling).items() if n in ("CPU", "GPU")})
    return min(workers, places // (1 + rollout_actors(config)), most)


def check_size(config: TrainerConfig) -> None:
    """Checks that the cluster as a whole is large enough for the run.

    Raises:
        ConfigError: the cluster is too small; the message names the missing resource.
    """
    has, workers, actors = ray.cluster_resources(), config.worker_counts()[0], rollout_actors(config)
    need = worker_resources(config.scaling)
    wanted = {name: workers * amount * (1 + actors if name in ("CPU", "GPU") else 1) for name, amount in need.items()}
    wanted["CPU"] = cpus_needed(config, workers)
    beside = f" and {actors} rollout actor{'s' * (actors > 1)} beside each" if actors else ""
    for name, amount in wanted.items():
        if amount > has.get(name, 0):
            extra = " (one of them for reading data)" if name == "CPU" and config.data.feed == "ray" else ""
            raise ConfigError(
                f"scaling.workers={workers}{beside} need {amount:g} {name}{extra}, the Ray cluster has "
                f"{has.get(name, 0):g}: use fewer workers{' or rollout.actors' if actors else ''} or a larger cluster"
            )
    if fitting(config, [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]], workers) < workers:
        raise ConfigError(
            f"scaling.workers={workers}{beside} of {need} do not fit on the nodes of the Ray cluster, though together "
            "they have enough: each must fit on one node; lower scaling.cpus_per_worker or gpus_per_worker"
        )


def draining_nodes() -> set[str]:
    """Returns the ids of the nodes that are about to leave (preemption, scaling down), as reported to Ray."""
    return set(state.get_draining_nodes())


def workers_that_fit(config: TrainerConfig, placed: Iterable[str] = ()) -> int:
    """Returns the largest number of workers of `scaling.workers` that can run now; 0 if not even the least fits.

    Args:
        config: the run's config.
        placed: the node id of every worker that runs at present. Workers on nodes that stay keep their place; further
            workers must fit into the free resources.
    """
    leaving, placed = draining_nodes(), list(placed)
    staying = sum(node not in leaving for node in placed)
    free = [has for node, has in state.available_resources_per_node().items() if node not in leaving]
    capacity = fitting(config, free, config.scaling.most)
    cpus = sum(has.get("CPU", 0.0) for has in free)
    for count in reversed(config.worker_counts()):
        more = max(0, count - staying)
        # With Ray Data, further workers need a free CPU for reading data. The present group may or may not use its one
        # right now, so a group that needs no further workers and loses none passes without this check.
        enough = more <= capacity and (cpus >= cpus_needed(config, more) or (more == 0 and staying == len(placed) > 0))
        if enough:
            return count
    return 0


def largest_group(config: TrainerConfig) -> int:
    """Returns the largest number of workers of `scaling.workers` for which the nodes that stay are large enough.

    Resources that are in use count as free, unlike in `workers_that_fit`.
    """
    leaving = draining_nodes()
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    capacity, cpus = fitting(config, nodes, config.scaling.most), sum(has.get("CPU", 0.0) for has in nodes)
    return max((n for n in config.worker_counts() if n <= capacity and cpus_needed(config, n) <= cpus), default=0)


def slots(nodes: Iterable[Mapping[str, float]], need: Mapping[str, float]) -> int:
    """Returns how often `need` fits on the nodes, each time on one node. Both map resource names to amounts."""
    # The small constant absorbs the rounding of fractional resources.
    return sum(min(int(has.get(name, 0.0) / amount + 1e-6) for name, amount in need.items() if amount) for has in nodes)


def remove_group(identity: str) -> None:
    """Removes a placement group by its id (hex), with the actors that run in it. Does nothing if it does not exist."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    if placement_group_table().get(identity, {}).get("state", "REMOVED") != "REMOVED":
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(identity))))


def kill_process(beat: Mapping[str, Any]) -> None:
    """Sends SIGKILL to the worker that wrote this heartbeat.

    Args:
        beat: the worker's heartbeat, with its `node` (id) and `pid`.
    """
    # A stopped process (SIGSTOP) handles no other signal. On a node that is gone the process has ended already.
    node = beat.get("node")
    if node not in {n["NodeID"] for n in ray.nodes() if n["Alive"]}:
        return

    @ray.remote(num_cpus=0, max_retries=0)
    def kill(pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    # A task on the worker's own node, because a pid is valid only there. It reserves no CPU: all may be in use.
    strategy = NodeAffinitySchedulingStrategy(node_id=str(node), soft=False)
    ray.get(kill.options(scheduling_strategy=strategy).remote(int(beat["pid"])), timeout=60)
