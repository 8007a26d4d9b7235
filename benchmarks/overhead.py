"""Measures what logging and experiment trackers cost per step at `logging.every_steps: 1`.

    python benchmarks/overhead.py [ROUNDS [STEPS]]

Each round trains the same run once per kind, in alternating order:

    none        no callback
    default     console (plain lines), jsonl and report
    trackers    the default, with TensorBoard, W&B (offline), MLflow (SQLite) and trackio (local)
    blocked     the default, with MLflow on a server that accepts connections and never answers
    killed      the default, with MLflow on a server that refuses connections

Prints the median time of a step of each run, and for each kind the median and the range of its ratios to `none` of the
same round. The share of the training thread's CPU time that all callbacks take is printed, too: it does not depend on
other processes of the machine, as ratios of wall times do. The delivery processes of trackers run at low priority on
other cores. On a machine without a free core they take a part of the time of the training thread, which the ratios then
contain.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from console import Clock, config

from myllm_ray.config.load import validate
from myllm_ray.engine.callbacks import CallbackList
from myllm_ray.engine.configured import build_callbacks
from myllm_ray.worker import run_local

_WARM = 20
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


class Share:
    """Adds up the CPU time that the training thread spends in callbacks."""

    def __init__(self) -> None:
        self.own = 0.0
        self._emit = CallbackList.emit

    def __enter__(self) -> Share:
        share, emit = self, self._emit

        def timed(callbacks: CallbackList, *arguments: Any) -> None:
            before = time.thread_time()
            emit(callbacks, *arguments)
            share.own += time.thread_time() - before

        CallbackList.emit = timed  # type: ignore[method-assign]
        self._before = time.thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        CallbackList.emit = self._emit  # type: ignore[method-assign]
        self.share = self.own / (time.thread_time() - self._before)


def seconds_per_step(folder: Path, name: str, kind: str, silent: socket.socket, steps: int) -> tuple[float, float]:
    """Returns the median time of a step of one run, without the first steps, and the share of its callbacks."""
    raw = config(folder, name)
    raw["run"]["max_steps"] = steps
    raw["callbacks"] = [] if kind == "none" else _DEFAULT
    raw["tracking"] = trackers_of(kind, folder, silent)
    checked, clock = validate(raw), Clock()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), Share() as share:
        run_local(checked, [*build_callbacks(checked), clock])
    times = clock.times[_WARM:]
    return statistics.median(b - a for a, b in itertools.pairwise(times)), share.share


def main(rounds: int, steps: int) -> None:
    """Prints the times and the ratios."""
    torch.set_num_threads(1)
    kinds = ["none", "default", "trackers", "blocked", "killed"]
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    shares: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as name, silent_server() as silent:
        for number in range(rounds):
            for kind in kinds if number % 2 else reversed(kinds):
                seconds, share = seconds_per_step(Path(name), f"{kind}-{number}", kind, silent, steps)
                times[kind].append(seconds)
                shares[kind].append(share)
    for kind, found in times.items():
        ratios = sorted(b / a for a, b in zip(times["none"], found, strict=True))
        print(
            f"{kind}: {', '.join(f'{1000 * t:.2f}' for t in found)} ms a step; ratio {statistics.median(ratios):.4f} "
            f"({ratios[0]:.4f} to {ratios[-1]:.4f}); callbacks {statistics.median(shares[kind]):.2%} of the CPU time"
        )


if __name__ == "__main__":
    given = [int(value) for value in sys.argv[1:]]
    main(*given, *(5, 240)[len(given) :])
