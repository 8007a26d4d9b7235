"""The composition root: constructs the parts of a run from its config and runs it, with or without Ray.

Every worker process calls `run_worker`. The process group determines the rank of the process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.common import distributed
from myllm_ray.common.allocator import keep_large_blocks
from myllm_ray.common.determinism import determinism
from myllm_ray.common.secrets import mask
from myllm_ray.common.types import BatchStream, Exit
from myllm_ray.config.amendments import effective
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import resolve
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.trainers import takes_config
from myllm_ray.data.prepare import PreparedData
from myllm_ray.data.stream import LocalStream
from myllm_ray.data.tokenizer import (
    bytes_per_token,
    open_tokenizer,
)
from myllm_ray.dependencies import Dependencies, Services, kind_of_model, model_section, trainer_class_of
from myllm_ray.engine.amendments import described, take_requests, with_recorded
from myllm_ray.engine.attempt import RecordedAttempt
from myllm_ray.engine.budget import RunBudget
from myllm_ray.engine.callbacks import Callback, observing
from myllm_ray.engine.checkpointing.starting_weights import (
    starting_weights,
)
from myllm_ray.engine.configured import build_callbacks
from myllm_ray.engine.environment import record_attempt
from myllm_ray.engine.liveness.hang_detector import HangDetector
from myllm_ray.engine.liveness.heartbeat import Heartbeat, HeartbeatChannel
from myllm_ray.engine.liveness.startup import Startup, StoppedAtStart
from myllm_ray.engine.loop import TrainerEngine
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.reporting.events import EventLog, recorded_warnings
from myllm_ray.engine.reporting.monitor import RunMonitor
from myllm_ray.engine.reporting.profile import StepProfiler
from myllm_ray.engine.run_folder import checkpoints_of, folder_of, verified_start
from myllm_ray.engine.scheduler import SchedulerManager
from myllm_ray.evaluate.training import build_tasks
from myllm_ray.model_checks import document_kernel
from myllm_ray.models.architecture import save_architecture
from myllm_ray.models.flops import model_flops
from myllm_ray.models.load import build_deferred
from myllm_ray.preparation import absolute, check_names, last_step, of_segment, prepare_run
from myllm_ray.trained_model import save_tokenizer
from myllm_ray.trainers.base import BaseTrainer

log = logging.getLogger(__name__)
Engine = TypeVar("Engine", bound=TrainerEngine)


class Watched(NamedTuple):
    """How another process observes a worker and detects that it hangs."""

    entries: dict[str, Any]
    """Entries that are added to the worker's heartbeats."""
    channel: HeartbeatChannel
    """Sends the heartbeats."""


def run_local(
    config: TrainerConfig,
    callbacks: Sequence[Callback] | None = None,
    services: Callable[[TrainerConfig, PreparedData], Services] | None = None,
) -> dict[str, Any]:
    """Trains in this process, without Ray.

    Args:
        config: the config of the run.
        callbacks: replace the callbacks of the config.
        services: returns the services that trainer dependencies may use; see `dependencies.Services`.

    Returns:
        The summary of `run_worker`.
    """
    config = absolute(config)
    check_names(config)  # before the run's folder is created
    torch.set_num_threads(max(1, min(int(config.scaling.cpus_per_worker), os.cpu_count() or 1)))
    built = build_callbacks(config) if callbacks is None else list(callbacks)
    observers = [c for c in built if c.on_driver]
    with observing(observers), Startup(config) as startup:
        try:
            config = with_recorded(config)  # no command can amend the run from here on
            prepared = prepare_run(config, phase=startup.phase)
            startup.training()
        except StoppedAtStart as reason:
            return startup.stopped(reason)
        restarts = 0
        while True:
            config = take_requests(config)
            with RecordedAttempt(startup.folder, startup.events) as attempt:
                summary = run_worker(
                    config, prepared, callbacks=built, services=services(config, prepared) if services else None
                )
                attempt.ended(summary)
            exit = summary["exit"]
            if exit is None or exit.kind not in ("rewind", "amended"):
                return startup.ended(summary)
            if exit.kind == "rewind":
                log.warning("%s", exit.reason)
                restarts += 1
                startup.events.emit("restart", summary["step"], reason=exit.reason, restarts=restarts)
            else:
                startup.events.emit("amendment", summary["step"], reason=exit.reason)
            if callbacks is None:  # the observers show the whole run; the other callbacks start again
                kept = iter(observers)
                built = [next(kept) if c.on_driver else c for c in build_callbacks(config)]


