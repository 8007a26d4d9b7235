"""The learning-rate range test (Smith, 2015, arXiv:1506.01186): one short run whose rate grows from step to step."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from myllm_ray.common.charts import COLOURS, Line, line_chart, page
from myllm_ray.common.files import write_atomic
from myllm_ray.common.types import RunState
from myllm_ray.config.errors import TrainingError
from myllm_ray.engine.callbacks import Callback

_SMOOTHING = 0.8
_DIVERGED = 1.5
"""Times the lowest smoothed loss; beyond it a range test learns nothing more."""


class StopWhenDiverged(Callback):
    """Stops a range test soon after its loss has left its lowest value far behind."""

    def __init__(self) -> None:
        self._losses: list[float] = []

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        self._losses.append(metrics.get("loss", math.nan))
        smooth = smoothed(self._losses)
        if not math.isfinite(smooth[-1]) or smooth[-1] > _DIVERGED * min(smooth):
            state.request("abandon", "the loss diverges")


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average with its bias corrected (Kingma and Ba, 2015, §3)."""
    mean, out = 0.0, []
    for count, loss in enumerate(losses, 1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        out.append(mean / (1 - _SMOOTHING**count))
    return out


@dataclass(frozen=True)
class RangeTest:
    """What a range test has found: rates, losses, and the smoothed losses, one each a step."""

    rates: list[float]
    losses: list[float]
    smooth: list[float]
    steepest: float
    """The rate at which the smoothed loss falls fastest: the suggestion."""
    lowest: float
    """The rate at which it is lowest; beyond it training is on its way to diverging."""

    def summary(self) -> str:
        """One line."""
        beyond = "" if self.lowest < self.rates[-1] else " (the highest rate tried: a wider --high may find more)"
        return f"suggestion: optimizer.lr={self.steepest:.2g}, where the loss falls fastest; it is lowest at {self.lowest:.2g}{beyond}"

    def write_report(self, path: Path, title: str) -> None:
        """Loss against rate as an HTML page."""
        def points(values: Sequence[float]) -> list[tuple[float, float]]:
            return [(r, v) for r, v in zip(self.rates, values, strict=True) if math.isfinite(v)]

        chart = line_chart("Loss against learning rate", [Line("loss", points(self.losses), "#d1d9e0"), Line("smoothed", points(self.smooth)),
                           Line("suggestion", [(self.steepest, self.smooth[self.rates.index(self.steepest)])], COLOURS[1], dots=True)],
                           "learning rate", log_x=True)
        write_atomic(path, page(title, f"<p>{html.escape(self.summary())}</p>{chart}"))


def analyse(rates: Sequence[float], losses: Sequence[float]) -> RangeTest:
    """Find the steepest fall of the loss over the logarithm of the rate, before the loss is at its lowest.

    Raises:
        TrainingError: the loss never falls.
    """
    finite = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    rates, losses = list(rates[:finite]), list(losses[:finite])
    smooth = smoothed(losses)
    low = min(range(len(smooth)), key=smooth.__getitem__, default=0)
    # A slope over five steps: between two neighbours it would be the noise of one batch.
    slopes = [((smooth[i + 2] - smooth[i - 2]) / math.log(rates[i + 2] / rates[i - 2]), i) for i in range(2, min(low + 1, len(smooth) - 2))]
    if not slopes or min(slopes)[0] >= 0:
        raise TrainingError(f"lr-find: the loss does not fall between {rates[0] if rates else 0:.2g} and {rates[-1] if rates else 0:.2g}: try a "
                            "lower --low, more --steps, or look whether this config learns at all")
    return RangeTest(rates, losses, smooth, rates[min(slopes)[1]], rates[low])
