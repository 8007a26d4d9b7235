"""The results of `myllm-ray evaluate` in the folder of a run: one JSON file for each checkpoint and set of data."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from myllm_ray.engine.reporting.curves import Curves, Series
from myllm_ray.engine.reporting.page import Cell, Table, number

_MOST = 500
"""Largest number of rows of the table."""


@dataclass(frozen=True)
class EvaluationResult:
    """One result.

    Attributes:
        step: the optimizer steps of the checkpoint.
        identity: the checksum of the checkpoint.
        data: name of the file of the data, or "" for tasks of lm-evaluation-harness, whose metrics name the task.
        sha256: SHA-256 of the data, or "".
        time: when it was computed, in seconds since the epoch.
        metrics: finite numbers by name, sorted.
    """

    step: int
    identity: str
    data: str
    sha256: str
    time: float
    metrics: dict[str, float]


def read_results(run: Path) -> list[EvaluationResult]:
    """Returns the results in `<run>/evaluations`, ordered by step and then by time. Other files are ignored."""
    found = [result for path in sorted((run / "evaluations").glob("*.json")) if (result := _read(path)) is not None]
    return sorted(found, key=lambda r: (r.step, r.time, r.data))


def _read(path: Path) -> EvaluationResult | None:
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        settings = row.get("settings") or {}
        return EvaluationResult(
            step=int(row["step"]),
            identity=str(row["identity"]),
            data=str(settings.get("path") or "").rstrip("/").rsplit("/", 1)[-1],
            sha256=str((settings.get("data") or {}).get("sha256") or ""),
            time=float(row.get("time") or 0.0),
            metrics={n: float(v) for n, v in sorted(row["metrics"].items()) if _is_finite(v)},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def add_to(curves: Curves, results: Sequence[EvaluationResult]) -> None:
    """Adds the results to the curves of a run, as metrics `evaluate/<data>/<metric>` at the steps of the checkpoints.

    Of several results with the same name at the same step, the newest is kept. Data of the same name with different
    content have the beginning of their SHA-256 in the name.

    Args:
        curves: the curves of the run, changed in place.
        results: see `read_results`.
    """
    values: dict[str, dict[int, float]] = {}
    for result in results:
        contents = {other.sha256 for other in results if other.data == result.data}
        data = f"{result.data}@{result.sha256[:6]}" if len(contents) > 1 else result.data
        for name, value in result.metrics.items():
            values.setdefault("/".join(filter(None, ("evaluate", data, name))), {})[result.step] = value
    _insert_rows(curves, sorted({step for steps in values.values() for step in steps}))
    rows = {step: row for row, step in enumerate(curves.steps)}
    for name, by_step in values.items():
        series = curves.series[name] = Series()
        for step, value in sorted(by_step.items()):
            series.rows.append(rows[step])
            series.values.append(value)


def _insert_rows(curves: Curves, steps: Sequence[int]) -> None:
    """Adds rows for the steps that the run has not logged."""
    known = np.asarray(curves.steps, dtype=np.int64)
    new = np.setdiff1d(np.asarray(steps, dtype=np.int64), known)
    if not len(new):
        return
    places = np.searchsorted(known, new)
    times, tokens = np.asarray(curves.times), np.asarray(curves.tokens)
    before = np.concatenate([[0.0], tokens])[places]  # the tokens trained up to the row before
    moved = np.arange(len(known)) + np.searchsorted(new, known)
    for series in curves.series.values():
        series.rows = array("q", moved[np.asarray(series.rows, dtype=np.int64)].tolist())
    curves.steps = array("q", np.insert(known, places, new).tolist())
    curves.times = array("d", np.insert(times, places, math.nan).tolist())
    curves.tokens = array("d", np.insert(tokens, places, before).tolist())


def table(results: Sequence[EvaluationResult]) -> Table | None:
    """Returns one row for each result and metric, or None without results."""
    rows = [
        [
            Cell(f"{r.step:,}", "strong"),
            Cell(r.data or "–"),
            Cell(r.sha256[:12] or "–"),
            Cell(name),
            Cell(number(value)),
        ]
        for r in results
        for name, value in r.metrics.items()
    ]
    columns = [("step", True), ("data", False), ("SHA-256", False), ("metric", False), ("value", True)]
    title = "Results of myllm-ray evaluate" + (f", the last {_MOST}" if len(rows) > _MOST else "")
    shown = rows[-_MOST:]
    return Table(title, columns, shown, filter="filter" if len(shown) > 12 else "") if rows else None
