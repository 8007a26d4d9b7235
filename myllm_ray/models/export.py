"""Export of trained weights to a folder in Hugging Face format.

`save_pretrained` does everything in one call. `myllm_ray.runs.export` composes the same steps with a verification and a
model card.
"""

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
from myllm_ray.config.errors import ConfigError, UserError
from myllm_ray.config.sections import ModelSection
from myllm_ray.models.architecture import config_of
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.heads import RewardModel
from myllm_ray.models.lora import merge_adapters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes of exported weights by their names in options."""


def dtype_of_base(section: ModelSection) -> torch.dtype:
    """Returns the dtype of the weights that training started from, as their config states it.

    It is fp32 if training started from random weights.
    """
    found = None if section.name is None else getattr(config_of(section), "dtype", None)
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else torch.float32


def wrapped_model(model: nn.Module) -> Any:
    """Returns the transformers model inside a `CausalLM` or a `RewardModel`.

    Raises:
        ConfigError: The model comes from a custom factory and is not a transformers model.
    """
    if not isinstance(model, (CausalLM, RewardModel)):
        raise ConfigError(
            f"export supports only transformers models; this model is a {type(model).__name__} from a custom factory"
        )
    return model.model


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
        UserError: A weight is too large for the dtype.
    """
    inner = wrapped_model(model)
    if folder.exists():
        raise ConfigError(f"{folder} exists: choose another folder, or remove it first")
    merge_adapters(inner)
    cast_weights(inner, dtype)
    with published(folder, existing="error") as beside:
        write_model(inner, tokenizer, beside, generation)


def write_model(
    inner: Any,
    tokenizer: Any,
    folder: Path,
    generation: GenerationConfig | None = None,
    max_shard_size: str | None = None,
) -> None:
    """Writes a transformers model without adapters, its tokenizer and its configs as they are.

    Args:
        inner: The transformers model.
        tokenizer: The tokenizer to write.
        folder: The folder to write to.
        generation: The generation config to write; default: the model's own.
        max_shard_size: The largest size of a file of weights, such as `5GB`; default: that of transformers.
    """
    if generation is not None and inner.can_generate():
        inner.generation_config = generation
    # transformers may import DeepSpeed here.
    quieten(cuda=torch.cuda.is_available())
    size = sum(p.numel() * p.element_size() for p in (*inner.parameters(), *inner.buffers()))
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with Task("writing weights", size, lambda: _size(folder)), without_progress_bars():
        inner.save_pretrained(folder, **sharding)
    tokenizer.save_pretrained(folder)


def _size(folder: Path) -> float:
    return float(sum(path.stat().st_size for path in sorted(folder.glob("*.safetensors"))))


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Converts the floating-point weights of a transformers model to a dtype, in place.

    Modules that the architecture keeps in fp32 are not converted.

    Raises:
        UserError: A weight is too large for the dtype, which only fp16 causes.
    """
    kept = [
        *(getattr(model, "_keep_in_fp32_modules", None) or []),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or []),
    ]
    stays = re.compile("|".join(rf"(?:^|\.){re.escape(name)}(?:\.|$)" for name in kept) or "(?!)")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not stays.search(name):
            parameter.data = converted(name, parameter.data, dtype)
    model.config.dtype = dtype


def converted(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a weight in another dtype.

    Raises:
        UserError: A finite value becomes infinite.
    """
    result = weight.to(dtype)
    if dtype == torch.float16 and bool((torch.isinf(result) & torch.isfinite(weight)).any()):
        largest = float(weight[torch.isfinite(weight)].abs().max())
        raise UserError(f"fp16 can't represent {name}, whose largest value is {largest:.3g}: use --dtype bf16 or fp32")
    return result
