"""What must hold on the first batch of a run with rollouts; a run in which it does not would train on something else.

Each raises a TrainingError that says what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from myllm_ray.common.types import Micro, StepOutput, TokenScores
from myllm_ray.config.errors import TrainingError
from myllm_ray.ops.advantages import token_mask
from myllm_ray.ops.rollouts import answer_tokens

SAME = 0.02
"""Nats a token that two passes of one model may differ by on average: bf16 rounds, and rounds otherwise in another layout."""


def ratio_is_one(first: Tensor, second: Tensor) -> None:
    """Two passes of the policy over the same tokens, (T,) log-probabilities each, before any weight has changed."""
    if len(first) and (worst := float((first - second).abs().mean())) > SAME:
        raise TrainingError(f"before the first step the importance ratio is not 1: two passes over the same answers differ by {worst:.3g} "
                            "nats a token; set the model's dropout to 0 (model.config: attention_dropout, resid_pdrop, ...)")


def packing_has_no_influence(packed: TokenScores, alone: TokenScores) -> None:
    """Scores of the same answers from rows that hold several, and from rows of their own."""
    for name, first, second in (("log-probabilities", packed.log_probs, alone.log_probs), ("values", packed.values, alone.values)):
        if first is None or second is None or not len(first):
            continue
        if not (apart := float((first - second).abs().mean())) <= SAME:
            raise TrainingError(f"answers that share a row see each other in this model: their {name} differ by {apart:.3g} a token from "
                                "those of answers in rows of their own; set data.packing: false (by hand: packs_rows=False)")


def reference_is_near(policy: Tensor, reference: Tensor) -> None:
    """(T,) log-probabilities under the policy and under the reference that it starts from."""
    if len(policy) and (worst := float((policy - reference).abs().mean())) > SAME:
        raise TrainingError(f"before the first step the policy is {worst:.3g} nats a token away from its reference, which should be "
                            "the same model: is there dropout in it?")


def answers_end_once(micro: Micro, end_tokens: Sequence[int]) -> None:
    """A token that ends an answer is nowhere in it but at its end, so that nothing behind it is a target."""
    scored = answer_tokens(micro)
    inside = torch.isin(scored.targets, torch.tensor(end_tokens, device=scored.targets.device)) & (scored.steps < micro["lengths"][scored.rows, 0] - 1)
    if bool(inside.any()):
        raise TrainingError("an answer continues behind a token that ends it: the sampler and the tokenizer disagree on what ends it")


def padding_has_no_influence(micro: Micro, loss: Callable[[Micro], StepOutput]) -> None:
    """NaN behind the ends of answers, in every grid, changes nothing."""
    lengths = micro["lengths"][:, 0]
    poisoned = dict(micro)
    for name, value in micro.items():
        if value.is_floating_point() and value.shape[1] > 1 and name != "function_rewards":
            poisoned[name] = value.masked_fill(~token_mask(lengths, value.shape[1]), math.nan)
    clean, other = float(loss(micro).loss_sum), float(loss(poisoned).loss_sum)
    if not math.isclose(clean, other, rel_tol=1e-4, abs_tol=1e-4) or not torch.isfinite(torch.tensor(other)):
        raise TrainingError(f"what stands behind the ends of answers changes the loss ({clean:.6g} without, {other:.6g} with NaN there): "
                            "a mask is wrong")
