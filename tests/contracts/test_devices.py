"""Every trainer on a simulated device in addition to the CPU.

A tensor that is created on the wrong device fails here as on a machine with a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT, MakeConfig, comparable
from spawned import run_all
from test_preferences_and_rollouts import COMMON, TRAINERS

from myllm_ray.config import TrainerConfig

GEMMA = {
    "model_type": "gemma2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
PROMPTS = "data.train={source: brackets, format: prompt, limit: 30}"
OWN: dict[str, list[str]] = {
    "sft": ["data.sequence_length=64", "data.validation={split: 0.2}"],
    "capped-logits": ["data.sequence_length=64", f"model.config={json.dumps(GEMMA)}"],  # the head is not fused
    "ppo-own-critic": [
        "trainer=ppo",
        "ppo={reward: 'helpers:variety', epochs: 2, critic: own, kl_in: loss}",
        PROMPTS,
        "rollout.max_new_tokens=8",
    ],
    "grpo-sampling": [
        "trainer=grpo",
        "grpo={reward: 'helpers:variety', group_size: 4, kl_weight: 0.05}",
        PROMPTS,
        "rollout={max_new_tokens: 8, top_k: 20, top_p: 0.9, min_p: 0.01, stop: ['ab']}",
    ],
}
CHILD = """
import json, sys, traceback
sys.path.insert(0, "tests")
from two_devices import GPU, TwoDevices
import torch
torch.set_num_threads(1)
from myllm_ray.accelerators.base import Accelerator
from myllm_ray.config import validate
from myllm_ray.data.prepare import prepare
from myllm_ray.engine.run_folder import claim
from myllm_ray.preparation import absolute
from myllm_ray.worker import run_worker

Accelerator._choose_device = lambda self: GPU
failed = {}
for name, raw in json.load(sys.stdin).items():
    config = absolute(validate(raw))
    prepared = prepare(config)
    claim(config, prepared.identity)
    try:
        with TwoDevices():
            run_worker(config, prepared)
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-4:])
        failed[name] = f"{name}: {type(error).__name__}: {str(error)[:300]}\\n{where}"
print("\\n" + json.dumps(failed))
"""


def on_the_gpu(raws: dict[str, object]) -> dict[str, str]:
    """Runs configs in a separate process and returns the failures by name, with the ends of the tracebacks."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        input=json.dumps(raws),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    failed: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return failed


def config_of(make_config: MakeConfig, kind: str, where: str) -> TrainerConfig:
    rollout = ["rollout.max_new_tokens=8"] if kind in ("grpo", "ppo") else []
    return make_config(
        *COMMON,
        *rollout,
        *{**TRAINERS, **OWN}[kind],
        "run.max_steps=2",
        "model.attention=eager",
        f"run.name={kind}-{where}",
        "gradient_clip=1.0",
    )


@pytest.mark.parametrize(
    "kinds",
    [["sft", "dpo", "grpo-sampling", "ppo-own-critic"], pytest.param([*TRAINERS, *OWN], marks=pytest.mark.slow)],
)
def test_no_trainer_mixes_devices(make_config: MakeConfig, kinds: list[str]) -> None:
    configs = {kind: config_of(make_config, kind, "gpu") for kind in kinds}
    failed = on_the_gpu({kind: config.model_dump(mode="json") for kind, config in configs.items()})
    assert failed == {}, "\n".join(failed.values())
    for kind, folder in zip(kinds, run_all(1, [config_of(make_config, kind, "cpu") for kind in kinds]), strict=True):
        found, expected = comparable(folder.parent / f"{kind}-gpu"), comparable(folder)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        for row, other in zip(found, expected, strict=True):  # some operations are decomposed on the simulated device
            assert (row["loss"], row["grad_norm"]) == pytest.approx(
                (other["loss"], other["grad_norm"]), rel=1e-3, abs=1e-4
            ), kind


def test_the_simulation_distinguishes_devices() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\nimport torch\nfrom two_devices import TwoDevices\n"
        "with TwoDevices():\n    x = torch.ones(2, device='gpu')\n"
        "    assert (x * torch.tensor(2.0)).device.type == 'gpu'\n    x + torch.ones(2)\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert "aten.add.Tensor: tensors of gpu:0 and of the CPU" in result.stderr
