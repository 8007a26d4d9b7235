"""What Ray prints about errors on its nodes is dropped or shortened."""

from __future__ import annotations

from typing import Any

import pytest

from myllm_ray.orchestration import session

DIED = (
    "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot the problem, ..."
)
MEMORY = (
    "2 Workers (tasks / actors) killed due to memory pressure (OOM), 0 Workers crashed. To see more\ninformation, ..."
)


def test_messages_of_ray(monkeypatch: pytest.MonkeyPatch, warned: list[str]) -> None:
    printed: list[Any] = []
    monkeypatch.setattr(session.ray_worker, "print_to_stdstream", lambda data, **_: printed.append(data["lines"]))
    session._shorten_error_messages()
    once = session.ray_worker.print_to_stdstream
    session._shorten_error_messages()
    assert session.ray_worker.print_to_stdstream is once
    for pid, line in (("raylet", DIED), ("raylet", MEMORY), (123, "a line of a worker")):
        once({"pid": pid, "lines": [line], "is_err": False}, ignore_prefix=False)
    assert printed == [["a line of a worker"]]
    assert warned == ["Ray: 2 Workers (tasks / actors) killed due to memory pressure (OOM), 0 Workers crashed"]
