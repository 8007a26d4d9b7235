"""Ray Train controller callback that ends a worker group, also one that is still starting."""

from __future__ import annotations

import gc
import os
import threading
from contextlib import suppress
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

from myllm_ray.engine.liveness.heartbeat import asked

END = "end"
"""Name of the request (engine/liveness/heartbeat.py) that ends the controller."""
_LOOK_SECONDS = 0.3
_ABORT_SECONDS = 10.0


class EndOnRequest(ControllerCallback):
    """Ends the controller and its workers when the run's folder contains the request `END`.

    `TorchTrainer.fit` supports this in the main thread only, as its reaction to Ctrl-C, and not while it waits for
    workers.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str):
        self._folder = folder

    def after_controller_start(self, train_run_context: Any) -> None:
        # A thread, because the controller processes no calls while it waits for workers to start.
        controller = ray.get_runtime_context().current_actor
        threading.Thread(target=self._listen, args=(controller,), name="end-on-request", daemon=True).start()

    def _listen(self, controller: Any) -> None:
        waits = threading.Event()
        while asked(self._folder, END) is None:
            waits.wait(_LOOK_SECONDS)
        # The clean way first. The controller does not process the call while it waits for workers to start, so after
        # the grace period the process gives back its reservations and exits. Ray then ends the workers that it owns.
        controller.abort.remote()
        waits.wait(_ABORT_SECONDS)
        remove_own_placement_groups()
        os._exit(1)


def remove_own_placement_groups() -> None:
    """Removes the placement groups that this process has created.

    Ray keeps a placement group until the job ends, also after the actor that created it has ended.
    """
    # Ray Train keeps the handle of a group that is not ready yet in a local variable only, so the handles are found
    # through the garbage collector.
    for found in [value for value in gc.get_objects() if isinstance(value, PlacementGroup)]:
        with suppress(Exception):
            remove_placement_group(found)
