"""A server in a thread of the test's process, with the `openai` client."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from openai import OpenAI

from myllm_ray.models.generate import sample
from myllm_ray.serving.app import Application
from myllm_ray.serving.engine import LocalEngine
from myllm_ray.serving.served_model import LoadedModel


@dataclasses.dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    engine: LocalEngine
    served: LoadedModel
    client: OpenAI

    def text_of(self, prompt: list[int], **settings: Any) -> str:
        """Samples without the server."""
        return sample(self.served.model, self.served.tokenizer, [prompt], self.served.end_tokens, **settings)[0]


@contextlib.contextmanager
def running(folder: Path, key: str | None = None, together: int = 16) -> Iterator[Running]:
    served = LoadedModel.open(str(folder), "serve")
    engine = LocalEngine(served, together)
    digest = None if key is None else hashlib.sha256(key.encode()).digest()
    listening = socket.create_server(("127.0.0.1", 0))
    app = Application(engine, served, digest).asgi()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    try:
        with OpenAI(base_url=url, api_key=key or "none", max_retries=0) as client:
            yield Running(url, engine, served, client)
    finally:
        server.should_exit = True
        thread.join(20)
        engine.close()
        assert not thread.is_alive()


def load(server: Running) -> dict[str, int]:
    """Returns what the server says about its load."""
    found: dict[str, int] = httpx.get(server.url.removesuffix("/v1") + "/health").json()
    return found


def until(holds: Callable[[], bool], seconds: float = 5) -> bool:
    """Returns whether a condition holds within some seconds."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if holds():
            return True
        time.sleep(0.02)
    return False
