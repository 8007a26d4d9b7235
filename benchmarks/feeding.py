"""Measures the wait for data and the time of a step, with and without the thread that prepares batches.

    python benchmarks/feeding.py [ROUNDS [STEPS]]

Each round trains the same run without the thread (`data.prefetch_batches: 0`) and with it (2), in alternating order. It
prints the median time of a step of each run, the median and the range of the ratios to the run without the thread of
the same round, and the share of the wait in the time of a step (`data_wait_share`). On a CPU the thread takes its time
from the training thread if no core is free.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from console import Clock, config

from myllm_ray.config.load import validate
from myllm_ray.engine.configured import build_callbacks
from myllm_ray.worker import run_local

_WARM = 20
_DEPTHS = (0, 2)


def measure(folder: Path, name: str, depth: int, steps: int) -> tuple[float, float]:
    """Returns the median time of a step in seconds and the median share of the wait, without the first steps."""
    raw, clock = config(folder, name), Clock()
    raw["run"]["max_steps"], raw["data"]["prefetch_batches"], raw["callbacks"] = steps, depth, ["jsonl"]
    checked = validate(raw)
    run_local(checked, [*build_callbacks(checked), clock])
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return (
        statistics.median(b - a for a, b in itertools.pairwise(clock.times[_WARM:])),
        statistics.median(row["data_wait_share"] for row in rows[_WARM:]),
    )


def main(rounds: int, steps: int) -> None:
    """Prints the times, the ratios and the shares."""
    torch.set_num_threads(1)
    found: dict[int, list[tuple[float, float]]] = {depth: [] for depth in _DEPTHS}
    with tempfile.TemporaryDirectory() as name:
        for number in range(rounds):
            for depth in _DEPTHS if number % 2 else reversed(_DEPTHS):
                found[depth].append(measure(Path(name), f"depth-{depth}-{number}", depth, steps))
    for depth, runs in found.items():
        ratios = sorted(run[0] / other[0] for run, other in zip(runs, found[0], strict=True))
        print(
            f"prefetch_batches {depth}: {', '.join(f'{1000 * seconds:.2f}' for seconds, _ in runs)} ms a step; ratio "
            f"{statistics.median(ratios):.4f} ({ratios[0]:.4f} to {ratios[-1]:.4f}); data_wait_share "
            f"{statistics.median(share for _, share in runs):.2%}"
        )


if __name__ == "__main__":
    given = [int(value) for value in sys.argv[1:]]
    main(*given, *(5, 120)[len(given) :])
