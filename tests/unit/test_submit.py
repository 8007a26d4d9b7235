"""`myllm-ray submit` against a cluster that has just started."""

from __future__ import annotations

from typing import Any

import pytest

from myllm_ray.orchestration import submit as module


class Client:
    """A job client that refuses a job `refusals` times, as the client of Ray does."""

    def __init__(self, message: str, refusals: int):
        self.message, self.refusals = message, refusals

    def submit_job(self, **_: Any) -> str:
        self.refusals -= 1
        if self.refusals >= 0:
            raise RuntimeError(self.message)
        return "job-1"


BUSY = "Request failed with status code 500: No available agent to submit job, please try again later.."


def test_a_head_whose_agents_are_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the command failed while the agents of the head were starting.

    The error was `Ray at http://127.0.0.1:8265: Request failed with status code 500: No available agent ...`.
    """
    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    assert module._submitted(Client(BUSY, 2), "true", {}) == "job-1"
    assert len(waited) == 2
    monkeypatch.setattr(module, "AGENT_TIMEOUT", -1.0)
    with pytest.raises(RuntimeError, match="No available agent"):
        module._submitted(Client(BUSY, 2), "true", {})


def test_another_refusal_is_reported_at_once() -> None:
    with pytest.raises(RuntimeError, match="unauthorized"):
        module._submitted(Client("unauthorized", 1), "true", {})
