"""A run from its very start: it can be seen and stopped before its workers exist.

    <run>/.pulse/driver.json    {"phase": "preparing data", "beat": 3, "pid": ..., "host": ...}

The process that starts a run writes this heartbeat from before its data are prepared until the run has ended. A request to stop that
comes before training begins ends the start: nothing is trained, so there is nothing to save.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from contextlib import ExitStack, suppress
from typing import Any

from myllm_ray.common.files import why_not_writable, write_atomic
from myllm_ray.common.signals import stop_on_signals
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.engine import pulse
from myllm_ray.engine.run_folder import checkpoints_of, folder_of, refuse_two_at_once

_SECONDS = 0.5


class StoppedAtStart(BaseException):
    """Somebody asked a run to stop that has not begun to train. Not an `Exception`: nothing on the way may handle it."""


class Startup:
    """Occupies a run's folder from now until the run has ended.

    In the main thread the first Ctrl-C or SIGTERM, or `myllm-ray stop`, raises `StoppedAtStart` at once, until `training` is called; then
    it becomes a request that the workers follow. In other threads the request is seen when the next phase begins.

    Raises:
        ConfigError: another run is going on in the folder, or it is not writable.
    """

    def __init__(self, config: TrainerConfig, phase: str = "starting"):
        self.config, self.folder = config, folder_of(config)
        self._phase, self._entered, self._trains, self._told = phase, False, False, False
        self._main = threading.current_thread() is threading.main_thread()
        self._lock = threading.RLock()  # a handler of signals may come while the main thread holds it
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="startup", daemon=True)
        self._stack = ExitStack()
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]

    def __enter__(self) -> Startup:
        refuse_two_at_once(self.folder)
        problem = why_not_writable(self.folder)
        if problem:
            raise ConfigError(f"run.storage: {self.folder} can't be written: {problem}")
        pulse.remove(self.folder)  # what processes that were killed left behind
        self._stack.enter_context(stop_on_signals(self._asked))  # a signal in here is a request, seen at the first phase
        self._beat(0)
        self._thread.start()
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self._listens_no_more()  # before the handlers go: a signal that the thread sends would end the process
        self._end.set()
        self._thread.join(5)
        self._stack.close()
        pulse.remove(self.folder)
        for path in self._made:  # a run that was refused leaves nothing behind
            with suppress(OSError):
                path.rmdir()

    def phase(self, name: str) -> None:
        """What the start does from now on.

        Raises:
            StoppedAtStart: the run was asked to stop before training began.
        """
        self._phase = name
        if not self._trains and (reason := pulse.asked(self.folder)) is not None:
            self._listens_no_more()
            raise StoppedAtStart(reason)

    def training(self) -> None:
        """From now on a request to stop is followed by those who train: they save first.

        Raises:
            StoppedAtStart: the run was asked to stop before.
        """
        self.phase("training")
        with self._lock:
            self._trains = True

    def stopped(self, reason: object) -> dict[str, Any]:
        """The summary (`worker.run_worker`) of a run that was stopped before it trained."""
        newest = checkpoints_of(self.config).all()
        step = int(newest[-1].name.removeprefix("step-")) if newest else 0
        return {"step": step, "metrics": {}, "folder": str(self.folder), "checkpoint": str(newest[-1]) if newest else None,
                "left": str(reason), "rewound": False, "abandoned": False}

    def _asked(self, name: str) -> None:
        """On a signal, in the main thread."""
        interrupts = self._entered and not self._trains and not self._end.is_set()
        self._listens_no_more()
        reason = pulse.asked(self.folder) or name
        pulse.request(self.folder, "stop", reason)
        if interrupts:
            raise StoppedAtStart(reason)

    def _listens_no_more(self) -> None:
        """The main thread knows of the request, or of the end: the other one need not wake it up."""
        with self._lock:
            self._told = True

    def _work(self) -> None:
        beat = 0
        while not self._end.wait(_SECONDS):
            beat += 1
            with suppress(OSError):  # a storage that is away for a moment
                self._beat(beat)
                if pulse.asked(self.folder) is not None:
                    self._wake_up()

    def _wake_up(self) -> None:
        """Interrupt the main thread, whatever it waits for; `_asked` is called there."""
        with self._lock:
            if self._main and not self._told and not self._trains:
                self._told = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _beat(self, number: int) -> None:
        pulse.pulse_folder(self.folder).mkdir(parents=True, exist_ok=True)
        write_atomic(pulse.pulse_folder(self.folder) / pulse.DRIVER, json.dumps({
            "beat": number, "phase": self._phase, "pid": os.getpid(), "host": socket.gethostname()}), durable=False)

