"""Sweeps leave nothing in the cluster, and keep everything in their folder when the driver is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, comparable, read_jsonl
from harness import Job, job_config, place

pytestmark = pytest.mark.slow


def sweep_config(folder: Path, name: str, *overrides: str, **top: Any) -> dict[str, Any]:
    base = job_config(folder, "base", "scaling.workers=0", "accelerator.name=ddp", "logging.every_steps=1", *overrides)
    return {
        "base": base,
        "space": {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}},
        "trials": 12,
        "run": {"name": name, "storage": str(folder / "sweeps")},
        **top,
    }


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("workers", "dashboard", "seconds"), [(0, False, 5), (0, True, 5), (2, False, 5), (2, True, 5)]
)
def test_twenty_stopped_trials_leave_nothing(tmp_path: Path, workers: int, dashboard: bool, seconds: float) -> None:
    """Runs on 4 CPUs, observed from a session that continues after the sweep.

    The largest learning rate is the best: one trial of ten continues after two steps.
    """
    config = sweep_config(
        tmp_path,
        "stopped",
        f"scaling.workers={workers}",
        "scheduler.name=constant",
        "scheduler.warmup_steps=0",
        "checkpoint.every_steps=null",
    )
    config["base"]["callbacks"] = ["jsonl", {"helpers:Slow": {"seconds": 0.05}}]
    config |= {
        "space": {"optimizer.lr": {"loguniform": [1e-6, 1e-2]}},
        "trials": 20,
        "metric": "learning_rate",
        "mode": "max",
        "scheduler": {"asha": {"grace_steps": 2, "reduction_factor": 10}},
        "budget": {"steps": 60},
    }
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(config))
    with place(4, dashboard=dashboard) as where:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
        ran = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "sweep_driver.py"), where.address, str(path)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=1700,
        )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    print(json.dumps({k: v for k, v in found.items() if k != "statuses"}))
    assert len(found["statuses"]) == 20
    assert found["statuses"].count("stopped") >= 14
    assert "failed" not in found["statuses"]
    assert found["left"] == {"groups": [], "actors": []}
    assert found["until_empty"] < seconds
    assert found["cpus"] == [4, 4]
    assert found["memory"][1] < found["memory"][0] + 100, found["memory"]  # MiB
    if workers:
        assert all(count == workers for count in found["processes"].values()), found["processes"]
        assert len(found["seconds"]) == 20
        assert max(found["seconds"].values()) < seconds, found["seconds"]
        assert sum(found["groups"].values()) == 20


@pytest.mark.timeout(600)
def test_a_killed_driver_costs_no_trial(tmp_path: Path) -> None:
    """SIGKILL when 5 of 12 trials have ended; --resume gives 12 results, and no trial runs twice."""
    config = sweep_config(tmp_path, "killed", "run.max_steps=12")
    config["base"]["callbacks"] = ["jsonl", {"helpers:Slow": {"seconds": 0.1}}]
    job = Job(config, None, "sweep").start("max_concurrent=2")
    results = job.folder / "results.jsonl"
    job.until(lambda: results.exists() and len(results.read_text().splitlines()) >= 5)
    os.kill(job.process.pid, signal.SIGKILL)
    job.end()
    before = read_jsonl(results)
    written = {row["trial"]: (Path(row["folder"]) / "metrics.jsonl").stat().st_mtime_ns for row in before}
    assert 5 <= len(before) < 12

    refused = Job(config, None, "sweep").start("max_concurrent=2")
    assert refused.end() == 2
    assert "--resume continues it" in refused.said()
    again = Job(config, None, "sweep").start("max_concurrent=2", "--resume")
    assert again.end(300) == 0, again.said()[-3000:]
    rows = read_jsonl(results)
    assert sorted(row["trial"] for row in rows) == [f"{n:04d}" for n in range(12)]
    assert rows[: len(before)] == before
    for row in rows:
        assert row["status"] == "done"
        assert [line["step"] for line in comparable(row["folder"])] == list(range(1, 13))
    assert written == {name: (job.folder / "trials" / name / "metrics.jsonl").stat().st_mtime_ns for name in written}
    whole = Job(sweep_config(tmp_path, "whole", "run.max_steps=12"), None, "sweep").start()
    assert whole.end(300) == 0, whole.said()[-3000:]
    expected = {row["trial"]: row["score"] for row in read_jsonl(whole.folder / "results.jsonl")}
    assert {row["trial"]: row["score"] for row in rows} == expected


@pytest.mark.timeout(600)
def test_an_interrupted_sweep_resumes_where_its_trials_stopped(tmp_path: Path) -> None:
    """Ctrl-C while trials run: they save and the exit code is 75; with --resume none of their steps is repeated."""
    config = sweep_config(tmp_path, "interrupted", "run.max_steps=60", "checkpoint.every_steps=null", trials=3)
    config["base"]["callbacks"] = ["jsonl", {"helpers:Slow": {"seconds": 0.05}}]
    job = Job(config, None, "sweep").start("max_concurrent=2")
    metrics = [job.folder / "trials" / name / "metrics.jsonl" for name in ("0000", "0001")]
    job.until(lambda: all(path.exists() and len(path.read_text().splitlines()) >= 5 for path in metrics))
    os.kill(job.process.pid, signal.SIGINT)
    assert job.end() == 75, job.said()
    stood = [len(path.read_text().splitlines()) for path in metrics]
    for path, step in zip(metrics, stood, strict=True):
        assert 5 <= step < 60
        assert [saved.name for saved in (path.parent / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    before = [path.read_text() for path in metrics]
    again = Job(config, None, "sweep").start("max_concurrent=2", "--resume")
    assert again.end(300) == 0, again.said()[-3000:]
    for path, lines in zip(metrics, before, strict=True):
        assert path.read_text().startswith(lines)
        assert [row["step"] for row in read_jsonl(path)] == list(range(1, 61))
    assert {row["status"] for row in read_jsonl(job.folder / "results.jsonl")} == {"done"}
