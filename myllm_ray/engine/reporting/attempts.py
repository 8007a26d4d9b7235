"""The attempts of a run, from `events.jsonl`: when training started and ended, from which step, and how.

A process that is killed records no end. On Ray the supervisor records it; otherwise the next attempt shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myllm_ray.common.files import read_jsonl
from myllm_ray.engine.liveness.heartbeat import find_activity
from myllm_ray.engine.reporting import events


@dataclass
class Attempt:
    """One attempt: the training from the step `first` to `last`, if its end is known."""

    first: int
    started: float | None
    total_steps: int | None = None
    last: int | None = None
    ended: float | None = None
    how: str | None = None
    """How it ended: `done`, or `preempted`, `rewind`, `amended`, `aborted` or `failed` with the reason."""

    @property
    def seconds(self) -> float | None:
        return None if self.started is None or self.ended is None else max(0.0, self.ended - self.started)


def read_attempts(folder: Path, end: str | None = None) -> list[Attempt]:
    """Returns the attempts of a run in the order of time, with their ends as far as they are known.

    Args:
        folder: the run's folder.
        end: how the last attempt ended, if it is not recorded yet.
    """
    found: list[Attempt] = []
    for event in read_jsonl(folder / events.NAME):
        kind, open_one = event.get("event"), found[-1] if found and found[-1].how is None else None
        if kind == "train_start":
            found.append(Attempt(int(event["step"]), events.seconds_of(event), event.get("total_steps")))
        elif kind == "attempt":
            if open_one is None:  # it ended before training started
                found.append(open_one := Attempt(event["from_step"], None))
            _end(open_one, event["to_step"], event, event["end"])
        elif kind == "end" and open_one is not None:
            reason = f"{event['status']}: {event['reason']}" if event.get("reason") else event["status"]
            _end(open_one, event.get("step"), event, reason)
    if found:
        found[-1].how = found[-1].how or end
        return found
    # A run of an older version.
    rows = list(read_jsonl(folder / "attempts.jsonl"))
    return [Attempt(row["from_step"], None, None, row["to_step"], row["time"], row["end"]) for row in rows]


def _end(attempt: Attempt, step: int | None, event: events.Event, how: str) -> None:
    attempt.last, attempt.ended, attempt.how = step, events.seconds_of(event), how


def end_status(end: str, complete: bool) -> tuple[str, str | None]:
    """Returns the status of a run whose last attempt has ended, and the reason.

    Args:
        end: how the attempt ended; see `Attempt.how`.
        complete: whether all steps are done.
    """
    kind, _, reason = end.partition(": ")
    if kind == "done":
        return ("finished", None) if complete else ("stopped", "by a callback")
    if kind in ("rewind", "amended"):  # the next attempt was about to start
        return "dead", reason
    return {"preempted": "preempted", "aborted": "stopped", "failed": "failed"}.get(kind, "ended"), reason or None


STYLES = {"finished": "good", "stopped": "wait", "preempted": "wait", "failed": "bad", "dead": "bad"}
"""Styles of a page by status."""


def status_of(folder: Path, attempts: Sequence[Attempt], last_step: int) -> str:
    """Returns the status of a run, from its files: active, or as `myllm-ray runs ls` shows it.

    Args:
        folder: the run's folder.
        attempts: the result of `read_attempts`.
        last_step: the last logged step.
    """
    last = attempts[-1] if attempts else None
    complete = last is not None and last.total_steps is not None and max(last.last or 0, last_step) >= last.total_steps
    if last is not None and last.how is not None:
        return end_status(last.how, complete or last.total_steps is None)[0]
    if find_activity(folder) is not None:
        return "active"
    # A TorchTrainer of the user records no end.
    return "finished" if complete else "ended" if last is None else "dead"


def restarts_of(attempts: Sequence[Attempt]) -> int:
    """Returns the number of restarts. An amendment is none."""
    return sum(not (attempt.how or "").startswith("amended") for attempt in attempts[:-1])


def marks_of(folder: Path, attempts: Sequence[Attempt]) -> list[tuple[int, str]]:
    """Returns (step, text) of each restart and each intervention, by step, which mark the curves of a run."""
    found = []
    for number, attempt in enumerate(attempts):
        if number == 0 and attempt.first:
            found.append((attempt.first, f"step {attempt.first}: started from the checkpoint of another run"))
        elif number:
            before = attempts[number - 1].how
            reason = f" ({before})" if before else " (the process ended without recording why)"
            resumed = before if before and before.startswith("amended") else f"resumed{reason}"
            found.append((attempt.first, f"step {attempt.first}: {resumed}"))
    found.extend(
        (int(row["step"]), f"step {row['step']}: {row.get('action')}: {row.get('reason')}")
        for row in interventions(folder)
    )
    return sorted(found, key=lambda mark: mark[0])


def interventions(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of `interventions.jsonl`."""
    return [row for row in read_jsonl(folder / "interventions.jsonl") if isinstance(row.get("step"), int)]
