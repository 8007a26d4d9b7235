"""The live table of a sweep; one line per ended trial if the output is not a terminal; or JSON lines."""

from __future__ import annotations

import time
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from myllm_ray.config.sweep import SweepConfig
from myllm_ray.engine.reporting.events import make_event
from myllm_ray.engine.reporting.terminal import console, log_format, print_json
from myllm_ray.orchestration.sweeps.results import Row, best_of

_MOST = 30
_STYLES = {"running": "cyan", "done": "green", "stopped": "dim", "failed": "red", "waiting": "dim", "paused": "yellow"}


class SweepConsole:
    """Shows the trials of a sweep while they run.

    Args:
        sweep: the sweep's config.
        total: number of trials.
    """

    def __init__(self, sweep: SweepConfig, total: int):
        self._sweep, self._total = sweep, total
        self._rows: dict[str, Row] = {}
        self._started = time.time()
        self._format = log_format()
        live = self._format == "panel"
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self.render) if live else None

    def __enter__(self) -> SweepConsole:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, row: Row) -> None:
        """Shows the current state of a trial."""
        before = self._rows.get(row["trial"])
        self._rows[row["trial"]] = dict(row)
        if self._format == "json":
            # Not once per report: trials may report at every step.
            if before is None or before["status"] != row["status"]:
                fields = {key: row[key] for key in ("trial", "values", "status", "score", "seconds", "error")}
                print_json(make_event("trial", row["step"], **fields))
        elif self._live is None and row["status"] in ("done", "stopped", "failed"):
            console.print(self._line(row))

    def _line(self, row: Row) -> Text:
        values = "  ".join(f"{key}={show(value)}" for key, value in row["values"].items())
        number = sum(r["status"] in ("done", "stopped", "failed") for r in self._rows.values())
        found = row["error"] if row["status"] == "failed" else f"{self._sweep.metric} {show(row['score'])}"
        return Text(
            f"[{number}/{self._total}] trial {row['trial']}  {values}  {row['status']} at step {row['step']}  "
            f"{found}  {row['seconds']:.1f} s"
        )

    def render(self) -> Table:
        """Returns the table with the current states."""
        ended = sum(r["status"] in ("done", "stopped", "failed") for r in self._rows.values())
        table = Table(
            title=f"{self._sweep.run.name}: {ended} of {self._total} trials, {time.time() - self._started:.0f} s",
            title_justify="left",
        )
        table.add_column("trial")
        for key in self._sweep.space:
            table.add_column(key, justify="right")
        table.add_column(self._sweep.metric, justify="right")
        for column in ("step", "seconds"):
            table.add_column(column, justify="right")
        table.add_column("")
        best = best_of(self._rows.values(), self._sweep.mode)
        # The terminal shows a limited number of rows: running trials come first, then the best one.
        running_first = sorted(self._rows.values(), key=lambda r: (r["status"] != "running", r is not best, r["trial"]))
        shown = sorted(running_first[:_MOST], key=lambda r: r["trial"])
        for row in shown:
            status = Text(
                row["status"] + (f": {row['error']}" if row["error"] else ""), style=_STYLES.get(row["status"], "")
            )
            table.add_row(
                row["trial"],
                *(show(row["values"].get(key)) for key in self._sweep.space),
                show(row["score"]),
                str(row["step"]),
                f"{row['seconds']:.0f}",
                status,
                style="bold" if row is best else "",
            )
        if len(running_first) > _MOST:
            table.caption = f"{len(running_first) - _MOST} more are in results.jsonl"
        return table


def show(value: Any) -> str:
    """Formats a value or a metric; floats get four significant digits."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
