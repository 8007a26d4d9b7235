"""Frozen models (a reference, a reward model) on two ranks: sharded like the trained model, and equal to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import LLAMA, MakeConfig
from spawned import leave, run_all, start_processes
from torch import nn

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.common.materialize import attach_source, source_of
from myllm_ray.common.modules import parameter_count
from myllm_ray.config.resolve import resolve
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.checkpointing.manager import CheckpointManager
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.scheduler import SchedulerManager
from myllm_ray.models.load import build_deferred, build_model

SECTIONS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("ddp", "fsdp", "accelerate")},
    "fsdp-offload": {"name": "fsdp", "offload": {"parameters": "cpu"}},
    **{f"deepspeed-{stage}": {"name": "deepspeed", "stage": stage} for stage in range(4)},
    "deepspeed-3-offload": {"name": "deepspeed", "stage": 3, "offload": {"parameters": "cpu"}},
}
SHARDED = ("fsdp", "fsdp-offload", "deepspeed-3", "deepspeed-3-offload")
PRECISIONS = ("fp32", "bf16")


def deferred() -> nn.Module:
    return build_deferred(ModelSection(config={**LLAMA, "tie_word_embeddings": False}), byte_tokenizer(), 64, 0)


def compare(name: str, precision: str) -> dict[str, Any]:
    """Compares a trained and a frozen model from the same source: bytes, losses, and reads per tensor."""
    config = {
        "accelerator": {**SECTIONS[name], "precision": precision},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "max_steps": 3,
        "batch": {"micro_size": 1, "global_size": 2},
    }
    accelerator: Accelerator = resolve("accelerators", SECTIONS[name]["name"], "accelerator.name")(config)
    accelerator.setup()
    model, other = deferred(), deferred()
    total = parameter_count([other])
    source, asked = source_of(other), []
    assert source is not None
    attach_source(other, lambda name, box=None: asked.append(name) or source(name, box))  # type: ignore[func-returns-value, misc]
    trained = accelerator.prepare(
        model, OptimizerManager(model, config).build, SchedulerManager(config=config).build
    ).eval()
    trained = accelerator.model
    frozen = accelerator.prepare_frozen(other)
    trained.eval()
    ids = torch.arange(64)[None] % 200
    with torch.no_grad():
        for _ in range(2):  # ZeRO-3 records the order of modules in the first pass
            with accelerator.autocast():
                expected, found = trained(input_ids=ids, labels=ids).nll, frozen(input_ids=ids, labels=ids).nll
    result = {
        "held": accelerator.parameter_bytes(frozen),
        "apart": float((found - expected).abs().max()),
        "total": total,
        "once": len(asked) == len(set(asked)),
        "loss": float(found.mean()),
        "trains": any(p.requires_grad for p in frozen.parameters()) or frozen.training,
    }
    accelerator.close = lambda: None  # type: ignore[method-assign]
    return result


def process(rank: int, world: int, store: str, names: list[str], out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), OMP_NUM_THREADS="1"
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save({(n, p): compare(n, p) for n in names for p in PRECISIONS}, f"{out}-{rank}")
    leave()


def run(tmp_path: Path, names: list[str]) -> list[dict[tuple[str, str], dict[str, Any]]]:
    start_processes(process, (2, str(tmp_path / "store"), names, str(tmp_path / "out")), 2)
    return [torch.load(tmp_path / f"out-{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["fsdp", "deepspeed-3"], id="two"),
        pytest.param(list(SECTIONS), id="all", marks=pytest.mark.promise),
    ],
)
def test_a_frozen_model_is_sharded_and_equals_the_trained_one(tmp_path: Path, names: list[str]) -> None:
    """Regression test: every rank held the whole frozen model in fp32.

    DeepSpeed and Accelerate also computed it in fp32 for every precision.
    """
    for found in run(tmp_path, names):
        for (name, precision), result in found.items():
            held, expected = result["held"]
            share = 2 if name in SHARDED else 1
            assert result["apart"] == 0, (name, precision)
            assert held <= expected
            assert held <= 1.02 * {"fp32": 4.0, "bf16": 2.6}[precision] * result["total"] / share, (name, precision)
            assert result["once"], "every tensor is made once"
            assert not result["trains"], name
        losses = {precision: [r["loss"] for (_, p), r in found.items() if p == precision] for precision in PRECISIONS}
        assert losses["fp32"] == pytest.approx([losses["fp32"][0]] * len(names), rel=1e-6)
        assert losses["bf16"] == pytest.approx([losses["fp32"][0]] * len(names), rel=2e-3)


@pytest.mark.parametrize("world", [1, 2])
def test_the_weights_of_a_checkpoint_one_by_one(make_config: MakeConfig, world: int) -> None:
    """Loads the weights of a run, as a reward model does, from the shards of two ranks and from one file."""
    backend = "single" if world == 1 else "fsdp"
    (folder,) = run_all(world, [make_config(f"accelerator.name={backend}", "run.max_steps=1", "data.validation=null")])
    checkpoint = CheckpointManager(folder=folder / "checkpoints").latest()
    assert checkpoint is not None
    section = ModelSection(config=LLAMA)
    expected = build_model(section, byte_tokenizer(), 160, 0)
    CheckpointManager(folder=folder / "checkpoints").load_model(checkpoint, expected)
    found = build_model(ModelSection(name=str(folder)), byte_tokenizer(), 160, 1)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
