"""Learning-rate schedules. The multiplier is a function of the optimizer step only.

A resume therefore needs no state other than the step, and the number of calls of a backend cannot change the schedule.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

import torch

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import load_object
from myllm_ray.config.scheduler_section import SchedulerSection
from myllm_ray.config.validation import section_of

Decay = Callable[[float, SchedulerSection], float]
"""(progress of the decay in [0, 1], section) -> share of the learning rate that remains, before `min_lr_ratio`."""

DECAYS: dict[str, Decay] = {
    "constant": lambda progress, section: 1.0,
    "linear": lambda progress, section: 1.0 - progress,
    "cosine": lambda progress, section: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "cosine_with_restarts": lambda progress, section: (
        0.0 if progress >= 1 else 0.5 * (1.0 + math.cos(math.pi * ((section.cycles * progress) % 1.0)))
    ),
    "polynomial": lambda progress, section: (1.0 - progress) ** section.power,
    # Increases by the same factor in every step, from min_lr_ratio to 1: the range test of Smith (2015,
    # arXiv:1506.01186). `multiplier` adds min_lr_ratio again, which is subtracted and divided out here.
    "range_test": lambda progress, section: (
        (section.min_lr_ratio ** (1.0 - progress) - section.min_lr_ratio) / max(1e-12, 1.0 - section.min_lr_ratio)
    ),
    "wsd": lambda progress, section: min(1.0, (1.0 - progress) / section.decay_ratio),
}


def multiplier(step: int, total_steps: int, section: SchedulerSection) -> float:
    """Returns the factor of the learning rate in an optimizer step.

    The warm-up is linear and never 0: step s of w has the factor (s + 1) / w. The decay then runs from 1 to
    `min_lr_ratio` at `decay_steps` (default: `total_steps`). `wsd` (warm-up, stable, decay; Hu et al., 2024,
    arXiv:2404.06395) stays at 1 until the last `decay_ratio` of all steps. `inverse_sqrt` (Vaswani et al., 2017, §5.3)
    is sqrt(w / step) after the warm-up.

    With `start_step` b, all of this holds for step - b in a run of `total_steps` - b steps: the schedule begins at b.

    Args:
        step: the optimizer step, counted from 0.
        total_steps: number of optimizer steps of the run.
        section: the config of the schedule.
    """
    start = section.start_step or 0
    step, total_steps = max(0, step - start), total_steps - start
    warmup, end = warmup_steps(total_steps, section), section.decay_steps or total_steps
    if step < warmup:
        return (step + 1) / warmup
    if section.name == "inverse_sqrt":
        return float(max(section.min_lr_ratio, math.sqrt(max(1, warmup) / max(1, warmup, step + 1))))
    begin = 0 if section.name == "wsd" else warmup  # wsd: decay_ratio is a share of all steps, including the warm-up
    progress = min(1.0, (step - begin) / max(1, end - begin))
    decay = DECAYS.get(section.name) or _custom(section.name)
    return float(section.min_lr_ratio + (1.0 - section.min_lr_ratio) * decay(progress, section))


def warmup_steps(total_steps: int, section: SchedulerSection) -> int:
    """Returns the length of the warm-up in steps, from `warmup_steps` or `warmup_ratio`."""
    return int(section.warmup_steps or round((section.warmup_ratio or 0.0) * total_steps))


def _custom(path: str) -> Decay:
    """Returns a custom schedule, fn(progress) -> multiplier, by import path."""
    function = load_object(path, "scheduler.name")
    return lambda progress, section: float(function(progress))


class SchedulerManager:
    """Sets the learning rate of every parameter group in every optimizer step.

    Args:
        optimizer: the optimizer; `build` replaces it by that of a backend.
        config: a run's config, as a `TrainerConfig` or a plain dict. Only its section `scheduler` is read.
        total_steps: number of optimizer steps of the run; set by the engine.

    Raises:
        ConfigError: there is no such schedule.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None, config: Any = None, total_steps: int = 1):
        self.section = section_of(config, "scheduler", SchedulerSection)
        name = self.section.name
        if ":" in name:
            _custom(name)
        elif name not in DECAYS and name != "inverse_sqrt":
            known = [*DECAYS, "inverse_sqrt"]
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"scheduler.name: unknown name {name!r}; {hint}choose from {', '.join(sorted(known))}")
        self.total_steps = total_steps
        self.step_number = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._base: list[float] = []
        if optimizer is not None:
            self.build(optimizer)

    def build(self, optimizer: torch.optim.Optimizer) -> SchedulerManager:
        """Attaches an optimizer, whose current learning rates become the base rates, and returns this manager."""
        self._optimizer = optimizer
        # A group that was attached before keeps its base rate: its `lr` already contains the multiplier.
        self._base = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, self._base, strict=True):
            group["initial_lr"] = rate  # the key that the schedulers of torch use
        self.set_step(self.step_number)
        return self

    def set_step(self, step: int) -> None:
        """Sets the learning rates for optimizer step `step`, counted from 0."""
        self.step_number = step
        if self._optimizer is None:
            return
        factor = multiplier(step, self.total_steps, self.section)
        for group, rate in zip(self._optimizer.param_groups, self._base, strict=True):
            group["lr"] = rate * factor

    def step(self) -> None:
        """Sets the learning rates for the next optimizer step."""
        self.set_step(self.step_number + 1)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first group in the next optimizer step; 0 without an optimizer."""
        return float(self._optimizer.param_groups[0]["lr"]) if self._optimizer is not None else 0.0
