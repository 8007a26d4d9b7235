"""What a user should know when a run resumes with other settings than it was started with: a notice, not an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from myllm_ray.engine.scheduler import SchedulerManager, multiplier

_SECTIONS = ("optimizer", "scheduler", "gradient_clip", "accelerator.precision", "run.max_steps", "run.epochs")
"""Keys, and sections, that change what the steps to come compute. The trainer's own section as well."""
_JUMP = 1.25
"""How many times larger or smaller a learning rate is after a jump, at least."""


def resume_notices(saved: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """Lines about changed settings, and about a learning rate that jumps.

    Args:
        saved: the checkpoint's manifest.
        config: the config of the run that resumes, as plain data; secrets masked, as in the manifest.
    """
    step, then = int(saved["step"]), saved["config"]
    keys = [*_SECTIONS, config["trainer"]]
    changed = [change for key in keys for change in changes(key, _get(then, key), _get(config, key))]
    if not changed:
        return
    yield f"resuming after step {step} with changed settings: {'; '.join(changed)}"
    before, planned, after = _rate(then, step - 1), _rate(then, step), _rate(config, step)
    if before is None or planned is None or after is None or abs(after - planned) <= 0.01 * planned:
        return
    if not (1 / _JUMP <= after / max(before, 1e-300) <= _JUMP):
        yield f"the learning rate jumps from {before:.3g} in step {step} to {after:.3g} in step {step + 1}"


def changes(key: str, then: Any, now: Any) -> Iterator[str]:
    """Every value that differs, by dotted key."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in sorted({*then, *now}):
            yield from changes(f"{key}.{name}", then.get(name), now.get(name))
    elif then != now:
        yield f"{key} was {then!r}, now it is {now!r}"


def _get(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _rate(config: Mapping[str, Any], step: int) -> float | None:
    """The learning rate of a step (counted from 0); None where the number of steps is only known from the data."""
    total = _get(config, "run.max_steps")
    if step < 0 or total is None:
        return None
    return float(_get(config, "optimizer.lr") * multiplier(step, total, SchedulerManager(config=config).options))
