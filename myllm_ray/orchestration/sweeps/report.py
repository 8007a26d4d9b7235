"""Writes `report.html` of a sweep: parallel coordinates, the metric over each key, learning curves, and a table."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

import yaml

from myllm_ray.common.files import write_atomic
from myllm_ray.common.secrets import mask
from myllm_ray.config.sweep import Dimension, SweepConfig
from myllm_ray.engine.reporting.charts import Line, line_chart, page, parallel_chart, shade
from myllm_ray.orchestration.sweeps.console import show
from myllm_ray.orchestration.sweeps.results import Row, SweepResult


def write_report(result: SweepResult, sweep: SweepConfig) -> Path:
    """Writes the report into the sweep's folder and returns its path. Failed trials are in the table only."""
    path = Path(result.folder) / "report.html"
    write_atomic(path, page(sweep.run.name, _body(result, sweep)))
    return path


def _body(result: SweepResult, sweep: SweepConfig) -> str:
    scored = sorted(
        (row for row in result.trials if row["score"] is not None),
        key=lambda row: row["score"],
        reverse=sweep.mode == "max",
    )
    colours = {row["trial"]: shade(rank / max(1, len(scored) - 1)) for rank, row in enumerate(scored)}
    parts = [f"<p>{html.escape(result.summary())}</p>"]
    if result.exit_reason:
        parts.append(f"<p>It ended early: {html.escape(result.exit_reason)}.</p>")
    if scored:
        parts.append("<p>Dark is best. A stopped trial is shown with its value when it was stopped.</p>")
        parts.append(_parallel(scored, sweep, colours))
        parts.append(
            f"<div class=charts>{''.join(_against(key, scored, sweep, colours) for key in sweep.space)}"
            f"{_curves(result, sweep, colours)}</div>"
        )
    parts.append(_table(result, sweep, colours))
    shown = {k: v for k, v in sweep.model_dump(mode="json", exclude_none=True).items() if k != "base"}
    parts.append(f"<h2>Sweep</h2><pre>{html.escape(yaml.safe_dump(mask(shown), sort_keys=False))}</pre>")
    return "".join(parts)


def _is_log(dimension: Dimension) -> bool:
    return dimension.kind == "loguniform"


def _options(dimension: Dimension) -> list[Any] | None:
    """Returns the list of values of a key with a discrete list (choice, grid), else None."""
    return dimension.values if dimension.kind in ("choice", "grid") else None


def _number(dimension: Dimension, value: Any) -> float:
    """Returns the position of a value on its key's axis: its index for a list of values, else the value itself."""
    options = _options(dimension)
    return float(options.index(value)) if options is not None and value in options else float(value)


def _parallel(scored: list[Row], sweep: SweepConfig, colours: dict[str, str]) -> str:
    scores = [row["score"] for row in scored]
    low, high = min(scores), max(scores)
    axes: list[tuple[str, list[str]]] = []
    for key, dimension in sweep.space.items():
        axes.append((key, [show(v) for v in dimension.values[: None if _options(dimension) else 2]]))
    axes.append((sweep.metric, [show(low), show(high)]))

    # Positions are in [0, 1]. A choice can contain strings, so its axis shows the index.
    def share(dimension: Dimension, value: Any) -> float:
        options = _options(dimension)
        first, last = (0.0, len(options) - 1.0) if options else tuple(float(v) for v in dimension.values[:2])
        at = _number(dimension, value)
        if _is_log(dimension):
            at, first, last = math.log(at), math.log(first), math.log(last)
        return (at - first) / ((last - first) or 1.0)

    lines = [
        (
            [
                *(share(d, row["values"][key]) for key, d in sweep.space.items()),
                (row["score"] - low) / ((high - low) or 1.0),
            ],
            colours[row["trial"]],
            _tip(row, sweep),
        )
        for row in reversed(scored)  # the best trial is drawn last, on top of the others
    ]
    return parallel_chart("All trials", axes, lines)


def _against(key: str, scored: list[Row], sweep: SweepConfig, colours: dict[str, str]) -> str:
    dimension = sweep.space[key]
    options = _options(dimension)
    dots = [
        Line(
            "",
            [(_number(dimension, row["values"][key]), row["score"])],
            colours[row["trial"]],
            _tip(row, sweep),
            dots=True,
        )
        for row in reversed(scored)
    ]
    name = key if options is None else f"{key}, index into {', '.join(show(v) for v in options)}"
    return line_chart(f"{sweep.metric} against {key}", dots, name, log_x=_is_log(dimension), legend=False)


def _curves(result: SweepResult, sweep: SweepConfig, colours: dict[str, str]) -> str:
    lines = []
    for row in reversed(result.trials):
        points = [
            (line["step"], line[sweep.metric])
            for line in result.history(row["trial"])
            if math.isfinite(line.get(sweep.metric, math.nan))
        ]
        if points:
            lines.append(Line("", points, colours.get(row["trial"], "#d1d9e0"), _tip(row, sweep)))
    return line_chart(f"{sweep.metric} of all trials", lines, "step", legend=False) if lines else ""


def _tip(row: Row, sweep: SweepConfig) -> str:
    values = ", ".join(f"{key}={show(value)}" for key, value in row["values"].items())
    return f"trial {row['trial']}: {values}; {sweep.metric} {show(row['score'])}, {row['status']} at step {row['step']}"


def _table(result: SweepResult, sweep: SweepConfig, colours: dict[str, str]) -> str:
    head = "".join(
        f"<th>{html.escape(name)}</th>"
        for name in ("trial", *sweep.space, sweep.metric, "step", "seconds", "status", "error")
    )
    rows = []
    for row in result.trials:
        cells = [
            row["trial"],
            *(show(row["values"].get(key)) for key in sweep.space),
            show(row["score"]),
            str(row["step"]),
            f"{row['seconds']:.1f}",
            row["status"],
            row["error"] or "",
        ]
        mark = f' style="border-left:6px solid {colours.get(row["trial"], "#fff")}"'
        weight = " style='font-weight:bold'" if result.best is row else ""
        rows.append(f"<tr{weight}><td{mark}>{'</td><td>'.join(html.escape(c) for c in cells)}</td></tr>")
    return f"<h2>Trials</h2><table><tr>{head}</tr>{''.join(rows)}</table>"
