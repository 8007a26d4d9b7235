"""What the tests of this folder share. They need one CUDA device, and are skipped without it.

`TEST_DEVICE=cpu` runs the same tests on the CPU, but for what only a GPU has: to see that the tests themselves work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, comparable, read_jsonl
from spawned import run_all

from myllm_ray.config import TrainerConfig

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
Run = Callable[..., list[dict[str, Any]]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU and not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device here"))


@pytest.fixture
def train(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> Run:
    """`train("name", "accelerator.precision=bf16")`: the logged rows of a run of few steps in this process, on the device.

    Without a clock's values; the speed of the last step is printed. `device="cpu"` for a run to compare with.
    """
    def run(name: str, *overrides: str, device: str | None = None) -> list[dict[str, Any]]:
        name, device = name if device is None else f"{name}-compared", device or DEVICE
        config: TrainerConfig = make_config("data.validation=null", "checkpoint.at_end=false", "run.max_steps=4", f"run.name={name}",
                                            f"accelerator.device={device}", *overrides)
        folder, = run_all(1, [config])
        with capsys.disabled():
            print(f"\n  {name} on {device}: {read_jsonl(folder / 'metrics.jsonl')[-1]['tokens_per_second']:.0f} tokens/s in the last step")
        return comparable(folder)

    return run
