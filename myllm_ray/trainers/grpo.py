"""Group-relative policy optimisation (Shao et al., 2024, DeepSeekMath, arXiv:2402.03300).

To each prompt x, G answers y_i are sampled from π_old and rewarded. Their advantages (eq. 4) need no critic:

    A_i = (R_i - mean(R_1..R_G)) / (std(R_1..R_G) + 1e-4)          `scale_rewards`: group; batch: std over all; none: 1

and each token t of answer i has the loss (eq. 3; clipped on each side by its own bound, as in DAPO)

    ρ = π(y_it | x, y_i<t) / π_old(...)            `importance: sequence`: the geometric mean over the answer (GSPO, eq. 7)
    l_it = -min(ρ A_i, clip(ρ, 1 - `clip`, 1 + `clip_high`) A_i) + β KL_it - η H_it

where KL_it is the estimate of the divergence from the reference (`kl_estimator`; k3 is DeepSeekMath's eq. 4) and H_it the entropy.
`loss` says how they are averaged:

    grpo      mean over answers of the mean over tokens            DeepSeekMath, eq. 3
    dr_grpo   sum over all tokens / (answers · max_new_tokens)     Liu et al., 2025, arXiv:2503.20783
    dapo      sum over all tokens / number of tokens               Yu et al., 2025, arXiv:2503.14476, eq. 8

always over the global batch. `mask_truncated`: answers that did not end count as answers, but none of their tokens does (DAPO §3.4).
GSPO: Zheng et al., 2025, arXiv:2507.18071.

Deviation: where a batch makes a single optimizer step, π_old is π: ρ is 1, with the gradient that it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from myllm_ray.common.distributed import all_reduce_
from myllm_ray.common.types import Batch, MetricPairs, Micro, Reward, RolloutPool, Sampler, StepOutput
from myllm_ray.config.trainers import GRPOKnobs
from myllm_ray.ops.advantages import kl_estimate
from myllm_ray.ops.pairs import sum_by
from myllm_ray.ops.rollouts import Scored, to_grid
from myllm_ray.trainers.online import OnlineTrainer
from myllm_ray.trainers.routing import with_router_loss

_EPSILON = 1e-4


def group_advantages(rewards: Tensor, deviation: Tensor | None) -> Tensor:
    """(groups, G) rewards -> (groups, G) advantages.

    Args:
        deviation: divide by this; None: by each group's own.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / ((rewards.std(1, keepdim=True) if deviation is None else deviation) + _EPSILON)


