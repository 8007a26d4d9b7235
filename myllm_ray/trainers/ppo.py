"""Proximal policy optimisation of a language model (Schulman et al., 2017, arXiv:1707.06347; on language: Ziegler et al., 2019,
arXiv:1909.08593; Ouyang et al., 2022, arXiv:2203.02155).

An answer y to a prompt x is an episode; choosing its token t is an action in the state (x, y_<t). Its score R (reward model, reward
functions, less `missing_eos_penalty` where it did not end) comes with the last token. With `kl_in: reward` (Ziegler, eq. 2)

    r_t = [t is last] R - β KL_t

KL_t the estimate of the divergence from the reference by token t (`kl_estimator`). Advantages A_t and returns G_t by GAE(γ, λ)
(ops/advantages.py), A whitened over the global batch. Then, `epochs` × `minibatches` times, the mean over the tokens of

    -min(ρ_t A_t, clip(ρ_t, 1 ± `clip`) A_t),  ρ_t = π/π_old                                              Schulman, eq. 7
    + c_v · ½ max((V_t - G_t)², (clip(V_t, V_old ± `value_clip`) - G_t)²)                                 Schulman et al., baselines
    - c_e · H_t      + β KL_t where `kl_in: loss`

β is steered to `kl_target` nats an answer (Ziegler, §2.2): β ← β (1 + clip(KL/target - 1, ±0.2) · answers / `kl_horizon`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from myllm_ray.common.distributed import all_reduce_
from myllm_ray.common.types import Batch, MetricPairs, Micro, Reward, RolloutPool, Sampler, StepOutput
from myllm_ray.config.trainers import PPOKnobs
from myllm_ray.ops.advantages import gae, kl_estimate, token_mask, whiten
from myllm_ray.ops.rollouts import to_grid
from myllm_ray.trainers.online import OnlineTrainer
from myllm_ray.trainers.routing import with_router_loss


def policy_losses(log_probs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) clipped losses of the tokens, (T,) importance ratios, (T,) whether clipping took effect."""
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages), ratio, ratio * advantages > clipped * advantages


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """(T,) losses of the critic, (T,) whether clipping took effect."""
    free = (values - returns).square()
    if clip is None:
        return free / 2, torch.zeros_like(free, dtype=torch.bool)
    clipped = (old + (values - old).clamp(-clip, clip) - returns).square()
    return torch.maximum(free, clipped) / 2, clipped > free


def token_rewards(scores: Tensor, divergence: Tensor, lengths: Tensor, weight: float) -> Tensor:
    """The reward of each token: (N,) scores of the answers, (N, L) divergence -> (N, L), zero behind the end."""
    rewards = torch.where(token_mask(lengths, divergence.shape[1]), -weight * divergence, 0)
    filled = lengths.nonzero().squeeze(1)
    rewards[filled, lengths[filled] - 1] += scores[filled].to(rewards.dtype)
    return rewards


