"""The command that serves a trained model over HTTP: serve."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from myllm_ray.cli.app import app
from myllm_ray.cli.chat import Device, ModelName


@app.command()
def serve(
    model: ModelName,
    host: Annotated[str, typer.Option(help="address to listen at; not 127.0.0.1: open to others")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free port")] = 8000,
    name: Annotated[str | None, typer.Option(help="name of the model for clients; default: its folder or id")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="environment variable with the key that clients must send")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="replicas on Ray Serve; 0: this process, without Ray")] = 0,
    engine: Annotated[str, typer.Option(help="auto (vLLM if it is installed), vllm or local")] = "auto",
    device: Device = None,
) -> None:
    """Serve a trained model: OpenAI's endpoints for chats, completions and models. Ctrl-C stops the server."""
    from myllm_ray.common.extras import require_installed

    for module in ("starlette", "uvicorn"):
        require_installed(module, "myllm_ray[serve]", "serve")
    from myllm_ray.serving.server import is_loopback, listening_socket, serve_here, service_of

    listening = listening_socket(host, port)
    with listening:
        port = listening.getsockname()[1]
        service = service_of(model, name, engine, device, api_key_env)
        if service.key_digest is None and not is_loopback(host):
            print(
                f"warning: {host} is reachable from other machines, and anyone who reaches it can use the model: "
                "give --api-key-env, or leave --host out",
                file=sys.stderr,
            )
        shown = f"[{host}]" if ":" in host else host

        def ready() -> None:
            print(f"serving {service.name} at http://{shown}:{port}/v1 (engine: {service.engine}); Ctrl-C stops it")
            sys.stdout.flush()

        if workers == 0:
            serve_here(service, listening, ready)
        else:
            listening.close()
            from myllm_ray.orchestration.serve import serve_on_ray

            serve_on_ray(service, host, port, workers, ready)
    print("stopped")
