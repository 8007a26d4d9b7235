"""The metrics of a run as compact columns, with a bounded size whatever the number of steps.

A page holds float32 values in base64. If a run has logged more values than fit, a curve keeps for each of many
intervals of steps the lowest and the highest logged value, at their own steps. No drawn value is an average, so a spike
of one step stays visible.
"""

from __future__ import annotations

import base64
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BYTES = 1_400_000
"""Size of the encoded curves of a page. With the 1.2 MB of Plotly, a page stays below 3 MB."""
COORDINATES = ("step", "epoch", "time")
"""Keys of a logged row that are coordinates of its metrics."""
_VALUE, _POINT, _INTERVAL = 16 / 3, 32 / 3, 32
"""Encoded bytes of a value, of a (step, value), and of an interval: two points, and the mean with its step."""
_LEAST, _LISTED = 16, 200


@dataclass
class Series:
    """The logged values of one metric: `rows` are indices into the run's logged rows, ascending."""

    rows: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))


@dataclass
class Curves:
    """The metrics of a run by name, and for each logged row its step, time in seconds (or NaN) and tokens so far."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    times: array[float] = field(default_factory=lambda: array("d"))
    tokens: array[float] = field(default_factory=lambda: array("d"))
    series: dict[str, Series] = field(default_factory=dict)

    def points(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps (n,) and values (n,) of a metric."""
        found = self.series[name]
        return np.asarray(self.steps)[np.asarray(found.rows)], np.asarray(found.values)

    @property
    def seconds(self) -> float:
        """The time between the first and the last logged row that has one."""
        known = [t for t in (*self.times[:1], *self.times[-1:]) if math.isfinite(t)]
        return known[-1] - known[0] if known else 0.0

    def summary(self, name: str) -> dict[str, Any]:
        """Returns `count`, `first`, `last`, and `min` and `max` as (value, step), of the finite values of a metric."""
        steps, values = self.points(name)
        finite = np.isfinite(values)
        found: dict[str, Any] = {"count": len(values), "bad": int((~finite).sum())}
        if finite.any():
            steps, values = steps[finite], values[finite]
            low, high = int(values.argmin()), int(values.argmax())
            found |= {
                "first": float(values[0]),
                "last": float(values[-1]),
                "min": (float(values[low]), int(steps[low])),
                "max": (float(values[high]), int(steps[high])),
            }
        return found


def read_curves(path: Path, only: Sequence[str] | None = None) -> Curves:
    """Reads a `metrics.jsonl`, which may be missing, empty, or truncated in its last line.

    Args:
        path: the file.
        only: names of the metrics to keep; None: all.
    """
    found = Curves()
    tokens, skipped = 0.0, set(COORDINATES)
    for row in _objects(path):
        step = row.get("step")
        if type(step) is not int:
            continue
        # A step that is trained again replaces its earlier row and all later ones.
        if found.steps and step <= found.steps[-1]:
            _drop(found, step)
            tokens = found.tokens[-1] if found.tokens else 0.0
        before = found.steps[-1] if found.steps else 0
        number = len(found.steps)
        found.steps.append(step)
        found.times.append(_number(row.get("time")))
        # A row has the tokens of its own step; the steps between two logged ones are taken to have the same number.
        tokens += (step - before) * (t if math.isfinite(t := _number(row.get("tokens"))) else 0.0)
        found.tokens.append(tokens)
        for name, value in row.items():
            kind = type(value)
            if (kind is not float and kind is not int) or name in skipped:
                continue
            series = found.series.get(name)
            if series is None:
                if only is not None and name not in only:
                    skipped.add(name)
                    continue
                series = found.series[name] = Series()
            series.rows.append(number)
            try:
                series.values.append(value)
            except OverflowError:  # an integer beyond float64
                series.values.append(math.inf if value > 0 else -math.inf)
    return found


