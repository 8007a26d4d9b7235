"""Checks of a config against its model and data, before anything is started."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from myllm_ray.common.pretrained import checkpoint_in, tokenizer_folder
from myllm_ray.common.types import Isolation
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import ModelSection
from myllm_ray.config.trainers import takes_config
from myllm_ray.data.cache import DataCache
from myllm_ray.data.tokenizer import open_tokenizer
from myllm_ray.dependencies import _other_reference, _reward_section, kind_of_model, model_section, trainer_class_of
from myllm_ray.models.architecture import config_of
from myllm_ray.models.isolation import find_isolation
from myllm_ray.models.load import build_skeleton
from myllm_ray.ops.documents import KernelChoice
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.rewards import FunctionReward

log = logging.getLogger(__name__)

_FLASH = {"flash2": "flash_attn", "flash3": "flash_attn_interface"}
"""The module of each kernel of FlashAttention."""


def isolation_of(config: TrainerConfig) -> Isolation:
    """Returns whether documents, or answers, that share a row are independent of each other in the config's model.

    Raises:
        ConfigError: the model is not causal, or `data.packing: required` can't be satisfied.
    """
    cls = trainer_class_of(config)
    section, cache = model_section(config), DataCache.of(config).folder
    if config.data.packing == "required" and cls.layout == "padded":
        raise ConfigError(
            f"data.packing: required: trainer {config.trainer} has one example per row; leave data.packing out"
        )
    if cls.layout != "padded" and config.data.packing:
        kind = kind_of_model(config) if cls.layout == "rollouts" else "causal_lm"
        models = [(section, kind), *((s, "causal_lm") for s in _other_policies(config, cls))]
        found = [find_isolation(s, kind, cls.layout, config.data.sequence_length, cache) for s, kind in models]
        # All models score the same rows, so the one that supports least decides.
        verdict = next(
            (v for v in found if v.isolated is not True), next((v for v in found if not v.boundaries), found[0])
        )
        if verdict.isolated:
            return verdict
        if config.data.packing == "required":
            raise ConfigError(f"data.packing: required, but {verdict}; with data.packing: true each gets its own row")
    alone = find_isolation(section, "causal_lm", "padded", config.data.sequence_length, cache)
    if alone.isolated is False:
        hint = "; models with an encoder's attention need model.config.is_decoder: true" if not alone.causal else ""
        raise ConfigError(f"model: {alone}, so it can't be trained to predict the next token{hint}")
    return verdict if cls.layout != "padded" and config.data.packing else alone


def _other_policies(config: TrainerConfig, cls: type[BaseTrainer]) -> list[ModelSection]:
    """Returns models other than the trained one that score packed answers."""
    name = getattr(config.trainer_section, "reference_model", None) if cls.layout == "rollouts" else None
    return [] if name is None else [ModelSection(name=name, attention=config.model.attention)]


def check_attention(config: TrainerConfig, isolation: Isolation) -> None:
    """Refuses a kernel of `model.attention` that the run can't use for the documents of its rows.

    Args:
        config: The config of the run.
        isolation: The result of `isolation_of`.

    Raises:
        ConfigError: The reason. `auto` is never refused: it uses a mask instead.
    """
    chosen = config.model.attention
    if chosen in ("auto", "sdpa", "eager"):
        return
    why = _no_documents(config, isolation) or _no_kernel(config, chosen)
    if why:
        raise ConfigError(f"model.attention: {chosen} can't be used: {why}; use auto or sdpa")


def document_kernel(config: TrainerConfig, isolation: Isolation | None, device: torch.device) -> KernelChoice | None:
    """Returns the kernel for the documents of a run's rows, or None for attention with a mask.

    It is a function of the config, of the device type and, for `auto` on CUDA, of the installed packages.

    Args:
        config: The config of the run.
        isolation: The result of `isolation_of`; None: it is not known.
        device: The device of this rank.

    Raises:
        ConfigError: The kernel needs another device.
    """
    chosen = config.model.attention
    if chosen == "sdpa" or chosen == "eager" or isolation is None or _no_documents(config, isolation):
        return None
    if chosen == "auto":
        fast = device.type == "cuda" and config.accelerator.precision != "fp32" and _installed("flash2")
        return "flash2" if fast else "auto"
    if chosen != "per_document" and device.type != "cuda":
        raise ConfigError(f"model.attention: {chosen} needs a CUDA device, this rank has {device.type}; use auto")
    return chosen


def _no_documents(config: TrainerConfig, isolation: Isolation) -> str | None:
    """Returns why attention can't be computed within the documents of a row, or None."""
    cls = trainer_class_of(config)
    if config.model.factory:
        return "a model from model.factory computes its own attention"
    if cls.layout == "padded" or (cls.layout == "rollouts" and not config.data.packing):
        return f"trainer {config.trainer} has one example per row in this config"
    if config.accelerator.compile != "none":
        return f"accelerator.compile={config.accelerator.compile} would compile each layout of documents"
    for name, value in config_of(model_section(config)).to_dict().items():
        if "att" in name and "drop" in name and isinstance(value, float) and value > 0:
            return f"it has no dropout, and model.config.{name} is {value}"
    return None if isolation.boundaries else isolation.boundaries_reason


