"""Export of trained weights to a standard Hugging Face folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from myllm_ray.common.files import published
from myllm_ray.common.progress import Task
from myllm_ray.common.quiet import quieten, without_progress_bars
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.sections import ModelSection
from myllm_ray.models.architecture import config_of
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.heads import RewardModel
from myllm_ray.models.lora import merge_adapters


def dtype_of_base(section: ModelSection) -> torch.dtype:
    """Returns the dtype of the weights that training started from, as their config states it.

    It is fp32 if training started from random weights.
    """
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
    """Writes a model and its tokenizer to a folder in Hugging Face format.

    Adapters are merged into the weights. The model is modified in place. The folder appears only when it is complete.

    Args:
        model: A `CausalLM` or a `RewardModel`.
        tokenizer: The tokenizer to write.
        folder: The folder to create.
        generation: The generation config to write; default: the model's own.
        dtype: The dtype of the written weights. Modules that the architecture keeps in fp32 stay in fp32.

    Raises:
        ConfigError: The model is not a transformers model, or the folder exists.
    """
    if not isinstance(model, (CausalLM, RewardModel)):
        raise ConfigError(
            f"export supports only transformers models; this model is a {type(model).__name__} from a custom factory"
        )
    if folder.exists():
        raise ConfigError(f"{folder} exists: choose another folder, or remove it first")
    inner: Any = model.model
    merge_adapters(inner)
    _cast(inner, dtype)
    if generation is not None and inner.can_generate():
        inner.generation_config = generation
    # transformers may import DeepSpeed here.
    quieten(cuda=torch.cuda.is_available())
    size = sum(p.numel() * p.element_size() for p in (*inner.parameters(), *inner.buffers()))
    with published(folder, existing="error") as beside:
        with Task("writing weights", size, lambda: _size(beside)), without_progress_bars():
            inner.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def _size(folder: Path) -> float:
    return float(sum(path.stat().st_size for path in sorted(folder.glob("*.safetensors"))))


def _cast(model: Any, dtype: torch.dtype) -> None:
    # transformers declares the modules that must stay in fp32.
    kept = [
        *(getattr(model, "_keep_in_fp32_modules", None) or []),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or []),
    ]
    stays = re.compile("|".join(rf"(?:^|\.){re.escape(name)}(?:\.|$)" for name in kept) or "(?!)")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not stays.search(name):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
