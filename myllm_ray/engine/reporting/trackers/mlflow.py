"""MLflow: metrics, parameters, tables of samples, artifacts and the model registry, on a server or in a database.

MLflow can't overwrite points: steps that are trained again are not sent again. Runs of a group (the trials of a sweep)
are children of one parent run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from myllm_ray.common.extras import require
from myllm_ray.common.files import write_atomic
from myllm_ray.engine.reporting.trackers.base import Point, TrackedRun, Tracker, TrackerSection

_STEP, _GROUP = "myllm_ray.step", "myllm_ray.group"
_METRICS_PER_CALL, _PARAMS_PER_CALL, _PARAM_LENGTH = 1000, 100, 6000  # limits of MLflow's API
_STATUS = {"finished": "FINISHED", "failed": "FAILED"}
_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""MLflow's own defaults retry for minutes within one call. Here the delivery process retries."""


class MLflowTracker(Tracker):
    """Sends the run to MLflow. Credentials: MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN."""

    class Config(TrackerSection):
        """Settings of MLflow."""

        uri: str | None = Field(None, description="http://host:port or sqlite:///file.db; default: MLFLOW_TRACKING_URI")
        artifacts: Literal["none", "last"] = Field(
            "none",
            description="last: the newest checkpoint, the model's config and the tokenizer, at the end of the run",
        )
        registered_model: str | None = Field(
            None, description="name in the model registry under which that checkpoint is registered"
        )

        @model_validator(mode="after")
        def _consistent(self) -> MLflowTracker.Config:
            if self.registered_model is not None and self.artifacts == "none":
                raise ValueError("registered_model needs the files of the model: set artifacts: last")
            return self

    config: Config
    library = ("mlflow", "myllm_ray[tracking]")

    def open(self, run: TrackedRun, saved: dict[str, Any], step: int) -> int | None:
        for name, value in _TIMEOUTS.items():
            os.environ.setdefault(name, value)
        self._entities = require("mlflow.entities", "myllm_ray[tracking]", "mlflow")
        self._client = require("mlflow", "myllm_ray[tracking]", "mlflow").MlflowClient(self.config.uri)
        self._folder, self._saved = run.folder, saved
        if "id" not in saved:
            experiment = self._experiment()
            tags = {"mlflow.runName": run.name, _STEP: "-1", **dict.fromkeys(run.tags, "true")}
            if run.group is not None:
                tags["mlflow.parentRunId"] = self._parent(run, experiment)
            if "git_commit" in run.environment:
                tags["mlflow.source.git.commit"] = str(run.environment["git_commit"])
            saved["id"] = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
            run.save()
        # An amendment changes the config of a run; the parameters of a run in MLflow can't change.
        content = hashlib.sha256(json.dumps(run.config, sort_keys=True, default=str).encode()).hexdigest()[:16]
        if saved.get("described") != content:
            self._describe(run, parameters="described" not in saved)
            saved["described"] = content
        self._id: str = saved["id"]
        self._client.update_run(self._id, status="RUNNING")
        return int(self._client.get_run(self._id).data.tags.get(_STEP, -1))

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.config.project)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(self.config.project, artifact_location=self._artifacts()))
        except Exception:  # another run has created it in the meantime
            found = self._client.get_experiment_by_name(self.config.project)
            if found is None:
                raise
            return str(found.experiment_id)

    def _artifacts(self) -> str | None:
        """Returns the folder for artifacts of a local database, next to it; MLflow uses the working directory."""
        uri = str(self._client.tracking_uri)
        if not uri.startswith("sqlite:///"):
            return None  # the server decides
        return (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()

    def _parent(self, run: TrackedRun, experiment: str) -> str:
        """Returns the parent run of the group, which the first run of the group creates."""
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in run.group or "")
        where = hashlib.sha256(f"{self._client.tracking_uri} {experiment}".encode()).hexdigest()[:8]
        path = run.folder.parent / f".mlflow-{name}-{where}"
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists() and self._exists(parent := path.read_text(encoding="utf-8")):
                return parent
            tags = {_GROUP: run.group}
            parent = str(self._client.create_run(experiment, run_name=run.group, tags=tags).info.run_id)
            self._client.set_terminated(parent)
            write_atomic(path, parent)
            return parent

    def _exists(self, run_id: str) -> bool:
        """Returns whether a run exists and is not deleted."""
        exceptions: Any = require("mlflow.exceptions", "myllm_ray[tracking]", "mlflow")
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except exceptions.MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _describe(self, run: TrackedRun, parameters: bool) -> None:
        """Sends the config as parameters, and both files as artifacts."""
        run_id = self._saved["id"]
        params = [
            self._entities.Param(_name(key), str(value)[:_PARAM_LENGTH])
            for key, value in (run.flat_config().items() if parameters else ())
        ]
        for at in range(0, len(params), _PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=params[at : at + _PARAMS_PER_CALL])
        for name in ("config.yaml", "environment.json"):
            if (run.folder / name).exists():
                self._client.log_artifact(run_id, str(run.folder / name))

    def log_metrics(self, points: list[Point]) -> None:
        metrics: list[Any] = []
        last = -1
        for point in points:
            found = [
                self._entities.Metric(_name(name), value, int(1000 * point.time), point.step)
                for name, value in point.metrics.items()
            ]
            # A step is not split over calls, so that the tag is exact if the process is killed between two of them.
            if metrics and len(metrics) + len(found) > _METRICS_PER_CALL:
                self._send(metrics, last)
                metrics = []
            metrics += found
            last = point.step
        if metrics:
            self._send(metrics, last)

    def _send(self, metrics: list[Any], step: int) -> None:
        self._client.log_batch(self._id, metrics=metrics, tags=[self._entities.RunTag(_STEP, str(step))])

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = {name: [row.get(name) for row in rows] for name in names}
        self._client.log_table(self._id, table, f"samples/step-{step:08d}.json")

    def log_checkpoint(self, step: int, folder: Path) -> None:
        self._saved["checkpoint"] = str(folder)
        self._client.set_tag(self._id, "myllm_ray.checkpoint", str(folder))

    def supersede(self) -> None:
        self._client.delete_run(self._id)

    def finish(self, status: str) -> None:
        self._client.set_tag(self._id, "myllm_ray.status", status)
        if status == "finished" and self.config.artifacts == "last" and "checkpoint" in self._saved:
            self._store(Path(self._saved["checkpoint"]))
        self._client.set_terminated(self._id, _STATUS.get(status, "KILLED"), end_time=int(1000 * time.time()))

    def _store(self, checkpoint: Path) -> None:
        """Uploads the newest checkpoint and registers it. What a failed attempt has uploaded is uploaded again."""
        if self._saved.get("stored") == checkpoint.name or not checkpoint.is_dir():
            return
        self._client.log_artifacts(self._id, str(checkpoint), f"model/checkpoints/{checkpoint.name}")
        for name in ("model", "tokenizer"):
            if (self._folder / name).is_dir():
                self._client.log_artifacts(self._id, str(self._folder / name), f"model/{name}")
        if self.config.registered_model is not None:
            self._register(self.config.registered_model, checkpoint.name)
        self._saved["stored"] = checkpoint.name

    def _register(self, name: str, checkpoint: str) -> None:
        if not self._client.search_registered_models(filter_string=f"name = '{name}'"):
            self._client.create_registered_model(name)
        source = f"{self._client.get_run(self._id).info.artifact_uri}/model"
        self._client.create_model_version(name, source, self._id, tags={"checkpoint": checkpoint})


def _name(text: str) -> str:
    """Returns a name with the characters that MLflow accepts."""
    return re.sub(r"[^\w\-. /]", "_", text)
