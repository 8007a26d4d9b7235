"""What a trainer is built from: its model, frozen models, sampler, rewards. From a config, by the names in `BaseTrainer.uses`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from myllm_ray.common.pretrained import checkpoint_in, tokenizer_folder
from myllm_ray.common.types import Isolation, Reward, RolloutPool, steps_of_run
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import resolve
from myllm_ray.config.schema import ModelSection, TrainerConfig
from myllm_ray.config.trainers import RewardFunction, RolloutSection
from myllm_ray.data.chat_template import end_tokens
from myllm_ray.data.prepare import PreparedData
from myllm_ray.data.records import prompt_row
from myllm_ray.data.store import TokenStore
from myllm_ray.data.stream import StreamSpec
from myllm_ray.data.tokenizer import open_tokenizer
from myllm_ray.engine.checkpoint import read_manifest
from myllm_ray.models.generate import HFSampler
from myllm_ray.models.generation_config import base_generation_config, ends_of
from myllm_ray.models.isolation import find_isolation
from myllm_ray.models.load import build_deferred, build_skeleton, config_of
from myllm_ray.models.sharing import shares_prompts
from myllm_ray.models.shrink import without_dropout
from myllm_ray.reference_table import reference_table
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.preference import ReferenceTable
from myllm_ray.trainers.rewards import FunctionReward

log = logging.getLogger(__name__)


def knobs_of(config: TrainerConfig) -> Any:
    """The trainer's own section; None for a trainer of the user's own, which gets `options`."""
    return getattr(config, config.trainer, None)


def kind_of_model(config: TrainerConfig) -> str:
    """What `build_deferred` is to build."""
    kind: str = resolve("trainers", config.trainer, "trainer").trains
    own = getattr(knobs_of(config), "critic", "shared") == "own"
    return "actor_own_critic" if kind == "actor_critic" and own else kind


def model_section(config: TrainerConfig) -> ModelSection:
    """The model to train. Without dropout where answers are compared: it would be a difference between equal models."""
    cls: type[BaseTrainer] = resolve("trainers", config.trainer, "trainer")
    return without_dropout(config.model)[0] if "reference" in cls.uses else config.model


def stop_tokens(section: ModelSection, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer of a model: of the tokenizer, its chat template, and the generation config that the model began with."""
    return end_tokens(tokenizer, ends_of(base_generation_config(section.name)))


def isolation_of(config: TrainerConfig) -> Isolation:
    """Whether the documents, or answers, that the config's trainer puts in one row are independent in the config's model.

    Raises:
        ConfigError: not even one document a row is computed as it should be, or `data.packing: required` can't be kept.
    """
    cls: type[BaseTrainer] = resolve("trainers", config.trainer, "trainer")
    section, cache = model_section(config), Path(config.data.cache or Path(config.run.storage) / ".data")
    if config.data.packing == "required" and cls.layout == "padded":
        raise ConfigError(f"data.packing: required: trainer {config.trainer} has one record a row; leave data.packing out")
    if cls.layout != "padded" and config.data.packing:
        kind = kind_of_model(config) if cls.layout == "rollouts" else "causal_lm"
        asked = [(section, kind), *((s, "causal_lm") for s in _other_policies(config, cls))]
        found = [find_isolation(s, kind, cls.layout, config.data.sequence_length, cache) for s, kind in asked]
        verdict = next((v for v in found if v.isolated is not True), found[0])
        if verdict.isolated:
            return verdict
        if config.data.packing == "required":
            raise ConfigError(f"data.packing: required, but {verdict}; with data.packing: true each has a row of its own")
    alone = find_isolation(section, "causal_lm", "padded", config.data.sequence_length, cache)
    if alone.isolated is False:
        hint = "; models with an encoder's attention need model.config.is_decoder: true" if not alone.causal else ""
        raise ConfigError(f"model: {alone}, so it can't be trained to predict the next token{hint}")
    return verdict if cls.layout != "padded" and config.data.packing else alone


def _other_policies(config: TrainerConfig, cls: type[BaseTrainer]) -> list[ModelSection]:
    """Models besides the trained one that score packed answers."""
    name = getattr(knobs_of(config), "reference_model", None) if cls.layout == "rollouts" else None
    return [] if name is None else [ModelSection(name=name, attention=config.model.attention)]


