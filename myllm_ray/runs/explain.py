"""Explains why two runs differ: `myllm-ray explain`.

The records give the first step that differs. The steps around it are then made again under run A with each change to
run B applied alone, from the nearest checkpoint before the difference. A run is a function of its config, so a change
that leaves these steps equal, bit for bit, is not the cause.
"""

from __future__ import annotations

from collections.abc import Callable

from myllm_ray.config.errors import ConfigError
from myllm_ray.runs.bisection import Bisection
from myllm_ray.runs.candidates import (
    config_candidates,
    environment_candidates,
    why_incomparable,
)
from myllm_ray.runs.difference import first_batch, first_metric
from myllm_ray.runs.explanation import ONLY_ROUNDING, Explanation, tolerance_of
from myllm_ray.runs.folder import RunFolder
from myllm_ray.runs.records import (
    Steps,
    first_effect,
    largest,
    steps_of,
)


def explain(
    a: RunFolder,
    b: RunFolder,
    rerun: bool = True,
    most_steps: int = 200,
    tell: Callable[[str], None] = lambda line: None,
) -> Explanation:
    """Explains the first difference of two runs.

    Args:
        a: a run. Steps are made again with its config.
        b: the other run.
        rerun: whether to make steps again; otherwise only the records are compared.
        most_steps: the largest number of steps that one rerun may have.
        tell: called with a line of text when something that takes time begins.

    Raises:
        ConfigError: a run has no records, the runs have no steps in common, or a file can't be read.
    """
    first, second = steps_of(a), steps_of(b)
    for run, steps in ((a, first), (b, second)):
        if not steps:
            raise ConfigError(
                f"{run.path}: nothing to compare: no step is in its ledger.jsonl or metrics.jsonl (callback jsonl)"
            )
    common = [s for s in first.keys() & second.keys() if s]
    result = Explanation(str(a.path), str(b.path), False, "", len(common))
    result.first_batch, result.first_metric = first_batch(a, b), first_metric(a, b)
    result.largest = largest(first, second)
    incomparable = why_incomparable(a, b)
    if incomparable:
        result.conclusion = f"{incomparable}, so nothing was made again"
        return result
    if not common:
        raise ConfigError(f"{a.path} and {b.path} have no step in common, so there is nothing to compare")
    from_config, result.neutral = config_candidates(a.config, b.config)
    result.candidates = [*from_config, *environment_candidates(a, b)]
    for run, steps in ((a, first), (b, second)):
        if not any(s.metrics for s in steps.values()):
            result.notes.append(f"{run.path} has no metrics.jsonl: losses can't be compared, only batches")
        if "code" not in run.environment:
            result.notes.append(f"{run.path} is of an older version, which recorded neither code nor hardware")
    if max(first) != max(second):
        result.notes.append(f"the runs have {max(first)} and {max(second)} steps; the common ones are compared")
    if _is_equal(result, first, second, a):
        return result
    Bisection(a, b, first, second, result, rerun, most_steps, tell).run()
    return result


def _is_equal(result: Explanation, first: Steps, second: Steps, a: RunFolder) -> bool:
    """Whether the records are equal, bit for bit or within rounding. Fills in the conclusion."""
    apart = result.largest.distance if result.largest else 0.0
    steps = f"in all {result.common_steps} common steps"
    differ = "; ".join(c.text for c in result.candidates)
    if first_effect(first, second) is None:
        result.equal = True
        for candidate in result.candidates:
            candidate.status = "no effect"
        result.conclusion = f"the runs are equal, bit for bit, {steps}" + (
            f"; no effect: {differ}" if differ else "; nothing differs in what they were given"
        )
        return True
    tolerance = tolerance_of(a)
    only_rounding = all(c.kind in ONLY_ROUNDING for c in result.candidates)
    if only_rounding and first_effect(first, second, tolerance) is None:
        result.equal = True
        for candidate in result.candidates:
            candidate.status = "rounding"
        result.conclusion = f"the runs are equal within rounding {steps}: the largest relative difference is " + (
            f"{apart:.1e} ({result.largest.name} of step {result.largest.step})" if result.largest else "0"
        )
        result.conclusion += f"; no other effect: {differ}" if differ else "; nothing differs in what they were given"
        return True
    return False
