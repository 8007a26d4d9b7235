"""The settings that the engine reads, from a run's config or from the short dict of a manually constructed run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from myllm_ray.common.types import as_mapping
from myllm_ray.config.by_hand import gradient_clip, sections
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.evaluation_section import EvaluationSection
from myllm_ray.config.run_section import RunSection
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import (
    BatchSection,
    CheckpointSection,
    LoggingSection,
)
from myllm_ray.config.stability_section import StabilitySection
from myllm_ray.config.validation import section_of


@dataclass
class EngineSettings:
    """The sections of the config that the engine reads. Steps are optimizer steps. An interval of None means never."""

    run: RunSection
    batch: BatchSection
    logging: LoggingSection
    checkpoint: CheckpointSection
    evaluation: EvaluationSection
    stability: StabilitySection
    gradient_clip: float | None
    prefetch_batches: int
    """Number of batches that are prepared in advance."""
    micro_size: int | None
    """Rows of a micro-batch. None if the config does not set it; each rank then has one micro-batch per step."""

    @classmethod
    def from_config(cls, config: Any) -> EngineSettings:
        """Returns the settings of a config.

        Args:
            config: a `TrainerConfig`, or a dict such as {"num_epochs": 3, "batch_size": 8}. The defaults are those of
                the sections, except the length of a run, which is one epoch.

        Raises:
            ConfigError: a key of the dict is unknown, or has a wrong value.
        """
        source = sections(config)
        run = section_of(source, "run", RunSection)
        if run.max_steps is not None and run.epochs is not None:
            raise ConfigError("give max_steps or epochs, not both: each sets the length of the run")
        if run.max_steps is None and run.epochs is None:
            run = run.model_copy(update={"epochs": 1})
        batch = section_of(source, "batch", BatchSection)
        return cls(
            run=run,
            batch=batch,
            logging=_logging(source),
            # A copy, because the engine changes `at_end` for a manager that saves only on request.
            checkpoint=section_of(source, "checkpoint", CheckpointSection).model_copy(),
            evaluation=section_of(source, "evaluation", EvaluationSection),
            stability=section_of(source, "stability", StabilitySection),
            gradient_clip=gradient_clip(source),
            prefetch_batches=_prefetch_batches(source),
            micro_size=batch.micro_size
            if "micro_size" in batch.model_fields_set or isinstance(config, BaseModel)
            else None,
        )


def _prefetch_batches(source: Any) -> int:
    """Returns `data.prefetch_batches`. A manually constructed run has no thread by default.

    Its data set may be unsafe in another thread, or draw from the random number generators that the engine seeds.
    """
    if isinstance(source, TrainerConfig):
        return source.data.prefetch_batches
    return int(as_mapping(source.get("data")).get("prefetch_batches", 0))


def _logging(source: Any) -> LoggingSection:
    """Returns the section `logging`. A manually constructed run writes samples only if its dict sets their interval."""
    section = section_of(source, "logging", LoggingSection)
    if isinstance(source, BaseModel) or "samples_every_steps" in section.model_fields_set:
        return section
    return section.model_copy(update={"samples_every_steps": None})
