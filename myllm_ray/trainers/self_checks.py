"""Checks of the trainers' assumptions on the first batch of a run.

If an assumption does not hold, the run would minimise a different loss without failing. Each function raises a
TrainingError that names the violation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from myllm_ray.common.types import Micro, StepOutput, TokenScores
from myllm_ray.config.errors import TrainingError
from myllm_ray.ops.advantages import token_mask
from myllm_ray.ops.rollouts import answer_tokens

if TYPE_CHECKING:
    from myllm_ray.trainers.online import OnlineTrainer

SAME = 0.02
"""Tolerance between two forward passes of a model, in nats per token: bf16 rounds differently in other layouts."""


def ratio_is_one(first: Tensor, second: Tensor) -> None:
    """Checks that two forward passes of the policy over the same tokens agree, before any weight has changed.

    Args:
        first, second: (T,) log-probabilities of the two passes, in nats.

    Raises:
        TrainingError: The mean absolute difference is greater than `SAME`.
    """
    if len(first) and (worst := float((first - second).abs().mean())) > SAME:
        raise TrainingError(
            "before the first step the importance ratio is not 1: two passes over the same answers differ by "
            f"{worst:.3g} nats per token; set the model's dropout to 0 (model.config: attention_dropout, resid_pdrop, "
            "...)"
        )


def packing_has_no_influence(packed: TokenScores, alone: TokenScores) -> None:
    """Checks that answers that share a row have the same scores as answers in separate rows.

    Args:
        packed: Scores of the answers in shared rows.
        alone: Scores of the same answers in separate rows.

    Raises:
        TrainingError: The mean absolute difference of the log-probabilities or of the values is greater than `SAME`.
    """
    for name, first, second in (
        ("log-probabilities", packed.log_probs, alone.log_probs),
        ("values", packed.values, alone.values),
    ):
        if first is None or second is None or not len(first):
            continue
        # `not <=` instead of `>`, so that NaN fails too.
        if not (apart := float((first - second).abs().mean())) <= SAME:
            raise TrainingError(
                f"answers that share a row see each other in this model: their {name} differ by {apart:.3g} per token "
                "from those in separate rows; set data.packing: false (without a config: packs_rows=False)"
            )


def policy_starts_at_reference(difference: float) -> None:
    """Checks that the policy equals its reference.

    Args:
        difference: Absolute difference of the log-probabilities of the two, in nats per token.

    Raises:
        TrainingError: The difference is greater than `SAME`, or NaN.
    """
    # `not <=` instead of `>`, so that NaN fails too.
    if not difference <= SAME:
        raise TrainingError(
            f"before the first step the policy is {difference:.3g} nats per token away from its reference, which "
            "should be the same model: either it has dropout, or the reference log-probabilities are those of another "
            "model"
        )


def answers_end_once(micro: Micro, end_tokens: Sequence[int]) -> None:
    """Checks that end tokens occur only at the end of an answer, so no token after an end token is a target.

    Args:
        micro: Training rows.
        end_tokens: Token ids that end an answer.

    Raises:
        TrainingError: An answer continues after an end token.
    """
    scored = answer_tokens(micro)
    inside = torch.isin(scored.targets, torch.tensor(end_tokens, device=scored.targets.device)) & (
        scored.steps < micro["lengths"][scored.rows, 0] - 1
    )
    if bool(inside.any()):
        raise TrainingError(
            "an answer continues after an end token: the sampler and the tokenizer have different end tokens"
        )


def padding_has_no_influence(micro: Micro, loss: Callable[[Micro], StepOutput]) -> None:
    """Checks that the values after the ends of answers, in every grid, do not change the loss.

    Args:
        micro: Training rows with grids (N, L).
        loss: Computes the loss of training rows.

    Raises:
        TrainingError: The loss changes or is not finite if these values are NaN.
    """
    lengths = micro["lengths"][:, 0]
    poisoned = dict(micro)
    # NaN survives a product with a mask of zeros, so the loss stays finite only if it never reads these values.
    # Grids are the floating-point tensors with more than one column. `function_rewards` has one column per reward.
    for name, value in micro.items():
        if value.is_floating_point() and value.shape[1] > 1 and name != "function_rewards":
            poisoned[name] = value.masked_fill(~token_mask(lengths, value.shape[1]), math.nan)
    clean, other = float(loss(micro).loss_sum), float(loss(poisoned).loss_sum)
    if not math.isclose(clean, other, rel_tol=1e-4, abs_tol=1e-4) or not torch.isfinite(torch.tensor(other)):
        raise TrainingError(
            f"values after the ends of answers change the loss ({clean:.6g} without, {other:.6g} with NaN there): "
            "a mask is wrong"
        )


@torch.no_grad()
def check_rollouts(trainer: OnlineTrainer, rows: Micro) -> None:
    """Makes all checks on the first training rows of a run.

    Raises:
        TrainingError: an assumption of this module does not hold.
    """
    with trainer.autocast():
        # Two passes in training mode differ if the model has dropout.
        (first, scored), (second, _) = trainer.score(trainer.model, rows), trainer.score(trainer.model, rows)
        ratio_is_one(first.log_probs, second.log_probs)
        if trainer.packs_rows:
            packing_has_no_influence(first, trainer.score(trainer.model, rows, packs_rows=False)[0])
        if "old_log_probs" in rows:
            ratio_is_one(first.log_probs, rows["old_log_probs"][scored.rows, scored.steps])
        if trainer.reference is not None and trainer.starts_at_reference:
            difference = first.log_probs - trainer.score(trainer.reference, rows)[0].log_probs
            policy_starts_at_reference(float(difference.abs().mean()) if len(difference) else 0.0)
        answers_end_once(rows, trainer.sampler.end_tokens)
        padding_has_no_influence(rows, trainer.train_step)
