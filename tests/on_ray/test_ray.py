"""Runs on Ray: the same batches and losses as in one process at every world size; resume, recovery and jobs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, ROOT, MakeConfig, comparable, instruction_rows, ledger
from harness import Server, job_config

from myllm_ray import train
from myllm_ray.config import ConfigError, DataError, TrainerConfig, TrainingError
from myllm_ray.engine.checkpointing.manager import read_tensors
from myllm_ray.trained_model import open_run

pytestmark = pytest.mark.usefixtures("ray_cluster")


def losses(folder: str | Path) -> list[float]:
    return [r["loss"] for r in comparable(folder)]


def norms(folder: str | Path) -> list[float]:
    return [r["grad_norm"] for r in comparable(folder)]


FEW = [("fsdp", 2)]
THREE = [("ddp", 0), ("accelerate", 4), ("deepspeed", 2)]
ALL = [
    ("single", 1),
    *((name, workers) for name in ("ddp", "fsdp", "accelerate", "deepspeed") for workers in (0, 1, 2, 4)),
]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(FEW, id="few"),
        pytest.param(THREE, id="three", marks=pytest.mark.promise),
        pytest.param(ALL, id="all", marks=pytest.mark.slow),
    ],
)
def test_same_run_at_every_world_size(make_config: MakeConfig, cases: list[tuple[str, int]]) -> None:
    """20 steps in fp32 with 0, 1, 2 and 4 workers; 0 runs in this process, without Ray."""
    common = ("run.max_steps=20", "evaluation.every_steps=10", "batch.micro_size=1")
    expected = train(make_config("run.name=plain", *common)).folder
    assert {r["epoch"] for r in ledger(expected)} >= {0, 1}
    for accelerator, workers in cases:
        folder = train(
            make_config(
                f"run.name={accelerator}-{workers}",
                f"accelerator.name={accelerator}",
                f"scaling.workers={workers}",
                *common,
            )
        ).folder
        assert ledger(folder) == ledger(expected), (accelerator, workers)
        assert losses(folder) == pytest.approx(losses(expected), rel=1e-5), (accelerator, workers)
        assert norms(folder) == pytest.approx(norms(expected), rel=1e-4), (accelerator, workers)
        validation = [r["validation_loss"] for r in comparable(folder) if "validation_loss" in r]
        assert validation == pytest.approx(
            [r["validation_loss"] for r in comparable(expected) if "validation_loss" in r], rel=1e-5
        )
        assert not (Path(folder) / ".ray").exists()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("accelerator", "workers"),
    [
        pytest.param("fsdp", 2, marks=pytest.mark.promise),
        *(
            pytest.param(name, workers, marks=pytest.mark.slow)
            for name, workers in (("single", 1), ("ddp", 2), ("accelerate", 2), ("deepspeed", 2))
        ),
    ],
)
def test_stop_and_resume_is_bitwise_the_same(make_config: MakeConfig, accelerator: str, workers: int) -> None:
    """Stops at step 13 of 30, in the middle of the second epoch."""
    common = (
        f"accelerator.name={accelerator}",
        f"scaling.workers={workers}",
        "run.max_steps=30",
        "batch.global_size=4",
        "data.packing=false",
        "checkpoint.resume=auto",
    )
    whole = train(make_config("run.name=whole", *common)).folder
    stop = {"helpers:StopAt": {"step": 13}}
    cut = train(make_config("run.name=cut", *common, callbacks=["jsonl", stop])).folder
    assert (ledger(cut)[-1]["step"], ledger(cut)[-1]["epoch"]) == (13, 1)
    train(make_config("run.name=cut", *common))
    assert comparable(cut) == comparable(whole)
    assert ledger(cut) == ledger(whole)


@pytest.mark.promise
def test_a_killed_worker_does_not_change_the_result(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL of rank 0 after step 7; the group restarts from the checkpoint of step 5.

    Also checks what the driver prints during the undisturbed run.
    """
    common = ("accelerator.name=ddp", "scaling.workers=2", "run.max_steps=10", "checkpoint.every_steps=5")
    whole = train(make_config("run.name=whole", *common, "callbacks=[console, jsonl]")).folder
    out = capsys.readouterr().out
    for piece in ("training 10 steps", "step 1/10", "step 10/10", "saved ", "done: 10 steps"):
        assert piece in out, "displays run in the driver"
    kill = {"helpers:KillOnce": {"step": 7, "marker": str(tmp_path / "killed")}}
    killed = train(make_config("run.name=killed", *common, "scaling.max_failures=1", callbacks=["jsonl", kill])).folder
    assert (tmp_path / "killed").exists()
    assert comparable(killed) == comparable(whole)
    assert ledger(killed) == ledger(whole)
    again = train(make_config("run.name=killed", *common, "checkpoint.resume=auto", "scaling.workers=0"))
    assert (again.step, comparable(killed)) == (10, comparable(whole)), "a finished run is left as it is"


