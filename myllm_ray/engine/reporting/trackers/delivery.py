"""The process that sends a run's records to one tracker: `python -m myllm_ray.engine.reporting.trackers.delivery`.

It reads one JSON line from its standard input (what to deliver), and later a second one (the run has ended). The end of
the input without it means that the training process was killed.

Position: `trackers/<name>.json` contains the last delivered step. A step that is trained again after a restart has the
same metrics, so it is not sent again; steps between the position and the present one are read from metrics.jsonl.
Therefore neither a restart of the run nor one of this process leaves a gap or a duplicate in the tracker's curve. If
the metrics of a step differ from those that were sent (a rewind, a changed config), the tracker gets a new run with all
points, unless it can overwrite them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

import yaml

from myllm_ray.common.files import write_atomic
from myllm_ray.common.secrets import mask_text
from myllm_ray.config.resolve import load_object
from myllm_ray.engine.reporting.trackers.base import Point, TrackedRun, Tracker, same_point
from myllm_ray.engine.reporting.trackers.process import read_state, state_path

_POLL_SECONDS = 0.5
_LONGEST_PAUSE = 30.0
_BATCH = 500
_COMPARED = 1000
"""Number of delivered steps whose results are kept, to find steps that were trained again with other results."""
_LOG_BYTES = 1_000_000
_CHECKED = ("loss", "grad_norm", "reward")


class JSONTail:
    """Reads the complete lines of a JSON Lines file that another process appends to.

    A run that is resumed removes the last lines and writes them again. The file is then read from its start.

    Attributes:
        restarted: Whether the last `read` has started again.
    """

    def __init__(self, path: Path):
        self._path, self._at, self._last = path, 0, b""
        self.restarted = False

    def read(self, most: int) -> list[dict[str, Any]]:
        """Returns at most `most` objects that follow those that were returned before."""
        rows: list[dict[str, Any]] = []
        self.restarted = False
        try:
            with open(self._path, "rb") as file:
                file.seek(self._at - len(self._last))
                # The lines that replace others have other times, and may have other lengths.
                if file.read(len(self._last)) != self._last:
                    self._at, self._last, self.restarted = 0, b"", True
                    file.seek(0)
                while len(rows) < most and (line := file.readline()).endswith(b"\n"):
                    self._at, self._last = self._at + len(line), line
                    with contextlib.suppress(ValueError):
                        rows.append(json.loads(line))
        except FileNotFoundError:
            pass
        return rows


class Delivery:
    """Sends the records of a run's folder to a tracker.

    Args:
        tracker: the tracker.
        folder: the run's folder.
        key: name of the tracker within the run.
        step: step that the run resumed from.
    """

    def __init__(self, tracker: Tracker, folder: Path, key: str, step: int):
        self._tracker, self._folder, self._key = tracker, folder, key
        self._state: dict[str, Any] = {
            **{"run": {}, "step": -1, "samples": -1, "checkpoint": -1, "sent": {}},
            **read_state(folder, key),
        }
        if tracker.overwrites:
            # Step 0 is the evaluation before training, which a run that starts at step 0 repeats.
            self._state["step"] = min(self._state["step"], step or -1)
            self._state["samples"] = min(self._state["samples"], step)
        self._state["checkpoint"] = min(self._state["checkpoint"], step)
        self._opened = False
        self._rewind_tails()

    def _rewind_tails(self) -> None:
        self._metrics = JSONTail(self._folder / "metrics.jsonl")
        self._samples = JSONTail(self._folder / "samples.jsonl")
        self._rows: list[dict[str, Any]] = []
        self._answers: dict[int, list[dict[str, Any]]] = {}
        self._seen = -1

    def open(self) -> None:
        """Opens the run in the tracker."""
        config = _read_yaml(self._folder / "config.yaml")
        section = self._tracker.config
        run = TrackedRun(
            folder=self._folder,
            name=section.run_name or self._folder.name,
            group=section.group,
            tags=section.tags,
            config=config,
            environment=_read_yaml(self._folder / "environment.json"),
            save=self._save,
        )
        stored = self._tracker.open(run, self._state["run"], self._state["step"])
        if stored is not None and stored != self._state["step"]:
            self._state["step"] = stored
            self._rewind_tails()  # what was passed to the library and not stored is read again
        self._save()
        self._opened = True

    def deliver(self, final: bool = False) -> bool:
        """Sends what is new. Returns whether there may be more.

        Args:
            final: whether the run has ended, so that nothing is added to the files any more.
        """
        if not self._opened:
            self.open()
        self._rows = self._rows or self._metrics.read(_BATCH)
        more = len(self._rows) == _BATCH
        points = []
        for row in self._rows:
            point = Point.of(row)
            checks = {name: point.metrics.get(name) for name in _CHECKED}
            sent = self._state["sent"].get(str(point.step))
            if point.step > self._state["step"]:
                points.append(point)
            elif sent is not None and not same_point(sent, checks):
                self._start_over()
                return True
            self._state["sent"][str(point.step)] = checks
        if points:
            self._tracker.log_metrics(points)
            self._state["step"] = points[-1].step
        if self._rows:
            self._seen = max(self._seen, int(self._rows[-1]["step"]))
            self._rows = []
        for step in sorted(self._state["sent"], key=int)[:-_COMPARED]:
            del self._state["sent"][step]
        changed = bool(points) | self._deliver_checkpoints() | self._deliver_samples(final and not more)
        if changed:
            self._save()
        return more

    def _deliver_samples(self, final: bool) -> bool:
        rows = self._samples.read(_BATCH)
        if self._samples.restarted:
            self._answers.clear()
        for row in rows:
            self._answers.setdefault(int(row.get("step", 0)), []).append(row)
        sent = False
        for step in sorted(self._answers):
            # The rows of a batch are written before the metrics of the next step, so a later step completes them.
            if not final and step >= max(self._seen, self._state["checkpoint"]):
                break
            if step > self._state["samples"]:
                self._tracker.log_samples(step, self._answers[step])
                self._state["samples"], sent = step, True
            del self._answers[step]
        return sent

    def _deliver_checkpoints(self) -> bool:
        # A folder without a manifest is not a checkpoint.
        found = sorted(p.parent for p in (self._folder / "checkpoints").glob("step-*/manifest.json"))
        sent = False
        for folder in found:
            step = int(folder.name.removeprefix("step-"))
            if step > self._state["checkpoint"]:
                self._tracker.log_checkpoint(step, folder)
                self._state["checkpoint"], sent = step, True
        return sent

    def _start_over(self) -> None:
        """Replaces the tracker's run by a new one, which gets all points of the run."""
        self._tracker.supersede()
        self._state |= {"run": {}, "step": -1, "samples": -1, "checkpoint": -1, "sent": {}}
        self._save()
        self._opened = False
        self._rewind_tails()

    def retry(self) -> None:
        """Makes the next `deliver` open the tracker again."""
        self._opened = False

    def finish(self, status: str) -> None:
        self._tracker.finish(status)
        self._save()

    def _save(self) -> None:
        path = state_path(self._folder, self._key)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps(self._state), durable=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


