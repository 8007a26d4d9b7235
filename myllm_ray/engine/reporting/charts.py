"""SVG charts in one HTML page that needs no server, no JavaScript and no external resources."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

COLOURS = ("#1f6feb", "#d1242f")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 560, 220, 56, 24
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1200px;padding:0 1rem;color:#1f2328}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(540px,1fr));gap:1.5rem}svg{width:100%;height:auto}
text{font:11px system-ui,sans-serif;fill:#59636e}pre{background:#f6f8fa;padding:1rem;overflow:auto}
table{border-collapse:collapse}td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #d1d9e0}
polyline:hover,circle:hover{stroke-width:4;opacity:1}"""


@dataclass(frozen=True)
class Line:
    """A named series of points. `tip` is shown when the mouse is over it; `dots` draws the points without a line."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = COLOURS[0]
    tip: str = ""
    dots: bool = False


def page(title: str, body: str) -> str:
    """Returns a complete HTML page.

    Args:
        title: plain text, escaped here.
        body: HTML.
    """
    name = html.escape(title)
    return f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{_STYLE}</style><h1>{name}</h1>{body}\n"


def line_chart(
    title: str, lines: Sequence[Line], x_name: str, log_x: bool = False, log_y: bool = False, legend: bool = True
) -> str:
    """Returns a line chart as HTML, with the bounds of both axes as labels.

    Args:
        title, x_name: plain text, escaped here.
        lines: at least one point in total.
        log_x, log_y: whether the axis is logarithmic; its values must be positive.
        legend: whether the names of the lines are shown.
    """
    places = [(_scale(x, log_x), _scale(y, log_y)) for line in lines for x, y in line.points]
    x0, x1 = min(x for x, _ in places), max(x for x, _ in places)
    y0, y1 = min(y for _, y in places), max(y for _, y in places)

    # SVG's y axis points downwards. `or 1`: a single value has no range.
    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (_scale(x, log_x) - x0) / ((x1 - x0) or 1) * (_WIDTH - _LEFT - 8),
            8 + (y1 - _scale(y, log_y)) / ((y1 - y0) or 1) * (_HEIGHT - _BOTTOM - 16),
        )

    named = (
        " ".join(f'<span style="color:{line.colour}">{html.escape(line.name)}</span>' for line in lines)
        if legend
        else ""
    )
    drawn = "".join(_draw(line, place) for line in lines)

    def back(value: float, log: bool) -> str:
        return f"{math.exp(value) if log else value:.3g}"

    return (
        f'<figure><figcaption><b>{html.escape(title)}</b> {named}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f'<path d="M{_LEFT} 8V{_HEIGHT - _BOTTOM}H{_WIDTH}" fill="none" stroke="#d1d9e0"/>{drawn}'
        f'<text x="4" y="16">{back(y1, log_y)}</text><text x="4" y="{_HEIGHT - _BOTTOM}">{back(y0, log_y)}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 6}">{html.escape(x_name)} {back(x0, log_x)}</text>'
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 6}" text-anchor="end">{back(x1, log_x)}</text></svg></figure>'
    )


def _scale(value: float, log: bool) -> float:
    return math.log(value) if log else value


def _draw(line: Line, place: Callable[[float, float], tuple[float, float]]) -> str:
    tip = f"<title>{html.escape(line.tip)}</title>" if line.tip else ""
    points = [place(x, y) for x, y in line.points]
    joined = (
        ""
        if line.dots
        else (
            f'<polyline fill="none" stroke="{line.colour}" stroke-width="1.6" '
            f'points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}">{tip}</polyline>'
        )
    )
    radius = 5 if line.dots else 2
    dots = "".join(
        f'<circle r="{radius}" fill="{line.colour}" cx="{x:.1f}" cy="{y:.1f}">{tip}</circle>'
        for x, y in points
        if len(points) < 30
    )
    return joined + dots


def parallel_chart(
    title: str, axes: Sequence[tuple[str, Sequence[str]]], lines: Sequence[tuple[Sequence[float], str, str]]
) -> str:
    """Returns a chart with parallel coordinates (Inselberg, 1985) as HTML.

    Args:
        title: plain text, escaped here.
        axes: (name, labels from bottom to top) for each axis.
        lines: (positions on the axes in [0, 1], colour, text under the mouse) for each line; later lines are drawn over
            earlier ones.
    """
    width, height, top, side = 1120, 320, 28, 70
    gap = (width - 2 * side) / max(1, len(axes) - 1)

    def place(axis: int, share: float) -> tuple[float, float]:
        return side + axis * gap, top + (1 - share) * (height - 2 * top)

    drawn = []
    for number, (name, labels) in enumerate(axes):
        x, _ = place(number, 0)
        drawn.append(
            f'<path d="M{x:.1f} {top}V{height - top}" stroke="#d1d9e0"/>'
            f'<text x="{x:.1f}" y="14" text-anchor="middle" style="font-weight:bold">{html.escape(name)}</text>'
        )
        for at, label in enumerate(labels):
            _, y = place(number, at / max(1, len(labels) - 1))
            drawn.append(f'<text x="{x + 5:.1f}" y="{y + 4:.1f}">{html.escape(label)}</text>')
    for shares, colour, tip in lines:
        points = " ".join("{:.1f},{:.1f}".format(*place(axis, share)) for axis, share in enumerate(shares))
        drawn.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" opacity=".8" points="{points}">'
            f"<title>{html.escape(tip)}</title></polyline>"
        )
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b></figcaption>"
        f'<svg viewBox="0 0 {width} {height}">{"".join(drawn)}</svg></figure>'
    )


def shade(share: float) -> str:
    """Returns a colour between dark blue (0, the best) and yellow (1), as a hexadecimal RGB value.

    A piecewise linear approximation of viridis, whose brightness is monotonic, so it can be read without colour vision.
    """
    stops = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (233, 205, 37))
    at = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    low = min(int(at), len(stops) - 2)
    mixed = (round(a + (b - a) * (at - low)) for a, b in zip(stops[low], stops[low + 1], strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)
