"""Reward models from pairwise preferences (Bradley and Terry, 1952; Ouyang et al., 2022, arXiv:2203.02155, eq. 1).

    L = mean over pairs of  -log σ(r(x, y_c) - r(x, y_r) - m)  +  c · (r(x, y_c) + r(x, y_r))²

r is the output of a scalar head at the last token of an answer. m is the margin of the pair, or 0 if the data has no
margins (Touvron et al., 2023, arXiv:2307.09288, eq. 2). c is `reward.centering`. The first term determines only
differences of rewards; the second keeps the rewards close to 0 (Eisenstein et al., 2023, arXiv:2312.09244).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from myllm_ray.common.types import MetricPairs, Micro, RouterLosses, StepOutput
from myllm_ray.config.trainers import TrainerSection
from myllm_ray.ops.pairs import last_tokens
from myllm_ray.trainers.preference import PreferenceTrainer
from myllm_ray.trainers.routing import with_router_loss
from myllm_ray.trainers.scoring import filled_rows

_BINS = 10
"""Number of confidence bins of the calibration error."""


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, centering: float = 0.0) -> Tensor:
    """Returns (n,) the loss of each pair.

    Args:
        chosen: (n,) rewards of the chosen answers.
        rejected: (n,) rewards of the rejected answers.
        margins: (n,) margins m.
        centering: The coefficient c.
    """
    # logsigmoid instead of log(sigmoid): the sigmoid of a large negative difference underflows to 0.
    return -logsigmoid(chosen - rejected - margins) + centering * (chosen + rejected).square()


def calibration(difference: Tensor) -> MetricPairs:
    """Returns the gap between confidence and accuracy in each confidence bin, as metrics (sum, weight).

    The confidence of a pair is σ(|difference|). The sum of the absolute gaps is the expected calibration error, Guo et
    al., 2017, arXiv:1706.04599, eq. 3.

    Args:
        difference: (n,) reward of the chosen minus reward of the rejected answer, detached.
    """
    confidence = torch.sigmoid(difference.abs())
    gap = confidence - (difference > 0).float()
    # `derived_metrics` takes the absolute values, after the sums over micro-batches and ranks. The weight of each gap
    # is the number of all pairs, so the averaged gaps already contain the share of the bin.
    bins = ((confidence - 0.5) * 2 * _BINS).long().clamp(0, _BINS - 1)
    # One column per bin instead of boolean masks, which would synchronize with the device.
    in_bin = bins[:, None] == torch.arange(_BINS, device=bins.device)
    sums = torch.where(in_bin, gap[:, None].double(), 0.0).sum(0)
    return {f"_calibration/{number}": (total, len(difference)) for number, total in enumerate(sums)}


class RewardTrainer(PreferenceTrainer):
    """Trains a pairwise reward model."""

    class Config(TrainerSection):
        """Settings of a pairwise reward model."""

        centering: NonNegativeFloat = Field(
            0.0, description="weight of (r_chosen + r_rejected)^2, which keeps rewards around zero"
        )
        shared_prompt: Literal["auto", "never"] = Field(
            "auto", description="compute a prompt once for both answers, if the model supports it"
        )

    config: Config
    trains: ClassVar[str] = "reward_model"

    def prepare_micro(self, micro: Micro) -> Micro:
        """Returns the micro-batch of the base class with the last tokens of its answers, `ends` and `end_answers`."""
        prepared = super().prepare_micro(micro)
        if prepared is micro:
            return micro
        inputs, per_row = self.inputs(prepared)
        ends, numbers = last_tokens(inputs["segment_ids"], per_row)
        return {**prepared, "ends": ends, "end_answers": numbers}

    def rewards(self, micro: Micro) -> tuple[Tensor, RouterLosses | None]:
        """Returns the rewards of the two answers of each row, and the loss of the routers.

        Returns:
            (rows, 2) rewards, 0 in empty rows; and the loss of the routers, or None if the model has no routers.
        """
        micro = self.prepare_micro(micro)
        inputs, per_row = self.inputs(micro)
        ends, numbers = micro["ends"], micro["end_answers"]
        given: dict[str, Any] = {k: inputs[k] for k in ("input_ids", "position_ids", "attention_mask") if k in inputs}
        # Rows of one answer are not packed, and those of two come with a mask.
        if getattr(getattr(self.model, "module", self.model), "takes_places", False):
            given["packed"] = False
        found = self.model(ends=ends, **given, **self.routing(micro, inputs, per_row))
        scores, router = found if isinstance(found, tuple) else (found, None)
        rows = len(micro["segment_ids"])
        # `scores` has no entries for empty rows, whose rewards stay 0. The out-of-place index_put is differentiable.
        return torch.zeros(2 * rows, dtype=scores.dtype, device=scores.device).index_put((numbers,), scores).view(
            rows, 2
        ), router

    def train_step(self, micro: Micro) -> StepOutput:
        """Returns the sum of the losses of the pairs."""
        # Empty rows pass through the model too, because all ranks must make the same collectives under FSDP.
        micro = self.prepare_micro(micro)
        kept = micro["filled"]
        rewards, router = self.rewards(micro)
        chosen, rejected = rewards[kept].unbind(1)
        losses = bradley_terry_loss(chosen, rejected, micro["margins"][kept, 0].to(chosen.dtype), self.config.centering)
        # Detached: metrics must not keep the autograd graph of the micro-batch in memory.
        difference = (chosen - rejected).detach()
        n = len(losses)
        output = StepOutput(
            losses.sum(),
            {
                "accuracy": ((difference > 0).sum(), n),
                "margin": (difference.sum(), n),
                "rewards/chosen": (chosen.detach().sum(), n),
                "rewards/rejected": (rejected.detach().sum(), n),
                "brier_score": ((1 - torch.sigmoid(difference)).square().sum(), n),
                "tokens": ((micro["segment_ids"] > 0).sum(), 1.0),
                **calibration(difference),
            },
        )
        return with_router_loss(self.model, output, router, filled_rows(micro).float())

    def derived_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Returns the expected calibration error, in addition to the metrics of the base class."""
        error = sum(abs(v) for name, v in metrics.items() if name.startswith("_calibration/"))
        return {"calibration_error": error, **super().derived_metrics(metrics)}
