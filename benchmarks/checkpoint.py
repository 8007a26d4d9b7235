"""Measures how long a save blocks training: in the background, in the foreground, and with torch.save.

    python benchmarks/checkpoint.py [--rounds 5] [--folder DIR]

All methods save the same state, that of a Llama model of about 100 M parameters with the moments of AdamW (1.2 GB in
fp32), in one process. The rounds of the three methods are interleaved. The output contains medians; its last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from myllm_ray.accelerators.single import SingleGPUAccelerator
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.checkpointing.manager import CheckpointManager
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.scheduler import SchedulerManager
from myllm_ray.models.load import build_deferred

MODEL = {
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
}


def seconds(call: Callable[[], object]) -> float:
    """Returns the wall time of a call in seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Measures and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="parent folder of the written files; default: the system's temporary folder"
    )
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    accelerator = SingleGPUAccelerator({})
    accelerator.setup()
    model = build_deferred(ModelSection(config=MODEL), byte_tokenizer(), 128, 0)
    accelerator.prepare(model, OptimizerManager(model).build, SchedulerManager().build)
    state = accelerator.state()
    parameters = sum(p.numel() for p in accelerator.module.parameters())
    size = sum(t.numel() * t.element_size() for t in state.values())
    print(f"{parameters / 1e6:.1f} M parameters, {size / 1e9:.2f} GB of state, rounds: {arguments.rounds}")
    background = CheckpointManager(folder=folder / "background", keep_last=1, background=True)
    at_once = CheckpointManager(folder=folder / "at-once", keep_last=1)
    times: dict[str, list[float]] = {"background": [], "written": [], "at once": [], "torch.save": []}
    print(
        f"allocation of memory for copies before the first step: {seconds(lambda: background.make_ready(state)):.3f} s"
    )
    background.wait()
    try:
        print(f"first background save: {seconds(lambda: background.save(0, state, {})):.3f} s")
        background.wait()
        for step in range(1, arguments.rounds + 1):
            times["background"].append(seconds(partial(background.save, step, state, {})))
            times["written"].append(seconds(background.wait))
            times["at once"].append(seconds(partial(at_once.save, step, state, {})))
            times["torch.save"].append(seconds(lambda: torch.save(state, folder / "plain.pt")))
    finally:
        background.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:12} median {medians[name]:.3f} s  ({', '.join(f'{v:.3f}' for v in values)})")
    ratio = medians["background"] / medians["torch.save"]
    print(
        json.dumps(
            {
                "parameters": parameters,
                "bytes": size,
                "blocked_seconds": medians["background"],
                "torch_save_seconds": medians["torch.save"],
                "at_once_seconds": medians["at once"],
                "blocked_ratio": ratio,
            }
        )
    )


if __name__ == "__main__":
    main()
