"""Lists of the runs and sweeps in a storage path: `myllm-ray runs ls`.

A list of many runs reads little of each: its config, its summary, and the ends of its records. Sizes come from the file
system. Whether runs are active is observed for all of them at the same time.
"""

from __future__ import annotations

import fnmatch
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from myllm_ray.common.files import read_jsonl
from myllm_ray.common.types import is_measured
from myllm_ray.config.errors import ConfigError
from myllm_ray.engine.liveness.heartbeat import DRIVER, heartbeat_folder
from myllm_ray.engine.reporting.attempts import end_status
from myllm_ray.engine.reporting.run_page import JUDGED_BY
from myllm_ray.runs.folder import RunFolder, size_of, tail_rows, why_no_run

STATUSES = ("active", "finished", "stopped", "preempted", "failed", "dead", "ended", "unreadable")
"""active: its heartbeat changes. finished: all steps are done. stopped: ended early by a callback. preempted: saved and
ended on request. failed: with an error. dead: neither finished nor a heartbeat. ended: a run of an older version whose
number of steps is not known. unreadable: a file of the run is damaged."""
SORTS = ("age", "name", "trainer", "status", "step", "best", "size")
_HEARTBEAT_SECONDS = 2.0
_ACTIVITY_FILES = ("metrics.jsonl", "ledger.jsonl", "attempts.jsonl", "environment.json", "config.yaml", "sweep.yaml")
_HIGHER = ("reward", "accuracy", "accuracies", "margins")
"""Parts of the names of metrics whose highest value is the best; of other metrics, the lowest."""
_MOST_RESULTS = 4 << 20

