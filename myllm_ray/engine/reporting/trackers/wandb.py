"""Weights & Biases, online or offline (`mode: offline`, then `wandb sync`).

The run's id is kept, so a resumed run continues its curve. W&B can't overwrite points: steps that are trained again are
not sent again. An offline run that was resumed has several folders with the same id, which `wandb sync` joins.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from myllm_ray.common.extras import require
from myllm_ray.engine.reporting.trackers.base import Point, TrackedRun, Tracker, TrackerSection


class WandbTracker(Tracker):
    """Sends the run to Weights & Biases. The key is read from WANDB_API_KEY, or from `wandb login`."""

    class Config(TrackerSection):
        """Settings of Weights & Biases."""

        entity: str | None = Field(None, description="user or team; default: WANDB_ENTITY, or the user of the key")
        mode: Literal["online", "offline"] | None = Field(None, description="default: WANDB_MODE, or online")
        system_metrics: bool = Field(True, description="whether W&B records the load of CPU, GPU and memory")

    config: Config
    library = ("wandb", "myllm_ray[tracking]")

    def open(self, run: TrackedRun, saved: dict[str, Any], step: int) -> int | None:
        wandb = self._wandb = require("wandb", "myllm_ray[tracking]", "wandb")
        saved.setdefault("id", uuid.uuid4().hex[:8])
        mode = self.config.mode or os.environ.get("WANDB_MODE", "online")
        self._run = wandb.init(
            entity=self.config.entity,
            project=self.config.project,
            id=saved["id"],
            resume="allow",
            name=run.name,
            group=run.group,
            tags=run.tags,
            config={**run.config, "environment": run.environment},
            dir=str(run.folder),
            mode=mode,
            settings=wandb.Settings(
                console="off", silent=True, save_code=False, x_disable_stats=not self.config.system_metrics
            ),
        )
        if mode == "offline":
            # W&B's service writes the file some time after `log` has returned; a killed one loses what it holds.
            return max((n for path in offline_files(run.folder, saved["id"]) for n in steps_in(path)), default=-1)
        return int(self._run.step) - 1 if self._run.resumed else None

    def log_metrics(self, points: list[Point]) -> None:
        for point in points:
            self._run.log(point.metrics, step=point.step, commit=True)

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = self._wandb.Table(columns=names, data=[[_cell(row.get(n)) for n in names] for row in rows])
        # W&B refuses steps that it has passed. The table becomes part of the next step; its column `step` is exact.
        self._run.log({"samples": table}, commit=False)

    def log_checkpoint(self, step: int, folder: Path) -> None:
        self._run.summary["checkpoint"] = str(folder)

    def supersede(self) -> None:
        self._run.tags = (*(self._run.tags or ()), "superseded")
        self._run.finish()

    def finish(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=1 if status in ("failed", "killed") else 0)
        self._wandb.teardown()


def _cell(value: Any) -> Any:
    return value if isinstance(value, (str, int, float)) or value is None else json.dumps(value, ensure_ascii=False)


def offline_files(folder: Path, run_id: str) -> list[Path]:
    """Returns the files that W&B has written for a run in offline mode, oldest first."""
    return sorted((folder / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))


def steps_in(path: Path) -> list[int]:
    """Returns the steps with metrics in a file of W&B; a truncated end is ignored."""
    steps = []
    for record in records_in(path):
        if record.WhichOneof("record_type") == "history":
            keys = [item.key or ".".join(item.nested_key) for item in record.history.item]
            if any(not key.startswith(("_", "samples")) for key in keys):
                steps.append(int(record.history.step.num))
    return steps


def records_in(path: Path) -> Iterator[Any]:
    """Yields the records of a file of W&B. It is a LevelDB log: blocks of 32 KiB with fragments of records."""
    proto = require("wandb.proto.wandb_internal_pb2", "myllm_ray[tracking]", "wandb")
    data = path.read_bytes()
    at, parts = 7, b""  # after W&B's own header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # too short for the header of a fragment
            at += left
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data) or kind not in (1, 2, 3, 4):
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last fragment
            record = proto.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
