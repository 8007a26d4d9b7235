"""The composition root: from a config to a finished run, in a visible order. Also the way without Ray.

Every worker process runs `run_worker`; which process it is, it learns from the process group.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.common import distributed
from myllm_ray.common.allocator import keep_large_blocks
from myllm_ray.common.determinism import check_determinism, determinism
from myllm_ray.common.secrets import mask
from myllm_ray.common.types import BatchStream
from myllm_ray.config.errors import CheckpointError, ConfigError
from myllm_ray.config.load import validate
from myllm_ray.config.resolve import resolve
from myllm_ray.config.schema import ModelSection, TrainerConfig
from myllm_ray.data.chat_template import end_tokens
from myllm_ray.data.inspect import end_warnings
from myllm_ray.data.prepare import MapUnits, PreparedData, prepare
from myllm_ray.data.records import PROMPTS, TOKENS
from myllm_ray.data.stream import LocalStream
from myllm_ray.data.targets import check_targets, target_warnings
from myllm_ray.data.tokenizer import bytes_per_token, has_own_template, open_tokenizer, tokenizer_section, trained_template
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.checkpoint import CheckpointManager, find_damage, read_manifest
from myllm_ray.engine.engine import TrainerEngine
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.pulse import Pulse
from myllm_ray.engine.run_folder import checkpoints_of, claim, folder_of, resume_point
from myllm_ray.engine.scheduler import SchedulerManager
from myllm_ray.engine.starting_weights import check_starting_weights, named_models, pinned, starting_weights
from myllm_ray.engine.startup import Startup, StoppedAtStart
from myllm_ray.engine.watch import Watch
from myllm_ray.models.export import dtype_of_base
from myllm_ray.models.generation_config import base_generation_config, ends_of, trained_generation_config
from myllm_ray.models.load import build_deferred, build_model, build_skeleton, config_of, save_architecture
from myllm_ray.roles import (
    check_frozen,
    check_roles,
    check_routers,
    isolation_of,
    kind_of_model,
    knobs_of,
    model_section,
    roles_of,
)
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.causal_lm import CausalLMTrainer

log = logging.getLogger(__name__)


def absolute(config: TrainerConfig) -> TrainerConfig:
    """The config with local paths made absolute, so that it means the same in a process with another working folder.

    A model that is a run's folder becomes the newest whole checkpoint in it, and a tokenizer that was left out the model's own.

    Raises:
        ConfigError: a run has no whole checkpoint.
    """
    config = config.model_copy(deep=True)
    config.run.storage = _absolute(config.run.storage)
    config.data.cache = _absolute(config.data.cache or str(Path(config.run.storage) / ".data"))
    for source in [*config.data.sources, *([config.data.validation] if config.data.validation else [])]:
        if source.path is not None:
            source.path = [_absolute(p) for p in source.path] if isinstance(source.path, list) else _absolute(source.path)
    for section, field, key in named_models(config):
        if Path(getattr(section, field)).expanduser().is_dir():
            setattr(section, field, _absolute(pinned(getattr(section, field), key)))
    config.tokenizer = tokenizer_section(config).model_copy()
    if config.tokenizer.path:
        config.tokenizer.path = _absolute(config.tokenizer.path)
    if config.checkpoint.resume not in ("auto", "never"):
        config.checkpoint.resume = _absolute(config.checkpoint.resume)
    return config


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def run_local(config: TrainerConfig, callbacks: Sequence[Callback] | None = None,
              services: Callable[[TrainerConfig, PreparedData], Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Train in this very process, without Ray; returns the summary of `run_worker`.

    Args:
        callbacks: default: the config's.
        services: makes what the roles may use (see `roles_of`).
    """
    config = absolute(config)
    check_names(config)  # before the run folder is made
    torch.set_num_threads(max(1, min(int(config.scaling.cpus_per_worker), os.cpu_count() or 1)))
    with Startup(config) as startup:
        try:
            prepared = prepare_run(config, phase=startup.phase)
            startup.training()
        except StoppedAtStart as reason:
            return startup.stopped(reason)
        while True:
            summary = run_worker(config, prepared, callbacks=callbacks, services=services(config, prepared) if services else None)
            if not summary["rewound"]:
                return summary
            log.warning("%s", summary["left"])