def check_roles(config: TrainerConfig, kind: str) -> None:
    """Find what is wrong with names and data before anything is started.

    Args:
        kind: of the documents (data/records.py).

    Raises:
        ConfigError: the data is of another kind than the trainer reads, or a function, folder or run is not there.
    """
    cls: type[BaseTrainer] = resolve("trainers", config.trainer, "trainer")
    knobs = knobs_of(config)
    reads = ("labelled",) if getattr(knobs, "loss", None) == "kto" else cls.reads
    if kind not in reads:
        formats = {"tokens": "text, instruction, chat or prompt_completion", "pairs": "preference", "labelled": "unpaired", "prompts": "prompt"}
        raise ConfigError(f"data.train.format gives {kind}, trainer {config.trainer} reads {' or '.join(reads)}: use the format "
                          f"{' or '.join(formats[r] for r in reads)}, or one of your own that gives them")
    for reward in getattr(knobs, "reward", None) or []:
        FunctionReward(reward)
        if reward.workers and config.scaling.most == 0:
            raise ConfigError(f"reward {reward.function}: workers={reward.workers} are Ray actors: scaling.workers must be at least 1")


def check_frozen(config: TrainerConfig, tokenizer: Any) -> None:
    """Build the frozen models that the config names without memory, and look at their tokenizers, before anything is started.

    Raises:
        ConfigError: one can't be loaded, does not fit the data, or numbers tokens in another way than the run does.
    """
    knobs = knobs_of(config)
    for name, kind in (("reference_model", "causal_lm"), ("reward_model", "reward_model")):
        folder = getattr(knobs, name, None)
        if not folder:
            continue
        try:
            section = _reward_section(folder) if kind == "reward_model" else _other_reference(config, folder)
            build_skeleton(section, tokenizer, config.data.sequence_length, kind)
            _check_tokens(folder, tokenizer)
        except ConfigError as error:
            raise ConfigError(f"{config.trainer}.{name}: {str(error).removeprefix('model.name: ').removeprefix('reward_model: ')}") from None


def _check_tokens(name: str, tokenizer: Any) -> None:
    """Tokens that a model's own tokenizer has, too, must have the same ids there: the model gets the ids of the run's tokenizer."""
    checkpoint = checkpoint_in(name)
    own = Path(name).expanduser() if checkpoint is None else tokenizer_folder(checkpoint)
    if not (own / "tokenizer.json").is_file():
        return
    theirs = open_tokenizer(str(own)).get_vocab()
    different = sorted((id, token) for token, id in tokenizer.get_vocab().items() if theirs.get(token, id) != id)
    if different:
        id, token = different[0]
        raise ConfigError(f"{name} has a tokenizer that numbers {len(different)} tokens in another way ({token!r} is {theirs[token]} there, {id} in this "
                          "run): it would read other texts than the ones that are meant; use a model with the run's tokenizer")


def check_routers(config: TrainerConfig, model: nn.Module) -> None:
    """Find routers of experts that nothing would balance.

    Raises:
        ConfigError: the model has a loss for its routers, and the trainer does not train it.
    """
    weight = float(getattr(model, "router_loss_weight", 0.0))
    if weight and not resolve("trainers", config.trainer, "trainer").trains_routers:
        raise ConfigError(f"model.router_loss_weight={weight:g}: trainer {config.trainer} does not train the loss of the routers "
                          "(trains_routers, docs/training.md); set it to 0")
    if getattr(model, "routers", None) and config.model.router_loss_weight is None and not weight:
        log.warning("this mixture-of-experts model has no coefficient for a loss that balances its experts, so nothing does: "
                    "set model.router_loss_weight (0 if that is what you want)")


