"""Models and tokenizers by name: a folder, a run, or the hub, which is queried once and with a short timeout."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from conftest import MakeConfig

from myllm_ray.common import pretrained
from myllm_ray.config import ConfigError
from myllm_ray.config.sections import ModelSection, TokenizerSection
from myllm_ray.data.tokenizer import byte_tokenizer, load_tokenizer, open_tokenizer
from myllm_ray.models.load import build_skeleton
from myllm_ray.worker import run_local


class Hub:
    """A server that answers every request about a model with `status` after `seconds`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.status, self.seconds = 404, 0.0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if "/models/" in self.path or "/resolve/" in self.path:
                    hub.asked.append(self.path)
                time.sleep(hub.seconds)
                self.send_response(hub.status)
                if hub.status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{hub.server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.5")
    pretrained._from_hub.cache_clear()
    yield hub
    pretrained._from_hub.cache_clear()
    hub.server.shutdown()
    hub.server.server_close()


def test_an_unknown_name_is_looked_up_once(hub: Hub, make_config: MakeConfig) -> None:
    """Runs the whole start of a run, without a tokenizer section."""
    with pytest.raises(
        ConfigError, match=r"no folder 'someone/nothing' in .*: the hub has no such repository, or it is private"
    ):
        run_local(make_config(model={"name": "someone/nothing"}, tokenizer=None))
    assert hub.asked == ["/api/models/someone/nothing"]


@pytest.mark.parametrize("status", [401, 500, 503])
def test_a_hub_that_refuses_is_queried_once(hub: Hub, status: int) -> None:
    hub.status = status
    with pytest.raises(ConfigError, match=rf"^model\.name: no folder 'a/b' in .*{status}.*$"):
        build_skeleton(ModelSection(name="a/b"), byte_tokenizer(), 64)
    assert len(hub.asked) == 1


def test_a_hub_that_does_not_answer_is_not_waited_for(hub: Hub) -> None:
    hub.seconds = 5
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"^tokenizer\.name: no folder 'a/b' in .*timed out$"):
        load_tokenizer(TokenizerSection(name="a/b"))
    assert time.monotonic() - started < 3
    assert len(hub.asked) == 1


def test_without_a_connection_the_hub_is_not_queried(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"^model\.name: .*offline mode is enabled"):
        build_skeleton(ModelSection(name="a/b"), byte_tokenizer(), 64)
    assert not hub.asked


@pytest.mark.parametrize("name", ["./a", "/a/b", "~/a", "a/b/c"])
def test_a_path_is_never_looked_up(hub: Hub, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.name: no folder"):
        build_skeleton(ModelSection(name=name), byte_tokenizer(), 64)
    assert not hub.asked


def test_a_mistyped_run_is_not_looked_up(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/quickstart", "org/other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"the folder runs has no run 'quickstrat'; did you mean runs/quickstart\?"):
        pretrained.pretrained_folder("runs/quickstrat", "model.name")
    assert not hub.asked
    with pytest.raises(ConfigError, match="hub id"):  # a folder with the name of an organization
        pretrained.pretrained_folder("org/model", "model.name")
    assert hub.asked


def test_a_tokenizer_error_contains_the_whole_message(tmp_path: Path) -> None:
    """The message of transformers is a list over several lines."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError) as error:
        open_tokenizer(str(tmp_path))
    text = str(error.value)
    assert "\n" not in text
    assert "one of: (1)" in text
    assert "(2)" in text