@pytest.mark.promise
def test_loop_function_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    """`TorchTrainer(sft_loop, train_loop_config=...)` in a user's script."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from myllm_ray import sft_loop

    config = make_config("accelerator.name=ddp", "scaling.workers=2", "run.name=alone")
    trainer = TorchTrainer(
        sft_loop,
        train_loop_config=config.model_dump(mode="json"),  # type: ignore[arg-type]
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path / "ray")),
    )
    result = trainer.fit()
    summary: Any = result.return_value
    assert result.metrics is not None
    assert result.checkpoint is not None
    logged = comparable(summary["folder"])[-1]
    assert {name: result.metrics[name] for name in logged if name != "epoch"} == {
        n: v for n, v in logged.items() if n != "epoch"
    }
    assert Path(result.checkpoint.path).is_relative_to(tmp_path / "ray")
    shutil.rmtree(Path(summary["folder"]) / "checkpoints")  # Ray's storage keeps its own hard links to the files
    model, tokenizer = open_run(result.checkpoint.path)
    assert tokenizer.decode(tokenizer("red").input_ids) == "red"
    trained = read_tensors(Path(result.checkpoint.path))
    assert all(torch.equal(value, trained[f"model.{name}"]) for name, value in model.named_parameters())
    expected = train(make_config("run.name=plain")).folder
    assert summary["step"] == 6
    assert ledger(summary["folder"]) == ledger(expected)
    assert losses(summary["folder"]) == pytest.approx(losses(expected), rel=1e-5)


@pytest.mark.promise
def test_custom_trainer_example_on_remote_workers(tmp_path: Path) -> None:
    from myllm_ray import load_config

    config = ROOT / "examples" / "custom_trainer" / "config.yaml"
    overrides = [f"run.storage={tmp_path}", "run.max_steps=5", "callbacks=[jsonl]"]
    sys.path.insert(0, str(config.parent))
    try:
        one = train(load_config(config, overrides))
        two = train(
            load_config(config, [*overrides, "accelerator.name=ddp", "scaling.workers=2", "run.name=focal-ddp"])
        )
    finally:
        sys.path.remove(str(config.parent))
    assert losses(one.folder) == pytest.approx(losses(two.folder), rel=1e-5)
    assert losses(one.folder)[-1] < losses(one.folder)[0]


def refused(config: TrainerConfig, error: type[Exception], said: str) -> None:
    before = sorted(Path(config.run.storage).rglob("*")) if Path(config.run.storage).exists() else []
    with pytest.raises(error, match=said) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    after = sorted(Path(config.run.storage).rglob("*")) if Path(config.run.storage).exists() else []
    assert after == before, "nothing half-written"


def test_mistakes_are_reported_before_workers_start(make_config: MakeConfig, tmp_path: Path) -> None:
    ray_two = ("accelerator.name=ddp", "scaling.workers=2")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": "b"}\n{broken\n')
    refused(make_config(*ray_two, f"data.train.path={bad}"), DataError, rf"{bad}:2: not valid JSON")
    refused(make_config(*ray_two, "scaling.workers=8", "batch.global_size=16"), ConfigError, "the Ray cluster has 6")
    with pytest.raises(ConfigError, match="no module 'no'"):
        make_config(*ray_two, "trainer=no.module:X")


@pytest.mark.promise
def test_a_failure_in_a_worker_is_one_line(make_config: MakeConfig) -> None:
    config = make_config(
        "accelerator.name=ddp",
        "scaling.workers=2",
        "optimizer.lr=1e30",
        "gradient_clip=null",
        "scheduler.warmup_steps=0",
    )
    with pytest.raises(TrainingError, match=r"step \d: the gradient is not finite") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not (Path(config.run.storage) / "run" / ".ray").exists()


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_job_submission(tmp_path: Path, mode: str) -> None:
    """Submits a job to `ray start --head`: `ray job submit` without tokens, `myllm-ray submit` with tokens."""
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(instruction_rows()))
    raw = {
        "trainer": "sft",
        "model": {"config": LLAMA},
        "tokenizer": {"kind": "bytes"},
        "data": {"train": {"path": str(data), "format": "instruction"}, "sequence_length": 96},
        "batch": {"global_size": 4, "micro_size": 2},
        "accelerator": {"name": "ddp"},
        "scaling": {"workers": 2},
        "run": {"name": "job", "storage": str(tmp_path / "runs"), "max_steps": 50},
        "callbacks": ["console", "jsonl", "report"],
    }
    (tmp_path / "work" / "jobs").mkdir(parents=True)
    (tmp_path / "work" / "job.json").write_text(json.dumps(raw))
    (tmp_path / "work" / "jobs" / "train.py").write_text((ROOT / "jobs" / "train.py").read_text())
    server = Server(tmp_path, mode)
    try:
        server.wait()
        binaries = Path(sys.executable).parent
        environment = {k: v for k, v in server.environment.items() if k != "RAY_AUTH_MODE"}
        if mode == "disabled":
            command = [
                "ray",
                "job",
                "submit",
                "--address",
                server.address,
                "--working-dir",
                ".",
                "--",
                sys.executable,
                "jobs/train.py",
                "--config",
                "job.json",
                "run.max_steps=4",
            ]
            environment["RAY_AUTH_MODE"] = "disabled"
        else:
            command = ["myllm-ray", "submit", "job.json", "run.max_steps=4", "--address", server.address]
        result = subprocess.run(
            [str(binaries / command[0]), *command[1:]],
            cwd=tmp_path / "work",
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    finally:
        server.stop()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "SUCCEEDED" in result.stdout.upper(), result.stdout
    folder = tmp_path / "runs" / "job"
    assert [r["step"] for r in comparable(folder)] == [1, 2, 3, 4]
    for name in (
        "config.yaml",
        "environment.json",
        "ledger.jsonl",
        "report.html",
        "tokenizer/tokenizer.json",
        "checkpoints/step-00000004/manifest.json",
    ):
        assert (folder / name).is_file(), name


@pytest.mark.promise
@pytest.mark.timeout(600)
def test_a_job_that_is_stopped_loses_no_step(tmp_path: Path) -> None:
    """`ray job stop`: the job saves first and resumes when it is submitted again."""
    raw = job_config(
        tmp_path,
        "job",
        "accelerator.name=ddp",
        "checkpoint.every_steps=100",
        # `ray job stop` takes seconds to start on a busy machine; 16 steps take longer than that.
        f"callbacks=[console, jsonl, {{helpers:Slow: {{seconds: 3, until: {tmp_path / 'stopped'}}}}}]",
    )
    (tmp_path / "job.json").write_text(json.dumps(raw))
    shutil.copy(ROOT / "tests" / "helpers.py", tmp_path)  # a custom callback is uploaded with the working folder
    folder = tmp_path / "runs" / "job"
    server = Server(tmp_path, "disabled")
    binaries, environment = Path(sys.executable).parent, server.environment
    command = [str(binaries / "myllm-ray"), "submit", str(tmp_path / "job.json"), "--address", server.address]
    try:
        server.wait()
        job = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        limit = time.monotonic() + 240
        while not (folder / "ledger.jsonl").exists() or len(ledger(folder)) < 3:
            assert job.poll() is None, job.communicate()
            assert time.monotonic() < limit
            time.sleep(0.05)
        assert job.stdout is not None
        name = job.stdout.readline().split()[1]
        subprocess.run(
            [str(binaries / "ray"), "job", "stop", name, "--address", server.address],
            env=environment,
            check=True,
            capture_output=True,
            timeout=100,
        )
        job.communicate(timeout=60)
        (tmp_path / "stopped").touch()
        steps = len(ledger(folder))
        assert 3 <= steps < 16
        assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
        again = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150, check=False
        )
    finally:
        server.stop()
    assert again.returncode == 0, again.stdout
    assert f"resuming from step {steps}" in again.stdout
    assert [row["step"] for row in ledger(folder)] == list(range(1, 17))
