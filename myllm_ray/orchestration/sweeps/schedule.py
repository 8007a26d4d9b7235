"""Which trials are stopped, paused or changed, and when they are looked at: Ray Tune's schedulers, in optimizer steps."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from myllm_ray.common.seeds import derive_seed, generator
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sweep import SweepConfig
from myllm_ray.orchestration.sweeps.space import draw
from myllm_ray.orchestration.sweeps.trial import SCORE

_REPORTS = 20
_HYPERBAND_REPORTS = 9
_GRACE, _EXCHANGES = 10, 5


def grace_steps(sweep: SweepConfig, steps: int) -> int:
    """Steps of a trial before it can be stopped."""
    return sweep.scheduler.grace_steps or max(1, math.ceil(steps / _GRACE))


def report_interval(sweep: SweepConfig, base: TrainerConfig, steps: int) -> int:
    """Steps between two reports: what the scheduler asks for, but not more often than the metric is logged.

    Raises:
        ConfigError: a scheduler that stops trials, and a metric that is only known at their end.
    """
    name = sweep.scheduler.name
    wanted = {"fifo": math.ceil(steps / _REPORTS), "asha": grace_steps(sweep, steps), "median": math.ceil(steps / _REPORTS),
              "hyperband": math.ceil(steps / _HYPERBAND_REPORTS), "pbt": sweep.scheduler.every_steps or math.ceil(steps / _EXCHANGES)}[name]
    wanted = sweep.report_every or wanted
    if sweep.metric.startswith("validation_"):
        if base.data.validation is None:
            raise ConfigError(f"metric: {sweep.metric} needs held-out data: give base.data.validation, such as {{split: 0.05}}")
        known = base.evaluation.every_steps
        if known is None and name != "fifo":
            raise ConfigError(f"metric: {sweep.metric} is only known at a trial's end, too late for {name}: give base.evaluation.every_steps, "
                              f"such as {wanted}")
    else:
        known = base.logging.every_steps
    return math.ceil(wanted / known) * known if known else max(wanted, steps)


def build_scheduler(sweep: SweepConfig, steps: int, every: int, earlier: Iterable[dict[str, Any]] = ()) -> TrialScheduler:
    """Tune's scheduler.

    Args:
        steps: of a trial that is not stopped.
        every: steps between two reports.
        earlier: rows of trials that ended before an interruption: asha and median go on measuring by them.
    """
    options = sweep.scheduler
    scheduler: TrialScheduler
    if options.name == "asha":
        scheduler = ASHAScheduler(time_attr="step", max_t=max(steps, grace_steps(sweep, steps)), grace_period=grace_steps(sweep, steps),
                                  reduction_factor=options.reduction_factor)
    elif options.name == "hyperband":
        scheduler = HyperBandScheduler(time_attr="report", max_t=max(1, math.ceil(steps / every)), reduction_factor=options.reduction_factor)
    elif options.name == "median":
        scheduler = _Median(time_attr="step", grace_period=grace_steps(sweep, steps))
    elif options.name == "pbt":
        return SeededPBT(sweep, every)
    else:
        return FIFOScheduler()
    scheduler.set_search_properties(SCORE, sweep.mode)
    if options.name in ("asha", "median"):
        for row in earlier:
            _replay(scheduler, row)
    return scheduler


class _Median(MedianStoppingRule):
    """Goes on while there is too little to compare with. Tune's own pauses trials then, which would cost each of them a checkpoint."""

    def _on_insufficient_samples(self, tune_controller: Any, trial: TuneTrial, time: float) -> str:
        return TrialScheduler.CONTINUE


class _Earlier:
    """Stands for a trial that ended before an interruption."""

    def __init__(self, name: str):
        self.trial_id = f"earlier-{name}"


