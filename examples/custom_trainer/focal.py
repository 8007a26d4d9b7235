"""A trainer of your own: focal loss on tokens, in one file.

    L = Σ_t (1 - p_t)^γ · (-log p_t)  /  Σ_t 1          Lin et al., 2017, arXiv:1708.02002, equation 4

over the target tokens of the global batch. The engine divides; this file only sums. The config names it by import path
(`trainer: focal:FocalTrainer`), so it also works on remote workers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from myllm_ray.common.types import IGNORE, Micro, StepOutput, shifted_targets
from myllm_ray.trainers.base import BaseTrainer


def focal_loss(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Focal loss of each target: logits (T, V), targets (T,) -> (T,)."""
    nll = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return (1 - torch.exp(-nll)) ** gamma * nll


class FocalTrainer(BaseTrainer):
    """`options: {gamma: 2.0}` in the config arrives here as a keyword argument."""

    def __init__(self, *arguments: Any, gamma: float = 2.0, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.gamma = gamma

    def batch_weight(self, micro: Micro) -> Tensor:
        """Target tokens."""
        return (micro["labels"][:, 1:] != IGNORE).sum()

    def train_step(self, micro: Micro) -> StepOutput:
        """Sum of the focal losses of the micro-batch's target tokens."""
        targets = shifted_targets(micro["labels"])
        kept = targets != IGNORE
        logits = self.model(micro["input_ids"])
        losses = focal_loss(logits[kept], targets[kept], self.gamma)
        return StepOutput(losses.sum(), {"tokens": (torch.tensor(int(kept.sum())), 1.0)})
