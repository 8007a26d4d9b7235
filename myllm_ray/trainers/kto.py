"""Kahneman-Tversky optimisation (Ethayarajh et al., 2024, arXiv:2402.01306).

It trains on single answers that are labelled desirable or undesirable. With the log-ratio
r = log π(y|x) - log π_ref(y|x), the loss of an answer is (eq. 8)

    λ (1 - σ(±(β r - z)))        + and λ = `desirable_weight` for desirable answers,
                                 - and λ = `undesirable_weight` for others
    z = β max(0, mean over the global batch of r(x, y'))

where y' is an answer to another prompt. z has no gradient. The training minimises the average over the answers of the
global batch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from myllm_ray.common.distributed import all_reduce_
from myllm_ray.common.micros import to_device
from myllm_ray.common.types import Batch, MetricPairs, Micro, StepOutput
from myllm_ray.ops.workload import Workload, pair_work
from myllm_ray.trainers.dpo import DPOTrainer
from myllm_ray.trainers.preference import ReferenceTable
from myllm_ray.trainers.routing import with_router_loss
from myllm_ray.trainers.scoring import filled_rows


def kto_losses(log_ratios: Tensor, desirable: Tensor, divergence: Tensor | float, config: DPOTrainer.Config) -> Tensor:
    """Returns (n,) the loss of each answer.

    Args:
        log_ratios: (n,) log-ratios r of the answers, in nats.
        desirable: (n,) 1 for desirable answers, else 0.
        divergence: max(0, mean r(x, y')) in nats, a scalar or (n,). β is applied here.
        config: The trainer's settings.
    """
    gain = torch.sigmoid(config.beta * (log_ratios - divergence))
    loss = torch.sigmoid(config.beta * (divergence - log_ratios))
    return torch.where(desirable > 0, config.desirable_weight * (1 - gain), config.undesirable_weight * (1 - loss))


class KTOTrainer(DPOTrainer):
    """Trains on labelled answers.

    A row contains the prompt, its answer, and the answer to another prompt of the batch. The constructor's arguments
    are those of `DPOTrainer`.
    """

    class Config(DPOTrainer.Config):
        """Settings of KTO: those of DPO, with `loss: kto`."""

        loss: Literal["kto"] = "kto"  # type: ignore[assignment]

    reads: ClassVar[tuple[str, ...]] = ("labelled",)

    def completed(self, batch: Batch, table: ReferenceTable | None) -> list[Micro]:
        """Returns micro-batches with `reference_log_probs` (rows, 2) and `divergence` (rows, 1).

        The divergence is max(0, mean r(x, y')) in nats. It is measured on the whole global batch, before the first
        micro-batch is trained on, so it does not depend on how the batch is split. The log-probabilities of the
        reference are computed once and used both for the divergence and for the loss. All ranks must call this method.

        Args:
            batch: This rank's share of a global batch.
            table: Log-probabilities under the reference; None: they are computed.
        """
        micros = [self.prepare_micro(micro) for micro in super().completed(batch, table)]
        # [sum of r(x, y'), number of filled rows] of this rank, in float64 because many terms are added.
        total = torch.zeros(2, dtype=torch.float64)
        # z has no gradient, so no autograd graph is needed.
        with torch.no_grad():
            for micro in micros:
                moved = to_device(micro, self.device)
                with self.autocast():
                    micro["reference_log_probs"] = self.reference_sums(moved)
                    moved["reference_log_probs"] = micro["reference_log_probs"]
                    # Column 1 is the answer to the other prompt. Empty rows fill up the last batch of an epoch.
                    ratios = (self.log_probs(moved)[0] - self.reference_log_probs(moved))[moved["filled"], 1]
                total += torch.tensor([float(ratios.double().sum()), len(ratios)], dtype=torch.float64)
        # Summed over ranks before the division, so every rank uses the mean over the global batch.
        total = all_reduce_(total.to(self.device)).cpu()
        divergence = max(0.0, float(total[0] / total[1]))
        return [{**micro, "divergence": torch.full((len(micro["segment_ids"]), 1), divergence)} for micro in micros]

    def train_step(self, micro: Micro) -> StepOutput:
        """Returns the sum of the losses of the answers."""
        micro = self.prepare_micro(micro)
        kept = micro["filled"]
        scores = self.log_probs(micro, routing=True, first_only=True)
        policy = scores.log_probs[kept]
        reference = self.reference_log_probs(micro)[kept].to(policy.dtype)
        ratios, desirable = policy[:, 0] - reference[:, 0], micro["desirable"][kept, 0]
        divergence = micro["divergence"][kept, 0]
        losses = kto_losses(ratios, desirable, divergence.to(ratios.dtype), self.config)
        # The second answer is used only for the divergence, so its tokens are not counted as trained on.
        tokens = scores.lengths[kept][:, :1].sum()
        metrics = {**self._answer_metrics(ratios.detach(), desirable > 0, divergence), "tokens": (tokens, 1.0)}
        return with_router_loss(
            self.model, StepOutput(losses.sum(), metrics), scores.router, filled_rows(micro).float()
        )

    def workload(self, micro: Micro) -> Workload:
        return pair_work(micro, self.shared_prompt, answers=1)

    def _answer_metrics(self, ratios: Tensor, desirable: Tensor, divergence: Tensor) -> MetricPairs:
        """Returns metrics per label. A mean over either label has its own number of answers as weight."""
        rewards = self.config.beta * ratios
        return {
            "rewards/chosen": (rewards[desirable].sum(), desirable.sum()),
            "rewards/rejected": (rewards[~desirable].sum(), (~desirable).sum()),
            "kl": (divergence.sum(), len(divergence)),
        }

    def derived_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Returns the margin between the mean rewards of desirable and undesirable answers, if both are present."""
        found = super().derived_metrics(metrics)
        # A metric with weight 0 is missing: no answer of the batch had that label.
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            found["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return found
