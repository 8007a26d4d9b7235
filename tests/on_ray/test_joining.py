"""Joins a running cluster with Ray's token authentication, configured by a token file and an address only.

The cluster is started with `ray start`, as a user would do it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, comparable
from harness import Server, job_config

BINARIES = Path(sys.executable).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a Ray server with a token file in a separate HOME."""
    server = Server(tmp_path_factory.mktemp("home"), "token", dashboard=False)
    try:
        server.wait_for_node()
        yield server
    finally:
        server.stop()


def run(server: Server, folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `command` as a user who has the token file and sets RAY_ADDRESS."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"
    }
    environment |= {
        "HOME": str(server.folder),
        "RAY_ADDRESS": server.cluster,
        "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}",
        **variables,
    }
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150, check=False
    )


def config_file(folder: Path, *overrides: str) -> Path:
    path = folder / "job.json"
    path.write_text(
        json.dumps(
            job_config(folder, "job", "scaling.workers=1", "accelerator.name=ddp", "run.max_steps=2", *overrides)
        )
    )
    return path


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_train_on_a_cluster_with_a_token(server: Server, tmp_path: Path) -> None:
    result = run(server, tmp_path, str(BINARIES / "myllm-ray"), "train", str(config_file(tmp_path)))
    assert result.returncode == 0, result.stdout + result.stderr
    assert [row["step"] for row in comparable(tmp_path / "runs" / "job")] == [1, 2]
    said = result.stdout + result.stderr
    assert "auth" not in said.lower(), "nothing that a user would have to understand"


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_python_that_has_imported_ray_before(server: Server, tmp_path: Path) -> None:
    code = f"import ray\nfrom myllm_ray import train\nprint(train({str(config_file(tmp_path))!r}).step)"
    result = run(server, tmp_path, sys.executable, "-c", code)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "2"


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_sweep_on_a_cluster_with_a_token(server: Server, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(
        json.dumps(
            {
                "base": str(config_file(tmp_path, "checkpoint.resume=never")),
                "space": {"optimizer.lr": {"choice": [1e-3, 2e-3]}},
                "trials": 2,
                "run": {"name": "sweep", "storage": str(tmp_path / "runs")},
            }
        )
    )
    result = run(server, tmp_path, str(BINARIES / "myllm-ray"), "sweep", str(tmp_path / "sweep.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "runs" / "sweep" / "best.yaml").exists()


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"RAY_AUTH_TOKEN": "wrong" * 8},
            "Token: the one in the environment variable RAY_AUTH_TOKEN; set it to the cluster's token",
        ),
        (
            {"HOME": "/nowhere"},
            "Token: none found in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and /nowhere/.ray/auth_token; set RAY_AUTH_TOKEN",
        ),
    ],
)
def test_a_wrong_token_is_reported(server: Server, tmp_path: Path, variables: dict[str, str], said: str) -> None:
    result = run(server, tmp_path, str(BINARIES / "myllm-ray"), "train", str(config_file(tmp_path)), **variables)
    assert result.returncode == 2, result.stdout + result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: Ray at")
    assert said in last
    assert "wrongwrong" not in result.stdout + result.stderr
    assert not (tmp_path / "runs").exists()
