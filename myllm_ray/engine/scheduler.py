"""Learning-rate schedules: the multiplier is a pure function of the optimizer step.

Because it is, a resume needs no state but the step, and no backend can step it a wrong number of times.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

import torch

from myllm_ray.common.types import as_mapping
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import load_object

Decay = Callable[[float, dict[str, Any]], float]
"""(progress through the decay in [0, 1], options) -> what is left of the learning rate, before `min_lr_ratio`."""

DECAYS: dict[str, Decay] = {
    "constant": lambda progress, options: 1.0,
    "linear": lambda progress, options: 1.0 - progress,
    "cosine": lambda progress, options: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "cosine_with_restarts": lambda progress, options: (
        0.0 if progress >= 1 else 0.5 * (1.0 + math.cos(math.pi * ((options["cycles"] * progress) % 1.0)))),
    "polynomial": lambda progress, options: (1.0 - progress) ** options["power"],
    # Grows by the same factor in every step, from min_lr_ratio to 1: the range test of Smith (2015, arXiv:1506.01186).
    "range_test": lambda progress, options: (
        (options["min_lr_ratio"] ** (1.0 - progress) - options["min_lr_ratio"]) / max(1e-12, 1.0 - options["min_lr_ratio"])),
    "wsd": lambda progress, options: min(1.0, (1.0 - progress) / options["decay_ratio"]),
}
_DEFAULTS: dict[str, Any] = {"name": "constant", "warmup_steps": None, "warmup_ratio": None, "min_lr_ratio": 0.0,
                             "decay_steps": None, "decay_ratio": 0.2, "cycles": 1, "power": 1.0}


def multiplier(step: int, total_steps: int, options: dict[str, Any]) -> float:
    """What the learning rate is multiplied with in optimizer step `step` (counted from 0).

    Warm-up is linear and never 0: step s of w has (s + 1) / w. Then the decay runs from 1 to `min_lr_ratio` at
    `decay_steps` (default: `total_steps`). `wsd` (warm-up, stable, decay; Hu et al., 2024, arXiv:2404.06395) stays at 1
    until the last `decay_ratio` of all steps. `inverse_sqrt` (Vaswani et al., 2017, §5.3) is sqrt(w / step) after warm-up.
    """
    warmup, end = warmup_steps(total_steps, options), options["decay_steps"] or total_steps
    if step < warmup:
        return (step + 1) / warmup
    if options["name"] == "inverse_sqrt":
        return float(max(options["min_lr_ratio"], math.sqrt(max(1, warmup) / max(1, warmup, step + 1))))
    begin = 0 if options["name"] == "wsd" else warmup  # wsd: the share that decays is of all steps, warm-up included
    progress = min(1.0, (step - begin) / max(1, end - begin))
    decay = DECAYS.get(options["name"]) or (lambda p, o: o["function"](p))
    return float(options["min_lr_ratio"] + (1.0 - options["min_lr_ratio"]) * decay(progress, options))


def warmup_steps(total_steps: int, options: dict[str, Any]) -> int:
    """Warm-up in steps, also where it was given as a ratio."""
    return int(options["warmup_steps"] or round((options["warmup_ratio"] or 0.0) * total_steps))


class SchedulerManager:
    """Sets the learning rate of every parameter group, step by step.

    Args:
        optimizer: may be replaced by `build`, when a backend builds its own.
        config: a run's config (its `scheduler` section is read), as a model or as a plain dict.
        total_steps: length of the run; the engine sets it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None, config: Any = None, total_steps: int = 1):
        section = as_mapping(config).get("scheduler") or {}
        self.options = {**_DEFAULTS, **section}
        name = str(self.options["name"])
        if ":" in name:
            self.options["function"] = load_object(name, "scheduler.name")
        elif name not in DECAYS and name != "inverse_sqrt":
            known = [*DECAYS, "inverse_sqrt"]
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"scheduler.name: there is no {name!r}; {hint}choose from {', '.join(sorted(known))}")
        self.total_steps = total_steps
        self.step_number = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._base: list[float] = []
        if optimizer is not None:
            self.build(optimizer)

    def build(self, optimizer: torch.optim.Optimizer) -> SchedulerManager:
        """Take over an optimizer; its groups' rates at this moment are the base rates."""
        self._optimizer = optimizer
        self._base = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, self._base, strict=True):
            group["initial_lr"] = rate
        self.set_step(self.step_number)
        return self

    def set_step(self, step: int) -> None:
        """Set the learning rates for optimizer step `step` (counted from 0)."""
        self.step_number = step
        if self._optimizer is None:
            return
        factor = multiplier(step, self.total_steps, self.options)
        for group, rate in zip(self._optimizer.param_groups, self._base, strict=True):
            group["lr"] = rate * factor

    def step(self) -> None:
        """Go on to the next optimizer step."""
        self.set_step(self.step_number + 1)

    @property
    def learning_rate(self) -> float:
        """The first group's rate in the step to come."""
        return float(self._optimizer.param_groups[0]["lr"]) if self._optimizer is not None else 0.0
