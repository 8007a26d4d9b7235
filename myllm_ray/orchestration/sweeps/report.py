"""Writes `report.html` of a sweep: parallel coordinates, the metric over each key, learning curves, and a table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from myllm_ray.common.files import read_jsonl, write_atomic
from myllm_ray.common.secrets import mask
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.sweep import Dimension, SweepConfig
from myllm_ray.engine.reporting.curves import encode, read_curves
from myllm_ray.engine.reporting.page import (
    Cell,
    Chart,
    Charts,
    Code,
    Facts,
    Page,
    Section,
    Table,
    Text,
    Trace,
    duration,
    number,
    render,
)
from myllm_ray.engine.reporting.run_page import REDUCED
from myllm_ray.orchestration.sweeps.console import show
from myllm_ray.orchestration.sweeps.results import Row, SweepResult, best_of

_NO_SCORE = "#8b939c"
_STOPS = ((36, 104, 212), (20, 142, 140), (120, 150, 50), (214, 140, 40))
"""Colours from the best trial to the worst; each is readable on white and on black."""


def write_report(result: SweepResult, sweep: SweepConfig) -> Path:
    """Writes the report into the sweep's folder and returns its path. Failed trials are in the table only."""
    path = Path(result.folder) / "report.html"
    write_atomic(path, render(_page(result, sweep)))
    return path


def rewrite_report(folder: Path) -> Path:
    """Writes the report of a sweep from its folder, also of one that is active, and returns its path.

    Raises:
        ConfigError: `sweep.yaml` in the folder is not valid.
    """
    try:
        sweep = SweepConfig.model_validate(yaml.safe_load((folder / "sweep.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{folder}/sweep.yaml can't be read: {str(error).splitlines()[0]}") from None
    rows = sorted(read_jsonl(folder / "results.jsonl"), key=lambda row: row["trial"])
    return write_report(SweepResult(str(folder), sweep.metric, rows, best_of(rows, sweep.mode), None, None), sweep)


def _page(result: SweepResult, sweep: SweepConfig) -> Page:
    scored = sorted(
        (row for row in result.trials if row["score"] is not None),
        key=lambda row: row["score"],
        reverse=sweep.mode == "max",
    )
    colours = {row["trial"]: shade(rank / max(1, len(scored) - 1)) for rank, row in enumerate(scored)}
    # The last line is drawn on top, so the best trial comes last.
    shown = [*reversed(scored), *(row for row in result.trials if row["score"] is None)]
    runs = [
        read_curves(Path(result.folder) / "trials" / row["trial"] / "metrics.jsonl", [sweep.metric]) for row in shown
    ]
    encoded, intervals = encode(runs)
    traces = [
        Trace(sweep.metric, f"trial {row['trial']}", place, colours.get(row["trial"], _NO_SCORE))
        for place, (row, run) in enumerate(zip(shown, runs, strict=True))
        if sweep.metric in run.series
    ]
    sections = []
    if scored:
        keys = Charts("", [Chart("All trials", figure=_parallel(scored, sweep, colours), wide=True)])
        single = Charts("", [_against(key, scored, sweep, colours) for key in sweep.space])
        note = "Blue is best, orange is worst. A stopped trial is shown with its value when it was stopped."
        sections.append(Section("Overview", [keys, single], note))
    sections.append(Section("Trials", [_table(result, sweep, colours)]))
    if traces:
        blocks: list[Any] = [Charts("", [Chart(f"{sweep.metric} of all trials", traces, wide=True)])]
        if intervals is not None:
            blocks.append(Text(REDUCED.format(intervals=intervals).replace("The run has", "The trials have"), "note"))
        sections.append(Section("Curves", blocks))
    given = {k: v for k, v in sweep.model_dump(mode="json", exclude_none=True).items() if k != "base"}
    sections.append(Section("Sweep", [Code(yaml.safe_dump(mask(given), sort_keys=False, allow_unicode=True))]))
    return Page(
        title=sweep.run.name,
        kind="Sweep",
        facts=_headline(result, sweep),
        sections=sections,
        status="ended early" if result.exit_reason else "",
        status_style="wait",
        subtitle=f"It ended early: {result.exit_reason}." if result.exit_reason else "",
        curves=encoded,
        events=[[] for _ in runs],
        names=[f"trial {row['trial']}" for row in shown],
    )


def _headline(result: SweepResult, sweep: SweepConfig) -> Facts:
    counts = {status: sum(r["status"] == status for r in result.trials) for status in ("done", "stopped", "failed")}
    items = [
        ("trials", f"{len(result.trials):,}", ", ".join(f"{n} {status}" for status, n in counts.items() if n)),
        ("search", str(sweep.search), f"scheduler {sweep.scheduler.name}"),
    ]
    if result.best is not None:
        items.append((f"best {sweep.metric}", number(result.best["score"]), f"trial {result.best['trial']}"))
        items.extend((key, show(value), "of the best trial") for key, value in list(result.best["values"].items())[:4])
    items.append(("time of all trials", duration(sum(row["seconds"] for row in result.trials)), ""))
    return Facts(items)


def shade(share: float) -> str:
    """Returns the colour of a rank between the best trial (0) and the worst (1), as a hexadecimal RGB value."""
    at = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    low = min(int(at), len(_STOPS) - 2)
    mixed = (round(a + (b - a) * (at - low)) for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _is_log(dimension: Dimension) -> bool:
    return dimension.kind == "loguniform"


def _options(dimension: Dimension) -> list[Any] | None:
    """Returns the list of values of a key with a discrete list (choice, grid), else None."""
    return dimension.values if dimension.kind in ("choice", "grid") else None


def _number(dimension: Dimension, value: Any) -> float:
    """Returns the position of a value on its key's axis: its index for a list of values, else the value itself."""
    options = _options(dimension)
    return float(options.index(value)) if options is not None and value in options else float(value)


def _share(dimension: Dimension, value: Any) -> float:
    """Returns the position of a value on its axis, in [0, 1]. A choice can contain strings, so its index counts."""
    options = _options(dimension)
    first, last = (0.0, len(options) - 1.0) if options else tuple(float(v) for v in dimension.values[:2])
    at = _number(dimension, value)
    if _is_log(dimension):
        at, first, last = math.log(at), math.log(first), math.log(last)
    return (at - first) / ((last - first) or 1.0)


def _parallel(scored: list[Row], sweep: SweepConfig, colours: dict[str, str]) -> dict[str, Any]:
    """Returns a chart with parallel coordinates (Inselberg, 1985): an axis for each key, and one for the metric."""
    scores = [row["score"] for row in scored]
    low, high = min(scores), max(scores)
    axes: list[tuple[str, list[str]]] = []
    for key, dimension in sweep.space.items():
        axes.append((key, [show(v) for v in dimension.values[: None if _options(dimension) else 2]]))
    axes.append((sweep.metric, [show(low), show(high)] if high > low else [show(low)]))
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": list(range(len(axes))),
            "y": [
                *(_share(d, row["values"][key]) for key, d in sweep.space.items()),
                (row["score"] - low) / ((high - low) or 1.0),
            ],
            "line": {"color": colours[row["trial"]], "width": 1.6},
            "opacity": 0.85,
            "hovertemplate": f"{_tip(row, sweep)}<extra></extra>",
        }
        for row in reversed(scored)
    ]
    labels = [
        {
            "x": place,
            "y": at / max(1, len(values) - 1),
            "text": _text(value),
            "showarrow": False,
            "xanchor": "left",
            "xshift": 8,
            "font": {"color": "$soft", "size": 11},
            "bgcolor": "$card",
        }
        for place, (_, values) in enumerate(axes)
        for at, value in enumerate(values)
    ]
    layout = {
        "showlegend": False,
        "annotations": labels,
        "xaxis": {
            "tickvals": list(range(len(axes))),
            "ticktext": [_text(name) for name, _ in axes],
            "range": [-0.1, len(axes) - 0.65],
            "gridwidth": 2,
            "side": "top",
        },
        "yaxis": {"visible": False, "range": [-0.08, 1.08]},
        "margin": {"l": 16, "r": 16, "t": 36, "b": 8},
    }
    return {"data": traces, "layout": layout}


def _against(key: str, scored: list[Row], sweep: SweepConfig, colours: dict[str, str]) -> Chart:
    dimension = sweep.space[key]
    options = _options(dimension)
    drawn = list(reversed(scored))
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": [_number(dimension, row["values"][key]) for row in drawn],
        "y": [row["score"] for row in drawn],
        "marker": {"color": [colours[row["trial"]] for row in drawn], "size": 10},
        "text": [_tip(row, sweep) for row in drawn],
        "hovertemplate": "%{text}<extra></extra>",
    }
    axis: dict[str, Any] = {"title": _text(key), "type": "log" if _is_log(dimension) else "linear"}
    if options is not None:
        axis |= {"tickvals": list(range(len(options))), "ticktext": [_text(show(v)) for v in options]}
    layout = {"showlegend": False, "xaxis": axis, "yaxis": {"title": _text(sweep.metric)}}
    return Chart(f"{sweep.metric} against {key}", figure={"data": [dots], "layout": layout})


