"""The tables of the commands `runs` and `explain`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from myllm_ray.cli.tables import out
from myllm_ray.common.flatten import flatten
from myllm_ray.runs.difference import Change, Differences, FirstDifference, shown
from myllm_ray.runs.explanation import Explanation
from myllm_ray.runs.listing import Summary, walk
from myllm_ray.runs.overview import Overview

_COLOURS = {"active": "green", "finished": "", "failed": "red", "dead": "red", "unreadable": "red"}
_MOST_ATTEMPTS = 12


def run_table(found: Iterable[Summary], storage: Path) -> Table | Text:
    """Returns the table of `runs ls`."""
    rows = list(walk(found))
    if not rows:
        return Text(f"no runs in {storage}")
    table = Table(box=None, pad_edge=False)
    for column in ("name", "trainer", "status", "step", "best", "age", "size", "workers"):
        table.add_column(column, justify="right" if column in ("step", "age", "size") else "left", overflow="fold")
    for summary, depth in rows:
        table.add_row(
            Text(("  " * depth) + summary.name + ("  (sweep)" if summary.kind == "sweep" else "")),
            Text(summary.trainer or "–"),
            _status(summary),
            _step(summary),
            _best(summary),
            age(summary.age_seconds),
            size(summary.bytes),
            Text(f"{summary.workers} × {summary.backend}" if summary.backend else "–"),
        )
    return table


def _status(summary: Summary) -> Text:
    text = Text(summary.status, style=_COLOURS.get(summary.status, "yellow"))
    if summary.reason:
        reason = " ".join(summary.reason.split())
        text.append(f": {reason if len(reason) <= 60 else reason[:57] + '...'}", style="dim")
    return text


def _step(summary: Summary) -> str:
    unit = " trials" if summary.kind == "sweep" else ""
    if summary.step is None:
        return "–"
    return f"{summary.step}/{summary.total_steps}{unit}" if summary.total_steps else f"{summary.step}{unit}"


def _best(summary: Summary) -> str:
    if summary.best is None:
        return "–"
    at = f" @ {summary.best_step}" if summary.best_step is not None else ""
    return f"{summary.metric} {summary.best:.4g}{at}"


def size(count: float) -> str:
    """Returns a number of bytes with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def age(seconds: float | None) -> str:
    """Returns a duration in its largest unit."""
    if seconds is None:
        return "–"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def print_run(found: Overview) -> None:
    """Prints the page of `runs show`."""
    summary = found.summary
    out.print(Text.assemble((summary.name, "bold"), f"  {summary.path}"))
    status = Text.assemble("status: ", _status(summary), f", step {_step(summary)}")
    out.print(status)
    out.print(
        Text(
            f"trainer {summary.trainer}, {summary.workers} × {summary.backend}, {size(summary.bytes)}, last record "
            f"{age(summary.age_seconds)} ago"
        )
    )
    _pairs("config (differs from the defaults)", found.config)
    shown_environment = {
        key: value
        for key, value in flatten(found.environment).items()
        if key.split(".")[0] not in ("packages", "started", "command", "locations")
    }
    packages = found.environment.get("packages") or {}
    if packages:
        shown_environment["packages"] = ", ".join(f"{name} {version}" for name, version in packages.items())
    _pairs("environment", shown_environment)
    _attempts(found)
    _checkpoints(found)
    if found.metrics:
        table = _table("metrics", ("metric", "first", "last", "best", "at step"), numbers=4)
        for row in found.metrics:
            table.add_row(row.name, *(f"{v:.6g}" for v in (row.first, row.last, row.best)), str(row.best_step))
        out.print(table)


