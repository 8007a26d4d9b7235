"""The start of a run: other processes can see and stop the run before its workers exist.

    <run>/.heartbeats/driver.json    {"phase": "preparing data", "beat": 3, "pid": ..., "host": ...}

The process that starts a run writes this heartbeat from before the data preparation until the run has ended. A request
to stop before training begins ends the run without a checkpoint, because nothing has been trained.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from contextlib import ExitStack, suppress
from typing import Any

from myllm_ray.common.files import why_not_writable, write_atomic
from myllm_ray.common.progress import current
from myllm_ray.common.secrets import mask_text
from myllm_ray.common.signals import stop_on_signals
from myllm_ray.common.types import Exit
from myllm_ray.config.errors import ConfigError, UserError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.engine.liveness import heartbeat
from myllm_ray.engine.reporting.events import EventLog, recorded_warnings
from myllm_ray.engine.run_folder import checkpoints_of, folder_of, refuse_two_at_once

_SECONDS = 0.5


class StoppedAtStart(BaseException):
    """A run was requested to stop before it began to train.

    Not a subclass of `Exception`, so that no `except Exception` between here and the caller handles it.
    """


class Startup:
    """Context manager that reserves a run's folder until the run has ended.

    Until `training` is called, the first Ctrl-C or SIGTERM, or `myllm-ray stop`, raises `StoppedAtStart` immediately in
    the main thread. After that, it becomes a request to the workers. If the object is created in another thread, a
    request takes effect when the next phase begins.

    Args:
        config: the config of the run.
        phase: the first phase, for the heartbeat.

    Raises:
        ConfigError: another run is active in the folder, or it is not writable.
    """

    def __init__(self, config: TrainerConfig, phase: str = "starting"):
        self.config, self.folder = config, folder_of(config)
        self._phase, self._entered, self._trains, self._told = phase, False, False, False
        self._main = threading.current_thread() is threading.main_thread()
        self._lock = threading.RLock()  # reentrant: a signal handler may run while the main thread holds it
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="startup", daemon=True)
        self._stack = ExitStack()
        self.events = EventLog(self.folder)
        """The events of the process that starts the run."""
        self._summary: dict[str, Any] | None = None
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]

    def __enter__(self) -> Startup:
        refuse_two_at_once(self.folder)
        problem = why_not_writable(self.folder)
        if problem:
            raise ConfigError(f"run.storage: {self.folder} can't be written: {problem}")
        heartbeat.remove(self.folder)  # heartbeats and requests of processes that were killed
        self._stack.enter_context(
            stop_on_signals(self._asked)
        )  # a signal before `_entered` is set is a request, which takes effect at the first phase
        self._stack.enter_context(recorded_warnings(self.events))
        scaling, command = self.config.scaling, [mask_text(word) for word in sys.argv]
        self.events.emit(
            "start",
            name=self.config.run.name,
            folder=str(self.folder),
            trainer=self.config.trainer,
            workers=[scaling.least, scaling.most],
            command=command,
        )
        self.events.emit("phase", phase=self._phase)
        self._beat(0)
        self._thread.start()
        self._entered = True
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # Before the handlers are restored: with the default handler, a signal from the thread would end the process.
        self._listens_no_more()
        # With the heartbeat: a listener may write to the run's folder for some time.
        self.events.emit("end", **self._end_of(error))
        self._end.set()
        self._thread.join(5)
        self._stack.close()
        self.events.close()
        heartbeat.remove(self.folder)
        for path in self._made:  # created by this process, and empty if the run was refused
            with suppress(OSError):
                path.rmdir()

    def phase(self, name: str) -> None:
        """Sets the phase that begins now.

        Raises:
            StoppedAtStart: the run was requested to stop before training began.
        """
        if name != self._phase:
            self.events.emit("phase", phase=name)
        self._phase = name
        if not self._trains and (reason := heartbeat.asked(self.folder)) is not None:
            self._listens_no_more()
            raise StoppedAtStart(reason)

    def training(self, phase: str = "training") -> None:
        """Marks the begin of training: from now on the workers handle a request to stop, and save first.

        Args:
            phase: the first phase.

        Raises:
            StoppedAtStart: the run was requested to stop before.
        """
        self.phase(phase)
        self.events.open()  # the folder has been claimed for this run, so an earlier run's file is gone
        # With the lock: `_wake_up` checks `_trains` and sends its signal under it, so no signal follows.
        with self._lock:
            self._trains = True

    def stopped(self, reason: object) -> dict[str, Any]:
        """Returns the summary (`worker.run_worker`) of a run that was stopped before it trained."""
        newest = checkpoints_of(self.config).all()
        step = int(newest[-1].name.removeprefix("step-")) if newest else 0
        return self.ended(
            {
                "step": step,
                "metrics": {},
                "folder": str(self.folder),
                "checkpoint": str(newest[-1]) if newest else None,
                "exit": Exit("preempted", str(reason)),
            }
        )

    def ended(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Sets the summary of the run, for its last event, and returns it."""
        self._summary = summary
        return summary

    def _end_of(self, error: BaseException | None) -> dict[str, Any]:
        """Returns the fields of the event `end`."""
        found: dict[str, Any] = self._summary or {}
        fields = {"step": found.get("step"), "checkpoint": found.get("checkpoint"), "reason": None}
        if error is not None:
            return {**fields, "status": "failed", "reason": mask_text(describe_error(error))}
        exit = found.get("exit")
        return {**fields, "status": "done"} if exit is None else {**fields, "status": exit.kind, "reason": exit.reason}

    def _asked(self, name: str) -> None:
        """Handles a signal, in the main thread."""
        interrupts = self._entered and not self._trains and not self._end.is_set()
        self._listens_no_more()
        # The signal may come from `_wake_up`; the request then contains the reason.
        reason = heartbeat.asked(self.folder) or name
        heartbeat.request(self.folder, "stop", reason)
        self.events.emit("request", request="stop", reason=reason)
        if interrupts:
            raise StoppedAtStart(reason)

    def _listens_no_more(self) -> None:
        """Records that the main thread knows of a request or of the end, so the heartbeat thread sends no signal."""
        with self._lock:
            self._told = True

    def _work(self) -> None:
        beat = 0
        while not self._end.wait(_SECONDS):
            beat += 1
            with suppress(OSError):  # a storage may be unreachable for some seconds
                self._beat(beat)
                if heartbeat.asked(self.folder) is not None:
                    self._wake_up()

    def _wake_up(self) -> None:
        """Interrupts the main thread with a SIGTERM, also in a blocking system call; its handler calls `_asked`."""
        # At most once: `stop_on_signals` raises KeyboardInterrupt at the second signal.
        with self._lock:
            if self._main and not self._told and not self._trains:
                self._told = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _beat(self, number: int) -> None:
        heartbeat.heartbeat_folder(self.folder).mkdir(parents=True, exist_ok=True)
        write_atomic(
            heartbeat.heartbeat_folder(self.folder) / heartbeat.DRIVER,
            json.dumps(
                {
                    "beat": number,
                    "phase": self._phase,
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    **({"progress": found.as_json()} if (found := current(_SECONDS)) else {}),
                }
            ),
            durable=False,
        )


def describe_error(error: BaseException) -> str:
    """Returns the message of an error of the user, or the type and the message of another one, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
