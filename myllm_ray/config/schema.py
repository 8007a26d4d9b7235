"""The config of a run. This module imports neither torch nor ray.

The settings of a trainer are a section with the name of the trainer (`sft: {...}`). Validation of this section imports
the trainer, and with it torch.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, PositiveFloat, field_validator, model_validator

from myllm_ray.config.evaluation_section import EvaluationSection
from myllm_ray.config.run_section import RunSection
from myllm_ray.config.scheduler_section import SchedulerSection
from myllm_ray.config.sections import (
    AcceleratorSection,
    BatchSection,
    CheckpointSection,
    DataSection,
    EMASection,
    LoggingSection,
    ModelSection,
    OptimizerSection,
    ScalingSection,
    Section,
    TokenizerSection,
)
from myllm_ray.config.stability_section import StabilitySection
from myllm_ray.config.trainers import TrainerSection, config_class


def _default_callbacks() -> list[str | dict[str, dict[str, Any]]]:
    return ["console", "jsonl", "report"]


class TrainerConfig(Section):
    """The config of any run. Each built-in trainer extends it by its own section."""

    trainer: str = Field(
        "pretrain", description="pretrain, sft, reward, dpo, ppo, grpo, or an import path: my_lab.simpo:SimPOTrainer"
    )
    model: ModelSection
    tokenizer: TokenizerSection | None = Field(None, description="default: the tokenizer of model.name")
    data: DataSection
    batch: BatchSection = Field(default_factory=BatchSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    scheduler: SchedulerSection = Field(default_factory=SchedulerSection)
    ema: EMASection | None = Field(None, description="average the weights; default: no average")
    accelerator: AcceleratorSection = Field(default_factory=AcceleratorSection)
    scaling: ScalingSection = Field(default_factory=ScalingSection)
    run: RunSection = Field(default_factory=RunSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    stability: StabilitySection = Field(default_factory=StabilitySection)
    logging: LoggingSection = Field(default_factory=LoggingSection)
    callbacks: list[str | dict[str, dict[str, Any]]] = Field(
        default_factory=_default_callbacks,
        description="names or import paths; with options as {early_stopping: {metric: validation_loss, patience: 3}}",
    )
    tracking: list[str | dict[str, Any]] = Field(
        default_factory=list,
        description="experiment trackers: tensorboard, wandb, mlflow, trackio, or import paths; with options as "
        "{name: wandb, project: llm}",
    )
    gradient_clip: PositiveFloat | None = Field(1.0, description="largest norm of the gradient; null: no clipping")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of a custom trainer")

    @field_validator("tracking", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        """Accepts one tracker without a list."""
        return [value] if isinstance(value, (str, dict)) else value

    @model_validator(mode="after")
    def _consistent(self) -> TrainerConfig:
        if self.tokenizer is None and self.model.name is None:
            raise ValueError(
                "tokenizer is missing: only a model given by model.name has its own; give tokenizer.kind, "
                "tokenizer.train, tokenizer.path or tokenizer.name"
            )
        if (self.run.max_steps is None) == (self.run.epochs is None):
            raise ValueError("run: give exactly one of max_steps and epochs, which set the length of the run")
        if self.run.epochs is not None and self.data.has_shares:
            raise ValueError(
                "run.epochs: sources with shares make different numbers of passes: give run.max_steps instead"
            )
        scaling, batch = self.scaling, self.batch
        if not self.worker_counts():
            workers = (
                f"{max(1, scaling.least)}" if scaling.least == scaling.most else f"({scaling.least} to {scaling.most})"
            )
            raise ValueError(
                f"batch.global_size={batch.global_size} is not divisible by scaling.workers × batch.micro_size "
                f"= {workers} × {batch.micro_size}: change one of them so that every worker gets the same number of "
                "micro-batches"
            )
        if self.accelerator.stage is not None and self.accelerator.name in ("single", "ddp", "fsdp", "accelerate"):
            raise ValueError(f"accelerator: stage belongs to deepspeed, accelerator.name is {self.accelerator.name}")
        if self.accelerator.name == "single" and scaling.most > 1:
            raise ValueError(
                f"accelerator.name=single trains on one worker, scaling.workers={scaling.most}: "
                "use ddp, fsdp, accelerate or deepspeed"
            )
        if self.model.quantize is not None and self.accelerator.compile != "none":
            raise ValueError(
                f"accelerator.compile={self.accelerator.compile} can't compile the layers of model.quantize: use none"
            )
        cls = config_class(self.trainer)
        if not isinstance(self, cls):  # its section would not be validated
            made = type(self).__name__
            raise ValueError(f"{made} is not for trainer {self.trainer}: use {cls.__name__}, load_config or validate")
        if self.section_key != "options" and self.options:
            key = self.section_key
            raise ValueError(f"options: trainer {self.trainer} has no options; its settings are in the section {key}")
        self.trainer_section.check_run(self)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles by the name of the trainer, because the class is created at run time (`config_class`)."""
        return _empty, (self.trainer if type(self) is not TrainerConfig else None,), self.__getstate__()

    section_key: ClassVar[str] = "options"
    """Key of the section that belongs to the trainer."""

    @property
    def trainer_section(self) -> TrainerSection:
        """The section that belongs to the trainer; an empty `TrainerSection` if the trainer declares none."""
        section = getattr(self, self.section_key)
        return section if isinstance(section, TrainerSection) else TrainerSection()

    @property
    def length_limit(self) -> int | None:
        """The limit of the length of an example in tokens; see `TrainerSection.length_limit`."""
        return self.trainer_section.length_limit(self)

    @property
    def steps_per_batch(self) -> int:
        """The number of optimizer steps per global batch."""
        return self.trainer_section.steps_per_batch

    def worker_counts(self) -> list[int]:
        """Returns the numbers of workers, ascending, that `scaling.workers` allows and that divide the global batch.

        With such a number, every worker has the same number of micro-batches.
        """
        micros, rest = divmod(self.batch.global_size, self.batch.micro_size)
        return (
            []
            if rest
            else [n for n in range(max(1, self.scaling.least), max(1, self.scaling.most) + 1) if micros % n == 0]
        )


def _empty(trainer: str | None) -> TrainerConfig:
    """Returns an uninitialized config of a trainer's class, for unpickling."""
    cls = TrainerConfig if trainer is None else config_class(trainer)
    return cls.__new__(cls)
