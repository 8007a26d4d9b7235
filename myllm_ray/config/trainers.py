"""The section of a config that belongs to its trainer, validated by the `Config` of the trainer's class.

The section of a trainer with a short name has this name (`dpo: {...}`). Short names are those of built-in trainers and
of the entry points of installed packages. The section of a trainer by import path is `options`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, create_model

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import SHORT_NAMES, resolve
from myllm_ray.config.sections import Section

if TYPE_CHECKING:
    from myllm_ray.config.schema import TrainerConfig


class TrainerSection(Section):
    """Base of a trainer's `Config`: the section of a run's config that belongs to the trainer."""

    trains_on_whole_text: ClassVar[bool] = False
    """Whether every token of a text is a target. Documents longer than a row are then split instead of truncated."""

    @property
    def trains_on_prompt(self) -> bool:
        """Whether the tokens of a prompt are targets, in addition to those of its answer."""
        return False

    @property
    def steps_per_batch(self) -> int:
        """The number of optimizer steps per global batch."""
        return 1

    def length_limit(self, config: TrainerConfig) -> int | None:
        """Returns the largest number of tokens of a prompt with one answer, or of a prompt without an answer."""
        return config.data.sequence_length

    def check_run(self, config: TrainerConfig) -> None:
        """Checks this section against the rest of the config.

        Raises:
            ValueError: the two contradict each other; the message names the key.
        """


class RolloutSection(Section):
    """The sampling of answers."""

    max_new_tokens: PositiveInt = 64
    temperature: PositiveFloat = 1.0
    top_k: PositiveInt | None = None
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    stop: list[str] = Field(
        default_factory=list,
        description="strings that end an answer, in addition to the end tokens of the tokenizer and the chat template",
    )
    placement: Literal["colocated", "actors"] = Field(
        "colocated",
        description="where answers are sampled: in the training workers, or in Ray actors while the workers train",
    )
    actors: PositiveInt = Field(
        1, description="number of actors per training worker; each reserves the resources of a worker"
    )
    max_lag: PositiveInt = Field(
        1, description="actors: age of the weights that sample, in batches, relative to the weights that are trained"
    )
    micro_size: PositiveInt | None = Field(
        None, description="number of answers per forward pass; default: the answers to batch.micro_size prompts"
    )


def trainer_class(name: str) -> Any:
    """Returns the class of a trainer by short name or import path. Imports it, and with it torch.

    Raises:
        ConfigError: there is no such trainer, or its `Config` is not a `TrainerSection`.
    """
    found = resolve("trainers", name, "trainer")
    if not isinstance(found, type) or not hasattr(found, "train_step") or not hasattr(found, "Config"):
        raise ConfigError(f"trainer: {name} is not a trainer: it must be a subclass of myllm_ray.BaseTrainer")
    if not issubclass(found.Config, TrainerSection):
        raise ConfigError(f"trainer: {name}: its Config must be a subclass of myllm_ray.TrainerSection")
    return found


def takes_config(cls: type) -> bool:
    """Returns whether the settings of a class are validated by its `Config` and passed as the argument `config`.

    This is false for a subclass that overrides `__init__` without declaring `Config`. It receives its settings as
    keyword arguments.
    """
    mro = cls.__mro__
    return next(i for i, c in enumerate(mro) if "Config" in vars(c)) <= next(
        i for i, c in enumerate(mro) if "__init__" in vars(c)
    )


def config_class(trainer: str) -> type[TrainerConfig]:
    """Returns the class that validates the config of a trainer: `TrainerConfig` with the trainer's section typed.

    Args:
        trainer: short name or import path.

    Raises:
        ConfigError: there is no such trainer.
    """
    return _config_class(trainer, trainer_class(trainer))


@functools.cache
def _config_class(trainer: str, cls: Any) -> type[TrainerConfig]:
    from myllm_ray.config.schema import TrainerConfig

    if not takes_config(cls):
        return TrainerConfig
    section, key = cls.Config, "options" if ":" in trainer else trainer
    try:
        section()
        default = Field(default_factory=section)
    except ValidationError:  # it has keys without a default
        default = Field()
    described = TrainerConfig.model_fields["trainer"].description
    fields: dict[str, Any] = {"trainer": (str, Field(trainer, description=described))}
    fields[key] = (section, default)
    fields |= {name: (other, Field(default_factory=other)) for name, other in cls.sections.items()}
    name = f"{cls.__name__.removesuffix('Trainer')}Config"
    doc = f"The config of a run of trainer {trainer}."
    made: type[TrainerConfig] = create_model(name, __base__=TrainerConfig, __module__=__name__, __doc__=doc, **fields)
    made.section_key = key
    return made


def builtin_config_classes() -> dict[str, type[TrainerConfig]]:
    """Returns the config classes of the trainers of this package."""
    return {name: config_class(name) for name in SHORT_NAMES["trainers"]}


def __getattr__(name: str) -> Any:
    """Returns `PretrainConfig`, `SFTConfig`, ..., which are created at their first use, because this imports torch."""
    stem = name.removesuffix("Config")
    for short, path in SHORT_NAMES["trainers"].items():
        if name.endswith("Config") and path.endswith(f":{stem}Trainer"):
            return config_class(short)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def rollout_of(config: TrainerConfig) -> RolloutSection | None:
    """Returns the section `rollout` of a config, or None for trainers that do not sample answers."""
    found: RolloutSection | None = getattr(config, "rollout", None)
    return found
