"""Optimizers and the average of the weights on real processes: the same curve on every backend that accepts them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig, comparable
from spawned import BACKENDS, run_all

from myllm_ray.config import ConfigError, TrainerConfig
from myllm_ray.data.prepare import prepare
from myllm_ray.engine.checkpointing.manager import read_tensors
from myllm_ray.preparation import absolute, check_model, check_names

SIX = (
    "data.sequence_length=96",
    "batch.micro_size=1",
    "checkpoint={every_steps: 3, keep_last: null}",
    "evaluation.every_steps=3",
)
OPTIMIZERS = {
    "muon": "optimizer={name: muon, lr: 3.0e-3, weight_decay: 0.1}",
    "lion": "optimizer={name: lion, lr: 1.0e-4, weight_decay: 0.1}",
    "ademamix": "optimizer={name: ademamix, lr: 1.0e-3, weight_decay: 0.1}",
}
REFUSED = {
    **{("muon", f"deepspeed-{stage}"): "needs whole tensors" for stage in (1, 2, 3)},
    ("ademamix", "deepspeed-3"): "counts its steps in its parameter groups",
}
FAST = {("muon", "fsdp"), ("muon", "ddp"), ("ademamix", "fsdp")}
# Lion steps by the sign of an average: a gradient near 0 whose sign rounding decides moves a weight by 2 lr.
TOLERANCE = {"muon": 1e-4, "lion": 2e-3, "ademamix": 1e-5}


def close(found: Path, expected: Path, tolerance: float) -> None:
    rows, others = comparable(found), comparable(expected)
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        for name in (n for n in other if n in ("loss", "grad_norm") or n.startswith("validation_")):
            assert row[name] == pytest.approx(other[name], rel=tolerance), (row["step"], name)


def refuse(config: TrainerConfig) -> None:
    check_names(config)
    check_model(config, prepare(config))


def check_pairs(make_config: MakeConfig, pairs: list[tuple[str, str]], world: int) -> None:
    """Trains each pair, resumes it, and compares both with one process; a refused pair must say why."""
    configs, names = [], []
    for optimizer, backend in pairs:
        overrides = [*SIX, OPTIMIZERS[optimizer], *BACKENDS[backend]]
        if reason := REFUSED.get((optimizer, backend)):
            with pytest.raises(ConfigError, match=re.escape(reason)):
                refuse(absolute(make_config(*overrides, f"run.name={optimizer}-{backend}")))
            continue
        names.append((optimizer, backend))
        configs.append(make_config(*overrides, f"run.name={optimizer}-{backend}"))
    folders = dict(zip(names, run_all(world, configs), strict=True))
    plain = {
        optimizer: run_all(1, [make_config(*SIX, OPTIMIZERS[optimizer], f"run.name={optimizer}")])[0]
        for optimizer in {o for o, _ in names}
    }
    for (optimizer, backend), folder in folders.items():
        close(folder, plain[optimizer], TOLERANCE[optimizer])
        found = read_tensors(folder / "checkpoints" / "step-00000006")
        assert found.keys() == read_tensors(plain[optimizer] / "checkpoints" / "step-00000006").keys(), backend
    resumed = [
        make_config(
            *SIX,
            OPTIMIZERS[optimizer],
            *BACKENDS[backend],
            f"run.name=resumed-{optimizer}-{backend}",
            f"checkpoint.resume={folder / 'checkpoints' / 'step-00000003'}",
        )
        for (optimizer, backend), folder in folders.items()
    ]
    for (pair, folder), again in zip(folders.items(), run_all(world, resumed), strict=True):
        assert comparable(again) == [row for row in comparable(folder) if row["step"] > 3], pair
        expected = read_tensors(folder / "checkpoints" / "step-00000006")
        for name, tensor in read_tensors(again / "checkpoints" / "step-00000006").items():
            assert torch.equal(tensor, expected[name]), (pair, name)


@pytest.mark.promise
def test_representative_optimizers_keep_the_curve(make_config: MakeConfig) -> None:
    check_pairs(make_config, sorted(FAST), 2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_optimizer_keeps_the_curve_or_is_refused(make_config: MakeConfig, world: int) -> None:
    pairs = [(optimizer, backend) for optimizer in OPTIMIZERS for backend in BACKENDS if backend != "single"]
    check_pairs(make_config, pairs, world)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_equals_an_uninterrupted_one(make_config: MakeConfig, optimizer: str) -> None:
    """Regression: `step` in the groups of AdEMAMix and Lion was not saved."""
    (whole,) = run_all(1, [make_config(*SIX, OPTIMIZERS[optimizer], "run.name=whole")])
    resume = f"checkpoint.resume={whole / 'checkpoints' / 'step-00000003'}"
    (again,) = run_all(1, [make_config(*SIX, OPTIMIZERS[optimizer], "run.name=again", resume)])
    assert comparable(again) == [row for row in comparable(whole) if row["step"] > 3]


def averages(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "checkpoints" / "step-00000006", lambda name: name.startswith("ema."))


def test_the_average_is_the_same_on_every_backend(make_config: MakeConfig) -> None:
    ema = "ema={decay: 0.7}"
    (plain,) = run_all(1, [make_config(*SIX, ema, "run.name=plain")])
    names = ("ddp", "fsdp", "deepspeed-0")
    folders = run_all(2, [make_config(*SIX, ema, f"run.name={name}", *BACKENDS[name]) for name in names])
    expected = averages(plain)
    for folder in folders:
        close(folder, plain, 1e-5)
        for name, tensor in averages(folder).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=f"{folder.name}: {name}")
    # The average of two sharded processes is continued in one, and the reverse.
    start = folders[1] / "checkpoints" / "step-00000003"
    (resumed,) = run_all(1, [make_config(*SIX, ema, "run.name=resumed", f"checkpoint.resume={start}")])
    for name, tensor in averages(resumed).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)