class _MaskedLog:
    """Replaces sys.stdout and sys.stderr: writes what the library prints to a file, masked, up to a limit."""

    def __init__(self, path: Path):
        path.parent.mkdir(exist_ok=True)
        self._file: TextIO = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (until the process ends)
        self._left = _LOG_BYTES

    def write(self, text: str) -> int:
        if self._left > 0:
            self._left -= len(text)
            self._file.write(mask_text(text))
        return len(text)

    def flush(self) -> None:
        self._file.flush()

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._file.fileno()


class _Control:
    """Reads the training process's messages in a thread."""

    def __init__(self) -> None:
        self.status: str | None = None
        self.ended = threading.Event()
        self._messages = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)

    def watch(self, seconds: float) -> None:
        threading.Thread(target=self._watch, args=(seconds,), daemon=True).start()

    def _watch(self, seconds: float) -> None:
        line = sys.stdin.readline()
        self.status = json.loads(line)["end"] if line else "killed"
        if not line:
            # No other process ends this one. The watchdog works even if the library keeps the interpreter's lock.
            faulthandler.dump_traceback_later(max(seconds, 1.0), exit=True)
        self.ended.set()

    def warn(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._messages.write(json.dumps({"warning": mask_text(text)}) + "\n")


def _run(spec: dict[str, Any], control: _Control) -> None:
    folder, key = Path(spec["folder"]), str(spec["key"])
    cls = load_object(spec["tracker"], "tracking")
    options = cls.Config.model_validate(spec["options"])
    control.watch(options.wait_seconds)
    delivery: Delivery | None = None
    pause, failure = _POLL_SECONDS, ""
    with open(folder / "trackers" / f"{key}.lock", "w") as lock:
        _take(lock, options.wait_seconds + 5.0)
        while True:
            ended = control.ended.is_set()  # before the files are read: nothing is written after the end
            try:
                delivery = delivery or Delivery(cls(options), folder, key, int(spec["step"]))
                more = delivery.deliver(final=ended)
                if ended and not more:
                    delivery.finish(control.status or "killed")
                    return
                pause = 0.0 if more else _POLL_SECONDS
            except Exception as error:
                described = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
                if described != failure:  # a server that is down fails in the same way every time
                    print(described, file=sys.stderr)
                failure = described
                control.warn(f"{described}; training continues, and what is not delivered is tried again")
                if control.status == "killed":
                    return  # a process of the resumed run may wait for this one, and sends the same
                if delivery is not None:
                    delivery.retry()
                pause = min(max(2 * pause, 1.0), _LONGEST_PAUSE)
            if not control.ended.is_set():
                control.ended.wait(pause)
            elif pause:
                time.sleep(min(pause, 1.0))  # the training process waits for a limited time


def _take(lock: TextIO, seconds: float) -> None:
    """Waits until the process of an earlier attempt, whose training process was killed, has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:  # held, or a file system without locks
            time.sleep(0.2)


def main() -> None:
    """Runs the process until the run has ended and everything is delivered."""
    for name in (signal.SIGTERM, signal.SIGINT):  # a signal to all processes of a job: the training process decides
        signal.signal(name, signal.SIG_IGN)
    os.nice(10)  # training has priority
    control = _Control()
    spec = json.loads(sys.stdin.readline())
    output: Any = _MaskedLog(Path(spec["folder"]) / "trackers" / f"{spec['key']}.log")
    sys.stdout = sys.stderr = output
    faulthandler.enable(file=output)
    try:
        _run(spec, control)
    except Exception as error:
        control.warn(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)  # handlers that libraries registered for the exit may wait for their servers


if __name__ == "__main__":
    main()
