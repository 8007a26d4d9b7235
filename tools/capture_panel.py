"""Captures the panel of a real run in tmux, for docs/terminal.md: while tokenizing, while training, and after a kill.

    python tools/capture_panel.py CONFIG [KEY=VALUE]...

The run starts in a terminal of 120 × 40 in tmux. One worker is killed with SIGKILL once it has trained the first steps
after the second checkpoint. For each capture, the events that the panel had received are written to
tests/unit/captures/<name>.jsonl, so that a test renders the same text again, and the text replaces the block of that
name in docs/terminal.md. The config needs at least two workers and `scaling.max_failures`.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from myllm_ray.engine.liveness.heartbeat import read_heartbeats
from myllm_ray.engine.reporting.console import ConsoleCallback
from myllm_ray.engine.reporting.panel import RunPanel

ROOT = Path(__file__).resolve().parents[1]
CAPTURES, PAGE = ROOT / "tests" / "unit" / "captures", ROOT / "docs" / "terminal.md"
WIDTH, HEIGHT = 120, 40
_FILE = "PANEL_EVENTS"
_PATIENCE = 900.0


class Recorder(ConsoleCallback):
    """The console, which also writes what its panel receives to the file `PANEL_EVENTS`."""

    def __init__(self, config: Any = None, **options: Any):
        super().__init__(config, **options)
        apply = self.panel.apply

        def record(event: dict[str, Any]) -> None:
            if path := os.environ.get(_FILE):
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"at": time.time(), **event}) + "\n")
            apply(event)

        self.panel.apply = record  # type: ignore[method-assign]


class Tmux:
    """A tmux server with one window.

    Args:
        socket: a path for the socket of the server.
        command: the command that runs in the window.
    """

    def __init__(self, socket: Path, command: str):
        self._base = ["tmux", "-S", str(socket), "-f", "/dev/null"]
        size = ["-x", str(WIDTH), "-y", str(HEIGHT)]
        environment = {name: value for name, value in os.environ.items() if name not in ("TMUX", "NO_COLOR")}
        subprocess.run([*self._base, "new-session", "-d", *size, command], check=True, env=environment)

    def text(self, *options: str) -> str:
        """Returns the content of the window; `-e` as an option adds the colours, `-S -` the lines above it."""
        command = [*self._base, "capture-pane", "-p", *options]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def until(self, holds: Callable[[str], Any], seconds: float = _PATIENCE) -> str:
        """Waits until a text of the window satisfies `holds`, and returns that text."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            text = self.text()
            if holds(text):
                return text
            time.sleep(0.1)
        raise AssertionError(f"not seen within {seconds} s:\n{self.text('-S', '-')}")

    def end(self) -> None:
        """Ends the server and what runs in it."""
        subprocess.run([*self._base, "kill-server"], check=False, capture_output=True)


def panel_of(text: str) -> str:
    """Returns the lines of the panel in a capture."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("╭"))
    last = next(i for i, line in enumerate(lines) if i > first and line.startswith("╰"))
    return "\n".join(line.rstrip() for line in lines[first : last + 1]) + "\n"


def rendered(rows: list[dict[str, Any]], now: float, width: int = WIDTH) -> str:
    """Returns the panel that recorded events give."""
    panel = RunPanel()
    for row in rows:
        panel.apply(row)
    out = Console(width=width, file=io.StringIO(), color_system=None)
    out.print(panel.render(now, width))
    return out.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def compact(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drops the states of tasks and heartbeats that later ones have replaced."""
    kept: list[dict[str, Any]] = []
    replaced: set[str] = set()
    for row in reversed(rows):
        name = row["event"]
        if name in ("progress", "heartbeat"):
            if name in replaced:
                continue
            replaced.add(name)
        kept.append({key: value for key, value in row.items() if key not in ("at", "command")})
    return kept[::-1]


def matched(events: Path, shown: str) -> tuple[list[dict[str, Any]], float]:
    """Finds the events and the time that give the text of a capture."""
    every = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    until = time.time()
    for tenths in range(100):
        now = until - tenths / 20
        rows = compact([row for row in every if row["at"] <= now])
        if rendered(rows, now) == shown:
            return rows, now
    raise AssertionError(f"no recorded moment gives this panel:\n{shown}")


def keep(name: str, shown: str, events: Path) -> None:
    """Writes a capture to the page, and its events to the folder of the test."""
    rows, now = matched(events, shown)
    CAPTURES.mkdir(exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in [*rows, {"now": now, "width": WIDTH}]]
    (CAPTURES / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    block = re.compile(rf"(<!-- {name} -->\n\n```text\n).*?(```\n)", re.S)
    assert block.search(page), f"{PAGE} has no block {name}"
    PAGE.write_text(block.sub(lambda found: found[1] + shown + found[2], page), encoding="utf-8")
    print(f"{name}:\n{shown}")


def main(config: str, overrides: list[str]) -> None:
    """Runs a config in tmux and keeps three captures of its panel."""
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"capture-{os.getpid()}"
    folder.mkdir(parents=True)
    events, log = folder / "panel.jsonl", folder / "exit"
    more = ["callbacks=[capture_panel:Recorder, jsonl]", *overrides]
    path = os.pathsep.join([str(ROOT / "tools"), str(ROOT)])
    command = [sys.executable, "-m", "myllm_ray.cli", "train", str(Path(config).absolute()), *more]
    shell = f"cd {folder}; PYTHONPATH={path} {_FILE}={events} {shlex.join(command)}; echo code $? | tee {log}; sleep 60"
    window = Tmux(folder / "socket", shell)
    try:
        text = window.until(lambda text: re.search(r"tokenizing .* (1|2|3|4|5|6)\d\.\d%", text))
        keep("tokenizing", panel_of(text), events)
        text = window.until(
            lambda text: re.search(r"step +1\d\d / \d+ .*0:\d\d:\d\d left", text) and "step 100" in text
        )
        keep("training", panel_of(text), events)
        run = next(folder.glob("runs/*/.heartbeats")).parent
        os.kill(int(read_heartbeats(run)[1]["pid"]), signal.SIGKILL)
        text = window.until(lambda text: "restarts    1" in text and re.search(r"now +training", text))
        keep("after-a-kill", panel_of(text), events)
        window.until(lambda text: "code " in text)
        print(window.text("-S", "-"))
    finally:
        window.end()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
