"""Losses, gradient norms, weights and moments of a tiny Llama are equal on every backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeConfig, comparable, ledger
from spawned import BACKENDS, SHARED, run_all

from myllm_ray.engine.checkpointing.manager import read_tensors

TEN = (
    "run.max_steps=10",
    "data.validation=null",
    "batch.micro_size=1",
    "checkpoint.keep_last=null",
    "data.sequence_length=96",
)
PORTABLE = ["single", "ddp", "fsdp", "accelerate", "deepspeed-1", "deepspeed-2", "deepspeed-3"]
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}


def column(folder: Path, name: str) -> list[float]:
    return [row[name] for row in comparable(folder)]


def assert_same_run(folder: Path, expected: Path, tolerance: float) -> None:
    assert ledger(folder) == ledger(expected), folder.name
    for name in ("loss", "grad_norm", "learning_rate"):
        assert column(folder, name) == pytest.approx(column(expected, name), rel=tolerance), (folder.name, name)


def assert_same_state(checkpoint: Path, expected: Path) -> None:
    """Compares weights and moments tensor by tensor, up to the rounding of fp32 sums in another order."""
    found, wanted = read_tensors(checkpoint), read_tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        scale = float(tensor.abs().max()) or 1.0
        difference = float((found[name] - tensor).abs().max())
        assert difference <= 2e-4 * scale, (checkpoint, name, difference / scale)


@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(name, marks=pytest.mark.promise) for name in ("bf16", "fp16"))]
)
def test_every_backend_trains_the_same_run(make_config: MakeConfig, cpu_with_fp16: str, precision: str) -> None:
    common = (*TEN, f"accelerator.precision={precision}", "checkpoint.at_end=false")
    (single,) = run_all(1, [make_config("run.name=single", *common)])
    assert column(single, "loss")[-1] < 0.8 * column(single, "loss")[0]
    for world in (1, 2):
        folders = run_all(
            world,
            [
                make_config(f"run.name={name}-{world}", *BACKENDS[name], *common)
                for name in SHARED
                if precision != "fp16" or not name.startswith("accelerate")
            ],
        )
        for folder in folders:
            assert_same_run(folder, single, TOLERANCE[precision])


EVERY_PAIR = [(a, b) for a in PORTABLE for b in PORTABLE]
A_CYCLE = list(zip(PORTABLE, [*PORTABLE[1:], PORTABLE[0]], strict=True))
"""Pairs of backends: each backend writes one checkpoint and reads one."""


@pytest.mark.parametrize(
    ("first", "then", "pairs"),
    [
        pytest.param(2, 1, A_CYCLE, id="2-1-cycle"),
        pytest.param(1, 4, EVERY_PAIR, id="1-4", marks=pytest.mark.promise),
        *(
            pytest.param(a, b, EVERY_PAIR, id=f"{a}-{b}", marks=pytest.mark.slow)
            for a, b in ((2, 1), (1, 2), (4, 1), (4, 2), (2, 4), (2, 2), (4, 4))
        ),
    ],
)
def test_a_checkpoint_moves_between_backends(
    make_config: MakeConfig, first: int, then: int, pairs: list[tuple[str, str]]
) -> None:
    """5 steps on A in `first` processes and 5 on B in `then` give the losses and state of the undisturbed run."""
    (whole,) = run_all(1, [make_config("run.name=whole", *TEN, "checkpoint.every_steps=5")])
    half = (*TEN[1:], "run.max_steps=5", "scheduler.decay_steps=10")
    sources = {name: make_config(f"run.name={name}", *BACKENDS[name], *half) for name in PORTABLE}
    run_all(1, [sources.pop("single")])
    run_all(first, list(sources.values()))
    storage = whole.parent
    for name in PORTABLE:
        assert_same_run_half(storage / name, whole)
        assert_same_state(storage / name / "checkpoints" / "step-00000005", whole / "checkpoints" / "step-00000005")
    resumed = {
        (a, b): make_config(f"run.name={a}-{b}", *BACKENDS[b], *TEN, f"checkpoint.resume={storage / a}")
        for a, b in pairs
    }
    run_all(1, [config for (_, b), config in resumed.items() if b == "single"])
    run_all(then, [config for (_, b), config in resumed.items() if b != "single"])
    for a, b in resumed:
        folder = storage / f"{a}-{b}"
        assert ledger(folder) == ledger(whole)[5:]
        assert column(folder, "loss") == pytest.approx(column(whole, "loss")[5:], rel=1e-5), (a, b)
        assert column(folder, "grad_norm") == pytest.approx(column(whole, "grad_norm")[5:], rel=1e-4), (a, b)
        assert_same_state(folder / "checkpoints" / "step-00000010", whole / "checkpoints" / "step-00000010")


@pytest.mark.promise
def test_a_mixture_is_the_same_run_in_any_number_of_processes(make_config: MakeConfig, data_file: Path) -> None:
    """Also where a run resumes in the middle of a stage, in another number of processes; with the loss by source."""
    sources = ", ".join(f"{{name: {name}, path: {data_file}, format: instruction}}" for name in ("a", "b"))
    mixed = (
        *TEN,
        f"data.train=[{sources}]",
        "data.mixture=[{until: 30%, shares: {a: 1}}, {until: 80%, shares: {a: 0.25, b: 0.75}}, {shares: {b: 1}}]",
        "checkpoint.every_steps=5",
    )
    (whole,) = run_all(1, [make_config("run.name=whole", *mixed)])
    by_source = [[name for name in ("a", "b") if f"loss/{name}" in row] for row in comparable(whole)]
    assert by_source == [["a"]] * 3 + [["a", "b"]] * 5 + [["b"]] * 2
    checkpoint = f"checkpoint.resume={whole / 'checkpoints' / 'step-00000005'}"
    names = ("ddp", "fsdp")
    configs = [make_config(f"run.name={name}", *BACKENDS[name], *mixed) for name in names]
    configs += [make_config(f"run.name={name}-5", *BACKENDS[name], *mixed, checkpoint) for name in names]
    folders = run_all(2, configs)
    for folder in folders[:2]:
        assert_same_run(folder, whole, TOLERANCE["fp32"])
    for folder in folders[2:]:
        assert ledger(folder) == ledger(whole)[5:]
        for metric in ("loss", "loss/b"):
            expected = [row[metric] for row in comparable(whole)[5:]]
            assert column(folder, metric) == pytest.approx(expected, rel=1e-5)


def assert_same_run_half(folder: Path, whole: Path) -> None:
    assert column(folder, "loss") == pytest.approx(column(whole, "loss")[:5], rel=1e-5), folder.name


def test_a_resume_is_bitwise_the_same_on_every_backend(make_config: MakeConfig) -> None:
    """Stops at step 5, resumes on the same backend, and compares with an uninterrupted run."""
    for precision in ("bf16",):
        common = (*TEN, f"accelerator.precision={precision}", "checkpoint.every_steps=5")
        names = [f"{name}-{precision}" for name in SHARED]
        folders = run_all(
            2, [make_config(f"run.name={n}", *BACKENDS[name], *common) for n, name in zip(names, SHARED, strict=True)]
        )
        again = run_all(
            2,
            [
                make_config(
                    f"run.name={n}-again",
                    *BACKENDS[name],
                    *common,
                    f"checkpoint.resume={folder / 'checkpoints' / 'step-00000005'}",
                )
                for n, name, folder in zip(names, SHARED, folders, strict=True)
            ],
        )
        for folder, resumed in zip(folders, again, strict=True):
            assert comparable(resumed) == comparable(folder)[5:], resumed.name
            last = "checkpoints/step-00000010"
            found, wanted = read_tensors(resumed / last), read_tensors(folder / last)
            assert all(torch.equal(found[k], wanted[k]) for k in wanted), resumed.name
