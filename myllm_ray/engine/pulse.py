"""A rank's sign of life, and its ear for what is asked of it from outside. Files in the run's folder; no Ray, no sockets.

    <run>/.pulse/rank-00001.json    {"beat": 17, "step": 8, "phase": "forward", "seconds": 0.4, "waits": false, ...}
    <run>/.pulse/driver.json        the same of the process that started the run (startup.py)
    <run>/.pulse/stop, leave        why the run shall save and end: for good (a signal, `myllm-ray stop`), or to go on at
                                    once (another number of workers)
    <run>/.pulse/abandon            why nobody wants a sweep's trial any more (orchestration/sweeps/desk.py)
    <run>/.pulse/stacks-<id>        every rank shall write the stacks of its threads to <run>/stacks/<id>/rank-00001.txt

A thread writes and reads about once a second, so a rank that hangs still says in which phase; one that is stopped
(SIGSTOP, a frozen machine) is known by its silence. `watch.py` reads what stands here.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from myllm_ray.common.files import write_atomic

PHASES = ("start", "data", "rollout", "forward", "backward", "optimizer", "evaluation", "checkpoint", "end")
"""What a rank can be doing, in the order of a step."""
DRIVER = "driver.json"
_SECONDS = 0.5
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


def pulse_folder(run: str | Path) -> Path:
    """Where signs of life and requests stand."""
    return Path(run) / ".pulse"


def request(run: str | Path, name: str, text: str) -> None:
    """Ask all ranks of a run: `stop`, `leave`, or `stacks-<id>`."""
    pulse_folder(run).mkdir(parents=True, exist_ok=True)
    write_atomic(pulse_folder(run) / name, text)


def asked(run: str | Path, name: str = "stop") -> str | None:
    """The reason given by whoever asked the run to stop (or for what else `name` says), or None."""
    try:
        return (pulse_folder(run) / name).read_text(encoding="utf-8")
    except OSError:
        return None


def clear(run: str | Path) -> None:
    """Forget signs of life and requests of a worker group that has ended; a request to stop the whole run stays."""
    for path in sorted(pulse_folder(run).glob("*")):
        if path.name not in ("stop", DRIVER):
            path.unlink(missing_ok=True)


def remove(run: str | Path) -> None:
    """The run is not going on any more."""
    shutil.rmtree(pulse_folder(run), ignore_errors=True)


def read_beats(run: str | Path) -> dict[int, dict[str, Any]]:
    """The last sign of life of each rank."""
    beats = {}
    for path in sorted(pulse_folder(run).glob("rank-*.json")):
        try:
            beat = json.loads(path.read_text(encoding="utf-8"))
            beats[int(beat["rank"])] = beat
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return beats


def read_driver(run: str | Path) -> dict[str, Any] | None:
    """The last sign of life of the process that started the run."""
    try:
        beat = json.loads((pulse_folder(run) / DRIVER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return beat if isinstance(beat, dict) else None


def is_own(run: str | Path) -> bool:
    """Whether this process is the one that started the run in this folder."""
    beat = read_driver(run) or {}
    return (beat.get("pid"), beat.get("host")) == (os.getpid(), socket.gethostname())


def going_on(run: str | Path) -> dict[str, Any] | None:
    """A sign of life that changes within two seconds, so somebody works in this folder; or None."""
    def signs() -> dict[int, dict[str, Any]]:
        driver = read_driver(run)
        return {**read_beats(run), **({-1: driver} if driver else {})}

    before = signs()
    for _ in range(10 if before else 0):
        time.sleep(0.2)
        now = signs()
        changed = next((beat for rank, beat in now.items() if before.get(rank) != beat), None)
        if changed is not None:
            return changed
    return None


class Pulse:
    """Of this process.

    Args:
        run: the run's folder; None: no pulse at all.
        rank: of this process.
        extra: what else to say in every beat (JSON), such as the node.
        on_beat: called by the thread after each beat.
    """

    def __init__(self, run: str | Path | None = None, rank: int = 0, extra: dict[str, Any] | None = None,
                 on_beat: Callable[[], None] | None = None):
        self._run, self._rank, self._extra, self._on_beat = run, rank, extra or {}, on_beat
        self._now: tuple[str, int, float] = ("start", 0, time.monotonic())
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._dumped: set[str] = set()
        self.leave: str | None = None
        """Why the run shall be left, once somebody has asked for it."""
        self._path = pulse_folder(run) / f"rank-{rank:05d}.json" if run is not None else None
        self._thread: threading.Thread | None = None
        if run is not None:
            self._thread = threading.Thread(target=self._work, name="pulse", daemon=True)
            self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """The phase that begins now, in step `step` (counted from 1)."""
        self._now = (phase, step, time.monotonic())

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
            self._thread = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _work(self) -> None:
        assert self._run is not None
        folder, beat = pulse_folder(self._run), 0
        while True:
            beat += 1
            try:
                self._say(folder, beat)
                self._listen(folder)
            except OSError:
                pass  # a full disk or a storage that is away for a moment ends the training elsewhere, with a message
            if self._on_beat is not None:
                self._on_beat()
            if self._stop.wait(_SECONDS):
                return

    def _say(self, folder: Path, beat: int) -> None:
        phase, step, since = self._now
        folder.mkdir(parents=True, exist_ok=True)
        assert self._path is not None
        write_atomic(self._path, json.dumps({
            "rank": self._rank, "beat": beat, "phase": phase, "step": step, "seconds": time.monotonic() - since,
            "waits": self._waits(), "pid": os.getpid(), "host": socket.gethostname(), **self._extra}), durable=False)

    def _listen(self, folder: Path) -> None:
        asked = {path.name: path for path in sorted(folder.iterdir())}
        for name in ("stop", "leave"):
            if name in asked and self.leave is None:
                self.leave = asked[name].read_text(encoding="utf-8") or "asked to"
        for path in asked.values():
            if path.name.startswith("stacks-") and path.name not in self._dumped:
                self._dumped.add(path.name)
                self._dump(path.name.removeprefix("stacks-"))

    def _dump(self, name: str) -> None:
        assert self._run is not None
        target = Path(self._run) / "stacks" / name
        target.mkdir(parents=True, exist_ok=True)
        with open(target / f"rank-{self._rank:05d}.txt", "w", encoding="utf-8") as file:
            phase, step, since = self._now
            file.write(f"rank {self._rank}, step {step}, phase {phase} for {time.monotonic() - since:.1f} s, "
                       f"pid {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _waits(self) -> bool:
        """Whether the training thread is in a collective: it waits for other ranks, and is not the one they wait for."""
        frame, depth = sys._current_frames().get(self._main), 0
        while frame is not None and depth < 4:
            if any(part in frame.f_code.co_filename for part in _COLLECTIVES):
                return True
            frame, depth = frame.f_back, depth + 1
        return False
