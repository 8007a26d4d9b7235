"""`train(config)`: one call for every run. In this process where `scaling.workers` is 0, else through Ray's TorchTrainer."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from myllm_ray.common.files import read_jsonl
from myllm_ray.common.types import Position
from myllm_ray.config.errors import TrainingError, UserError
from myllm_ray.config.load import load_config, validate
from myllm_ray.config.schema import TrainerConfig

if TYPE_CHECKING:
    from ray.data import Dataset

    from myllm_ray.data.prepare import PreparedData

log = logging.getLogger(__name__)


@dataclass
class RunResult:
    """A finished run.

    `metrics`: the last that were logged. `checkpoint`: the newest. `history`: all lines of `metrics.jsonl`.
    """

    folder: str
    step: int
    metrics: dict[str, float]
    checkpoint: str | None
    history: list[dict[str, Any]] = field(repr=False, default_factory=list)

    def summary(self) -> str:
        """One line: where, how many steps, and the loss at first and at last (on held-out data where there is some)."""
        validated = [row for row in self.history if "validation_loss" in row]
        name = "validation_loss" if len(validated) > 1 else "loss"
        rows = [row for row in self.history if name in row]
        if not rows:
            return f"{self.folder}: {self.step} steps"
        first, last = rows[0], rows[-1]
        return (f"{self.folder}: {self.step} steps, {name.replace('_', ' ')} {first[name]:.4f} at step {first['step']} -> "
                f"{last[name]:.4f} at step {last['step']}")


def train(config: TrainerConfig | Mapping[str, Any] | str | Path, overrides: Iterable[str] = (),
          verbose: bool = False) -> RunResult:
    """Run a config to its end.

    Args:
        config: a config, a mapping, or the path of a YAML or JSON file.
        overrides: `key.sub=value`, for a path.
        verbose: show Ray's own logs.

    Raises:
        UserError: one line that says what is wrong and what to do.
    """
    if isinstance(config, (str, Path)):
        config = load_config(config, tuple(overrides))
    elif not isinstance(config, TrainerConfig):
        config = validate(config)
    if config.scaling.workers == 0:
        from myllm_ray.worker import run_local  # Ray is not imported on this way

        summary = run_local(config)
    else:
        summary = _train_on_ray(config, verbose)
    history = list(read_jsonl(Path(summary["folder"]) / "metrics.jsonl"))
    return RunResult(history=history, **{k: summary[k] for k in ("folder", "step", "metrics", "checkpoint")})


def _train_on_ray(config: TrainerConfig, verbose: bool) -> dict[str, Any]:
    import ray

    from myllm_ray.data.prepare import prepare
    from myllm_ray.engine.run_folder import claim
    from myllm_ray.orchestration import session  # sets what Ray reads when it is imported
    from myllm_ray.orchestration.channel import DriverDisplay
    from myllm_ray.orchestration.ray_data import map_units
    from myllm_ray.worker import absolute, build_callbacks, check_model, check_names

    config = absolute(config)
    check_names(config)
    log.info("connecting to Ray")
    started = session.connect(config, verbose)
    try:
        prepared = _clearly(lambda: prepare(config, map_units))
        check_model(config, prepared)
        claim(config, prepared.identity)
        shown = [c for c in build_callbacks(config) if c.on_driver]
        log.info("starting %d workers", config.scaling.workers)
        with DriverDisplay(shown) as display:
            return _fit(config, prepared, display.queue)
    finally:
        if started:
            ray.shutdown()


def _fit(config: TrainerConfig, prepared: PreparedData, queue: Any) -> dict[str, Any]:
    """Build the TorchTrainer, run it, and say clearly what went wrong if it did."""
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from myllm_ray.engine.run_folder import folder_of
    from myllm_ray.orchestration.loops import LAUNCHED, train_loop
    from myllm_ray.orchestration.ray_data import execution_options

    scaling = config.scaling
    resources = {"CPU": scaling.cpus_per_worker, **scaling.resources_per_worker}
    if scaling.gpus_per_worker:
        resources["GPU"] = scaling.gpus_per_worker
    # Ray's own state has a name of its own at every start: a name used before would silently resume from Ray's records.
    storage = folder_of(config) / ".ray"
    trainer = TorchTrainer(
        cast(Any, train_loop),
        train_loop_config={**config.model_dump(mode="json"), LAUNCHED: {"prepared": prepared, "queue": queue}},
        scaling_config=ScalingConfig(num_workers=scaling.workers, use_gpu=bool(scaling.gpus_per_worker),
                                     resources_per_worker=resources),
        run_config=RunConfig(name=uuid.uuid4().hex[:12], storage_path=str(storage),
                             failure_config=FailureConfig(max_failures=scaling.max_failures)),
        datasets={"train": _remaining(config, prepared)},
        dataset_config=DataConfig(execution_options=execution_options(), enable_shard_locality=False))
    try:
        summary: dict[str, Any] = _clearly(trainer.fit).return_value
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    return summary


def _remaining(config: TrainerConfig, prepared: PreparedData) -> Callable[[], Dataset]:
    """What Ray calls at every start of the worker group: the data from the newest checkpoint to the end of the run."""

    def build() -> Dataset:
        from myllm_ray.engine.checkpoint import read_manifest
        from myllm_ray.engine.run_folder import resume_point
        from myllm_ray.orchestration.ray_data import build_dataset

        point = resume_point(config)
        manifest: dict[str, Any] = read_manifest(point) if point else {"step": 0, "position": {"epoch": 0, "row": 0}}
        epochs = range(config.run.epochs or 0)
        total = config.run.max_steps or sum(prepared.train.steps_in_epoch(e) for e in epochs)
        return build_dataset(prepared.train, Position(**manifest["position"]), max(0, total - manifest["step"]))

    return build


def _clearly(call: Callable[[], Any]) -> Any:
    """Call, and turn what Ray wraps an error in back into the error itself."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        cause = _user_error_in(error)
        if cause is not None:
            raise cause from None
        failures = getattr(error, "worker_failures", None)
        if failures:
            rank, first = next(iter(sorted(failures.items())))
            if os.environ.get("MYLLM_RAY_TRACEBACK"):
                raise
            last_line = str(first).strip().splitlines()[-1]
            raise TrainingError(f"worker {rank} of {len(failures)} that failed: {last_line} (the whole traceback: "
                                "MYLLM_RAY_TRACEBACK=1)") from error
        raise


def _user_error_in(error: BaseException | None, depth: int = 0) -> UserError | None:
    """The UserError inside Ray's wrappings, if there is one."""
    if error is None or depth > 8:
        return None
    if isinstance(error, UserError):
        # Ray raises a class made on the spot that inherits from the original one and prints its traceback.
        original = getattr(error, "cause", None)
        return original if isinstance(original, UserError) else error
    inner = [getattr(error, "cause", None), error.__cause__, *getattr(error, "worker_failures", {}).values()]
    return next((found for e in inner if isinstance(e, BaseException) and (found := _user_error_in(e, depth + 1))), None)
