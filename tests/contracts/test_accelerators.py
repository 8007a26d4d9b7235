"""The contract of accelerators on real processes: the optimizer sees the sum over ranks and micro-batches.

The tests use plain SGD, because Adam with clipping hides a factor, and unequal micro-batches, because equal ones hide a
wrong mean.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import MakeConfig
from spawned import leave, start_processes
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.accelerators.precision import DTYPES, why_not
from myllm_ray.accelerators.single import SingleGPUAccelerator
from myllm_ray.common.types import Batch, Position, StepOutput
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import resolve
from myllm_ray.engine.checkpointing.manager import CheckpointManager
from myllm_ray.engine.loop import TrainerEngine
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.worker import run_local

SECTIONS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("single", "ddp", "fsdp", "accelerate")},
    **{f"deepspeed-{stage}": {"name": "deepspeed", "stage": stage} for stage in range(4)},
}
SHARED = [kind for kind in SECTIONS if kind != "single"]
ROWS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([1.0, 9, 2, 2, 30, 1, 5, 4])


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).sum(-1)


class Weighted(BaseTrainer):
    """Weighted squared output, with one weight per row."""

    def batch_weight(self, micro: dict[str, torch.Tensor]) -> torch.Tensor:
        return micro["weight"].sum()

    def train_step(self, micro: dict[str, torch.Tensor]) -> StepOutput:
        return StepOutput((micro["weight"] * self.model(micro["x"]) ** 2).sum())


class Cut:
    """The eight rows, split into micro-batches of `micro` rows for `world` ranks."""

    def __init__(self, micro: int, rank: int, world: int):
        self.sources: list[str] = []
        self.parts = [slice(j * micro, (j + 1) * micro) for j in range(rank, 8 // micro, world)]

    def steps_in_epoch(self, epoch: int) -> int:
        return 1

    def batches(self, start: Position, steps: int) -> Any:
        for step in range(steps):
            micros = [{"x": ROWS[p], "weight": WEIGHTS[p]} for p in self.parts]
            yield Batch(micros, Position(start.epoch + step, 0), Position(start.epoch + step + 1, 0), 0)


def train(
    kind: str,
    micro: int,
    rank: int,
    world: int,
    steps: int = 3,
    folder: str = "",
    resume: str = "",
    loss_scale: float = 0,
) -> dict[str, Any]:
    """Runs `steps` steps of SGD; with `loss_scale`, in fp16 and from this initial scale."""
    config = {
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "max_steps": steps,
        "gradient_clip": 0.3,
        "checkpoint": {"at_end": bool(folder)},
        "accelerator": {**SECTIONS[kind], "precision": "fp16" if loss_scale else "fp32"},
    }
    model = Blocks()
    accelerator: Accelerator = resolve("accelerators", SECTIONS[kind]["name"], "name")(config)
    norms: list[float] = []
    skipped: list[bool] = []
    manager = CheckpointManager(model, folder or "unused")
    engine = TrainerEngine(
        Weighted(model),
        accelerator,
        OptimizerManager(model, config),
        config=config,
        stream=Cut(micro, rank, world),
        checkpoint_manager=manager,
    )
    step = accelerator.optimizer_step

    def recorded(clip: float | None) -> Any:
        result = step(clip)
        norms.append(float(result.grad_norm))
        skipped.append(result.skipped)
        return result

    accelerator.optimizer_step = recorded  # type: ignore[method-assign]
    engine.setup(resume=Path(resume) if resume else None)
    accelerator.close = lambda: None  # type: ignore[method-assign]
    accelerator.loss_scale.load_state_dict({"scale": loss_scale, "good_steps": 0})
    engine.train()
    return {
        "norms": norms,
        "skipped": skipped,
        "scale": accelerator.loss_scale.value,
        "rate": engine.last_rate,
        "state": {k: whole(v) for k, v in accelerator.state().items()},
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of `state()` in full on every rank.

    It uses the placement instead of `full_tensor`, because some backends only describe a placement.
    """
    if not isinstance(tensor, DTensor):
        return tensor.clone()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    full = torch.zeros(tensor.shape)
    full[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] = tensor.to_local()
    dist.all_reduce(full)
    return full


