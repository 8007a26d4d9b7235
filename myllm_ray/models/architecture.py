"""The architecture of a model, from a config or a name, without the weights of the name."""

from __future__ import annotations

import copy
import difflib
import inspect
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from myllm_ray.common.pretrained import architecture_folder, checkpoint_in, gguf_arguments, pretrained_folder
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.sections import ModelSection
from myllm_ray.models.attention import implementation
from myllm_ray.models.trial_forward import one_line
from myllm_ray.models.vocabulary import new_rows

_TOO_FEW = "the model has {} token embeddings, the tokenizer {} tokens: use the model's own tokenizer, or {}"


def auto_class(kind: str) -> Any:
    """Returns the class of transformers that builds models of a kind (`models.load.build_deferred`)."""
    return AutoModelForSequenceClassification if kind == "reward_model" else AutoModelForCausalLM


def implementation_of(section: ModelSection, config: Any, kind: str = "causal_lm") -> str | None:
    """Returns the name of the section's attention in transformers, for a model of this config.

    Args:
        section: The section `model` of the config.
        config: The transformers config.
        kind: See `models.load.build_deferred`.

    Raises:
        ConfigError: The architecture does not support the attention; see `models.attention.implementation`.
    """
    return implementation(section.attention, auto_class(kind)._model_mapping.get(type(config), None))


def config_of(section: ModelSection) -> Any:
    """Returns the transformers config of a model section without a factory."""
    if section.name is not None:
        return config_of_name(section)
    given = dict(section.config or {})
    return AutoConfig.for_model(given.pop("model_type"), **given)


def config_of_name(section: ModelSection) -> Any:
    """Returns the config of a folder, a run or a hub id, updated with `section.config`.

    `without_dropout` sets values in `section.config` for a model with a name.
    """
    name = section.name or ""
    checkpoint = checkpoint_in(name)
    if checkpoint is not None:
        folder = architecture_folder(checkpoint)
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.name: {checkpoint} is a checkpoint, but {folder} does not contain the config of its model: "
                "use the run's folder, or export the run"
            )
    else:
        folder = pretrained_folder(name, "model.name", code=section.trust_remote_code)
    try:
        return AutoConfig.from_pretrained(
            folder, trust_remote_code=section.trust_remote_code, **gguf_arguments(name), **(section.config or {})
        )
    except Exception as error:  # invalid JSON, invalid values, or errors in the folder's own code
        raise ConfigError(f"model.name: {name!r} can't be loaded: {one_line(error)}") from None


def random_by_name(section: ModelSection, kind: str, tokens: int) -> PreTrainedModel:
    """Builds the model of a name with random weights.

    Args:
        section: The section `model` of the config.
        kind: See `build_deferred`.
        tokens: The number of tokens of the tokenizer.
    """
    config = config_of_name(section)
    if section.resize_vocabulary:
        config.get_text_config().vocab_size = new_rows(config.get_text_config().vocab_size, tokens)
    if kind == "reward_model":
        config.num_labels = 1
    try:
        model: PreTrainedModel = auto_class(kind).from_config(
            config,
            attn_implementation=implementation_of(section, config, kind),
            dtype=torch.float32,
            trust_remote_code=section.trust_remote_code,
        )
    except (ValueError, ImportError) as error:  # an attention or a head that the architecture does not have
        raise ConfigError(f"model.name: {section.name!r} can't be built: {_attention_hint(error)}") from None
    return model


def _attention_hint(error: Exception) -> str:
    text = str(error)
    if "attention implementation" in text:
        return "the architecture has no model.attention: sdpa; use eager"
    return one_line(error)


def from_config(section: ModelSection, tokenizer: Any, sequence_length: int, kind: str) -> PreTrainedModel:
    """Builds the model of `section.config` with random weights, on the current device.

    Args:
        section: The section `model` of the config.
        tokenizer: The tokenizer; determines the vocabulary size if the config has none.
        sequence_length: The length of the training rows, in tokens.
        kind: See `models.load.build_deferred`.

    Raises:
        ConfigError: A key or value is wrong.
    """
    given = dict(section.config or {})
    model_type = given.pop("model_type")
    try:
        default = AutoConfig.for_model(model_type)
    except (ValueError, TypeError):
        raise ConfigError(
            f"model.config.model_type: transformers has no model type {model_type!r}; examples are llama, qwen3, "
            "gemma3_text and gpt2"
        ) from None
    for key in given:
        if not hasattr(default, key) and not _reads(default, key):
            close = difflib.get_close_matches(key, [k for k in vars(default) if not k.startswith("_")], 1)
            hint = f"did you mean {close[0]}?" if close else f"{type(default).__name__} has no such setting"
            raise ConfigError(f"unknown key model.config.{key}: {hint}")
    if not isinstance(given.setdefault("vocab_size", len(tokenizer)), int):
        raise ConfigError(
            f"model.config.vocab_size={given['vocab_size']!r} is not an integer; "
            "leave it out to use the tokenizer's size"
        )
    if given["vocab_size"] < len(tokenizer):
        raise ConfigError(_TOO_FEW.format(given["vocab_size"], len(tokenizer), "leave model.config.vocab_size out"))
    given.setdefault("eos_token_id", tokenizer.eos_token_id)
    given.setdefault("bos_token_id", tokenizer.bos_token_id)
    given.setdefault("pad_token_id", None)
    positions = default.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if sequence_length > getattr(default, positions, sequence_length):
        given.setdefault(positions, sequence_length)
    try:
        config = AutoConfig.for_model(model_type, **given, **({"num_labels": 1} if kind == "reward_model" else {}))
        model: PreTrainedModel = auto_class(kind).from_config(
            config, attn_implementation=implementation_of(section, config, kind), dtype=torch.float32
        )
        return model
    except ConfigError:
        raise
    except Exception as error:  # the code of an architecture may raise any exception for an invalid value
        raise ConfigError(
            f"model.config: transformers can't build this {model_type}: {_attention_hint(error)}"
        ) from None


def _reads(config: Any, key: str) -> bool:
    """Returns whether the code of a model reads a key that its config class does not declare.

    An example is `head_dim` of Qwen3-MoE.
    """
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    module = inspect.getmodule(model_class) if model_class is not None else None
    return module is not None and f'"{key}"' in inspect.getsource(module)


def save_architecture(model: nn.Module, section: ModelSection, folder: Path) -> None:
    """Writes the config of a wrapped transformers model, so that another run can start from the checkpoints.

    The `dtype` in the config is that of the weights that training started from. For other models nothing is written.

    Args:
        model: The wrapped model.
        section: The section `model` of the config.
        folder: The folder to write to, next to the run's checkpoints.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return
    config = copy.deepcopy(config)
    if section.name is not None:
        config.dtype = config_of(section).dtype
    config.save_pretrained(folder)


def check_fit(model: PreTrainedModel, tokenizer: Any, sequence_length: int) -> None:
    """Raises ConfigError if a model has fewer embeddings than the tokenizer has tokens, or rows are too long for it."""
    rows = int(cast(torch.Tensor, model.get_input_embeddings().weight).shape[0])
    if rows < len(tokenizer):
        raise ConfigError(_TOO_FEW.format(rows, len(tokenizer), "set model.resize_vocabulary: true to add embeddings"))
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and sequence_length > limit:
        raise ConfigError(f"data.sequence_length={sequence_length} exceeds the model's maximum of {limit} positions")
