"""Builds Ray Tune's schedulers, which stop, pause or change trials, with all intervals in optimizer steps."""

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
    """Returns the number of steps that a trial runs before it can be stopped.

    Args:
        sweep: the sweep's config.
        steps: steps of a whole trial.
    """
    return sweep.scheduler.grace_steps or max(1, math.ceil(steps / _GRACE))


def report_interval(sweep: SweepConfig, base: TrainerConfig, steps: int) -> int:
    """Returns the number of steps between two reports: a multiple of the interval at which the metric is logged.

    Args:
        sweep: the sweep's config.
        base: the config of a trial.
        steps: steps of a whole trial.

    Raises:
        ConfigError: the metric needs held-out data that the config does not have, or the scheduler stops trials and the
            metric is known only at their end.
    """
    name = sweep.scheduler.name
    wanted = {
        "fifo": math.ceil(steps / _REPORTS),
        "asha": grace_steps(sweep, steps),
        "median": math.ceil(steps / _REPORTS),
        "hyperband": math.ceil(steps / _HYPERBAND_REPORTS),
        "pbt": sweep.scheduler.every_steps or math.ceil(steps / _EXCHANGES),
    }[name]
    wanted = sweep.report_every or wanted
    if sweep.metric.startswith("validation_"):
        if base.data.validation is None:
            raise ConfigError(
                f"metric: {sweep.metric} needs held-out data: give base.data.validation, such as {{split: 0.05}}"
            )
        known = base.evaluation.every_steps
        if known is None and name != "fifo":
            raise ConfigError(
                f"metric: {sweep.metric} is known only at a trial's end, too late for {name}: "
                f"set base.evaluation.every_steps, such as {wanted}"
            )
    else:
        known = base.logging.every_steps
    return math.ceil(wanted / known) * known if known else max(wanted, steps)


def build_scheduler(
    sweep: SweepConfig, steps: int, every: int, earlier: Iterable[dict[str, Any]] = ()
) -> TrialScheduler:
    """Builds Tune's scheduler.

    Args:
        sweep: the sweep's config.
        steps: steps of a trial that is not stopped.
        every: steps between two reports.
        earlier: rows of trials that ended before an interruption. ASHA and median compare new trials with them.
    """
    options = sweep.scheduler
    scheduler: TrialScheduler
    if options.name == "asha":
        scheduler = ASHAScheduler(
            time_attr="step",
            max_t=max(steps, grace_steps(sweep, steps)),
            grace_period=grace_steps(sweep, steps),
            reduction_factor=options.reduction_factor,
        )
    elif options.name == "hyperband":
        # Counts reports instead of steps: HyperBand can pause a trial only at a report.
        scheduler = HyperBandScheduler(
            time_attr="report", max_t=max(1, math.ceil(steps / every)), reduction_factor=options.reduction_factor
        )
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
    """Median stopping rule that lets a trial continue while there are too few others to compare with.

    Tune's own rule pauses such a trial, and each pause needs a checkpoint.
    """

    def _on_insufficient_samples(self, tune_controller: Any, trial: TuneTrial, time: float) -> str:
        return TrialScheduler.CONTINUE


class _Earlier:
    """Placeholder for a trial that ended before an interruption."""

    def __init__(self, name: str):
        self.trial_id = f"earlier-{name}"


def _replay(scheduler: TrialScheduler, row: dict[str, Any]) -> None:
    # Passes the recorded reports to the scheduler, as if the trial had run in this session.
    trial: Any = _Earlier(row["trial"])
    no_controller: Any = None
    scheduler.on_trial_add(no_controller, trial)
    for step, score in row["reports"]:
        scheduler.on_trial_result(no_controller, trial, {"step": step, SCORE: score})
    scheduler.on_trial_complete(
        no_controller, trial, {"step": row["step"], SCORE: row["score"]} if row["score"] is not None else {}
    )


class SeededPBT(PopulationBasedTraining):
    """Population-based training with reproducible exchanges (Jaderberg et al., 2017, §4).

    All members wait for each other at an exchange. A member's donor and its changes of the values depend only on the
    seed, the step and the member's number. Continuous values are multiplied by 0.8 or 1.2, within the key's bounds.
    Choices move to a neighbour in the list. With probability `resample` a value is drawn from its distribution instead.

    Tune's own class uses the process's random state, and it waits without limit if a member fails while the others wait
    for it.

    Args:
        sweep: the sweep's config.
        every: steps between two exchanges.
    """

    def __init__(self, sweep: SweepConfig, every: int):
        super().__init__(
            time_attr="step",
            metric=SCORE,
            mode=sweep.mode,
            perturbation_interval=every,
            synch=True,
            log_config=False,
            quantile_fraction=sweep.scheduler.quantile,
            hyperparam_mutations={},
            custom_explore_fn=lambda config: config,
        )
        self._sweep = sweep

    def _checkpoint_or_exploit(
        self, trial: TuneTrial, tune_controller: Any, upper_quantile: list[TuneTrial], lower_quantile: list[TuneTrial]
    ) -> None:
        state = random.getstate()  # Tune chooses the donor with the global generator
        random.seed(
            derive_seed("pbt donor", self._sweep.seed, _number(trial), self._trial_state[trial].last_train_time)
        )
        try:
            super()._checkpoint_or_exploit(trial, tune_controller, upper_quantile, lower_quantile)
        finally:
            random.setstate(state)

    def _get_new_config(self, trial: TuneTrial, trial_to_clone: TuneTrial) -> tuple[dict[str, Any], dict[str, Any]]:
        # Tune's own mutations are replaced (`hyperparam_mutations` is empty), because they use the global generator.
        step, number = int(self._trial_state[trial].last_train_time), _number(trial)
        config = copy.deepcopy(trial.config)
        values = trial_to_clone.config["trial"]["values"]
        config["trial"]["values"] = {
            key: explore(self._sweep, key, value, number, step) for key, value in values.items()
        }
        return config, {}

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        self._without(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        self._without(tune_controller, trial)

    def _without(self, controller: Any, trial: TuneTrial) -> None:
        """Handles the end of a member. If all other members wait for it, runs the exchange without it."""
        self._trial_state[trial].last_score = None  # excludes it from the quantiles
        others = [t for t in controller.get_live_trials() if t is not trial]
        due = self._next_perturbation_sync
        if not others or any(
            t.status != TuneTrial.PAUSED or self._trial_state[t].last_train_time < due for t in others
        ):
            return
        lower, upper = self._quantiles()
        # The best members first: their checkpoints must exist before the worst members take them over.
        for member in [*upper, *(t for t in others if t not in upper and t not in lower), *lower]:
            self._trial_state[member].last_perturbation_time = int(due)
            self._checkpoint_or_exploit(member, controller, upper, lower)
        self._next_perturbation_sync = max(
            due + self._perturbation_interval, *(self._trial_state[t].last_train_time for t in others)
        )


def explore(sweep: SweepConfig, key: str, value: Any, number: int, at: int) -> Any:
    """Returns a value near `value` for an exchange.

    Args:
        sweep: the sweep's config.
        key: the dotted key.
        value: the donor's value.
        number: number of the trial that takes over.
        at: step of the exchange.
    """
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
