"""Folders of runs for the tests of the report, and what a page contains."""

from __future__ import annotations

import base64
import json
import math
import random
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from myllm_ray.engine.reporting.events import make_event

SOURCES = ("wiki", "code", "books")


def logged(steps: int, spike: int | None = None, rl: bool = True) -> list[dict[str, Any]]:
    """Returns rows of a metrics.jsonl with about 25 metrics; `spike`: a step with a loss of 50."""
    draw, rows = random.Random(0), []
    for step in range(1, steps + 1):
        loss = 50.0 if step == spike else 2 + 8 / math.sqrt(step + 4) + draw.gauss(0, 0.05)
        row = {
            "step": step,
            "epoch": 0,
            "loss": loss,
            "learning_rate": 3e-4 * (1 - step / (steps + 1)),
            "grad_norm": abs(draw.gauss(1, 0.2)),
            "tokens": 8192.0,
            "time": 1.79e9 + step * 0.21,
            "tokens_per_second": 39000 + draw.gauss(0, 900),
            **{f"loss/{name}": loss + draw.gauss(0, 0.1) for name in SOURCES},
        }
        if rl:
            names = "reward kl entropy length clip_fraction importance_ratio ended rewards/exact rewards/format score"
            row |= {name: draw.gauss(0, 1) for name in names.split()}
            row |= {name: draw.random() for name in ("memory_bytes", "time/data", "time/forward", "time/backward")}
        if step % max(1, steps // 10) == 0:
            row["validation_loss"] = loss + 0.1
        rows.append(row)
    return rows


def write_run(folder: Path, rows: Iterable[dict[str, Any]], **files: Any) -> Path:
    """Writes the folder of a run: `rows` as metrics.jsonl, and other files by stem: lists as .jsonl, dicts as .json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"metrics": list(rows), **files}.items():
        if isinstance(content, list):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        elif isinstance(content, dict):
            (folder / f"{name}.json").write_text(json.dumps(content))
        else:
            (folder / f"{name}.yaml").write_text(content)
    return folder


def event(name: str, seconds: float, step: int | None = None, **fields: Any) -> dict[str, Any]:
    """Returns a row of events.jsonl at a time in seconds since the epoch."""
    time = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {**make_event(name, step, **fields), "time": time}


def attempt(seconds: float, first: int, last: int, end: str) -> dict[str, Any]:
    """Returns the event `attempt`."""
    return event("attempt", seconds, last, workers=2, from_step=first, to_step=last, end=end)


def page_data(page: Path | str) -> dict[str, Any]:
    """Returns the JSON object that a page's charts are drawn from."""
    text = page if isinstance(page, str) else page.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="page-data">(.*?)</script>', text, re.DOTALL)
    data: dict[str, Any] = json.loads(found)
    return data


def decoded(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), f"<{kind}")


def points(data: dict[str, Any], metric: str, run: int = 0) -> tuple[list[int], list[float]]:
    """Returns the steps and values that a curve of a page is drawn from."""
    found = data["runs"][run]
    series = found["series"][metric]
    steps = decoded(series.get("s", found["step"]), "u4")
    return steps.tolist(), decoded(series["v"], series.get("d", "f4")).tolist()
