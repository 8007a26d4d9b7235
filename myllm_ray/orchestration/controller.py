"""What runs in Ray Train's controller: it ends a worker group that is still being started."""

from __future__ import annotations

import gc
import os
import threading
from contextlib import suppress
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

from myllm_ray.engine.pulse import asked

END = "end"
"""Request (engine/pulse.py) to end the controller."""
_LOOK_SECONDS = 0.3
_ABORT_SECONDS = 10.0


class EndOnRequest(ControllerCallback):
    """Ends the controller, and its workers with it, when the run's folder says so.

    `TorchTrainer.fit` offers this to the main thread only, as its answer to Ctrl-C; and not while it waits for workers.
    """

    def __init__(self, folder: str):
        self._folder = folder

    def after_controller_start(self, train_run_context: Any) -> None:
        controller = ray.get_runtime_context().current_actor
        threading.Thread(target=self._listen, args=(controller,), name="end-on-request", daemon=True).start()

    def _listen(self, controller: Any) -> None:
        waits = threading.Event()
        while asked(self._folder, END) is None:
            waits.wait(_LOOK_SECONDS)
        controller.abort.remote()  # not heard while the controller waits for workers to start
        waits.wait(_ABORT_SECONDS)
        remove_own_placement_groups()
        os._exit(1)


def remove_own_placement_groups() -> None:
    """Give back what this process has reserved: Ray keeps a placement group until the job has ended, not the actor that made it.

    Ray Train keeps the handle of a group that is not ready yet in a local variable only.
    """
    for found in [value for value in gc.get_objects() if isinstance(value, PlacementGroup)]:
        with suppress(Exception):
            remove_placement_group(found)