def _text(text: str) -> str:
    """Returns a text for Plotly, which reads tags and templates in texts."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "% {")


def _tip(row: Row, sweep: SweepConfig) -> str:
    lines = [f"trial {row['trial']}: {sweep.metric} {show(row['score'])}, {row['status']} at step {row['step']}"]
    lines += [f"{key} = {show(value)}" for key, value in row["values"].items()]
    return "<br>".join(map(_text, lines))


def _table(result: SweepResult, sweep: SweepConfig, colours: dict[str, str]) -> Table:
    columns = [("trial", False), *((key, True) for key in sweep.space), (sweep.metric, True)]
    columns += [("step", True), ("seconds", True), ("status", False), ("error", False)]
    rows = []
    for row in result.trials:
        style = "strong" if result.best is row else ""
        cells = [*(show(row["values"].get(key)) for key in sweep.space), show(row["score"]) or "–"]
        cells += [f"{row['step']:,}", f"{row['seconds']:.1f}"]
        rows.append(
            [
                Cell(row["trial"] + (" (best)" if style else ""), style, colours.get(row["trial"], _NO_SCORE)),
                *(Cell(text, style) for text in cells),
                Cell(row["status"], "bad" if row["status"] == "failed" else ""),
                Cell(row["error"] or "", "text" if len(row["error"] or "") > 24 else ""),
            ]
        )
    if not any(row["error"] for row in result.trials):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table("Trials", columns, rows, filter="filter" if len(rows) > 12 else "")
