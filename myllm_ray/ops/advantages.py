"""Advantage estimation, KL estimates and whitening.

A grid is a tensor of shape (answers, tokens). Each row is valid up to the length of its answer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from myllm_ray.common.distributed import all_reduce_


class Advantages(NamedTuple):
    """Advantages and returns, (N, L) each, zero after the end of an answer."""

    advantages: Tensor
    returns: Tensor


def token_mask(lengths: Tensor, width: int) -> Tensor:
    """Returns a bool mask (N, width) of the tokens of each answer, from the lengths (N,)."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, discount: float, decay: float) -> Advantages:
    """Generalized advantage estimation (Schulman et al., 2016, arXiv:1506.02438, eq. 16), with returns A + V.

        δ_t = r_t + γ V_{t+1} - V_t          A_t = δ_t + γ λ A_{t+1}

    V and A are 0 after the last token of an answer, whether the answer ended with an end token or was truncated.

    Args:
        rewards, values: (N, L). Entries after the end of an answer are ignored.
        lengths: (N,) tokens in each answer.
        discount, decay: γ and λ.

    Returns:
        Advantages and returns, (N, L) each, zero after the end of an answer.
    """
    mask = token_mask(lengths, rewards.shape[1])
    # masked_fill rather than a product, which would keep non-finite entries after the end of an answer.
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(rewards)
    following = torch.zeros(len(rewards), dtype=rewards.dtype, device=rewards.device)
    next_value = torch.zeros_like(following)
    # The recursion runs backwards in time, vectorized over answers. Shorter answers start from V = A = 0.
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        following = torch.where(mask[:, t], delta + discount * decay * following, 0)
        advantages[:, t], next_value = following, values[:, t]
    return Advantages(advantages, torch.where(mask, advantages + values, 0))


def whiten(grids: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Normalizes grids to mean 0 and variance 1 over all valid tokens of all grids and ranks.

    The result does not depend on how the batch is split over grids and ranks. All ranks must call this function.

    Args:
        grids: Tensors (N, L), at least one.
        masks: Bool tensors of the same shapes, true at the valid tokens.

    Returns:
        Tensors of the same shapes and dtypes, zero where the mask is false.
    """
    # float64 makes sums over the whole batch insensitive to the order in which grids and ranks are added.
    kept = [grid[mask].double() for grid, mask in zip(grids, masks, strict=True)]
    device = grids[0].device
    sums = all_reduce_(
        torch.stack(
            [
                sum((k.sum() for k in kept), torch.zeros((), dtype=torch.float64, device=device)),
                torch.tensor(float(sum(map(len, kept))), dtype=torch.float64, device=device),
            ]
        )
    )
    # The mean is known before the squares are summed: E[x²] - E[x]² would cancel when the mean is large.
    mean, count = sums[0] / sums[1].clamp(min=1), sums[1]
    squares = all_reduce_(
        sum(((k - mean).square().sum() for k in kept), torch.zeros((), dtype=torch.float64, device=device))
    )
    # Bessel's correction, because the mean is estimated from the same tokens.
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    return [
        torch.where(mask, (grid - mean) / (deviation + 1e-8), 0).to(grid.dtype)
        for grid, mask in zip(grids, masks, strict=True)
    ]


def kl_estimate(log_probs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Returns per-token estimates of KL(π || π_ref) from tokens sampled from π.

        k1 = log π/π_ref        k2 = (log π/π_ref)² / 2        k3 = π_ref/π - 1 - log π_ref/π

    Source: Schulman, 2020, "Approximating KL divergence".

    Args:
        log_probs: Log-probabilities of the tokens under π, in nats.
        reference: Log-probabilities of the tokens under π_ref, of the same shape.
        estimator: "k1", "k2" or "k3".
    """
    ratio = log_probs - reference
    if estimator == "k1":
        return ratio
    # expm1 keeps precision in k3 when π is close to π_ref.
    return ratio.square() / 2 if estimator == "k2" else torch.expm1(-ratio) + ratio