Beats = dict[Path, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Summary:
    """One line of the list: a run, or a sweep (`kind`). Values that are not known are None."""

    name: str
    path: str
    kind: str = "run"
    trainer: str | None = None
    status: str = "unreadable"
    reason: str | None = None
    """Why the run ended early, or the phase of an active run."""
    step: int | None = None
    total_steps: int | None = None
    metric: str | None = None
    best: float | None = None
    best_step: int | None = None
    age_seconds: float | None = None
    """Seconds since the last record."""
    bytes: int = 0
    backend: str | None = None
    workers: str | None = None
    trials: list[Summary] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Returns the summary as JSON."""
        return asdict(self)


class Activity:
    """Observes the heartbeats of many runs. A run is active if one of its heartbeats changes.

    A change, not the age of a file: the clocks of other machines may differ. A second call compares with the first one
    and does not wait.
    """

    def __init__(self) -> None:
        self._before: Beats = {}
        self._since = -math.inf

    def active(self, folders: Iterable[Path]) -> dict[Path, dict[str, Any] | None]:
        """Returns, for each run that has heartbeats, one that has changed, or None."""
        known = {path: beats for path in folders if (beats := _beats(path))}
        before = self._before if time.monotonic() - self._since > _HEARTBEAT_SECONDS / 2 else {}
        found: dict[Path, dict[str, Any] | None] = {}
        first = {path: before.get(path, beats) for path, beats in known.items()}
        until = time.monotonic() + _HEARTBEAT_SECONDS
        while True:
            for path in [p for p in known if found.get(p) is None]:
                now = _beats(path)
                found[path] = next((b for name, b in now.items() if first[path].get(name) != b), None)
            if None not in found.values() or time.monotonic() > until:
                break
            time.sleep(0.1)
        self._before, self._since = known, time.monotonic()
        return found


def _beats(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the heartbeats of rank 0 and of the driver of a run. Those of up to 1,000 other ranks are not read."""
    found = {}
    for name in ("rank-00000.json", DRIVER):
        try:
            beat = json.loads((heartbeat_folder(path) / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(beat, dict):
            found[name] = beat
    return found


def list_runs(
    storage: Path, metric: str | None = None, activity: Activity | None = None, trials: bool = False
) -> list[Summary]:
    """Returns the runs and sweeps in a storage path, those with the newest records first.

    Args:
        storage: a folder that contains folders of runs.
        metric: the metric whose best value is shown; default: see `best_of`.
        activity: observes the heartbeats; give the same one to repeated calls.
        trials: whether to also list the trials of each sweep.

    Raises:
        ConfigError: the folder does not exist, or is itself a run.
    """
    if not storage.is_dir():
        raise ConfigError(f"{storage}: no such folder: give the folder of run.storage")
    if why_no_run(storage) is None:
        raise ConfigError(f"{storage} is the folder of a run: give its parent folder, or use `runs show {storage}`")
    try:
        folders = sorted(p for p in storage.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"{storage}: can't be read: {error.strerror or error}") from None
    sweeps = [p for p in folders if (p / "sweep.yaml").is_file()]
    runs = [p for p in folders if p not in set(sweeps) and why_no_run(p) is None]
    of_sweeps = {p: _trials(p) for p in sweeps}
    everything = [*runs, *(trial for found in of_sweeps.values() for trial in found)]
    beats = (activity or Activity()).active(everything)
    found = [summarize(p, beats, metric) for p in runs]
    found += [_sweep(p, of_sweeps[p], beats, metric, trials) for p in sweeps]
    return sorted(found, key=lambda s: s.age_seconds if s.age_seconds is not None else math.inf)


def summarize(path: Path, beats: Mapping[Path, dict[str, Any] | None], metric: str | None = None) -> Summary:
    """Returns the summary of one run. A run whose files can't be read has the status `unreadable`.

    Args:
        path: the run's folder.
        beats: the result of `Activity.active`.
        metric: see `list_runs`.
    """
    base: dict[str, Any] = {"name": path.name, "path": str(path), "age_seconds": _age(path), "bytes": size_of(path)}
    try:
        run = RunFolder(path)
        name, best, best_step = best_of(run, metric)
        status, reason = status_of(run, beats)
        workers = run.attempts[-1].get("workers") if run.attempts else run.get("scaling.workers", 0)
        return Summary(
            **base,
            trainer=str(run.get("trainer")),
            status=status,
            reason=reason,
            step=run.last_step,
            total_steps=run.total_steps,
            metric=name,
            best=best,
            best_step=best_step,
            backend=_backend(run),
            workers="–".join(map(str, workers)) if isinstance(workers, list) else str(workers or 1),
        )
    except ConfigError as error:
        return Summary(**base, reason=str(error))
    except (AttributeError, TypeError, ValueError) as error:  # values of other types than a run writes
        return Summary(**base, reason=f"a file of the run is damaged: {error}")


def status_of(run: RunFolder, beats: Mapping[Path, dict[str, Any] | None]) -> tuple[str, str | None]:
    """Returns the status of a run (see `STATUSES`), and the reason or the phase."""
    step, total = run.last_step, run.total_steps
    if run.path in beats:
        beat = beats[run.path]
        if beat is not None:
            return "active", str(beat.get("phase"))
        last = next(iter(_beats(run.path).values()), {})
        where = f" in phase {last['phase']} on {last.get('host')}" if "phase" in last else ""
        return "dead", f"the last heartbeat was{where}" if where else None
    done = total is not None and step >= total
    if not run.attempts:
        return ("finished" if done else "ended" if total is None else "dead"), None
    return end_status(str(run.attempts[-1].get("end", "")), done or total is None)


def best_of(run: RunFolder, metric: str | None = None) -> tuple[str | None, float | None, int | None]:
    """Returns a metric, its best value and the step of this value.

    The metric is `metric`, else `checkpoint.keep_best`, else the first of `JUDGED_BY`. Rewards and accuracies are best
    if high, other metrics if low. The values come from `summary.json` and, for later steps, from
    the end of `metrics.jsonl`.
    """
    found: dict[str, dict[str, list[float]]] = {}
    step = -1
    try:
        summary = json.loads((run.path / "summary.json").read_text(encoding="utf-8"))
        found, step = dict(summary["metrics"]), int(summary["step"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    rows = [row for row in tail_rows(run.path / "metrics.jsonl") if int(row.get("step", 0)) > step]
    names = {k for k in (*found, *(k for row in rows for k in row)) if not is_measured(k)} - {"step", "epoch"}
    keep_best = run.get("checkpoint.keep_best")
    name = next((n for n in ([metric] if metric else [keep_best, *JUDGED_BY]) if n in names), None)
    if name is None:
        return metric, None, None
    high = is_higher_better(name) and name != keep_best  # keep_best keeps the lowest value
    values = [(float(row[name]), int(row["step"])) for row in rows if isinstance(row.get(name), (int, float))]
    if name in found:
        value, at = found[name]["max" if high else "min"]
        values.append((float(value), int(at)))
    values = [pair for pair in values if math.isfinite(pair[0])]
    if not values:
        return name, None, None
    best = (max if high else min)(values, key=lambda pair: pair[0])
    return name, best[0], best[1]


def is_higher_better(metric: str) -> bool:
    """Returns whether a metric is better if it is high, by its name."""
    return any(part in metric for part in _HIGHER) and "loss" not in metric


def _backend(run: RunFolder) -> str:
    stage = run.get("accelerator.stage")
    return f"{run.get('accelerator.name', 'single')}{f'-{stage}' if stage is not None else ''}"


def _age(path: Path) -> float | None:
    newest = 0.0
    for name in _ACTIVITY_FILES:
        try:
            newest = max(newest, (path / name).stat().st_mtime)
        except OSError:
            continue
    return max(0.0, time.time() - newest) if newest else None


def _trials(sweep: Path) -> list[Path]:
    folder = sweep / "trials"
    return sorted(p for p in folder.iterdir() if why_no_run(p) is None) if folder.is_dir() else []


def _sweep(
    path: Path, trials: list[Path], beats: Mapping[Path, dict[str, Any] | None], metric: str | None, nested: bool
) -> Summary:
    """Returns the summary of a sweep: its best score, and how many trials have ended."""
    results = path / "results.jsonl"
    try:
        small = results.stat().st_size <= _MOST_RESULTS
    except OSError:
        small = True
    rows = list(read_jsonl(results)) if small else tail_rows(results, _MOST_RESULTS)
    target, mode, planned, trainer = _of_sweep(path)
    scored = [r for r in rows if isinstance(r.get("score"), (int, float)) and math.isfinite(r["score"])]
    best = (max if mode == "max" else min)(scored, key=lambda r: r["score"]) if scored else {}
    counts = {s: sum(r.get("status") == s for r in rows) for s in ("done", "stopped", "failed")}
    status = "active" if any(beats.get(p) is not None for p in trials) else "finished"
    if status == "finished" and planned is not None and len(rows) < planned:
        status = "stopped"
    return Summary(
        name=path.name,
        path=str(path),
        kind="sweep",
        trainer=trainer,
        status=status,
        reason=", ".join(f"{n} {s}" for s, n in counts.items() if n) or None,
        step=len(rows),
        total_steps=planned,
        metric=target,
        best=best.get("score"),
        best_step=best.get("step"),
        age_seconds=min((a for p in (path, *trials) if (a := _age(p)) is not None), default=None),
        bytes=size_of(path),
        trials=[summarize(p, beats, metric) for p in trials] if nested else [],
    )


def _of_sweep(path: Path) -> tuple[str | None, str, int | None, str | None]:
    """Returns metric, mode, number of trials and trainer of a sweep."""
    import yaml

    from myllm_ray.runs.folder import _LOADER

    try:
        raw = yaml.load((path / "sweep.yaml").read_text(encoding="utf-8"), _LOADER)
        trials = raw.get("trials")
        trainer = (raw.get("base") or {}).get("trainer")
        return raw.get("metric"), raw.get("mode", "min"), trials if isinstance(trials, int) else None, trainer
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        return None, "min", None, None


def select(
    found: Iterable[Summary],
    sort: str = "age",
    reverse: bool = False,
    statuses: Iterable[str] = (),
    trainer: str | None = None,
    name: str | None = None,
) -> list[Summary]:
    """Returns the summaries that match the filters, in the given order.

    Args:
        found: the summaries.
        sort: one of `SORTS`.
        reverse: whether to reverse the order.
        statuses: only these statuses; default: all.
        trainer: only this trainer.
        name: only names that match this pattern of a shell (`lr-*`).

    Raises:
        ConfigError: `sort` or a status is unknown.
    """
    statuses = list(statuses)
    for key, value, known in [("--sort", sort, SORTS), *(("--status", s, STATUSES) for s in statuses)]:
        if value not in known:
            raise ConfigError(f"{key}: unknown value {value!r}; choose from {', '.join(known)}")
    matching = [
        s
        for s in found
        if (not statuses or s.status in statuses)
        and (trainer is None or s.trainer == trainer)
        and (name is None or fnmatch.fnmatch(s.name, name))
    ]
    keys: dict[str, Callable[[Summary], Any]] = {
        "age": lambda s: s.age_seconds if s.age_seconds is not None else math.inf,
        "name": lambda s: s.name,
        "trainer": lambda s: s.trainer or "",
        "status": lambda s: STATUSES.index(s.status),
        "step": lambda s: -(s.step or 0),
        "best": lambda s: _rank(s),
        "size": lambda s: -s.bytes,
    }
    return sorted(matching, key=keys[sort], reverse=reverse)


def _rank(summary: Summary) -> tuple[str, float]:
    """Returns a key that puts the best value of each metric first. Runs without a value are last."""
    if summary.best is None or summary.metric is None:
        return "￿", 0.0
    return summary.metric, -summary.best if is_higher_better(summary.metric) else summary.best


def walk(found: Iterable[Summary]) -> Iterator[tuple[Summary, int]]:
    """Yields the summaries with their depth: 0, or 1 for the trial of a sweep."""
    for summary in found:
        yield summary, 0
        for trial in summary.trials:
            yield trial, 1
