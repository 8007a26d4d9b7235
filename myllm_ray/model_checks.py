"""Checks of a config against its model and data, before anything is started."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from myllm_ray.common.pretrained import checkpoint_in, tokenizer_folder
from myllm_ray.common.types import Isolation
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import ModelSection
from myllm_ray.config.trainers import takes_config
from myllm_ray.data.tokenizer import open_tokenizer
from myllm_ray.dependencies import _other_reference, _reward_section, kind_of_model, model_section, trainer_class_of
from myllm_ray.models.isolation import find_isolation
from myllm_ray.models.load import build_skeleton
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.rewards import FunctionReward

log = logging.getLogger(__name__)


def isolation_of(config: TrainerConfig) -> Isolation:
    """Returns whether documents, or answers, that share a row are independent of each other in the config's model.

    Raises:
        ConfigError: the model is not causal, or `data.packing: required` can't be satisfied.
    """
    cls = trainer_class_of(config)
    section, cache = model_section(config), Path(config.data.cache or Path(config.run.storage) / ".data")
    if config.data.packing == "required" and cls.layout == "padded":
        raise ConfigError(
            f"data.packing: required: trainer {config.trainer} has one example per row; leave data.packing out"
        )
    if cls.layout != "padded" and config.data.packing:
        kind = kind_of_model(config) if cls.layout == "rollouts" else "causal_lm"
        models = [(section, kind), *((s, "causal_lm") for s in _other_policies(config, cls))]
        found = [find_isolation(s, kind, cls.layout, config.data.sequence_length, cache) for s, kind in models]
        verdict = next((v for v in found if v.isolated is not True), found[0])
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
