"""The queue between the workers and the driver is bounded and keeps its order. The actor's class runs without Ray."""

from __future__ import annotations

from myllm_ray.common.types import RunState
from myllm_ray.orchestration.driver_events import MOST, OUTPUT, RECORD, EventQueue


def test_a_slow_driver_loses_old_logs_and_nothing_else() -> None:
    queue = EventQueue()
    most = MOST["on_log"]
    queue.put(("on_train_start", RunState(), ()))
    for step in range(most + 50):
        queue.put(("on_log", RunState(step=step), ({"loss": 1.0},)))
        if step % 100 == 0:
            queue.put((RECORD, None, ({"event": "checkpoint", "step": step},)))
    events = queue.drain()
    logs = [state.step for name, state, _ in events if name == "on_log" and state is not None]
    assert logs == list(range(50, most + 50)), "the newest ones, in order"
    records = [payload[0]["step"] for name, _, payload in events if name == RECORD]
    assert records == list(range(0, most + 50, 100))
    assert events[0][0] == "on_train_start"
    places = [i for i, (name, state, _) in enumerate(events) if name == RECORD or (state and state.step % 100 == 0)]
    assert places == sorted(places)
    assert queue.drain() == []


def test_dropped_lines_are_counted() -> None:
    queue = EventQueue()
    for number in range(MOST[OUTPUT] + 3):
        queue.put((OUTPUT, None, (f"line {number}",)))
    first, second, *_ = queue.drain()
    assert first[2][0] == "(3 older lines of output were dropped)"
    assert second[2][0] == "line 3"
    queue.put((OUTPUT, None, ("next",)))
    assert [event[2][0] for event in queue.drain()] == ["next"]