def policy_losses(log_probs: Tensor, old: Tensor, advantages: Tensor, answer: Tensor, lengths: Tensor,
                  knobs: GRPOKnobs) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped loss of each token.

    Args:
        log_probs, old: (T,) of the answers' tokens under the policy and the one that sampled them.
        advantages: (T,).
        answer: (T,) number of the answer that each token belongs to.
        lengths: (N,) tokens of each answer.

    Returns:
        (T,) losses, (T,) importance ratios, (T,) whether clipping took effect.
    """
    log_ratio = log_probs - old
    if knobs.importance == "sequence":
        log_ratio = (sum_by(log_ratio, answer, len(lengths)) / lengths.clamp(min=1))[answer]
    ratio = log_ratio.exp()
    high = knobs.clip if knobs.clip_high is None else knobs.clip_high
    clipped = ratio.clamp(1 - knobs.clip, 1 + high)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    return losses, ratio, ratio * advantages > clipped * advantages


class GRPOTrainer(OnlineTrainer):
    """Group-relative policy optimisation.

    Args:
        knobs: the config's section `grpo`; or its keys as keyword arguments.
        others: see `OnlineTrainer`.
    """

    uses: ClassVar[tuple[str, ...]] = OnlineTrainer.uses

    def __init__(self, model: nn.Module, dataset: Any = None, *, sampler: Sampler, rewards: list[Reward],
                 knobs: GRPOKnobs | None = None, columns: Any = None, reference: nn.Module | None = None, seed: int = 0,
                 micro_size: int | None = None, pool: RolloutPool | None = None, max_lag: int = 1,
                 validation_columns: Any = None, packs_rows: bool = True, bytes_per_token: Any = None, sources: Any = (), **options: Any):
        self.knobs = knobs or GRPOKnobs(**{"reward": [{"function": r.name} for r in rewards], **options})
        if self.knobs.mask_truncated and self.knobs.loss == "dapo":  # averaged over the tokens that count: there may be none
            self.empty_batch_reason = "none of its answers has ended, and grpo.mask_truncated leaves such answers out"
        super().__init__(model, dataset, sampler=sampler, rewards=rewards, columns=columns, reference=reference, seed=seed,
                         validation_columns=validation_columns, packs_rows=packs_rows,
                         micro_size=micro_size, pool=pool, max_lag=max_lag, epochs=self.knobs.epochs, minibatches=self.knobs.minibatches,
                         group=self.knobs.group_size, bytes_per_token=bytes_per_token, sources=sources)

    @torch.no_grad()
    def _prepared(self, batch: Batch) -> list[Micro]:
        """Rollouts with advantages, and with the log-probabilities that the training does not compute itself."""
        rows = self.rollouts(batch)
        deviation = self._deviation(rows)
        for micro in rows:
            grouped = micro["reward"].view(-1, self.group)
            micro["advantages"] = group_advantages(grouped, deviation).view(-1, 1)
            micro["group_deviation"] = grouped.std(1).repeat_interleave(self.group)[:, None]
            if self.knobs.mask_truncated:
                micro["sampled_lengths"], micro["lengths"] = micro["lengths"], micro["lengths"] * micro["ended"]
            with self.autocast():
                if self.steps_per_batch > 1 and "old_log_probs" not in micro:
                    micro["old_log_probs"] = self._grid(self.model, micro)
                if self.reference is not None:
                    micro["reference_log_probs"] = self._grid(self.reference, micro)
        return rows

    def _grid(self, model: nn.Module, micro: Micro) -> Tensor:
        pieces = []
        for piece in self._pieces(micro):
            scores, scored = self.score(model, piece)
            pieces.append(to_grid(scores.log_probs, scored, piece["lengths"][:, 0]))
        width = max(p.shape[1] for p in pieces)
        return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in pieces])

    def _deviation(self, rows: list[Micro]) -> Tensor | None:
        """What all advantages are divided by; None: each group by its own."""
        if self.knobs.scale_rewards == "group":
            return None
        if self.knobs.scale_rewards == "none":
            return torch.tensor(1.0 - _EPSILON, device=self.device)
        values = torch.cat([m["reward"][m["counted"]] for m in rows]).double()
        sums = all_reduce_(torch.stack([values.sum(), torch.tensor(float(len(values)), dtype=torch.float64, device=self.device)]))
        mean, count = sums[0] / sums[1], sums[1]
        return (all_reduce_((values - mean).square().sum()) / (count - 1).clamp(min=1)).sqrt()

    def expand(self, batch: Batch) -> Iterator[list[Micro]]:
        """Rollouts, then `epochs` × `minibatches` optimizer steps on them."""
        yield from self.minibatches_of(self._prepared(batch))

    def batch_weight(self, micro: Micro) -> Tensor:
        """Answers; their tokens (dapo); or answers times the longest length (dr_grpo)."""
        return self._answer_weights(micro).sum()

    def _answer_weights(self, micro: Micro) -> Tensor:
        """(N,) what each answer adds to `batch_weight`."""
        if self.knobs.loss == "dapo":
            return micro["lengths"][:, 0]
        return micro["counted"][:, 0] * (self.sampler.max_new_tokens if self.knobs.loss == "dr_grpo" else 1)

    def train_step(self, micro: Micro) -> StepOutput:
        """Sum of the tokens' losses, weighted as `loss` says."""
        weights = self._answer_weights(micro)
        scores, scored = self.score(self.model, micro, entropy=True, weights=weights)
        lengths, at = micro["lengths"][:, 0], (scored.rows, scored.steps)
        log_probs = scores.log_probs
        old = micro["old_log_probs"][at] if "old_log_probs" in micro else log_probs.detach()
        advantages = micro["advantages"][scored.rows, 0].to(log_probs.dtype)
        losses, ratio, clipped = policy_losses(log_probs, old.to(log_probs.dtype), advantages, scored.rows, lengths, self.knobs)
        tokens = len(losses)
        metrics: MetricPairs = {"importance_ratio": (ratio.detach().sum(), tokens), "clip_fraction": (clipped.sum(), tokens),
                   "entropy": (scores.entropies.detach().sum(), tokens),
                   "reward_deviation": (micro["group_deviation"][micro["counted"]].sum(), micro["counted"].sum()),
                   "groups_without_signal": ((micro["group_deviation"][micro["counted"]] < 1e-6).sum(), micro["counted"].sum()),
                   **self.rollout_metrics(micro)}
        if self.reference is not None:
            divergence = kl_estimate(log_probs, micro["reference_log_probs"][at].to(log_probs.dtype), self.knobs.kl_estimator)
            losses = losses + self.knobs.kl_weight * divergence
            metrics["kl"] = (divergence.detach().sum(), tokens)
        losses = losses - self.knobs.entropy_weight * scores.entropies
        return with_router_loss(self.model, StepOutput(self._weighted(losses, scored, lengths), metrics), scores.router, weights)

    def _weighted(self, losses: Tensor, scored: Scored, lengths: Tensor) -> Tensor:
        return (losses / lengths[scored.rows]).sum() if self.knobs.loss == "grpo" else losses.sum()
