"""Serves a model with Ray Serve: replicas of the ASGI application behind one HTTP proxy."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from myllm_ray.common.signals import stop_on_signals
from myllm_ray.config.errors import ConfigError
from myllm_ray.orchestration import session
from myllm_ray.serving.engine import MOST_TOGETHER
from myllm_ray.serving.server import Service, opened_app

log = logging.getLogger(__name__)
_NAME = "myllm_ray"
_CLASS = re.compile(r"^(?:[\w.]+\.)?\w*Error: ")


class Replica:
    """A replica: a model, its engine and the ASGI application, in an actor of Ray Serve.

    Args:
        service: The service.
    """

    def __init__(self, service: Service):
        self._opened = ExitStack()
        self._application = self._opened.enter_context(opened_app(service)).asgi()

    def __serve_build_asgi_app__(self) -> Any:
        """Returns the application; Ray Serve calls it after the constructor."""
        return self._application

    def __del__(self) -> None:
        # Ray Serve calls it when the replica ends.
        self._opened.close()


def serve_on_ray(
    service: Service,
    host: str,
    port: int,
    replicas: int,
    ready: Callable[[], None],
    stop: threading.Event | None = None,
) -> None:
    """Serves a model on Ray until Ctrl-C, SIGTERM, or `stop` is set.

    It uses the cluster at `RAY_ADDRESS`, else a local Ray that ends with the server. The HTTP proxy runs on the head
    node.

    Args:
        service: The service.
        host: The address at which the proxy listens.
        port: Its port.
        replicas: The number of replicas. Each reserves one GPU if the cluster has GPUs.
        ready: Is called when requests are answered.
        stop: Ends the server from another thread.

    Raises:
        ConfigError: The cluster can't be reached or is too small, it runs Ray Serve already, or a replica or the proxy
            can't start.
    """
    started = session.connect(None, cpus=replicas + 1)
    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if serve.status().proxies:
            raise ConfigError(
                "this Ray cluster runs Ray Serve already, with its own address: use --workers 0, or another cluster"
            )
        options = _actor_options(service, replicas, os.cpu_count() or 1 if started else replicas)
        ended = stop or threading.Event()
        with stop_on_signals(lambda _: ended.set()):
            try:
                _start(service, host, port, replicas, options)
                if not ended.is_set():
                    ready()
                ended.wait()
            finally:
                with suppress(Exception):  # Ray may have ended already
                    serve.shutdown()
    finally:
        if started:
            ray.shutdown()


def _start(service: Service, host: str, port: int, replicas: int, options: dict[str, Any]) -> None:
    """Starts the proxy and the replicas, and waits until they are ready.

    Raises:
        ConfigError: One of them can't start.
    """
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    deployment = serve.deployment(
        name=_NAME,
        num_replicas=replicas,
        ray_actor_options=options,
        # Requests beyond this number wait in the proxy, where a replica that becomes free takes them.
        max_ongoing_requests=4 * MOST_TOGETHER,
        max_constructor_retry_count=1,
        logging_config=quiet,
    )(serve.ingress()(Replica))
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=quiet)
        serve.run(deployment.bind(service), name=_NAME, route_prefix="/", logging_config=quiet)
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        raise ConfigError(f"Ray Serve can't serve {service.name}: {_cause(_replica_message() or str(error))}") from None


def _actor_options(service: Service, replicas: int, cores: int) -> dict[str, Any]:
    """Returns the resources of one replica.

    Args:
        service: The service.
        replicas: The number of replicas.
        cores: The CPUs to divide among them.

    Raises:
        ConfigError: The cluster has too few.
    """
    has = ray.cluster_resources()
    cpus, gpus = max(1, cores // replicas), 0 if service.device == "cpu" else int(has.get("GPU", 0) > 0)
    for name, amount in (("CPU", cpus), ("GPU", gpus)):
        if amount * replicas > has.get(name, 0):
            other = ", or --device cpu" if name == "GPU" and service.engine == "local" else ""
            raise ConfigError(
                f"--workers {replicas} need {amount * replicas} {name}s, the Ray cluster has {has.get(name, 0):g}: "
                f"use fewer workers{other}"
            )
    return {"num_cpus": cpus, "num_gpus": gpus}


def _replica_message() -> str:
    """Returns the message of the deployment, which has the error of a replica, or "".

    The exception of `serve.run` has it only if the application had read it when it failed.
    """
    with suppress(Exception):  # the controller may have ended
        application = serve.status().applications[_NAME]
        return "\n".join(found.message for found in application.deployments.values())
    return ""


def _cause(message: str) -> str:
    """Returns the last line of a message of Ray Serve, which is the error in the replica, without its class."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return _CLASS.sub("", lines[-1]) if lines else "no reason is given"