def run_worker(
    config: TrainerConfig,
    prepared: PreparedData,
    stream: BatchStream | None = None,
    callbacks: Sequence[Callback] | None = None,
    start: Path | None = None,
    watched: Watched | None = None,
    services: Services | None = None,
) -> dict[str, Any]:
    """Runs one worker's part of a run, to the last step or to an early exit.

    Args:
        config: the config of the run, with absolute paths.
        prepared: the prepared data.
        stream: this worker's micro-batches; default: they are read in this process.
        callbacks: replace the callbacks of the config.
        start: checkpoint to resume from; default: the result of `resume_point`.
        watched: how another process observes this worker. Default: rank 0 of this run detects ranks that hang.
        services: what trainer dependencies may use; see `dependencies.Services`.

    Returns:
        A dict with `step`, `metrics` (the last logged ones), `folder`, `checkpoint` (the newest, or None), `exit` (the
        reason of an early end, an `Exit`, or None) and `parameter_bytes` (per model: the bytes of parameters on this
        rank, and the largest expected value).
    """
    if callbacks is None:
        callbacks = build_callbacks(config)
    with determinism(config.run.determinism), ExitStack() as stack:
        return _run(config, prepared, stream, callbacks, start, watched, services, stack)


def build_engine(
    config: TrainerConfig,
    prepared: PreparedData,
    tokenizer: Any,
    accelerator: Accelerator,
    *,
    engine: Callable[..., Engine],
    callbacks: Sequence[Callback],
    stream: BatchStream | None = None,
    services: Services | None = None,
    folder: Path | None = None,
    heartbeat: Heartbeat | None = None,
    whole: TrainerConfig | None = None,
) -> Engine:
    """Constructs all parts of a run on this rank. Nothing is written, and no memory for weights is allocated.

    Args:
        config, prepared, stream, callbacks, services: see `run_worker`.
        tokenizer: the tokenizer of the run.
        accelerator: the result of `set_up_accelerator`.
        engine: the class of the engine, or another function with its arguments.
        folder: the run's folder; None writes nothing.
        heartbeat: the heartbeat of this rank; None writes none.
        whole: the config of the whole run, which checkpoints record, if `config` is that of a segment.
    """
    # On the meta device: the backend shards the model before memory for its weights is allocated.
    model = build_deferred(
        model_section(config), tokenizer, config.data.sequence_length, config.run.seed, kind_of_model(config)
    )
    flops = model_flops(model).of
    stream = stream or LocalStream(prepared.train)
    validation = LocalStream(prepared.validation) if prepared.validation else None
    trainer = build_trainer(
        config, model, tokenizer, stream.sources, Dependencies(config, tokenizer, prepared, services)
    )
    trainer.document_kernel = document_kernel(config, prepared.isolation, accelerator.device)
    checkpoints = checkpoints_of(config)
    checkpoints.model = model
    return engine(
        trainer,
        accelerator,
        OptimizerManager(model, config),
        SchedulerManager(config=config),
        checkpoints,
        callbacks=callbacks,
        config=config,
        stream=stream,
        validation=validation,
        folder=None if folder is None else str(folder),
        constants=data_counts(prepared),
        heartbeat=heartbeat,
        flops=flops,
        tasks=build_tasks(config, prepared, tokenizer),
        manifest={
            # Rank 0 decides what a checkpoint holds: the ranks of a run made again prepare the data separately.
            "identity": distributed.from_main(prepared.identity),
            "isolation": prepared.isolation and asdict(prepared.isolation),
            "weights": starting_weights(config),
            "config": mask((whole or config).model_dump(mode="json")),
        },
    )


def set_up_accelerator(config: TrainerConfig) -> Accelerator:
    """Returns the accelerator of a config. Afterwards the device is selected and the process group has been joined.

    It comes before everything that takes rank and world size from the group.
    """
    accelerator: Accelerator = resolve("accelerators", config.accelerator.name, "accelerator.name")(config)
    accelerator.setup()
    return accelerator


