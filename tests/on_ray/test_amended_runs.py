"""`myllm-ray amend` against an active run on Ray: the workers resume with the new values, and the curve is that of a
run that starts with the amended config."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, MakeConfig, comparable, ledger
from harness import BACKENDS, Job, attempts_of, compare, job_config, place, weights

from myllm_ray import train
from myllm_ray.engine.amendments import recorded


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_active_run_on_ray(tmp_path: Path) -> None:
    """Two workers, amended by the command (batch size, learning rate and length), then one worker is killed."""
    with place(cpus=3) as where:
        slow = "callbacks=[console, jsonl, {helpers:Slow: {seconds: 0.3}}]"
        raw = job_config(tmp_path, "ray", *BACKENDS["fsdp"], "run.max_steps=30", slow)
        job = Job(raw, where.address).start()
        job.until(lambda: job.steps() >= 2)
        values = ("optimizer.lr=1e-3", "batch.global_size=8", "run.max_steps=18")
        said = subprocess.run(
            [sys.executable, "-m", "myllm_ray.cli", "amend", str(job.folder), *values],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])},
            capture_output=True,
            text=True,
        )
        assert said.returncode == 0, said.stderr + job.said()
        (amendment,) = recorded(job.folder)
        at = amendment["at"]
        assert said.stdout.startswith(f"amended after step {at}: batch.global_size was 4, now it is 8; optimizer.lr")
        assert amendment["set"] == {"optimizer.lr": 1e-3, "batch.global_size": 8, "run.max_steps": 18}
        job.until(lambda: job.steps() > at + 1)
        os.kill(job.until(job.workers)[1], 9)
        assert job.end(300) == 0, job.said()
        ends = [attempt["end"] for attempt in attempts_of(job.folder)]
        assert ends[0] == "amended: myllm-ray amend"
        assert ends[1].startswith("failed")
        assert ends[2:] == ["done"]
        anew = job_config(
            tmp_path,
            "anew",
            *BACKENDS["fsdp"],
            "run.max_steps=30",
            f"run.amendments={json.dumps([amendment])}",
        )
        other = Job(anew, where.address).start()
        assert other.end(300) == 0, other.said()
        assert [attempt["end"] for attempt in attempts_of(other.folder)] == [
            f"amended: run.amendments: step {at}",
            "done",
        ]
    found = compare(job.folder, other.folder, 18)
    assert found.identical, found
    # One process, within rounding.
    plain = train(
        job_config(
            tmp_path,
            "plain",
            "scaling.workers=0",
            "accelerator.name=single",
            "run.max_steps=30",
            "callbacks=[jsonl]",
            f"run.amendments={json.dumps([amendment])}",
        )
    )
    for ours, theirs in zip(comparable(job.folder), comparable(plain.folder), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["learning_rate"] == theirs["learning_rate"]
    assert weights(Path(plain.folder), 18)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_loop_function_alone(make_config: MakeConfig, tmp_path: Path, ray_cluster: None) -> None:
    """A user-defined TorchTrainer: the workers train all segments, without a launcher."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from myllm_ray import sft_loop

    given = "run.amendments=[{at: 2, set: {optimizer.lr: 1e-3}}, {at: 4, set: {batch.global_size: 4}}]"
    config = make_config("accelerator.name=ddp", "scaling.workers=2", "run.name=alone", given)
    result = TorchTrainer(
        sft_loop,
        train_loop_config=config.model_dump(mode="json"),  # type: ignore[arg-type]
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    summary: Any = result.return_value
    assert (summary["step"], summary["exit"]) == (6, None)
    expected = train(make_config("run.name=plain", given)).folder
    assert ledger(summary["folder"]) == ledger(expected)
    for ours, theirs in zip(comparable(summary["folder"]), comparable(expected), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
