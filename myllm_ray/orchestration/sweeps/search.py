"""Searchers that learn from earlier trials. (What needs no learning is planned in `space.py`.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.tune.search import ConcurrencyLimiter, Searcher

from myllm_ray.common.extras import require
from myllm_ray.config.sweep import SweepConfig
from myllm_ray.orchestration.sweeps.space import domain_of, trials_of
from myllm_ray.orchestration.sweeps.trial import SCORE


class OptunaTrials(Searcher):
    """Optuna's TPE sampler (Bergstra et al., 2011), with numbered trials. Deterministic with max_concurrent: 1.

    Args:
        numbers: of the trials to come; those between that exist already are in `earlier`.
        earlier: rows of trials that have ended: the sampler starts from what they found.
    """

    def __init__(self, sweep: SweepConfig, numbers: Sequence[int], earlier: Sequence[dict[str, Any]]):
        super().__init__(metric=SCORE, mode=sweep.mode)
        require("optuna", "myllm_ray[search]", "search: optuna")
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        known = [row for row in earlier if row["score"] is not None]
        space: Any = {key: domain_of(d) for key, d in sweep.space.items()}
        self._inner = OptunaSearch(space, metric=SCORE, mode=sweep.mode,
                                   sampler=optuna.samplers.TPESampler(seed=sweep.seed, n_startup_trials=min(10, max(1, trials_of(sweep) // 3))),
                                   points_to_evaluate=[row["values"] for row in known] or None,
                                   evaluated_rewards=[row["score"] for row in known] or None)
        self._numbers = list(numbers)

    def suggest(self, trial_id: str) -> Any:
        if not self._numbers:
            return Searcher.FINISHED
        values = self._inner.suggest(trial_id)
        if not isinstance(values, dict):
            return values
        plain = {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in values.items()}
        return {"trial": {"number": self._numbers.pop(0), "values": plain}}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._inner.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        failed = error or not result or SCORE not in result
        self._inner.on_trial_complete(trial_id, None if failed else result, failed)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: an interrupted sweep starts from the trials that have ended (`earlier`), not from Tune's snapshots."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


def limited(searcher: Searcher, at_a_time: int) -> Searcher:
    """Asked for a new trial only when one can run, so that it knows what the earlier ones found."""
    return ConcurrencyLimiter(searcher, max_concurrent=at_a_time)
