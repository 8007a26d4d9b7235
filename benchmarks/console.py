"""Measures what the console costs per step at `logging.every_steps: 1`: the panel, against a run without callbacks.

    python benchmarks/console.py [ROUNDS]

Rounds are interleaved. The panel is drawn to a terminal in memory. Prints the mean time of a step of each round, and
the share of the run's CPU time that the console takes: its part of the training thread and the thread that draws. The
share does not depend on other processes of the machine, as a ratio of wall times does.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from myllm_ray.common.types import RunState
from myllm_ray.config.load import validate
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.reporting import console, terminal
from myllm_ray.worker import run_local

_STEPS, _WARM = 120, 20


class Clock(Callback):
    """Keeps the time at the end of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def on_batch_end(self, state: RunState) -> None:
        self.times.append(time.perf_counter())


class Measured(console.ConsoleCallback):
    """The console, which adds up its own CPU time."""

    own = 0.0
    drawn = 0.0

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        before = time.thread_time()
        super().on_log(state, metrics)
        self.own += time.thread_time() - before

    def on_event(self, event: dict[str, Any]) -> None:
        before = time.thread_time()
        super().on_event(event)
        self.own += time.thread_time() - before

    def _render(self) -> Any:
        shown = super()._render()
        # `Live` also draws once at its start and at its end, in the thread that calls it.
        if threading.current_thread() is not threading.main_thread():
            self.drawn = time.thread_time()
        return shown


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def seconds_per_step(folder: Path, name: str, callbacks: list[Callback]) -> float:
    """Returns the mean time of a step of one run, without the first steps."""
    clock = Clock()
    before = time.process_time()
    run_local(validate(config(folder, name)), [*callbacks, clock])
    for shown in callbacks:
        if isinstance(shown, Measured):
            used = time.process_time() - before
            share = (shown.own + shown.drawn) / used
            print(
                f"console: {share:.2%} of {used:.1f} s: {shown.own:.3f} s of training, {shown.drawn:.3f} s of drawing"
            )
    return (clock.times[-1] - clock.times[_WARM - 1]) / (len(clock.times) - _WARM)


def config(folder: Path, name: str) -> dict[str, Any]:
    """Returns a config whose step takes some ten milliseconds on a CPU."""
    data = folder / "rows.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps({"text": f"line {i} " * 40}) + "\n" for i in range(400)))
    return {
        "trainer": "pretrain",
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            }
        },
        "tokenizer": {"kind": "bytes"},
        "data": {
            "train": {"path": str(data), "format": "text"},
            "sequence_length": 256,
            "cache": str(folder / "cache"),
        },
        "batch": {"global_size": 8, "micro_size": 8},
        "run": {"name": name, "storage": str(folder / "runs"), "max_steps": _STEPS},
        "checkpoint": {"at_end": False},
        "callbacks": [],
    }


def main(rounds: int) -> None:
    """Prints the times and their ratio."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"none": [], "console": []}
    terminal.console = console.console = Console(file=_Screen(), force_terminal=True, width=120, soft_wrap=True)
    with tempfile.TemporaryDirectory() as name:
        for number in range(rounds):
            order = ("none", "console") if number % 2 else ("console", "none")
            for kind in order:
                shown: list[Callback] = [Measured(format="panel")] if kind == "console" else []
                times[kind].append(seconds_per_step(Path(name), f"{kind}-{number}", shown))
    for kind, found in times.items():
        print(f"{kind}: {', '.join(f'{1000 * t:.2f}' for t in found)} ms a step")
    ratios = [b / a for a, b in zip(times["none"], times["console"], strict=True)]
    print(
        f"median of the paired ratios: {statistics.median(ratios):.4f}; of the best: "
        f"{min(times['console']) / min(times['none']):.4f}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