def _attempts(found: Overview) -> None:
    if found.attempts:
        title = f"attempts ({max(0, len(found.attempts) - 1)} restarts)"
        table = _table(title, ("steps", "workers", "end", "ended"))
        for row in found.attempts[-_MOST_ATTEMPTS:]:
            ended = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["time"])) if "time" in row else "–"
            changed = f" (other {', '.join(row['environment'])})" if row.get("environment") else ""
            table.add_row(
                f"{row.get('from_step')} to {row.get('to_step')}",
                str(row.get("workers")),
                Text(f"{row.get('end')}{changed}"),
                ended,
            )
        out.print(table)
    if found.interventions:
        table = _table("interventions", ("step", "action", "reason"))
        for row in found.interventions:
            table.add_row(str(row.get("step")), str(row.get("action")), Text(str(row.get("reason"))))
        out.print(table)


def _checkpoints(found: Overview) -> None:
    if found.checkpoints:
        table = _table("checkpoints", ("step", "size", ""))
        for row in found.checkpoints:
            table.add_row(str(row["step"]), size(row["bytes"]), "best" if row["best"] else "")
        out.print(table)
    if found.remote:
        out.print(Text(f"remote checkpoint store: {found.remote}"))


def _table(title: str, columns: Iterable[str], numbers: int = 0) -> Table:
    columns = list(columns)
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number >= len(columns) - numbers else "left", overflow="fold")
    return table


def _pairs(title: str, values: Mapping[str, Any]) -> None:
    if values:
        table = _table(title, ("", ""))
        for key, value in values.items():
            table.add_row(Text(key), Text(shown(value) if not isinstance(value, str) else value))
        table.show_header = False
        out.print(table)


def print_differences(found: Differences, a: Path, b: Path) -> None:
    """Prints the differences of `runs diff`."""
    if found.changes:
        out.print(change_table(found.changes, a, b))
    for first, what in ((found.batch, "batch"), (found.loss, "loss")):
        if first is not None:
            out.print(Text(f"first step with another {what}: {first_text(first)}"))
    if found.steps[0] != found.steps[1]:
        out.print(f"steps: {found.steps[0]} → {found.steps[1]}")
    for note in found.notes:
        out.print(Text(f"not compared: {note}", style="dim"))
    if found.equal:
        out.print("no difference")


def print_explanation(found: Explanation) -> None:
    """Prints the changes with their effects, the first differences, and the conclusion."""
    if found.candidates:
        table = _table("", ("", "", found.a, found.b, "", "effect"))
        table.title = None
        for candidate in found.candidates:
            for number, change in enumerate(candidate.changes):
                status = Text(candidate.status, "bold red" if candidate.status in ("cause", "part") else "")
                table.add_row(
                    candidate.kind if number == 0 else "",
                    Text(change.name),
                    Text(shown(change.a)),
                    Text(shown(change.b)),
                    status if number == 0 else "",
                    Text(candidate.effect or candidate.why_not) if number == 0 else "",
                )
        out.print(table)
    for first, what in ((found.first_batch, "batch"), (found.first_metric, "metric")):
        if first is not None:
            out.print(Text(f"first step with another {what}: {first_text(first)}"))
    for note in found.notes:
        out.print(Text(note, style="dim"))
    if found.neutral:
        names = ", ".join(change.name for change in found.neutral)
        out.print(Text(f"not considered, because they change no loss: {names}", style="dim"))
    out.print(Text(found.conclusion, style="bold"))


def change_table(changes: Iterable[Change], a: Path, b: Path) -> Table:
    """Returns a table of values that differ between two runs."""
    table = _table("", ("", "", str(a), str(b)))
    table.title = None
    for change in changes:
        table.add_row(change.kind, Text(change.name), Text(shown(change.a)), Text(shown(change.b)))
    return table


def first_text(first: FirstDifference) -> str:
    """Returns the first difference as text, with its size if it is a number."""
    apart = ""
    if isinstance(first.a, float) and isinstance(first.b, float) and math.isfinite(first.a - first.b):
        apart = f" (by {abs(first.a - first.b):.1e})"
    name = "" if first.name in ("batch", "loss") else f"{first.name} "
    return f"step {first.step}: {name}{first.a!s} → {first.b!s}{apart}"
