"""Opens a model for a server, and serves it in this process."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from myllm_ray.common.pretrained import pretrained_folder
from myllm_ray.common.signals import stop_on_signals
from myllm_ray.config.errors import ConfigError
from myllm_ray.engine.reporting.console import progress_shown
from myllm_ray.models.export import save_pretrained
from myllm_ray.serving.app import Application
from myllm_ray.serving.engine import Engine, LocalEngine
from myllm_ray.serving.served_model import LoadedModel, ServedModel, check_kind, chosen_device, name_of
from myllm_ray.serving.vllm_engine import VLLMEngine, vllm_installed
from myllm_ray.trained_model import open_trained

log = logging.getLogger(__name__)
_SECONDS = 3
"""Seconds that answers in progress have to end after Ctrl-C."""


@dataclass(frozen=True)
class Service:
    """What a server needs to know; it is sent to the replicas of Ray Serve.

    Attributes:
        model: The path or hub id of the model.
        name: The name that clients use.
        engine: `vllm` or `local`.
        device: The device of the engine `local`, or None for the default.
        key_digest: SHA-256 of the API key, or None. The key itself is not stored.
    """

    model: str
    name: str
    engine: str
    device: str | None = None
    key_digest: bytes | None = None


def service_of(model: str, name: str | None, engine: str, device: str | None, key_env: str | None) -> Service:
    """Returns a service after checking all that can be checked without reading weights.

    Args:
        model: The path or hub id of the model.
        name: The name that clients use; default: the name of the run or folder, or the hub id.
        engine: `auto` (vLLM if it is installed), `vllm` or `local`.
        device: The device of the engine `local`, or None for the default.
        key_env: The environment variable with the API key, or None.

    Raises:
        CheckpointError: There is no checkpoint.
        ConfigError: The model, the engine, the device or the variable can't be used.
    """
    if engine not in ("auto", "vllm", "local"):
        raise ConfigError(f"--engine {engine}: it is auto, vllm or local")
    if engine == "vllm" and not vllm_installed():
        raise ConfigError("--engine vllm: vLLM is not installed: pip install vllm, or use --engine local")
    chosen = ("vllm" if vllm_installed() else "local") if engine == "auto" else engine
    if device is not None and chosen == "vllm":
        raise ConfigError("--device applies to --engine local; vLLM chooses its devices")
    chosen_device(device)
    key = None if key_env is None else os.environ.get(key_env, "").strip()
    if key == "":
        raise ConfigError(f"--api-key-env {key_env}: the environment variable is not set, or it is empty")
    check_kind(model, "serve")
    digest = None if key is None else hashlib.sha256(key.encode()).digest()
    # Replicas may have another working directory.
    path = Path(model).expanduser()
    place = str(path.resolve()) if path.exists() else model
    return Service(place, name or name_of(model), chosen, device, digest)


@contextmanager
def opened_app(service: Service) -> Iterator[Application]:
    """Opens the model of a service and yields its application, which is closed at the end.

    Raises:
        CheckpointError: There is no complete checkpoint.
        ConfigError: The model can't be loaded, or is not a language model that the engine supports.
    """
    engine: Engine
    with tempfile.TemporaryDirectory(prefix="myllm-ray-serve-") as scratch:
        if service.engine == "vllm":
            served, folder, dtype = _in_hf_format(service, Path(scratch) / "model")
            engine = VLLMEngine(folder, served.end_tokens, dtype)
        else:
            loaded = LoadedModel(open_trained(service.model), service.name, chosen_device(service.device))
            served, engine = loaded, LocalEngine(loaded)
        app = Application(engine, served, service.key_digest)
        try:
            yield app
        finally:
            app.close()


def _in_hf_format(service: Service, folder: Path) -> tuple[ServedModel, Path, str]:
    """Returns the model without weights, a folder with it in Hugging Face format, and its dtype.

    A run is exported to `folder`; another model is used from where it is.
    """
    given = Path(service.model).expanduser()
    given = given if given.exists() else pretrained_folder(service.model, "model", weights=True)
    exported = (given / "config.json").is_file()
    opened = open_trained(given, weights=not exported)
    served, dtype = ServedModel(opened, service.name), str(opened.dtype).removeprefix("torch.")
    if exported:
        return served, given, dtype
    save_pretrained(opened.model, opened.tokenizer, folder, opened.generation, opened.dtype)
    return served, folder, dtype


def listening_socket(host: str, port: int) -> socket.socket:
    """Returns a socket that listens; `port` 0 selects a free one.

    It listens before the model is loaded: a port in use is reported at once, and clients that connect early wait.

    Raises:
        ConfigError: The address does not exist here, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"--host {host} --port {port}: {error.strerror or error}: choose another port, or end what uses it"
        ) from None
    return found


def is_loopback(host: str) -> bool:
    """Returns whether a host name or address is reachable from this machine only."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(str(address).startswith("127.") or address == "::1" for address in found)


class _Server(uvicorn.Server):
    """A uvicorn server that Ctrl-C and SIGTERM stop without raising the signal again."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        def ask(_: str) -> None:
            self.should_exit = True

        with stop_on_signals(ask):
            yield


def serve_here(service: Service, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Serves a model in this process until Ctrl-C or SIGTERM.

    Args:
        service: The service.
        listening: The socket, which is closed at the end.
        ready: Is called when requests are answered.

    Raises:
        CheckpointError: There is no complete checkpoint.
        ConfigError: The model can't be loaded, or is not a language model that the engine supports.
    """
    with listening, ExitStack() as stack:
        with progress_shown():
            app = stack.enter_context(opened_app(service))
        config = uvicorn.Config(
            app.asgi(),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_SECONDS,
        )
        server = _Server(config)

        async def run() -> None:
            waiting = asyncio.ensure_future(server.serve(sockets=[listening]))
            while not (server.started or waiting.done()):
                await asyncio.sleep(0.01)
            if server.started:
                ready()
            while not (server.should_exit or waiting.done()):
                await asyncio.sleep(0.1)
            # uvicorn waits for the answers in progress, which end with the engine.
            await asyncio.to_thread(app.close)
            await waiting

        with suppress(KeyboardInterrupt):  # the second Ctrl-C
            asyncio.run(run())
