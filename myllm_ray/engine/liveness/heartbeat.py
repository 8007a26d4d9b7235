"""Heartbeats of a run's processes, and requests to them, as files in the run's folder. Needs neither Ray nor sockets.

Heartbeats, in the folder `<run>/.heartbeats`:

    rank-00001.json    {"beat": 17, "step": 8, "phase": "forward", "seconds": 0.4, "waits": false, ...}
    driver.json        heartbeat of the process that started the run (startup.py)

Requests, in the same folder. Except for the stacks, the content is the reason:

    stop               save a checkpoint and end the run (a signal, `myllm-ray stop`)
    preempt            save a checkpoint and end; the run is resumed at once, for example with another number of workers
    amend-<id>         end this segment of the run and resume with an amended config (engine/amendments.py)
    abort              end a trial of a sweep without saving (orchestration/sweeps/trial_channel.py)
    stacks-<id>        every rank writes the stacks of its threads to <run>/stacks/<id>/rank-00001.txt

A thread writes and reads these files about twice a second, so a rank that hangs still reports its phase. A process that
is stopped (SIGSTOP, a frozen machine) writes no more heartbeats. `hang_detector.py` evaluates them.
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
from myllm_ray.common.progress import current

PHASES = ("start", "data", "rollout", "forward", "backward", "optimizer", "evaluation", "checkpoint", "end")
"""The phases of a rank, in the order of a step."""
DRIVER = "driver.json"
AMEND, AMENDED = "amend-", "amended-"
"""Begin of the names of a request to amend the run, and of its answer."""
_SECONDS = 0.5
# Parts of the paths of files whose functions call collectives.
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


def heartbeat_folder(run: str | Path) -> Path:
    """Returns the folder of the heartbeats and requests of a run."""
    return Path(run) / ".heartbeats"


def request(run: str | Path, name: str, text: str) -> None:
    """Writes a request to all ranks of a run.

    Args:
        run: the run's folder.
        name: `stop`, `preempt`, `abort`, `amend-<id>` or `stacks-<id>`; see the module's docstring.
        text: the reason, for logs.
    """
    heartbeat_folder(run).mkdir(parents=True, exist_ok=True)
    write_atomic(heartbeat_folder(run) / name, text)


def asked(run: str | Path, name: str = "stop") -> str | None:
    """Returns the reason of the request `name`, or None if there is no such request."""
    try:
        return (heartbeat_folder(run) / name).read_text(encoding="utf-8")
    except OSError:
        return None


def clear(run: str | Path) -> None:
    """Removes the heartbeats and requests of a worker group that has ended.

    A request to stop the run is kept, because it also applies to the next worker group, and so are requests to amend it
    and their answers. The driver's heartbeat is kept.
    """
    for path in sorted(heartbeat_folder(run).glob("*")):
        if path.name not in ("stop", DRIVER) and not path.name.startswith((AMEND, AMENDED)):
            path.unlink(missing_ok=True)  # another process may have removed it already


def remove(run: str | Path) -> None:
    """Removes the heartbeats and requests of a run that has ended."""
    shutil.rmtree(heartbeat_folder(run), ignore_errors=True)


def read_heartbeats(run: str | Path) -> dict[int, dict[str, Any]]:
    """Returns the last heartbeat of each rank."""
    beats = {}
    for path in sorted(heartbeat_folder(run).glob("rank-*.json")):
        try:
            beat = json.loads(path.read_text(encoding="utf-8"))
            beats[int(beat["rank"])] = beat
        except (OSError, ValueError, KeyError, TypeError):  # a rank that ends removes its file
            continue
    return beats


def read_heartbeat(run: str | Path, rank: int = 0) -> dict[str, Any] | None:
    """Returns the last heartbeat of one rank, or None."""
    try:
        beat = json.loads((heartbeat_folder(run) / f"rank-{rank:05d}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return beat if isinstance(beat, dict) else None


def read_driver(run: str | Path) -> dict[str, Any] | None:
    """Returns the last heartbeat of the process that started the run, or None."""
    try:
        beat = json.loads((heartbeat_folder(run) / DRIVER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return beat if isinstance(beat, dict) else None


def is_own(run: str | Path) -> bool:
    """Returns whether this process is the one that started the run in this folder."""
    beat = read_driver(run) or {}
    return (beat.get("pid"), beat.get("host")) == (os.getpid(), socket.gethostname())


def find_activity(run: str | Path) -> dict[str, Any] | None:
    """Returns a heartbeat that changes within two seconds, which shows that a run is active in the folder, or None."""

    # A change, not the age of a file: the clocks of the file server and of other machines may differ.
    def signs() -> dict[int, dict[str, Any]]:
        driver = read_driver(run)
        return {**read_heartbeats(run), **({-1: driver} if driver else {})}

    before = signs()
    for _ in range(10 if before else 0):
        time.sleep(0.2)
        now = signs()
        changed = next((beat for rank, beat in now.items() if before.get(rank) != beat), None)
        if changed is not None:
            return changed
    return None


def _progress() -> dict[str, Any]:
    """Returns the entry of a heartbeat for a long task of this process."""
    found = current(at_least=_SECONDS)
    return {"progress": found.as_json()} if found else {}


class Heartbeat:
    """The heartbeat of this process. Created in the training thread; its own thread writes the file.

    Args:
        run: the run's folder; None: no heartbeat is written.
        rank: the rank of this process.
        extra: additional entries of every heartbeat (JSON), such as the node.
        on_beat: called by the thread after each heartbeat.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        rank: int = 0,
        extra: dict[str, Any] | None = None,
        on_beat: Callable[[], None] | None = None,
    ):
        self._run, self._rank, self._extra, self._on_beat = run, rank, extra or {}, on_beat
        # One tuple, replaced as a whole: the heartbeat thread reads a consistent phase, step and time without a lock.
        self._now: tuple[str, int, float] = ("start", 0, time.monotonic())
        self.spent: dict[str, float] = {}
        """Seconds in each phase that has ended, summed over the steps."""
        self.on_enter: Callable[[str], None] | None = None
        """Called in the training thread at the begin of each phase, with its name."""
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._dumped: set[str] = set()
        self.preempt: str | None = None
        """The reason why the run must save and end, once another process has requested it."""
        self.amend: str | None = None
        """The reason why this segment of the run must end, once another process has requested an amendment."""
        self._path = heartbeat_folder(run) / f"rank-{rank:05d}.json" if run is not None else None
        self._thread: threading.Thread | None = None
        if run is not None:
            self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)
            self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """Sets the phase that begins now, in step `step` (counted from 1)."""
        now, (before, _, since) = time.monotonic(), self._now
        self.spent[before] = self.spent.get(before, 0.0) + now - since
        self._now = (phase, step, now)
        if self.on_enter is not None:
            self.on_enter(phase)

    def seconds_in(self, phase: str) -> float:
        """Returns the seconds spent in a phase so far, also if it has not ended."""
        now, _, since = self._now
        return self.spent.get(phase, 0.0) + (time.monotonic() - since if now == phase else 0.0)

    def close(self) -> None:
        """Ends the thread and removes the heartbeat."""
        # The thread ends before the file is removed, because it would write the file again.
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
            self._thread = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _work(self) -> None:
        assert self._run is not None
        folder, beat = heartbeat_folder(self._run), 0
        while True:
            beat += 1
            try:
                self._say(folder, beat)
                self._listen(folder)
            except OSError:
                pass  # a storage that stays full or unreachable makes training fail in other places, with a message
            if self._on_beat is not None:
                self._on_beat()
            if self._stop.wait(_SECONDS):
                return

    def _say(self, folder: Path, beat: int) -> None:
        phase, step, since = self._now
        # `seconds` is a duration, which readers on machines with other clocks can use. Not durable: flushing to disk
        # twice a second is slow, and after a power failure no heartbeat is valid.
        folder.mkdir(parents=True, exist_ok=True)
        assert self._path is not None
        write_atomic(
            self._path,
            json.dumps(
                {
                    "rank": self._rank,
                    "beat": beat,
                    "phase": phase,
                    "step": step,
                    "seconds": time.monotonic() - since,
                    "waits": self._waits(),
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    **_progress(),
                    **self._extra,
                }
            ),
            durable=False,
        )

    def _listen(self, folder: Path) -> None:
        asked = {path.name: path for path in sorted(folder.iterdir())}
        # Both save and end this worker group. They differ in whether the driver starts another one.
        for name in ("stop", "preempt"):
            if name in asked and self.preempt is None:
                self.preempt = asked[name].read_text(encoding="utf-8") or "on request"
        if any(name.startswith(AMEND) for name in asked):
            self.amend = "myllm-ray amend"
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
            file.write(
                f"rank {self._rank}, step {step}, phase {phase} for {time.monotonic() - since:.1f} s, "
                f"pid {os.getpid()} on {socket.gethostname()}\n"
            )
            file.flush()  # faulthandler writes to the file descriptor, not through the buffer
            faulthandler.dump_traceback(file, all_threads=True)

    def _waits(self) -> bool:
        """Returns whether the training thread is in a collective, so that it waits for other ranks."""
        # Only the innermost frames: in a sharded model, wrappers from torch/distributed/ also enclose the forward pass.
        frame, depth = sys._current_frames().get(self._main), 0
        while frame is not None and depth < 4:
            if any(part in frame.f_code.co_filename for part in _COLLECTIVES):
                return True
            frame, depth = frame.f_back, depth + 1
        return False
