"""Sends events from the workers to the driver, which shows them.

The queue is bounded. If the driver is slow, the oldest `on_log` calls and printed lines are dropped; events of the run
and the other hooks are never dropped, as they are few.

`ray.train.report` is not used: it is a barrier that waits for the controller's next poll, up to two seconds per call.
Here rank 0 sends without waiting, and the driver polls a few times per second. Data that must not be lost (metrics,
ledger, checkpoints) is written to the run's folder by rank 0; these events are for display only.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from myllm_ray.common.secrets import mask_text
from myllm_ray.common.types import RunState
from myllm_ray.engine.callbacks import Callback, CallbackList
from myllm_ray.engine.reporting.events import publish
from myllm_ray.engine.reporting.terminal import print_line
from myllm_ray.orchestration.heartbeats import HeartbeatBoard

Event = tuple[str, RunState | None, tuple[Any, ...]]
"""(name of a callback's hook, its state, its other arguments), or (OUTPUT, None, (a printed line,)), or
(RECORD, None, (an event of `events.py`,))."""
OUTPUT, RECORD = "output", "record"
_POLL_SECONDS = 0.2
MOST = {"on_log": 1_000, OUTPUT: 20_000}
"""Most entries that the queue holds of a kind."""


class EventQueue:
    """Holds events until the driver fetches them."""

    def __init__(self) -> None:
        self._events: dict[int, Event] = {}
        self._numbers: dict[str, deque[int]] = {name: deque() for name in MOST}
        self._next = self._lost_lines = 0

    def put(self, event: Event) -> None:
        name = event[0]
        if name in MOST:
            numbers = self._numbers[name]
            numbers.append(self._next)
            if len(numbers) > MOST[name]:
                del self._events[numbers.popleft()]
                self._lost_lines += name == OUTPUT
        self._events[self._next] = event
        self._next += 1

    def drain(self) -> list[Event]:
        """Returns the entries in the order in which they were put, and removes them."""
        events = list(self._events.values())
        if self._lost_lines:
            events.insert(0, (OUTPUT, None, (f"({self._lost_lines:,} older lines of output were dropped)",)))
        self._events.clear()
        for numbers in self._numbers.values():
            numbers.clear()
        self._lost_lines = 0
        return events


class DriverLink(EventQueue, HeartbeatBoard):
    """The Ray actor between the workers and the driver. One for both purposes, because each actor is a process."""

    # An actor runs one call at a time, so no method needs a lock.

    def __init__(self) -> None:
        EventQueue.__init__(self)
        HeartbeatBoard.__init__(self)


@contextmanager
def link_to_driver() -> Iterator[Any]:
    """Starts a `DriverLink` and yields its handle. The actor ends with the context."""
    # On the node of the driver, whose end ends the run anyway. Restarted when it dies: the ranks send their heartbeats
    # again, and only events are lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    link = cast(Any, ray).remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(DriverLink).remote()
    try:
        yield link
    finally:
        ray.kill(link)


class ForwardCallback(Callback):
    """Worker-side callback that sends events to the driver's display.

    Args:
        queue: handle of the `DriverLink` actor.
        prints: whether the driver shows what user code prints. False where Ray shows it itself (`log_to_driver`).
    """

    main_only = True

    def __init__(self, queue: Any, prints: bool = True):
        self._queue, self._prints = queue, prints

    def output(self) -> Callable[[str], None] | None:
        """Returns a function that sends a line printed by user code; None where Ray shows it itself."""
        return (lambda line: self._queue.put.remote((OUTPUT, None, (line,)))) if self._prints else None

    def record(self, event: dict[str, Any]) -> None:
        """Sends an event of the run that this worker has published."""
        self._queue.put.remote((RECORD, None, (event,)))

    def _send(self, event: str, state: RunState, *payload: Any) -> None:
        # The result is not awaited: a training step must not wait for the driver.
        self._queue.put.remote((event, state, payload))

    def on_train_start(self, state: RunState) -> None:
        self._send("on_train_start", state)

    def on_evaluate(self, state: RunState, metrics: dict[str, float]) -> None:
        self._send("on_evaluate", state, metrics)

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        self._send("on_log", state, metrics)

    def on_checkpoint(self, state: RunState, folder: str) -> None:
        self._send("on_checkpoint", state, folder)

    def on_epoch_end(self, state: RunState) -> None:
        self._send("on_epoch_end", state)

    def on_train_end(self, state: RunState) -> None:
        self._send("on_train_end", state)


class DriverEvents:
    """Passes the workers' events to the driver's callbacks, in a separate thread because `fit` blocks.

    Args:
        callbacks: the callbacks that run in the driver. The caller closes them.
        link: handle of the `DriverLink` actor.
    """

    def __init__(self, callbacks: list[Callback], link: Any):
        self._callbacks, self._link = CallbackList(callbacks), link
        self._pending: Any = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="myllm-ray-display", daemon=True)

    def __enter__(self) -> DriverEvents:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._pending is not None:
            self._show()
        self._show()  # events that arrived after the thread's last poll

    def _run(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            if not self._show():
                return

    def _show(self) -> bool:
        if self._pending is None:
            self._pending = self._link.drain.remote()
        try:
            events: list[Event] = ray.get(self._pending, timeout=10)
        except ray.exceptions.GetTimeoutError:
            return True  # the actor is still starting, or the machine is busy; the same call is awaited next time
        except ray.exceptions.ActorUnavailableError:
            self._pending = None
            return True  # the actor is starting again
        except ray.exceptions.RayError:
            return False  # Ray is shutting down; the run's folder contains all data
        self._pending = None
        for event, state, payload in events:
            if event == RECORD:
                publish(payload[0])
            elif state is None:
                print_line(mask_text(str(payload[0])))
            else:
                self._callbacks.emit(event, state, *payload)
        return True
