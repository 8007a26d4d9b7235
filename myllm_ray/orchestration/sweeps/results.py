"""The folder of a sweep and its results.

<storage>/<name>/sweep.yaml       the sweep's config with all defaults
                 results.jsonl    one line for each trial that has ended
                 best.yaml        the best trial's config, ready for `myllm-ray train`
                 report.html      all trials on one page
                 trials/0003/     the run's folder of a trial, the same as from `train`
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from myllm_ray.common.files import JSONLines, read_jsonl, why_not_writable, write_atomic
from myllm_ray.common.secrets import mask
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.load import to_yaml, validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sweep import CHECKPOINTED, SweepConfig, run_config
from myllm_ray.engine.checkpointing.manager import CheckpointManager

Row = dict[str, Any]
"""A trial: `trial`, `values`, `status` (done; stopped: by the scheduler or the budget; failed), `score` (value of the
metric or None), `step`, `seconds`, `error`, `folder`, `reports` (list of [step, score])."""
_MAY_CHANGE = ("trials", "max_concurrent", "keep", "budget", "run")
"""Keys that may change when a sweep is resumed, because they change no trial (`budget.steps` must not)."""


class SweepFolder:
    """The folder of one sweep.

    Attributes:
        path: absolute path of the folder.
        trials: folder of the trials' runs.
        rows: the trials that have ended.
    """

    def __init__(self, sweep: SweepConfig):
        self.sweep = sweep
        self.path = (Path(sweep.run.storage).expanduser() / sweep.run.name).absolute()
        self.trials = self.path / "trials"
        self.rows: list[Row] = []
        self._file: JSONLines | None = None

    def claim(self, resume: bool) -> None:
        """Prepares the folder for this sweep and writes `sweep.yaml`.

        Args:
            resume: continue the sweep in the folder and read the trials that have ended.

        Raises:
            ConfigError: the folder is not writable, contains an earlier sweep or other files, or contains no sweep or a
                different one to resume.
        """
        recorded = self.path / "sweep.yaml"
        if recorded.exists() and resume:
            self._check_same(yaml.safe_load(recorded.read_text(encoding="utf-8")))
            self.rows = list(read_jsonl(self.path / "results.jsonl"))
        elif recorded.exists() and not self.sweep.run.overwrite:
            raise ConfigError(
                f"{self.path} contains an earlier sweep: --resume continues it, another run.name starts a new one, "
                "run.overwrite=true replaces it"
            )
        elif recorded.exists():
            shutil.rmtree(self.path)
        elif resume and not self.path.exists():
            raise ConfigError(f"--resume: there is no sweep in {self.path}")
        elif self.path.exists() and any(self.path.iterdir()):
            raise ConfigError(f"{self.path} is not empty, and not a sweep: give another run.name")
        problem = why_not_writable(self.path)
        if problem:
            raise ConfigError(f"run.storage: {self.path} can't be written: {problem}")
        write_atomic(
            recorded,
            yaml.safe_dump(
                mask(self.sweep.model_dump(mode="json", exclude_none=True)), sort_keys=False, allow_unicode=True
            ),
        )

    def _check_same(self, then: Any) -> None:
        # Secrets are masked in the file, so they are masked for the comparison, too.
        now = mask(self.sweep.model_dump(mode="json", exclude_none=True))
        # The base of an older version lacks keys that have been added since. Its defaults are written out here.
        base = validate(then.get("base") or {}, where=f"{self.path}/sweep.yaml: base", components=False)
        earlier = self.sweep.model_copy(update={"base": base.model_dump(mode="json")})
        then = {**then, "base": mask(earlier.model_dump(mode="json", exclude_none=True))["base"]}
        for key in now.keys() | then.keys():
            if key not in _MAY_CHANGE and now.get(key) != then.get(key):
                raise ConfigError(
                    f"--resume: {key} is not what it was in {self.path}/sweep.yaml, so trials could not be compared: "
                    "undo the change, or give another run.name"
                )
        if then.get("budget", {}).get("steps") != now.get("budget", {}).get("steps"):
            raise ConfigError(
                "--resume: budget.steps has changed, so trials could not be compared: undo the change, "
                "or give another run.name"
            )

    def record(self, row: Row) -> None:
        """Records a trial that has ended."""
        if self._file is None:
            self._file = JSONLines(self.path / "results.jsonl", keep=lambda row: True)
        self.rows.append(row)
        self._file.write(row)
        if self.sweep.scheduler.name not in CHECKPOINTED:  # in a population, another trial may still need them
            self._drop_checkpoints()

    def _drop_checkpoints(self) -> None:
        """Deletes the checkpoints of all ended trials except the best one, unless `keep` is "all"."""
        if self.sweep.keep == "all":
            return
        best = best_of(self.rows, self.sweep.mode)
        for row in self.rows:
            if row is not best:
                shutil.rmtree(self.trials / row["trial"] / "checkpoints", ignore_errors=True)

    def close(self) -> None:
        """Closes the folder's files after the last trial."""
        self._drop_checkpoints()
        if self._file is not None:
            self._file.close()
            self._file = None

    def write_best(self) -> Path | None:
        """Writes `best.yaml` and returns its path, or None if no trial has a result."""
        best = best_of(self.rows, self.sweep.mode)
        if best is None:
            return None
        config = self.config_of(best)
        name = self.sweep.scheduler.name
        note = (
            f"# The best of {len(self.rows)} trials: trial {best['trial']}, {self.sweep.metric} {best['score']:.6g} "
            f"at step {best['step']}.\n"
            + (
                f"# Its values changed while it trained (trials/{best['trial']}/lineage.jsonl); these are the last.\n"
                if name == "pbt"
                else ""
            )
        )
        write_atomic(self.path / "best.yaml", note + to_yaml(mask(config.model_dump(mode="json"))))
        return self.path / "best.yaml"

    def config_of(self, row: Row) -> TrainerConfig:
        """Returns the config of a trial with a separate run name, next to the sweep's folder."""
        return run_config(self.sweep, row["values"], f"{self.sweep.run.name}-{row['trial']}", str(self.path.parent))


