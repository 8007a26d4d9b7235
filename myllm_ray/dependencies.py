"""What a trainer's constructor takes in addition to its model, config and data: frozen models, sampler, rewards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from myllm_ray.common.pretrained import checkpoint_in
from myllm_ray.common.types import Reward, RolloutPool
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import ModelSection
from myllm_ray.config.trainers import RolloutSection, rollout_of, takes_config, trainer_class
from myllm_ray.data.chat_template import end_tokens
from myllm_ray.data.examples import prompt_row
from myllm_ray.data.prepare import PreparedData
from myllm_ray.data.store import TokenStore
from myllm_ray.data.stream import StreamSpec
from myllm_ray.engine.checkpointing.manager import read_manifest
from myllm_ray.models.architecture import config_of
from myllm_ray.models.generate import HFSampler
from myllm_ray.models.generation_config import base_generation_config, ends_of
from myllm_ray.models.load import build_deferred
from myllm_ray.models.sharing import shares_prompts
from myllm_ray.models.shrink import without_dropout
from myllm_ray.reference_table import reference_table
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.preference import ReferenceTable
from myllm_ray.trainers.rewards import Columns, FunctionReward


def trainer_class_of(config: TrainerConfig) -> type[BaseTrainer]:
    """Returns the trainer class of a config, or the variant that it selects (`BaseTrainer.for_config`)."""
    cls: type[BaseTrainer] = trainer_class(config.trainer)
    return cls.for_config(config.trainer_section)


def kind_of_model(config: TrainerConfig) -> str:
    """Returns the kind of model to build (`models.load.build_deferred`)."""
    return trainer_class_of(config).kind_of_model(config.trainer_section)


def model_section(config: TrainerConfig) -> ModelSection:
    """Returns the model to train.

    Trainers that compare it with a reference train without dropout, which would make two equal models differ.
    """
    return without_dropout(config.model)[0] if "reference" in trainer_class_of(config).dependencies else config.model


def stop_tokens(section: ModelSection, tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids that end an answer.

    They are those of the tokenizer, of its chat template, and of the generation config of the base model.
    """
    return end_tokens(tokenizer, ends_of(base_generation_config(section.name)))


class Services(NamedTuple):
    """Constructors of objects that need Ray."""

    reward: Callable[[FunctionReward.Config], Reward]
    """Returns a reward function that runs in a pool of actors."""
    rollouts: Callable[[int], RolloutPool]
    """Returns a pool of the given number of actors that sample answers."""


