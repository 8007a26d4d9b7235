"""`myllm-ray chat` as a command: through pipes, and in a terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from tiny_models import write_model

from e2e.test_cli import call
from myllm_ray.data.chat import tokenize_prompt
from myllm_ray.data.messages import Messages
from myllm_ray.data.tokenizer import DEFAULT_CHAT_TEMPLATE, TRAINED
from myllm_ray.models.generate import sample
from myllm_ray.trained_model import open_trained


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return write_model(root / "talker", TRAINED + DEFAULT_CHAT_TEMPLATE, positions=4096)


def answers(folder: Path, questions: list[str], **settings: Any) -> list[str]:
    """Returns the answers of a chat, computed without its code."""
    opened, messages, found = open_trained(folder), Messages(), list[str]()
    for question in questions:
        messages.append({"role": "user", "content": question})
        prompts = [tokenize_prompt(messages, opened.tokenizer)[0]] * len(messages)
        model: Any = opened.model
        # The seed of an answer is that of its number: the earlier prompts only count.
        found.append(sample(model, opened.tokenizer, prompts, opened.end_tokens, **settings)[len(found)])
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "myllm_ray.cli", "chat", *map(str, arguments)]


def test_through_pipes(talker: Path, tmp_path: Path) -> None:
    """Standard output has the answers only. The locale is C, and one question is not valid UTF-8."""
    lines = ["größe?".encode(), b"", b"\xff\xfe", b"/save chat.jsonl", b"/quit", b"not read"]
    found = subprocess.run(
        command(talker, "--max-new-tokens", 20, "--seed", 3),
        input=b"\n".join(lines),
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C"},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    wanted = answers(talker, ["größe?", "\ufffd\ufffd"], max_new_tokens=20, seed=3)
    assert found.stdout.decode() == "".join(answer + "\n" for answer in wanted)
    assert b"\x1b[" not in found.stdout + found.stderr
    notes = found.stderr.decode().splitlines()
    assert notes[0] == "talker: ask a question; /help lists the commands"
    assert notes[-1] == "appended 1 chat to chat.jsonl (data format: chat)"
    saved = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert [m["content"] for m in saved[1::2]] == wanted


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        ([], "/perams\nhi\n", "unknown command /perams: /help lists the commands"),
        (["--top-p", "2"], "", "chat: top_p"),
        (["--device", "cuda:7"], "", "--device cuda:7: "),
    ],
)
def test_bad_input(
    talker: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    text: str,
    message: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code, out, err = call(capsys, monkeypatch, "chat", talker, *arguments)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_what_is_no_language_model(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((talker / "config.json").read_text())
    (tmp_path / "reward").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "reward" / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]})
    )
    base = write_model(tmp_path / "base", None)
    for arguments, message in (
        ([tmp_path / "reward"], "chat needs a language model"),
        ([tmp_path / "empty"], "contains no complete checkpoint"),
        ([tmp_path / "missing"], "model: no folder"),
        (["no/such-model"], "model: no folder 'no/such-model'"),
        ([base, "--system", "Be brief."], "base has no chat template and was not trained on chats"),
    ):
        code, out, err = call(capsys, monkeypatch, "chat", *arguments)
        assert (code, out) == (2, "")
        assert message in err, err
        assert len(err.splitlines()) == 1


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, arguments: list[str], folder: Path):
        self.main, other = pty.openpty()
        self.process = subprocess.Popen(
            arguments,
            stdin=other,
            stdout=other,
            stderr=other,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C then reaches the process
        )
        os.close(other)
        self.shown = ""
        self.raw = b""

    def until(self, pattern: str, seconds: float = 60) -> str:
        """Waits until the output since the last call matches, and returns that output."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if re.search(pattern, self.shown):
                found, self.shown = self.shown, ""
                return found
            if select.select([self.main], [], [], 0.1)[0]:
                try:
                    self.raw += os.read(self.main, 65536)
                except OSError:  # the process has ended
                    break
                text = self.raw.decode(errors="ignore")
                self.shown += text
                self.raw = b""
        raise AssertionError(f"{pattern!r} was not seen in {self.shown!r}")

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())


@pytest.mark.slow
def test_in_a_terminal(talker: Path, tmp_path: Path) -> None:
    """An answer appears while it is sampled, and Ctrl-C ends it; Ctrl-D quits; no escape sequence passes."""
    opened = open_trained(talker)
    model: Any = opened.model
    prompts = [tokenize_prompt(Messages([{"role": "user", "content": "hi"}]), opened.tokenizer)[0]]
    settings: dict[str, Any] = {"temperature": 1.5, "max_new_tokens": 100, "top_p": 1.0}
    escaping = next(
        seed
        for seed in range(50)
        if "\x1b" in sample(model, opened.tokenizer, prompts, opened.end_tokens, seed=seed, **settings)[0]
    )
    terminal = Terminal(command(talker, "--max-new-tokens", 4000, "--temperature", 0), tmp_path)
    try:
        terminal.until("> $")
        terminal.type("\x03")
        terminal.until("Ctrl-D or /quit quits")
        terminal.type("hi\r")
        first = terminal.until(r"hi\r\n(?s:.){20}")
        assert "> " not in first.partition("hi\r\n")[2], "the answer is not complete yet"
        terminal.type("\x03")
        terminal.until(r"the answer was ended by Ctrl-C\r\n(?s:.)*> $")
        terminal.type("/perams\r")
        terminal.until(r"error: unknown command /perams: /help lists the commands\r\n(?s:.)*> $")
        terminal.type(f"/reset\r/params temperature=1.5 top_p=1 max_new_tokens=100 seed={escaping}\r")
        terminal.until(rf"seed={escaping}\r\n(?s:.)*> $")
        terminal.type("hi\r")
        shown = terminal.until(r"hi\r\n(?s:.)*> $")
        # readline switches the bracketed paste of the terminal on and off.
        assert "\x1b" not in re.sub(r"\x1b\[\?2004[hl]", "", shown)
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.main)
