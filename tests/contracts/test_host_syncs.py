"""The host does not wait for the device in a training step. Measured on the simulated device of `two_devices.py`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT, MakeConfig, comparable
from spawned import run_all

from myllm_ray.config import TrainerConfig

PAIRS = "data.train={source: brackets, format: preference, limit: 40}"
GPT2 = (
    "model.config={model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, "
    "resid_pdrop: 0.1, embd_pdrop: 0.1, attn_pdrop: 0.1}"
)
RUNS: dict[str, tuple[str, ...]] = {
    "sft": ("trainer=sft",),
    "sft-padded": ("trainer=sft", "data.packing=false"),
    "sft-dropout": ("trainer=sft", GPT2),
    "sft-sources": (
        "trainer=sft",
        "data.sequence_length=512",
        "data.train=[{source: python-stdlib, format: prompt_completion, limit: 20}, "
        "{source: snippets, format: prompt_completion, limit: 20}]",
    ),
    "pretrain": ("trainer=pretrain", "data.train={source: python-stdlib, format: text, limit: 20}"),
    "dpo": ("trainer=dpo", PAIRS),
    "dpo-two-rows": ("trainer=dpo", "dpo.shared_prompt=never", PAIRS),
    "dpo-simpo": ("trainer=dpo", "dpo.loss=simpo", PAIRS),
    "reward": ("trainer=reward", PAIRS),
    "reward-two-rows": ("trainer=reward", "reward.shared_prompt=never", PAIRS),
}
CHILD = """
import json, sys
sys.path.insert(0, "tests")
from two_devices import GPU, TwoDevices, recorded_syncs, unrecorded
import torch
torch.set_num_threads(1)
from myllm_ray.accelerators.base import Accelerator
from myllm_ray.common.host_copy import HostCopy
from myllm_ray.config import validate
from myllm_ray.data.prepare import prepare
from myllm_ray.engine.loop import TrainerEngine
from myllm_ray.engine.run_folder import claim
from myllm_ray.preparation import absolute
from myllm_ray.worker import run_worker

Accelerator._choose_device = lambda self: GPU
found, current = {}, []
train_batch, read = TrainerEngine._train_batch, HostCopy.read

def recording(engine, batch):
    with recorded_syncs() as syncs:
        train_batch(engine, batch)
    current.append(syncs)

def late(copy):  # the copy was made in the previous step
    with unrecorded():
        return read(copy)

TrainerEngine._train_batch, HostCopy.read = recording, late
for name, raw in json.load(sys.stdin).items():
    config = absolute(validate(raw))
    prepared = prepare(config)
    claim(config, prepared.identity)
    current = []
    with TwoDevices():
        run_worker(config, prepared)
    found[name] = current
print("\\n" + json.dumps(found))
"""


def config_of(make_config: MakeConfig, kind: str, where: str, *more: str) -> TrainerConfig:
    return make_config(
        "data.sequence_length=64",
        "data.validation=null",
        "checkpoint.at_end=false",
        "run.max_steps=3",
        "batch.micro_size=2",
        "gradient_clip=1.0",
        "model.attention=eager",
        *RUNS[kind],
        f"run.name={kind}-{where}",
        *more,
    )


def syncs_of(configs: dict[str, TrainerConfig]) -> dict[str, list[list[str]]]:
    """Returns where the host waits for the simulated device, for each run and step."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        input=json.dumps({kind: config.model_dump(mode="json") for kind, config in configs.items()}),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, list[list[str]]] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kinds", [["sft", "dpo", "reward"], pytest.param([*RUNS], marks=pytest.mark.slow)])
def test_a_step_does_not_wait_for_the_device(make_config: MakeConfig, kinds: list[str]) -> None:
    found = syncs_of({kind: config_of(make_config, kind, "gpu") for kind in kinds})
    assert {kind: len(steps) for kind, steps in found.items()} == dict.fromkeys(kinds, 3)
    assert {kind: steps for kind, steps in found.items() if any(steps)} == {}
    for kind, folder in zip(kinds, run_all(1, [config_of(make_config, kind, "cpu") for kind in kinds]), strict=True):
        late, expected = comparable(folder.parent / f"{kind}-gpu"), comparable(folder)
        assert [row["step"] for row in late] == [1, 2, 3]
        for row, other in zip(late, expected, strict=True):  # each line contains the values of its own step
            assert row == pytest.approx(other, rel=1e-3, abs=1e-4), kind


def test_the_recorder_sees_what_waits() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\nimport torch\n"
        "from two_devices import TwoDevices, recorded_syncs\n"
        "with TwoDevices():\n"
        "    x = torch.ones(4, device='gpu')\n"
        "    with recorded_syncs() as found:\n"
        "        x[torch.zeros(2, dtype=torch.int64, device='gpu')].sum().double() / torch.tensor(2.0)\n"
        "        x.index_select(0, torch.zeros(2, dtype=torch.int64).to('gpu', non_blocking=True))\n"
        "    assert found == [], found\n"
        "    for wait in (lambda: x[x > 0], lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.cpu(),\n"
        "                 lambda: (x > 0).nonzero(), lambda: torch.ones(2).to('gpu'), lambda: x.tolist(),\n"
        "                 lambda: float(x.sum()), lambda: torch.tensor([1.0], device='gpu')):\n"
        "        with recorded_syncs() as found:\n"
        "            wait()\n"
        "        assert len(found) == 1, found\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_policy_for_bad_steps_waits_for_the_loss_and_the_norm(make_config: MakeConfig) -> None:
    """It decides before a weight changes."""
    found = syncs_of({"sft": config_of(make_config, "sft", "gpu", "stability.on_spike=skip")})
    assert [len(step) for step in found["sft"]] == [1, 1, 1], found
