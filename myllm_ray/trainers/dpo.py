"""Direct preference optimisation and its kin. With the log-ratios

    r = log π(y|x) - log π_ref(y|x)          Δ = r_chosen - r_rejected

the loss of a pair is, by `dpo.loss` (σ: sigmoid, ε: `label_smoothing`, β: `beta`, γ: `gamma`; l: log π(y|x) / |y|):

    sigmoid   -(1-ε) log σ(βΔ) - ε log σ(-βΔ)                  Rafailov et al., 2023, arXiv:2305.18290, eq. 7; ε: cDPO (Mitchell, 2023)
    robust    [-(1-ε) log σ(βΔ) + ε log σ(-βΔ)] / (1 - 2ε)     Chowdhury et al., 2024, arXiv:2403.00409
    ipo       (Δ - 1/(2β))²                                    Azar et al., 2023, arXiv:2310.12036, eq. 17
    hinge     max(0, 1 - βΔ)                                   Zhao et al., 2023, arXiv:2305.10425 (SLiC), with DPO's log-ratios
    apo_zero  1 - σ(β r_chosen) + σ(β r_rejected)              D'Oosterlinck et al., 2024, arXiv:2408.06266, eq. 7
    apo_down  σ(β r_chosen) + 1 - σ(βΔ)                        the same, eq. 8
    simpo     as sigmoid, of β(l_chosen - l_rejected) - γ      Meng et al., 2024, arXiv:2405.14734, eq. 6
    orpo      -l_chosen - β log σ(odds(l_chosen) - odds(l_rejected)),  odds(l) = l - log(1 - e^l)
                                                               Hong et al., 2024, arXiv:2403.07691, eq. 6 and 7
    kto       λ (1 - σ(±(β r - z))),  + and λ = `desirable_weight` for desirable answers, - and `undesirable_weight` for others;
              z = β max(0, mean over the global batch of r(x, y')), y' an answer to another prompt; without a gradient
                                                               Ethayarajh et al., 2024, arXiv:2402.01306, eq. 8

and its average over the pairs of the global batch is what is minimised. Where `length_normalization` is on (by default for
ipo), r is the mean over the tokens of the answer instead of the sum.

Deviation: ORPO's first term is the likelihood of the answer alone, as in the paper, not of the prompt too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, relu

from myllm_ray.common.distributed import all_reduce_
from myllm_ray.common.modules import adapters_off
from myllm_ray.common.types import Batch, MetricPairs, Micro, StepOutput
from myllm_ray.config.errors import ConfigError, TrainingError
from myllm_ray.config.trainers import DPOKnobs
from myllm_ray.trainers.preference import AnswerScores, PreferenceTrainer, ReferenceTable, answer_log_probs, filled
from myllm_ray.trainers.routing import with_router_loss


def pair_losses(policy: Tensor, reference: Tensor, knobs: DPOKnobs) -> Tensor:
    """The loss of each pair.

    Args:
        policy, reference: (n, 2) log-probabilities of chosen and rejected answers, sums or means over tokens as
            `knobs.per_token` says. Losses without a reference ignore it.

    Returns:
        (n,)
    """
    beta, smoothing = knobs.beta, knobs.label_smoothing
    chosen, rejected = (policy - reference).unbind(1)
    delta = chosen - rejected
    match knobs.loss:
        case "sigmoid":
            return -(1 - smoothing) * logsigmoid(beta * delta) - smoothing * logsigmoid(-beta * delta)
        case "robust":
            wrong = smoothing * logsigmoid(-beta * delta)
            return (-(1 - smoothing) * logsigmoid(beta * delta) + wrong) / (1 - 2 * smoothing)
        case "ipo":
            return (delta - 1 / (2 * beta)).square()
        case "hinge":
            return relu(1 - beta * delta)
        case "apo_zero":
            return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
        case "apo_down":
            return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * delta)
        case "simpo":
            margin = beta * (policy[:, 0] - policy[:, 1]) - knobs.gamma
            return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
        case "orpo":
            odds = policy - torch.log(-torch.expm1(policy))
            return -policy[:, 0] - beta * logsigmoid(odds[:, 0] - odds[:, 1])
        case other:
            raise ValueError(f"{other} is not a loss of pairs")


def kto_losses(log_ratios: Tensor, desirable: Tensor, divergence: Tensor | float, knobs: DPOKnobs) -> Tensor:
    """The loss of each answer: (n,) log-ratios, (n,) 1 or 0, and the divergence max(0, mean r(x, y')) -> (n,)."""
    gain = torch.sigmoid(knobs.beta * (log_ratios - divergence))
    loss = torch.sigmoid(knobs.beta * (divergence - log_ratios))
    return torch.where(desirable > 0, knobs.desirable_weight * (1 - gain), knobs.undesirable_weight * (1 - loss))


class DPOTrainer(PreferenceTrainer):
    """Direct preference optimisation.

    Args:
        knobs: the config's section `dpo`; or its keys as keyword arguments.
        reference: the model that is not to be left too far; None where the loss has none, or with a table.
            Left out where the knob `reference` is adapter_off.
        reference_table: log-probabilities of the answers under the reference instead of a model; a tensor is (documents, 2).
        validation_table: the same for held-out data; default: the training data's.
    """

    uses: ClassVar[tuple[str, ...]] = ("knobs", "shared_prompt", "reference", "reference_table", "validation_table")

    def __init__(self, model: nn.Module, dataset: Any = None, *, knobs: DPOKnobs | None = None, reference: nn.Module | None = None,
                 reference_table: Tensor | ReferenceTable | None = None, validation_table: ReferenceTable | None = None,
                 shared_prompt: bool = False, bytes_per_token: Any = None, sources: Any = (), **options: Any):
        super().__init__(model, dataset, shared_prompt=shared_prompt, bytes_per_token=bytes_per_token, sources=sources)
        self.knobs = knobs or DPOKnobs(**options)
        self.reads = ("labelled",) if self.knobs.loss == "kto" else ("pairs",)  # type: ignore[misc]
        self.reference = reference
        self.reference_table = ReferenceTable(reference_table) if isinstance(reference_table, Tensor) else reference_table
        self.validation_table = validation_table or self.reference_table
        self.adapter_off = self.knobs.needs_reference and self.knobs.reference == "adapter_off"
        if self.knobs.needs_reference and reference is None and reference_table is None and not self.adapter_off:
            raise ConfigError(f"dpo.loss={self.knobs.loss} needs a reference model: DPOTrainer(model, reference=...)")

    @property
    def frozen_models(self) -> dict[str, nn.Module]:
        return {} if self.reference is None else {"reference": self.reference}

    def expand(self, batch: Batch) -> Iterator[list[Micro]]:
        """One step."""
        yield self._completed(batch, self.reference_table)

    def evaluation_micros(self, batch: Batch) -> list[Micro]:
        """With what the loss needs besides, as in training."""
        return self._completed(batch, self.validation_table)

    def _completed(self, batch: Batch, table: ReferenceTable | None) -> list[Micro]:
        """Micro-batches with the log-probabilities of the table; for KTO with the divergence, too.

        It is measured on the whole global batch, so that it does not depend on its cut. What the reference says is computed here
        once, for the divergence and for the loss.
        """
        micros = self._looked_up(batch, table)
        if self.knobs.loss != "kto":
            return micros
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for micro in micros:
                moved = {name: tensor.to(self.device) for name, tensor in micro.items()}
                with self.autocast():
                    micro["reference_log_probs"] = self.reference_sums(moved)
                    moved["reference_log_probs"] = micro["reference_log_probs"]
                    ratios = (self.log_probs(moved)[0] - self.reference_log_probs(moved))[filled(moved), 1]
                total += torch.tensor([float(ratios.double().sum()), len(ratios)], dtype=torch.float64)
        total = all_reduce_(total.to(self.device)).cpu()
        divergence = max(0.0, float(total[0] / total[1]))
        return [{**micro, "divergence": torch.full((len(micro["segment_ids"]), 1), divergence)} for micro in micros]

    @staticmethod
    def _looked_up(batch: Batch, table: ReferenceTable | None) -> list[Micro]:
        return [{**micro, **({} if table is None else {"reference_log_probs": table.of(batch, micro)})} for micro in batch.micros]

    def log_probs(self, micro: Micro, routed: bool = False) -> AnswerScores:
        """Of the answers under the policy, as `per_token` says; `routed`: with the loss of the routers, if there are any."""
        inputs, per_row = self.inputs(micro)
        routing = self.routing(micro, inputs, per_row, first_only=self.knobs.loss == "kto") if routed else None
        scores = answer_log_probs(self.model, inputs, per_row, len(micro["segment_ids"]), routing)
        return scores._replace(log_probs=self._normalized(scores.log_probs, scores.lengths))

    def _normalized(self, total: Tensor, lengths: Tensor) -> Tensor:
        return total / lengths.clamp(min=1) if self.knobs.per_token else total

    def reference_log_probs(self, micro: Micro) -> Tensor:
        """The same under the reference; zeros where the loss has none."""
        lengths = torch.stack([(micro["segment_ids"] == n).sum(1) for n in (1, 2)], 1)
        return self._normalized(self.reference_sums(micro), lengths)

    @torch.no_grad()
    def reference_sums(self, micro: Micro) -> Tensor:
        """(rows, 2) log-probabilities of the answers under the reference, summed over their tokens."""
        rows = len(micro["segment_ids"])
        if not self.knobs.needs_reference:
            return torch.zeros(rows, 2, device=micro["segment_ids"].device)
        if "reference_log_probs" in micro:
            return micro["reference_log_probs"]
        inputs, per_row = self.inputs(micro)
        if self.adapter_off:
            with adapters_off(self.model):
                return answer_log_probs(self.model, inputs, per_row, rows)[0]
        assert self.reference is not None, "micro-batches of a run with a table come from `expand`"
        return answer_log_probs(self.reference, inputs, per_row, rows)[0]

    def train_step(self, micro: Micro) -> StepOutput:
        """Sum of the pairs' losses (KTO: of the answers')."""
        kept = filled(micro)
        scores = self.log_probs(micro, routed=True)
        policy, lengths = scores.log_probs[kept], scores.lengths[kept]
        reference = self.reference_log_probs(micro)[kept].to(policy.dtype)
        if self.knobs.loss == "kto":
            ratios, desirable = policy[:, 0] - reference[:, 0], micro["desirable"][kept, 0]
            losses = kto_losses(ratios, desirable, micro["divergence"][kept, 0].to(ratios.dtype), self.knobs)
            metrics = self._kto_metrics(ratios.detach(), desirable > 0, micro["divergence"][kept, 0])
        else:
            losses = pair_losses(policy, reference, self.knobs)
            metrics = self._pair_metrics(policy.detach(), reference, lengths)
        trained = lengths[:, :1] if self.knobs.loss == "kto" else lengths  # KTO's second answer only measures the divergence
        output = StepOutput(losses.sum(), {**metrics, "tokens": (trained.sum(), 1.0)})
        return with_router_loss(self.model, output, scores.router, kept.float())

    def _pair_metrics(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> MetricPairs:
        rewards, n = self.knobs.beta * (policy - reference), len(policy)
        margins = rewards[:, 0] - rewards[:, 1]
        named = {"rewards/chosen": rewards[:, 0], "rewards/rejected": rewards[:, 1], "rewards/margins": margins,
                 "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(), "log_probs/chosen": policy[:, 0],
                 "log_probs/rejected": policy[:, 1], "length/chosen": lengths[:, 0], "length/rejected": lengths[:, 1]}
        return {name: (values.sum(), n) for name, values in named.items()}

    def _kto_metrics(self, ratios: Tensor, desirable: Tensor, divergence: Tensor) -> MetricPairs:
        rewards = self.knobs.beta * ratios
        return {"rewards/chosen": (rewards[desirable].sum(), desirable.sum()),
                "rewards/rejected": (rewards[~desirable].sum(), (~desirable).sum()),
                "kl": (divergence.sum(), len(divergence))}

    def derive(self, metrics: dict[str, float]) -> dict[str, float]:
        """KTO: the margin between the means of desirable and undesirable answers."""
        found = super().derive(metrics)
        if self.knobs.loss == "kto" and {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            found["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return found

    @torch.no_grad()
    def check(self, batch: Batch) -> None:
        """The policy starts where its reference is: all log-ratios are 0."""
        if not self.knobs.needs_reference or not self.starts_at_reference:
            return
        micro = {name: tensor.to(self.device) for name, tensor in self._looked_up(batch, self.reference_table)[0].items()}
        with self.autocast():
            policy, lengths, _ = self.log_probs(micro)
            difference = (policy - self.reference_log_probs(micro)).abs() / (1.0 if self.knobs.per_token else lengths.clamp(min=1))
        worst = float(difference.max())
        if worst > _SAME:
            raise TrainingError(f"before the first step the policy is {worst:.3g} nats a token away from its reference, which should be "
                                "the same model: is there dropout in it, or were reference log-probabilities made for another model?")

    starts_at_reference = False
    """Whether the reference is the policy's own starting point; said by who builds both."""


_SAME = 0.02
"""Nats a token that two forward passes of one model may differ by: bf16 rounds, and rounds otherwise in another layout."""
