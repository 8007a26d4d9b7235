"""Export: trained weights as a plain Hugging Face folder that any tool loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from myllm_ray.common.files import published
from myllm_ray.common.quiet import quieten, without_progress_bars
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import ModelSection
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.heads import RewardModel
from myllm_ray.models.load import config_of
from myllm_ray.models.lora import merge_adapters


def dtype_of_base(section: ModelSection) -> torch.dtype:
    """The dtype of the weights that training began from, as their config says; fp32 where it began from random ones."""
    found = None if section.name is None else getattr(config_of(section), "dtype", None)
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else torch.float32


def save_pretrained(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    generation: GenerationConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write model, its adapters merged, and tokenizer beside and rename into place.

    Args:
        generation: the generation config to write; default: the model's own.
        dtype: of the weights as they are written. Those that the architecture keeps in fp32 stay so.

    Raises:
        ConfigError: the model is not one of transformers, or the folder exists.
    """
    if not isinstance(model, (CausalLM, RewardModel)):
        raise ConfigError(
            f"export writes models of transformers; this one is {type(model).__name__}, of your own factory"
        )
    if folder.exists():
        raise ConfigError(f"{folder} exists: choose another folder, or remove it first")
    inner: Any = model.model
    merge_adapters(inner)
    _cast(inner, dtype)
    if generation is not None and inner.can_generate():
        inner.generation_config = generation
    quieten(cuda=torch.cuda.is_available())
    with published(folder, existing="error") as beside:
        with without_progress_bars():
            inner.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def _cast(model: Any, dtype: torch.dtype) -> None:
    kept = [
        *(getattr(model, "_keep_in_fp32_modules", None) or []),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or []),
    ]
    stays = re.compile("|".join(rf"(?:^|\.){re.escape(name)}(?:\.|$)" for name in kept) or "(?!)")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not stays.search(name):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
