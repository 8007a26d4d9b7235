"""Notices about settings that differ from those of the checkpoint that a run resumes from. They are not errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from myllm_ray.config.amendments import applied, value_of
from myllm_ray.engine.scheduler import SchedulerManager, multiplier

_SECTIONS = ("optimizer", "scheduler", "ema", "gradient_clip", "accelerator.precision", "run.max_steps", "run.epochs")
"""Keys and sections that change the results of later steps. The section of the trainer is compared in addition."""
_JUMP = 1.25
"""The smallest factor by which the learning rate must rise or fall to be reported as a jump."""


def resume_notices(saved: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """Yields lines about changed settings, and about a jump of the learning rate.

    Args:
        saved: the checkpoint's manifest.
        config: the config of the run that resumes, as plain data, with masked secrets as in the manifest.
    """
    step, then = int(saved["step"]), saved["config"]
    keys = [*_SECTIONS, config["trainer"]]
    changed = [change for key in keys for change in changes(key, value_of(then, key), value_of(config, key))]
    if not changed:
        return
    yield f"resuming after step {step} with changed settings: {'; '.join(changed)}"
    # A jump that the earlier schedule had planned, such as a decay in steps, is not reported.
    before, planned, after = rate(then, step - 1), rate(then, step), rate(config, step)
    if before is None or planned is None or after is None or abs(after - planned) <= 0.01 * planned:
        return
    if not (1 / _JUMP <= after / max(before, 1e-300) <= _JUMP):
        yield f"the learning rate jumps from {before:.3g} in step {step} to {after:.3g} in step {step + 1}"


def changes(key: str, then: Any, now: Any) -> Iterator[str]:
    """Yields one text for each value that differs, with its dotted key."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in sorted({*then, *now}):
            yield from changes(f"{key}.{name}", then.get(name), now.get(name))
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for number, (before, after) in enumerate(zip(then, now, strict=True)):
            yield from changes(f"{key}.{number}", before, after)
    elif then != now:
        yield f"{key} was {then!r}, now it is {now!r}"


def rate(config: Mapping[str, Any], step: int) -> float | None:
    """Returns the learning rate of a step (counted from 0), or None if the config gives no number of steps."""
    config = applied(config, step)
    total = value_of(config, "run.max_steps")
    if step < 0 or total is None:
        return None
    return float(value_of(config, "optimizer.lr") * multiplier(step, total, SchedulerManager(config=config).section))
