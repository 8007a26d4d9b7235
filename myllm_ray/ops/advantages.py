"""Advantages, KL estimates and whitening. Grids are (answers, tokens); a row counts up to its length."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from myllm_ray.common.distributed import all_reduce_


class Advantages(NamedTuple):
    """(N, L) each; zero behind the end of an answer."""

    advantages: Tensor
    returns: Tensor


def token_mask(lengths: Tensor, width: int) -> Tensor:
    """(N,) lengths -> (N, width) bool: the tokens of each answer."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, discount: float, decay: float) -> Advantages:
    """Generalised advantage estimation (Schulman et al., 2016, arXiv:1506.02438, eq. 16), with returns A + V.

        δ_t = r_t + γ V_{t+1} - V_t          A_t = δ_t + γ λ A_{t+1}

    V and A are 0 behind the last token of an answer, whether it ended by itself or was cut off.

    Args:
        rewards, values: (N, L); what stands behind the end of an answer has no influence.
        lengths: (N,).
        discount, decay: γ and λ.
    """
    mask = token_mask(lengths, rewards.shape[1])
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(rewards)
    following = torch.zeros(len(rewards), dtype=rewards.dtype, device=rewards.device)
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        following = torch.where(mask[:, t], delta + discount * decay * following, 0)
        advantages[:, t], next_value = following, values[:, t]
    return Advantages(advantages, torch.where(mask, advantages + values, 0))


def whiten(grids: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Grids with mean 0 and variance 1 over all their tokens and all ranks, whichever way they are cut; zero where masked."""
    kept = [grid[mask].double() for grid, mask in zip(grids, masks, strict=True)]
    device = grids[0].device
    sums = all_reduce_(torch.stack([sum((k.sum() for k in kept), torch.zeros((), dtype=torch.float64, device=device)),
                                    torch.tensor(float(sum(map(len, kept))), dtype=torch.float64, device=device)]))
    mean, count = sums[0] / sums[1].clamp(min=1), sums[1]
    squares = all_reduce_(sum(((k - mean).square().sum() for k in kept), torch.zeros((), dtype=torch.float64, device=device)))
    # Bessel's correction: the mean was estimated from the same tokens.
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    return [torch.where(mask, (grid - mean) / (deviation + 1e-8), 0).to(grid.dtype) for grid, mask in zip(grids, masks, strict=True)]


def kl_estimate(log_probs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimates of KL(π || π_ref) by the tokens drawn from π: k1, k2 or k3 (Schulman, 2020, "Approximating KL divergence").

        k1 = log π/π_ref        k2 = (log π/π_ref)² / 2        k3 = π_ref/π - 1 - log π_ref/π
    """
    ratio = log_probs - reference
    if estimator == "k1":
        return ratio
    return ratio.square() / 2 if estimator == "k2" else torch.expm1(-ratio) + ratio
