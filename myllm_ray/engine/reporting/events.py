"""The events of a run: `events.jsonl` in its folder, and the listeners in the process that started the run.

Every event is one JSON object:

    {"version": 1, "time": "2026-01-31T12:00:00.000Z", "run": "9f2c…", "rank": 0, "step": 40, "event": "epoch", ...}

`rank` is null for the process that starts the run. On Ray, this process and rank 0 both append to the file; each event
is one `write` call in append mode, so lines are not mixed on a local file system. On NFS, two events that both write at
the same moment can overwrite each other. Nothing is written once per step.

Two other files contain a part of the same facts, because a program reads them: `interventions.jsonl` is input of a
resumed run, which skips the steps that it lists, and `attempts.jsonl` is a table with one row per worker group. The
events `intervention` and `attempt` have the fields of these rows and are emitted where the rows are written.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from myllm_ray.common.files import read_jsonl
from myllm_ray.common.secrets import mask_text

log = logging.getLogger(__name__)
Event = dict[str, Any]
VERSION = 1
"""Version of the schema. It changes when a field is removed or changes its meaning."""
NAME = "events.jsonl"

EVENTS = {
    "start": "The process that starts the run has begun: `trainer`, `workers` (least and most), `folder`, `command`.",
    "phase": "A phase of that process has begun: `phase`, such as `preparing data`, `building the model`, "
    "`starting 2 workers`, `waiting for resources`, `training`.",
    "train_start": "The workers begin to train after step `step`: `total_steps`.",
    "epoch": "All batches of an epoch have been trained: `epoch`, counted from 0.",
    "evaluation": "The model was evaluated on the held-out data: `metrics`, `seconds`.",
    "checkpoint": "A checkpoint is complete: `folder`, `seconds` (for which training waited).",
    "intervention": "A bad step was skipped, or the run rewinds: the fields of `interventions.jsonl`.",
    "warning": "The package logged a warning or an error: `level`, `logger`, `text`.",
    "request": "A save and an end were requested: `request` (`stop`, `preempt`), `reason`.",
    "rank_failed": "A worker died or raised an error: `reason`, `counted` (whether it counts against "
    "`scaling.max_failures`), `failures` (the number so far).",
    "rank_hung": "A worker made no progress and was ended: `failed_rank`, `phase`, `seconds`, `stacks`, `reason`.",
    "attempt": "An attempt, or a worker group on Ray, has ended: the fields of `attempts.jsonl`.",
    "restart": "New workers follow an attempt that has ended: `reason`, `restarts` (the number so far).",
    "amendment": "New workers follow the segment before an amendment: `reason`. It is not a restart.",
    "end": "The run has ended: `status` (`done`, `preempted`, `aborted`, `failed`), `reason`, `checkpoint`.",
}
"""The events of `events.jsonl`."""

STREAMED = {
    "log": "The metrics of a logged step, as in `metrics.jsonl`: `epoch`, `total_steps`, `metrics`, and `telemetry`: "
    "`host_memory` and `device_memory` (bytes of rank 0, the latter at its peak), `data_wait` (share of the time).",
    "progress": "A long preparation advances: `task`, `done`, `total`, `seconds`. At most one every five seconds.",
    "sample": "An answer of the model (`ppo`, `grpo`): the fields of `samples.jsonl`.",
    "message": "A line of the package's log that is not a warning: `level`, `logger`, `text`.",
    "output": "A line that code of the user has printed: `text`.",
    "trial": "A trial of a sweep has changed its state: `trial`, `values`, `status`, `score`, `seconds`, `error`.",
}
"""Events that only the output with `--log-format json` contains. They are not written to the file."""


def make_event(
    event: str, step: int | None = None, rank: int | None = None, run: str | None = None, **fields: Any
) -> Event:
    """Returns an event with the current time.

    Args:
        event: a name in `EVENTS` or `STREAMED`.
        step: the optimizer step, or None.
        rank: the rank, or None for the process that starts the run.
        run: the id of the run.
        **fields: further fields (JSON).

    Raises:
        KeyError: the event is not documented in either table.
    """
    if event not in EVENTS and event not in STREAMED:
        raise KeyError(f"undocumented event {event!r}")
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"version": VERSION, "time": now, "run": run, "rank": rank, "step": step, "event": event, **fields}


def seconds_of(event: Event) -> float:
    """Returns the time of an event in seconds since the epoch."""
    return datetime.fromisoformat(str(event["time"])).timestamp()


def run_id(folder: Path) -> str | None:
    """Returns the id of the run in a folder, or None if no event was written there. It is kept when a run resumes."""
    return next((str(row["run"]) for row in read_jsonl(folder / NAME) if row.get("run")), None)


_listeners: list[Callable[[Event], None]] = []
_publishing = threading.RLock()


@contextmanager
def listening(*listeners: Callable[[Event], None]) -> Iterator[None]:
    """Calls the listeners for each event that is published in this process while the block runs.

    The calls come from several threads, one at a time. A listener that raises is removed, with one warning.
    """
    _listeners.extend(listeners)
    try:
        yield
    finally:
        for listener in listeners:
            with suppress(ValueError):
                _listeners.remove(listener)


def publish(event: Event) -> None:
    """Passes an event to the listeners of this process."""
    failed = []
    with _publishing:
        for listener in list(_listeners):
            try:
                listener(event)
            except Exception as error:  # a display must not stop a run
                _listeners.remove(listener)
                failed.append((listener, error))
    # Without the lock, and after the removal: the warning is an event too.
    for listener, problem in failed:
        log.warning("events are no longer passed to %s, which failed: %s", listener, problem)


class EventLog:
    """Writes and publishes the events of one process.

    Events are kept in memory until `open` is called, so that a run that is refused writes nothing.

    Args:
        folder: the run's folder; None: events are only published.
        rank: the rank of this process; None: the process that starts the run.
    """

    def __init__(self, folder: Path | None, rank: int | None = None):
        self._folder, self._rank = folder, rank
        self._run: str | None = uuid.uuid4().hex[:12]
        self._early: list[Event] = []
        self._file: int | None = None
        self._lock = threading.RLock()  # reentrant: a signal handler may emit while the main thread does

    def open(self) -> None:
        """Opens the file, and writes the events that were emitted before. Does nothing if it is open."""
        if self._folder is None or self._file is not None:
            return
        with self._lock, suppress(OSError):
            self._run = run_id(self._folder) or self._run
            path = self._folder / NAME
            # A process that was killed may have left a line without its end.
            torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            if torn:
                os.write(self._file, b"\n")
            for event in self._early:
                self._write({**event, "run": self._run})
            self._early.clear()

    def emit(self, event: str, step: int | None = None, **fields: Any) -> None:
        """Writes an event of `EVENTS` and publishes it; see `make_event`."""
        made = make_event(event, step, self._rank, self._run, **fields)
        with self._lock:
            if self._file is not None:
                self._write(made)
            elif self._folder is not None:
                self._early.append(made)
        publish(made)

    def _write(self, event: Event) -> None:
        assert self._file is not None
        line = mask_text(json.dumps(event, ensure_ascii=False, default=str)) + "\n"
        with suppress(OSError):  # a full disk makes training fail in other places, with a message
            os.write(self._file, line.encode())  # one call in append mode: lines of two processes are not mixed

    def close(self) -> None:
        """Closes the file. Events that were never written are dropped."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            self._folder = None


class _Warnings(logging.Handler):
    def __init__(self, events: EventLog):
        super().__init__(logging.WARNING)
        self._events = events

    def createLock(self) -> None:
        self.lock = None  # `EventLog` has its own; two threads could take both in different orders

    def emit(self, record: logging.LogRecord) -> None:
        self._events.emit(
            "warning", level=record.levelname.lower(), logger=record.name, text=mask_text(record.getMessage())
        )


_handlers: list[_Warnings] = []


@contextmanager
def recorded_warnings(events: EventLog) -> Iterator[None]:
    """Emits the package's warnings as events while the block runs. Of nested blocks, the outermost does so."""
    if _handlers:
        yield
        return
    handler = _Warnings(events)
    _handlers.append(handler)
    logging.getLogger("myllm_ray").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("myllm_ray").removeHandler(handler)
        _handlers.remove(handler)
