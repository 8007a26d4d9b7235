"""Reward models from pairwise preferences (Bradley and Terry, 1952; Ouyang et al., 2022, arXiv:2203.02155, eq. 1).

    L = mean over pairs of  -log σ(r(x, y_c) - r(x, y_r) - m)  +  c · (r(x, y_c) + r(x, y_r))²

r is a scalar head at the last token of an answer. m is the pair's margin, where the data has one (Touvron et al., 2023,
arXiv:2307.09288, eq. 2). c is `reward.centering`: only differences are determined by the first term (Eisenstein et al., 2023,
arXiv:2312.09244).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from myllm_ray.common.types import MetricPairs, Micro, RouterLosses, StepOutput
from myllm_ray.config.trainers import RewardKnobs
from myllm_ray.ops.pairs import last_tokens
from myllm_ray.trainers.preference import PreferenceTrainer, filled
from myllm_ray.trainers.routing import with_router_loss

_BINS = 10
"""Bins of confidence for the calibration error."""


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, centering: float = 0.0) -> Tensor:
    """The loss of each pair: (n,) rewards of chosen and rejected answers, (n,) margins -> (n,)."""
    return -logsigmoid(chosen - rejected - margins) + centering * (chosen + rejected).square()


def calibration(difference: Tensor) -> MetricPairs:
    """How far the confidence σ(|difference|) is from how often it is right, bin by bin: gaps whose absolute values add up.

    Expected calibration error, Guo et al., 2017, arXiv:1706.04599, eq. 3.
    """
    confidence = torch.sigmoid(difference.abs())
    gap = confidence - (difference > 0).float()
    bins = ((confidence - 0.5) * 2 * _BINS).long().clamp(0, _BINS - 1)
    return {f"_calibration/{number}": (gap[bins == number].sum(), len(difference)) for number in range(_BINS)}


class RewardTrainer(PreferenceTrainer):
    """A pairwise reward model."""

    trains: ClassVar[str] = "reward_model"
    uses: ClassVar[tuple[str, ...]] = ("knobs", "shared_prompt")

    def __init__(self, model: nn.Module, dataset: Any = None, *, knobs: RewardKnobs | None = None, shared_prompt: bool = False,
                 bytes_per_token: Any = None, sources: Any = (), **options: Any):
        super().__init__(model, dataset, shared_prompt=shared_prompt, bytes_per_token=bytes_per_token, sources=sources)
        self.knobs = knobs or RewardKnobs(**options)

    def rewards(self, micro: Micro) -> tuple[Tensor, RouterLosses | None]:
        """(rows, 2): rewards of the first and the second answer of each row; 0 in rows without. And the loss of the routers, if any."""
        inputs, per_row = self.inputs(micro)
        ends, numbers = last_tokens(inputs["segment_ids"], per_row)
        given = {k: inputs[k] for k in ("input_ids", "position_ids", "attention_mask") if k in inputs}
        found = self.model(ends=ends, **given, **self.routing(micro, inputs, per_row))
        scores, router = found if isinstance(found, tuple) else (found, None)
        rows = len(micro["segment_ids"])
        return torch.zeros(2 * rows, dtype=scores.dtype, device=scores.device).index_put((numbers,), scores).view(rows, 2), router

    def train_step(self, micro: Micro) -> StepOutput:
        """Sum of the pairs' losses."""
        kept = filled(micro)
        rewards, router = self.rewards(micro)
        chosen, rejected = rewards[kept].unbind(1)
        losses = bradley_terry_loss(chosen, rejected, micro["margins"][kept, 0].to(chosen.dtype), self.knobs.centering)
        difference = (chosen - rejected).detach()
        n = len(losses)
        output = StepOutput(losses.sum(), {
            "accuracy": ((difference > 0).sum(), n), "margin": (difference.sum(), n),
            "rewards/chosen": (chosen.detach().sum(), n), "rewards/rejected": (rejected.detach().sum(), n),
            "brier_score": ((1 - torch.sigmoid(difference)).square().sum(), n),
            "tokens": ((micro["segment_ids"] > 0).sum(), 1.0), **calibration(difference)})
        return with_router_loss(self.model, output, router, kept.float())

    def derive(self, metrics: dict[str, float]) -> dict[str, float]:
        """The expected calibration error."""
        error = sum(abs(v) for name, v in metrics.items() if name.startswith("_calibration/"))
        return {"calibration_error": error, **super().derive(metrics)}
