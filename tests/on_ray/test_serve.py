"""A server on Ray Serve: two replicas behind one address, streams, disconnects, and errors of a replica."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from tiny_models import write_model

from myllm_ray.config import ConfigError
from myllm_ray.data.messages import Messages
from myllm_ray.data.tokenizer import DEFAULT_CHAT_TEMPLATE, TRAINED
from myllm_ray.models.generate import sample
from myllm_ray.orchestration.serve import serve_on_ray
from myllm_ray.serving.served_model import LoadedModel
from myllm_ray.serving.server import service_of

pytestmark = pytest.mark.usefixtures("ray_cluster")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "talker", TRAINED + DEFAULT_CHAT_TEMPLATE)
    monkeypatch.setenv("SERVE_KEY", "a key")
    service, port = service_of(str(folder), None, "local", "cpu", "SERVE_KEY"), free_port()
    ready, stop, errors = threading.Event(), threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            serve_on_ray(service, "127.0.0.1", port, 2, ready.set, stop)
        except BaseException as error:
            errors.append(error)
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(180)
        assert errors == []
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        hi: list[Any] = [{"role": "user", "content": "hi"}]
        served = LoadedModel.open(str(folder), "serve")
        prompt = served.chat_prompt(Messages(hi))
        settings: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 4}
        wanted = sample(served.model, served.tokenizer, [prompt], served.end_tokens, 20, **settings)[0]
        with OpenAI(base_url=f"{url}/v1", api_key="a key", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["talker"]
            given: dict[str, Any] = {"model": "talker", "messages": hi, "max_tokens": 20, **settings}
            for _ in range(4):  # the replicas have the same answer
                assert client.chat.completions.create(**given).choices[0].message.content == wanted
            chunks = list(client.chat.completions.create(**given, stream=True))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
            stream = client.completions.create(model="talker", prompt="a", max_tokens=500, stream=True)
            next(iter(stream))
            stream.close()
        limit = time.monotonic() + 20
        while any(httpx.get(f"{url}/health").json()["active"] for _ in range(6)) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not any(httpx.get(f"{url}/health").json()["active"] for _ in range(6))
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_replica_that_can_not_start_is_one_line(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "talker", TRAINED + DEFAULT_CHAT_TEMPLATE)
    shutil.move(folder / "model.safetensors", tmp_path)
    service = service_of(str(folder), None, "local", "cpu", None)
    with pytest.raises(ConfigError, match="Ray Serve can't serve talker: ") as error:
        serve_on_ray(service, "127.0.0.1", free_port(), 1, lambda: None)
    assert "safetensors" in str(error.value)
    with pytest.raises(ConfigError, match="--workers 100 need 100 CPUs, the Ray cluster has 6: use fewer workers"):
        serve_on_ray(service, "127.0.0.1", free_port(), 100, lambda: None)
