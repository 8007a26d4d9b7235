"""Fixtures of the GPU tests, which need one CUDA device and are skipped without it.

`TEST_DEVICE=cpu` runs the tests on the CPU, except for GPU-only features, to check the tests themselves.
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
    """Returns a function that trains a few steps in this process on the device and returns the logged rows.

    Call: `train("name", "accelerator.precision=bf16")`; `device="cpu"` gives a run to compare with. The rows have no
    values that depend on a clock; the speed of the last step is printed.
    """

    def run(name: str, *overrides: str, device: str | None = None) -> list[dict[str, Any]]:
        name, device = name if device is None else f"{name}-compared", device or DEVICE
        config: TrainerConfig = make_config(
            "data.validation=null",
            "checkpoint.at_end=false",
            "run.max_steps=4",
            f"run.name={name}",
            f"accelerator.device={device}",
            *overrides,
        )
        (folder,) = run_all(1, [config])
        with capsys.disabled():
            print(
                f"\n  {name} on {device}: "
                f"{read_jsonl(folder / 'metrics.jsonl')[-1]['tokens_per_second']:.0f} tokens/s in the last step"
            )
        return comparable(folder)

    return run