def _replay(scheduler: TrialScheduler, row: dict[str, Any]) -> None:
    trial: Any = _Earlier(row["trial"])
    nobody: Any = None
    scheduler.on_trial_add(nobody, trial)
    for step, score in row["reports"]:
        scheduler.on_trial_result(nobody, trial, {"step": step, SCORE: score})
    scheduler.on_trial_complete(nobody, trial, {"step": row["step"], SCORE: row["score"]} if row["score"] is not None else {})


class SeededPBT(PopulationBasedTraining):
    """Population-based training whose exchanges are the same every time: all members wait for each other at an exchange, and whom
    a member takes over from, and how it changes the values, depends on the seed, the step and its number.

    Continuous values are multiplied by 0.8 or 1.2, within the key's bounds; choices move to a neighbour in the list; `resample` of the
    time a value is drawn anew (Jaderberg et al., 2017, §4). Tune's own class draws from the process's random numbers, and waits
    for ever when a member fails while the others wait for it.
    """

    def __init__(self, sweep: SweepConfig, every: int):
        super().__init__(time_attr="step", metric=SCORE, mode=sweep.mode, perturbation_interval=every, synch=True, log_config=False,
                         quantile_fraction=sweep.scheduler.quantile, hyperparam_mutations={}, custom_explore_fn=lambda config: config)
        self._sweep = sweep

    def _checkpoint_or_exploit(self, trial: TuneTrial, tune_controller: Any, upper_quantile: list[TuneTrial],
                               lower_quantile: list[TuneTrial]) -> None:
        state = random.getstate()  # Tune chooses the donor with it
        random.seed(derive_seed("pbt donor", self._sweep.seed, _number(trial), self._trial_state[trial].last_train_time))
        try:
            super()._checkpoint_or_exploit(trial, tune_controller, upper_quantile, lower_quantile)
        finally:
            random.setstate(state)

    def _get_new_config(self, trial: TuneTrial, trial_to_clone: TuneTrial) -> tuple[dict[str, Any], dict[str, Any]]:
        step, number = int(self._trial_state[trial].last_train_time), _number(trial)
        config = copy.deepcopy(trial.config)
        values = trial_to_clone.config["trial"]["values"]
        config["trial"]["values"] = {key: explore(self._sweep, key, value, number, step) for key, value in values.items()}
        return config, {}

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        self._without(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        self._without(tune_controller, trial)

    def _without(self, controller: Any, trial: TuneTrial) -> None:
        """A member has ended; if the others have only been waiting for it, this is the exchange."""
        self._trial_state[trial].last_score = None
        others = [t for t in controller.get_live_trials() if t is not trial]
        due = self._next_perturbation_sync
        if not others or any(t.status != TuneTrial.PAUSED or self._trial_state[t].last_train_time < due for t in others):
            return
        lower, upper = self._quantiles()
        for member in [*upper, *(t for t in others if t not in upper and t not in lower), *lower]:
            self._trial_state[member].last_perturbation_time = int(due)
            self._checkpoint_or_exploit(member, controller, upper, lower)
        self._next_perturbation_sync = max(due + self._perturbation_interval, *(self._trial_state[t].last_train_time for t in others))


def explore(sweep: SweepConfig, key: str, value: Any, number: int, at: int) -> Any:
    """A value near one that did well, for trial `number` at an exchange at step `at`."""
    dimension, rng = sweep.space[key], generator("pbt explore", sweep.seed, key, number, at)
    if rng.random() < sweep.scheduler.resample:
        return draw(sweep, key, number, at)
    up = rng.random() < 0.5
    if dimension.kind == "choice":
        place = dimension.values.index(value) + (1 if up else -1)
        return dimension.values[min(max(place, 0), len(dimension.values) - 1)]
    low, high = dimension.values[:2]
    changed = min(max(value * (1.2 if up else 0.8), low), high)
    if dimension.kind == "randint":
        return min(round(changed), high - 1)
    if dimension.kind == "quniform":
        step = dimension.values[2]
        return float(round(changed / step) * step)
    return float(f"{changed:.4g}")


def _number(trial: TuneTrial) -> int:
    return int(trial.config["trial"]["number"])
