"""The learning-rate range test (Smith, 2015, arXiv:1506.01186): a short run with a growing learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myllm_ray.common.files import write_atomic
from myllm_ray.common.types import RunState
from myllm_ray.config.errors import TrainingError
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.reporting.page import Chart, Charts, Facts, Page, Section, number, render

_SMOOTHING = 0.8
_DIVERGED = 1.5
"""The test ends when the smoothed loss exceeds its minimum times this factor."""


class StopWhenDiverged(Callback):
    """Aborts a range test when the smoothed loss is not finite or exceeds `_DIVERGED` times its minimum."""

    def __init__(self) -> None:
        self._losses: list[float] = []

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        # The logged loss is reduced over ranks, so all ranks request the end in the same step.
        self._losses.append(metrics.get("loss", math.nan))
        smooth = smoothed(self._losses)
        if not math.isfinite(smooth[-1]) or smooth[-1] > _DIVERGED * min(smooth):
            state.request("abort", "the loss diverges")


def smoothed(losses: Sequence[float]) -> list[float]:
    """Returns the exponential moving average of the losses, with bias correction (Kingma and Ba, 2015, §3)."""
    # Without the correction, the first averages would be biased towards the initial value 0.
    mean, out = 0.0, []
    for count, loss in enumerate(losses, 1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        out.append(mean / (1 - _SMOOTHING**count))
    return out


@dataclass(frozen=True)
class RangeTest:
    """The result of a range test: learning rates, losses and smoothed losses, one value per step."""

    rates: list[float]
    losses: list[float]
    smooth: list[float]
    steepest: float
    """The rate at which the smoothed loss falls fastest. This is the suggested learning rate."""
    lowest: float
    """The rate at which the smoothed loss is lowest; at higher rates training begins to diverge."""

    def summary(self) -> str:
        """Returns the suggestion in one line."""
        beyond = "" if self.lowest < self.rates[-1] else " (the highest rate of the test: try a higher --high)"
        return f"suggestion: optimizer.lr={self.steepest:.2g} (steepest fall); lowest loss at {self.lowest:.2g}{beyond}"

    def write_report(self, path: Path, title: str) -> None:
        """Writes an HTML page with the losses plotted against the learning rate."""

        def line(name: str, rates: Sequence[float], values: Sequence[float], **style: Any) -> dict[str, Any]:
            return {"type": "scatter", "name": name, "x": list(rates), "y": list(values), **style}

        at = self.smooth[self.rates.index(self.steepest)]
        traces = [
            line("loss", self.rates, self.losses, mode="lines", line={"color": "$c7", "width": 1}),
            line("smoothed", self.rates, self.smooth, mode="lines", line={"color": "$c0", "width": 2}),
            line("suggestion", [self.steepest], [at], mode="markers", marker={"color": "$c1", "size": 11}),
        ]
        layout = {"xaxis": {"title": "learning rate", "type": "log"}, "yaxis": {"title": "loss"}}
        chart = Chart("Loss against learning rate", figure={"data": traces, "layout": layout}, wide=True)
        facts = Facts(
            [
                ("suggested optimizer.lr", f"{self.steepest:.2g}", "steepest fall of the smoothed loss"),
                ("lowest loss at", f"{self.lowest:.2g}", number(min(self.smooth))),
                ("steps", f"{len(self.rates):,}", ""),
            ]
        )
        section = Section("Loss", [Charts("", [chart])])
        write_atomic(path, render(Page(title, "Learning rate range test", facts, [section], subtitle=self.summary())))


def analyse(rates: Sequence[float], losses: Sequence[float]) -> RangeTest:
    """Finds the steepest descent of the smoothed loss over the logarithm of the rate, before the minimum of the loss.

    Args:
        rates: learning rates, one per step.
        losses: losses, one per step; those from the first non-finite one on are dropped.

    Raises:
        TrainingError: the loss never falls.
    """
    finite = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    rates, losses = list(rates[:finite]), list(losses[:finite])
    smooth = smoothed(losses)
    low = min(range(len(smooth)), key=smooth.__getitem__, default=0)
    # Slopes span five steps, because the noise of single batches dominates the difference of two adjacent steps.
    slopes = [
        ((smooth[i + 2] - smooth[i - 2]) / math.log(rates[i + 2] / rates[i - 2]), i)
        for i in range(2, min(low + 1, len(smooth) - 2))
    ]
    if not slopes or min(slopes)[0] >= 0:
        raise TrainingError(
            f"lr-find: the loss does not fall between the rates {rates[0] if rates else 0:.2g} and "
            f"{rates[-1] if rates else 0:.2g}: try a lower --low, more --steps, or check whether this config trains"
        )
    return RangeTest(rates, losses, smooth, rates[min(slopes)[1]], rates[low])