class PPOTrainer(OnlineTrainer):
    """Proximal policy optimisation.

    Args:
        model: an actor with its critic (`models/heads.py`).
        reward_model: scores answers at their last tokens; None: only functions do.
        knobs: the config's section `ppo`; or its keys as keyword arguments.
        others: see `OnlineTrainer`.
    """

    trains: ClassVar[str] = "actor_critic"
    uses: ClassVar[tuple[str, ...]] = (*OnlineTrainer.uses, "reward_model")

    def __init__(self, model: nn.Module, dataset: Any = None, *, sampler: Sampler, rewards: list[Reward],
                 knobs: PPOKnobs | None = None, columns: Any = None, reference: nn.Module | None = None,
                 reward_model: nn.Module | None = None, seed: int = 0, micro_size: int | None = None,
                 pool: RolloutPool | None = None, max_lag: int = 1, validation_columns: Any = None, packs_rows: bool = True, bytes_per_token: Any = None,
                 sources: Any = (), **options: Any):
        self.knobs = knobs or PPOKnobs(**{"reward": [{"function": r.name} for r in rewards], **options})
        super().__init__(model, dataset, sampler=sampler, rewards=rewards, columns=columns, reference=reference, seed=seed,
                         validation_columns=validation_columns, packs_rows=packs_rows,
                         micro_size=micro_size, pool=pool, max_lag=max_lag, epochs=self.knobs.epochs, minibatches=self.knobs.minibatches,
                         bytes_per_token=bytes_per_token, sources=sources)
        self.reward_model, self.kl_weight = reward_model, self.knobs.kl_weight

    @property
    def frozen_models(self) -> dict[str, nn.Module]:
        return {**super().frozen_models, **({} if self.reward_model is None else {"reward_model": self.reward_model})}

    @torch.no_grad()
    def _prepared(self, batch: Batch) -> list[Micro]:
        """Rollouts with what the policy, the critic and the reference thought of them, advantages and returns."""
        rows = self.rollouts(batch)
        for micro in rows:
            scored = [self._scored(piece) for piece in self._pieces(micro)]
            width = max(p["values"].shape[1] for p in scored)
            for name in scored[0]:
                pad = width if scored[0][name].shape[1:] and name != "score" else None
                parts = [torch.nn.functional.pad(p[name], (0, pad - p[name].shape[1])) if pad else p[name] for p in scored]
                micro[name] = torch.cat(parts)
            lengths = micro["lengths"][:, 0]
            in_reward = self.kl_weight if self.knobs.kl_in == "reward" else 0.0
            rewards = token_rewards(micro["score"][:, 0], micro["divergence"], lengths, in_reward)
            estimated = gae(rewards, micro["values"], lengths, self.knobs.discount, self.knobs.gae_lambda)
            micro["advantages"], micro["returns"] = estimated
        if self.knobs.whiten:
            masks = [token_mask(m["lengths"][:, 0], m["advantages"].shape[1]) for m in rows]
            for micro, advantages in zip(rows, whiten([m["advantages"] for m in rows], masks), strict=True):
                micro["advantages"] = advantages
        return rows

    def _scored(self, micro: Micro) -> Micro:
        """Grids (n, L) `old_log_probs`, `values`, `divergence`, `reference_log_probs`, and `score` (n, 1) of a piece."""
        lengths = micro["lengths"][:, 0]
        with self.autocast():
            scores, scored = self.score(self.model, micro)
            assert scores.values is not None, "PPO needs a model with a critic"
            old = to_grid(scores.log_probs, scored, lengths)
            if "old_log_probs" in micro:  # of the policy that sampled, where that is an older one
                old = micro["old_log_probs"][:, : old.shape[1]].to(old.dtype)
            found = {"old_log_probs": old, "values": to_grid(scores.values, scored, lengths), "divergence": torch.zeros_like(old)}
            if self.reference is not None:
                reference = to_grid(self.score(self.reference, micro)[0].log_probs, scored, lengths)
                found["reference_log_probs"] = reference
                found["divergence"] = kl_estimate(old, reference, self.knobs.kl_estimator)
            score = micro["reward"] - self.knobs.missing_eos_penalty * (1 - micro["ended"]) * micro["counted"]
        return {**found, "score": score}

    @torch.no_grad()
    def model_rewards(self, rows: Micro) -> Tensor | None:
        """(N,) the reward model's scores at the last tokens of the answers."""
        if self.reward_model is None:
            return None
        scores = []
        for piece in self._pieces(rows):
            places = (piece["prompt_lengths"] + piece["lengths"] - 1)[:, 0]
            ends = torch.arange(len(places), device=places.device) * piece["input_ids"].shape[1] + places
            with self.autocast():
                found: Tensor = self.reward_model(input_ids=piece["input_ids"], position_ids=piece["position_ids"], ends=ends)
            scores.append(found * piece["counted"][:, 0])
        return torch.cat(scores)

    def expand(self, batch: Batch) -> Iterator[list[Micro]]:
        """Rollouts, then `epochs` × `minibatches` optimizer steps on them."""
        rows = self._prepared(batch)
        yield from self.minibatches_of(rows)
        self._steer(rows)

    def _steer(self, rows: list[Micro]) -> None:
        """Ziegler et al., 2019, §2.2."""
        if self.knobs.kl_target is None:
            return
        total = torch.stack([sum((m["divergence"].double().sum() for m in rows), torch.zeros((), dtype=torch.float64, device=self.device)),
                             sum((m["counted"].double().sum() for m in rows), torch.zeros((), dtype=torch.float64, device=self.device))])
        divergence, answers = all_reduce_(total).tolist()
        error = max(-0.2, min(0.2, divergence / answers / self.knobs.kl_target - 1))
        self.kl_weight *= 1 + error * answers / self.knobs.kl_horizon

    def batch_weight(self, micro: Micro) -> Tensor:
        """Tokens of answers."""
        return micro["lengths"].sum()

    def train_step(self, micro: Micro) -> StepOutput:
        """Sum of the tokens' losses: policy, critic, entropy, and the divergence where it belongs to the loss."""
        knobs = self.knobs
        weights = micro["lengths"][:, 0]
        scores, scored = self.score(self.model, micro, entropy=True, weights=weights)
        at = (scored.rows, scored.steps)
        log_probs, values = scores.log_probs, scores.values
        assert values is not None
        old, old_values, advantages, returns = (micro[name][at].to(log_probs.dtype)
                                                for name in ("old_log_probs", "values", "advantages", "returns"))
        policy, ratio, clipped = policy_losses(log_probs, old, advantages, knobs.clip)
        critic, value_clipped = value_losses(values, old_values, returns, knobs.value_clip)
        loss = policy.sum() + knobs.value_weight * critic.sum() - knobs.entropy_weight * scores.entropies.sum()
        if self.reference is not None and knobs.kl_in == "loss":
            reference = micro["reference_log_probs"][at].to(log_probs.dtype)
            loss = loss + self.kl_weight * kl_estimate(log_probs, reference, knobs.kl_estimator).sum()
        tokens, answers = len(policy), micro["counted"].sum()
        metrics: MetricPairs = {
            "loss/policy": (policy.detach().sum(), tokens), "loss/value": (critic.detach().sum(), tokens),
            "importance_ratio": (ratio.detach().sum(), tokens), "clip_fraction": (clipped.sum(), tokens),
            "value_clip_fraction": (value_clipped.sum(), tokens), "entropy": (scores.entropies.detach().sum(), tokens),
            "score": (micro["score"].sum(), answers), "kl": (micro["divergence"].sum(), answers), "kl_weight": (self.kl_weight, 1.0),
            "_returns": (returns.sum(), tokens), "_returns_squared": (returns.square().sum(), tokens),
            "_residual": ((returns - old_values).sum(), tokens), "_residual_squared": ((returns - old_values).square().sum(), tokens),
            **self.rollout_metrics(micro)}
        return with_router_loss(self.model, StepOutput(loss, metrics), scores.router, weights)

    def derive(self, metrics: dict[str, float]) -> dict[str, float]:
        """How much of the returns' variance the critic knew: 1 - Var(G - V) / Var(G)."""
        experts = super().derive(metrics)
        if "_returns" not in metrics:
            return experts
        spread = metrics["_returns_squared"] - metrics["_returns"] ** 2
        unexplained = metrics["_residual_squared"] - metrics["_residual"] ** 2
        return {**({"explained_variance": 1 - unexplained / spread} if spread > 1e-12 else {}), **experts}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "kl_weight": self.kl_weight}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self.kl_weight = saved["kl_weight"]