def _objects(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yields the objects of a JSON Lines file, and nothing if it does not exist; broken lines are skipped."""
    # Bytes: a file that was cut inside a character is not valid UTF-8.
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _drop(curves: Curves, step: int) -> None:
    """Removes the rows from `step` on."""
    kept = int(np.searchsorted(np.asarray(curves.steps), step))
    del curves.steps[kept:], curves.times[kept:], curves.tokens[kept:]
    for series in curves.series.values():
        first = int(np.searchsorted(np.asarray(series.rows), kept))
        del series.rows[first:], series.values[first:]


def encode(runs: Sequence[Curves], size: int = BYTES) -> tuple[list[dict[str, Any]], int | None]:
    """Encodes the curves of the runs of a page.

    Args:
        runs: the curves of each run.
        size: the largest number of bytes of the result, as JSON.

    Returns:
        For each run a JSON object that `assets/page.js` decodes, and the number of intervals to which curves were
        reduced, or None if every logged value is contained.
    """
    intervals = None if _size(runs, None) <= size else _intervals(runs, size)
    return [_encode(run, intervals) for run in runs], intervals


def _size(runs: Sequence[Curves], intervals: int | None) -> float:
    total = 0.0
    for run in runs:
        rows = len(run.steps)
        total += 3 * _VALUE * (rows if intervals is None else min(rows, 2 * intervals))
        for series in run.series.values():
            count = len(series.rows)
            if intervals is not None and count > 2 * intervals:
                total += intervals * _INTERVAL
            else:
                total += count * (_VALUE if count == rows and intervals is None else _POINT)
    return total


def _intervals(runs: Sequence[Curves], size: int) -> int:
    """Returns the largest number of intervals whose encoding fits, but at least `_LEAST`."""
    low, high = _LEAST, max((len(run.steps) for run in runs), default=_LEAST)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _size(runs, middle) <= size else (low, middle - 1)
    return low


def _encode(run: Curves, intervals: int | None) -> dict[str, Any]:
    steps, times, tokens = np.asarray(run.steps), np.asarray(run.times), np.asarray(run.tokens)
    rows = np.arange(len(steps))
    if intervals is not None and len(steps) > 2 * intervals:
        rows = np.unique(np.linspace(0, len(steps) - 1, 2 * intervals).round().astype(np.int64))
    start = times[np.isfinite(times)][:1]
    series = {}
    for name in run.series:
        at, values = run.points(name)
        if not len(values):  # all its rows were trained again, without it
            continue
        found: dict[str, Any] = {}
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            found["bad"] = [[int(at[i]), str(values[i])] for i in bad[:_LISTED].tolist()]
        if intervals is not None and len(values) > 2 * intervals:
            kept, centres, means = _reduce(at, values, intervals)
            means_kind = _kind(means)
            found |= {"s": _base64(at[kept], "u4"), "ms": _base64(centres, "u4"), "m": _base64(means, means_kind)}
            found |= {"md": means_kind} if means_kind != "f4" else {}
            found["n"] = len(values) / len(means)
            values = values[kept]
        elif intervals is not None or len(values) != len(steps):
            found["s"] = _base64(at, "u4")
        kind = _kind(values)
        series[name] = found | {"v": _base64(values, kind), **({"d": kind} if kind != "f4" else {})}
    return {
        "step": _base64(steps[rows], "u4"),
        "time": _base64((times - start if len(start) else times)[rows], "f4") if len(start) else None,
        "tokens": _base64(tokens[rows], "f4") if len(tokens) and tokens[-1] else None,
        "series": series,
    }


def _reduce(steps: np.ndarray, values: np.ndarray, intervals: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the indices of the lowest and highest value of each interval, and the mean of each with its middle step.

    The first and the last value are always among the indices; non-finite values never are the lowest or the highest.
    """
    edges = np.linspace(0, len(values), intervals + 1).round().astype(np.int64)
    finite = np.isfinite(values)
    lows = np.where(finite, values, np.inf)
    highs = np.where(finite, values, -np.inf)
    kept = {0, len(values) - 1}
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        kept.add(start + int(lows[start:stop].argmin()))
        kept.add(start + int(highs[start:stop].argmax()))
    with np.errstate(over="ignore"):  # sums of values near the limit of float64
        sums = np.add.reduceat(np.where(finite, values, 0.0), edges[:-1])
    counts = np.add.reduceat(finite.astype(np.int64), edges[:-1])
    means = np.divide(sums, counts, out=np.full(intervals, np.nan), where=counts > 0)
    return np.asarray(sorted(kept)), steps[(edges[:-1] + edges[1:]) // 2], means


def _kind(values: np.ndarray) -> str:
    """Returns the type that holds the values: float32, or float64 for magnitudes beyond its range."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    return "f8" if len(sizes) and (sizes.max() > 3e38 or sizes.min() < 1e-37) else "f4"


def _base64(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=f"<{kind}").tobytes()).decode()