def _no_kernel(config: TrainerConfig, kernel: str) -> str | None:
    """Returns why a kernel does not run on the devices of a config, or None."""
    if kernel == "per_document":
        return None
    scaling = config.scaling
    # Workers of Ray see the GPUs that they request, which this process may not see.
    cuda = scaling.gpus_per_worker > 0 if scaling.most else torch.cuda.is_available()
    if config.accelerator.device == "cpu" or not cuda:
        return "it needs a CUDA device"
    if kernel in _FLASH and config.accelerator.precision == "fp32":
        return "it has no fp32: set accelerator.precision=bf16"
    return None if _installed(kernel) else f"the module {_FLASH[kernel]} is not installed"


def _installed(kernel: str) -> bool:
    return kernel not in _FLASH or importlib.util.find_spec(_FLASH[kernel]) is not None


def check_dependencies(config: TrainerConfig, kind: str) -> None:
    """Checks the data and the rewards against the trainer, before anything is started.

    Args:
        config: the config of the run.
        kind: kind of the documents (data/examples.py).

    Raises:
        ConfigError: the trainer reads another kind of data, or a reward function does not exist.
    """
    cls = trainer_class_of(config)
    if kind not in cls.reads:
        formats = {
            "tokens": "text, instruction, chat or prompt_completion",
            "pairs": "preference",
            "labelled": "unpaired",
            "prompts": "prompt",
        }
        raise ConfigError(
            f"data.train.format gives {kind}, trainer {config.trainer} reads {' or '.join(cls.reads)}: use the format "
            f"{' or '.join(formats[r] for r in cls.reads)}, or a custom format that returns them"
        )
    if not takes_config(cls):
        _check_keywords(config, cls)
    for reward in getattr(config.trainer_section, "reward", []) if "rewards" in cls.dependencies else []:
        FunctionReward(reward)
        if reward.workers and config.scaling.most == 0:
            raise ConfigError(
                f"reward {reward.function}: workers={reward.workers} needs Ray: scaling.workers must be at least 1"
            )


def _check_keywords(config: TrainerConfig, cls: type[BaseTrainer]) -> None:
    """Refuses options that a part of the program would ignore, of a class that overrides `__init__` without a `Config`.

    Its options are keyword arguments of the constructor. Keys of the `Config` that it inherits also determine the data,
    the frozen models and the rewards, which are made before the trainer.
    """
    inherited = [key for key in config.options if key in cls.Config.model_fields]
    if inherited or cls.sections:
        what = f"options {', '.join(inherited)}" if inherited else f"the section {', '.join(cls.sections)}"
        raise ConfigError(
            f"trainer: {config.trainer} overrides __init__, so {what} would be ignored in part: declare "
            f"`class Config({cls.__mro__[1].__name__}.Config)` with its settings in it (docs/extending.md)"
        )


def check_frozen(config: TrainerConfig, tokenizer: Any) -> None:
    """Builds the frozen models of the config on the meta device, and compares their tokenizers with the run's.

    Raises:
        ConfigError: one can't be loaded, does not fit the data, or has other token ids than the run.
    """
    dependencies = trainer_class_of(config).dependencies
    for name, kind in (("reference_model", "causal_lm"), ("reward_model", "reward_model")):
        folder = getattr(config.trainer_section, name, None)
        if not folder or not {name, name.removesuffix("_model")} & {*dependencies}:
            continue
        try:
            section = _reward_section(folder) if kind == "reward_model" else _other_reference(config, folder)
            build_skeleton(section, tokenizer, config.data.sequence_length, kind)
            _check_tokens(folder, tokenizer)
        except ConfigError as error:
            raise ConfigError(
                f"{config.section_key}.{name}: {str(error).removeprefix('model.name: ').removeprefix('reward_model: ')}"
            ) from None


def _check_tokens(name: str, tokenizer: Any) -> None:
    """Raises ConfigError if a model's own tokenizer has other ids for the same tokens.

    The model is called with the token ids of the run.
    """
    checkpoint = checkpoint_in(name)
    own = Path(name).expanduser() if checkpoint is None else tokenizer_folder(checkpoint)
    if not (own / "tokenizer.json").is_file():
        return
    theirs = open_tokenizer(str(own)).get_vocab()
    different = sorted((id, token) for token, id in tokenizer.get_vocab().items() if theirs.get(token, id) != id)
    if different:
        id, token = different[0]
        raise ConfigError(
            f"{name} has a tokenizer with other ids for {len(different)} tokens ({token!r} is {theirs[token]} there, "
            f"{id} in this run): it would receive wrong tokens; use a model with the run's tokenizer"
        )


def check_routers(config: TrainerConfig, model: nn.Module) -> None:
    """Checks that the load of a model's experts is balanced by a loss, and logs a warning if it is not.

    Raises:
        ConfigError: the model has a loss for its routers, and the trainer does not train it.
    """
    weight = float(getattr(model, "router_loss_weight", 0.0))
    if weight and not trainer_class_of(config).trains_routers:
        raise ConfigError(
            f"model.router_loss_weight={weight:g}: trainer {config.trainer} does not train the loss of the routers "
            "(trains_routers, docs/training.md); set it to 0"
        )
    if getattr(model, "routers", None) and config.model.router_loss_weight is None and not weight:
        log.warning(
            "this mixture-of-experts model has no weight for a load-balancing loss, so its experts are not balanced: "
            "set model.router_loss_weight (0 if this is intended)"
        )
