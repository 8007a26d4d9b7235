"""trackio: a local database (`trackio show`), a Space of Hugging Face, or a separate server.

Steps that are trained again are not sent again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field

from myllm_ray.common.extras import require
from myllm_ray.engine.reporting.trackers.base import Point, TrackedRun, Tracker, TrackerSection


class TrackioTracker(Tracker):
    """Writes the run to trackio. Credentials: HF_TOKEN for a Space, TRACKIO_WRITE_TOKEN for a server."""

    class Config(TrackerSection):
        """Settings of trackio. `tags` are part of the config that it shows: it has no tags."""

        folder: str | None = Field(
            None,
            description="folder of the database; default: TRACKIO_DIR, or trackio's folder in Hugging Face's cache",
        )
        space: str | None = Field(None, description="Space of Hugging Face, user/name, instead of a local database")
        server: str | None = Field(None, description="URL of a trackio server, instead of a local database")

    config: Config
    library = ("trackio", "myllm_ray[tracking]")

    def open(self, run: TrackedRun, saved: dict[str, Any], step: int) -> int | None:
        if self.config.folder is not None:  # read when trackio is imported
            os.environ["TRACKIO_DIR"] = str(Path(self.config.folder).expanduser().absolute())
        self._trackio = require("trackio", "myllm_ray[tracking]", "trackio")
        self._name = run.name
        self._run = self._trackio.init(
            project=self.config.project,
            name=run.name,
            group=run.group,
            space_id=self.config.space,
            server_url=self.config.server,
            config={**run.config, "environment": run.environment, "tags": run.tags},
            # Runs are found by name. An older run of the same name must not be continued by a new one.
            resume="allow" if saved.get("created") else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        saved["created"] = True
        if self.config.space is not None or self.config.server is not None:
            return None
        # trackio writes the database in a thread of its own; a process that is killed loses what the thread holds.
        stored = self._storage().get_max_step_for_run(self.config.project, run.name, run_id=self._run.id)
        return -1 if stored is None else int(stored)

    def _storage(self) -> Any:
        module: Any = require("trackio.sqlite_storage", "myllm_ray[tracking]", "trackio")
        return module.SQLiteStorage

    def log_metrics(self, points: list[Point]) -> None:
        for point in points:
            self._run.log(point.metrics, step=point.step)

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        pandas = require("pandas", "pandas", "a table of samples")
        self._run.log({"samples": self._trackio.Table(dataframe=pandas.DataFrame(rows))}, step=step)

    def supersede(self) -> None:
        self._run.finish()
        if self.config.space is None and self.config.server is None:
            self._storage().delete_run(self.config.project, self._name, run_id=self._run.id)

    def finish(self, status: str) -> None:
        self._run.finish()
