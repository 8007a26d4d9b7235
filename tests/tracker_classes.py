"""Trackers from outside of the package, which the delivery process imports by path."""

from __future__ import annotations

import json
import time
from typing import Any

from myllm_ray import Tracker
from myllm_ray.engine.reporting.trackers.base import Point, TrackedRun


class Recording(Tracker):
    """Records all calls in `calls.jsonl` of the run's folder."""

    def open(self, run: TrackedRun, saved: dict[str, Any], step: int) -> int | None:
        self.path = run.folder / "calls.jsonl"
        saved["id"] = saved.get("id", 0) + 1
        self.write(call="open", id=saved["id"], step=step, group=run.group, config=run.config)
        return None

    def write(self, **call: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(call) + "\n")

    def log_metrics(self, points: list[Point]) -> None:
        for point in points:
            self.write(call="metrics", step=point.step, loss=point.metrics.get("loss"))

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.write(call="samples", step=step, rows=len(rows))

    def log_checkpoint(self, step: int, folder: Any) -> None:
        self.write(call="checkpoint", step=step)

    def supersede(self) -> None:
        self.write(call="supersede")

    def finish(self, status: str) -> None:
        self.write(call="finish", status=status)


class Broken(Recording):
    """Raises in every call."""

    def open(self, run: TrackedRun, saved: dict[str, Any], step: int) -> int | None:
        raise RuntimeError("planted: https://me:hunter2secret@host")


class Crashing(Recording):
    """Ends its process at once."""

    def open(self, run: TrackedRun, saved: dict[str, Any], step: int) -> int | None:
        import os

        os._exit(3)


class Hanging(Recording):
    """Never returns."""

    def log_metrics(self, points: list[Point]) -> None:
        time.sleep(1000)
