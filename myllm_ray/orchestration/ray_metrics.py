"""Metrics of runs on Ray as gauges, which Ray exports to Prometheus and shows in its dashboard.

`configs/grafana/myllm_ray.json` is a Grafana dashboard of them.
"""

from __future__ import annotations

import logging
import math
import re

from ray.util.metrics import Gauge

from myllm_ray.common.types import RunState
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.engine.callbacks import Callback

log = logging.getLogger(__name__)
_MOST = 100
"""Largest number of gauges. `loss/<source>` and metrics of experts may be many, and each is a series in Prometheus."""


class RayMetrics(Callback):
    """Sets a gauge `myllm_ray_<metric>` for each logged metric, with the labels `run` and `trainer`.

    It runs on rank 0. Setting a gauge writes to memory; Ray exports the values in the background.

    Args:
        config: the config of the run.
    """

    main_only = True

    def __init__(self, config: TrainerConfig):
        self._tags = {"run": config.run.name, "trainer": config.trainer}
        self._gauges: dict[str, Gauge] = {}

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        values = {name: value for name, value in metrics.items() if name != "time"}
        for name, value in {
            **values,
            "step": state.step,
            "total_steps": state.total_steps,
            "epoch": state.epoch,
        }.items():
            if math.isfinite(value):
                self._set(name, value)

    def _set(self, name: str, value: float) -> None:
        gauge = self._gauges.get(name)
        if gauge is None:
            if len(self._gauges) == _MOST:
                return
            gauge = Gauge(gauge_name(name), description=f"myllm_ray: {name}", tag_keys=tuple(self._tags))
            self._gauges[name] = gauge
        gauge.set(value, self._tags)


def gauge_name(metric: str) -> str:
    """Returns the name of a metric's gauge: Prometheus accepts letters, digits and underscores. Ray adds `ray_`."""
    return "myllm_ray_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)