def process(rank: int, world: int, store: str, jobs: list[dict[str, Any]], out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), OMP_NUM_THREADS="1"
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results = [train(rank=rank, world=world, **job) for job in jobs]
    if rank == 0:
        torch.save(results, out)
    leave()


def spawn(tmp_path: Path, world: int, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out, store = str(tmp_path / f"out-{world}.pt"), str(tmp_path / f"store-{world}")
    start_processes(process, (world, store, jobs, out), world)
    return list(torch.load(out, weights_only=True))


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        torch.testing.assert_close(found["state"][name], value, atol=tolerance, rtol=0, msg=name)


def test_every_backend_micro_batch_size_and_world_size_takes_the_same_steps(tmp_path: Path) -> None:
    expected = train("single", 8, 0, 1)
    assert expected["norms"][0] > 0.3, "the test needs clipping to bite"
    for micro in (1, 2, 4):
        assert_same(train("single", micro, 0, 1), expected)
    jobs = [{"kind": kind, "micro": micro} for kind in SHARED for micro in (1, 2, 4)]
    for result in spawn(tmp_path, 2, jobs):
        assert_same(result, expected)
    for result in spawn(tmp_path, 4, [{"kind": kind, "micro": 1} for kind in SHARED]):
        assert_same(result, expected)


def test_a_checkpoint_moves_between_backends_and_world_sizes(tmp_path: Path) -> None:
    expected = train("single", 4, 0, 1, steps=5)
    train("single", 4, 0, 1, steps=2, folder=str(tmp_path / "from-single"))
    jobs = [
        {"kind": kind, "micro": 2, "steps": 2, "folder": str(tmp_path / f"from-{kind}")} for kind in ("ddp", "fsdp")
    ]
    jobs += [
        {
            "kind": kind,
            "micro": 1,
            "steps": 5,
            "folder": str(tmp_path / f"{kind}-from-{source}"),
            "resume": str(tmp_path / f"from-{source}" / "step-00000002"),
        }
        for kind in ("ddp", "fsdp")
        for source in ("single", "ddp", "fsdp")
    ]
    results = spawn(tmp_path, 2, jobs)
    for result in results[2:]:
        assert_same({**result, "norms": result["norms"]}, {**expected, "norms": expected["norms"][2:]})
    for source in ("ddp", "fsdp"):
        resumed = train(
            "single",
            8,
            0,
            1,
            steps=5,
            folder=str(tmp_path / f"single-from-{source}"),
            resume=str(tmp_path / f"from-{source}" / "step-00000002"),
        )
        assert_same(resumed, {**expected, "norms": expected["norms"][2:]})


class Still:
    def step(self) -> None:
        """A constant learning rate."""


@pytest.mark.parametrize("kind", SECTIONS)
def test_bf16_keeps_fp32_master_weights(kind: str) -> None:
    model = Blocks()
    config = {
        "gradient_clip": None,
        "accelerator": {**SECTIONS[kind], "precision": "bf16"},
        "optimizer": {"name": "adamw", "lr": 1e-2},
    }
    accelerator: Accelerator = resolve("accelerators", SECTIONS[kind]["name"], "name")(config)
    accelerator.setup()
    try:
        optimizers = OptimizerManager(model, config)

        prepared = accelerator.prepare(model, optimizers.build, lambda optimizer: Still())
        with accelerator.microbatch(last=True):
            with accelerator.autocast():
                output = prepared(ROWS)
            accelerator.backward(output.float().pow(2).mean())
        assert torch.equal(output.bfloat16().to(output.dtype), output), (
            "computed in bf16 (Accelerate gives it out as fp32)"
        )
        accelerator.optimizer_step(None)
        assert {t.dtype for t in accelerator.state().values()} == {torch.float32}
    finally:
        accelerator.close()


FP16 = [kind for kind in SECTIONS if not kind.startswith("accelerate")]


def test_fp16_skips_the_same_steps_on_every_backend(tmp_path: Path, cpu_with_fp16: str) -> None:
    """Starts from a loss scale that overflows: it halves until it fits, and the weights change only after that."""
    job = {"steps": 12, "loss_scale": 2.0**18}
    expected = train("single", 8, 0, 1, **job)
    exact = train("single", 8, 0, 1, steps=12 - sum(expected["skipped"]))
    assert 2 <= sum(expected["skipped"]) <= 8
    assert expected["skipped"] == sorted(expected["skipped"], reverse=True)
    assert expected["scale"] == 2.0**18 / 2 ** sum(expected["skipped"])
    for result in [
        expected,
        *spawn(tmp_path, 2, [{"kind": kind, "micro": 4, **job} for kind in FP16 if kind != "single"]),
    ]:
        assert result["skipped"] == expected["skipped"]
        assert result["scale"] == expected["scale"]
        taken = [n for n, s in zip(result["norms"], result["skipped"], strict=True) if not s]
        assert taken == pytest.approx(exact["norms"], rel=2e-2)
        for name, value in exact["state"].items():
            torch.testing.assert_close(result["state"][name], value, atol=5e-3, rtol=0, msg=name)


def overflow_on_one_rank(rank: int, world: int, store: str, kind: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    config = {"accelerator": {**SECTIONS[kind], "precision": "fp16"}, "optimizer": {"name": "sgd", "lr": 1.0}}
    accelerator: Accelerator = resolve("accelerators", SECTIONS[kind]["name"], "name")(config)
    accelerator.setup()
    model = Blocks()
    prepared = accelerator.prepare(model, OptimizerManager(model, config).build, lambda optimizer: Still())
    with accelerator.microbatch(last=True):
        with accelerator.autocast():
            output = prepared(ROWS)
        accelerator.backward(output.float().pow(2).mean())
    first = next(p for p in model.parameters() if isinstance(p, DTensor))
    if rank == 1:
        first.grad.to_local().fill_(float("inf"))  # type: ignore[union-attr]
    before = first.to_local().clone()
    assert accelerator.optimizer_step(1.0).skipped, "every rank skips when one rank's shard overflows"
    assert torch.equal(first.to_local(), before)
    leave()


def test_an_overflow_in_one_shard_skips_the_step_everywhere(tmp_path: Path, cpu_with_fp16: str) -> None:
    start_processes(overflow_on_one_rank, (2, str(tmp_path / "store"), "fsdp"), 2)


def test_precisions_on_the_poorest_and_the_richest_cpu(any_cpu: str) -> None:
    cpu = torch.device("cpu")
    refused = {precision for precision in DTYPES if why_not(precision, cpu)}
    assert refused == ({"fp16"} if any_cpu == "poor" else set()), "bf16 is emulated where it is missing"
    if any_cpu == "rich":
        SingleGPUAccelerator({"accelerator": {"precision": "fp16", "device": "cpu"}}).setup()
        return
    with pytest.raises(ConfigError, match=r"this CPU has no fp16 arithmetic .*; use bf16 or fp32"):
        SingleGPUAccelerator({"accelerator": {"precision": "fp16", "device": "cpu"}}).setup()


def test_emulated_bf16_is_reported(any_cpu: str, make_config: MakeConfig, warned: list[str]) -> None:
    """It is correct but a hundred times slower than fp32, so the user has to know."""
    for precision in ("fp32", "bf16"):
        run_local(make_config(f"accelerator.precision={precision}", f"run.name={precision}", "run.max_steps=1"))
    found = [line for line in warned if "this CPU has no bf16 arithmetic" in line]
    assert len(found) == (any_cpu == "poor")
    assert all("precision=fp32 is the faster choice" in line for line in found)


def test_a_missing_device_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        SingleGPUAccelerator({"accelerator": {"device": "cuda"}}).setup()
