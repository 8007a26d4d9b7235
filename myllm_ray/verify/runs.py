"""Runs of a small config with different backends and splits of the batch.

Each run has its own folder and its own number of processes. It calls `run_worker`, as a run of `train` does.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from myllm_ray.common import distributed
from myllm_ray.common.files import read_jsonl
from myllm_ray.config.errors import UserError
from myllm_ray.config.load import apply_override, validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.prepare import PreparedData
from myllm_ray.engine.checkpointing.manager import read_tensors
from myllm_ray.engine.run_folder import folder_of
from myllm_ray.preparation import absolute, prepare_run
from myllm_ray.worker import run_worker


@dataclass(frozen=True)
class Variant:
    """One way to run the config: a backend, a number of workers, and a size of the micro-batches."""

    backend: str
    workers: int
    micro_size: int
    accelerator: str = "{}"
    """Overrides of the `accelerator` section, as JSON, so that a variant is hashable."""
    changes: tuple[str, ...] = ()
    """Further overrides, each `key=value`."""

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        parts = [self.backend, str(self.workers), str(self.micro_size), *self.changes]
        return re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join(parts))

    def __str__(self) -> str:
        return f"{self.backend}, {self.workers} worker{'s' * (self.workers > 1)}, micro-batches of {self.micro_size}"


@dataclass
class Trace:
    """The record of a run.

    `rows` contains the hash of the batch, the learning rate, the loss and the gradient norm of each step. `error` is
    the error of a run that failed.
    """

    folder: Path
    rows: list[dict[str, Any]]
    error: str | None = None
    parameter_bytes: list[dict[str, tuple[int, int]]] = field(default_factory=list)
    """For each rank, by model: the bytes of parameters that the rank held, and the most that it should hold."""
    _weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def weights(self, step: int) -> dict[str, Tensor]:
        """Returns the weights after optimizer step `step` (counted from 1) by name, from its checkpoint."""
        if step not in self._weights:
            saved = read_tensors(self.folder / "checkpoints" / f"step-{step:08d}")
            self._weights[step] = {k: v for k, v in saved.items() if k.startswith("model.")}
        return self._weights[step]


class Runner:
    """Runs variants of a small config, each at most once.

    Args:
        config: The small config.
        folder: The parent folder of the runs' folders.
    """

    def __init__(self, config: TrainerConfig, folder: Path):
        self.config, self.folder = config, folder
        self._done: dict[Variant, Trace] = {}

    def run(self, variants: list[Variant]) -> list[Trace]:
        """Returns the traces of the variants, in their order. The trace of a variant that fails has an `error`."""
        left = [v for v in dict.fromkeys(variants) if v not in self._done]
        # All runs with the same number of workers share their processes, which saves the start of most of them.
        for workers in sorted({v.workers for v in left}):
            jobs = []
            for variant in (v for v in left if v.workers == workers):
                try:
                    config = self._configure(variant)
                    jobs.append((config.model_dump(mode="json"), prepare_run(config, warn=False)))
                    self._done[variant] = Trace(folder_of(config), [])
                except UserError as error:
                    self._done[variant] = Trace(self.folder, [], str(error))
            _run_jobs(workers, jobs)
        for variant in left:
            self._read(self._done[variant])
        return [self._done[v] for v in variants]

    def _configure(self, variant: Variant) -> TrainerConfig:
        """Returns the validated config of a variant."""
        raw = self.config.model_dump(mode="json")
        raw["accelerator"] = {**raw["accelerator"], **json.loads(variant.accelerator)}
        raw["batch"]["micro_size"] = variant.micro_size
        raw["scaling"]["workers"] = 0 if variant.workers == 1 else variant.workers
        raw["run"].update(name=variant.name, storage=str(self.folder))
        for change in variant.changes:
            apply_override(raw, change)
        return absolute(validate(raw))

    @staticmethod
    def _read(trace: Trace) -> None:
        """Fills a trace from the files in its run's folder."""
        if trace.error:
            return
        failed = trace.folder / "error.txt"
        if failed.exists():
            trace.error = failed.read_text(encoding="utf-8")
            return
        hashes = {row["step"]: row["tokens_hash"] for row in read_jsonl(trace.folder / "ledger.jsonl")}
        rows = [row for row in read_jsonl(trace.folder / "metrics.jsonl") if "learning_rate" in row]
        trace.parameter_bytes = [
            json.loads(path.read_text(encoding="utf-8")) for path in sorted(trace.folder.glob("bytes-*.json"))
        ]
        trace.rows = [{**row, "tokens_hash": hashes[row["step"]]} for row in rows]


def _run_jobs(workers: int, jobs: list[tuple[dict[str, Any], PreparedData]]) -> None:
    """Runs the jobs one after another on `workers` processes: in this process if `workers` is 1."""
    if not jobs:
        return
    if workers == 1:
        _run(jobs)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (workers, f"{folder}/store", jobs), nprocs=workers)


def _process(rank: int, world: int, store: str, jobs: list[tuple[dict[str, Any], PreparedData]]) -> None:
    """Runs the jobs as one rank of a spawned process group."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(minutes=2)
    )  # a short timeout: if a single rank fails, the others stop waiting for it after two minutes
    _run(jobs)
    dist.destroy_process_group()
    # Skips the shutdown of the interpreter: a thread of torch that is still running then sometimes aborts the process.
    sys.stdout.flush()
    os._exit(0)


def _run(jobs: list[tuple[dict[str, Any], PreparedData]]) -> None:
    """Runs the jobs one after another and writes the error of each failed one to its folder."""
    for raw, prepared in jobs:
        config = validate(raw)
        try:
            summary = run_worker(config, prepared)
            path = folder_of(config) / f"bytes-{distributed.rank():05d}.json"
            path.write_text(json.dumps(summary["parameter_bytes"]), encoding="utf-8")
        except Exception as error:  # a failed run is reported in the certificate and does not stop the others
            text = (
                str(error)
                if isinstance(error, UserError)
                else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
            (folder_of(config) / "error.txt").write_text(text, encoding="utf-8")
