"""The result of `myllm-ray explain`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from myllm_ray.runs.candidates import (
    Candidate,
)
from myllm_ray.runs.difference import Change, FirstDifference
from myllm_ray.runs.folder import RunFolder
from myllm_ray.runs.records import (
    ROUNDING,
    Effect,
)

ONLY_ROUNDING = ("layout", "hardware", "variable")
"""Kinds of changes that must not change a run by more than rounding."""


def tolerance_of(run: RunFolder) -> float:
    """Returns the relative difference of a metric of a run that rounding explains, by its precision."""
    return ROUNDING.get(str(run.get("accelerator.precision", "fp32")), max(ROUNDING.values()))


@dataclass
class Explanation:
    """The result: whether two runs are equal, the first difference, every change, and one sentence as conclusion."""

    a: str
    b: str
    equal: bool
    conclusion: str
    common_steps: int = 0
    first_batch: FirstDifference | None = None
    first_metric: FirstDifference | None = None
    largest: Effect | None = None
    candidates: list[Candidate] = field(default_factory=list)
    neutral: list[Change] = field(default_factory=list)
    """Changed keys of the config that can't change a loss."""
    notes: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    reruns: int = 0

    def as_json(self) -> dict[str, Any]:
        """Returns the explanation as JSON."""
        return {**asdict(self), "candidates": [{**asdict(c), "text": c.text} for c in self.candidates]}
