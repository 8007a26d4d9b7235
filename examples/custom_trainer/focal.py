"""A custom trainer: focal loss on tokens, in one file.

    L = Σ_t (1 - p_t)^γ · (-log p_t)  /  Σ_t 1          Lin et al., 2017, arXiv:1708.02002, equation 4

The sums are over the target tokens t of the global batch. The trainer returns sums, and the engine divides them. The
config names the trainer by import path (`trainer: focal:FocalTrainer`), so it also works on remote workers.
"""

from __future__ import annotations

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from myllm_ray.common.types import IGNORE, Micro, StepOutput, shifted_targets
from myllm_ray.config.trainers import TrainerSection
from myllm_ray.trainers.base import BaseTrainer


def focal_loss(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Returns the focal loss of each target, (T,), for logits (T, V) and targets (T,)."""
    nll = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return (1 - torch.exp(-nll)) ** gamma * nll


class FocalTrainer(BaseTrainer):
    """Trains with the focal loss. `options` in the config are the keys of `Config`."""

    class Config(TrainerSection):
        """Settings of the focal loss."""

        gamma: NonNegativeFloat = Field(2.0, description="exponent that reduces the loss of well-predicted tokens")

    def batch_weight(self, micro: Micro) -> Tensor:
        """Returns the number of target tokens, by which the engine divides the loss."""
        return (micro["labels"][:, 1:] != IGNORE).sum()

    def train_step(self, micro: Micro) -> StepOutput:
        """Returns the sum of the focal losses over the target tokens of a micro-batch."""
        targets = shifted_targets(micro["labels"])
        kept = targets != IGNORE
        logits = self.model(micro["input_ids"])
        losses = focal_loss(logits[kept], targets[kept], self.config.gamma)
        return StepOutput(losses.sum(), {"tokens": (torch.tensor(int(kept.sum())), 1.0)})
