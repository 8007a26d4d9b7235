"""Settings shared by trainers that sample the answers that they train on."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.trainers import RolloutSection, TrainerSection, rollout_of
from myllm_ray.trainers.rewards import FunctionReward


class OnlineConfig(TrainerSection):
    """Settings that PPO and GRPO share."""

    reward: list[FunctionReward.Config] = Field(
        default_factory=list, description="functions that return rewards: my_pkg.my_mod:fn, or a list"
    )
    epochs: PositiveInt = Field(1, description="passes over each batch of rollouts")
    minibatches: PositiveInt = Field(1, description="optimizer steps in each pass")
    kl_weight: NonNegativeFloat = Field(
        0.0, description="weight of the KL divergence from the reference; 0: no reference is kept"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_weight: NonNegativeFloat = 0.0
    reference_model: str | None = Field(
        None, description="another reference: hub id or folder; default: the model itself"
    )

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0

    @property
    def answers_per_prompt(self) -> int:
        return 1

    @property
    def steps_per_batch(self) -> int:
        return self.epochs * self.minibatches

    def length_limit(self, config: TrainerConfig) -> int:
        # A prompt and its longest possible answer must fit into one row.
        rollout = rollout_of(config)
        return config.data.sequence_length - (rollout.max_new_tokens if rollout else 0)

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, raw: Any) -> Any:
        """Converts `reward`, given as an import path or as a list of paths and mappings, to a list of mappings."""
        if not isinstance(raw, dict) or not raw.get("reward"):
            return raw
        listed = raw["reward"] if isinstance(raw["reward"], list) else [raw["reward"]]
        return {**raw, "reward": [{"function": item} if isinstance(item, str) else item for item in listed]}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.reference_model is not None and not self.kl_weight:
            raise ValueError(
                "reference_model: kl_weight is 0, so no reference is kept; give kl_weight, or leave reference_model out"
            )
        names = [reward.logged_as for reward in self.reward]
        twice = next((name for i, name in enumerate(names) if name in names[:i] or name == "reward_model"), None)
        # Two metrics of the same name would overwrite each other in the log. PPO also logs `reward_model`.
        if twice is not None:
            raise ValueError(
                f"reward: {twice!r} is the name of another reward in the log: set a different name (key name)"
            )
        return self

    def check_run(self, config: TrainerConfig) -> None:
        rollout = rollout_of(config) or RolloutSection()
        if self.length_limit(config) < 1:
            raise ValueError(
                f"rollout.max_new_tokens={rollout.max_new_tokens} leaves no tokens for a prompt in "
                f"data.sequence_length={config.data.sequence_length}"
            )
        if config.run.max_steps is not None and config.run.max_steps % self.steps_per_batch:
            raise ValueError(
                f"run.max_steps={config.run.max_steps} is not a multiple of the {self.steps_per_batch} optimizer steps "
                "per batch (epochs × minibatches)"
            )
        # Rollout actors are Ray actors that belong to a training worker.
        if rollout.placement == "actors" and config.scaling.most == 0:
            raise ValueError("rollout.placement=actors needs Ray: scaling.workers must be at least 1")
        if rollout.placement == "actors" and config.scaling.least != config.scaling.most:
            raise ValueError("rollout.placement=actors needs a fixed number of workers: scaling.workers is a range")
        # Every rank needs the same number of micro-batches in every minibatch, for every possible number of workers.
        micros = config.batch.global_size // config.batch.micro_size
        for workers in config.worker_counts():
            if micros % (self.minibatches * workers):
                raise ValueError(
                    f"{micros} micro-batches per batch (batch.global_size / batch.micro_size) can't be cut into "
                    f"{self.minibatches} minibatches for {workers} workers"
                )
        size = config.batch.micro_size * self.answers_per_prompt
        if rollout.micro_size and size % rollout.micro_size:
            raise ValueError(
                f"rollout.micro_size={rollout.micro_size} does not divide the {size} answers that are sampled together"
            )
