"""Runs with checkpoints and records on S3: killed, on a faulty server, and resumed on a machine without the disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import comparable, ledger
from harness import ROOT, compare, job_config
from s3_server import FaultyProxy, environment_of, s3_server

PATH = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])


def start(config: dict[str, Any], folder: Path, proxy: FaultyProxy) -> subprocess.Popen[str]:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return subprocess.Popen(
        [sys.executable, "-m", "myllm_ray.cli", "train", str(path)],
        env={**os.environ, "PYTHONPATH": PATH, **environment_of(proxy)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )


def mirrored(folder: Path, *overrides: str) -> dict[str, Any]:
    options = ("scaling.workers=0", "accelerator.name=single", "callbacks=[console, jsonl]", "checkpoint.every_steps=2")
    return job_config(folder, "job", *options, "checkpoint.mirror=s3://bucket/runs", *overrides)


@pytest.mark.timeout(2700)
@pytest.mark.parametrize(
    ("kills", "background"),
    [
        pytest.param(2, "true", id="two", marks=pytest.mark.promise),
        pytest.param(20, "false", id="twenty", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_without_the_disk(tmp_path: Path, kills: int, background: str) -> None:
    """After each kill the run's folder is lost. The server fails, is slow, cuts answers, and is away for seconds."""
    from myllm_ray import train

    steps = 16 if kills < 10 else 160
    whole = job_config(
        tmp_path, "whole", "scaling.workers=0", "accelerator.name=single", "callbacks=[jsonl]", f"run.max_steps={steps}"
    )
    expected = Path(train(whole).folder)
    rng = random.Random(kills)
    slow = "callbacks=[console, jsonl, {helpers:Slow: {seconds: 0.2}}]"
    config = mirrored(tmp_path, f"run.max_steps={steps}", f"checkpoint.async={background}", slow)
    folder = Path(config["run"]["storage"]) / "job"
    with s3_server(tmp_path, seed=kills) as proxy:
        proxy.share = 0.15
        done = 0
        for number in range(kills):
            job = start(config, tmp_path, proxy)
            target = done + rng.randint(5, 8)
            while job.poll() is None and (not (folder / "ledger.jsonl").exists() or last_step(folder) < target):
                time.sleep(0.02)
            if number % 2:  # the server goes away in the middle of a save, and the run is killed while it waits
                proxy.down = True
                time.sleep(rng.random())
            if job.poll() is None:
                job.send_signal(signal.SIGKILL)
            job.communicate()
            proxy.down = False
            done = stored_step(proxy)
            shutil.rmtree(folder)
        job = start(config, tmp_path, proxy)
        said = job.communicate(timeout=1200)[0]
        assert job.returncode == 0, said
        assert {"500", "503", "slow", "cut"} <= set(proxy.faults) or kills < 10, proxy.faults
    assert 0 < done < steps
    assert f"resuming from step {done}" in said
    found = compare(folder, expected)
    assert (found.lost_or_repeated, found.losses) == (0, 0.0)
    assert ledger(folder) == ledger(expected)
    assert comparable(folder) == comparable(expected)


def last_step(folder: Path) -> int:
    return max((row["step"] for row in ledger(folder)), default=0)


def stored_step(proxy: FaultyProxy) -> int:
    """Returns the step of the newest complete checkpoint on the server, asked without the proxy."""
    import urllib.request

    with urllib.request.urlopen(
        f"http://127.0.0.1:{proxy.port}/bucket?list-type=2&prefix=runs/job/step-", timeout=30
    ) as answer:
        text = answer.read().decode()
    names = [part.split("/manifest.json")[0] for part in text.split("<Key>") if "/manifest.json</Key>" in part]
    return max((int(name.rpartition("step-")[2]) for name in names), default=0)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_server_that_is_away_for_some_seconds(tmp_path: Path) -> None:
    """The save waits and training resumes after it; a server that refuses access ends the run with one line."""
    config = mirrored(tmp_path)
    with s3_server(tmp_path) as proxy:
        proxy.down = True
        job = start(config, tmp_path, proxy)
        while proxy.faults.get("down", 0) < 12 and job.poll() is None:  # more than the client's own repetitions
            time.sleep(0.1)
        proxy.down = False
        said = job.communicate(timeout=200)[0]
        assert job.returncode == 0, said
        assert "trying again in" in said
        other = mirrored(tmp_path, "run.name=refused", "checkpoint.mirror=s3://nowhere/runs")
        job = start(other, tmp_path, proxy)
        said = job.communicate(timeout=200)[0]
        assert job.returncode == 2, said
        assert "checkpoint.mirror: s3://nowhere/runs/refused can't be" in said
        assert "Traceback" not in said
