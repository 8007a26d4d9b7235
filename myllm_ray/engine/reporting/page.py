"""One HTML file with tables and Plotly charts. It contains all that it needs, and requests nothing from a network.

A page is a list of sections, and a section a list of blocks: `Facts`, `Table`, `Charts`, `Text`, `Code`, `Preview`.
`assets/page.html` writes the blocks (Jinja2 escapes all texts). `assets/page.js` draws the charts from one JSON object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Facts:
    """Short values with their names, as (name, value, note); the note may be empty."""

    items: Sequence[tuple[str, str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    `style`: "" | "strong" | "mark" (a value that differs) | "good" | "bad" | "text" (long) | "key" (is not wrapped).
    """

    text: str
    style: str = ""
    colour: int | str | None = None
    """Number of a curve, or a CSS colour, that the cell shows as a swatch."""


@dataclass(frozen=True)
class Table:
    """A table. Columns are (name, whether it contains numbers, which are aligned on the right)."""

    caption: str
    columns: Sequence[tuple[str, bool]]
    rows: Sequence[Sequence[Cell]]
    filter: str = ""
    """Label of a text field that filters the rows; empty: no field."""
    marked_only: str = ""
    """Label of a switch that hides rows without a `mark` cell; empty: no switch."""
    kind: str = "table"


@dataclass(frozen=True)
class Trace:
    """A curve of a chart: a metric of one of the page's runs. `colour`: number of its colour; default: its place."""

    metric: str
    name: str
    run: int = 0
    colour: int | str | None = None


@dataclass(frozen=True)
class Chart:
    """A chart of curves over the steps (`traces`), or any chart of Plotly (`figure`: its `data` and `layout`)."""

    title: str
    traces: Sequence[Trace] = ()
    figure: dict[str, Any] | None = None
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Charts:
    """Charts side by side under a heading."""

    title: str
    charts: Sequence[Chart]
    kind: str = "charts"


@dataclass(frozen=True)
class Text:
    """A paragraph. `style`: "" | "note" | "warning"."""

    text: str
    style: str = ""
    kind: str = "text"


@dataclass(frozen=True)
class Code:
    """A text in a fixed-width font."""

    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Preview:
    """Rows of training data: (title, [(name of a part that begins here or "", text, trained on)])."""

    rows: Sequence[tuple[str, Sequence[tuple[str, str, bool]]]]
    kind: str = "preview"


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading and a link to it."""

    title: str
    blocks: Sequence[Any]
    note: str = ""

    @property
    def id(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())

    @property
    def has_curves(self) -> bool:
        """Whether the controls of curves belong into this section."""
        return any(chart.traces for block in self.blocks if block.kind == "charts" for chart in block.charts)


@dataclass(frozen=True)
class Page:
    """A page. `curves`: see `curves.encode`; `events`: for each run (step, text) of what its curves are marked with."""

    title: str
    kind: str
    facts: Facts
    sections: Sequence[Section]
    status: str = ""
    status_style: str = ""
    curves: Sequence[dict[str, Any]] = ()
    events: Sequence[Sequence[tuple[int, str]]] = ()
    subtitle: str = ""
    footer: str = ""
    names: Sequence[str] = field(default_factory=tuple)


def render(page: Page) -> str:
    """Returns the page as HTML."""
    charts = [chart for s in page.sections for block in s.blocks if block.kind == "charts" for chart in block.charts]
    numbers = {id(chart): number for number, chart in enumerate(charts)}
    data = {
        "runs": [
            {"name": name, "events": list(events), **curves}
            for name, events, curves in zip(page.names, page.events, page.curves, strict=True)
        ],
        "charts": [_chart(chart) for chart in charts],
    }
    return str(
        _template().render(
            page=page,
            number_of=lambda chart: numbers[id(chart)],
            data=as_script(data),
            **{name: text for name, text in _assets().items() if charts or name != "plotly"},
        )
    )


def _chart(chart: Chart) -> dict[str, Any]:
    if chart.figure is not None:
        return {"title": chart.title, "figure": chart.figure}
    return {
        "title": chart.title,
        "traces": [
            {"run": t.run, "metric": t.metric, "name": t.name, "colour": place if t.colour is None else t.colour}
            for place, t in enumerate(chart.traces)
        ],
    }


def as_script(value: Any) -> str:
    """Returns a value as JSON that is safe inside a script element: no text of it can end the element.

    Non-finite numbers become null, because JSON has none.
    """
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


@cache
def _assets() -> dict[str, str]:
    files = {"style": "page.css", "script": "page.js", "plotly": "plotly-basic.min.js"}
    return {name: (ASSETS / file).read_text(encoding="utf-8") for name, file in files.items()}


@cache
def _template() -> Any:
    # Jinja2 takes 0.1 s to import, and most processes write no page.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def number(value: Any) -> str:
    """Returns a number with five significant digits, for people."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:.4e}" if value and not 1e-3 <= abs(value) < 1e6 else f"{value:#,.5g}".rstrip(".")


def large(value: float) -> str:
    """Returns a large count in three digits with its unit, such as 1.25 M."""
    for unit, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Returns a duration in its two largest units, such as 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24:02d} h"
