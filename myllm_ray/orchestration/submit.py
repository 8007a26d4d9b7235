"""Run a config as a job on a Ray cluster: what `ray job submit -- python jobs/train.py` does, with the token question settled."""

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
"""Seconds to wait for a cluster that has just started: its head accepts jobs before an agent can run them."""


def submit(config: str, overrides: Sequence[str], address: str, working_dir: Path) -> int:
    """Submit, print the job's output as it comes, and return 0 if it succeeded, else 1.

    Raises:
        ConfigError: the cluster can't be reached, or refuses the token.
    """
    environment.prepare(joining=True)
    from ray.job_submission import JobStatus, JobSubmissionClient

    entrypoint = shlex.join(["python", "-m", "myllm_ray.cli", "train", config, *overrides])
    try:
        client = JobSubmissionClient(address)
        job = _submitted(client, entrypoint, {
            "working_dir": str(working_dir),
            # `ray job stop` sends SIGTERM, and after this long SIGKILL; its default of 3 s is not enough to save a checkpoint.
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}})
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
    """The id of the job. Waits for an agent as long as `AGENT_TIMEOUT`."""
    limit = time.monotonic() + AGENT_TIMEOUT
    while True:
        try:
            job: str = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
            return job
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > limit:
                raise
        time.sleep(1)
