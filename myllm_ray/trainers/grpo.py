"""Group-relative policy optimisation (Shao et al., 2024, DeepSeekMath, arXiv:2402.03300).

For each prompt x, G answers y_i are sampled from π_old and rewarded. Their advantages (eq. 4) need no critic:

    A_i = (R_i - mean(R_1..R_G)) / (std(R_1..R_G) + 1e-4)          `scale_rewards`: group; batch: std over all; none: 1

Each token t of answer i has the loss (eq. 3; with separate bounds for both sides of the clipping, as in DAPO)

    ρ = π(y_it | x, y_i<t) / π_old(...)            `importance: sequence`: the geometric mean over the answer
                                                   (GSPO, eq. 7)
    l_it = -min(ρ A_i, clip(ρ, 1 - `clip`, 1 + `clip_high`) A_i) + β KL_it - η H_it

KL_it is the estimate of the divergence from the reference (`kl_estimator`; k3 is DeepSeekMath's eq. 4), and H_it is the
entropy. β is `kl_weight` and η is `entropy_weight`. `loss` selects how the losses of the tokens are averaged:

    grpo      mean over answers of the mean over tokens            DeepSeekMath, eq. 3
    dr_grpo   sum over all tokens / (answers · max_new_tokens)     Liu et al., 2025, arXiv:2503.20783
    dapo      sum over all tokens / number of tokens               Yu et al., 2025, arXiv:2503.14476, eq. 8

The average is always over the global batch. With `mask_truncated`, answers that did not end count as answers, but
their tokens do not count (DAPO §3.4). GSPO: Zheng et al., 2025, arXiv:2507.18071.

Deviation: If a batch is used for a single optimizer step, π_old is π without gradient. The value of ρ is then 1, and
its gradient is that of log π. With rollout actors, π_old is always the policy that sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from myllm_ray.common.distributed import all_reduce_
from myllm_ray.common.types import Batch, MetricPairs, Micro, StepOutput
from myllm_ray.ops.advantages import kl_estimate
from myllm_ray.ops.pairs import sum_by
from myllm_ray.ops.rollouts import Scored, to_grid
from myllm_ray.trainers.online import OnlineTrainer
from myllm_ray.trainers.online_config import OnlineConfig
from myllm_ray.trainers.rewards import FunctionReward
from myllm_ray.trainers.routing import with_router_loss

_EPSILON = 1e-4
"""Added to the standard deviation, so that groups of equal rewards have advantages 0."""


def group_advantages(rewards: Tensor, deviation: Tensor | None) -> Tensor:
    """Returns (groups, G) the advantages of the answers.

    Args:
        rewards: (groups, G) rewards of the G answers to each prompt.
        deviation: Standard deviation that divides all advantages; None: that of each group.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / ((rewards.std(1, keepdim=True) if deviation is None else deviation) + _EPSILON)


