"""Measures the start, the steps, the end and the memory of a run on Ray, next to a plain TorchTrainer.

    python benchmarks/start.py [--workers 1 2] [--rounds 3] [--steps 12] [--sides ours peer local] [--set KEY=VALUE ...]

The sides alternate:

    ours     `myllm-ray train` with `scaling.workers` workers, on a Ray of its own
    peer     a plain TorchTrainer with the same model, rows, optimizer and checkpoint (start_peer.py), with the defaults
             of Ray
    local    `myllm-ray train` without Ray: in one process, or in `torchrun` for several workers

The tokenized data is in the cache (`ours`, `local`) or in one file (`peer`) before the clock starts. Printed for each
side and number of workers, as medians with the range: seconds from the start of the process to the end of the first
step; the median step after the first three, in milliseconds; seconds from the last step to the exit of the process;
and the peak of the memory of all processes (proportional set size, sampled every half second), in MB. Ratios are of
the medians. With `--phases` one run of ours is timed by the events of the run instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from peers import here, model_config

from myllm_ray.common.types import RunState
from myllm_ray.engine.callbacks import Callback

LENGTH, BATCH, ROWS = 512, 4, 64
_WARM = 3
_SECONDS = 0.5


class StepTimes(Callback):
    """Appends the time at the end of each step to a file, on rank 0."""

    main_only = True

    def __init__(self, path: str):
        self._path = path

    def on_step_end(self, state: RunState) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{time.time()}\n")


def write_data(folder: Path) -> None:
    """Writes the same number of random tokens as texts, for this package, and as one file of tokens, for the peer."""
    letters = np.random.default_rng(0).integers(97, 123, (ROWS, LENGTH - 1))
    texts = ["".join(map(chr, row)) for row in letters.tolist()]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    np.pad(letters.astype(np.int32), ((0, 0), (0, 1))).tofile(folder / "tokens.bin")


def our_config(folder: Path, workers: int, steps: int, times: Path) -> dict[str, Any]:
    """Returns the config of this package's run."""
    return {
        "trainer": "pretrain",
        "model": {"config": {k: v for k, v in model_config("4k").items() if k != "vocab_size"}},
        "tokenizer": {"kind": "bytes"},
        "data": {
            "train": {"path": str(folder / "rows.jsonl"), "format": "text"},
            "sequence_length": LENGTH,
            "cache": str(folder / "cache"),
        },
        "batch": {"global_size": BATCH, "micro_size": BATCH // max(1, workers)},
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "scheduler": {"name": "linear", "warmup_steps": 0},
        "accelerator": {"name": "ddp" if workers > 1 else "single"},
        "scaling": {"workers": workers},
        "run": {"name": times.stem, "storage": str(folder / "runs"), "max_steps": steps},
        "logging": {"every_steps": 1},
        "callbacks": ["console", "jsonl", "report", {"start:StepTimes": {"path": str(times)}}],
    }


def command_of(side: str, folder: Path, workers: int, steps: int, times: Path, changes: list[str]) -> list[str]:
    """Writes the files of one run and returns its command."""
    job = folder / f"{times.stem}.json"
    if side == "peer":
        model = model_config("4k") | {"vocab_size": 260}
        made = {"model": model, "tokens": str(folder / "tokens.bin"), "length": LENGTH, "batch": BATCH}
        made |= {"workers": workers, "steps": steps, "times": str(times), "storage": str(folder / "ray")}
        job.write_text(json.dumps(made | {"checkpoint": str(folder / "checkpoint.pt")}), encoding="utf-8")
        return [sys.executable, here(__file__).replace("start.py", "start_peer.py"), str(job)]
    raw = our_config(folder, workers, steps, times)
    if side == "local":
        raw["scaling"]["workers"] = 0
    job.write_text(json.dumps(raw), encoding="utf-8")
    if side == "local" and workers > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "-m", "myllm_ray.cli"]
    else:
        launch = ["-m", "myllm_ray.cli"]
    return [sys.executable, *launch, "train", str(job), *changes]


def memory_of(process: psutil.Process) -> float:
    """Returns the proportional set size of a process and all its descendants, in MB."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            text = Path(f"/proc/{each.pid}/smaps_rollup").read_text(encoding="ascii")
        except OSError:  # it has ended, or belongs to another user
            continue
        total += next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)
    return total / 1000


def measure(command: list[str], times: Path) -> dict[str, float]:
    """Runs a command and returns the times and the memory of the run.

    Raises:
        SystemExit: the command has failed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    path = os.pathsep.join([str(Path(here(__file__)).parent), os.environ.get("PYTHONPATH", "")])
    log = times.with_suffix(".log")
    begun, peak = time.time(), 0.0
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, env={**environment, "PYTHONPATH": path}, stdout=file, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            try:
                peak = max(peak, memory_of(psutil.Process(process.pid)))
            except psutil.NoSuchProcess:
                break
            time.sleep(_SECONDS)
    code, ended = process.wait(), time.time()
    if code:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    steps = [float(line) for line in times.read_text(encoding="utf-8").split()]
    gaps = [b - a for a, b in itertools.pairwise(steps[_WARM - 1 :])]
    return {
        "first_step_s": steps[0] - begun,
        "step_ms": 1000 * statistics.median(gaps),
        "end_s": ended - steps[-1],
        "memory_mb": peak,
    }


def main() -> None:
    """Measures all sides and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--sides", nargs="+", default=["ours", "peer", "local"], choices=["ours", "peer", "local"])
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the config of ours and local")
    parser.add_argument("--keep", type=Path, help="folder of the runs; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = given.keep or Path(name)
        folder.mkdir(exist_ok=True)
        write_data(folder)
        warm = folder / "warm.times"
        measure(command_of("local", folder, 1, 4, warm, []), warm)  # fills the cache of prepared data
        for workers in given.workers:
            found: dict[str, list[dict[str, float]]] = {side: [] for side in given.sides}
            for number in range(given.rounds):
                for side in given.sides if number % 2 == 0 else reversed(given.sides):
                    times = folder / f"{side}-{workers}-{number}.times"
                    changes = given.set if side != "peer" else []
                    command = command_of(side, folder, workers, given.steps, times, changes)
                    found[side].append(measure(command, times))
                    print(json.dumps({"side": side, "workers": workers, **_rounded(found[side][-1])}), flush=True)
            medians = {
                side: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for side, runs in found.items()
            }
            for side, median in medians.items():
                spread = {k: [round(f(r[k] for r in found[side]), 2) for f in (min, max)] for k in median}
                line = {"benchmark": "start", "side": side, "workers": workers, **_rounded(median), "range": spread}
                if side != "ours" and "ours" in medians:
                    line["ours_to_this"] = {k: round(medians["ours"][k] / v, 3) for k, v in median.items()}
                print(json.dumps(line), flush=True)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


if __name__ == "__main__":
    main()
