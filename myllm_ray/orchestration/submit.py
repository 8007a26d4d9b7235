"""Runs a config as a job on a Ray cluster, as `ray job submit -- python jobs/train.py` does, with the token set."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from myllm_ray.config.errors import ConfigError
from myllm_ray.orchestration import environment

AGENT_TIMEOUT = 60.0
"""Seconds to wait for a cluster that has just started. Its head accepts jobs before an agent can run them."""


def submit(config: str, overrides: Sequence[str], address: str, working_dir: Path) -> int:
    """Submits a job, prints its output while it runs, and waits for its end.

    Args:
        config: path of the config, relative to `working_dir`.
        overrides: `key.sub=value`, as for `myllm-ray train`.
        address: address of the cluster's dashboard.
        working_dir: folder that is uploaded to the cluster; the job runs in it.

    Returns:
        0 if the job has succeeded, else 1.

    Raises:
        ConfigError: the cluster can't be reached, or refuses the token.
    """
    environment.prepare(joining=True)
    from ray.job_submission import JobStatus, JobSubmissionClient

    entrypoint = shlex.join(["python", "-m", "myllm_ray.cli", "train", config, *overrides])
    try:
        client = JobSubmissionClient(address)
        job = _submitted(
            client,
            entrypoint,
            {
                "working_dir": str(working_dir),
                # `ray job stop` sends SIGTERM, and SIGKILL after this time. The default of 3 s is too short to save a
                # checkpoint.
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"},
            },
        )
    except (ConnectionError, RuntimeError) as error:
        hint = " (set RAY_AUTH_TOKEN to the cluster's token)" if "nauthorized" in str(error) else ""
        raise ConfigError(f"Ray at {address}: {' '.join(str(error).split())[:300]}{hint}") from None
    print(f"job {job} on {address}", flush=True)

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    asyncio.run(follow())
    status = client.get_job_status(job)
    print(f"job {job}: {status.value}")
    return 0 if status == JobStatus.SUCCEEDED else 1


def _submitted(client: Any, entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """Submits the job and returns its id. Waits for an agent for at most `AGENT_TIMEOUT` seconds."""
    limit = time.monotonic() + AGENT_TIMEOUT
    while True:
        try:
            job: str = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
            return job
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > limit:
                raise
        time.sleep(1)
