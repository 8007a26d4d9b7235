"""What each trainer adds to a run's config: a section under its own name."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from myllm_ray.config.schema import Section, TrainerConfig


class PretrainKnobs(Section):
    """Knobs of causal-LM pretraining."""


class PretrainConfig(TrainerConfig):
    """Causal-LM pretraining: loss on every token."""

    pretrain: PretrainKnobs = Field(default_factory=PretrainKnobs)

    @property
    def room(self) -> int | None:
        return None


class SFTKnobs(Section):
    """Knobs of supervised fine-tuning."""

    train_on_prompt: bool = Field(False, description="put the loss on the prompt too, not only on the response")


class SFTConfig(TrainerConfig):
    """Supervised fine-tuning: loss on the response only, by default."""

    sft: SFTKnobs = Field(default_factory=SFTKnobs)

    @property
    def room(self) -> int | None:
        return None


class RewardKnobs(Section):
    """Knobs of a pairwise reward model."""

    centering: NonNegativeFloat = Field(0.0, description="weight of (r_chosen + r_rejected)^2, which keeps rewards around zero")
    shared_prompt: Literal["auto", "never"] = Field("auto", description="compute a prompt once for both answers, where the model can")


class RewardConfig(TrainerConfig):
    """A reward model from preferences."""

    reward: RewardKnobs = Field(default_factory=RewardKnobs)


_LOSSES_OF = {"label_smoothing": ("sigmoid", "robust", "simpo"), "gamma": ("simpo",), "desirable_weight": ("kto",), "undesirable_weight": ("kto",)}
"""Keys of `dpo` that only some losses have."""


class DPOKnobs(Section):
    """Knobs of direct preference optimisation. The equations: trainers/dpo.py."""

    loss: Literal["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo", "kto", "apo_zero", "apo_down"] = "sigmoid"
    beta: PositiveFloat = Field(0.1, description="how far the policy may leave the reference; orpo: weight of the odds ratio")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of preferences that are wrong (sigmoid: cDPO; robust; simpo)")
    gamma: NonNegativeFloat = Field(0.5, description="simpo: the margin by which the chosen answer is to win")
    length_normalization: bool | None = Field(
        None, description="log-probabilities per token instead of per answer; default: ipo, simpo and orpo")
    desirable_weight: PositiveFloat = Field(1.0, description="kto: weight of desirable answers")
    undesirable_weight: PositiveFloat = Field(1.0, description="kto: weight of undesirable answers")
    reference: Literal["copy", "precomputed", "adapter_off"] = Field(
        "copy", description="copy: the model as it was at the start, frozen; precomputed: its log-probabilities, computed once and "
                            "kept with the data; adapter_off: the model itself, without its LoRA adapters")
    reference_model: str | None = Field(None, description="another reference: hub id or folder; default: the model itself")
    shared_prompt: Literal["auto", "never"] = Field("auto", description="compute a prompt once for both answers, where the model can")

    @property
    def needs_reference(self) -> bool:
        return self.loss not in ("simpo", "orpo")

    @property
    def per_token(self) -> bool:
        return self.loss in ("ipo", "simpo", "orpo") if self.length_normalization is None else self.length_normalization

    @model_validator(mode="after")
    def _fits(self) -> DPOKnobs:
        for name, losses in _LOSSES_OF.items():
            if self.loss not in losses and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to the loss{'es' * (len(losses) > 1)} {', '.join(losses)}; loss is {self.loss}")
        if self.loss in ("simpo", "orpo") and self.length_normalization is False:
            raise ValueError(f"{self.loss} is defined on log-probabilities per token: leave length_normalization out")
        if self.reference_model is not None and not self.needs_reference:
            raise ValueError(f"{self.loss} has no reference: leave reference_model out")
        if self.reference != "copy" and not self.needs_reference:
            raise ValueError(f"{self.loss} has no reference: leave reference={self.reference} out")
        if self.reference_model is not None and self.reference == "adapter_off":
            raise ValueError("reference: adapter_off is the model itself: leave reference_model out")
        return self


class DPOConfig(TrainerConfig):
    """Direct preference optimisation."""

    dpo: DPOKnobs = Field(default_factory=DPOKnobs)

    @model_validator(mode="after")
    def _batch(self) -> DPOConfig:
        if self.dpo.reference == "adapter_off" and self.model.lora is None:
            raise ValueError("dpo.reference=adapter_off needs adapters that can be switched off: give model.lora")
        if self.dpo.loss == "kto" and self.batch.global_size < 2:
            raise ValueError("dpo.loss=kto compares answers with those of other prompts: batch.global_size must be at least 2")
        return self


class RolloutSection(Section):
    """How answers are sampled."""

    max_new_tokens: PositiveInt = 64
    temperature: PositiveFloat = 1.0
    top_k: PositiveInt | None = None
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    stop: list[str] = Field(default_factory=list, description="texts that end an answer, besides the tokenizer's and the chat template's end tokens")
    placement: Literal["colocated", "actors"] = Field(
        "colocated", description="where answers are sampled: in the training workers, or in Ray actors, while these train")
    actors: PositiveInt = Field(1, description="actors: how many for each training worker; they reserve as much as it does")
    max_lag: PositiveInt = Field(1, description="actors: batches by which the weights that sample are older than those that train")
    micro_size: PositiveInt | None = Field(None, description="answers in one forward pass; default: those to batch.micro_size prompts")


class RewardFunction(Section):
    """A function of your own: fn(prompts, completions, **fields) -> a number for each completion; or an `async def`. Arguments: docs/rollouts.md."""

    function: str = Field(description="import path: my_pkg.my_mod:fn")
    weight: float = 1.0
    name: str | None = Field(None, description="the name under which its rewards are logged; default: the function's")
    timeout: PositiveFloat | None = Field(60.0, description="seconds for one call, without the start of its process; null: no limit")
    on_error: Literal["error"] | float = Field(
        "error", description="when it raises, hangs, or returns something else than finite numbers: end the run, or this reward")
    workers: int = Field(0, ge=0, description="so many Ray actors for each training worker run it, each a share of the batch; 0: the "
                         "training process does")
    options: dict[str, Any] = Field(default_factory=dict, description="further keyword arguments")

    @property
    def logged_as(self) -> str:
        """The name under which its rewards are logged."""
        return self.name or self.function.rpartition(":")[2].rpartition(".")[2]


def _distinct(rewards: list[RewardFunction]) -> None:
    """Rewards that are logged under one name would hide each other."""
    names = [reward.logged_as for reward in rewards]
    twice = next((name for i, name in enumerate(names) if name in names[:i] or name == "reward_model"), None)
    if twice is not None:
        raise ValueError(f"reward: {twice!r} is the name of another reward in the log: give this one a name of its own (name)")


def _check_reference(name: str | None, weight: float) -> None:
    if name is not None and not weight:
        raise ValueError("reference_model: kl_weight is 0, so no reference is kept; give kl_weight, or leave reference_model out")


def _functions(value: Any) -> Any:
    """A path, or a list of paths and mappings, as a list of mappings."""
    listed = value if isinstance(value, list) else [value]
    return [{"function": item} if isinstance(item, str) else item for item in listed]


class _Online(TrainerConfig):
    """What trainers share that sample answers themselves."""

    rollout: RolloutSection = Field(default_factory=RolloutSection)

    @property
    def room(self) -> int | None:
        return self.data.sequence_length - self.rollout.max_new_tokens

    def _check_online(self, minibatches: int, group: int) -> None:
        if self.room is None or self.room < 1:
            raise ValueError(f"rollout.max_new_tokens={self.rollout.max_new_tokens} leaves no room for a prompt in "
                             f"data.sequence_length={self.data.sequence_length}")
        if self.run.max_steps is not None and self.run.max_steps % self.steps_per_batch:
            raise ValueError(f"run.max_steps={self.run.max_steps} is not a multiple of the {self.steps_per_batch} optimizer steps that are made "
                             "of each batch (epochs × minibatches)")
        if self.rollout.placement == "actors" and self.scaling.most == 0:
            raise ValueError("rollout.placement=actors needs Ray: scaling.workers must be at least 1")
        if self.rollout.placement == "actors" and self.scaling.least != self.scaling.most:
            raise ValueError("rollout.placement=actors needs a fixed number of workers: scaling.workers is a range")
        for workers in self.worker_counts():
            if self.batch.global_size // self.batch.micro_size % (minibatches * workers):
                raise ValueError(f"{self.batch.global_size // self.batch.micro_size} micro-batches a batch (batch.global_size / "
                                 f"batch.micro_size) can't be cut into {minibatches} minibatches for {workers} workers")
        size = self.batch.micro_size * group
        if self.rollout.micro_size and size % self.rollout.micro_size:
            raise ValueError(f"rollout.micro_size={self.rollout.micro_size} does not divide the {size} answers that are sampled together")


class PPOKnobs(Section):
    """Knobs of PPO. The equations: trainers/ppo.py."""

    reward: list[RewardFunction] = Field(default_factory=list, description="functions that give rewards: my_pkg.my_mod:fn, or a list")
    reward_model: str | None = Field(None, description="a run of the reward trainer (its folder), or a folder that it exported")
    epochs: PositiveInt = Field(4, description="passes over each batch of rollouts")
    minibatches: PositiveInt = Field(1, description="optimizer steps in each pass")
    clip: PositiveFloat = Field(0.2, description="how far the importance ratio may leave 1")
    value_clip: PositiveFloat | None = Field(0.2, description="how far a value may move; null: no clipping")
    value_weight: NonNegativeFloat = Field(0.1, description="weight of the value loss")
    entropy_weight: NonNegativeFloat = 0.0
    discount: float = Field(1.0, gt=0, le=1, description="gamma")
    gae_lambda: float = Field(0.95, ge=0, le=1)
    whiten: bool = Field(True, description="advantages to mean 0 and variance 1 over the global batch")
    kl_weight: NonNegativeFloat = Field(0.05, description="of the KL divergence from the reference; 0: no reference is kept")
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: PositiveFloat | None = Field(None, description="nats an answer that kl_weight is steered to; null: it stays")
    kl_horizon: PositiveInt = Field(10000, description="answers over which kl_weight is steered")
    missing_eos_penalty: NonNegativeFloat = Field(0.0, description="taken from the reward of an answer that did not end")
    critic: Literal["shared", "own"] = Field("shared", description="a head on the policy's last states, or a model of its own")
    reference_model: str | None = Field(None, description="another reference: hub id or folder; default: the model itself")

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, raw: Any) -> Any:
        return {**raw, "reward": _functions(raw["reward"])} if isinstance(raw, dict) and raw.get("reward") else raw

    @model_validator(mode="after")
    def _rewarded(self) -> PPOKnobs:
        if not self.reward and self.reward_model is None:
            raise ValueError("give reward (a function) or reward_model: without one there is nothing to learn")
        if self.kl_target is not None and not self.kl_weight:
            raise ValueError("kl_target steers kl_weight, which is 0")
        _check_reference(self.reference_model, self.kl_weight)
        _distinct(self.reward)
        return self


class PPOConfig(_Online):
    """Proximal policy optimisation."""

    ppo: PPOKnobs

    @property
    def steps_per_batch(self) -> int:
        return self.ppo.epochs * self.ppo.minibatches

    @model_validator(mode="after")
    def _fits(self) -> PPOConfig:
        self._check_online(self.ppo.minibatches, 1)
        return self


class GRPOKnobs(Section):
    """Knobs of group-relative policy optimisation. The equations: trainers/grpo.py."""

    reward: list[RewardFunction] = Field(min_length=1, description="functions that give rewards: my_pkg.my_mod:fn, or a list")
    group_size: int = Field(8, ge=2, description="answers to each prompt")
    loss: Literal["grpo", "dr_grpo", "dapo"] = Field("grpo", description="what is averaged: each answer's mean over its tokens; "
                                                     "tokens over the longest length; tokens over all tokens")
    importance: Literal["token", "sequence"] = Field("token", description="the ratio of each token, or of the whole answer (GSPO)")
    epochs: PositiveInt = Field(1, description="passes over each batch of rollouts")
    minibatches: PositiveInt = Field(1, description="optimizer steps in each pass")
    clip: PositiveFloat = Field(0.2, description="how far the importance ratio may fall below 1")
    clip_high: PositiveFloat | None = Field(None, description="and rise above it; default: as clip")
    scale_rewards: Literal["group", "batch", "none"] = Field("group", description="what advantages are divided by the deviation of")
    mask_truncated: bool = Field(False, description="answers that did not end do not count (DAPO's overlong filtering)")
    kl_weight: NonNegativeFloat = Field(0.0, description="of the KL divergence from the reference; 0: no reference is kept")
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_weight: NonNegativeFloat = 0.0
    reference_model: str | None = Field(None, description="another reference: hub id or folder; default: the model itself")

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, raw: Any) -> Any:
        return {**raw, "reward": _functions(raw["reward"])} if isinstance(raw, dict) and raw.get("reward") else raw

    @model_validator(mode="after")
    def _fits(self) -> GRPOKnobs:
        _check_reference(self.reference_model, self.kl_weight)
        _distinct(self.reward)
        return self


class GRPOConfig(_Online):
    """Group-relative policy optimisation."""

    grpo: GRPOKnobs

    @property
    def steps_per_batch(self) -> int:
        return self.grpo.epochs * self.grpo.minibatches

    @model_validator(mode="after")
    def _fits(self) -> GRPOConfig:
        self._check_online(self.grpo.minibatches, self.grpo.group_size)
        return self


CONFIG_OF_TRAINER: dict[str, type[TrainerConfig]] = {
    "pretrain": PretrainConfig, "sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig, "grpo": GRPOConfig}


def config_class(trainer: object) -> type[TrainerConfig]:
    """The config class of a trainer's short name; a trainer of the user's own gets the base (its knobs: `options`)."""
    return CONFIG_OF_TRAINER.get(trainer, TrainerConfig) if isinstance(trainer, str) else TrainerConfig
