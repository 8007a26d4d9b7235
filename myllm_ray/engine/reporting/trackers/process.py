"""The training process's side of the delivery of a tracker's records: starts, watches and ends the process."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from myllm_ray.common.files import read_jsonl

log = logging.getLogger(__name__)
_RESTARTS = 3
_WITHOUT_END_SECONDS = 5.0


class DeliveryProcess:
    """A process that runs `delivery.py` for one tracker. No method waits for it, except `wait`.

    Training and the tracker's library share no interpreter: a library that hangs, crashes, keeps the interpreter's
    lock, changes signal handlers or waits at exit affects the process only. At the end it is killed if it is not done.

    Args:
        folder: the run's folder.
        key: name of the tracker within the run.
        path: import path of the tracker's class.
        options: the tracker's config.
        step: step that the run resumes from.
    """

    def __init__(self, folder: Path, key: str, path: str, options: dict[str, Any], step: int):
        self._folder, self._key = folder, key
        self._spec = {"folder": str(folder), "key": key, "tracker": path, "options": options, "step": step}
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._starts, self._until = 0, 0.0
        self._warned = False

    def start(self) -> None:
        """Starts the process. A failure to start is a warning."""
        self._starts += 1
        # The process imports the same modules as this one, also a custom tracker of the working directory.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "myllm_ray.engine.reporting.trackers.delivery"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C does not reach it, and its children can be killed with it
            )
        except OSError as error:
            self._warn(f"its process can't be started: {error}")
            return
        self._reader = threading.Thread(target=self._read, args=(self._process,), name="tracker", daemon=True)
        self._reader.start()
        self._send(self._spec)

    def check(self) -> None:
        """Starts the process again if it has crashed, up to `_RESTARTS` times."""
        process = self._process
        if process is None or process.poll() is None:
            return
        self._process = None
        if self._starts <= _RESTARTS:
            self._warn(f"its process ended with code {process.returncode}; it is started again")
            self.start()
        else:
            log.warning("tracker %s: its process ended %d times; no more records are sent", self._key, self._starts)

    def end(self, status: str, seconds: float) -> None:
        """Tells the process that the run has ended, and sets the limit of `wait`."""
        if self._until:
            return
        self._until = time.monotonic() + seconds
        self._send({"end": status})

    def wait(self) -> None:
        """Waits for the process until the limit, kills it if it still runs, and reports records that were not sent."""
        if not self._until:  # neither the end of the run nor an exception was reported
            self.end("failed", _WITHOUT_END_SECONDS)
        if self._process is not None:
            # The process is not reaped before its group is killed: the id could belong to another group by then.
            while time.monotonic() < self._until and not _has_ended(self._process.pid):
                time.sleep(0.02)
            with suppress(OSError):  # wandb's service is in the same group
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            if self._reader is not None:
                self._reader.join(1.0)
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
        missing, total = self._undelivered()
        if missing:
            log.warning(
                "tracker %s: %d of %d logged steps were not delivered. metrics.jsonl contains them, and resuming the "
                "run (checkpoint.resume=auto) sends them",
                self._key,
                missing,
                total,
            )

    def _undelivered(self) -> tuple[int, int]:
        steps = [int(row["step"]) for row in read_jsonl(self._folder / "metrics.jsonl") if "step" in row]
        done = read_state(self._folder, self._key).get("step", -1)
        return sum(step > done for step in steps), len(steps)

    def _send(self, message: dict[str, Any]) -> None:
        # The pipe holds 64 kB and these messages are short, so a process that does not read them never blocks here.
        with suppress(OSError, ValueError):
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()

    def _read(self, process: subprocess.Popen[str]) -> None:
        with suppress(OSError, ValueError):
            for line in _lines(process):
                with suppress(json.JSONDecodeError):
                    self._warn(json.loads(line)["warning"])

    def _warn(self, text: str) -> None:
        # Once per attempt: a server that is down must not fill the log.
        if not self._warned:
            self._warned = True
            log.warning("tracker %s: %s", self._key, text)


def _has_ended(pid: int) -> bool:
    """Returns whether a child process has ended, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    yield from process.stdout


def state_path(folder: Path, key: str) -> Path:
    """Returns the file that keeps the position of a tracker and the id of its run."""
    return folder / "trackers" / f"{key}.json"


def read_state(folder: Path, key: str) -> dict[str, Any]:
    """Returns the content of `state_path`; empty if the file is missing."""
    try:
        state: dict[str, Any] = json.loads(state_path(folder, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state
