"""Loading of trained models from a run, a checkpoint, an exported folder or the hub, for sampling and export."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from myllm_ray.base_weights import check_base
from myllm_ray.common.pretrained import checkpoint_in, pretrained_folder, tokenizer_folder
from myllm_ray.config.errors import CheckpointError
from myllm_ray.config.load import validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.chat_template import end_tokens
from myllm_ray.data.prepare import PreparedData
from myllm_ray.data.tokenizer import (
    has_own_template,
    open_tokenizer,
    trained_template,
)
from myllm_ray.dependencies import kind_of_model, model_section
from myllm_ray.engine.checkpointing.averages import check_averages, load_averages
from myllm_ray.engine.checkpointing.manager import CheckpointManager, find_damage, read_manifest
from myllm_ray.models.architecture import config_of
from myllm_ray.models.export import dtype_of_base
from myllm_ray.models.generation_config import base_generation_config, ends_of, trained_generation_config
from myllm_ray.models.load import build_deferred, build_model


@dataclass(frozen=True)
class TrainedModel:
    """A trained model with its tokenizer and generation config.

    `dtype` is the dtype of the weights from which training started. `on_chats` is true if the tokenizer comes with a
    chat template, or if the model was trained on chats. `checkpoint` is the checkpoint that was loaded; None for a
    folder in Hugging Face format.
    """

    model: torch.nn.Module
    tokenizer: Any
    generation: GenerationConfig
    dtype: torch.dtype
    on_chats: bool
    checkpoint: Path | None = None

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids of the tokens that end an answer."""
        return tuple(ends_of(self.generation))


def open_run(path: str | Path) -> tuple[torch.nn.Module, Any]:
    """Loads the trained model and its tokenizer; a short form of `open_trained`.

    Args:
        path: As in `open_trained`.

    Returns:
        The model and the tokenizer.

    Raises:
        CheckpointError: There is no complete checkpoint.
        ConfigError: An exported folder can't be loaded.
    """
    opened = open_trained(path)
    return opened.model, opened.tokenizer


def open_trained(path: str | Path, weights: bool = True, ema: bool = False) -> TrainedModel:
    """Loads a trained model with its tokenizer and generation config.

    Args:
        path: The folder of a run, whose newest checkpoint is loaded, of one of its checkpoints, of a model in Hugging
            Face format, or the hub id of such a model.
        weights: Whether to load the weights; otherwise the model is on the meta device.
        ema: Whether to load the moving averages of the weights instead of the weights.

    Returns:
        The trained model.

    Raises:
        CheckpointError: There is no complete checkpoint, the base of its adapters is missing or has changed, or with
            `ema`, it contains no averages.
        ConfigError: A model in Hugging Face format can't be found or loaded.
    """
    path = _located(path)
    if (path / "config.json").is_file():
        if ema:
            raise CheckpointError(f"{path} is an exported model, which has no averaged weights (ema): give the run")
        return _open_exported(path, weights)
    manager, newest, config = _checkpoint(path)
    if ema:
        check_averages(newest)
    folder = tokenizer_folder(newest)
    tokenizer = open_tokenizer(str(folder))
    if weights:
        check_base(newest)
    build = build_model if weights else build_deferred
    model = build(model_section(config), tokenizer, config.data.sequence_length, config.run.seed, kind_of_model(config))
    if weights:
        manager.load_model(newest, model)
    if weights and ema:
        load_averages(newest, model)
    base = base_generation_config(str(folder)) or base_generation_config(config.model.name)
    generation = trained_generation_config(base, tokenizer, end_tokens(tokenizer, ends_of(base)))
    chats = has_own_template(tokenizer) or any(source.format == "chat" for source in config.data.sources)
    tokenizer.chat_template = trained_template(tokenizer, chats)
    return TrainedModel(model, tokenizer, generation, dtype_of_base(config.model), chats, newest)


def kind_of_trained(path: str | Path) -> str:
    """Returns the kind of a trained model (`models.load.build_deferred`). Does not read its weights.

    Args:
        path: As in `open_trained`.

    Raises:
        CheckpointError: There is no checkpoint. Whether it is complete is not checked.
        ConfigError: A model in Hugging Face format can't be found or loaded.
    """
    path = _located(path)
    if (path / "config.json").is_file():
        return _kind_of_exported(ModelSection(name=str(path)))
    found = checkpoint_in(str(path))
    if found is None:
        raise CheckpointError(f"{path} contains no complete checkpoint and no config.json of a model")
    return kind_of_model(validate(read_manifest(found)["config"], where=f"{found}/manifest.json", components=False))


def _located(path: str | Path) -> Path:
    """Returns the local folder of a trained model. A name that is no local path is a hub id, which is downloaded."""
    local = Path(path).expanduser()
    return local if local.exists() else pretrained_folder(str(path), "model", weights=True)


def _checkpoint(path: Path) -> tuple[CheckpointManager, Path, TrainerConfig]:
    """Returns the manager of a path's checkpoint, the checkpoint, and the config of its run."""
    manager = CheckpointManager(folder=path / "checkpoints" if (path / "checkpoints").is_dir() else path.parent)
    newest = manager.latest() if manager.folder.name == "checkpoints" and manager.folder.parent == path else path
    if newest is None or (damage := find_damage(newest)):
        raise CheckpointError(f"{path} contains no complete checkpoint" + (f": {damage}" if newest else ""))
    return manager, newest, validate(read_manifest(newest)["config"], where=f"{newest}/manifest.json", components=False)


def _kind_of_exported(section: ModelSection) -> str:
    heads = getattr(config_of(section), "architectures", None) or []
    return "reward_model" if any(head.endswith("ForSequenceClassification") for head in heads) else "causal_lm"


def _open_exported(path: Path, weights: bool) -> TrainedModel:
    """Loads a model from a folder in Hugging Face format."""
    tokenizer = open_tokenizer(str(path))
    section = ModelSection(name=str(path))
    build = build_model if weights else build_deferred
    model = build(section, tokenizer, 2, 0, _kind_of_exported(section))
    base = base_generation_config(str(path))
    generation = trained_generation_config(base, tokenizer, end_tokens(tokenizer, ends_of(base)))
    return TrainedModel(model, tokenizer, generation, dtype_of_base(section), has_own_template(tokenizer))


def save_tokenizer(config: TrainerConfig, prepared: PreparedData, tokenizer: Any, folder: Path) -> None:
    """Writes the tokenizer and the generation config, which a trained model needs in addition to its weights.

    Args:
        config: The config of the run.
        prepared: The prepared data, which determine the chat template.
        tokenizer: The tokenizer of the run, which is not modified.
        folder: The folder to write to. The generation config contains all tokens that end an answer.
    """
    saved = copy.copy(tokenizer)
    saved.chat_template = trained_template(tokenizer, bool(prepared.train.plan.store.chats))
    saved.save_pretrained(folder)
    base = base_generation_config(config.model.name)
    trained_generation_config(base, tokenizer, end_tokens(tokenizer, ends_of(base))).save_pretrained(folder)
