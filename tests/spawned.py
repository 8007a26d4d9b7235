"""Runs on real process groups without Ray: a given number of processes, and one run after the other in each.

A fork server that has imported torch, transformers and DeepSpeed (`preloaded`) starts the processes. Each is as clean
as a spawned process, and starts in tenths of a second instead of several seconds.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import machine
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from myllm_ray.config import TrainerConfig, validate
from myllm_ray.data.evaluation_rows import task_rows
from myllm_ray.data.prepare import PreparedData, prepare
from myllm_ray.engine.run_folder import claim
from myllm_ray.preparation import absolute, check_model, check_names, with_base
from myllm_ray.worker import run_worker

BACKENDS: dict[str, list[str]] = {
    **{name: [f"accelerator.name={name}"] for name in ("single", "ddp", "fsdp", "accelerate")},
    **{f"deepspeed-{n}": ["accelerator.name=deepspeed", f"accelerator.stage={n}"] for n in range(4)},
}
SHARED = [name for name in BACKENDS if name != "single"]


SERVERS: list[forkserver.ForkServer] = []
"""One server for even ranks and one for odd ranks, with different values of PYTHONHASHSEED."""


def start_processes(function: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    """Calls `function(rank, *arguments)` in `world` processes with this process's environment, and waits for them.

    Sets iterate in different orders in processes of even and odd rank.
    """
    if not SERVERS and not torch.cuda.is_available():  # a fork of a process that has queried the devices can't use them
        SERVERS.extend(_server(seed) for seed in (1, 3))
    contexts = []
    for rank in range(world):
        with _environment(PYTHONHASHSEED=str(rank % 2 * 2 + 1)):
            inherited = (rank, dict(os.environ), function, arguments)
            if SERVERS:
                forkserver.connect_to_new_process = SERVERS[rank % 2].connect_to_new_process  # type: ignore[assignment]
            contexts.append(
                mp.start_processes(
                    _enter, inherited, nprocs=1, join=False, start_method="forkserver" if SERVERS else "spawn"
                )
            )
    together = mp.ProcessContext([c.processes[0] for c in contexts], [c.error_files[0] for c in contexts])
    while not together.join():
        pass


def _server(seed: int) -> forkserver.ForkServer:
    """Returns a fork server with this process's import path, so that it imports the same files."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(["preloaded", "pytest"])
    with _environment(PYTHONHASHSEED=str(seed), PYTHONPATH=os.pathsep.join(str(Path(p).absolute()) for p in sys.path)):
        server.ensure_running()
    return server


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _enter(
    _: int, rank: int, environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    machine.apply_cpu()
    machine.apply_cores()
    function(rank, *arguments)


def _process(rank: int, world: int, store: str, jobs: list[tuple[dict[str, Any], PreparedData]]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), OMP_NUM_THREADS="1"
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for raw, prepared in jobs:
        while rewinds(run_worker(validate(raw), prepared)):
            pass
    leave()


def rewinds(summary: dict[str, Any]) -> bool:
    """Returns whether the run continues immediately from a checkpoint."""
    return summary["exit"] is not None and summary["exit"].kind in ("rewind", "amended")


def leave() -> None:
    """Ends a spawned process without the interpreter's shutdown.

    During a normal shutdown a torch thread that is not yet joined sometimes aborts the process.
    """
    dist.destroy_process_group()
    os._exit(0)


def run_all(world: int, configs: list[TrainerConfig], whole: bool = False) -> list[Path]:
    """Runs the configs in `world` processes (1: in this process, without a group) and returns the run folders.

    `whole`: checkpoints hold the frozen weights too.
    """
    configs = [absolute(c) for c in configs]
    jobs = []
    for config in configs:
        check_names(config)
        prepared = prepare(config)
        prepared = replace(prepared, tasks=task_rows(config, prepared.tokenizer_folder))
        check_model(config, prepared)
        prepared = prepared if whole else with_base(config, prepared)
        claim(config, prepared.identity)
        jobs.append((config.model_dump(mode="json"), prepared))
        if world == 1:
            while rewinds(run_worker(config, prepared)):
                pass
    if world > 1:
        with tempfile.TemporaryDirectory() as folder:
            start_processes(_process, (world, f"{folder}/store", jobs), world)
    return [Path(c.run.storage) / c.run.name for c in configs]