def policy_losses(
    log_probs: Tensor, old: Tensor, advantages: Tensor, answer: Tensor, lengths: Tensor, config: GRPOTrainer.Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the clipped loss of each token.

    Args:
        log_probs: (T,) log-probabilities of the answer tokens under the policy, in nats.
        old: (T,) the same under the policy that sampled them, without gradient.
        advantages: (T,) advantage of each token's answer.
        answer: (T,) index of each token's answer.
        lengths: (N,) number of tokens of each answer.
        config: The trainer's settings.

    Returns:
        (T,) losses, (T,) importance ratios, and (T,) bool: whether the clipped term is the minimum.
    """
    log_ratio = log_probs - old
    # The mean of log-ratios is the logarithm of the geometric mean; a product of many ratios could overflow.
    if config.importance == "sequence":
        log_ratio = (sum_by(log_ratio, answer, len(lengths)) / lengths.clamp(min=1))[answer]
    ratio = log_ratio.exp()
    high = config.clip if config.clip_high is None else config.clip_high
    # The minimum has no gradient where a further change of the ratio beyond its bound would improve the objective, but
    # keeps the gradient that moves the ratio back.
    clipped = ratio.clamp(1 - config.clip, 1 + high)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    return losses, ratio, ratio * advantages > clipped * advantages


class GRPOTrainer(OnlineTrainer):
    """Group-relative policy optimisation.

    The constructor's arguments are those of `OnlineTrainer`.
    """

    class Config(OnlineConfig):
        """Settings of GRPO. The equations: trainers/grpo.py."""

        reward: list[FunctionReward.Config] = Field(
            min_length=1, description="functions that return rewards: my_pkg.my_mod:fn, or a list"
        )
        group_size: int = Field(8, ge=2, description="answers to each prompt")
        loss: Literal["grpo", "dr_grpo", "dapo"] = Field(
            "grpo",
            description="average: of each answer's mean over its tokens; of tokens over the longest length; "
            "of all tokens",
        )
        importance: Literal["token", "sequence"] = Field(
            "token", description="the ratio of each token, or of the whole answer (GSPO)"
        )
        clip: PositiveFloat = Field(0.2, description="largest distance of the importance ratio below 1")
        clip_high: PositiveFloat | None = Field(None, description="largest distance above 1; default: as clip")
        scale_rewards: Literal["group", "batch", "none"] = Field(
            "group", description="divide advantages by the standard deviation of the group, of the batch, or by 1"
        )
        mask_truncated: bool = Field(
            False, description="leave out the tokens of answers that did not end (DAPO's overlong filtering)"
        )

        @property
        def answers_per_prompt(self) -> int:
            return self.group_size

    config: Config

    def __init__(self, model: nn.Module, dataset: Any = None, **others: Any):
        super().__init__(model, dataset, **others)
        if (
            self.config.mask_truncated and self.config.loss == "dapo"
        ):  # the average is over the tokens of answers that ended, and a batch may have no such answer
            self.empty_batch_reason = "none of its answers has ended, and grpo.mask_truncated leaves such answers out"

    @torch.no_grad()
    def _prepared(self, batch: Batch) -> list[Micro]:
        """Returns rollouts with advantages and with the log-probabilities that stay fixed during the batch.

        `old_log_probs` and `reference_log_probs` are grids (N, L), in nats. They are computed before the first
        optimizer step, while the model still has the weights that sampled.
        """
        rows = self.rollouts(batch)
        deviation = self._deviation(rows)
        for micro in rows:
            # The answers to a prompt are consecutive. Groups are complete here; `_pieces` may divide them later.
            grouped = micro["reward"].view(-1, self.group)
            micro["advantages"] = group_advantages(grouped, deviation).view(-1, 1)
            micro["group_deviation"] = grouped.std(1).repeat_interleave(self.group)[:, None]
            # Length 0 removes the tokens of truncated answers from loss and weights; metrics keep the real length.
            if self.config.mask_truncated:
                micro["sampled_lengths"], micro["lengths"] = micro["lengths"], micro["lengths"] * micro["ended"]
            with self.autocast():
                # With a single step, `train_step` uses its own detached log-probabilities and saves this forward pass.
                # Rollout actors return those of the older weights that sampled.
                if self.steps_per_batch > 1 and "old_log_probs" not in micro:
                    micro["old_log_probs"] = self._grid(self.model, micro)
                if self.reference is not None:
                    micro["reference_log_probs"] = self._grid(self.reference, micro)
        return rows

    def _grid(self, model: nn.Module, micro: Micro) -> Tensor:
        """Returns (N, L) the log-probabilities of the answer tokens under a model, zero after the end of an answer."""
        pieces = []
        for piece in self._pieces(micro):
            scores, scored = self.score(model, piece)
            pieces.append(to_grid(scores.log_probs, scored, piece["lengths"][:, 0]))
        # The grid of each piece is only as wide as its own longest answer.
        width = max(p.shape[1] for p in pieces)
        return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in pieces])

    def _deviation(self, rows: list[Micro]) -> Tensor | None:
        """Returns the standard deviation that divides all advantages, or None for that of each group.

        With `scale_rewards: batch` it contains two collectives, so all ranks must call this method.
        """
        if self.config.scale_rewards == "group":
            return None
        if self.config.scale_rewards == "none":
            # `group_advantages` adds _EPSILON, so the divisor is exactly 1.
            return torch.tensor(1.0 - _EPSILON, device=self.device)
        # In float64, without the empty rows that fill up the last batch of an epoch.
        values = torch.cat([m["reward"][m["counted"]] for m in rows]).double()
        sums = all_reduce_(
            torch.stack([values.sum(), torch.tensor(float(len(values)), dtype=torch.float64, device=self.device)])
        )
        # The mean is known before the squares are summed: E[R²] - E[R]² would cancel when the mean is large.
        mean, count = sums[0] / sums[1], sums[1]
        return (all_reduce_((values - mean).square().sum()) / (count - 1).clamp(min=1)).sqrt()

    def optimizer_steps(self, batch: Batch) -> Iterator[list[Micro]]:
        """Samples rollouts and yields `epochs` × `minibatches` optimizer steps on them."""
        yield from self.minibatches_of(self._prepared(batch))

    def batch_weight(self, micro: Micro) -> Tensor:
        """Returns the number of answers (grpo), of their tokens (dapo), or answers × `max_new_tokens` (dr_grpo)."""
        return self._answer_weights(micro).sum()

    def _answer_weights(self, micro: Micro) -> Tensor:
        """Returns (N,) the part of `batch_weight` of each answer; 0 for those of empty rows."""
        if self.config.loss == "dapo":
            return micro["lengths"][:, 0]
        return micro["counted"][:, 0] * (self.sampler.max_new_tokens if self.config.loss == "dr_grpo" else 1)

    def train_step(self, micro: Micro) -> StepOutput:
        """Returns the sum of the losses of the tokens, weighted according to `loss`."""
        weights = self._answer_weights(micro)
        scores, scored = self.score(self.model, micro, entropy=True, weights=weights)
        lengths, at = micro["lengths"][:, 0], (scored.rows, scored.steps)
        log_probs = scores.log_probs
        # The detached copy makes the value of the ratio 1 and keeps its gradient.
        old = micro["old_log_probs"][at] if "old_log_probs" in micro else log_probs.detach()
        advantages = micro["advantages"][scored.rows, 0].to(log_probs.dtype)
        losses, ratio, clipped = policy_losses(
            log_probs, old.to(log_probs.dtype), advantages, scored.rows, lengths, self.config
        )
        # All metrics are detached: they must not keep the autograd graph of the micro-batch in memory.
        tokens = len(losses)
        metrics: MetricPairs = {
            "importance_ratio": (ratio.detach().sum(), tokens),
            "clip_fraction": (clipped.sum(), tokens),
            "entropy": (scores.entropies.detach().sum(), tokens),
            "reward_deviation": (micro["group_deviation"][micro["counted"]].sum(), micro["counted"].sum()),
            "groups_without_signal": (
                (micro["group_deviation"][micro["counted"]] < 1e-6).sum(),
                micro["counted"].sum(),
            ),
            **self.rollout_metrics(micro),
        }
        if self.reference is not None:
            divergence = kl_estimate(
                log_probs, micro["reference_log_probs"][at].to(log_probs.dtype), self.config.kl_estimator
            )
            losses = losses + self.config.kl_weight * divergence
            metrics["kl"] = (divergence.detach().sum(), tokens)
        losses = losses - self.config.entropy_weight * scores.entropies
        return with_router_loss(
            self.model, StepOutput(self._weighted(losses, scored, lengths), metrics), scores.router, weights
        )

    def _weighted(self, losses: Tensor, scored: Scored, lengths: Tensor) -> Tensor:
        # Every scored token belongs to an answer of length 1 or more, so the division is safe.
        return (losses / lengths[scored.rows]).sum() if self.config.loss == "grpo" else losses.sum()
