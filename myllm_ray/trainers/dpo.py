"""Direct preference optimisation and losses derived from it.

The log-ratios of a pair of answers are

    r = log π(y|x) - log π_ref(y|x)          Δ = r_chosen - r_rejected

`dpo.loss` selects the loss of a pair. σ is the sigmoid, ε `label_smoothing`, β `beta`, γ `gamma`, and
l = log π(y|x) / |y|:

    sigmoid   -(1-ε) log σ(βΔ) - ε log σ(-βΔ)                  Rafailov et al., 2023, arXiv:2305.18290, eq. 7;
                                                               ε: cDPO (Mitchell, 2023)
    robust    [-(1-ε) log σ(βΔ) + ε log σ(-βΔ)] / (1 - 2ε)     Chowdhury et al., 2024, arXiv:2403.00409
    ipo       (Δ - 1/(2β))²                                    Azar et al., 2023, arXiv:2310.12036, eq. 17
    hinge     max(0, 1 - βΔ)                                   Zhao et al., 2023, arXiv:2305.10425 (SLiC),
                                                               with DPO's log-ratios
    apo_zero  1 - σ(β r_chosen) + σ(β r_rejected)              D'Oosterlinck et al., 2024, arXiv:2408.06266, eq. 7
    apo_down  σ(β r_chosen) + 1 - σ(βΔ)                        D'Oosterlinck et al., 2024, eq. 8
    simpo     as sigmoid, of β(l_chosen - l_rejected) - γ      Meng et al., 2024, arXiv:2405.14734, eq. 6
    orpo      -l_chosen - β log σ(odds(l_chosen) - odds(l_rejected)),  odds(l) = l - log(1 - e^l)
                                                               Hong et al., 2024, arXiv:2403.07691, eq. 6 and 7

The training minimises the average over the pairs of the global batch. With `length_normalization` (the default for
ipo), r is the mean over the tokens of the answer instead of the sum. KTO, for single labelled answers, is in
trainers/kto.py.

Deviation: The first term of ORPO is the likelihood of the answer only, as in the paper. It does not include the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, relu

from myllm_ray.common.micros import to_device
from myllm_ray.common.modules import adapters_off
from myllm_ray.common.types import Batch, MetricPairs, Micro, StepOutput
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.trainers import TrainerSection
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.preference import AnswerScores, PreferenceTrainer, ReferenceTable, answer_log_probs, answers_of
from myllm_ray.trainers.routing import with_router_loss
from myllm_ray.trainers.scoring import filled_rows
from myllm_ray.trainers.self_checks import policy_starts_at_reference


def pair_losses(policy: Tensor, reference: Tensor, config: DPOTrainer.Config) -> Tensor:
    """Returns (n,) the loss of each pair.

    Args:
        policy: (n, 2) log-probabilities of the chosen and the rejected answers under the policy, in nats: means over
            the tokens if `config.per_token`, else sums.
        reference: (n, 2) the same under the reference. Losses without a reference ignore it.
        config: The trainer's settings.

    Raises:
        ValueError: `config.loss` is not a pairwise loss.
    """
    beta, smoothing = config.beta, config.label_smoothing
    chosen, rejected = (policy - reference).unbind(1)
    delta = chosen - rejected
    # logsigmoid instead of log(sigmoid): the sigmoid of a large negative margin underflows to 0.
    match config.loss:
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
            margin = beta * (policy[:, 0] - policy[:, 1]) - config.gamma
            return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
        case "orpo":
            # expm1 avoids the cancellation in 1 - e^l when the likelihood is close to 1.
            odds = policy - torch.log(-torch.expm1(policy))
            return -policy[:, 0] - beta * logsigmoid(odds[:, 0] - odds[:, 1])
        case other:
            raise ValueError(f"{other} is not a pairwise loss")


class DPOTrainer(PreferenceTrainer):
    """Direct preference optimisation. `loss: kto` selects `KTOTrainer`.

    Args:
        model: The policy.
        reference: The frozen model whose log-probabilities are subtracted. None if the loss has no reference, if a
            table is given, or if the reference is the model without its adapters (`reference: adapter_off`).
        reference_table: Log-probabilities of the answers under the reference, in nats, instead of a model: a table, or
            a tensor (documents, 2).
        validation_table: The same for held-out data; default: `reference_table`.
        starts_at_reference: The policy equals its reference before the first step. `check` verifies this.
        others: See `BaseTrainer` and `PreferenceTrainer`.

    Raises:
        ConfigError: The loss needs a reference and none is given.
    """

    class Config(TrainerSection):
        """Settings of direct preference optimisation. The equations: trainers/dpo.py, trainers/kto.py."""

        loss: Literal["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo", "kto", "apo_zero", "apo_down"] = "sigmoid"
        beta: PositiveFloat = Field(
            0.1, description="strength of the tie to the reference; orpo: weight of the odds ratio"
        )
        label_smoothing: float = Field(
            0.0, ge=0, lt=0.5, description="share of preferences that are wrong (sigmoid: cDPO; robust; simpo)"
        )
        gamma: NonNegativeFloat = Field(
            0.5, description="simpo: target margin between the chosen and the rejected answer"
        )
        length_normalization: bool | None = Field(
            None, description="log-probabilities per token instead of per answer; default: for ipo, simpo and orpo"
        )
        desirable_weight: PositiveFloat = Field(1.0, description="kto: weight of desirable answers")
        undesirable_weight: PositiveFloat = Field(1.0, description="kto: weight of undesirable answers")
        reference: Literal["copy", "precomputed", "adapter_off"] = Field(
            "copy",
            description="copy: the model as it was at the start, frozen; precomputed: its log-probabilities, computed "
            "once and cached with the data; adapter_off: the model itself, without its LoRA adapters",
        )
        reference_model: str | None = Field(
            None, description="another reference: hub id or folder; default: the model itself"
        )
        shared_prompt: Literal["auto", "never"] = Field(
            "auto", description="compute a prompt once for both answers, if the model supports it"
        )

        @property
        def needs_reference(self) -> bool:
            return self.loss not in ("simpo", "orpo")

        @property
        def per_token(self) -> bool:
            normalized = self.length_normalization
            return self.loss in ("ipo", "simpo", "orpo") if normalized is None else normalized

        @model_validator(mode="after")
        def _fits_loss(self) -> Self:
            # A setting that the selected loss would ignore is an error.
            for name, losses in _LOSSES_OF.items():
                if self.loss not in losses and getattr(self, name) != type(self).model_fields[name].default:
                    plural = "es" * (len(losses) > 1)
                    raise ValueError(f"{name} belongs to the loss{plural} {', '.join(losses)}; loss is {self.loss}")
            if self.loss in ("simpo", "orpo") and self.length_normalization is False:
                raise ValueError(
                    f"{self.loss} is defined on log-probabilities per token: leave length_normalization out"
                )
            if self.reference_model is not None and not self.needs_reference:
                raise ValueError(f"{self.loss} has no reference: leave reference_model out")
            if self.reference != "copy" and not self.needs_reference:
                raise ValueError(f"{self.loss} has no reference: leave reference={self.reference} out")
            if self.reference_model is not None and self.reference == "adapter_off":
                raise ValueError("reference: adapter_off is the model itself: leave reference_model out")
            return self

        def check_run(self, config: TrainerConfig) -> None:
            if self.reference == "adapter_off" and config.model.lora is None:
                raise ValueError("dpo.reference=adapter_off needs adapters that can be disabled: set model.lora")
            if self.reference == "adapter_off" and config.model.lora and not config.model.lora.base_is_unchanged:
                raise ValueError(
                    "dpo.reference=adapter_off: without its adapters, the model is not its base (modules_to_save and "
                    "initialization: pissa change other weights); use dpo.reference=copy"
                )
            if self.loss == "kto" and config.batch.global_size < 2:
                raise ValueError(
                    "dpo.loss=kto compares answers with those of other prompts: batch.global_size must be at least 2"
                )

    config: Config
    dependencies: ClassVar[tuple[str, ...]] = (
        *PreferenceTrainer.dependencies,
        "reference",
        "reference_table",
        "validation_table",
        "starts_at_reference",
    )

    def __new__(cls, *arguments: Any, config: Config | None = None, **named: Any) -> Self:
        """Creates an instance of the class that the loss selects.

        `DPOTrainer(model, loss="kto")` is therefore the same trainer as that of a config with `dpo.loss: kto`.
        """
        loss = named.get("loss") if config is None else config.loss
        if cls is DPOTrainer and loss == "kto":
            # A subclass of `cls`, so Python calls `__init__` on the new object.
            return cast(Self, object.__new__(cls.for_config(cls.Config(loss="kto"))))
        return object.__new__(cls)

    @classmethod
    def for_config(cls, config: TrainerSection) -> type[BaseTrainer]:
        # Imported here because kto.py imports this module.
        from myllm_ray.trainers.kto import KTOTrainer

        if not isinstance(config, DPOTrainer.Config) or config.loss != "kto" or issubclass(cls, KTOTrainer):
            return cls
        if cls is not DPOTrainer:
            raise ConfigError(f"loss=kto: {cls.__name__} must be a subclass of KTOTrainer (myllm_ray.trainers.kto)")
        return KTOTrainer

    def __init__(
        self,
        model: nn.Module,
        dataset: Any = None,
        *,
        reference: nn.Module | None = None,
        reference_table: Tensor | ReferenceTable | None = None,
        validation_table: ReferenceTable | None = None,
        starts_at_reference: bool = False,
        **others: Any,
    ):
        super().__init__(model, dataset, **others)
        self.for_config(self.config)  # refuses a loss that this class does not compute
        self.reference, self.starts_at_reference = reference, starts_at_reference
        self.reference_table = (
            ReferenceTable(reference_table) if isinstance(reference_table, Tensor) else reference_table
        )
        self.validation_table = validation_table or self.reference_table
        self.adapter_off = self.config.needs_reference and self.config.reference == "adapter_off"
        if self.config.needs_reference and reference is None and reference_table is None and not self.adapter_off:
            raise ConfigError(f"dpo.loss={self.config.loss} needs a reference model: DPOTrainer(model, reference=...)")

    @property
    def frozen_models(self) -> dict[str, nn.Module]:
        return {} if self.reference is None else {"reference": self.reference}

    def optimizer_steps(self, batch: Batch) -> Iterator[list[Micro]]:
        """Yields one step, on the whole batch."""
        yield self.completed(batch, self.reference_table)

    def evaluation_micros(self, batch: Batch) -> list[Micro]:
        """Returns the micro-batches with the tensors that the loss needs in addition, as in training."""
        return self.completed(batch, self.validation_table)

    def completed(self, batch: Batch, table: ReferenceTable | None) -> list[Micro]:
        """Returns copies of the micro-batches of a batch, with `reference_log_probs` (rows, 2) if a table is given.

        Args:
            batch: This rank's share of a global batch.
            table: Log-probabilities under the reference, in nats, or None.
        """
        # Copies, because KTO adds tensors to them; the batch itself stays unchanged.
        if table is None:
            return [dict(micro) for micro in batch.micros]
        return [{**micro, "reference_log_probs": table.of(batch, micro)} for micro in batch.micros]

    def log_probs(self, micro: Micro, routing: bool = False, first_only: bool = False) -> AnswerScores:
        """Returns the scores of the answers under the policy.

        The log-probabilities are means over the tokens if `config.per_token`, else sums.

        Args:
            micro: The micro-batch.
            routing: Whether to compute the loss of the routers, for a mixture of experts.
            first_only: Whether the second answer of a row is not trained on (KTO).
        """
        micro = self.prepare_micro(micro)
        inputs, per_row = self.inputs(micro)
        routed = self.routing(micro, inputs, per_row, first_only) if routing else None
        scores = answer_log_probs(self.model, inputs, per_row, len(micro["segment_ids"]), routed, answers_of(micro))
        return scores._replace(log_probs=self._normalized(scores.log_probs, scores.lengths))

    def _normalized(self, total: Tensor, lengths: Tensor) -> Tensor:
        # Empty rows have answers of length 0; without the minimum, they would become NaN.
        return total / lengths.clamp(min=1) if self.config.per_token else total

    def reference_log_probs(self, micro: Micro) -> Tensor:
        """Returns (rows, 2) the log-probabilities under the reference, normalized as in `log_probs`.

        They are zeros if the loss has no reference.
        """
        # Counted from the segments, because a table contains only sums.
        lengths = torch.stack([(micro["segment_ids"] == n).sum(1) for n in (1, 2)], 1)
        return self._normalized(self.reference_sums(micro), lengths)

    @torch.no_grad()
    def reference_sums(self, micro: Micro) -> Tensor:
        """Returns (rows, 2) the log-probabilities of the answers under the reference, summed over their tokens.

        They are in nats, without gradient, and zeros if the loss has no reference.
        """
        rows = len(micro["segment_ids"])
        if not self.config.needs_reference:
            return torch.zeros(rows, 2, device=micro["segment_ids"].device)
        # From a table, or computed by KTO before the first step on the batch.
        if "reference_log_probs" in micro:
            return micro["reference_log_probs"]
        micro = self.prepare_micro(micro)
        inputs, per_row = self.inputs(micro)
        if self.adapter_off:
            # The frozen base weights of the policy are the reference, so no second model is in memory.
            with adapters_off(self.model):
                return answer_log_probs(self.model, inputs, per_row, rows, found=answers_of(micro))[0]
        assert self.reference is not None, "with a table, micro-batches come from `optimizer_steps`"
        return answer_log_probs(self.reference, inputs, per_row, rows, found=answers_of(micro))[0]

    def train_step(self, micro: Micro) -> StepOutput:
        """Returns the sum of the losses of the pairs."""
        # Empty rows pass through the model too, because all ranks must make the same collectives under FSDP.
        micro = self.prepare_micro(micro)
        kept = micro["filled"]
        scores = self.log_probs(micro, routing=True)
        policy, lengths = scores.log_probs[kept], scores.lengths[kept]
        reference = self.reference_log_probs(micro)[kept].to(policy.dtype)
        losses = pair_losses(policy, reference, self.config)
        metrics = self._metrics(policy.detach(), reference, lengths)
        output = StepOutput(losses.sum(), {**metrics, "tokens": (lengths.sum(), 1.0)})
        return with_router_loss(self.model, output, scores.router, filled_rows(micro).float())

    def _metrics(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> MetricPairs:
        """Returns metrics of n pairs; `policy` and `reference` as in `pair_losses`, `lengths` (n, 2) in tokens."""
        rewards, n = self.config.beta * (policy - reference), len(policy)
        margins = rewards[:, 0] - rewards[:, 1]
        named = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            # A tie counts as half: all margins are 0 while the policy equals its reference.
            "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
            "log_probs/chosen": policy[:, 0],
            "log_probs/rejected": policy[:, 1],
            "length/chosen": lengths[:, 0],
            "length/rejected": lengths[:, 1],
        }
        return {name: (values.sum(), n) for name, values in named.items()}

    @torch.no_grad()
    def check(self, batch: Batch) -> None:
        """Checks that the policy equals its reference on the first micro-batch: all log-ratios are close to 0.

        Raises:
            TrainingError: They are not.
        """
        if not self.config.needs_reference or not self.starts_at_reference:
            return
        # Not `self.completed`: that of KTO computes the divergence, which needs forward passes over the whole batch.
        first = DPOTrainer.completed(self, batch, self.reference_table)[0]
        micro = to_device(self.prepare_micro(first), self.device)
        with self.autocast():
            policy, lengths, _ = self.log_probs(micro)
            difference = policy - self.reference_log_probs(micro)
        # Per token, so that the tolerance does not depend on the lengths of the answers.
        per_token = difference if self.config.per_token else difference / lengths.clamp(min=1)
        policy_starts_at_reference(float(per_token.abs().max()))


_LOSSES_OF = {
    "label_smoothing": ("sigmoid", "robust", "simpo"),
    "gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Settings that only some losses use, with the names of these losses."""