def best_of(rows: Iterable[Row], mode: str) -> Row | None:
    """Returns the best trial that reached its end, else the best one that was stopped, or None."""
    # The value of a stopped trial is from an earlier step, so it is not compared with those of complete trials.
    scored = [row for row in rows if row["score"] is not None and row["status"] in ("done", "stopped")]
    done = [row for row in scored if row["status"] == "done"]
    sign = 1 if mode == "min" else -1
    return min(done or scored, key=lambda row: (sign * row["score"], row["trial"]), default=None)


@dataclass
class SweepResult:
    """The result of a sweep.

    Attributes:
        folder: the sweep's folder.
        metric: name of the metric.
        trials: the ended trials, in the order of their numbers.
        best: the best trial, or None.
        best_config: config of the best trial, or None.
        best_yaml: path of `best.yaml`, or None.
        exit_reason: why the sweep ended early, or None. `resume=True` resumes it.
    """

    folder: str
    metric: str
    trials: list[Row] = field(repr=False)
    best: Row | None
    best_config: TrainerConfig | None = field(repr=False)
    best_yaml: str | None
    exit_reason: str | None = None

    @property
    def best_values(self) -> dict[str, Any]:
        return dict(self.best["values"]) if self.best else {}

    @property
    def best_checkpoint(self) -> str | None:
        """The newest checkpoint of the best trial, if its config saves any."""
        if self.best is None:
            return None
        newest = CheckpointManager(folder=Path(self.best["folder"]) / "checkpoints").latest()
        return str(newest) if newest else None

    @property
    def table(self) -> Any:
        """A pandas DataFrame with one row per trial: its values by key, the metric, status, step, seconds, error."""
        import pandas

        return pandas.DataFrame(
            [
                {
                    "trial": r["trial"],
                    **r["values"],
                    self.metric: r["score"],
                    **{k: r[k] for k in ("status", "step", "seconds", "error")},
                }
                for r in self.trials
            ]
        )

    def history(self, trial: str) -> list[dict[str, Any]]:
        """Returns the lines of a trial's `metrics.jsonl`."""
        return list(read_jsonl(Path(self.folder) / "trials" / trial / "metrics.jsonl"))

    def summary(self) -> str:
        """Returns one line with the number of trials and the best trial."""
        counts = {status: sum(r["status"] == status for r in self.trials) for status in ("done", "stopped", "failed")}
        counted = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        if self.best is None:
            return f"{self.folder}: {counted or 'no trial has ended'}"
        values = "  ".join(f"{key}={_short(value)}" for key, value in self.best["values"].items())
        return (
            f"{self.folder}: {counted}; best {self.metric} {self.best['score']:.4g} "
            f"(trial {self.best['trial']}): {values}"
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def result_of(folder: SweepFolder, exit_reason: str | None) -> SweepResult:
    """Builds the result of a sweep from its folder.

    Args:
        folder: the sweep's folder.
        exit_reason: why the sweep ended early, or None.
    """
    rows: Sequence[Row] = sorted(folder.rows, key=lambda row: row["trial"])
    best = best_of(rows, folder.sweep.mode)
    return SweepResult(
        str(folder.path),
        folder.sweep.metric,
        list(rows),
        best,
        folder.config_of(best) if best else None,
        str(folder.path / "best.yaml") if best else None,
        exit_reason,
    )
