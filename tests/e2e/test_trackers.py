"""Runs with trackers, read back from what each library has stored: killed and resumed, and with a server that fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import read_jsonl
from harness import STEPS, compare, free_port, job_config

from e2e.test_kills import killed
from myllm_ray import train
from myllm_ray.engine.amendments import amend
from myllm_ray.engine.reporting.trackers.process import read_state
from myllm_ray.engine.reporting.trackers.wandb import offline_files, records_in, steps_in


class MLflowServer:
    """A real `mlflow server` with SQLite."""

    def __init__(self, folder: Path):
        self.uri = f"http://127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
        command += ["--port", self.uri.rpartition(":")[2], "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for _ in range(240):
            with suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.5)
        raise AssertionError("the server did not start")

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trackers")


@pytest.fixture(scope="module")
def server(shared: Path) -> Iterator[MLflowServer]:
    server = MLflowServer(shared)
    yield server
    server.stop()


def config_of(shared: Path, name: str, tracking: list[Any], *overrides: str) -> dict[str, Any]:
    return {
        **job_config(
            shared, name, "scaling.workers=0", "accelerator.name=single", "checkpoint.every_steps=3", *overrides
        ),
        "callbacks": ["jsonl"],
        "tracking": tracking,
    }


@pytest.fixture(scope="module")
def run(shared: Path, server: MLflowServer) -> Path:
    """The folder of a run that was killed after step 11, two steps after a checkpoint, and resumed."""
    patient = {"project": "llm", "group": "g", "wait_seconds": 120}
    tracking = [
        {"name": "tensorboard", **patient},
        {"name": "wandb", "mode": "offline", "tags": ["t"], **patient},
        {
            "name": "mlflow",
            "uri": server.uri,
            "artifacts": "last",
            "registered_model": "tiny",
            "tags": ["t"],
            **patient,
        },
        {"name": "trackio", "folder": str(shared / "trackio"), **patient},
    ]
    config = config_of(shared, "killed", tracking)
    # Slow steps: without them the run ends before the libraries are imported.
    config["callbacks"] += [
        {"helpers:Slow": {"seconds": 1.5}},
        {"helpers:KillOnce": {"step": 11, "marker": str(shared / "killed.once")}},
    ]
    assert killed(config)
    config["callbacks"] = ["jsonl"]
    result = train(config)
    assert result.step == STEPS
    return Path(result.folder)


def expected(folder: Path) -> list[tuple[int, float]]:
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [(row["step"], row["loss"]) for row in rows]


def check_curve(found: list[tuple[int, float]], folder: Path) -> None:
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected(folder)], rel=1e-6)


@pytest.mark.promise
def test_tensorboard_has_one_curve(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    check_curve([(event.step, event.value) for event in reader.Scalars("loss")], run)


@pytest.mark.promise
def test_wandb_has_one_curve(run: Path) -> None:
    import json

    folders = {path.name for path in (run / "wandb").glob("offline-run-*")}
    ids = {name.rpartition("-")[2] for name in folders}
    assert len(ids) == 1, "the run keeps its id"
    assert len(folders) == 2, "the killed attempt has delivered something"
    found, started = [], []
    for path in offline_files(run, ids.pop()):
        assert steps_in(path)
        for record in records_in(path):
            if record.WhichOneof("record_type") == "history":
                values = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
                found.append((values["_step"], values["loss"]))
            elif record.WhichOneof("record_type") == "run":
                started.append(record.run)
    check_curve(found, run)
    assert {(r.project, r.run_group, r.display_name, tuple(r.tags)) for r in started} == {
        ("llm", "g", "killed", ("t",))
    }
    assert "learning_rate" not in {item.key for item in started[0].config.update}
    assert {"optimizer", "model", "environment"} <= {item.key for item in started[0].config.update}


@pytest.mark.promise
def test_mlflow_has_one_curve_and_a_model(run: Path, server: MLflowServer) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("llm")
    runs = client.search_runs([experiment.experiment_id])
    parent = next(r for r in runs if r.info.run_name == "g")
    (tracked,) = [r for r in runs if r.info.run_name == "killed"]
    assert tracked.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (tracked.info.status, tracked.data.tags["t"]) == ("FINISHED", "true")
    assert tracked.data.params["optimizer.lr"] == "0.003"
    found = sorted((m.step, m.value) for m in client.get_metric_history(tracked.info.run_id, "loss"))
    check_curve(found, run)
    (version,) = client.search_model_versions("name = 'tiny'")
    assert version.run_id == tracked.info.run_id
    path = f"model/checkpoints/step-{STEPS:08d}"
    names = {Path(f.path).name for f in client.list_artifacts(tracked.info.run_id, path)}
    assert names == {p.name for p in (run / "checkpoints" / f"step-{STEPS:08d}").iterdir()}
    assert version.tags == {"checkpoint": f"step-{STEPS:08d}"}


@pytest.mark.slow
def test_mlflow_has_the_amended_config_and_a_parent_that_exists(shared: Path, server: MLflowServer) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    tracking = [{"name": "mlflow", "uri": server.uri, "project": "changed", "group": "h", "wait_seconds": 60}]
    short = ("run.max_steps=3", "checkpoint.resume=auto")
    folder = Path(train(config_of(shared, "longer", tracking, *short)).folder)
    parent = client.search_runs([client.get_experiment_by_name("changed").experiment_id], "tags.mlflow.runName = 'h'")
    amend(folder, "now", {"run.max_steps": 5}, 1)
    train(config_of(shared, "longer", tracking, *short))
    (tracked,) = client.search_runs([parent[0].info.experiment_id], "tags.mlflow.runName = 'longer'")
    assert [m.step for m in client.get_metric_history(tracked.info.run_id, "loss")] == [1, 2, 3, 4, 5]
    assert "run.max_steps: 5" in Path(client.download_artifacts(tracked.info.run_id, "config.yaml")).read_text()
    client.delete_run(parent[0].info.run_id)
    train(config_of(shared, "another", tracking, "run.max_steps=1"))
    (another,) = client.search_runs([parent[0].info.experiment_id], "tags.mlflow.runName = 'another'")
    new = client.get_run(another.data.tags["mlflow.parentRunId"])
    assert (new.info.run_name, new.info.lifecycle_stage) == ("h", "active")


@pytest.mark.slow
def test_trackio_has_one_curve(run: Path, shared: Path) -> None:
    import sqlite3

    with sqlite3.connect(shared / "trackio" / "llm.db") as database:
        rows = database.execute(
            "SELECT run_name, step, json_extract(metrics, '$.loss') FROM metrics ORDER BY id"
        ).fetchall()
    assert {name for name, _, _ in rows} == {"killed"}
    check_curve([(step, loss) for _, step, loss in rows], run)


@pytest.fixture(scope="module")
def plain(shared: Path) -> str:
    return train(config_of(shared, "plain", [])).folder


@pytest.mark.promise
def test_a_server_that_never_answers(shared: Path, plain: str, warned: list[str]) -> None:
    """A socket that accepts connections and never answers: same weights, one warning, and the process ends."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = train(config_of(shared, "silent", [{"name": "mlflow", "uri": uri, "wait_seconds": 2}]))
    assert compare(Path(result.folder), Path(plain)).identical
    assert len([text for text in warned if "tracker mlflow" in text]) == 1
    assert f"{STEPS} of {STEPS} logged steps were not delivered" in warned[-1]


@pytest.mark.promise
def test_a_server_that_is_killed(shared: Path, plain: str, server: MLflowServer, warned: list[str]) -> None:
    """Comes last in this file: the server is killed within the run, when it has received a part of it."""
    tracking = [{"name": "mlflow", "uri": server.uri, "project": "lost", "wait_seconds": 5}]
    config = config_of(shared, "lost", tracking)
    config["callbacks"] += [{"helpers:Slow": {"seconds": 1.5}}]

    def kill_when_it_has_a_step() -> None:
        for _ in range(300):
            if read_state(shared / "runs" / "lost", "mlflow").get("step", -1) >= 1:
                break
            time.sleep(0.1)
        server.stop()

    thread = threading.Thread(target=kill_when_it_has_a_step)
    thread.start()
    result = train(config)
    thread.join()
    assert compare(Path(result.folder), Path(plain)).identical
    delivered = read_state(Path(result.folder), "mlflow")["step"]
    assert 0 < delivered < STEPS
    assert "training continues" in warned[0]
    assert f"{STEPS - delivered} of {STEPS} logged steps were not delivered" in warned[1]
    assert len(warned) == 2
