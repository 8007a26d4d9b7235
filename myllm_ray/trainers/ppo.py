"""Proximal policy optimisation of a language model.

Schulman et al., 2017, arXiv:1707.06347; on language: Ziegler et al., 2019, arXiv:1909.08593; Ouyang et al., 2022,
arXiv:2203.02155.

An answer y to a prompt x is an episode. The choice of its token t is an action in the state (x, y_<t). The last token
receives the score R of the answer: the rewards of the reward model and of the reward functions, minus
`missing_eos_penalty` if the answer did not end. With `kl_in: reward`, the reward of token t is (Ziegler, eq. 2)

    r_t = [t is last] R - β KL_t

KL_t is the estimate of the divergence from the reference at token t (`kl_estimator`). Advantages A_t and returns G_t
are computed by GAE(γ, λ) (ops/advantages.py). With `whiten`, A is whitened over the global batch. Each of the
`epochs` × `minibatches` optimizer steps minimises the mean over the tokens of

    -min(ρ_t A_t, clip(ρ_t, 1 ± `clip`) A_t),  ρ_t = π/π_old                   Schulman, eq. 7
    + c_v · ½ max((V_t - G_t)², (clip(V_t, V_old ± `value_clip`) - G_t)²)      Schulman et al., baselines
    - c_e · H_t      + β KL_t where `kl_in: loss`

c_v is `value_weight`, c_e is `entropy_weight`, and β starts at `kl_weight`. With `kl_target`, a controller adjusts β so
that the divergence approaches that many nats per answer (Ziegler, §2.2):

    β ← β (1 + clip(KL/target - 1, ±0.2) · answers / `kl_horizon`)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from myllm_ray.common.distributed import all_reduce_
from myllm_ray.common.types import Batch, MetricPairs, Micro, StepOutput
from myllm_ray.config.trainers import TrainerSection
from myllm_ray.ops.advantages import gae, kl_estimate, token_mask, whiten
from myllm_ray.ops.rollouts import to_grid
from myllm_ray.trainers.online import OnlineTrainer
from myllm_ray.trainers.online_config import OnlineConfig
from myllm_ray.trainers.routing import with_router_loss


def policy_losses(log_probs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the clipped loss of each token.

    Args:
        log_probs: (T,) log-probabilities of the answer tokens under the policy, in nats.
        old: (T,) the same under the policy that sampled them, without gradient.
        advantages: (T,) advantages of the tokens.
        clip: Largest distance of the importance ratio from 1.

    Returns:
        (T,) losses, (T,) importance ratios, and (T,) bool: whether the clipped term is the minimum.
    """
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    # The minimum has no gradient where a further change of the ratio beyond its bound would improve the objective, but
    # keeps the gradient that moves the ratio back.
    return -torch.minimum(ratio * advantages, clipped * advantages), ratio, ratio * advantages > clipped * advantages


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Returns (T,) the losses of the critic, and (T,) bool: whether the clipped term is the maximum.

    Args:
        values: (T,) values of the critic.
        old: (T,) values before the first optimizer step on the batch, without gradient.
        returns: (T,) returns G.
        clip: Largest change of a value that is not clipped, or None for no clipping.
    """
    free = (values - returns).square()
    if clip is None:
        return free / 2, torch.zeros_like(free, dtype=torch.bool)
    clipped = (old + (values - old).clamp(-clip, clip) - returns).square()
    return torch.maximum(free, clipped) / 2, clipped > free


def token_rewards(scores: Tensor, divergence: Tensor, lengths: Tensor, weight: float) -> Tensor:
    """Returns (N, L) the reward of each token, zero after the end of an answer.

    Args:
        scores: (N,) scores of the answers.
        divergence: (N, L) estimates of the divergence, in nats.
        lengths: (N,) number of tokens of each answer.
        weight: The coefficient β.
    """
    rewards = torch.where(token_mask(lengths, divergence.shape[1]), -weight * divergence, 0)
    # Answers of empty rows have length 0, so they have no last token.
    filled = lengths.nonzero().squeeze(1)
    rewards[filled, lengths[filled] - 1] += scores[filled].to(rewards.dtype)
    return rewards


class PPOTrainer(OnlineTrainer):
    """Proximal policy optimisation.

    Args:
        model: An actor with its critic (models/heads.py).
        dataset: See `BaseTrainer`.
        reward_model: Frozen model that scores answers at their last tokens; None: only functions return rewards.
        others: See `OnlineTrainer`.
    """

    class Config(OnlineConfig):
        """Settings of PPO. The equations: trainers/ppo.py."""

        reward_model: str | None = Field(
            None, description="a run of the reward trainer (its folder), or a folder that it exported"
        )
        epochs: PositiveInt = Field(4, description="passes over each batch of rollouts")
        clip: PositiveFloat = Field(0.2, description="largest distance of the importance ratio from 1")
        value_clip: PositiveFloat | None = Field(0.2, description="largest change of a value; null: no clipping")
        value_weight: NonNegativeFloat = Field(0.1, description="weight of the value loss")
        discount: float = Field(1.0, gt=0, le=1, description="gamma")
        gae_lambda: float = Field(0.95, ge=0, le=1)
        whiten: bool = Field(True, description="scale advantages to mean 0 and variance 1 over the global batch")
        kl_weight: NonNegativeFloat = Field(
            0.05, description="weight of the KL divergence from the reference; 0: no reference is kept"
        )
        kl_in: Literal["reward", "loss"] = "reward"
        kl_estimator: Literal["k1", "k2", "k3"] = "k1"
        kl_target: PositiveFloat | None = Field(
            None, description="nats per answer to which kl_weight is controlled; null: it stays constant"
        )
        kl_horizon: PositiveInt = Field(10000, description="answers over which kl_weight is controlled")
        missing_eos_penalty: NonNegativeFloat = Field(
            0.0, description="subtracted from the reward of an answer that did not end"
        )
        critic: Literal["shared", "own"] = Field(
            "shared", description="a head on the policy's last hidden states, or a separate model"
        )

        @model_validator(mode="after")
        def _rewarded(self) -> Self:
            if not self.reward and self.reward_model is None:
                raise ValueError("give reward (a function) or reward_model: at least one is required")
            if self.kl_target is not None and not self.kl_weight:
                raise ValueError("kl_target controls kl_weight, so kl_weight must be greater than 0")
            return self

    config: Config
    trains: ClassVar[str] = "actor_critic"
    dependencies: ClassVar[tuple[str, ...]] = (*OnlineTrainer.dependencies, "reward_model")

    def __init__(self, model: nn.Module, dataset: Any = None, *, reward_model: nn.Module | None = None, **others: Any):
        super().__init__(model, dataset, **others)
        self.reward_model, self.kl_weight = reward_model, self.config.kl_weight

    @classmethod
    def kind_of_model(cls, config: TrainerSection) -> str:
        own = isinstance(config, PPOTrainer.Config) and config.critic == "own"
        return "actor_own_critic" if own else "actor_critic"

    @property
    def frozen_models(self) -> dict[str, nn.Module]:
        return {**super().frozen_models, **({} if self.reward_model is None else {"reward_model": self.reward_model})}

    @torch.no_grad()
    def _prepared(self, batch: Batch) -> list[Micro]:
        """Returns rollouts with the grids of `_scored`, and with advantages and returns (N, L).

        They are computed once, before the first optimizer step on the batch, and stay fixed in all epochs. With
        `whiten` this method contains collectives, so all ranks must call it.
        """
        rows = self.rollouts(batch)
        for micro in rows:
            scored = [self._scored(piece) for piece in self._pieces(micro)]
            # The grids of each piece are only as wide as its own longest answer. `score` (n, 1) is not a grid.
            width = max(p["values"].shape[1] for p in scored)
            for name in scored[0]:
                pad = width if scored[0][name].shape[1:] and name != "score" else None
                parts = [
                    torch.nn.functional.pad(p[name], (0, pad - p[name].shape[1])) if pad else p[name] for p in scored
                ]
                micro[name] = torch.cat(parts)
            lengths = micro["lengths"][:, 0]
            # With `kl_in: loss` the divergence is a term of the loss and must not also reduce the reward.
            in_reward = self.kl_weight if self.config.kl_in == "reward" else 0.0
            rewards = token_rewards(micro["score"][:, 0], micro["divergence"], lengths, in_reward)
            estimated = gae(rewards, micro["values"], lengths, self.config.discount, self.config.gae_lambda)
            micro["advantages"], micro["returns"] = estimated
        # All micro-batches together, so the statistics do not depend on how the batch is split.
        if self.config.whiten:
            masks = [token_mask(m["lengths"][:, 0], m["advantages"].shape[1]) for m in rows]
            for micro, advantages in zip(rows, whiten([m["advantages"] for m in rows], masks), strict=True):
                micro["advantages"] = advantages
        return rows

    def _scored(self, micro: Micro) -> Micro:
        """Returns the scores of n training rows that stay fixed during the batch.

        Returns:
            Grids (n, L): `old_log_probs`, `values`, `divergence` (zeros without a reference), and
            `reference_log_probs` if there is a reference model. Also `score` (n, 1).
        """
        lengths = micro["lengths"][:, 0]
        with self.autocast():
            scores, scored = self.score(self.model, micro)
            assert scores.values is not None, "PPO needs a model with a critic"
            old = to_grid(scores.log_probs, scored, lengths)
            # With rollout actors the policy that sampled is an older one, so the ratio uses its log-probabilities.
            if "old_log_probs" in micro:
                old = micro["old_log_probs"][:, : old.shape[1]].to(old.dtype)
            found = {
                "old_log_probs": old,
                "values": to_grid(scores.values, scored, lengths),
                "divergence": torch.zeros_like(old),
            }
            if self.reference is not None:
                reference = to_grid(self.score(self.reference, micro)[0].log_probs, scored, lengths)
                found["reference_log_probs"] = reference
                found["divergence"] = kl_estimate(old, reference, self.config.kl_estimator)
            # `counted` is false in empty rows, which did not end either but must not get the penalty.
            score = micro["reward"] - self.config.missing_eos_penalty * (1 - micro["ended"]) * micro["counted"]
        return {**found, "score": score}

    @torch.no_grad()
    def model_rewards(self, rows: Micro) -> Tensor | None:
        """Returns (N,) the scores of the reward model at the last tokens of the answers, 0 for empty rows.

        None if there is no reward model.
        """
        if self.reward_model is None:
            return None
        scores = []
        for piece in self._pieces(rows):
            # Indices in the flattened (n · S) piece. Answers of empty rows have length 0, but their prompts have one
            # token.
            places = (piece["prompt_lengths"] + piece["lengths"] - 1)[:, 0]
            ends = torch.arange(len(places), device=places.device) * piece["input_ids"].shape[1] + places
            with self.autocast():
                found: Tensor = self.reward_model(
                    input_ids=piece["input_ids"], position_ids=piece["position_ids"], ends=ends
                )
            scores.append(found * piece["counted"][:, 0])
        return torch.cat(scores)

    def optimizer_steps(self, batch: Batch) -> Iterator[list[Micro]]:
        """Samples rollouts and yields `epochs` × `minibatches` optimizer steps on them."""
        rows = self._prepared(batch)
        yield from self.minibatches_of(rows)
        # After the last step of the batch, so all its steps use the same coefficient as its token rewards.
        self._steer(rows)

    def _steer(self, rows: list[Micro]) -> None:
        """Adjusts `kl_weight` to approach `kl_target` (Ziegler et al., 2019, §2.2). Contains a collective."""
        if self.config.kl_target is None:
            return
        total = torch.stack(
            [
                sum(
                    (m["divergence"].double().sum() for m in rows),
                    torch.zeros((), dtype=torch.float64, device=self.device),
                ),
                sum(
                    (m["counted"].double().sum() for m in rows),
                    torch.zeros((), dtype=torch.float64, device=self.device),
                ),
            ]
        )
        # Every rank computes the new coefficient from the same global sums, so it stays equal on all ranks.
        divergence, answers = all_reduce_(total).tolist()
        # The clipped relative error limits how fast the coefficient changes.
        error = max(-0.2, min(0.2, divergence / answers / self.config.kl_target - 1))
        self.kl_weight *= 1 + error * answers / self.config.kl_horizon

    def batch_weight(self, micro: Micro) -> Tensor:
        """Returns the number of answer tokens."""
        return micro["lengths"].sum()

    def train_step(self, micro: Micro) -> StepOutput:
        """Returns the sum of the losses of the tokens.

        The terms are those of policy, critic and entropy, and the divergence with `kl_in: loss`.
        """
        config = self.config
        weights = micro["lengths"][:, 0]
        scores, scored = self.score(self.model, micro, entropy=True, weights=weights)
        at = (scored.rows, scored.steps)
        log_probs, values = scores.log_probs, scores.values
        assert values is not None
        # Grids to flat tensors. They were computed without gradient and are constants of the loss.
        old, old_values, advantages, returns = (
            micro[name][at].to(log_probs.dtype) for name in ("old_log_probs", "values", "advantages", "returns")
        )
        policy, ratio, clipped = policy_losses(log_probs, old, advantages, config.clip)
        critic, value_clipped = value_losses(values, old_values, returns, config.value_clip)
        loss = policy.sum() + config.value_weight * critic.sum() - config.entropy_weight * scores.entropies.sum()
        if self.reference is not None and config.kl_in == "loss":
            reference = micro["reference_log_probs"][at].to(log_probs.dtype)
            loss = loss + self.kl_weight * kl_estimate(log_probs, reference, config.kl_estimator).sum()
        # Metrics are detached: they must not keep the autograd graph of the micro-batch in memory. Those with an
        # underscore are the moments from which `derived_metrics` computes variances over the global batch.
        tokens, answers = len(policy), micro["counted"].sum()
        metrics: MetricPairs = {
            "loss/policy": (policy.detach().sum(), tokens),
            "loss/value": (critic.detach().sum(), tokens),
            "importance_ratio": (ratio.detach().sum(), tokens),
            "clip_fraction": (clipped.sum(), tokens),
            "value_clip_fraction": (value_clipped.sum(), tokens),
            "entropy": (scores.entropies.detach().sum(), tokens),
            "score": (micro["score"].sum(), answers),
            "kl": (micro["divergence"].sum(), answers),
            "kl_weight": (self.kl_weight, 1.0),
            "_returns": (returns.sum(), tokens),
            "_returns_squared": (returns.square().sum(), tokens),
            "_residual": ((returns - old_values).sum(), tokens),
            "_residual_squared": ((returns - old_values).square().sum(), tokens),
            **self.rollout_metrics(micro),
        }
        return with_router_loss(self.model, StepOutput(loss, metrics), scores.router, weights)

    def derived_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Returns the share of the variance of the returns that the critic explains, 1 - Var(G - V) / Var(G).

        V are the values before the first optimizer step on the batch. The metrics of the base class are included.
        """
        experts = super().derived_metrics(metrics)
        if "_returns" not in metrics:
            return experts
        # Var(X) = E[X²] - E[X]²: only sums can be added over micro-batches and ranks.
        spread = metrics["_returns_squared"] - metrics["_returns"] ** 2
        unexplained = metrics["_residual_squared"] - metrics["_residual"] ** 2
        # If all returns are equal, the ratio is undefined and not reported.
        return {**({"explained_variance": 1 - unexplained / spread} if spread > 1e-12 else {}), **experts}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "kl_weight": self.kl_weight}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self.kl_weight = saved["kl_weight"]