def check_names(config: TrainerConfig) -> None:
    """Resolve every name of the config, so that a wrong one is told before anything is started or written."""
    resolve("trainers", config.trainer, "trainer")
    accelerator: Accelerator = resolve("accelerators", config.accelerator.name, "accelerator.name")(config)
    if not config.scaling.gpus_per_worker:  # else it is for the workers to look: this machine may have no GPU
        accelerator.check()
    check_determinism(config.model_dump(mode="json"), samples="sampler" in resolve("trainers", config.trainer, "trainer").uses)
    build_callbacks(config)
    SchedulerManager(config=config)


def prepare_run(config: TrainerConfig, map_units: MapUnits = map, phase: Callable[[str], None] = lambda name: None,
                warn: bool = True) -> PreparedData:
    """All that comes before workers start: look names up, prepare data, build the model on the meta device, claim the run folder.

    Args:
        config: with absolute paths.
        map_units: how data is tokenized, see `prepare`.
        phase: is called with the name of what begins.
        warn: log what a user should know about the data.

    Raises:
        UserError: the config can't be run. Nothing is written but the cache of prepared data.
    """
    check_names(config)
    phase("preparing data")
    prepared = prepare_data(config, map_units)
    phase("building the model")
    check_model(config, prepared)
    if warn:
        warn_of_data(prepared)
    claim(config, prepared.identity)
    return prepared


def prepare_data(config: TrainerConfig, map_units: MapUnits = map) -> PreparedData:
    """The config's data, in rows that its model keeps apart; a log line says what shares a row.

    Raises:
        DataError, ConfigError: see `prepare` and `roles.isolation_of`.
    """
    isolation = isolation_of(config)
    prepared = prepare(config, map_units, isolation)
    if config.data.packing and not isolation.isolated and prepared.train.plan.store.kind in (TOKENS, PROMPTS):
        log.warning("data.packing: %s, since %s; packing: false asks for that and ends this line", prepared.packing, isolation)
    else:
        log.info("packing: %s; %s", prepared.packing, isolation)
    return prepared


def check_model(config: TrainerConfig, prepared: PreparedData) -> None:
    """Build model and optimizer without memory, so that a mistake in them is told before anything is written."""
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    check_roles(config, prepared.train.plan.store.kind)
    if prepared.validation is not None and prepared.validation.plan.store.kind != prepared.train.plan.store.kind:
        raise ConfigError(f"data.validation.format gives {prepared.validation.plan.store.kind}, data.train.format {prepared.train.plan.store.kind}: "
                          "both must give the same")
    check_frozen(config, tokenizer)
    if issubclass(resolve("trainers", config.trainer, "trainer"), CausalLMTrainer):  # others may train on what carries no label
        check_targets(prepared.train, "data.train", config.run.max_steps or 2**40)
        if prepared.validation is not None:
            check_targets(prepared.validation, "data.validation", config.evaluation.max_batches or 2**40, each=False)
    check_starting_weights(config)
    _warn_of_dropout(config)
    skeleton = build_skeleton(model_section(config), tokenizer, config.data.sequence_length, kind_of_model(config))
    if skeleton is not None:
        check_routers(config, skeleton)
        resolve("accelerators", config.accelerator.name, "accelerator.name")(config).check_model(skeleton)
        OptimizerManager(skeleton, config).build(skeleton)


def _warn_of_dropout(config: TrainerConfig) -> None:
    """Dropout that the config sets and the trainer does without."""
    given, section = config.model, model_section(config)
    left_out = [f"model.config.{k}={v}" for k, v in (given.config or {}).items() if (section.config or {}).get(k) != v]
    if given.lora is not None and section.lora is not None and given.lora.dropout != section.lora.dropout:
        left_out.append(f"model.lora.dropout={given.lora.dropout}")
    if left_out:
        log.warning("%s: not used, trainer %s trains without dropout: it compares two passes of the model", ", ".join(left_out), config.trainer)


def warn_of_data(prepared: PreparedData) -> None:
    """Log what a user should know about the data before a run starts."""
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    for line in [*prepared.notes, *target_warnings(prepared.train), *end_warnings(prepared.train.plan.store, tokenizer)]:
        log.warning("%s", line)


