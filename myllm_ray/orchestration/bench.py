"""`bench`: trains a config for a few steps, where it would run, and returns the figures of the steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from myllm_ray.common.files import read_jsonl
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.load import validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.engine.run_folder import folder_of
from myllm_ray.orchestration.launch import train

WARM_UP = 3
"""Steps before those that are measured: allocation, kernel selection, compilation."""
_PEAK_SIZE, _PEAK_SECONDS = 1024, 0.5
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class BenchResult:
    """Medians over the measured steps.

    Attributes:
        steps: number of measured steps.
        step_seconds: seconds per step, without evaluation and checkpoints.
        tokens_per_second: trained tokens per second, of all workers.
        tflops_per_second: model TFLOP/s of one worker.
        mfu: share of the peak FLOP/s; None if the peak is not known.
        peak_tflops: the peak that `mfu` refers to.
        peak_source: where the peak comes from.
        seconds: seconds per step in each phase.
        host_memory, device_memory: peak of rank 0 in bytes; the latter is None without CUDA.
    """

    steps: int
    step_seconds: float
    tokens_per_second: float
    tflops_per_second: float | None
    mfu: float | None
    peak_tflops: float | None
    peak_source: str
    seconds: dict[str, float]
    host_memory: float
    device_memory: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def bench(config: TrainerConfig, steps: int = 10, verbose: bool = False) -> BenchResult:
    """Trains `WARM_UP` + `steps` steps and returns the medians of the last `steps`.

    No checkpoint is written, and nothing is evaluated. The run's folder is `<run.storage>/<run.name>-bench`.

    Args:
        config: the run's config.
        steps: number of steps that are measured.
        verbose: show Ray's own logs.

    Raises:
        ConfigError: `steps` is not positive.
    """
    if steps < 1:
        raise ConfigError(f"bench: give --steps 1 or more (got {steps})")
    raw = config.model_dump(mode="json")
    # A multiple of the steps of a batch (PPO, GRPO).
    total = -(-(WARM_UP + steps) // config.steps_per_batch) * config.steps_per_batch
    raw["run"] |= {"name": f"{config.run.name}-bench", "max_steps": total, "epochs": None, "overwrite": True}
    raw["run"] |= {"amendments": [], "budget": None}
    raw["checkpoint"] |= {"every_steps": None, "at_end": False, "resume": "never", "mirror": None}
    raw["evaluation"] |= {"every_steps": None, "at_start": False, "at_end": False, "tasks": []}
    raw["logging"] |= {"every_steps": 1, "profile": None}
    raw["callbacks"], raw["tracking"] = ["jsonl"], []
    short = validate(raw, where="bench")
    train(short, verbose=verbose)
    rows = [row for row in read_jsonl(Path(folder_of(short)) / "metrics.jsonl") if row.get("step", 0) > WARM_UP]
    return _result(rows, short)


def _result(rows: Sequence[Mapping[str, Any]], config: TrainerConfig) -> BenchResult:
    def median(name: str) -> float | None:
        found = [float(row[name]) for row in rows if name in row]
        return statistics.median(found) if found else None

    phases = sorted({name for row in rows for name in row if name.startswith("time/")})
    seconds = {name.removeprefix("time/"): median(name) or 0.0 for name in phases}
    tflops, mfu, source = median("tflops_per_second"), median("mfu"), "accelerator.peak_tflops, or the table of GPUs"
    peak = tflops / mfu if tflops and mfu else None
    on_cpu = config.accelerator.device != "cuda" and not torch.cuda.is_available()
    if peak is None and tflops is not None and on_cpu:
        threads = max(1, int(config.scaling.cpus_per_worker))
        peak = measured_peak(config.accelerator.precision, threads) / 1e12
        mfu, source = tflops / peak, f"a product of {_PEAK_SIZE} x {_PEAK_SIZE} matrices, measured here"
    times = [float(row["time"]) for row in rows]
    between = [b - a for a, b in pairwise(times)]
    inside = sum(value for name, value in seconds.items() if name not in ("checkpoint", "communication"))
    return BenchResult(
        steps=len(rows),
        step_seconds=statistics.median(between) if between else inside,
        tokens_per_second=median("tokens_per_second") or 0.0,
        tflops_per_second=tflops,
        mfu=mfu,
        peak_tflops=peak,
        peak_source=source if peak else "not known",
        seconds=seconds,
        host_memory=max((float(row.get("memory/host_peak", 0.0)) for row in rows), default=0.0),
        device_memory=max(
            (float(row["memory/device_peak"]) for row in rows if "memory/device_peak" in row), default=None
        ),
    )


def measured_peak(precision: str, threads: int) -> float:
    """Returns the FLOP/s of a large matrix product on this CPU.

    Args:
        precision: fp32, bf16 or fp16.
        threads: number of threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.ones(_PEAK_SIZE, _PEAK_SIZE, dtype=_DTYPES[precision])
        best, until = float("inf"), time.perf_counter() + _PEAK_SECONDS
        while time.perf_counter() < until:
            started = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return 2 * _PEAK_SIZE**3 / best
