"""Small runs of a config, each in its own folder, on as many processes as it asks for. They are real runs: `run_worker`."""

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
from myllm_ray.engine.checkpoint import read_tensors
from myllm_ray.engine.run_folder import folder_of
from myllm_ray.worker import absolute, prepare_run, run_worker


@dataclass(frozen=True)
class Variant:
    """One way to run the config: a backend (overrides of its `accelerator` section), and a cut of the batch."""

    backend: str
    workers: int
    micro_size: int
    accelerator: str = "{}"
    """JSON: overrides of the `accelerator` section."""
    changes: tuple[str, ...] = ()
    """Further overrides, `key=value`."""

    @property
    def name(self) -> str:
        """A folder's."""
        parts = [self.backend, str(self.workers), str(self.micro_size), *self.changes]
        return re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join(parts))

    def __str__(self) -> str:
        return f"{self.backend}, {self.workers} worker{'s' * (self.workers > 1)}, micro-batches of {self.micro_size}"


@dataclass
class Trace:
    """What a run did: per step its batch, learning rate, loss and gradient norm, and the weights after it."""

    folder: Path
    rows: list[dict[str, Any]]
    error: str | None = None
    parameter_bytes: list[dict[str, tuple[int, int]]] = field(default_factory=list)
    """By rank: what it held of each model's parameters, and the most that it should have held."""
    _weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def weights(self, step: int) -> dict[str, Tensor]:
        """By name, after optimizer step `step` (counted from 1)."""
        if step not in self._weights:
            saved = read_tensors(self.folder / "checkpoints" / f"step-{step:08d}")
            self._weights[step] = {k: v for k, v in saved.items() if k.startswith("model.")}
        return self._weights[step]


class Runner:
    """Runs variants of a small config, each once.

    Args:
        config: the small config.
        folder: where the runs' folders go.
    """

    def __init__(self, config: TrainerConfig, folder: Path):
        self.config, self.folder = config, folder
        self._done: dict[Variant, Trace] = {}

    def run(self, variants: list[Variant]) -> list[Trace]:
        """Traces of the variants; one that can't be run has an `error`."""
        left = [v for v in dict.fromkeys(variants) if v not in self._done]
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
        if trace.error:
            return
        failed = trace.folder / "error.txt"
        if failed.exists():
            trace.error = failed.read_text(encoding="utf-8")
            return
        hashes = {row["step"]: row["tokens_hash"] for row in read_jsonl(trace.folder / "ledger.jsonl")}
        rows = [row for row in read_jsonl(trace.folder / "metrics.jsonl") if "learning_rate" in row]
        trace.parameter_bytes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(trace.folder.glob("bytes-*.json"))]
        trace.rows = [{**row, "tokens_hash": hashes[row["step"]]} for row in rows]


def _run_jobs(workers: int, jobs: list[tuple[dict[str, Any], PreparedData]]) -> None:
    if not jobs:
        return
    if workers == 1:
        _run(jobs)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (workers, f"{folder}/store", jobs), nprocs=workers)


def _process(rank: int, world: int, store: str, jobs: list[tuple[dict[str, Any], PreparedData]]) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world,
                            timeout=timedelta(minutes=2))  # where one rank fails alone, the others wait no longer
    _run(jobs)
    dist.destroy_process_group()
    # Not through the interpreter's own end: now and then a thread of torch is not joined by then, and aborts the process.
    sys.stdout.flush()
    os._exit(0)


def _run(jobs: list[tuple[dict[str, Any], PreparedData]]) -> None:
    for raw, prepared in jobs:
        config = validate(raw)
        try:
            summary = run_worker(config, prepared)
            path = folder_of(config) / f"bytes-{distributed.rank():05d}.json"
            path.write_text(json.dumps(summary["parameter_bytes"]), encoding="utf-8")
        except Exception as error:  # one way that does not work is a line of the certificate, not the end of it
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            (folder_of(config) / "error.txt").write_text(text, encoding="utf-8")

