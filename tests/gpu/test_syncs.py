"""A training step on a GPU does not let the host wait, by torch's own check."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from myllm_ray.engine.loop import TrainerEngine

from .conftest import ON_GPU, Run
from .test_gpu import PAIRS

pytestmark = pytest.mark.gpu
TRAINERS: dict[str, list[str]] = {
    "pretrain": ["trainer=pretrain"],
    "sft": ["trainer=sft"],
    "dpo": ["trainer=dpo", "dpo.beta=0.5", *PAIRS],
    "dpo-two-rows": ["trainer=dpo", "dpo.shared_prompt=never", *PAIRS],
    "reward": ["trainer=reward", *PAIRS],
}


@pytest.mark.skipif(not ON_GPU, reason="torch checks CUDA only")
@pytest.mark.parametrize("name", ["single", "ddp", "fsdp"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_a_step_does_not_wait(train: Run, monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    training_step, checked = TrainerEngine.training_step, []

    def step(engine: TrainerEngine, micros: Any) -> Any:
        if engine.state.step < 2:  # the first steps create the state of the optimizer and of libraries
            return training_step(engine, micros)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return training_step(engine, micros)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            checked.append(engine.state.step)

    monkeypatch.setattr(TrainerEngine, "training_step", step)
    rows = train(f"{kind}-{name}", *TRAINERS[kind], f"accelerator.name={name}", "accelerator.precision=bf16")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert checked == [2, 3]
