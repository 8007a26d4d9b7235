"""`sweep(...)`: runs one config with different values as trials in Ray Tune, and writes `best.yaml`.

Tune decides when each trial runs and which trials are stopped. The inputs and results of its decisions are recorded in
the sweep's folder (`results.py`). An interrupted sweep is resumed from there; Tune's own snapshots are not used.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from ray import tune

from myllm_ray.common.files import read_jsonl, write_json
from myllm_ray.common.signals import stop_on_signals
from myllm_ray.config.errors import ConfigError, UserError
from myllm_ray.config.load import read_file, validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sweep import CHECKPOINTED, SweepConfig, run_config, validate_sweep
from myllm_ray.data.prepare import PreparedData
from myllm_ray.engine.run_folder import resume_source
from myllm_ray.orchestration import session
from myllm_ray.orchestration.cluster import check_size, cpus_needed, fitting, on_a_worker, slots, worker_resources
from myllm_ray.orchestration.environment import environment_variables
from myllm_ray.orchestration.failures import clearly
from myllm_ray.orchestration.micro_size import with_micro_size
from myllm_ray.orchestration.ray_data import map_units
from myllm_ray.orchestration.sweeps.callback import Budget, SweepCallback, remove_leftover
from myllm_ray.orchestration.sweeps.console import SweepConsole
from myllm_ray.orchestration.sweeps.report import write_report
from myllm_ray.orchestration.sweeps.results import Row, SweepFolder, SweepResult, result_of
from myllm_ray.orchestration.sweeps.schedule import build_scheduler, report_interval
from myllm_ray.orchestration.sweeps.search import OptunaTrials, limited
from myllm_ray.orchestration.sweeps.space import dimensions_from, plan, trials_of
from myllm_ray.orchestration.sweeps.trial import Shared, Trial, in_process, name_of
from myllm_ray.preparation import absolute, check_model, check_names, prepare_data

log = logging.getLogger(__name__)
_DATA = ("data.", "tokenizer.", "batch.", "run.seed")
"""Prefixes of the keys that determine the prepared data."""
_MICRO_SIZE = "micro_size.json"
"""File with the result of `batch.micro_size: auto`."""
_HEAD = "node:__internal_head__"
_OF_OTHERS = 0.002
"""Share of the head node's resource left free per trial: Ray Train reserves a little of it for every worker group."""
_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs write their metrics themselves
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `stop_on_signals` handles it: trials save a checkpoint first
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no metric
    "TUNE_FORCE_TRIAL_CLEANUP_S": "30",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's snapshots are not used
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",
}


def sweep(
    base: SweepConfig | TrainerConfig | Mapping[str, Any] | str | Path,
    space: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    verbose: bool = False,
    **settings: Any,
) -> SweepResult:
    """Searches for the best values of some keys of a run's config.

    Args:
        base: the run's config as a model, a mapping, or the path of its file. Alternatively a whole `SweepConfig`,
            without `space` and `settings`.
        space: {dotted key: a distribution of `ray.tune`, or {"loguniform": [1e-5, 1e-2]} as in a sweep's file}.
        resume: resume an interrupted sweep. Trials that have ended are kept.
        verbose: show Ray's own logs.
        **settings: the other keys of a sweep's file: `metric`, `mode`, `trials`, `search`, `scheduler`,
            `max_concurrent`, `budget`, `run`, `seed`, ...

    Returns:
        The result of the sweep.

    Raises:
        UserError: one line that says what is wrong and what to do. A failed trial is no error unless all trials fail.
    """
    if isinstance(base, SweepConfig):
        given = [*(["space"] if space is not None else []), *settings]
        if given:
            raise ConfigError(f"sweep: a SweepConfig contains {', '.join(given)} already: change it there")
    else:
        raw = (
            read_file(Path(base))
            if isinstance(base, (str, Path))
            else base.model_dump(mode="json")
            if isinstance(base, TrainerConfig)
            else dict(base)
        )
        base = validate_sweep({"base": raw, "space": dimensions_from(space or {}), **settings})
    return _Sweep(base, resume, verbose).run()


