"""`comparison.html`: the curves of several runs over each other, and what differs in their configs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from myllm_ray.common.files import why_not_writable, write_atomic
from myllm_ray.config.errors import ConfigError
from myllm_ray.engine.reporting.attempts import STYLES, marks_of, read_attempts, restarts_of, status_of
from myllm_ray.engine.reporting.chart_groups import ORDER, group_of
from myllm_ray.engine.reporting.config_values import differences
from myllm_ray.engine.reporting.curves import Curves, encode, read_curves
from myllm_ray.engine.reporting.page import (
    Cell,
    Chart,
    Charts,
    Facts,
    Page,
    Section,
    Table,
    Text,
    Trace,
    duration,
    large,
    number,
    render,
)
from myllm_ray.engine.reporting.run_page import REDUCED, best_of, read_config, read_json, wall_clock, write_run_page


def check_run(folder: Path) -> None:
    """Raises ConfigError if a folder is not the folder of a run."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the folder of a run: <run.storage>/<run.name>")
    if not any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        raise ConfigError(f"{folder} is not the folder of a run: it has neither config.yaml nor metrics.jsonl")


def write_reports(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the page of one run, or the comparison of several, and returns its path.

    Args:
        folders: folders of runs.
        output: the file to write; default: `report.html` in the folder of the only run, else `comparison.html`.

    Raises:
        ConfigError: a folder is not that of a run, or the file can't be written.
    """
    for folder in folders:
        check_run(folder)
    path = output or (folders[0] / "report.html" if len(folders) == 1 else Path("comparison.html"))
    if path.is_dir():
        raise ConfigError(f"--output: {path} is a folder; give the name of a file")
    problem = why_not_writable(path.absolute().parent)
    if problem:
        raise ConfigError(f"{path} can't be written: {problem}")
    if len(folders) == 1:
        return write_run_page(folders[0], path)
    write_atomic(path, render(comparison(folders)), durable=False)
    return path


def comparison(folders: Sequence[Path]) -> Page:
    """Returns the page that compares several runs."""
    names = _names(folders)
    curves = [read_curves(folder / "metrics.jsonl") for folder in folders]
    attempts = [read_attempts(folder) for folder in folders]
    encoded, intervals = encode(curves)
    blocks: list[Any] = _charts(names, curves)
    if not blocks:
        blocks = [Text("The runs have logged no metrics.", "note")]
    if intervals is not None:
        blocks.append(Text(REDUCED.format(intervals=intervals).replace("The run has", "The runs have"), "note"))
    configs = [read_config(folder) for folder in folders]
    rows = []
    for place, (folder, name) in enumerate(zip(folders, names, strict=True)):
        run = curves[place]
        last = run.steps[-1] if run.steps else 0
        best = best_of(run, (configs[place].get("checkpoint") or {}).get("keep_best"))
        loss = run.summary("loss").get("last") if "loss" in run.series else None
        cells = [
            f"{last:,}",
            number(loss),
            "–" if best is None else f"{number(best[1])} ({best[0]})",
            "–" if best is None else f"{best[2]:,}",
            duration(wall_clock(attempts[place], run)),
            large(run.tokens[-1]) if run.tokens else "–",
            f"{restarts_of(attempts[place])}",
        ]
        status = status_of(folder, attempts[place], last)
        rows.append([Cell(name, "strong", place), *map(Cell, cells), Cell(status, STYLES.get(status, ""))])
    columns = [("run", False), ("steps", True), ("last loss", True), ("best", True), ("at step", True)]
    columns += [("duration", True), ("tokens", True), ("restarts", True), ("status", False)]
    sections = [
        Section("Runs", [Table("Runs", columns, rows)]),
        Section("Curves", blocks),
        _differences("Config", names, configs, "The configs are equal."),
        _differences(
            "Environment",
            names,
            [read_json(folder / "environment.json") for folder in folders],
            "The environments are equal.",
        ),
    ]
    return Page(
        title="Comparison of " + (" and ".join(names) if len(names) == 2 else f"{len(names)} runs"),
        kind="Comparison",
        facts=Facts([]),
        sections=sections,
        curves=encoded,
        events=[marks_of(folder, found) for folder, found in zip(folders, attempts, strict=True)],
        names=names,
        footer=f"Written {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}.",
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of the paths that differ from each other."""
    whole = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{folder.name} ({place})" for place, folder in enumerate(folders, 1)]  # the same folder, given twice


def _charts(names: Sequence[str], curves: Sequence[Curves]) -> list[Any]:
    metrics = dict.fromkeys(name for run in curves for name in sorted(run.series))
    groups: dict[str, list[Chart]] = {}
    for metric in sorted(metrics, key=lambda name: (name not in ("loss", "validation_loss"), name)):
        traces = [
            Trace(metric, name, place, place)
            for place, (name, run) in enumerate(zip(names, curves, strict=True))
            if metric in run.series
        ]
        groups.setdefault(group_of(metric), []).append(Chart(metric, traces))
    return [Charts(group, groups[group]) for group in ORDER if group in groups]


def _differences(title: str, names: Sequence[str], found: Sequence[dict[str, Any]], equal: str) -> Section:
    rows = [
        [Cell(key, "key"), *(Cell(value[:1000], "mark" if value != values[0] else "") for value in values)]
        for key, values in differences(found)
    ]
    if not rows:
        return Section(title, [Text(equal, "note")])
    columns = [("key", False), *((name, False) for name in names)]
    note = "Only what differs. Values that are not those of the first run are marked."
    return Section(title, [Table(title, columns, rows, filter="filter" if len(rows) > 12 else "")], note)
