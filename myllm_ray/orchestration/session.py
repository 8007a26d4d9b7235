"""Joins or starts Ray: token, logs, and the number of CPUs."""

from __future__ import annotations

import logging
import math
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray._private.worker as ray_worker
from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from myllm_ray.common.files import why_not_writable
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.orchestration import environment
from myllm_ray.orchestration.cluster import check_size, cpus_needed
from myllm_ray.orchestration.environment import environment_variables

log = logging.getLogger(__name__)
_CONNECT_SECONDS = 5.0
_own: str | None = None
"""Address of the Ray that this process has started."""


def connect(config: TrainerConfig | None, verbose: bool = False, cpus: float | None = None) -> bool:
    """Connects to Ray: to the cluster at `RAY_ADDRESS` (set in every `ray job`), else to a new local one.

    Does nothing if this process is connected already.

    Args:
        config: the run's config; None only with `cpus`.
        verbose: show Ray's own logs.
        cpus: least number of CPUs of a new local Ray; default: what one run of the config needs, which is then also
            checked against the cluster.

    Returns:
        Whether a local Ray was started. In that case the caller shuts it down.

    Raises:
        ConfigError: the cluster can't be reached, refuses the token, or is too small for the run.
    """
    started = False
    if cpus is None:
        assert config is not None, "connect needs a config or a number of CPUs"
        cpus, run = cpus_needed(config, config.scaling.most), config
    else:
        run = None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {
            "log_to_driver": verbose,
            "logging_level": logging.INFO if verbose else logging.ERROR,
        }
        if not address:
            # More logical CPUs than cores are allowed, so that a laptop with 2 cores can run 2 workers and the data
            # tasks. Ray starts a process for each CPU while the run is prepared: for the workers, `DriverLink` and
            # `Barrier`.
            least = math.ceil(cpus) + 2 * (run is not None)
            options |= {
                "address": "local",
                "num_cpus": max(os.cpu_count() or 1, least),
                "include_dashboard": False,
                **({"runtime_env": other} if (other := interpreter()) else {}),
            }
            started = True
            _token_without_a_file()
        else:
            use_token()
            _check_address(address)
        try:
            # The processes of a Ray of our own inherit the variables. A runtime environment would set them too, but
            # Ray starts the processes of such an environment only when an actor needs one, each in a second or more.
            with _own_signals(), environment_variables(_worker_environment() if started else {}):
                ray.init(**options)
        except Exception as error:  # Ray raises plain `Exception`s too: "The current node timed out during startup"
            ray.shutdown()
            raise ConfigError(_refused(address, error)) from None
        except BaseException:  # a signal during the start
            ray.shutdown()
            raise
    if started:
        global _own
        _own = ray.get_runtime_context().gcs_address
    if not verbose:
        for name in ("ray.train", "ray.data", "ray.tune", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # The controller runs in this process. It logs the errors that it also raises, with their tracebacks.
        logging.getLogger("ray.train.v2").setLevel(logging.CRITICAL)
        _shorten_error_messages()
    if run is not None:
        check_size(run)
    return started


def owns_ray() -> bool:
    """Returns whether this process has started the Ray that it is connected to."""
    return ray.is_initialized() and ray.get_runtime_context().gcs_address == _own


def _shorten_error_messages() -> None:
    """Replaces the paragraphs that Ray prints about errors on its nodes, also with `log_to_driver=False`.

    The death of a worker is dropped, because the supervisor reports it with its rank. Of other messages, such as those
    about memory, the first sentence is logged.
    """
    if hasattr(ray_worker.print_to_stdstream, "shortens"):
        return
    original = ray_worker.print_to_stdstream

    def shortened(data: dict[str, Any], *arguments: Any, **named: Any) -> None:
        if data.get("pid") != "raylet":
            original(data, *arguments, **named)
            return
        text = " ".join(" ".join(data["lines"]).split())
        dies = text.startswith("A worker died or was killed")
        log.log(logging.DEBUG if dies else logging.WARNING, "Ray: %s", text if dies else text.partition(". ")[0])

    shortened.shortens = True  # type: ignore[attr-defined]
    ray_worker.print_to_stdstream = shortened


def hides_output() -> bool:
    """Returns whether Ray does not print the output of workers; a user who calls `ray.init` can choose that."""
    # Ray prints it in a thread of this name, which exists only with `log_to_driver`.
    return not any(thread.name == "ray_print_logs" for thread in threading.enumerate())


def use_token() -> None:
    """Makes Ray send the token if there is one and `RAY_AUTH_MODE` is not set.

    This also works if Ray was imported before this package: Ray reads the mode at import, and its own function can
    change it later.
    """
    # Ray's function logs about the mode, which is not relevant to the user.
    logger = logging.getLogger(maybe_enable_token_auth_if_token_available.__module__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    finally:
        logger.setLevel(before)


def _token_without_a_file() -> None:
    """Passes a token to a local Ray in the environment if Ray cannot save one (a read-only home, as in containers)."""
    if os.environ.get(environment.AUTH_MODE, "token").lower() != "token" or environment.has_token():
        return
    if why_not_writable(Path.home() / ".ray"):
        os.environ["RAY_AUTH_TOKEN"] = generate_new_authentication_token()


def _check_address(address: str) -> None:
    """Checks that a server listens at the address. Ray itself would retry for minutes.

    Raises:
        ConfigError: nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"Ray at {address} can't be reached: {error.strerror or error}: is RAY_ADDRESS the address that "
            "`ray start --head` printed, and is the cluster up?"
        ) from None


def _refused(address: str | None, error: Exception) -> str:
    """Returns the error message for a Ray that could not be joined or started."""
    # `_check_address` has found a server. If it still refuses the connection, the usual reason is the token.
    said = " ".join(str(error).split()).partition(" Ensure that")[0][:200]
    if address is None:
        return f"Ray can't be started on this machine: {said}"
    if isinstance(error, ray.exceptions.AuthenticationError) or "Failed to connect" in said:
        return (
            f"Ray at {address} refuses this client ({said}). Most likely it expects another token. "
            f"Token: {environment.describe_token()}"
        )
    return f"Ray at {address} can't be reached: {said}"


@contextmanager
def _own_signals() -> Iterator[None]:
    """Restores the handler of SIGTERM at the end: `ray.init` sets one that exits without saving a checkpoint."""
    # Python allows handlers to be set in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before):  # else keep Ray's handler: it ends the processes that Ray has started
            with suppress(ValueError):
                signal.signal(signal.SIGTERM, before)


def interpreter() -> dict[str, str]:
    """Returns a runtime environment entry with this interpreter if its path contains characters special to a shell.

    Ray 2.60 starts workers that have a runtime environment through bash and does not quote the path. In a folder with a
    space in its name, no worker would start and a run would wait without limit.
    """
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def _worker_environment() -> dict[str, str]:
    """Returns the environment variables of workers.

    Modules in the driver's working directory are importable there (`trainer: my_lab.simpo:SimPOTrainer`).
    """
    path = os.pathsep.join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH")) if p)
    return {"PYTHONPATH": path, "RAY_CHDIR_TO_TRIAL_DIR": "0"}
