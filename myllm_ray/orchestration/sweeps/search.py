"""Searchers that choose values from the results of earlier trials. The other searches are planned in `space.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.tune.search import ConcurrencyLimiter, Searcher

from myllm_ray.common.extras import require
from myllm_ray.config.sweep import SweepConfig
from myllm_ray.orchestration.sweeps.space import domain_of, trials_of
from myllm_ray.orchestration.sweeps.trial import SCORE


class OptunaTrials(Searcher):
    """Optuna's TPE sampler (Bergstra et al., 2011) with numbered trials. Deterministic with `max_concurrent: 1`.

    Args:
        sweep: the sweep's config.
        numbers: numbers of the trials that have not ended yet.
        earlier: rows of trials that have ended. The sampler starts from their results.
    """

    def __init__(self, sweep: SweepConfig, numbers: Sequence[int], earlier: Sequence[dict[str, Any]]):
        super().__init__(metric=SCORE, mode=sweep.mode)
        require("optuna", "myllm_ray[search]", "search: optuna")
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        known = [row for row in earlier if row["score"] is not None]
        space: Any = {key: domain_of(d) for key, d in sweep.space.items()}
        self._inner = OptunaSearch(
            space,
            metric=SCORE,
            mode=sweep.mode,
            sampler=optuna.samplers.TPESampler(
                seed=sweep.seed, n_startup_trials=min(10, max(1, trials_of(sweep) // 3))
            ),
            points_to_evaluate=[row["values"] for row in known] or None,
            # Optuna takes these as observed results and does not run the points again.
            evaluated_rewards=[row["score"] for row in known] or None,
        )
        self._numbers = list(numbers)

    def suggest(self, trial_id: str) -> Any:
        if not self._numbers:
            return Searcher.FINISHED
        values = self._inner.suggest(trial_id)
        if not isinstance(values, dict):
            return values
        # Four significant digits, as in `space.py`: short numbers in files and tables.
        plain = {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in values.items()}
        return {"trial": {"number": self._numbers.pop(0), "values": plain}}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._inner.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        failed = error or not result or SCORE not in result
        self._inner.on_trial_complete(trial_id, None if failed else result, failed)

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: an interrupted sweep resumes from the trials that have ended, not from Tune's snapshots."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing (see `save`)."""


def limited(searcher: Searcher, at_a_time: int) -> Searcher:
    """Limits the number of open suggestions of a searcher.

    The searcher creates a trial only when the trial can run, so that it has the results of all earlier ones.

    Args:
        searcher: the searcher.
        at_a_time: number of trials that run at the same time.
    """
    return ConcurrencyLimiter(searcher, max_concurrent=at_a_time)