class Dependencies:
    """Constructs the dependencies of a run's trainer. Each method has the name of a constructor argument.

    A trainer lists the names in `BaseTrainer.dependencies`. If a method returns None, the argument keeps its default.
    """

    def __init__(self, config: TrainerConfig, tokenizer: Any, prepared: PreparedData, services: Services | None = None):
        self._config, self._tokenizer, self._prepared, self._services = config, tokenizer, prepared, services
        self._section: Any = config.trainer_section
        self._rollout = rollout_of(config) or RolloutSection()

    def arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments for the trainer's constructor.

        Raises:
            ConfigError: the trainer lists a name that is not a dependency.
        """
        found = {}
        for name in trainer_class_of(self._config).dependencies:
            if name not in _NAMES:
                raise ConfigError(
                    f"trainer {self._config.trainer}: unknown dependency {name!r}; choose from {', '.join(_NAMES)}"
                )
            value = getattr(self, name)()
            if value is not None:
                found[name] = value
        return found

    def seed(self) -> int:
        return self._config.run.seed

    def micro_size(self) -> int | None:
        return self._rollout.micro_size

    def packs_rows(self) -> bool:
        return self._prepared.packs_answers

    def shared_prompt(self) -> bool:
        if getattr(self._section, "shared_prompt", "never") == "never" or self._config.model.attention == "eager":
            return False
        return shares_prompts(self._config.model, self._config.data.sequence_length)

    def sampler(self) -> HFSampler:
        return HFSampler(self._tokenizer, self._rollout, stop_tokens(self._config.model, self._tokenizer))

    def rewards(self) -> list[Reward]:
        return [self._reward(entry) for entry in getattr(self._section, "reward", [])]

    def _reward(self, entry: FunctionReward.Config) -> Reward:
        if not entry.workers:
            return FunctionReward(entry)
        assert self._services is not None, "reward actors need Ray; check_dependencies refuses them without it"
        return self._services.reward(entry)

    def columns(self) -> Columns:
        return partial(reward_fields, self._prepared.train.plan.store)

    def validation_columns(self) -> Columns | None:
        validation = self._prepared.validation
        return partial(reward_fields, validation.plan.store) if validation is not None else None

    def pool(self) -> RolloutPool | None:
        if self._rollout.placement == "colocated":
            return None
        assert self._services is not None, "rollout actors need Ray; the config refuses them without it"
        return self._services.rollouts(self._rollout.actors)

    def max_lag(self) -> int:
        return self._rollout.max_lag

    def reference(self) -> nn.Module | None:
        if not self._needs_reference() or getattr(self._section, "reference", "copy") != "copy":
            return None
        return self._frozen(self._reference_section())

    def starts_at_reference(self) -> bool:
        return self._needs_reference() and getattr(self._section, "reference_model", None) is None

    def reward_model(self) -> nn.Module | None:
        name = getattr(self._section, "reward_model", None)
        return self._frozen(_reward_section(name), "reward_model") if name else None

    def reference_table(self) -> ReferenceTable | None:
        config, spec = self._config, self._prepared.train
        steps = config.run.total_steps(config.steps_per_batch, spec.steps_in_epoch)
        return self._table(spec, steps)

    def validation_table(self) -> ReferenceTable | None:
        spec = self._prepared.validation  # its documents may be in another store than those of the training data
        if spec is None:
            return None
        return self._table(spec, min(spec.steps_in_epoch(0), self._config.evaluation.max_batches or 2**62))

    def _needs_reference(self) -> bool:
        takes_settings = takes_config(trainer_class_of(self._config))
        return bool(getattr(self._section, "needs_reference", takes_settings))

    def _reference_section(self) -> ModelSection:
        other = getattr(self._section, "reference_model", None)
        section = self._config.model if other is None else _other_reference(self._config, other)
        # Without adapters: the output of new adapters is zero, so the reference equals the model before the first step.
        # With quantization they stay, because they determine which layers are quantized.
        adapters = {} if section.quantize is not None else {"lora": None}
        return without_dropout(section)[0].model_copy(update={**adapters, "freeze": []})

    def _frozen(self, section: ModelSection, kind: str = "causal_lm") -> nn.Module:
        return build_deferred(section, self._tokenizer, self._config.data.sequence_length, self._config.run.seed, kind)

    def _table(self, spec: StreamSpec, batches: int) -> ReferenceTable | None:
        if getattr(self._section, "reference", "copy") != "precomputed" or not self._needs_reference():
            return None
        section, shared = self._reference_section(), self.shared_prompt()
        return reference_table(self._config, self._tokenizer, spec, batches, section, shared)


_NAMES = tuple(name for name in vars(Dependencies) if not name.startswith("_") and name != "arguments")
"""The names that a trainer can list in `dependencies`."""


def reward_fields(store: TokenStore, document: int) -> dict[str, Any]:
    """Returns the fields of the data row of a prompt, for reward functions (`trainers.online.Columns`)."""
    row = prompt_row(store, document)
    fields = {**row.columns, "prompts": row.prompt, "prompt_texts": row.text}
    return {**fields, "tools": row.tools} if row.tools else fields


def _other_reference(config: TrainerConfig, name: str) -> ModelSection:
    resize = config.model.resize_vocabulary  # the reference scores the tokens that the trained model learns
    return ModelSection(name=name, attention=config.model.attention, resize_vocabulary=resize)


def _reward_section(name: str) -> ModelSection:
    """Returns the model section of a reward model: a run of the reward trainer, or a sequence classifier."""
    section, checkpoint = ModelSection(name=name), checkpoint_in(name)
    if checkpoint is not None:
        trainer = read_manifest(checkpoint)["config"]["trainer"]
        if trainer != "reward":
            raise ConfigError(f"reward_model: {checkpoint} was trained by trainer {trainer}, not by trainer reward")
        return section
    heads = config_of(section).architectures or []
    if not any(head.endswith("ForSequenceClassification") for head in heads):
        raise ConfigError(
            f"reward_model: {name} is a {' or '.join(heads) or 'model without a head'}, not a sequence classifier: its "
            "rewards would be random; give a run of the reward trainer, or an export of one (`myllm-ray export`)"
        )
    return section
