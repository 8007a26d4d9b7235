"""Joining or starting Ray: tokens, logs, and CPUs that are enough."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.orchestration.auth import use_token_if_there_is_one

# Read by Ray when it is imported or started, so they stand in front of the import.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a worker's end or failure is seen after this long
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # a relative path in a user's own code keeps its meaning
if os.environ.get("RAY_ADDRESS"):
    use_token_if_there_is_one()

import ray

from myllm_ray.orchestration.cluster import check_size, cpus_needed


def connect(config: TrainerConfig, verbose: bool = False, cpus: float | None = None) -> bool:
    """Be connected to Ray: to the cluster of `RAY_ADDRESS` (every `ray job` has one), else to a new local one.

    Args:
        cpus: that a new local one needs at least; default: for one run of the config.

    Returns:
        Whether a local Ray was started here, which the caller shuts down.

    Raises:
        ConfigError: the cluster can't be reached, or is too small for the run.
    """
    started = False
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
        if not address:
            least = math.ceil(cpus_needed(config, config.scaling.most) if cpus is None else cpus)
            # More logical CPUs than cores: a laptop with 2 cores can hold 2 workers and the data tasks beside them.
            options |= {"address": "local", "num_cpus": max(os.cpu_count() or 1, least),
                        "include_dashboard": False, "runtime_env": {"env_vars": _worker_environment()}}
            started = True
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"Ray at {address or 'this machine'} can't be reached: {' '.join(str(error).split())[:300]}") from None
    if not verbose:
        for name in ("ray.train", "ray.data", "ray.tune", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
    if cpus is None:
        check_size(config)
    return started


def _worker_environment() -> dict[str, str]:
    """Modules next to where the user started are importable in workers (`trainer: my_lab.simpo:SimPOTrainer`)."""
    path = os.pathsep.join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH")) if p)
    return {"PYTHONPATH": path, "RAY_CHDIR_TO_TRIAL_DIR": "0"}

