"""Runs on real process groups without Ray: as many processes as asked for, one run after the other in each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine  # noqa: F401  (applies TEST_CPU in spawned processes)
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from myllm_ray.config import TrainerConfig, validate
from myllm_ray.data.prepare import PreparedData, prepare
from myllm_ray.engine.run_folder import claim
from myllm_ray.worker import absolute, check_model, check_names, run_worker

BACKENDS: dict[str, list[str]] = {
    **{name: [f"accelerator.name={name}"] for name in ("single", "ddp", "fsdp", "accelerate")},
    **{f"deepspeed-{n}": ["accelerator.name=deepspeed", f"accelerator.stage={n}"] for n in range(4)}}
SHARED = [name for name in BACKENDS if name != "single"]


def _process(rank: int, world: int, store: str, jobs: list[tuple[dict[str, Any], PreparedData]]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for raw, prepared in jobs:
        while run_worker(validate(raw), prepared)["rewound"]:
            pass
    leave()


def leave() -> None:
    """End a spawned process. Not through the interpreter's end: now and then a thread of torch is not joined by then, and aborts."""
    dist.destroy_process_group()
    os._exit(0)


def _as_rank(_: int, rank: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    target(rank, *arguments)


def spawn(target: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    """`target(rank, *arguments)` in `world` processes, each with a PYTHONHASHSEED of its own: sets iterate differently on each rank."""
    contexts, before = [], os.environ.get("PYTHONHASHSEED")
    try:
        for rank in range(world):
            os.environ["PYTHONHASHSEED"] = str(2 * rank + 1)
            contexts.append(mp.spawn(_as_rank, (rank, target, arguments), nprocs=1, join=False))
    finally:
        os.environ.pop("PYTHONHASHSEED")
        if before is not None:
            os.environ["PYTHONHASHSEED"] = before
    together = mp.ProcessContext([c.processes[0] for c in contexts], [c.error_files[0] for c in contexts])
    while not together.join():
        pass


def run_all(world: int, configs: list[TrainerConfig]) -> list[Path]:
    """Run the configs in `world` processes (1: in this one, without a group); returns the folders."""
    configs = [absolute(c) for c in configs]
    jobs = []
    for config in configs:
        check_names(config)
        prepared = prepare(config)
        check_model(config, prepared)
        claim(config, prepared.identity)
        jobs.append((config.model_dump(mode="json"), prepared))
        if world == 1:
            while run_worker(config, prepared)["rewound"]:
                pass
    if world > 1:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_process, (world, f"{folder}/store", jobs), world)
    return [Path(c.run.storage) / c.run.name for c in configs]

