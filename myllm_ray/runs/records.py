"""Comparison of the records of two runs: where they differ, and by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from myllm_ray.runs.folder import RunFolder

ROUNDING = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
"""Largest relative difference of a metric, by precision, that sums in another order explain over a few steps."""
INPUTS = ("learning_rate", "loss_scale", "epoch")
"""Metrics that a run is given rather than computes. They show a cause, not an effect."""
_ORDER = ("loss", "grad_norm")


@dataclass(frozen=True)
class Effect:
    """A difference of two runs in one step. `name` is a metric, or `batch`: the hash of the rows of the step."""

    step: int
    name: str
    a: float | str | None
    b: float | str | None

    @property
    def distance(self) -> float:
        """The relative difference; infinite for batches and for non-finite values."""
        return distance(self.a, self.b)

    def __str__(self) -> str:
        if self.name == "batch":
            return f"the batch of step {self.step}"
        apart = (
            f" by {abs(self.b - self.a):.1e}"
            if isinstance(self.a, float) and isinstance(self.b, float) and math.isfinite(self.b - self.a)
            else f" from {self.a} to {self.b}"
        )
        return f"the {self.name.replace('_', ' ')} of step {self.step}{apart}"


@dataclass(frozen=True)
class Step:
    """The record of one step: the hash of its batch and its metrics. None or {} if they are not recorded."""

    batch: str | None
    metrics: Mapping[str, float]


Steps = Mapping[int, Step]


def steps_of(run: RunFolder) -> dict[int, Step]:
    """Returns the records of a run by step. Step 0 is the evaluation before training."""
    ledger, metrics = run.ledger, run.metrics
    return {step: Step(ledger.get(step), metrics.get(step, {})) for step in sorted({*ledger, *metrics})}


def distance(a: float | str | None, b: float | str | None) -> float:
    """Returns |a - b| / max(|a|, |b|), 0 for equal values (two NaNs are equal), else infinity if one is not finite."""
    if not isinstance(a, (int, float)) or not isinstance(b, (int, float)):
        return 0.0 if a == b else math.inf
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def effect_of(step: int, a: Step, b: Step, tolerance: float = 0.0, inputs: bool = False) -> Effect | None:
    """Returns the most telling difference of a step, or None: the batch, the loss, the gradient norm, other metrics.

    Args:
        step: the step.
        a: its record in one run.
        b: its record in the other run.
        tolerance: relative difference of a metric up to which it counts as equal.
        inputs: whether to consider the learning rate and other metrics that the run is given.
    """
    if a.batch is not None and b.batch is not None and a.batch != b.batch:
        return Effect(step, "batch", a.batch, b.batch)
    names = [n for n in a.metrics if n in b.metrics and n not in _ORDER and (n in INPUTS) == inputs]
    for name in names if inputs else [n for n in _ORDER if n in a.metrics and n in b.metrics] + names:
        # The learning rate is a function of the step: it is compared exactly.
        limit = 1e-12 if name in INPUTS else tolerance
        if distance(a.metrics[name], b.metrics[name]) > limit:
            return Effect(step, name, a.metrics[name], b.metrics[name])
    return None


def first_effect(
    a: Steps, b: Steps, tolerance: float = 0.0, until: int | None = None, inputs: bool = True
) -> Effect | None:
    """Returns the first difference in the common steps of two records, or None.

    If nothing but metrics that the runs are given differs (the learning rate), the first of these is returned, unless
    `inputs` is false.
    """
    common = [step for step in sorted(a.keys() & b.keys()) if until is None or step <= until]
    for given in (False, True) if inputs else (False,):
        for step in common:
            found = effect_of(step, a[step], b[step], tolerance, given)
            if found is not None:
                return found
    return None


def largest(a: Steps, b: Steps) -> Effect | None:
    """Returns the largest relative difference of a metric in the common steps, or None without common metrics."""
    found: Effect | None = None
    for step in sorted(a.keys() & b.keys()):
        for name in a[step].metrics.keys() & b[step].metrics.keys():
            effect = Effect(step, name, a[step].metrics[name], b[step].metrics[name])
            if found is None or effect.distance > found.distance:
                found = effect
    return found


def last_equal_before(a: Steps, b: Steps, step: int, tolerance: float) -> int:
    """Returns the last step before `step` that both runs have logged and in which nothing differs; 0 without one."""
    for earlier in sorted(a.keys() & b.keys(), reverse=True):
        x, y = a[earlier], b[earlier]
        if not 0 < earlier < step or not (x.metrics and y.metrics):
            continue
        if all(effect_of(earlier, x, y, tolerance, inputs) is None for inputs in (False, True)):
            return earlier
    return 0
