"""Loading of trained models from a run, a checkpoint or an exported folder, for sampling and export."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from myllm_ray.base_weights import check_base
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
from myllm_ray.models.load import build_model


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
        path: The folder of a run, of one of its checkpoints, or of an exported model.

    Returns:
        The model and the tokenizer.

    Raises:
        CheckpointError: There is no complete checkpoint.
        ConfigError: An exported folder can't be loaded.
    """
    opened = open_trained(path)
    return opened.model, opened.tokenizer


def open_trained(path: str | Path, ema: bool = False) -> TrainedModel:
    """Loads a trained model with its tokenizer and generation config.

    Args:
        path: The folder of a run, whose newest checkpoint is loaded, of one of its checkpoints, or of a model in
            Hugging Face format.
        ema: Whether to load the moving averages of the weights instead of the weights.

    Returns:
        The trained model.

    Raises:
        CheckpointError: There is no complete checkpoint, the base of its adapters is missing or has changed, or with
            `ema`, it contains no averages.
        ConfigError: A folder in Hugging Face format can't be loaded.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        if ema:
            raise CheckpointError(f"{path} is an exported model, which has no averaged weights (ema): give the run")
        return _open_exported(path)
    manager = CheckpointManager(folder=path / "checkpoints" if (path / "checkpoints").is_dir() else path.parent)
    newest = manager.latest() if manager.folder.name == "checkpoints" and manager.folder.parent == path else path
    if newest is None or (damage := find_damage(newest)):
        raise CheckpointError(f"{path} contains no complete checkpoint" + (f": {damage}" if newest else ""))
    check_base(newest)
    if ema:
        check_averages(newest)
    config = validate(read_manifest(newest)["config"], where=f"{newest}/manifest.json", components=False)
    beside = newest / "tokenizer"  # only checkpoints in Ray's storage contain a tokenizer folder
    folder = beside if beside.is_dir() else newest.parent.parent / "tokenizer"
    tokenizer = open_tokenizer(str(folder))
    model = build_model(
        model_section(config), tokenizer, config.data.sequence_length, config.run.seed, kind_of_model(config)
    )
    manager.load_model(newest, model)
    if ema:
        load_averages(newest, model)
    base = base_generation_config(str(folder)) or base_generation_config(config.model.name)
    generation = trained_generation_config(base, tokenizer, end_tokens(tokenizer, ends_of(base)))
    chats = has_own_template(tokenizer) or any(source.format == "chat" for source in config.data.sources)
    tokenizer.chat_template = trained_template(tokenizer, chats)
    return TrainedModel(model, tokenizer, generation, dtype_of_base(config.model), chats, newest)


def _open_exported(path: Path) -> TrainedModel:
    """Loads a model from a folder in Hugging Face format."""
    tokenizer = open_tokenizer(str(path))
    section = ModelSection(name=str(path))
    heads = getattr(config_of(section), "architectures", None) or []
    kind = "reward_model" if any(head.endswith("ForSequenceClassification") for head in heads) else "causal_lm"
    model = build_model(section, tokenizer, 2, 0, kind)
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