def roles_of(config: TrainerConfig, tokenizer: Any, prepared: PreparedData, services: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments for the trainer, by what it says it uses.

    Args:
        services: what there is only on Ray: `reward` and `rollouts`, which make pools of actors.
    """
    cls: type[BaseTrainer] = resolve("trainers", config.trainer, "trainer")
    knobs, build = knobs_of(config), _Build(config, tokenizer, prepared)
    makers: dict[str, Callable[[], Any]] = {
        "knobs": lambda: knobs, "seed": lambda: config.run.seed,
        "micro_size": lambda: getattr(config, "rollout", RolloutSection()).micro_size,
        "shared_prompt": build.shared_prompt, "reference": build.reference, "reference_table": build.reference_table,
        "validation_table": build.validation_table,
        "reward_model": build.reward_model, "rewards": lambda: [_reward(r, services or {}) for r in getattr(knobs, "reward", [])],
        "packs_rows": lambda: prepared.packs_answers,
        "pool": lambda: _pool(config, services or {}), "max_lag": lambda: getattr(config, "rollout", RolloutSection()).max_lag,
        "sampler": lambda: HFSampler(tokenizer, getattr(config, "rollout", RolloutSection()), stop_tokens(config.model, tokenizer)),
        "columns": lambda: partial(_reward_fields, prepared.train.plan.store),
        "validation_columns": lambda: partial(_reward_fields, prepared.validation.plan.store) if prepared.validation else None}
    return {name: value for name in cls.uses if (value := makers[name]()) is not None}


def _reward_fields(store: TokenStore, document: int) -> dict[str, Any]:
    """What reward functions get to know of the data row behind a prompt (`Columns` of trainers/online.py)."""
    row = prompt_row(store, document)
    return {**row.columns, **({"tools": row.tools} if row.tools else {}), "prompts": row.prompt, "prompt_texts": row.text}


def _reward(settings: RewardFunction, services: Mapping[str, Any]) -> Reward:
    if not settings.workers:
        return FunctionReward(settings)
    reward: Reward = services["reward"](settings)
    return reward


def _pool(config: TrainerConfig, services: Mapping[str, Any]) -> RolloutPool | None:
    rollout = getattr(config, "rollout", None)
    if rollout is None or rollout.placement == "colocated":
        return None
    pool: RolloutPool = services["rollouts"](rollout.actors)
    return pool


class _Build:
    def __init__(self, config: TrainerConfig, tokenizer: Any, prepared: PreparedData):
        self.config, self.tokenizer, self.prepared, self.knobs = config, tokenizer, prepared, knobs_of(config)

    def shared_prompt(self) -> bool:
        if getattr(self.knobs, "shared_prompt", "never") == "never" or self.config.model.attention != "sdpa":
            return False
        return shares_prompts(self.config.model, self.config.data.sequence_length)

    def needs_reference(self) -> bool:
        needs = getattr(self.knobs, "needs_reference", None)
        return bool(getattr(self.knobs, "kl_weight", 0)) if needs is None else bool(needs)

    def reference_section(self) -> ModelSection:
        other = getattr(self.knobs, "reference_model", None)
        section = self.config.model if other is None else _other_reference(self.config, other)
        return without_dropout(section)[0].model_copy(update={"lora": None})  # new adapters change nothing yet

    def reference(self) -> nn.Module | None:
        if not self.needs_reference() or getattr(self.knobs, "reference", "copy") != "copy":
            return None
        return self._frozen(self.reference_section())

    def _frozen(self, section: ModelSection, kind: str = "causal_lm") -> nn.Module:
        return build_deferred(section, self.tokenizer, self.config.data.sequence_length, self.config.run.seed, kind)

    def reward_model(self) -> nn.Module | None:
        name = self.knobs.reward_model if self.knobs else None
        if not name:
            return None
        return self._frozen(_reward_section(name), "reward_model")

    def reference_table(self) -> ReferenceTable | None:
        """Of the training data, where `reference` is precomputed."""
        config, spec = self.config, self.prepared.train
        return self._table(spec, steps_of_run(config.run.max_steps, config.run.epochs, config.steps_per_batch, spec.steps_in_epoch))

    def validation_table(self) -> ReferenceTable | None:
        """The same of the validation data, whose documents may be of another store."""
        spec = self.prepared.validation
        return None if spec is None else self._table(spec, min(spec.steps_in_epoch(0), self.config.evaluation.max_batches or 2**62))

    def _table(self, spec: StreamSpec, batches: int) -> ReferenceTable | None:
        if getattr(self.knobs, "reference", "copy") != "precomputed" or not self.needs_reference():
            return None
        return reference_table(self.config, self.tokenizer, spec, batches, self.reference_section(), self.shared_prompt())


def _other_reference(config: TrainerConfig, name: str) -> ModelSection:
    return ModelSection(name=name, attention=config.model.attention)


def _reward_section(name: str) -> ModelSection:
    """The model section of a reward model: a run of the reward trainer, or a sequence classifier in Hugging Face format."""
    section, checkpoint = ModelSection(name=name), checkpoint_in(name)
    if checkpoint is not None:
        trainer = read_manifest(checkpoint)["config"]["trainer"]
        if trainer != "reward":
            raise ConfigError(f"reward_model: {checkpoint} is of a run of trainer {trainer}, not of reward")
        return section
    heads = config_of(section).architectures or []
    if not any(head.endswith("ForSequenceClassification") for head in heads):
        raise ConfigError(f"reward_model: {name} is a {' or '.join(heads) or 'model without a head'}, not a sequence classifier: its rewards would "
                          "be random; give a run of the reward trainer, or what `myllm-ray export` writes of one")
    return section