def _run(
    config: TrainerConfig,
    prepared: PreparedData,
    stream: BatchStream | None,
    callbacks: Sequence[Callback],
    start: Path | None,
    watched: Watched | None,
    services: Services | None,
    stack: ExitStack,
) -> dict[str, Any]:
    folder = folder_of(config)
    accelerator = set_up_accelerator(config)
    events = EventLog(folder, distributed.rank())
    if distributed.is_main():
        events.open()
        stack.callback(events.close)
        stack.enter_context(recorded_warnings(events))
    whole = config
    start, manifest, damage = verified_start(whole, start)
    if damage is not None:
        accelerator.close()
        return {
            "step": manifest["step"],
            "metrics": {},
            "folder": str(folder),
            "checkpoint": None,
            "exit": Exit("rewind", damage),
            "parameter_bytes": {},
        }
    if whole.run.amendments:
        config = _segment(whole, int(manifest.get("step", 0)))
        prepared = of_segment(prepared, config)
        accelerator = accelerator.successor(config)  # a backend may read what an amendment changes
    heartbeat = _heartbeat(config, watched)
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    engine = build_engine(
        config,
        prepared,
        tokenizer,
        accelerator,
        engine=TrainerEngine,
        stream=stream,
        callbacks=[RunMonitor(events, heartbeat), *added_callbacks(config, prepared), *callbacks],
        services=services,
        folder=folder,
        heartbeat=heartbeat,
        whole=whole,
    )
    engine.stability.on_intervention = lambda row: events.emit("intervention", **row)
    trainer = engine.trainer
    if distributed.is_main():
        save_architecture(trainer.model, config.model, folder / "model")
        save_tokenizer(config, prepared, tokenizer, folder / "tokenizer")
    try:
        engine.setup(start, manifest)
        if accelerator.device.type == "cpu":
            # After the weights are loaded: the temporary tensors of the loading would leave holes that are kept.
            keep_large_blocks()
        if distributed.is_main():
            record_attempt(folder, config.model_dump(mode="json"), engine.state.step)
        held = {
            name: accelerator.parameter_bytes(placed)
            for name, placed in {"model": trainer.model, **trainer.frozen_models}.items()
        }
        state = engine.train()
    finally:
        heartbeat.close()
    newest = engine.checkpoints.all() if engine.checkpoints else []
    return {
        "step": state.step,
        "metrics": engine.metrics,
        "folder": state.folder,
        "checkpoint": str(newest[-1]) if newest else None,
        "exit": state.exit,
        "parameter_bytes": held,
    }


def added_callbacks(config: TrainerConfig, prepared: PreparedData) -> list[Callback]:
    """Returns the callbacks that other keys of the config need: `run.budget` and `logging.profile`."""
    budget, profile = config.run.budget, config.logging.profile
    return [
        *([] if budget is None else [RunBudget(budget, folder_of(config), last_step(config, prepared))]),
        *([] if profile is None else [StepProfiler(*profile)]),
    ]


def _segment(config: TrainerConfig, step: int) -> TrainerConfig:
    """Returns the config of the segment of a run that begins at a step. Logs the amendment that takes effect there."""
    if distributed.is_main() and any(amendment.at == step for amendment in config.run.amendments):
        log.info("from step %d on: %s", step + 1, described(config, step))
    return effective(config, step)


def _heartbeat(config: TrainerConfig, watched: Watched | None) -> Heartbeat:
    """Returns the heartbeat of this worker.

    If no other process observes the heartbeats (`watched` is None), rank 0 detects ranks that hang and logs them.
    """
    folder, rank = folder_of(config), distributed.rank()
    if watched is not None:
        return Heartbeat(folder, rank, watched.entries, channel=watched.channel)
    if rank != 0:
        return Heartbeat(folder, rank)
    watch, told = HangDetector(folder, config.stability.hang_seconds), set()

    def look() -> None:
        straggler = watch.look()
        if straggler is not None and (straggler.rank, straggler.step, straggler.phase) not in told:
            told.add((straggler.rank, straggler.step, straggler.phase))
            log.warning("%s", straggler)

    return Heartbeat(folder, rank, on_beat=look)


def build_trainer(
    config: TrainerConfig, model: torch.nn.Module, tokenizer: Any, sources: Iterable[str], dependencies: Dependencies
) -> BaseTrainer:
    """Returns the trainer of a config, constructed with its dependencies.

    Args:
        config: the config of the run.
        model: the model to train.
        tokenizer: the tokenizer of the run.
        sources: names of the data sources, in the order of their ids.
        dependencies: the constructors of the arguments that the trainer requests.

    Raises:
        ConfigError: the trainer's constructor does not accept `options`.
    """
    cls = trainer_class_of(config)
    settings = {"config": config.trainer_section} if takes_config(cls) else config.options
    named = {"bytes_per_token": bytes_per_token(tokenizer), "sources": sources, **dependencies.arguments()}
    try:
        return cls(model, **named, **settings)
    except TypeError as error:
        raise ConfigError(f"options: trainer {config.trainer} does not accept them: {error}") from None


def data_counts(prepared: PreparedData) -> dict[str, float]:
    """Returns metrics of the data that every line of the log repeats, without those that are zero.

    `skipped_rows` is the number of rows that were skipped as invalid, `long_documents` the number of documents that are
    longer than a row.
    """
    plan = prepared.train.plan
    if plan.packing.kind == "record":
        long = sum(int(source["cut"]) for source in plan.store.meta["sources"])
    else:
        long = plan.store.longer_than(plan.packing.size)
    counts = {"skipped_rows": prepared.skipped, "long_documents": 0 if plan.packing.kind == "continuous" else long}
    return {name: float(count) for name, count in counts.items() if count}
