"""Export: trained weights as a plain Hugging Face folder that any tool loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from myllm_ray.config.errors import ConfigError
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.heads import RewardModel
from myllm_ray.models.lora import merge_adapters


def save_pretrained(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write model, its adapters merged, and tokenizer beside and rename into place.

    Raises:
        ConfigError: the model is not one of transformers, or the folder exists.
    """
    if not isinstance(model, (CausalLM, RewardModel)):
        raise ConfigError(f"export writes models of transformers; this one is {type(model).__name__}, of your own factory")
    if folder.exists():
        raise ConfigError(f"{folder} exists: choose another folder, or remove it first")
    merge_adapters(model.model)
    beside = folder.with_name(f".{folder.name}.tmp")
    try:
        model.model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
