"""TensorBoard: event files in the run's folder, or in a folder that several runs share.

An event file contains the step that it starts from. TensorBoard discards the points of earlier files from that step on
(`SessionLog.START`), so steps that are trained again replace their points.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from myllm_ray.common.extras import require
from myllm_ray.engine.reporting.trackers.base import Point, TrackedRun, Tracker, TrackerSection


class TensorBoardTracker(Tracker):
    """Writes event files, which `tensorboard --logdir` shows."""

    class Config(TrackerSection):
        """Settings of TensorBoard. `project` and `tags` are not used: it has neither."""

        folder: str | None = Field(
            None,
            description="folder of the event files of several runs; the run's are in <folder>/<group>/<run_name>. "
            "default: <run's folder>/tensorboard",
        )

    config: Config
    library = ("tensorboard", "myllm_ray[tracking]")
    overwrites = True

    def open(self, run: TrackedRun, saved: dict[str, Any], step: int) -> int | None:
        writer = require("tensorboard.summary.writer.event_file_writer", "myllm_ray[tracking]", "tensorboard")
        self._event = require("tensorboard.compat.proto.event_pb2", "myllm_ray[tracking]", "tensorboard")
        self._summary = require("tensorboard.compat.proto.summary_pb2", "myllm_ray[tracking]", "tensorboard")
        if self.config.folder is None:
            folder = run.folder / "tensorboard"
        else:
            folder = Path(self.config.folder).expanduser() / (run.group or "") / run.name
        self._writer = writer.EventFileWriter(str(folder))
        # Readers discard what earlier files contain from this step on.
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._writer.add_event(self._event.Event(step=step + 1, wall_time=time.time(), session_log=start))
        if run.config:
            self._text("config", f"```yaml\n{yaml.safe_dump(run.config, sort_keys=False)}```", 0)
        if run.environment:
            self._text("environment", f"```yaml\n{yaml.safe_dump(run.environment, sort_keys=False)}```", 0)
        if run.group is not None and run.config:
            self._hparams(run)
        self._writer.flush()
        return None

    def log_metrics(self, points: list[Point]) -> None:
        for point in points:
            values = [self._summary.Summary.Value(tag=n, simple_value=v) for n, v in point.metrics.items()]
            self._add(self._summary.Summary(value=values), point.step, point.time)
        self._writer.flush()

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        self._text("samples", markdown_table(rows), step)
        self._writer.flush()

    def finish(self, status: str) -> None:
        self._writer.close()

    def _add(self, summary: Any, step: int, wall_time: float | None = None) -> None:
        wall_time = time.time() if wall_time is None else wall_time
        self._writer.add_event(self._event.Event(step=step, wall_time=wall_time, summary=summary))

    def _text(self, tag: str, text: str, step: int) -> None:
        """Writes a text (Markdown), as torch's SummaryWriter does."""
        tensors = require("tensorboard.compat.proto.tensor_pb2", "myllm_ray[tracking]", "tensorboard")
        tensor = tensors.TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        metadata = self._summary.SummaryMetadata(
            plugin_data=self._summary.SummaryMetadata.PluginData(plugin_name="text")
        )
        value = self._summary.Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)
        self._add(self._summary.Summary(value=[value]), step)

    def _hparams(self, run: TrackedRun) -> None:
        """Writes the config as hyperparameters, by which TensorBoard compares the runs of a group."""
        hparams = require("tensorboard.plugins.hparams.summary_v2", "myllm_ray[tracking]", "tensorboard")
        values = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in run.flat_config().items()}
        # Through bytes: with TensorFlow installed the function returns TensorFlow's own class of the message.
        summary = hparams.hparams_pb(values, trial_id=run.name).SerializeToString()
        self._add(self._summary.Summary.FromString(summary), 0)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Returns rows as a Markdown table; line breaks and vertical bars are escaped."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def line(cells: list[Any]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", "<br>") for c in cells) + " |"

    return "\n".join(
        [line(names), line(["---"] * len(names)), *(line([row.get(n, "") for n in names]) for row in rows)]
    )