class _Sweep:
    def __init__(self, config: SweepConfig, resume: bool, verbose: bool):
        self.sweep = config.model_copy(deep=True)
        # Absolute paths are valid wherever a trial runs. Prepared data is shared with runs of the base config.
        self.sweep.base = absolute(validate(cast(Mapping[str, Any], self.sweep.base))).model_dump(mode="json")
        self.base = absolute(run_config(self.sweep, {}, "trial", self.sweep.run.storage))
        self.folder = SweepFolder(self.sweep)
        self.resume, self.verbose = resume, verbose

    def run(self) -> SweepResult:
        check_names(self.base)
        self._check_fork()
        report_interval(self.sweep, self.base, 1)  # raises for a metric known too late, before anything is written
        self.folder.claim(self.resume)
        if (self.folder.path / _MICRO_SIZE).exists():
            self._take_micro_size(json.loads((self.folder.path / _MICRO_SIZE).read_text(encoding="utf-8")))
        if len(self.folder.rows) >= trials_of(self.sweep):
            return self._ended(None)
        log.info("connecting to Ray")
        wanted = self.sweep.max_concurrent if isinstance(self.sweep.max_concurrent, int) else 1
        started = session.connect(self.base, self.verbose, wanted * self._cpus())
        try:
            return self._run_trials()
        finally:
            if started:
                ray.shutdown()

    def _find_micro_size(self) -> None:
        """Finds the micro-batch size once for all trials, and records it for a resumed sweep."""
        if self.base.batch.find_micro_size:
            found = with_micro_size(self.base, on_a_worker(self.base)).batch.micro_size
            write_json(self.folder.path / _MICRO_SIZE, found)
            self._take_micro_size(found)

    def _take_micro_size(self, found: int) -> None:
        cast(dict[str, Any], self.sweep.base)["batch"] |= {"micro_size": found, "find_micro_size": False}
        self.base = absolute(run_config(self.sweep, {}, "trial", self.sweep.run.storage))

    def _check_fork(self) -> None:
        if self.sweep.fork_from is not None:
            self.sweep.fork_from = str(resume_source(self.sweep.fork_from).absolute())

    def _run_trials(self) -> SweepResult:
        self._check_resources()
        self._find_micro_size()
        prepared = clearly(partial(prepare_data, self.base, map_units))
        check_model(self.base, prepared)
        steps = _steps(self.base, prepared)
        shared = Shared(
            self.sweep,
            str(self.folder.trials),
            report_interval(self.sweep, self.base, steps),
            self.sweep.scheduler.name in CHECKPOINTED,
        )
        planned = self._planned()
        at_a_time = self._at_a_time()
        total = trials_of(self.sweep)
        log.info(
            "%d trials, %d at a time%s: %s",
            total,
            at_a_time,
            f" ({len(self.folder.rows)} ended earlier)" if self.folder.rows else "",
            self.folder.path,
        )
        budget = Budget(self.sweep.budget, self.folder.rows)
        with SweepConsole(self.sweep, total) as display:
            callback = SweepCallback(self.folder, display, budget)
            with stop_on_signals(callback.interrupt), environment_variables(_TUNE):
                self._tuner(shared, planned, steps, at_a_time, callback, budget).fit()
        # Trials that ended in the last seconds, or were interrupted, may have left a placement group.
        for folder in self.folder.trials.glob("*"):
            remove_leftover(folder)
        return self._ended(callback.interrupted or (budget.reason if len(self.folder.rows) < total else None))

    def _planned(self) -> list[Row] | None:
        """Returns the numbers and values of the trials that have not ended, or None if a searcher chooses them.

        Raises:
            ConfigError: the values of every remaining trial are invalid.
        """
        values = plan(self.sweep)
        if values is None:
            return None
        ended = {row["trial"] for row in self.folder.rows}
        left: list[Row] = [
            {"number": n, "values": self._last_values(n, v)} for n, v in enumerate(values) if name_of(n) not in ended
        ]
        problems = []
        for trial in left:
            try:
                config = run_config(self.sweep, trial["values"], name_of(trial["number"]), str(self.folder.trials))
            except ConfigError as error:
                problems.append(str(error))
                continue
            if any(
                key.startswith(_DATA) for key in trial["values"]
            ):  # here, so that trials do not prepare the same data at the same time
                clearly(partial(prepare_data, absolute(config), map_units))
        if left and len(problems) == len(left):
            raise ConfigError(f"no trial of the sweep can run: {problems[0]}")
        return left

    def _last_values(self, number: int, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the values that a member of a population had when the sweep was interrupted, else `values`."""
        for row in read_jsonl(self.folder.trials / name_of(number) / "lineage.jsonl"):
            values = row["values"]
        return values

    def _tuner(
        self,
        shared: Shared,
        planned: list[Row] | None,
        steps: int,
        at_a_time: int,
        callback: SweepCallback,
        budget: Budget,
    ) -> tune.Tuner:
        search: dict[str, Any] = {}
        if planned is None:
            ended = {row["trial"] for row in self.folder.rows}
            numbers = [n for n in range(trials_of(self.sweep)) if name_of(n) not in ended]
            space: dict[str, Any] = {}
            search = {
                "search_alg": limited(OptunaTrials(self.sweep, numbers, self.folder.rows), at_a_time),
                "num_samples": len(numbers),
            }
        else:
            space = {"trial": tune.grid_search(planned)}
        trainable = tune.with_resources(tune.with_parameters(Trial, shared=shared), self._resources(at_a_time))
        return tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
                scheduler=build_scheduler(self.sweep, steps, shared.every, self.folder.rows),
                **search,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(self.folder.path / ".tune"),
                verbose=0,
                stop=budget,
                callbacks=[callback],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=max(0, self.base.scaling.max_failures)),
            ),
        )

    def _resources(self, at_a_time: int) -> tune.PlacementGroupFactory:
        """Returns the resources that one trial reserves. The workers of a worker group reserve theirs themselves."""
        # The ticket is a share of a resource that every head node has. It limits the number of concurrent trials, so
        # that no trial starts that would only wait for workers.
        main = worker_resources(self.base.scaling) if in_process(self.base) else {"CPU": 0.01}
        ticket = (1 - _OF_OTHERS * (at_a_time + 1)) / at_a_time
        return tune.PlacementGroupFactory([main, {_HEAD: max(1e-4, math.floor(ticket * 1e4) / 1e4)}])

    def _cpus(self) -> float:
        """Returns the CPUs that one trial needs."""
        return (
            self.base.scaling.cpus_per_worker
            if in_process(self.base)
            else cpus_needed(self.base, self.base.scaling.most) + 0.01
        )

    def _check_resources(self) -> None:
        if not in_process(self.base):
            check_size(self.base)
        elif slots([ray.cluster_resources()], worker_resources(self.base.scaling)) == 0:
            raise ConfigError(
                f"a trial needs {worker_resources(self.base.scaling)}, the Ray cluster has less: see base.scaling"
            )

    def _at_a_time(self) -> int:
        """Returns the number of trials that run at the same time: `max_concurrent`, or what fits into the cluster."""
        total = trials_of(self.sweep)
        if isinstance(self.sweep.max_concurrent, int):
            return min(self.sweep.max_concurrent, total)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        need = worker_resources(self.base.scaling)
        if in_process(self.base):
            return max(1, min(slots(nodes, need), total))
        by_workers = fitting(self.base, nodes, slots(nodes, need)) // max(1, self.base.scaling.most)
        by_cpus = int(sum(node.get("CPU", 0.0) for node in nodes) / self._cpus())
        return max(1, min(by_workers, by_cpus, total))

    def _ended(self, exit_reason: str | None) -> SweepResult:
        self.folder.close()
        shutil.rmtree(self.folder.path / ".tune", ignore_errors=True)
        self.folder.write_best()
        result = result_of(self.folder, exit_reason)
        write_report(result, self.sweep)
        failed = [row for row in result.trials if row["status"] == "failed"]
        if failed and len(failed) == len(result.trials) and exit_reason is None:
            raise UserError(f"all {len(failed)} trials failed; the first: {failed[0]['error']}")
        return result


def _steps(config: TrainerConfig, prepared: PreparedData) -> int:
    """Returns the optimizer steps of a whole trial."""
    return config.run.total_steps(config.steps_per_batch, prepared.train.steps_in_epoch)
