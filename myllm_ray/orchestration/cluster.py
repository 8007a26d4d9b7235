"""What the cluster holds at this moment: how many workers fit, which nodes are about to leave, and a way to end a process."""

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
from myllm_ray.config.schema import ScalingSection, TrainerConfig
from myllm_ray.orchestration.failures import clearly


def worker_resources(scaling: ScalingSection) -> dict[str, float]:
    """What one worker reserves."""
    resources = {"CPU": scaling.cpus_per_worker, **scaling.resources_per_worker}
    if scaling.gpus_per_worker:
        resources["GPU"] = scaling.gpus_per_worker
    return resources


def on_a_worker(config: TrainerConfig) -> Callable[..., Any]:
    """Calls a function with arguments in a task that holds what one worker of the config would."""
    resources = {name: amount for name, amount in worker_resources(config.scaling).items() if name not in ("CPU", "GPU")}
    options = {"num_cpus": config.scaling.cpus_per_worker, "num_gpus": config.scaling.gpus_per_worker, "resources": resources, "max_retries": 0}

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        task: Any = cast(Any, ray).remote(**options)(function)
        return clearly(lambda: ray.get(task.remote(*arguments)))

    return call


def rollout_actors(config: TrainerConfig) -> int:
    """Actors that sample answers beside each worker; each reserves the CPUs and GPUs that a worker does."""
    rollout = getattr(config, "rollout", None)
    return rollout.actors if rollout is not None and rollout.placement == "actors" else 0


def cpus_needed(config: TrainerConfig, workers: int) -> float:
    """CPUs that the workers and their actors reserve, and one for the tasks of Ray Data, without which training would wait for ever."""
    return workers * (1 + rollout_actors(config)) * config.scaling.cpus_per_worker + 1


def fitting(config: TrainerConfig, nodes: Collection[Mapping[str, float]], most: int) -> int:
    """How many workers, up to `most`, fit into what the nodes have, together with their rollout actors."""
    workers = slots(nodes, worker_resources(config.scaling))
    # An actor needs no custom resources; where there are none, actors and workers take equal places.
    places = slots(nodes, {n: a for n, a in worker_resources(config.scaling).items() if n in ("CPU", "GPU")})
    return min(workers, places // (1 + rollout_actors(config)), most)


def check_size(config: TrainerConfig) -> None:
    """Refuse a run that the cluster as a whole is too small for.

    Raises:
        ConfigError: says what is missing.
    """
    has, workers, actors = ray.cluster_resources(), config.worker_counts()[0], rollout_actors(config)
    need = worker_resources(config.scaling)
    wanted = {name: workers * amount * (1 + actors if name in ("CPU", "GPU") else 1) for name, amount in need.items()}
    wanted["CPU"] = cpus_needed(config, workers)
    beside = f" and {actors} rollout actor{'s' * (actors > 1)} beside each" if actors else ""
    for name, amount in wanted.items():
        if amount > has.get(name, 0):
            extra = " (one of them for reading data)" if name == "CPU" else ""
            raise ConfigError(f"scaling.workers={workers}{beside} need {amount:g} {name}{extra}, the Ray cluster has "
                              f"{has.get(name, 0):g}: use fewer workers{' or rollout.actors' if actors else ''} or a larger cluster")
    if fitting(config, [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]], workers) < workers:
        raise ConfigError(f"scaling.workers={workers}{beside} of {need} do not fit on the nodes of the Ray cluster, though together "
                          "they have enough: each must fit on one node; lower scaling.cpus_per_worker or gpus_per_worker")


def draining_nodes() -> set[str]:
    """Nodes that Ray has been told will leave (preemption, scaling down), by id."""
    return set(state.get_draining_nodes())


def workers_that_fit(config: TrainerConfig, placed: Iterable[str] = ()) -> int:
    """The largest number of workers of `scaling.workers` that could run now; 0 if not even the least could.

    Args:
        placed: the node of every worker that runs at present. Those on nodes that stay have their place; more fit into what is
            free beside them, and beside a CPU for reading data, which they may be using at this moment or not.
    """
    leaving, placed = draining_nodes(), list(placed)
    staying = sum(node not in leaving for node in placed)
    free = [has for node, has in state.available_resources_per_node().items() if node not in leaving]
    room = fitting(config, free, config.scaling.most)
    cpus = sum(has.get("CPU", 0.0) for has in free)
    for count in reversed(config.worker_counts()):
        more = max(0, count - staying)
        enough = more <= room and (cpus >= cpus_needed(config, more) or (more == 0 and staying == len(placed) > 0))
        if enough:
            return count
    return 0


def slots(nodes: Iterable[Mapping[str, float]], need: Mapping[str, float]) -> int:
    """How often `need` fits into what the nodes have."""
    return sum(min(int(has.get(name, 0.0) / amount + 1e-6) for name, amount in need.items() if amount) for has in nodes)


def remove_group(identity: str) -> None:
    """Remove a placement group by its id (hex), and with it what runs in it, if it is still there."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    if placement_group_table().get(identity, {}).get("state", "REMOVED") != "REMOVED":
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(identity))))


def kill_process(beat: Mapping[str, Any]) -> None:
    """SIGKILL a worker that gave this sign of life, on its node: one that is stopped hears nothing else."""
    node = beat.get("node")
    if node not in {n["NodeID"] for n in ray.nodes() if n["Alive"]}:
        return

    @ray.remote(num_cpus=0, max_retries=0)
    def kill(pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    strategy = NodeAffinitySchedulingStrategy(node_id=str(node), soft=False)
    ray.get(kill.options(scheduling_strategy=strategy).remote(int(beat["pid"])), timeout=60)
