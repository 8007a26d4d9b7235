"""Generation config of a trained model: the base model's settings (temperature, top_p, ...) with all end tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig

from myllm_ray.common.pretrained import checkpoint_in, pretrained_folder, tokenizer_folder


def base_generation_config(name: str | None) -> GenerationConfig | None:
    """Returns the generation config of a hub id, a folder in Hugging Face format or a run's folder; None if absent."""
    if name is None:
        return None
    checkpoint = checkpoint_in(name)
    try:
        folder = pretrained_folder(name, "model.name") if checkpoint is None else tokenizer_folder(checkpoint)
        return GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError):
        return None


def ends_of(config: GenerationConfig | None) -> list[int]:
    """Returns the ids of the tokens that end an answer according to a generation config."""
    given: Any = config.eos_token_id if config is not None else None
    return [] if given is None else [int(i) for i in (given if isinstance(given, (list, tuple)) else [given])]


def trained_generation_config(
    base: GenerationConfig | None, tokenizer: Any, end_tokens: Sequence[int]
) -> GenerationConfig:
    """Returns the generation config of a trained model.

    Args:
        base: The generation config of the base model, if any.
        tokenizer: The tokenizer used for training; supplies missing bos and pad ids.
        end_tokens: The ids of the tokens that end an answer.
    """
    given = {} if base is None else base.to_dict()
    try:
        return _completed(given, tokenizer, end_tokens)
    except ValueError:
        # Some published configs set a temperature without do_sample, and transformers refuses to save such a config.
        return _completed({**given, "do_sample": True}, tokenizer, end_tokens)


def _completed(given: dict[str, Any], tokenizer: Any, end_tokens: Sequence[int]) -> GenerationConfig:
    config: GenerationConfig = GenerationConfig.from_dict(given)
    config.eos_token_id = list(end_tokens) if len(end_tokens) > 1 else int(end_tokens[0])
    config.bos_token_id = tokenizer.bos_token_id if config.bos_token_id is None else config.bos_token_id
    config.pad_token_id = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
    config.validate(strict=True)
    return config