def run_worker(config: TrainerConfig, prepared: PreparedData, stream: BatchStream | None = None,
               callbacks: Sequence[Callback] | None = None, start: Path | None = None,
               watched: dict[str, Any] | None = None, services: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One worker's part of a run, to its end or until it is left.

    Args:
        config: with absolute paths.
        prepared: where the prepared data is.
        stream: this worker's micro-batches; default: read in this process.
        callbacks: default: the config's.
        start: the checkpoint to go on from; default: what `resume_point` finds.
        services: see `roles_of`.
        watched: by somebody outside who looks for workers that hang, and gets to know this of the worker. Default: rank 0 looks.

    Returns:
        `step`, `metrics` (the last that were logged), `folder`, `checkpoint` (the newest); `left`: why the run was left before
        its end, or None; `rewound`: to go on at once, from the checkpoint before a bad step; `abandoned`: left without saving; `parameter_bytes`: of each model, what
        this rank holds and the most that it should hold.
    """
    with determinism(config.run.determinism):
        return _run(config, prepared, stream, callbacks, start, watched, services)


def _run(config: TrainerConfig, prepared: PreparedData, stream: BatchStream | None, callbacks: Sequence[Callback] | None, start: Path | None,
         watched: dict[str, Any] | None, services: Mapping[str, Any] | None) -> dict[str, Any]:
    accelerator: Accelerator = resolve("accelerators", config.accelerator.name, "accelerator.name")(config)
    accelerator.setup()
    if accelerator.device.type == "cpu":
        keep_large_blocks()
    folder = folder_of(config)
    pulse = _pulse(config, watched)
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    model = build_deferred(model_section(config), tokenizer, config.data.sequence_length, config.run.seed, kind_of_model(config))
    stream = stream or LocalStream(prepared.train)
    validation = LocalStream(prepared.validation) if prepared.validation else None
    trainer = build_trainer(config, model, tokenizer, stream.sources, roles_of(config, tokenizer, prepared, services))
    optimizers = OptimizerManager(model, config)
    schedulers = SchedulerManager(config=config)
    checkpoints = checkpoints_of(config)
    checkpoints.model = model
    engine = TrainerEngine(
        trainer, accelerator, optimizers, schedulers, checkpoints,
        callbacks=build_callbacks(config) if callbacks is None else callbacks, config=config, stream=stream,
        validation=validation, folder=str(folder), constants=data_counts(prepared), pulse=pulse,
        manifest={"identity": prepared.identity, "isolation": prepared.isolation and asdict(prepared.isolation),
                  "weights": starting_weights(config), "config": mask(config.model_dump(mode="json"))})
    if distributed.is_main():
        save_architecture(model, config.model, folder / "model")
        save_tokenizer(config, prepared, tokenizer, folder / "tokenizer")
        start = start or resume_point(config)
    try:
        engine.setup(resume=distributed.from_main(start))
        held = {name: accelerator.parameter_bytes(placed) for name, placed in {"model": trainer.model, **trainer.frozen_models}.items()}
        state = engine.train()
    finally:
        pulse.close()
    newest = checkpoints.all()
    return {"step": state.step, "metrics": engine.metrics, "folder": state.folder,
            "checkpoint": str(newest[-1]) if newest else None, "left": state.left, "rewound": state.rewound,
            "abandoned": state.abandoned, "parameter_bytes": held}


def _pulse(config: TrainerConfig, watched: dict[str, Any] | None) -> Pulse:
    """The sign of life of this worker. Where nobody outside looks at it, rank 0 looks for ranks that hang, and says so."""
    folder, rank = folder_of(config), distributed.rank()
    if watched is not None or rank != 0:
        return Pulse(folder, rank, watched)
    watch, told = Watch(folder, config.stability.hang_seconds), set()

    def look() -> None:
        lag = watch.look()
        if lag is not None and (lag.rank, lag.step, lag.phase) not in told:
            told.add((lag.rank, lag.step, lag.phase))
            log.warning("%s", lag)

    return Pulse(folder, rank, on_beat=look)


def build_trainer(config: TrainerConfig, model: torch.nn.Module, tokenizer: Any, sources: Iterable[str],
                  roles: Mapping[str, Any]) -> BaseTrainer:
    """The trainer of the config with its roles (`roles.py`); one of the user's own gets `options` as keyword arguments, too."""
    cls = resolve("trainers", config.trainer, "trainer")
    try:
        trainer: BaseTrainer = cls(model, bytes_per_token=bytes_per_token(tokenizer), sources=sources, **roles, **config.options)
    except TypeError as error:
        raise ConfigError(f"options: {config.trainer} refuses them: {error}") from None
    if "reference" in roles or "reference_table" in roles or getattr(trainer, "adapter_off", False):
        trainer.starts_at_reference = getattr(knobs_of(config), "reference_model", None) is None  # type: ignore[attr-defined]
    return trainer


def build_callbacks(config: TrainerConfig) -> list[Callback]:
    """The callbacks of the config, in its order."""
    built: list[Callback] = []
    for entry in config.callbacks:
        for name, options in ({entry: {}} if isinstance(entry, str) else entry).items():
            cls = resolve("callbacks", name, "callbacks")
            try:
                built.append(cls(**options))
            except (TypeError, ValueError) as error:
                raise ConfigError(f"callbacks: {name} refuses its options: {error}") from None
    return built


def save_tokenizer(config: TrainerConfig, prepared: PreparedData, tokenizer: Any, folder: Path) -> None:
    """What a model needs beside its weights to be used: its tokenizer, and its generation config with every token that ends an answer."""
    saved = copy.copy(tokenizer)
    saved.chat_template = trained_template(tokenizer, bool(prepared.train.plan.store.chats))
    saved.save_pretrained(folder)
    base = base_generation_config(config.model.name)
    trained_generation_config(base, tokenizer, end_tokens(tokenizer, ends_of(base))).save_pretrained(folder)


@dataclass(frozen=True)
class TrainedModel:
    """A trained model with what it is used with.

    `dtype`: of the weights that training began from. `on_chats`: it has a chat template of its own, or was trained on chats.
    """

    model: torch.nn.Module
    tokenizer: Any
    generation: GenerationConfig
    dtype: torch.dtype
    on_chats: bool

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return tuple(ends_of(self.generation))


def open_run(path: str | Path) -> tuple[torch.nn.Module, Any]:
    """The trained model and the tokenizer of a run's folder, of one of its checkpoints, or of an exported folder; see `open_trained`."""
    opened = open_trained(path)
    return opened.model, opened.tokenizer


def open_trained(path: str | Path) -> TrainedModel:
    """What is in a run's folder (its newest checkpoint), in one of its checkpoints, or in a folder in Hugging Face format.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ConfigError: a folder in Hugging Face format can't be loaded.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return _open_exported(path)
    manager = CheckpointManager(folder=path / "checkpoints" if (path / "checkpoints").is_dir() else path.parent)
    newest = manager.latest() if manager.folder.name == "checkpoints" and manager.folder.parent == path else path
    if newest is None or (damage := find_damage(newest)):
        raise CheckpointError(f"{path} holds no whole checkpoint" + (f": {damage}" if newest else ""))
    config = validate(read_manifest(newest)["config"], where=f"{newest}/manifest.json")
    beside = newest / "tokenizer"  # of a checkpoint in Ray's storage
    folder = beside if beside.is_dir() else newest.parent.parent / "tokenizer"
    tokenizer = open_tokenizer(str(folder))
    model = build_model(model_section(config), tokenizer, config.data.sequence_length, config.run.seed, kind_of_model(config))
    manager.load_model(newest, model)
    base = base_generation_config(str(folder)) or base_generation_config(config.model.name)
    generation = trained_generation_config(base, tokenizer, end_tokens(tokenizer, ends_of(base)))
    chats = has_own_template(tokenizer) or any(source.format == "chat" for source in config.data.sources)
    tokenizer.chat_template = trained_template(tokenizer, chats)
    return TrainedModel(model, tokenizer, generation, dtype_of_base(config.model), chats)


def _open_exported(path: Path) -> TrainedModel:
    tokenizer = open_tokenizer(str(path))
    section = ModelSection(name=str(path))
    heads = getattr(config_of(section), "architectures", None) or []
    kind = "reward_model" if any(head.endswith("ForSequenceClassification") for head in heads) else "causal_lm"
    model = build_model(section, tokenizer, 2, 0, kind)
    base = base_generation_config(str(path))
    generation = trained_generation_config(base, tokenizer, end_tokens(tokenizer, ends_of(base)))
    return TrainedModel(model, tokenizer, generation, dtype_of_base(section), has_own_template(tokenizer))


def data_counts(prepared: PreparedData) -> dict[str, float]:
    """What the log repeats about the data: rows left out, and documents longer than a row. Nothing where there are none."""
    plan = prepared.train.plan
    size = plan.packing.size
    if plan.packing.kind == "record":
        long = sum(int(source["cut"]) for source in plan.store.meta["sources"])
    else:
        long = sum(int((plan.store.lengths(np.arange(a, min(a + 65536, len(plan.store)))) > size).sum())
                   for a in range(0, len(plan.store), 65536))
    counts = {"skipped_rows": prepared.skipped, "long_documents": 0 if plan.packing.kind == "continuous" else long}
    return {name: float(count) for name, count in counts.items() if count}
