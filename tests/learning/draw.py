"""Draws docs/learning.svg and prints the table of docs/learning.md.

Reads the JSON lines that test_learning.py writes (LEARNING_OUT): `python tests/learning/draw.py FILE`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, GAP = 250, 150, 30, 14
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37")
DOCS = Path(__file__).resolve().parents[2] / "docs"


def smooth(curve: list[list[float]], window: int = 10) -> list[tuple[float, float]]:
    """Returns running means over `window` points at every fourth point; curves below 50 points are unchanged."""
    if len(curve) < 50:
        return [(x, y) for x, y in curve]
    return [
        (curve[i][0], sum(y for _, y in curve[max(0, i - window + 1) : i + 1]) / min(window, i + 1))
        for i in range(0, len(curve), 4)
    ]


def panel(title: str, runs: list[dict[str, Any]], at: int) -> str:
    last = max(run["curve"][-1][0] for run in runs)
    inner = WIDTH - LEFT - GAP

    def place(x: float, y: float) -> str:
        return f"{at + LEFT + x / last * inner:.1f},{24 + (1 - y) * (HEIGHT - 50):.1f}"

    lines = "".join(
        f'<polyline fill="none" stroke="{colour}" stroke-width="1.3" '
        f'points="{" ".join(place(*p) for p in smooth(run["curve"]))}"/>'
        for run, colour in zip(runs, COLOURS, strict=False)
    )
    grid = "".join(
        f'<path d="M{place(0, y)}L{place(last, y)}" stroke="#d1d9e0"/>'
        f'<text x="{at + 4}" y="{28 + (1 - y) * (HEIGHT - 50):.0f}">{y:g}</text>'
        for y in (0, 0.5, 1)
    )
    return (
        f'{grid}{lines}<text x="{at + LEFT}" y="14">{title}</text>'
        f'<text x="{at + WIDTH - 70}" y="{HEIGHT - 8}">step {last:.0f}</text>'
    )


def main() -> None:
    runs = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda r: (r["trainer"], r["task"], r["seed"])):
        groups.setdefault(f"{run['trainer']}, {run['task']}", []).append(run)
    panels = "".join(panel(title, group, i * WIDTH) for i, (title, group) in enumerate(groups.items()))
    (DOCS / "learning.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(groups)} {HEIGHT}" style="background:#fff">'
        f"<style>text{{font:10px system-ui,sans-serif;fill:#59636e}}</style>{panels}</svg>\n",
        encoding="utf-8",
    )
    for title, group in groups.items():
        cells = []
        for run in group:
            values = [y for _, y in run["curve"]]
            few = len(values) < 50
            first, final = (values[0], values[-1]) if few else (sum(values[:5]) / 5, sum(values[-20:]) / 20)
            cells.append(f"{first:.2f} -> {final:.2f} ({run['seconds']:.0f} s)")
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
