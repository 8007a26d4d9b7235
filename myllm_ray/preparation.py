"""Steps before the workers start: checks of names, data preparation, a model on the meta device, the run's folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.base_weights import base_identity, check_bases
from myllm_ray.common.determinism import check_determinism
from myllm_ray.common.files import write_json
from myllm_ray.common.progress import Task
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import resolve
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.evaluation_rows import task_rows
from myllm_ray.data.examples import PROMPTS, TOKENS
from myllm_ray.data.inspect import end_warnings
from myllm_ray.data.prepare import MapUnits, PreparedData, prepare
from myllm_ray.data.row_tokens import batches_for_tokens
from myllm_ray.data.summary import summarize
from myllm_ray.data.targets import check_targets, target_warnings
from myllm_ray.data.templates import NAMED
from myllm_ray.data.tokenizer import (
    open_tokenizer,
    tokenizer_section,
)
from myllm_ray.dependencies import kind_of_model, model_section, trainer_class_of
from myllm_ray.engine.amendments import check_segments
from myllm_ray.engine.budget import reason_to_stop, seconds_used
from myllm_ray.engine.checkpointing.manager import read_manifest
from myllm_ray.engine.checkpointing.starting_weights import (
    check_starting_weights,
    named_models,
    pinned,
)
from myllm_ray.engine.configured import build_callbacks
from myllm_ray.engine.ema import WeightAverage
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.run_folder import claim, folder_of, resume_point
from myllm_ray.engine.scheduler import SchedulerManager
from myllm_ray.evaluate.training import check_tasks
from myllm_ray.model_checks import check_attention, check_dependencies, check_frozen, check_routers, isolation_of
from myllm_ray.models.load import build_skeleton
from myllm_ray.trainers.causal_lm import CausalLMTrainer

log = logging.getLogger(__name__)


def absolute(config: TrainerConfig) -> TrainerConfig:
    """Returns the config with absolute local paths, so that it is valid in processes with another working directory.

    A model that is the folder of a run is replaced by the newest complete checkpoint of the run. A missing tokenizer is
    replaced by the tokenizer of the model.

    Raises:
        ConfigError: a run has no complete checkpoint.
    """
    config = config.model_copy(deep=True)
    config.run.storage = _absolute(config.run.storage)
    config.data.cache = _absolute(config.data.cache or str(Path(config.run.storage) / ".data"))
    config.data.local_cache = config.data.local_cache and _absolute(config.data.local_cache)
    for task in config.evaluation.tasks:
        task.task_folder = task.task_folder and _absolute(task.task_folder)
        if task.task is not None and task.task.endswith((".yaml", ".yml")):
            task.task = _absolute(task.task)
    held_out = [config.data.validation] if config.data.validation else []
    for source in [*config.data.sources, *held_out, *(t.data for t in config.evaluation.tasks if t.data)]:
        if source.path is not None:
            source.path = (
                [_absolute(p) for p in source.path] if isinstance(source.path, list) else _absolute(source.path)
            )
    for section, field, key in named_models(config):
        if Path(getattr(section, field)).expanduser().exists():
            setattr(section, field, _absolute(pinned(getattr(section, field), key)))
    config.tokenizer = tokenizer_section(config).model_copy()
    if config.tokenizer.path:
        config.tokenizer.path = _absolute(config.tokenizer.path)
    if (template := config.tokenizer.chat_template) and template not in NAMED:
        config.tokenizer.chat_template = _absolute(template)
    if config.checkpoint.resume not in ("auto", "never"):
        config.checkpoint.resume = _absolute(config.checkpoint.resume)
    return config


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def check_names(config: TrainerConfig) -> None:
    """Resolves every name of the config, so that a wrong name is reported before anything is started or written."""
    accelerator: Accelerator = resolve("accelerators", config.accelerator.name, "accelerator.name")(config)
    WeightAverage(config).check(accelerator)
    if not config.scaling.gpus_per_worker:  # otherwise the workers check it: this machine may have no GPU
        accelerator.check()
    answers = any(task.metrics or task.task for task in config.evaluation.tasks)
    samples = answers or "sampler" in trainer_class_of(config).dependencies
    check_determinism(config.model_dump(mode="json"), samples=samples)
    build_callbacks(config)
    SchedulerManager(config=config)
    check_segments(config)


def prepare_run(
    config: TrainerConfig,
    map_units: MapUnits = map,
    phase: Callable[[str], None] = lambda name: None,
    warn: bool = True,
) -> PreparedData:
    """Runs all steps before the workers start.

    Resolves the names, prepares the data, builds the model on the meta device, and claims the run's folder.

    Args:
        config: the config of the run, with absolute paths.
        map_units: maps the tokenization over the units of the data; see `prepare`.
        phase: called with the name of each step when it begins.
        warn: whether to log warnings about the data.

    Returns:
        The prepared data.

    Raises:
        UserError: the config can't be run. Only the cache of prepared data has been written.
    """
    check_names(config)
    phase("preparing data")
    prepared = prepare_data(config, map_units)
    phase("building the model")
    check_model(config, prepared)
    prepared = with_base(config, prepared)
    if warn:
        warn_of_data(prepared)
    check_budget(config, prepared)
    claim(config, prepared.identity, plan_of(config, prepared))
    _write_data_summary(config, prepared)
    return prepared


def with_base(config: TrainerConfig, prepared: PreparedData) -> PreparedData:
    """Returns prepared data with the identity of the frozen weights, so that checkpoints need not hold them.

    Raises:
        UserError: the base can't be found or read.
    """
    return replace(prepared, base=base_identity(config, open_tokenizer(prepared.tokenizer_folder)))


def plan_of(config: TrainerConfig, prepared: PreparedData) -> dict[str, Any]:
    """Returns what is known of a run before it starts: its number of optimizer steps, and its tokenizer by a hash."""
    return {
        "steps": config.run.total_steps(config.steps_per_batch, prepared.train.steps_in_epoch),
        "tokenizer": Path(prepared.tokenizer_folder).name.removeprefix("tokenizer-"),
    }


def last_step(config: TrainerConfig, prepared: PreparedData) -> int | None:
    """Returns the step after which the tokens of `run.budget` are used up, or None if the run does not reach it."""
    budget = config.run.budget
    if budget is None or budget.tokens is None:
        return None
    per_batch = config.steps_per_batch
    most = config.run.total_steps(per_batch, prepared.train.steps_in_epoch) // per_batch
    found = batches_for_tokens(prepared.train, budget.tokens, most)
    return None if found is None else per_batch * found


def check_budget(config: TrainerConfig, prepared: PreparedData) -> None:
    """Checks `run.budget` against the data, and whether a run that resumes has used it up.

    Raises:
        ConfigError: the tokens of the trainer's data are not known in advance, or nothing of the budget is left.
    """
    budget = config.run.budget
    if budget is None:
        return
    if budget.tokens is not None and prepared.train.plan.store.kind != TOKENS:
        raise ConfigError(
            f"run.budget.tokens: trainer {config.trainer} does not read tokens; use run.budget.hours or run.max_steps"
        )
    if budget.tokens is not None and any("batch.global_size" in a.set for a in config.run.amendments):
        raise ConfigError(
            "run.budget.tokens: run.amendments changes batch.global_size, and with it the tokens of a step; use "
            "run.budget.hours or run.max_steps"
        )
    start = resume_point(config) if config.checkpoint.resume == "auto" else None
    if start is None:
        return
    step, folder = int(read_manifest(start)["step"]), folder_of(config)
    reason = reason_to_stop(budget, seconds_used(folder), step, last_step(config, prepared))
    if reason is not None:
        raise ConfigError(f"{folder} is at step {step:,} and has used its budget ({reason}); increase it to resume")


def of_segment(prepared: PreparedData, config: TrainerConfig) -> PreparedData:
    """Returns prepared data with the batch sizes of a config. Amendments change no other property of the data."""
    size, micro = config.batch.global_size, config.batch.micro_size
    validation = prepared.validation and replace(prepared.validation, global_size=size, micro_size=micro)
    return replace(prepared, train=replace(prepared.train, global_size=size, micro_size=micro), validation=validation)


def _write_data_summary(config: TrainerConfig, prepared: PreparedData) -> None:
    """Writes `data_summary.json` for the report of the run. A failure is one warning: the run does not need it."""
    path = folder_of(config) / "data_summary.json"
    try:
        batches = -(-(config.run.max_steps or 0) // config.steps_per_batch)
        write_json(path, summarize(prepared, open_tokenizer(prepared.tokenizer_folder), batches))
    except Exception as error:
        log.warning("%s was not written: %s: %s", path, type(error).__name__, error)


def prepare_data(config: TrainerConfig, map_units: MapUnits = map) -> PreparedData:
    """Prepares the data of a config and logs whether documents share a row.

    Documents are packed only if the model keeps the documents of a row independent of each other.

    Raises:
        DataError, ConfigError: see `prepare` and `model_checks.isolation_of`.
    """
    with Task("checking whether documents may share a row"):
        isolation = isolation_of(config)
    check_attention(config, isolation)
    prepared = prepare(config, map_units, isolation)
    prepared = replace(prepared, tasks=task_rows(config, prepared.tokenizer_folder, map_units))
    if config.data.packing and not isolation.isolated and prepared.train.plan.store.kind in (TOKENS, PROMPTS):
        log.warning(
            "data.packing: %s, because %s; set data.packing: false to silence this warning", prepared.packing, isolation
        )
    else:
        log.info("packing: %s; %s", prepared.packing, isolation)
    return prepared


def check_model(config: TrainerConfig, prepared: PreparedData) -> None:
    """Builds model and optimizer on the meta device, so that errors in them are reported before anything is written.

    Raises:
        ConfigError: the model, the optimizer, the data or a dependency does not match the config.
    """
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    check_dependencies(config, prepared.train.plan.store.kind)
    if prepared.validation is not None and prepared.validation.plan.store.kind != prepared.train.plan.store.kind:
        raise ConfigError(
            f"data.validation.format gives {prepared.validation.plan.store.kind}, data.train.format "
            f"{prepared.train.plan.store.kind}: both must give the same"
        )
    check_frozen(config, tokenizer)
    check_tasks(config, prepared)
    if issubclass(
        resolve("trainers", config.trainer, "trainer"), CausalLMTrainer
    ):  # other trainers may train on data without labels
        check_targets(prepared.train, "data.train", config.run.max_steps or 2**40)
        if prepared.validation is not None:
            check_targets(prepared.validation, "data.validation", config.evaluation.max_batches or 2**40, each=False)
    check_starting_weights(config)
    check_bases(config)
    _warn_of_dropout(config)
    skeleton = build_skeleton(model_section(config), tokenizer, config.data.sequence_length, kind_of_model(config))
    if skeleton is not None:
        check_routers(config, skeleton)
        accelerator: Accelerator = resolve("accelerators", config.accelerator.name, "accelerator.name")(config)
        accelerator.check_model(skeleton)
        optimizers = OptimizerManager(skeleton, config)
        optimizers.build(skeleton)
        optimizers.check(accelerator.optimizer_layout)


def _warn_of_dropout(config: TrainerConfig) -> None:
    """Logs the dropout that the config sets and the trainer disables."""
    given, section = config.model, model_section(config)
    left_out = [f"model.config.{k}={v}" for k, v in (given.config or {}).items() if (section.config or {}).get(k) != v]
    if given.lora is not None and section.lora is not None and given.lora.dropout != section.lora.dropout:
        left_out.append(f"model.lora.dropout={given.lora.dropout}")
    if left_out:
        log.warning(
            "%s: not used, trainer %s trains without dropout: it compares two passes of the model",
            ", ".join(left_out),
            config.trainer,
        )


def warn_of_data(prepared: PreparedData) -> None:
    """Logs the warnings about the data before a run starts."""
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    for line in [
        *prepared.notes,
        *target_warnings(prepared.train),
        *end_warnings(prepared.train.plan.store, tokenizer),
    ]:
        log.warning("%s", line)
