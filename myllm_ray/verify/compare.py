"""Comparison of two runs: the largest difference of each quantity, and the first step at which the runs differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

from myllm_ray.verify.runs import Trace

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
"""Largest accepted relative difference of loss and gradient norm.

It allows for the rounding of sums in another order over a few steps.
"""
WEIGHTS = 100.0
"""Weights may differ by this multiple of the tolerance.

Adam normalizes the gradient, so a gradient that consists of rounding errors causes an update of full size.
"""
QUANTITIES = ("tokens_hash", "learning_rate", "loss", "grad_norm", "weights")
"""The compared quantities; each one depends on those before it."""


@dataclass(frozen=True)
class Difference:
    """The first difference of two runs.

    `step` is the optimizer step, counted from 1; 0 is before training.
    """

    step: int
    quantity: str
    expected: float | str
    found: float | str


def distance(found: float, expected: float) -> float:
    """Returns |found - expected| / |expected|; for non-finite values, 0 if both are equal and infinity otherwise."""
    if not (math.isfinite(found) and math.isfinite(expected)):
        return 0.0 if found == expected else math.inf
    return abs(found - expected) / max(abs(expected), 1e-12)


def weight_distance(found: Trace, expected: Trace, step: int) -> float:
    """Returns the largest difference of a weight after `step`, relative to the largest weight of its tensor.

    It is infinite if the runs have different tensors.
    """
    a, b = found.weights(step), expected.weights(step)
    if a.keys() != b.keys():
        return math.inf
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-12)) for name in b)


def distances(found: Trace, expected: Trace) -> dict[str, float]:
    """Returns the largest difference of each quantity over all steps.

    `tokens_hash` is the share of the steps whose batch differs. `weights` are those after the last step.
    """
    pairs = list(zip(found.rows, expected.rows, strict=False))
    result = {
        name: max((distance(_value(a, name), _value(b, name)) for a, b in pairs), default=math.inf)
        for name in QUANTITIES[1:4]
    }
    result["tokens_hash"] = sum(a["tokens_hash"] != b["tokens_hash"] for a, b in pairs) / max(1, len(pairs))
    result["weights"] = (
        weight_distance(found, expected, len(expected.rows)) if len(pairs) == len(expected.rows) else math.inf
    )
    return result


def first_difference(found: Trace, expected: Trace, tolerance: float) -> Difference | None:
    """Returns the first difference of two runs, or None if all differences are within the tolerance."""
    for step, (a, b) in enumerate(zip(found.rows, expected.rows, strict=False), 1):
        if a["tokens_hash"] != b["tokens_hash"]:
            return Difference(step, "tokens_hash", b["tokens_hash"], a["tokens_hash"])
        for name in QUANTITIES[1:4]:
            if distance(_value(a, name), _value(b, name)) > tolerance:
                return Difference(step, name, _value(b, name), _value(a, name))
        apart = weight_distance(found, expected, step)
        if apart > WEIGHTS * tolerance:
            return Difference(step, "weights", 0.0, apart)
    if len(found.rows) != len(expected.rows):
        return Difference(
            min(len(found.rows), len(expected.rows)) + 1, "steps", float(len(expected.rows)), float(len(found.rows))
        )
    return None


def _value(row: dict[str, float], name: str) -> float:
    # A skipped step has no gradient norm. Infinity, because two infinities compare as equal and two NaNs do not.
    return float(row.get(name, math.nan if name != "grad_norm" else math.inf))


def held_too_much(trace: Trace) -> Difference | None:
    """Returns the first rank that holds more parameter bytes of a model than the backend's share, or None."""
    for rank, models in enumerate(trace.parameter_bytes):
        for name, (held, expected) in models.items():
            if held > expected:
                return Difference(0, f"bytes of the parameters of {name} on rank {rank}", float(expected), float(held))
    return None
