"""Two runs side by side: how far apart they are, and where they part."""

from __future__ import annotations

import math
from dataclasses import dataclass

from myllm_ray.verify.runs import Trace

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
"""Largest relative difference of loss and gradient norm: what sums in another order leave, after a few steps."""
WEIGHTS = 100.0
"""Weights may differ by so many tolerances: Adam makes a whole step out of a gradient that is all rounding."""
QUANTITIES = ("tokens_hash", "learning_rate", "loss", "grad_norm", "weights")
"""In the order in which one follows from the other."""


@dataclass(frozen=True)
class Difference:
    """The first thing that differs: in optimizer step `step` (counted from 1), the `quantity`, and by how much."""

    step: int
    quantity: str
    expected: float | str
    found: float | str


def distance(found: float, expected: float) -> float:
    """Relative, and infinite for what is no number."""
    if not (math.isfinite(found) and math.isfinite(expected)):
        return 0.0 if found == expected else math.inf
    return abs(found - expected) / max(abs(expected), 1e-12)


def weight_distance(found: Trace, expected: Trace, step: int) -> float:
    """Largest difference of a weight, relative to the largest of its tensor."""
    a, b = found.weights(step), expected.weights(step)
    if a.keys() != b.keys():
        return math.inf
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-12)) for name in b)


def distances(found: Trace, expected: Trace) -> dict[str, float]:
    """Largest difference of each quantity over all steps; `tokens_hash`: share of the steps with another batch."""
    pairs = list(zip(found.rows, expected.rows, strict=False))
    result = {name: max((distance(_value(a, name), _value(b, name)) for a, b in pairs), default=math.inf)
              for name in QUANTITIES[1:4]}
    result["tokens_hash"] = sum(a["tokens_hash"] != b["tokens_hash"] for a, b in pairs) / max(1, len(pairs))
    result["weights"] = weight_distance(found, expected, len(expected.rows)) if len(pairs) == len(expected.rows) else math.inf
    return result


def first_difference(found: Trace, expected: Trace, tolerance: float) -> Difference | None:
    """Where two runs part, or None if they stay within the tolerance."""
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
        return Difference(min(len(found.rows), len(expected.rows)) + 1, "steps", float(len(expected.rows)), float(len(found.rows)))
    return None


def _value(row: dict[str, float], name: str) -> float:
    return float(row.get(name, math.nan if name != "grad_norm" else math.inf))  # a skipped step has no norm


def held_too_much(trace: Trace) -> Difference | None:
    """The first rank that holds more of a model's parameters than its backend's share."""
    for rank, models in enumerate(trace.parameter_bytes):
        for name, (held, expected) in models.items():
            if held > expected:
                return Difference(0, f"bytes of the parameters of {name} on rank {rank}", float(expected), float(held))
    return None
