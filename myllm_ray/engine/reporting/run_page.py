"""The page of one run, made from the files in its folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from myllm_ray.common.files import write_atomic
from myllm_ray.engine.reporting import run_sections as parts
from myllm_ray.engine.reporting.attempts import STYLES, Attempt, marks_of, read_attempts, restarts_of, status_of
from myllm_ray.engine.reporting.chart_groups import charts_of
from myllm_ray.engine.reporting.curves import Curves, encode, read_curves
from myllm_ray.engine.reporting.evaluations import add_to, read_results
from myllm_ray.engine.reporting.page import Facts, Page, Section, Text, duration, large, number, render

REDUCED = (
    "The run has logged more values than the page holds. Each curve is drawn from the lowest and the highest logged "
    "value of each of {intervals:,} intervals of steps, at their own steps: no drawn value is an average, and no peak "
    "is left out. Smoothing uses the mean of each interval."
)
JUDGED_BY = {
    "validation_loss": min,
    "validation_reward": max,
    "validation_rewards/accuracies": max,
    "reward": max,
    "rewards/accuracies": max,
    "loss": min,
}
"""The metrics that a run is judged by, the first of them that it has, each with the function of its best value."""


def write_run_page(folder: Path, path: Path | None = None, end: str | None = None) -> Path:
    """Writes the page of a run, by default to `report.html` in its folder, and returns its path.

    Args:
        folder: the run's folder.
        path: the file to write.
        end: how the last attempt ended, if it is not recorded yet; see `Attempt.how`.
    """
    path = path or folder / "report.html"
    write_atomic(path, render(run_page(folder, end)), durable=False)
    return path


def run_page(folder: Path, end: str | None = None) -> Page:
    """Returns the page of a run; see `write_run_page`. A file that is missing leaves out its part of the page."""
    config, data = read_config(folder), read_json(folder / "data_summary.json")
    curves, results = read_curves(folder / "metrics.jsonl"), read_results(folder)
    add_to(curves, results)
    attempts = read_attempts(folder, end)
    events = marks_of(folder, attempts)
    encoded, intervals = encode([curves])
    charts: list[Any] = list(charts_of(sorted(curves.series), _source_names(config, data)))
    if not charts:
        charts = [Text("The run has logged no metrics.", "note")]
    if intervals is not None:
        charts.append(Text(REDUCED.format(intervals=intervals), "note"))
    sections = [
        Section("Curves", charts),
        _part("Metrics", lambda: parts.metrics(curves)),
        _part("Timeline", lambda: parts.timeline(folder, attempts, curves)),
        _part("Evaluation", lambda: parts.evaluation(curves, results)),
        _part("Samples", lambda: parts.samples(folder)),
        _part("Data", lambda: parts.data(data)),
        _part("Config", lambda: parts.config(config)),
        _part("Environment", lambda: parts.environment(read_json(folder / "environment.json"))),
        _part("Checkpoints", lambda: parts.checkpoints(folder)),
    ]
    last = curves.steps[-1] if curves.steps else 0
    status = status_of(folder, attempts, last)
    end = attempts[-1].how if attempts else end
    subtitle = end if end and end != "done" else ""
    return Page(
        title=str((config.get("run") or {}).get("name") or folder.name),
        kind="Training run",
        facts=_headline(config, curves, attempts, events),
        sections=[section for section in sections if section is not None],
        status=status,
        status_style=STYLES.get(status, ""),
        curves=encoded,
        events=[events],
        names=[folder.name],
        subtitle=subtitle[:400],
        footer=f"Written {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} from {folder.name}.",
    )


def _part(title: str, build: Callable[[], Section | None]) -> Section | None:
    """Returns a section, or a note if its file does not contain what a run writes."""
    try:
        return build()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return Section(title, [Text(f"A file of the run is damaged: {type(error).__name__}: {error}", "warning")])


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the content of a run's `config.yaml`, or an empty dict if it is missing or not readable."""
    try:
        found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or an empty dict if it is missing or not readable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def best_of(curves: Curves, keep_best: str | None = None) -> tuple[str, float, int] | None:
    """Returns the metric that a run is judged by, its best value, and the step of it; None if it has none.

    Args:
        curves: the metrics of the run.
        keep_best: the metric of `checkpoint.keep_best`, whose lowest value is the best.
    """
    for name, best in ((keep_best, min), *JUDGED_BY.items()):
        if name in curves.series:
            found = curves.summary(name)
            if "last" in found:
                value, step = found["min" if best is min else "max"]
                return name, value, step
    return None


def _source_names(config: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    if data.get("sources"):
        return [str(source["name"]) for source in data["sources"]]
    train = config.get("data", {}).get("train")
    return [str(s.get("name")) for s in train if isinstance(s, dict)] if isinstance(train, list) else []


def _headline(
    config: Mapping[str, Any], curves: Curves, attempts: Sequence[Attempt], events: Sequence[tuple[int, str]]
) -> Facts:
    run, model = config.get("run") or {}, config.get("model") or {}
    # The last row of a run with a known end may be older than its last step (logging.every_steps).
    steps = max([*(a.last for a in attempts if a.last is not None), *curves.steps[-1:]], default=0)
    total = next((a.total_steps for a in reversed(attempts) if a.total_steps), None) or run.get("max_steps")
    items = [
        ("trainer", str(config.get("trainer", "–")), ""),
        (
            "model",
            str(model.get("name") or (model.get("config") or {}).get("model_type") or model.get("factory") or "–"),
            "",
        ),
        ("steps", f"{steps:,}", f"of {total:,}" if total else ""),
    ]
    if (best := best_of(curves, config.get("checkpoint", {}).get("keep_best"))) is not None:
        items.append((f"best {best[0].replace('_', ' ')}", number(best[1]), f"step {best[2]:,}"))
    if "loss" in curves.series and "last" in (loss := curves.summary("loss")):
        items.append(("last loss", number(loss["last"]), f"first {number(loss['first'])}"))
    seconds = wall_clock(attempts, curves)
    if seconds:
        items.append(("duration", duration(seconds), f"{len(attempts)} starts" if len(attempts) > 1 else ""))
    if curves.tokens and curves.tokens[-1]:
        every = config.get("logging", {}).get("every_steps", 1)
        items.append(("trained tokens", large(curves.tokens[-1]), "" if every == 1 else "estimated from logged steps"))
    restarts = restarts_of(attempts)
    if restarts or events:
        others = len(events) - restarts
        items.append(("restarts", str(restarts), f"{others} intervention{'s' * (others > 1)}" if others > 0 else ""))
    return Facts(items)


def wall_clock(attempts: Sequence[Attempt], curves: Curves) -> float:
    """Returns the seconds from the first start of a run to its last sign of life."""
    starts = [a.started for a in attempts if a.started is not None]
    ends = [a.ended for a in attempts if a.ended is not None]
    known = [t for t in curves.times if math.isfinite(t)]
    first = min([*starts, *known[:1]], default=None)
    last = max([*ends, *known[-1:]], default=None)
    return 0.0 if first is None or last is None else max(0.0, last - first)
