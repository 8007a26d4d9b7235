"""Measures what logging and experiment trackers cost per step at `logging.every_steps: 1`.

    python benchmarks/overhead.py [ROUNDS]

Each round trains the same run once per kind, in alternating order:

    none        no callback
    default     console (plain lines), jsonl and report
    trackers    the default, with TensorBoard, W&B (offline), MLflow (SQLite) and trackio (local)
    blocked     the default, with MLflow on a server that accepts connections and never answers
    killed      the default, with MLflow on a server that refuses connections

Prints the median time of a step of each run, and for each kind the median and the range of its ratios to `none` of the
same round. The delivery processes of trackers run at low priority on other cores. On a machine without a free core
they take a part of the time of the training thread, which the ratios then contain.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from console import Clock, config

from myllm_ray.config.load import validate
from myllm_ray.preparation import build_callbacks
from myllm_ray.worker import run_local

_STEPS, _WARM = 240, 20
_DEFAULT = [{"console": {"format": "plain"}}, "jsonl", "report"]


def silent_server() -> socket.socket:
    """Returns a listening socket that no process ever reads from."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen(100)
    return server


def closed_port() -> int:
    """Returns a port on which no server listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def trackers_of(kind: str, folder: Path, silent: socket.socket) -> list[dict[str, Any]]:
    """Returns the section `tracking` of a kind."""
    if kind == "trackers":
        return [
            {"name": "tensorboard"},
            {"name": "wandb", "mode": "offline"},
            {"name": "mlflow", "uri": f"sqlite:///{folder}/mlflow.db"},
            {"name": "trackio", "folder": str(folder / "trackio")},
        ]
    ports = {"blocked": silent.getsockname()[1], "killed": closed_port()}
    return [{"name": "mlflow", "uri": f"http://127.0.0.1:{ports[kind]}", "wait_seconds": 1}] if kind in ports else []


def seconds_per_step(folder: Path, name: str, kind: str, silent: socket.socket) -> float:
    """Returns the median time of a step of one run, without the first steps."""
    raw = config(folder, name)
    raw["run"]["max_steps"] = _STEPS
    raw["callbacks"] = [] if kind == "none" else _DEFAULT
    raw["tracking"] = trackers_of(kind, folder, silent)
    checked, clock = validate(raw), Clock()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        run_local(checked, [*build_callbacks(checked), clock])
    times = clock.times[_WARM:]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def main(rounds: int) -> None:
    """Prints the times and the ratios."""
    torch.set_num_threads(1)
    kinds = ["none", "default", "trackers", "blocked", "killed"]
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as name, silent_server() as silent:
        for number in range(rounds):
            for kind in kinds if number % 2 else reversed(kinds):
                times[kind].append(seconds_per_step(Path(name), f"{kind}-{number}", kind, silent))
    for kind, found in times.items():
        ratios = sorted(b / a for a, b in zip(times["none"], found, strict=True))
        print(
            f"{kind}: {', '.join(f'{1000 * t:.2f}' for t in found)} ms a step; ratio {statistics.median(ratios):.4f} "
            f"({ratios[0]:.4f} to {ratios[-1]:.4f})"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
