"""Heartbeats of a run's processes, and requests to them.

Heartbeats are files in the folder `<run>/.heartbeats`. Without Ray each rank writes its own. On Ray the ranks send
their heartbeats to the driver (`orchestration/heartbeats.py`), which writes the files for other processes, so the
number of files does not depend on the number of ranks.

    rank-00000.json    {"beat": 17, "step": 8, "phase": "forward", "seconds": 0.4, "waits": false, ...}
    ranks.json         a list of the heartbeats of the other ranks, if the driver writes them
    driver.json        heartbeat of the process that started the run (startup.py)

Requests, in the same folder. Except for the stacks, the content is the reason:

    stop               save a checkpoint and end the run (a signal, `myllm-ray stop`)
    preempt            save a checkpoint and end; the run is resumed at once, for example with another number of workers
    amend-<id>         end this segment of the run and resume with an amended config (engine/amendments.py)
    abort              end a trial of a sweep without saving (orchestration/sweeps/trial_channel.py)
    stacks-<id>        every rank writes the stacks of its threads to <run>/stacks/<id>/rank-00001.txt

A thread sends heartbeats and receives requests about twice a second, so a rank that hangs still reports its phase. A
process that is stopped (SIGSTOP, a frozen machine) sends no more heartbeats. `hang_detector.py` evaluates them.
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
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from myllm_ray.common.files import write_atomic
from myllm_ray.common.progress import current

PHASES = ("start", "data", "rollout", "forward", "backward", "optimizer", "evaluation", "checkpoint", "end")
"""The phases of a rank, in the order of a step."""
DRIVER = "driver.json"
_RANKS = "ranks.json"
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
    for path in sorted(heartbeat_folder(run).glob("rank*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            for beat in found if path.name == _RANKS else [found]:
                beats[int(beat["rank"])] = beat
        except (OSError, ValueError, KeyError, TypeError):  # a rank that ends removes its file
            continue
    return beats


def write_heartbeats(run: str | Path, beats: Iterable[dict[str, Any]]) -> None:
    """Writes the heartbeats of a worker group: one file for rank 0 and one for all other ranks."""
    folder, found = heartbeat_folder(run), {int(beat["rank"]): beat for beat in beats}
    folder.mkdir(parents=True, exist_ok=True)
    first = found.pop(0, None)
    if first is None:
        (folder / rank_file(0)).unlink(missing_ok=True)
    else:
        write_atomic(folder / rank_file(0), json.dumps(first), durable=False)
    write_atomic(folder / _RANKS, json.dumps([found[rank] for rank in sorted(found)]), durable=False)


def read_requests(run: str | Path) -> dict[str, str]:
    """Returns the requests to the ranks of a run: their names and texts."""
    found = {}
    for path in sorted(heartbeat_folder(run).iterdir()):
        if path.name in ("stop", "preempt") or path.name.startswith((AMEND, "stacks-")):
            found[path.name] = path.read_text(encoding="utf-8")
    return found


def rank_file(rank: int) -> str:
    """Returns the name of the file of a rank's heartbeat."""
    return f"rank-{rank:05d}.json"


def read_heartbeat(run: str | Path, rank: int = 0) -> dict[str, Any] | None:
    """Returns the last heartbeat of a rank that has a file of its own, or None."""
    try:
        beat = json.loads((heartbeat_folder(run) / rank_file(rank)).read_text(encoding="utf-8"))
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


class HeartbeatChannel(Protocol):
    """The connection of a rank to the processes that observe the run. All methods are called by one thread."""

    seconds: float
    """Time between two heartbeats, in seconds."""

    def send(self, beat: dict[str, Any]) -> None:
        """Sends a heartbeat. May raise OSError; the next heartbeat replaces this one."""

    def requests(self) -> dict[str, str]:
        """Returns the requests to this rank that are known at present: their names and texts. May raise OSError."""

    def close(self) -> None:
        """Removes the heartbeat of this rank, which has ended."""


class FileChannel:
    """Writes a file per rank and lists the folder of the run's requests."""

    def __init__(self, run: str | Path, rank: int):
        self.seconds = _SECONDS
        self._run, self._path = run, heartbeat_folder(run) / rank_file(rank)

    def send(self, beat: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Not durable: flushing to disk twice a second is slow, and after a power failure no heartbeat is valid.
        write_atomic(self._path, json.dumps(beat), durable=False)

    def requests(self) -> dict[str, str]:
        return read_requests(self._run)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)


class Heartbeat:
    """The heartbeat of this process. Created in the training thread; its own thread sends it.

    Args:
        run: the run's folder; None: no heartbeat is sent.
        rank: the rank of this process.
        extra: additional entries of every heartbeat (JSON), such as the node.
        on_beat: called by the thread after each heartbeat.
        channel: sends the heartbeats and receives the requests; default: files in the run's folder.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        rank: int = 0,
        extra: dict[str, Any] | None = None,
        on_beat: Callable[[], None] | None = None,
        channel: HeartbeatChannel | None = None,
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
        self._channel: HeartbeatChannel | None = None
        self._thread: threading.Thread | None = None
        if run is not None:
            self._channel = channel or FileChannel(run, rank)
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
        # The thread ends before the heartbeat is removed, because it would send it again.
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
            self._thread = None
        if self._channel is not None:
            self._channel.close()

    def _work(self) -> None:
        assert self._channel is not None
        number = 0
        while True:
            number += 1
            # A storage that stays full or unreachable makes training fail in other places, with a message.
            with suppress(OSError):
                self._channel.send(self._beat(number))
                self._receive(self._channel.requests())
            if self._on_beat is not None:
                self._on_beat()
            if self._stop.wait(self._channel.seconds):
                return

    def _beat(self, number: int) -> dict[str, Any]:
        phase, step, since = self._now
        return {
            "rank": self._rank,
            "beat": number,
            "phase": phase,
            "step": step,
            # A duration, which readers on machines with other clocks can use.
            "seconds": time.monotonic() - since,
            "waits": self._waits(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            **_progress(),
            **self._extra,
        }

    def _receive(self, requests: dict[str, str]) -> None:
        # Both save and end this worker group. They differ in whether the driver starts another one.
        for name in ("stop", "preempt"):
            if name in requests and self.preempt is None:
                self.preempt = requests[name] or "on request"
        if any(name.startswith(AMEND) for name in requests):
            self.amend = "myllm-ray amend"
        for name in requests:
            if name.startswith("stacks-") and name not in self._dumped:
                self._dumped.add(name)
                self._dump(name.removeprefix("stacks-"))

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
