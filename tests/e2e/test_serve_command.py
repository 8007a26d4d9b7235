"""`myllm-ray serve` as a command: its output, Ctrl-C, and bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from openai import OpenAI
from tiny_models import write_model

from e2e.test_cli import call
from myllm_ray.data.tokenizer import DEFAULT_CHAT_TEMPLATE, TRAINED
from myllm_ray.serving.server import is_loopback


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "talker", TRAINED + DEFAULT_CHAT_TEMPLATE)


def test_the_command(talker: Path) -> None:
    """It starts, answers, and stops on Ctrl-C while an answer is sampled."""
    command = [sys.executable, "-m", "myllm_ray.cli", "serve", str(talker), "--port", "0", "--name", "mine"]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(
                r"serving mine at http://127\.0\.0\.1:(\d+)/v1 \(engine: local\); Ctrl-C stops it\n", line
            )
            assert found, (line, process.stderr and process.stderr.read())
            url = f"http://127.0.0.1:{found[1]}/v1"
            with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                stream = client.completions.create(model="mine", prompt="a", max_tokens=500, stream=True)
                next(iter(stream))
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=30)
            assert (process.returncode, out, err) == (0, "stopped\n", "")
        finally:
            process.kill()


def test_bad_input_of_the_command(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    (tmp_path / "empty").mkdir()
    reward = tmp_path / "reward"
    reward.mkdir()
    config = json.loads((talker / "config.json").read_text())
    (reward / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            ([talker, "--port", port], f"--host 127.0.0.1 --port {port}: Address already in use: choose another port"),
            ([talker, "--host", "no.such.host.invalid"], "--host no.such.host.invalid: "),
            ([talker, "--port", 0, "--api-key-env", "NO_KEY"], "--api-key-env NO_KEY: the environment variable"),
            ([talker, "--port", 0, "--engine", "vllm"], "--engine vllm: vLLM is not installed"),
            ([talker, "--port", 0, "--engine", "fast"], "--engine fast: it is auto, vllm or local"),
            ([talker, "--port", 0, "--device", "cuda:7"], "--device cuda:7: "),
            ([reward, "--port", 0], "serve needs a language model; "),
            ([tmp_path / "empty", "--port", 0], "contains no complete checkpoint"),
            ([tmp_path / "a" / "b" / "c", "--port", 0], "model: no folder "),
            (["no/such-model", "--port", 0], "model: no folder 'no/such-model'"),
        ):
            code, out, err = call(capsys, monkeypatch, "serve", *arguments)
            assert (code, out) == (2, ""), (arguments, err)
            assert message in err
            assert len(err.splitlines()) == 1, err


def test_a_server_open_to_others_without_a_key_warns(
    talker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("myllm_ray.serving.server.serve_here", lambda service, listening, ready: ready())
    monkeypatch.setenv("SERVE_KEY", "a key")
    for arguments, warns in (
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key-env", "SERVE_KEY"], False),
        ([], False),
    ):
        code, out, err = call(capsys, monkeypatch, "serve", talker, "--port", 0, *arguments)
        assert code == 0
        assert "/v1 (engine: local); Ctrl-C stops it" in out
        assert err.startswith("warning: 0.0.0.0 is reachable from other machines") == warns, err


def test_which_hosts_are_local() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("localhost")
    assert is_loopback("::1")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("::")
